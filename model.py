"""SimpleUNet: a small denoiser of RGB images that returns the clean image.

    net = SimpleUNet(channels=64, label_dim=10)
    x0_hat = net(x_t, sigma, labels)

Only the network and its preconditioning live here; schedules, losses and samplers are in diffusion.py and guidance.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from constants import IMAGE_SIZE

LEVELS = 3                                          # at 64x64, too, a fourth did not pay (docs/tuning.md)


def group_norm(channels):
    # 16 channels per group fill a vector register: in bf16 channels_last on a CPU with AVX-512, forward and backward
    # took a fifth of the time that they took with 4 channels per group.
    return nn.GroupNorm(math.gcd(max(1, channels // 16), channels), channels)


class ResBlock(nn.Module):
    """A residual block of two 3x3 convolutions; the embedding scales and shifts the second normalisation."""

    def __init__(self, in_channels, out_channels, emb_channels):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_channels, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        # A block starts as its skip connection, so that depth costs nothing at the start of training.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):                                                      # [B, Cin, H, W], [B, E]
        h = self.conv1(F.silu(self.norm1(x)))                                       # [B, Cout, H, W]
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)              # [B, Cout, 1, 1] each
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))                 # [B, Cout, H, W]
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """Multi-head self-attention over the pixels, as a residual."""

    def __init__(self, channels):
        super().__init__()
        self.heads = max(1, channels // 64)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):                                                           # [B, C, H, W]
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)                                   # [B, heads, HW, C/heads]
        # softmax(q k^T / sqrt(d)) v, written out: for 16 tokens the fused backward is several times slower on a CPU.
        a = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v                        # [B, heads, HW, C/heads]
        return x + self.out(a.transpose(-1, -2).reshape(b, c, h, w))


class Denoiser(nn.Module):
    """EDM's preconditioning (Karras et al. 2022, arXiv 2206.00364, table 1) around a raw network.

    A subclass defines network(x, c_noise, labels, return_features), and sets sigma_data, label_dim, config (the
    arguments to build it again), image_size (height and width H), and, for the classifier head and the
    GAN phase only, feature_channels (a list, the channels of each feature) and bottleneck_size (height and width of the
    last feature, the bottleneck's). A network that predicts
    something else than table 1's F overrides denoise, as VelocityDenoiser does.
    """

    def forward(self, x, sigma, labels, return_features=False):
        """Estimate the clean image from a noisy one.

        Args:
            x: noisy images x_t = x_0 + sigma * eps, float [B, 3, H, W].
            sigma: standard deviation of the noise, > 0; a float, or a tensor of shape [], [B] or [B, 1, 1, 1].
            labels: class indices [B] (int64), -1 for no class.
            return_features: return the features of the way down instead, without running the way up.

        Returns:
            x0_hat, float32 [B, 3, H, W]; or a list of features [B, C, H, W]: each level's, then the bottleneck's.

        Raises:
            ValueError: sigma has neither one element nor one per image.
        """
        x = x.float()
        if not torch.is_tensor(sigma):              # filled on the device: a copy would make the GPU wait
            sigma = torch.full((), sigma, device=x.device)
        sigma = sigma.to(x.device, torch.float32)
        if sigma.numel() not in (1, x.shape[0]):
            raise ValueError(f"sigma has shape {tuple(sigma.shape)}, but the batch has {x.shape[0]} images")
        sigma = sigma.reshape(-1, 1, 1, 1).expand(x.shape[0], 1, 1, 1)              # [B, 1, 1, 1]
        return self.denoise(x, sigma, labels, return_features)

    def denoise(self, x, sigma, labels, return_features):
        # Table 1: x0_hat = c_skip x_t + c_out F(c_in x_t, c_noise, label). Float32 whatever the network's precision.
        sd = self.sigma_data
        c_skip = sd**2 / (sigma**2 + sd**2)
        c_out = sigma * sd / (sigma**2 + sd**2).sqrt()
        c_in = 1 / (sigma**2 + sd**2).sqrt()
        c_noise = sigma.log() / 4
        f = self.network(c_in * x, c_noise.flatten(), labels, return_features)
        return f if return_features else c_skip * x + c_out * f.float()             # [B, 3, H, W]


class VelocityDenoiser(Denoiser):
    """A denoiser around a network that predicts a flow's velocity (rectified flow, arXiv 2209.03003; flow matching).

    The flow's noisy image is y_t = (1 - t) x_0 + t eps, with t from 0, the data, to 1, the noise. A subclass defines
    network(y, t, labels, return_features) -> v = eps - x_0, for y [B, 3, H, W] and t [B], and sets what a subclass of
    Denoiser sets, except sigma_data. If your flow has t = 1 at the data, call your network with
    1 - t and negate its output.
    """

    def denoise(self, x, sigma, labels, return_features):
        # x = x_0 + sigma eps is (1 + sigma) y_t at t = sigma / (1 + sigma), and x0_hat = y_t - t v(y_t, t, label).
        t = sigma / (1 + sigma)                                                     # [B, 1, 1, 1]
        y = x / (1 + sigma)                                                         # [B, 3, H, W]
        v = self.network(y, t.flatten(), labels, return_features)
        return v if return_features else y - t * v.float()                          # [B, 3, H, W]


class SimpleUNet(Denoiser):
    """Class-conditional denoiser of three levels, with attention at the lowest resolution.

    Args:
        channels: base width C, a multiple of 8; the three levels have 2C, 4C and 8C channels.
        label_dim: number of classes.
        blocks: residual blocks per level, on the way down and on the way up.
        sigma_data: standard deviation of the clean images, whose range is [-1, 1].
        image_size: height and width H, a multiple of 8 from 16 to 128. No weight depends on it.
    """

    def __init__(self, channels=64, label_dim=10, blocks=1, sigma_data=0.5, image_size=IMAGE_SIZE):
        super().__init__()
        if channels < 8 or channels % 8:
            raise ValueError(f"channels must be a positive multiple of 8, got {channels}")
        if label_dim < 1 or blocks < 1:
            raise ValueError(f"label_dim and blocks must be at least 1, got {label_dim} and {blocks}")
        if not 16 <= image_size <= 128 or image_size % 8:
            raise ValueError(f"image_size must be a multiple of 8 from 16 to 128, got {image_size}")
        self.config = dict(
            channels=channels, label_dim=label_dim, blocks=blocks, sigma_data=sigma_data, image_size=image_size
        )
        self.label_dim, self.sigma_data, self.image_size = label_dim, sigma_data, image_size
        width = [channels * 2**level for level in range(LEVELS + 1)]                # C, 2C, 4C, 8C
        emb = 4 * channels

        # ln(sigma)/4 spans only [-1.6, 1.1]. Over that range the angles turn by 2.7 radians (lowest) to 27 full turns.
        freqs = torch.logspace(0, math.log2(64), channels // 2, base=2)
        self.register_buffer("freqs", freqs, persistent=False)
        self.sigma_embedding = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_embedding = nn.Embedding(label_dim, emb)

        self.feature_channels, self.bottleneck_size = [*width[1:], width[-1]], image_size // 2**LEVELS
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for level in range(1, LEVELS + 1):
            c_above, c = width[level - 1], width[level]
            self.down.append(
                nn.ModuleList(ResBlock(c_above if i == 0 else c, c, emb) for i in range(blocks))
            )
            self.up.append(
                nn.ModuleList(ResBlock(2 * c if i == 0 else c_above, c_above, emb) for i in range(blocks))
            )
        self.middle = nn.ModuleList([ResBlock(width[-1], width[-1], emb), ResBlock(width[-1], width[-1], emb)])
        self.attention = SelfAttention(width[-1])
        self.out_block = ResBlock(2 * channels, channels, emb)
        self.out_norm = group_norm(channels)
        self.out_conv = nn.Conv2d(channels, 3, 3, padding=1)
        nn.init.zeros_(self.out_conv.weight)
        nn.init.zeros_(self.out_conv.bias)

    def network(self, x, c_noise, labels, return_features=False):
        """The raw network F of table 1; arguments as in forward, x and sigma already preconditioned.

        The features are [B, 2C, H/2, H/2], [B, 4C, H/4, H/4], [B, 8C, H/8, H/8] and the bottleneck, [B, 8C, H/8, H/8].
        """
        angles = c_noise[:, None] * self.freqs                                      # [B, C/2]
        emb = self.sigma_embedding(torch.cat([angles.cos(), angles.sin()], dim=1))  # [B, 4C]
        emb = emb + self.label_embedding(labels.clamp(min=0)) * (labels >= 0)[:, None]
        emb = F.silu(emb)

        h = stem = self.stem(x)                                                     # [B, C, H, H]
        skips = []
        for blocks in self.down:
            # Downsampling before a level's blocks gave the same loss per step as downsampling after them, in half the
            # time (docs/tuning.md).
            h = F.avg_pool2d(h, 2)
            for block in blocks:
                h = block(h, emb)
            skips.append(h)                         # [B, 2C, H/2, H/2], [B, 4C, H/4, H/4], [B, 8C, H/8, H/8]
        h = self.middle[1](self.attention(self.middle[0](h, emb)), emb)             # [B, 8C, H/8, H/8]
        if return_features:
            return [*skips, h]
        for blocks in reversed(self.up):
            h = torch.cat([h, skips.pop()], dim=1)
            for block in blocks:
                h = block(h, emb)
            h = F.interpolate(h, scale_factor=2, mode="nearest")                    # to H/4, H/2, H
        h = self.out_block(torch.cat([h, stem], dim=1), emb)                        # [B, C, H, H]
        return self.out_conv(F.silu(self.out_norm(h)))                              # [B, 3, H, W]
