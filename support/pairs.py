"""Pairs of noise and the image that the teacher's ODE makes of it, for a generator to begin with.

    pairs = Pairs(sample, num_pairs=2048, num_classes=10, batch_size=64, seed=0, device=device)
    z, labels, x_ode = pairs(step)
"""

import torch

from support import data, sampling
from support.randomness import image_noise

SEED = 2**21                                        # away from the noise of the grids, and from that of --eval_every


class Pairs:
    """Batches of pairs that come again and again in one order: functions of (seed, step), so that a resume needs none.

    A batch is made when it is first asked for, within a step that can be stopped. Its images are kept as uint8.

    Args:
        sample: (z, labels, renoise) -> images, as in sampling.sampler, of the teacher.
        num_pairs: rounded up to whole batches; as many of each class.
        mirrored: whether every other time all of them come mirrored, the noise too: of mirrored noise a teacher of
            mirrored images makes what is as good as the mirrored image.
    """

    def __init__(self, sample, num_pairs, num_classes, batch_size, seed, device, mirrored=False):
        self.sample, self.seed, self.device, self.mirrored = sample, seed + SEED, device, mirrored
        self.batch_size, self.num_batches, self.num_classes = batch_size, -(-num_pairs // batch_size), num_classes
        self.images = {}                            # of the batches that were made: uint8 [batch_size, 3, 32, 32]

    def __call__(self, step, rank=0, world=1):
        """A share of a step's batch: z [B / world, 3, 32, 32], labels [B / world], images like z in [-1, 1]."""
        (turn, batch), n = divmod(step, self.num_batches), self.batch_size // world
        labels = (torch.arange(self.batch_size) + batch * self.batch_size) % self.num_classes
        if batch not in self.images:
            self.images[batch] = sampling.generate(self.sample, self.seed + batch, labels, n, self.device)
        share = slice(rank * n, (rank + 1) * n)
        z = image_noise(self.seed + batch, range(self.batch_size)[share])
        x_ode = data.to_float(self.images[batch][share])
        if self.mirrored and turn % 2:
            z, x_ode = z.flip(-1), x_ode.flip(-1)
        z, x_ode = (t.to(self.device, memory_format=torch.channels_last) for t in (z, x_ode))
        return z, labels[share].to(self.device), x_ode
