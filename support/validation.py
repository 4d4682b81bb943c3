"""Measuring a network while it is trained: --eval_every."""

import os

import torch

from support import processes, sampling
from support.errors import UsageError

NEIGHBOURS = 10_000                                 # real images that precision and recall look at


def check_features(args):
    """Raise UsageError if a file of add_features is not there: now, and not after a dataset was downloaded."""
    for name in ("feature_extractor", "inception_weights"):
        given = getattr(args, name)
        if given and not os.path.isfile(given):
            raise UsageError(f"--{name}: no file {given}")


def extractor(args, device):
    """The feature network of the flags of add_features."""
    # torch-fidelity is slow to import, and rarely needed.
    from support import metrics

    if args.feature_extractor:
        return metrics.exported(args.feature_extractor, device)
    return processes.first_of_host(metrics.inception, device, args.inception_weights)


class Validation:
    """Measures images as evaluate.py does: always of the same noise, as many of each class.

    Not the noise of evaluate.py at the same seed: a checkpoint chosen by its distance on some images must be measured
    on others.

    Args:
        dataset: the real images.
        num_images: generated ones per measurement; fewer than evaluate.py's least are for following one run only.
    """

    def __init__(self, dataset, extractor, num_images, seed, cache_dir, device):
        from support import metrics

        self.extractor, self.seed, self.device = extractor, seed + 2**20, device
        self.labels = torch.arange(num_images) % len(dataset.classes)
        self.real = processes.main_only(metrics.reference)(dataset.images, extractor, cache_dir)
        self.distances = metrics.distances
        self.key = f"{extractor.name.lower()}@{num_images}"     # of the distance by which checkpoints are compared
        self.metric = f"{self.key} in {extractor.identity}"     # distances of another kind do not compare

    def __call__(self, sample):
        """Metrics of sample(z, labels, renoise), as in sampling.sampler: a dict of floats, names with @num_images."""
        images = sampling.generate(sample, self.seed, self.labels, 250, self.device)
        values = processes.from_main(self.distances, images, self.labels, self.real, self.extractor, NEIGHBOURS)
        return {f"{name}@{len(images)}": value for name, value in values.items()}


def from_flags(args, dataset, device):
    """The Validation of --eval_every, or None where that is 0."""
    if not args.eval_every:
        return None
    return Validation(dataset, extractor(args, device), args.eval_images, args.seed, args.cache_dir, device)
