"""Distributions of points on a plane, whose denoiser is known exactly: mixtures of Gaussians.

    data = MIXTURES["circle"]()
    x, labels = data.sample(512, rng)               # float [512, 2, 1, 1] in about [-1, 1], int64 [512]
    x0_hat = data(x_t, sigma, labels)               # E[x_0 | x_t], the ideal denoiser

A point is an image of 2 channels and 1x1 pixels, so that every function of this project that takes images takes points.
"""

import math

import torch
from torch import nn


class Mixture(nn.Module):
    """Components N(mean_k, std_k^2 I) of weight weight_k; each has a class, and a mode for measuring mode coverage.

    Args:
        means: [K][2].
        stds, weights: [K]; the weights are normalised.
        classes, modes: [K], 0 .. C - 1 and 0 .. M - 1.
    """

    def __init__(self, means, stds, weights=None, classes=None, modes=None):
        super().__init__()
        k = len(means)
        weights = torch.tensor(weights or [1.0] * k)
        self.register_buffer("means", torch.as_tensor(means).float())               # [K, 2]
        self.register_buffer("stds", torch.as_tensor(stds).float())                 # [K]
        self.register_buffer("weights", weights / weights.sum())                    # [K]
        self.register_buffer("classes", torch.as_tensor(classes or [0] * k))        # [K]
        self.register_buffer("modes", torch.as_tensor(modes if modes is not None else list(range(k))))
        self.num_classes, self.num_modes = int(self.classes.max()) + 1, int(self.modes.max()) + 1

    def log_components(self, x, sigma, labels):
        """log(weight_k N(x; mean_k, (std_k^2 + sigma^2) I)) [B, K], -inf where k is not of the label; -1: any class."""
        variance = self.stds**2 + sigma**2                                          # [B, K] or [1, K]
        square = (x[:, None] - self.means).square().sum(-1)                         # [B, K]
        log = self.weights.log() - square / (2 * variance) - variance.log() - math.log(2 * math.pi)
        other = (labels[:, None] != self.classes) & (labels[:, None] >= 0)
        return log.masked_fill(other, -math.inf)

    def forward(self, x_t, sigma, labels):
        """The ideal denoiser, float [B, 2, 1, 1]; arguments as of any denoiser of this project."""
        x, sigma = x_t.flatten(1), torch.as_tensor(sigma).reshape(-1, 1)            # [B, 2], [B or 1, 1]
        share = self.log_components(x, sigma, labels).softmax(1)                    # [B, K]
        variance = self.stds**2 + sigma**2
        # E[x_0 | x_t, k] = (std_k^2 x_t + sigma^2 mean_k) / (std_k^2 + sigma^2)
        own, far = (share * self.stds**2 / variance).sum(1, keepdim=True), share * sigma**2 / variance
        return (own * x + far @ self.means)[:, :, None, None]

    def sample(self, n, rng, labels=None):
        """Points [n, 2, 1, 1] and their classes [n]: for the given labels, or drawn by the components' weights."""
        shares = self.weights.expand(n, -1)
        if labels is not None:
            shares = shares * (labels[:, None] == self.classes)
        edges = shares.cumsum(1) / shares.sum(1, keepdim=True)
        k = (rng.uniform(n)[:, None] >= edges).sum(1).clamp(max=len(self.means) - 1)            # [n]
        x = self.means[k] + self.stds[k, None] * rng.normal(n, 2)
        return x[:, :, None, None], self.classes[k]

    def class_shares(self):
        """The weight of each class [C]."""
        return torch.zeros(self.num_classes).index_add(0, self.classes, self.weights)

    def nearest(self, x, reach=4.0):
        """Of points [N, 2, 1, 1]: the component each most likely comes from [N], and whether it is within reach std."""
        x = x.flatten(1)
        k = self.log_components(x, torch.zeros(1, 1), torch.full((len(x),), -1)).argmax(1)
        return k, (x - self.means[k]).norm(dim=1) < reach * self.stds[k]

    def mode_shares(self, x):
        """The share of points [N, 2, 1, 1] in each mode [M]; those outside all modes are in none."""
        k, inside = self.nearest(x)
        return torch.zeros(self.num_modes).index_add(0, self.modes[k], inside.float() / len(x))

    def width_ratio(self, x):
        """The standard deviation of the points [N, 2, 1, 1] inside the modes, as a multiple of the data's: a float."""
        k, inside = self.nearest(x)
        off = (x.flatten(1) - self.means[k]) / self.stds[k, None]                   # N(0, I) for points of the data
        return off[inside].square().mean().sqrt().item()

    def true_shares(self):
        """The weight of each mode [M]."""
        return torch.zeros(self.num_modes).index_add(0, self.modes, self.weights)

    def density(self, x):
        """p(x) of points [N, 2], over all classes: [N]."""
        return self.log_components(x, torch.zeros(1, 1), torch.full((len(x),), -1)).logsumexp(1).exp()


def circle():
    """Eight Gaussians on a circle, alternating between two classes."""
    angles = [2 * math.pi * k / 8 for k in range(8)]
    means = [[0.8 * math.cos(a), 0.8 * math.sin(a)] for a in angles]
    return Mixture(means, [0.05] * 8, classes=[k % 2 for k in range(8)])


def grid():
    """Nine Gaussians in three rows, the classes, with weights of 1, 2 and 4 and widths of 0.03, 0.06 and 0.09."""
    cells = [(row, column) for row in range(3) for column in range(3)]
    means = [[0.7 * (column - 1), 0.7 * (1 - row)] for row, column in cells]
    stds, weights = [0.03 * (1 + column) for _, column in cells], [2.0 ** ((row + column) % 3) for row, column in cells]
    return Mixture(means, stds, weights, classes=[row for row, _ in cells])


def many():
    """25 Gaussians in five rows, of one class."""
    return Mixture([[0.4 * (column - 2), 0.4 * (row - 2)] for row in range(5) for column in range(5)], [0.05] * 25)


def moons():
    """Two half moons, the classes, each of four modes."""
    t = [math.pi * (i + 0.5) / 32 for i in range(32)]
    upper = [[0.6 * math.cos(a) - 0.3, 0.6 * math.sin(a) - 0.15] for a in t]
    lower = [[0.3 - 0.6 * math.cos(a), 0.15 - 0.6 * math.sin(a)] for a in t]
    modes = [i // 8 for i in range(32)] + [4 + i // 8 for i in range(32)]
    return Mixture(upper + lower, [0.04] * 64, classes=[0] * 32 + [1] * 32, modes=modes)


def spiral():
    """One class on a spiral, of eight modes along it."""
    t = [(i + 0.5) / 96 for i in range(96)]
    means = [[0.95 * s * math.cos(4 * math.pi * s), 0.95 * s * math.sin(4 * math.pi * s)] for s in t]
    return Mixture(means, [0.03] * 96, weights=[0.1 + s for s in t], modes=[i // 12 for i in range(96)])


MIXTURES = dict(circle=circle, grid=grid, many=many, moons=moons, spiral=spiral)


def sliced_distance(x, y, directions=64):
    """Sliced Wasserstein-1 distance of two equally large sets of points [N, 2, 1, 1]: a float, 0 for equal sets."""
    angles = math.pi * (torch.arange(directions) + 0.5) / directions
    axes = torch.stack([angles.cos(), angles.sin()])                                # [2, directions]
    x, y = ((points.flatten(1) @ axes).sort(0).values for points in (x, y))         # [N, directions]
    return (x - y).abs().mean().item()
