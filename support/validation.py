"""Measuring a network while it is trained: --eval_every."""

import os

import torch

from support import processes, sampling
from support.errors import UsageError

NEIGHBOURS = 10_000                                 # images of each set that precision and recall use
LEAST_IMAGES = 64


def check_features(args):
    """Raise UsageError if a file of add_features's flags is missing: now, not only after a dataset is downloaded."""
    for name in ("feature_extractor", "inception_weights"):
        given = getattr(args, name)
        if given and not os.path.isfile(given):
            raise UsageError(f"--{name}: no file {given}")


def extractor(args, size, device):
    """The feature network that the flags of add_features ask for, for images of this height and width."""
    # torch-fidelity is slow to import, and rarely needed.
    from support import metrics

    if args.feature_extractor:
        return metrics.exported(args.feature_extractor, size, device)
    return processes.first_of_host(metrics.inception, device, args.inception_weights)


class Validation:
    """Measures images as evaluate.py does: always from the same noise, equally many of each class.

    The noise is not that of evaluate.py at the same seed: a checkpoint that was chosen by its distance on some images
    must be measured on others.

    Args:
        dataset: the real images.
        num_images: images generated per measurement; fewer than evaluate.py's minimum serve to follow one run only.
    """

    def __init__(self, dataset, extractor, num_images, seed, cache_dir, device):
        from support import metrics

        if len(dataset.images) < LEAST_IMAGES:
            found = len(dataset.images)
            raise UsageError(f"--eval_every needs {LEAST_IMAGES} real images to measure against, and there are {found}")
        self.extractor, self.seed, self.device = extractor, seed + 2**20, device
        self.size = dataset.images.shape[-1]
        self.labels = torch.arange(num_images) % len(dataset.classes)
        self.known = self.labels if extractor.classes == dataset.classes else None
        self.real = processes.main_only(metrics.reference)(dataset.images, extractor, cache_dir)
        self.distances = metrics.distances
        self.key = f"{extractor.name.lower()}@{num_images}"     # the distance that chooses best.pt
        self.metric = f"{self.key} in {extractor.identity}"     # only distances of one metric compare

    def __call__(self, sample):
        """Metrics of sample(z, labels, renoise), as in sampling.sampler: a dict of floats, names with @num_images."""
        images = sampling.generate(sample, self.size, self.seed, self.labels, 250, self.device)
        values = processes.from_main(self.distances, images, self.known, self.real, self.extractor, NEIGHBOURS)
        return {f"{name}@{len(images)}": value for name, value in values.items()}


def from_flags(args, dataset, device):
    """The Validation of --eval_every, or None where that is 0."""
    if not args.eval_every:
        return None
    features = extractor(args, dataset.images.shape[-1], device)
    return Validation(dataset, features, args.eval_images, args.seed, args.cache_dir, device)
