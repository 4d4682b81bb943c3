"""Datasets as tensors in memory, and batches that are a function of (seed, step).

    dataset = load("cifar10", "data")        # or "folder", "shapes"
    batches = Batches(dataset, batch_size=128, seed=0, device=device)
    images, labels = batches(step)

A whole 32x32 dataset is small (CIFAR-10: 150 MB as uint8), so it lives on the device and needs no loader workers.
"""

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps

from model import IMAGE_SIZE
from support import processes, shapes
from support.errors import UsageError

DATASETS = ("cifar10", "folder", "shapes")
SHAPES_TRAIN_IMAGES = 20_000


class DataError(UsageError):
    """The dataset cannot be read; the message is one line that names the file or folder."""


@dataclass
class Dataset:
    images: torch.Tensor                            # uint8 [N, 3, 32, 32] RGB
    labels: torch.Tensor                            # int64 [N]
    classes: list                                   # class names, in label order


def load(name, data_dir="data", split="train"):
    """Read a dataset into memory.

    Args:
        name: "cifar10" (downloaded to data_dir if it is not there), "folder" (an ImageFolder tree,
            data_dir/<class>/<image>, or data_dir/<split>/<class>/<image>), or "shapes" (drawn, needs nothing).
        split: "train" or "test".

    Raises:
        DataError: it is not there, or a file in it cannot be read.
    """
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    if name == "shapes":
        # The seeds below 2 are the two splits; anything else is a fresh sample.
        images, labels = shapes.draw(SHAPES_TRAIN_IMAGES, seed=0 if split == "train" else 1)
        return Dataset(torch.from_numpy(images), torch.from_numpy(labels), list(shapes.CLASSES))
    return load_cifar10(Path(data_dir), split) if name == "cifar10" else load_folder(Path(data_dir), split)


def load_cifar10(root, split):
    absent = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        cifar = torchvision.datasets.CIFAR10(root, train=split == "train", download=True)
    except Exception as error:                      # torchvision raises whatever urllib, tarfile and pickle do
        for folder in absent:                       # made for a download that did not come
            with contextlib.suppress(OSError):
                folder.rmdir()
        reason = " ".join(str(error).split())
        raise DataError(
            f"CIFAR-10 is not complete in {root} and could not be downloaded ({reason}); either put "
            f"cifar-10-python.tar.gz into {root}, or train on other images: --dataset folder --data_dir DIR, "
            "or --dataset shapes"
        ) from error
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()          # [N, 3, 32, 32]
    return Dataset(images, torch.tensor(cifar.targets), cifar.classes)


def read_image(path):
    """One image file as uint8 [32, 32, 3]: the shorter side is resized to 32 and the centre is cut out."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            if image.size != (IMAGE_SIZE, IMAGE_SIZE):
                scale = IMAGE_SIZE / min(image.size)
                size = [max(IMAGE_SIZE, round(side * scale)) for side in image.size]
                left, top = (size[0] - IMAGE_SIZE) // 2, (size[1] - IMAGE_SIZE) // 2
                image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
                image = image.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
            return np.asarray(image)
    except Exception as error:                      # each of Pillow's readers has its own ways to fail
        raise DataError(f"cannot read image {path}: {error}") from error


def load_folder(root, split):
    if any(folder.is_dir() for folder in (root / split).glob("*")):           # classes in it: it is no class itself
        root = root / split
    elif split != "train":
        raise DataError(f"--data_dir {root} has no folder {split}")
    try:
        tree = torchvision.datasets.ImageFolder(root)
    except OSError as error:                        # no such folder, no class folder, or an empty one
        reason = str(error).splitlines()[0]
        raise DataError(f"--data_dir {root} is no tree of class folders with images: {reason}") from error
    with ThreadPoolExecutor() as pool:              # decoding releases the interpreter lock
        images = np.stack(list(pool.map(read_image, [path for path, _ in tree.samples])))
    return Dataset(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(tree.targets), tree.classes)


def to_float(images):
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float [-1, 1] -> uint8 [0, 255], rounded to nearest and clipped; the inverse of to_float."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def random_flip(images, rng):
    """Mirror each image [B, 3, 32, 32] with probability 1/2."""
    return torch.where(rng.uniform(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)


class Batches:
    """An endless stream of shuffled epochs, cut into batches; batches(step) depends on (seed, step) alone.

    So a resumed run needs no data position beside its step, and no step reads an image twice within an epoch. Of
    several processes (world) each takes its share (rank) of every batch.
    """

    def __init__(self, dataset, batch_size, seed, device, rank=0, world=1):
        self.images = dataset.images.to(device)
        self.labels = dataset.labels.to(device)
        self.batch_size, self.seed = batch_size, seed
        self.mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.orders = {}                            # epoch -> permutation; only the epochs in use

    def order(self, epoch):
        if epoch not in self.orders:
            self.orders = {e: order for e, order in self.orders.items() if e == epoch - 1}
            order = np.random.default_rng([0xDA7A, self.seed, epoch]).permutation(len(self.images))
            self.orders[epoch] = torch.from_numpy(order).to(self.images.device)
        return self.orders[epoch]

    def __call__(self, step):
        """Returns images, float32 [B / world, 3, 32, 32] in [-1, 1], and labels, int64 [B / world]."""
        position, end, rows = step * self.batch_size, (step + 1) * self.batch_size, []
        while position < end:
            epoch, start = divmod(position, len(self.images))
            rows.append(self.order(epoch)[start : start + end - position])
            position += len(rows[-1])
        rows = torch.cat(rows)[self.mine]
        return to_float(self.images[rows]), self.labels[rows]


def name_dataset(args, state):
    """Fill in the flags of add_dataset, where they are not given, with what the checkpoint's network was trained on."""
    known = state.get("settings", {}) if state else {}
    args.dataset = args.dataset or known.get("dataset")
    known = known if args.dataset == known.get("dataset") else {}
    args.data_dir = args.data_dir or known.get("data_dir") or "data"
    if getattr(args, "flip", 1) is None:
        args.flip = known.get("flip", 1)


def from_flags(args, state=None, split="train"):
    """The dataset of --dataset, or where that is not given what the checkpoint's network was trained on."""
    name_dataset(args, state)
    if args.dataset is None:
        raise UsageError("the checkpoint does not name its images: give --dataset and --data_dir")
    loaded = processes.first_of_host(load, args.dataset, args.data_dir, split)
    if state and not state["model_config"]["label_dim"]:        # where the network has no classes, no image has one
        loaded = Dataset(loaded.images, torch.zeros_like(loaded.labels), state["classes"])
    if state and loaded.classes != state["classes"]:
        raise UsageError(f"the classes of --dataset {args.dataset} are not those of the checkpoint")
    counts = loaded.labels.bincount(minlength=len(loaded.classes))
    if counts.max() > 1.1 * counts.min() and processes.MAIN:
        few, many = counts.min(), counts.max()
        print(f"note: the classes have {few} to {many} images; students learn as many of each", file=sys.stderr)
    return loaded
