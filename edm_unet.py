"""EDMUNet: the denoisers that EDM publishes (Karras et al. 2022, arXiv 2206.00364, appendix F.1).

    net = EDMUNet(model_channels=128, label_dim=10)
    x0_hat = net(x_t, sigma, labels)

Three networks with the interface of SimpleUNet: DDPM++ and NCSN++ of Song et al. (2021, arXiv 2011.13456), which EDM
calls VP and VE (class SongUNet), and ADM of Dhariwal & Nichol (2021, arXiv 2105.05233; class DhariwalUNet). The
default, VP for CIFAR-10, has three times the parameters of SimpleUNet and takes 34 times its compute. The parameters
have the names and shapes that they have in EDM's files, which support/edm_pickle.py reads.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from constants import IMAGE_SIZE
from model import Denoiser

SQRT_HALF = math.sqrt(1 / 2)        # scales the sum of two terms of unit variance back to unit variance


class PositionalEmbedding(nn.Module):
    """Noise levels c_noise [B] to [B, channels], of VP: sines and cosines of frequencies from 1 down to 1 / 10000."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", torch.logspace(0, -4, channels // 2), persistent=False)

    def forward(self, c_noise):
        angles = c_noise[:, None] * self.freqs                                      # [B, channels / 2]
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class FourierEmbedding(nn.Module):
    """The same of VE: the frequencies are random, and part of the weights."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, c_noise):
        angles = c_noise[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class ADMEmbedding(nn.Module):
    """The same of ADM: without the frequency 1 / 10000, and with the cosines first."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", torch.logspace(0, -4, channels // 2 + 1)[:-1], persistent=False)

    def forward(self, c_noise):
        angles = c_noise[:, None] * self.freqs
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class Resample(nn.Module):
    """Halve or double the resolution with a filter, the same on both axes and in all channels.

    Args:
        taps: the filter on one axis, of even length; its sum does not matter.
        padding: zeros around the image; by default as many as halve or double its size exactly.
    """

    def __init__(self, taps, up=False, padding=None):
        super().__init__()
        taps = torch.tensor(taps, dtype=torch.float32) / sum(taps)
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None] * (4 if up else 1), persistent=False)
        self.resample = F.conv_transpose2d if up else F.conv2d
        self.padding = len(taps) // 2 - 1 if padding is None else padding

    def forward(self, x):
        kernel = self.kernel.expand(x.shape[1], -1, -1, -1)                         # [C, 1, K, K]
        return self.resample(x, kernel, stride=2, padding=self.padding, groups=x.shape[1])


