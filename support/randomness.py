"""Random numbers that depend on nothing but (seed, step) in training and (seed, image index) in sampling."""

import math

import numpy as np
import torch


class StepRandom:
    """The random numbers of one training step: a function of (seed, step) alone, so a resume needs no saved state.

    Each of several processes draws the numbers of the whole batch and takes its share, so that together they use the
    same numbers as one process. The shapes below are those of the share; their first dimension is the images.
    """

    def __init__(self, seed, step, device="cpu", rank=0, world=1):
        base = int(np.random.SeedSequence([0x57E9, seed]).generate_state(1)[0])
        # The CPU generator keeps 32 bits of its seed. Adding the step gives all steps of a run different seeds.
        self.generator = torch.Generator(device).manual_seed((base + step) % 2**32)
        self.device, self.rank, self.world = device, rank, world
        self.host = np.random.default_rng([0x4057, seed, step])

    def normal(self, *shape):
        """Standard normal float32 numbers."""
        return self.share(torch.randn, *shape)

    def uniform(self, *shape):
        """Uniform float32 numbers in [0, 1)."""
        return self.share(torch.rand, *shape)

    def choice(self, n):
        """One uniform int of 0 .. n - 1, drawn on the host, so that deciding by it does not wait for the device."""
        return int(self.host.integers(n))

    def integers(self, low, high, *shape):
        """Uniform int64 numbers in low .. high, both included."""
        return self.share(lambda *shape, **how: torch.randint(low, high + 1, shape, **how), *shape)

    def share(self, draw, n, *shape):
        numbers = draw(self.world * n, *shape, generator=self.generator, device=self.device)
        return numbers[self.rank * n : (self.rank + 1) * n]


def image_noise(seed, indices, size, draw=0, walk=0.0):
    """Unit Gaussian noise of images, float32 [len(indices), 3, size, size]: each depends on (seed, index, draw) alone.

    Args:
        walk: 0 .. 1, how far to go towards the noise of seed + 1, along an arc: all points of it are unit noise too.
    """
    if walk:
        a, b = math.cos(math.pi / 2 * walk), math.sin(math.pi / 2 * walk)           # a^2 + b^2 = 1
        return a * image_noise(seed, indices, size, draw) + b * image_noise(seed + 1, indices, size, draw)
    rngs = (np.random.default_rng([seed, int(i), draw]) for i in indices)
    return torch.from_numpy(np.stack([rng.standard_normal((3, size, size), dtype=np.float32) for rng in rngs]))
