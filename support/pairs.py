"""ODE pairs, noise and the image that the teacher's ODE makes of it, for the fit.

    pairs = Pairs(sample, 32, num_pairs=2048, num_classes=10, batch_size=64, seed=0, device=device)
    z, labels, x_ode = pairs(step)
"""

import torch

from support import data, sampling
from support.randomness import image_noise

SEED = 2**21                                        # away from the noise of the grids, and from that of --eval_every


class Pairs:
    """Batches of ODE pairs, repeated in a fixed order. A batch depends on (seed, step) alone: a resume saves no pairs.

    A batch is made when it is first asked for, so that a stop signal waits for one batch at most, not for all. Its
    images are kept as uint8.

    Args:
        sample: the teacher's sampler (z, labels, renoise) -> images, as in sampling.sampler.
        size: height and width of the images.
        num_pairs: rounded up to whole batches; equally many of each class.
        mirrored: whether every second pass mirrors both noise and images. A teacher that was trained on mirrored images
            makes nearly the mirrored image of mirrored noise, so a mirrored pair is as good.
    """

    def __init__(self, sample, size, num_pairs, num_classes, batch_size, seed, device, mirrored=False):
        self.sample, self.size, self.seed, self.device, self.mirrored = sample, size, seed + SEED, device, mirrored
        self.batch_size, self.num_batches, self.num_classes = batch_size, -(-num_pairs // batch_size), num_classes
        self.images = {}                            # batch -> its images, uint8 [batch_size, 3, H, W]

    def __call__(self, step, rank=0, world=1):
        """A share of a step's batch: z [B / world, 3, H, W], labels [B / world], images like z in [-1, 1]."""
        (turn, batch), n = divmod(step, self.num_batches), self.batch_size // world
        labels = (torch.arange(self.batch_size) + batch * self.batch_size) % self.num_classes
        if batch not in self.images:
            self.images[batch] = sampling.generate(self.sample, self.size, self.seed + batch, labels, n, self.device)
        share = slice(rank * n, (rank + 1) * n)
        z = image_noise(self.seed + batch, range(self.batch_size)[share], self.size)
        x_ode = data.to_float(self.images[batch][share])
        if self.mirrored and turn % 2:
            z, x_ode = z.flip(-1), x_ode.flip(-1)
        z, x_ode = (t.to(self.device, memory_format=torch.channels_last) for t in (z, x_ode))
        return z, labels[share].to(self.device), x_ode
