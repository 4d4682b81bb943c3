"""EDMUNet: the denoiser of EDM's published CIFAR-10 networks (Karras et al. 2022, arXiv 2206.00364, appendix F.1).

    net = EDMUNet(model_channels=128, label_dim=10)
    x0_hat = net(x_t, sigma, labels)

It is the DDPM++ network of Song et al. (2021, arXiv 2011.13456) as EDM trains it, with the interface of SimpleUNet,
which has a third of its parameters and takes 1/34 of its compute. The parameters have the names and shapes that they
have in EDM's files, which support/edm_pickle.py reads.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model import IMAGE_SIZE, Denoiser


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Block(nn.Module):
    """A residual block of two 3x3 convolutions, the embedding added between them; then self-attention, one head.

    Args:
        resample: module that halves or doubles the resolution before the first convolution and on the skip connection.
    """

    def __init__(self, in_channels, out_channels, emb_channels, resample=None, attention=False):
        super().__init__()
        self.resample = resample or nn.Identity()
        self.norm0 = group_norm(in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, out_channels)
        self.norm1 = group_norm(out_channels)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels and resample is None
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = attention
        if attention:
            self.norm2 = group_norm(out_channels)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x, emb):                                                      # [B, Cin, H, W], [B, E]
        h = self.conv0(self.resample(F.silu(self.norm0(x))))                        # [B, Cout, H', W']
        h = h + self.affine(emb)[:, :, None, None]
        h = self.conv1(F.silu(self.norm1(h)))
        # The sum of two terms of unit variance, scaled back to unit variance; likewise below.
        x = (self.skip(self.resample(x)) + h) * math.sqrt(1 / 2)
        return (x + self.attend(self.norm2(x))) * math.sqrt(1 / 2) if self.attention else x

    def attend(self, x):                                                            # [B, C, H, W]
        b, c, h, w = x.shape
        qkv = self.qkv(x).reshape(b, 1, c, 3, h * w)                                # channel 3 i + j: i of q, k, v
        q, k, v = qkv.transpose(2, 4).unbind(3)                                     # [B, 1, HW, C] each
        a = F.scaled_dot_product_attention(q, k, v)                                 # softmax(q k^T / sqrt(C)) v
        return self.proj(a.transpose(2, 3).reshape(b, c, h, w))


class EDMUNet(Denoiser):
    """The network; by default of the size of those published. Its weights are meant to be loaded.

    Args:
        model_channels: width of the first convolution, a multiple of 4.
        label_dim: number of classes; 0: there are none, and labels are ignored.
        channel_mult: width of each resolution, 32x32 and its halves, in units of model_channels.
        channel_mult_emb: width of the embedding, in the same unit.
        num_blocks: blocks per resolution on the way down; there is one more on the way up.
        attn_resolutions: resolutions with attention, in pixels: in all blocks on the way down, the last on the way up.
        sigma_data: standard deviation of the clean images, whose range is [-1, 1].
    """

    def __init__(
        self, model_channels=128, label_dim=10, channel_mult=(2, 2, 2), channel_mult_emb=4, num_blocks=4,
        attn_resolutions=(16,), sigma_data=0.5,
    ):
        super().__init__()
        sizes = [IMAGE_SIZE // 2**level for level in range(len(channel_mult))]      # 32, 16, 8
        if model_channels < 4 or model_channels % 4 or label_dim < 0:
            got = f"{model_channels} and {label_dim}"
            raise ValueError(f"model_channels must be a positive multiple of 4, label_dim at least 0, got {got}")
        if not 1 <= len(sizes) <= 4 or min(channel_mult_emb, num_blocks, *channel_mult) < 1:
            got = f"{channel_mult_emb}, {num_blocks} and {list(channel_mult)}"
            raise ValueError(f"channel_mult_emb, num_blocks and one to four channel_mult must be at least 1, got {got}")
        self.config = dict(
            model_channels=model_channels, label_dim=label_dim, channel_mult=list(channel_mult),
            channel_mult_emb=channel_mult_emb, num_blocks=num_blocks, attn_resolutions=list(attn_resolutions),
            sigma_data=sigma_data,
        )
        self.label_dim, self.sigma_data = label_dim, sigma_data
        emb = model_channels * channel_mult_emb

        freqs = torch.logspace(0, -4, model_channels // 2)                          # 1 down to 1 / 10000
        self.register_buffer("freqs", freqs, persistent=False)
        self.map_label = nn.Linear(label_dim, model_channels) if label_dim else None
        self.map_layer0 = nn.Linear(model_channels, emb)
        self.map_layer1 = nn.Linear(emb, emb)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c, skips = model_channels, []                                               # c: current width; skips: widths
        for size, mult in zip(sizes, channel_mult, strict=True):
            if size == IMAGE_SIZE:
                self.enc[f"{size}x{size}_conv"] = nn.Conv2d(3, c, 3, padding=1)
            else:
                self.enc[f"{size}x{size}_down"] = Block(c, c, emb, resample=nn.AvgPool2d(2))
            skips.append(c)
            for i in range(num_blocks):
                c_in, c = c, model_channels * mult
                self.enc[f"{size}x{size}_block{i}"] = Block(c_in, c, emb, attention=size in attn_resolutions)
                skips.append(c)
        self.feature_channels = [model_channels * mult for mult in channel_mult] + [c]
        self.bottleneck_size = sizes[-1]
        for size, mult in reversed(list(zip(sizes, channel_mult, strict=True))):
            if size == sizes[-1]:
                self.dec[f"{size}x{size}_in0"] = Block(c, c, emb, attention=True)
                self.dec[f"{size}x{size}_in1"] = Block(c, c, emb)
            else:
                self.dec[f"{size}x{size}_up"] = Block(c, c, emb, resample=nn.Upsample(scale_factor=2, mode="nearest"))
            for i in range(num_blocks + 1):
                c_in, c = c + skips.pop(), model_channels * mult
                attention = i == num_blocks and size in attn_resolutions
                self.dec[f"{size}x{size}_block{i}"] = Block(c_in, c, emb, attention=attention)
        self.dec[f"{IMAGE_SIZE}x{IMAGE_SIZE}_aux_norm"] = group_norm(c)
        self.dec[f"{IMAGE_SIZE}x{IMAGE_SIZE}_aux_conv"] = nn.Conv2d(c, 3, 3, padding=1)

    def network(self, x, c_noise, labels, return_features=False):
        """The raw network F of table 1; arguments as in forward, x and sigma already preconditioned.

        The features are those of the last block of each resolution, and of the second block on the way up, the
        bottleneck: in the published networks [B, 256, 32, 32], [B, 256, 16, 16] and twice [B, 256, 8, 8].
        """
        angles = c_noise[:, None] * self.freqs                                      # [B, M/2]
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)                        # [B, M]
        if self.label_dim:
            classes = torch.arange(self.label_dim, device=x.device)
            onehot = (labels[:, None] == classes).to(emb.dtype)                     # [B, label_dim]; no class: zeros
            emb = emb + self.map_label(onehot * math.sqrt(self.label_dim))
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))                 # [B, E]

        h, skips = x, []
        for block in self.enc.values():
            h = block(h, emb) if isinstance(block, Block) else block(h)             # [B, 2M, 32, 32] to [B, 2M, 8, 8]
            skips.append(h)
        per_level = len(skips) // (len(self.feature_channels) - 1)
        *blocks, (_, out_norm), (_, out_conv) = self.dec.items()
        for name, block in blocks:
            if "_block" in name:
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb)                                                       # and back to [B, 2M, 32, 32]
            if return_features and name.endswith("_in1"):
                return [*skips[per_level - 1 :: per_level], h]
        return out_conv(F.silu(out_norm(h)))                                        # [B, 3, 32, 32]