class AuxResidual(nn.Conv2d):
    """The auxiliary image [B, Cin, H, W], convolved and halved, for the residual encoder of VE: [B, Cout, H/2, W/2].

    The filter pads the auxiliary image, before the convolution, and not the convolution's output.
    """

    def __init__(self, in_channels, out_channels, taps):
        super().__init__(in_channels, out_channels, 3, padding=len(taps) // 2)
        self.halve = Resample(taps, padding=0)

    def forward(self, x):
        return self.halve(super().forward(x))


def group_norm(channels, eps=1e-6):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class Block(nn.Module):
    """A residual block of two 3x3 convolutions, the embedding added between them; then self-attention.

    Args:
        resample: module that halves or doubles the resolution before the first convolution and on the skip connection.
        heads: number of attention heads; 0: no attention.
        skip_scale: factor of the sum with the skip connection, and of that with the attention.
        adaptive_scale: the embedding scales and shifts the second normalisation instead.
        convolve_skip: a block that resamples has a convolution on the skip connection even between equal channels.
        eps: of the normalisations.
    """

    def __init__(
        self, in_channels, out_channels, emb_channels, resample=None, heads=0, skip_scale=SQRT_HALF,
        adaptive_scale=False, convolve_skip=True, eps=1e-6,
    ):
        super().__init__()
        self.resample = resample or nn.Identity()
        self.norm0 = group_norm(in_channels, eps)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, out_channels * (1 + adaptive_scale))
        self.norm1 = group_norm(out_channels, eps)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels and not (resample and convolve_skip)
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.heads, self.skip_scale, self.adaptive_scale = heads, skip_scale, adaptive_scale
        if heads:
            if out_channels % heads:
                raise ValueError(f"{out_channels} channels do not divide into {heads} attention heads")
            self.norm2 = group_norm(out_channels, eps)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x, emb):                                                      # [B, Cin, H, W], [B, E]
        h = self.conv0(self.resample(F.silu(self.norm0(x))))                        # [B, Cout, H', W']
        emb = self.affine(emb)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = emb.chunk(2, dim=1)                                      # [B, Cout, 1, 1] each
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + emb)
        h = self.conv1(F.silu(h))
        x = (self.skip(self.resample(x)) + h) * self.skip_scale
        return (x + self.attend(self.norm2(x))) * self.skip_scale if self.heads else x

    def attend(self, x):                                                            # [B, C, H, W]
        b, c, h, w = x.shape
        # In each head, channel 3 i + j: i of q, k, v.
        qkv = self.qkv(x).reshape(b, self.heads, c // self.heads, 3, h * w)
        q, k, v = qkv.transpose(2, 4).unbind(3)                                     # [B, heads, HW, C/heads] each
        a = F.scaled_dot_product_attention(q, k, v)                                 # softmax(q k^T / sqrt(d)) v
        return self.proj(a.transpose(2, 3).reshape(b, c, h, w))


class EDMUNet(Denoiser):
    """The network; by default VP for CIFAR-10, of the size of the published one. Its weights are meant to be loaded.

    Args:
        model_channels: width of the first convolution, a multiple of 4.
        label_dim: number of classes; 0: there are none, and labels are ignored.
        channel_mult: width of each resolution, that of the images and its halves, in units of model_channels.
        channel_mult_emb: width of the embedding, in the same unit.
        num_blocks: blocks per resolution on the way down; there is one more on the way up.
        attn_resolutions: resolutions with attention, in pixels: in all blocks on the way down, and on the way up in the
            last one (SongUNet) or all of them (DhariwalUNet).
        sigma_data: standard deviation of the clean images, whose range is [-1, 1].
        img_resolution: height and width of the images, in pixels.
        model_type: "SongUNet", or "DhariwalUNet" for ADM, for which the arguments below keep their defaults.
        embedding_type: "positional", or "fourier" for VE.
        encoder_type: "standard", or "residual" for VE: the noisy image enters again at every resolution.
        channel_mult_noise: width of the noise level's sines and cosines; 1, or 2 for VE.
        resample_filter: filter of one axis for halving and doubling; [1, 1], or [1, 3, 3, 1] for VE.
    """

    def __init__(
        self, model_channels=128, label_dim=10, channel_mult=(2, 2, 2), channel_mult_emb=4, num_blocks=4,
        attn_resolutions=(16,), sigma_data=0.5, img_resolution=IMAGE_SIZE, model_type="SongUNet",
        embedding_type="positional", encoder_type="standard", channel_mult_noise=1, resample_filter=(1, 1),
    ):
        super().__init__()
        adm, taps = model_type == "DhariwalUNet", list(resample_filter)
        sizes = [img_resolution >> level for level in range(len(channel_mult))]     # 32, 16, 8
        if model_channels < 4 or model_channels % 4 or label_dim < 0:
            got = f"{model_channels} and {label_dim}"
            raise ValueError(f"model_channels must be a positive multiple of 4, label_dim at least 0, got {got}")
        if not sizes or min(channel_mult_emb, channel_mult_noise, num_blocks, *channel_mult) < 1:
            got = f"{channel_mult_emb}, {channel_mult_noise}, {num_blocks} and {list(channel_mult)}"
            raise ValueError(
                f"channel_mult_emb, channel_mult_noise, num_blocks and each channel_mult must be at least 1, got {got}"
            )
        if img_resolution < 1 or img_resolution % 2 ** (len(sizes) - 1):
            raise ValueError(f"img_resolution {img_resolution} cannot be halved {len(sizes) - 1} times")
        for name, value, known in (
            ("model_type", model_type, ("SongUNet", "DhariwalUNet")),
            ("embedding_type", embedding_type, ("positional",) if adm else ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard",) if adm else ("standard", "residual")),
            ("channel_mult_noise", channel_mult_noise, (1,) if adm else (channel_mult_noise,)),
            ("resample_filter", taps, ([1, 1],) if adm else ([1, 1], [1, 3, 3, 1])),
        ):
            if value not in known:
                raise ValueError(f"{name} of a {model_type} must be {' or '.join(map(repr, known))}, got {value!r}")
        self.config = dict(
            model_channels=model_channels, label_dim=label_dim, channel_mult=list(channel_mult),
            channel_mult_emb=channel_mult_emb, num_blocks=num_blocks, attn_resolutions=list(attn_resolutions),
            sigma_data=sigma_data, img_resolution=img_resolution, model_type=model_type, embedding_type=embedding_type,
            encoder_type=encoder_type, channel_mult_noise=channel_mult_noise, resample_filter=taps,
        )
        self.label_dim, self.sigma_data, self.image_size, self.adm = label_dim, sigma_data, img_resolution, adm
        emb, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise

        if adm:
            self.map_noise = ADMEmbedding(noise)
            self.map_label = nn.Linear(label_dim, emb, bias=False) if label_dim else None
        else:
            self.map_noise = dict(positional=PositionalEmbedding, fourier=FourierEmbedding)[embedding_type](noise)
            self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_layer0 = nn.Linear(noise, emb)
        self.map_layer1 = nn.Linear(emb, emb)

        eps = 1e-5 if adm else 1e-6
        block = functools.partial(Block, emb_channels=emb, eps=eps)
        if adm:
            block = functools.partial(block, skip_scale=1, adaptive_scale=True, convolve_skip=False)

        def heads(channels, attention=True):        # in ADM of 64 channels each: none where there are fewer
            return attention * (channels // 64 if adm else 1)

        def down():                                 # with [1, 1] a mean, and nearest neighbour, which are faster so
            return nn.AvgPool2d(2) if taps == [1, 1] else Resample(taps)

        def up():
            return nn.Upsample(scale_factor=2, mode="nearest") if taps == [1, 1] else Resample(taps, up=True)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c = model_channels * channel_mult[0] if adm else model_channels             # current width
        c_aux, skips = 3, []                        # widths of the auxiliary image and of the skip connections
        for size, mult in zip(sizes, channel_mult, strict=True):
            if size == img_resolution:
                self.enc[f"{size}x{size}_conv"] = nn.Conv2d(3, c, 3, padding=1)
            else:
                self.enc[f"{size}x{size}_down"] = block(c, c, resample=down())
                if encoder_type == "residual":
                    self.enc[f"{size}x{size}_aux_residual"] = AuxResidual(c_aux, c, taps)
                    c_aux = c
            skips.append(c)
            for i in range(num_blocks):
                c_in, c = c, model_channels * mult
                self.enc[f"{size}x{size}_block{i}"] = block(c_in, c, heads=heads(c, size in attn_resolutions))
                skips.append(c)
        self.feature_channels = [model_channels * mult for mult in channel_mult] + [c]
        self.bottleneck_size = sizes[-1]
        for size, mult in reversed(list(zip(sizes, channel_mult, strict=True))):
            if size == sizes[-1]:
                self.dec[f"{size}x{size}_in0"] = block(c, c, heads=heads(c))
                self.dec[f"{size}x{size}_in1"] = block(c, c)
            else:
                self.dec[f"{size}x{size}_up"] = block(c, c, resample=up())
            for i in range(num_blocks + 1):
                c_in, c = c + skips.pop(), model_channels * mult
                attention = (adm or i == num_blocks) and size in attn_resolutions
                self.dec[f"{size}x{size}_block{i}"] = block(c_in, c, heads=heads(c, attention))
        out_norm, out_conv = group_norm(c, eps), nn.Conv2d(c, 3, 3, padding=1)
        if adm:
            self.out_norm, self.out_conv = out_norm, out_conv
        else:
            self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = out_norm
            self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = out_conv

    def embed(self, c_noise, labels):
        """The embedding [B, E] of noise levels c_noise [B] and labels [B]."""
        emb, label = self.map_noise(c_noise), 0                                     # [B, N]
        if self.label_dim:
            classes = torch.arange(self.label_dim, device=c_noise.device)
            onehot = (labels[:, None] == classes).to(emb.dtype)                     # [B, label_dim]; no class: zeros
            label = self.map_label(onehot if self.adm else onehot * math.sqrt(self.label_dim))
        if self.adm:                                # the label joins after the layers
            return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))) + label)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb + label))))

    def network(self, x, c_noise, labels, return_features=False):
        """The raw network F of table 1; arguments as in forward, x and sigma already preconditioned.

        The features are those of the last block of each resolution, and of the second block on the way up, the
        bottleneck: in the published networks for CIFAR-10 [B, 256, 32, 32], [B, 256, 16, 16] and twice [B, 256, 8, 8].
        """
        emb = self.embed(c_noise, labels)                                           # [B, E]
        h, aux, skips = x, x, []
        for block in self.enc.values():             # [B, 3, H, W] to [B, C, h, h], h: bottleneck_size
            if isinstance(block, AuxResidual):
                h = skips[-1] = aux = (h + block(aux)) * SQRT_HALF
            else:
                h = block(h, emb) if isinstance(block, Block) else block(h)
                skips.append(h)
        per_level = len(skips) // (len(self.feature_channels) - 1)
        for name, block in self.dec.items():        # and back to [B, C, H, W]
            if not isinstance(block, Block):
                break
            if "_block" in name:
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb)
            if return_features and name.endswith("_in1"):
                return [*skips[per_level - 1 :: per_level], h]
        out_norm, out_conv = (self.out_norm, self.out_conv) if self.adm else list(self.dec.values())[-2:]
        return out_conv(F.silu(out_norm(h)))                                        # [B, 3, H, W]
