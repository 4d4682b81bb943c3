"""Datasets as tensors in memory, and batches that are a function of (seed, step).

    dataset = load("cifar10", "data")        # or another of DATASETS
    batches = Batches(dataset, batch_size=128, seed=0, device=device)
    images, labels = batches(step)

A whole dataset of small images is small (CIFAR-10: 150 MB as uint8; 100,000 images of 64x64: 1.2 GB), so it lives on
the device and needs no loader workers.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from constants import IMAGE_SIZE
from support import image_cache, image_files, networks, processes, published, shapes
from support.errors import UsageError
from support.flags import DATASETS
from support.image_files import DataError, few, number
from support.published import PUBLISHED

SHAPES_TRAIN_IMAGES = 20_000
UNSORTED = "no class folders"                       # the note about images that lie in no class's folder
# Folders of these names hold a part of the dataset, each with the same classes.
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}


@dataclass
class Dataset:
    images: torch.Tensor                            # uint8 [N, 3, size, size] RGB
    labels: torch.Tensor                            # int64 [N]
    classes: list                                   # class names, in label order
    left_out: list = field(default_factory=list)    # paths of the files and folders that were skipped
    notes: list = field(default_factory=list)       # how the images were read, as of image_files.read

    def __str__(self):
        """270 images (20 enlarged; 270 resized to 32x32), 2 classes (leaf, sky), 30 files left out (.heic)"""
        words = [number(len(self.images), "image") + (f" ({'; '.join(self.notes)})" if self.notes else "")]
        words += [f"{number(len(self.classes), 'class', 'classes')} ({few(self.classes)})"]
        return ", ".join(words + ([image_files.left_out(self.left_out)] if self.left_out else []))

    def digest(self):
        """SHA-256, hex, of the images, the labels and the class names: all that a training sees of a dataset."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for tensor in self.images, self.labels:
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()


def load(name, data_dir="data", split="train", cache_dir=None, size=IMAGE_SIZE):
    """Read a dataset into memory.

    Args:
        name: one of PUBLISHED (downloaded to data_dir if it is not there), "folder" (a tree data_dir/<class>/<image> or
            data_dir/<split>/<class>/<image>; images may lie deeper, see image_files.find; or images of one class, named
            after the folder, in data_dir or data_dir/<split>), or "shapes" (drawn).
        split: "train" or "test".
        cache_dir: where a large folder's images are kept, for the next time; None: nowhere.
        size: height and width of the images, in pixels.

    Raises:
        DataError: the dataset is not there, its classes are ambiguous, or a file of it cannot be read.
    """
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    if name == "shapes":
        # Seeds 0 and 1 are the two splits; any other seed is a fresh sample.
        images, labels = shapes.draw(SHAPES_TRAIN_IMAGES, seed=0 if split == "train" else 1, size=size)
        return Dataset(torch.from_numpy(images), torch.from_numpy(labels), list(shapes.CLASSES))
    if name in PUBLISHED:
        images, labels, classes, notes = published.load(name, Path(data_dir), split, size)
        return Dataset(images, labels, classes, notes=notes)
    return load_folder(Path(data_dir), split, cache_dir, size)


def load_folder(root, split, cache_dir, size):
    root, data_dir = split_folder(root, split), root
    folders = class_folders(root)
    loose = sorted({*root.iterdir()} - {*folders})
    seen, notes = {os.path.realpath(root)}, [f"in {root}"] if root != data_dir else []
    found = [image_files.find(folder, seen) for folder in folders]
    classes = [folder.name for folder in folders]
    inside, others = (sum(len(some[kind]) for some in found) for kind in (0, 1))
    # Folders beside images may describe them; if they have more files, they are classes that cannot be read.
    if not inside and len(images_in(root)) >= max(1, others):
        classes, folders, found, loose = [Path(os.path.abspath(data_dir)).name], [root], [image_files.find(root)], []
        notes += [UNSORTED]
    if not folders:
        raise DataError(f"--data_dir {root} has no class folders, and no images")
    empty = [folder.name for folder, (images, _) in zip(folders, found, strict=True) if not images]
    if empty:
        raise DataError(f"no images in class folder {few(empty)} of {root}, or only such as another class has")
    paths = [path for images, _ in found for path in images]
    read = (image_cache.read, paths, root, cache_dir) if cache_dir else (image_files.read, paths)
    images, converted = read[0](*read[1:], size)
    labels = torch.cat([torch.full((len(some),), label) for label, (some, _) in enumerate(found)])
    inner = [folder.name for folder in class_folders(folders[0])]
    if len(folders) == 1 and len(inner) > 1 and all(path.parent != folders[0] for path in paths):
        processes.main_only(print)(
            f"note: all images are of one class, {folders[0].name}; if the folders in it are classes ({few(inner)}), "
            f"give --data_dir {folders[0]}", file=sys.stderr
        )
    left_out = loose + [path for _, others in found for path in others]
    return Dataset(images, labels, classes, left_out, notes + converted)


def split_folder(root, split):
    """The folder whose folders are the classes, or that holds images of one kind: root/split if that does, else root.

    Raises:
        DataError: there is none, or it may be the one or the other.
    """
    if not root.is_dir():
        raise DataError(f"--data_dir {root}: no such folder")
    folders = class_folders(root)
    others = [folder for folder in folders if folder.name.lower() not in SPLITS]
    names = [folder.name for folder in folders]
    inner = class_folders(root / split) if split in names else []
    if inner or (split in names and images_in(root / split)):
        beside = [folder.name for folder in others if image_files.find(folder)[0]]
        if inner and beside:
            raise DataError(
                f"--data_dir {root}: is {split} a class beside {few(beside)}, or the images of a split, with the "
                f"classes {few([folder.name for folder in inner])}? Rename it, or give --data_dir {root / split}"
            )
        if not beside:
            return root / split
    if split != "train":
        raise DataError(f"--data_dir {root} has no folder {split}")
    if folders and not others:
        raise DataError(
            f"--data_dir {root} has no class folders, only {few(names)}, {'a name' if len(names) == 1 else 'names'} of "
            f"splits: images are read from {root / split}/<class>/<image>"
        )
    for folder in folders:
        parts = [inner.name for inner in class_folders(folder) if inner.name.lower() in SPLITS]
        if len(parts) > 1:
            raise DataError(
                f"--data_dir {root}: class folder {folder.name} has the splits {few(parts)}, which would be mixed; "
                f"put them above the classes: {root / parts[0] / folder.name}"
            )
    return root


def entries(root):
    """What root holds, except for what image_files.skipped() names: a list of os.DirEntry, by name."""
    try:
        with os.scandir(root) as found:
            return sorted((e for e in found if not image_files.skipped(e.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read folder {root}: {error.strerror}") from error


def class_folders(root):
    """The folders in root that can be classes, by name."""
    return [root / entry.name for entry in entries(root) if entry.is_dir()]


def images_in(root):
    """The names of the images in root itself."""
    return [e.name for e in entries(root) if image_files.is_image(Path(e.name)) and not e.is_dir()]


def to_float(images):
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float [-1, 1] -> uint8 [0, 255], rounded to nearest and clipped; the inverse of to_float."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def random_flip(images, rng):
    """Mirror each image [B, 3, H, W] with probability 1/2."""
    return torch.where(rng.uniform(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)


def random_shift(images, pad, rng):
    """Shift each image [B, 3, H, W] by up to pad pixels either way, with reflection at the edges."""
    n, size, device = len(images), images.shape[-1], images.device
    rows, columns = (rng.integers(0, 2 * pad, n, 1) + torch.arange(size, device=device) for _ in range(2))      # [B, H]
    padded = F.pad(images, (pad,) * 4, mode="reflect").permute(0, 2, 3, 1)          # [B, H + 2 pad, W + 2 pad, 3]
    shifted = padded[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2)                                              # [B, 3, H, W]


class Batches:
    """An endless stream of shuffled epochs, cut into batches; each epoch has every image once.

    As long as the batch size does not change, batches(step) depends on (seed, step) alone.
    """

    def __init__(self, dataset, batch_size, seed, device):
        self.images = dataset.images.to(device)
        self.labels = dataset.labels.to(device)
        self.batch_size, self.seed, self.digest = batch_size, seed, dataset.digest()
        # First step with this batch size, images seen before it, and the next step.
        self.first, self.seen, self.step = 0, 0, 0
        self.orders = {}                            # epoch -> permutation; only the epochs in use

    def place(self, step):
        """How many images the steps before this one have taken."""
        return self.seen + (step - self.first) * self.batch_size

    def state_dict(self):
        return dict(step=self.step, seen=self.place(self.step), digest=self.digest)

    def load_state_dict(self, state):
        """Go on where another run has stopped; its batch size may have been another one."""
        self.first, self.seen, self.step = state["step"], state["seen"], state["step"]

    def order(self, epoch):
        if epoch not in self.orders:
            self.orders = {e: order for e, order in self.orders.items() if e == epoch - 1}
            order = np.random.default_rng([0xDA7A, self.seed, epoch]).permutation(len(self.images))
            self.orders[epoch] = torch.from_numpy(order).to(self.images.device)
        return self.orders[epoch]

    def __call__(self, step, rank=0, world=1):
        """A share of a step's batch: images, float32 [B / world, 3, H, W] in [-1, 1]; labels, int64 [B / world]."""
        self.step = step + 1
        position, end, rows = self.place(step), self.place(step + 1), []
        while position < end:
            epoch, start = divmod(position, len(self.images))
            rows.append(self.order(epoch)[start : start + end - position])
            position += len(rows[-1])
        rows = torch.cat(rows)[rank * self.batch_size // world : (rank + 1) * self.batch_size // world]
        return to_float(self.images[rows]), self.labels[rows]


def named(args, state):
    """--dataset, --data_dir and --flip, or what the checkpoint's network was trained on where they were not given.

    Of other images --flip is 1, but 0 for those of digits.
    """
    known = state.get("settings", {}) if state else {}
    dataset = args.dataset or known.get("dataset")
    known = known if dataset == known.get("dataset") else {}
    flip = getattr(args, "flip", None)
    if flip is None:
        flip = known.get("flip", PUBLISHED[dataset].flip if dataset in PUBLISHED else 1)
    return dataset, args.data_dir or known.get("data_dir") or "data", flip


def trained_on(state):
    """The digest of the images that a checkpoint's network, or its teacher, was trained on; None where not known."""
    return state.get("batches", {}).get("digest") or state.get("images_digest")


def with_classes_of(state, loaded, dataset):
    """The images of a dataset, labelled as the classes of the checkpoint are.

    Raises:
        UsageError: the dataset has other classes.
    """
    theirs, ours, config = state["classes"], loaded.classes, state["model_config"]
    if not config["label_dim"]:                     # an unconditional network: no image has a class
        return replace(loaded, labels=torch.zeros_like(loaded.labels), classes=theirs)
    # A file of EDM's names no classes; EDM's dataset_tool.py numbers them in the order of their folders' names.
    nameless = config.get("network") == "EDMUNet" and theirs == [str(label) for label in range(len(ours))]
    of_one = len(theirs) == len(ours) == 1 and UNSORTED in loaded.notes             # named after its folder
    order, labels = ours, loaded.labels
    if sorted(ours) == sorted(theirs):              # the same names, perhaps in another order
        order, labels = theirs, torch.tensor([theirs.index(name) for name in ours])[labels]
    elif not (of_one or (nameless and not {*ours} & {*theirs})):
        found = f"--dataset {dataset} has the classes {few(ours)}"
        raise UsageError(f"{found}; those of the checkpoint are {few(theirs)}")
    if nameless and ours != theirs:
        line = f"note: the checkpoint's classes have no names; taken to be, in this order: {few(order)}"
        processes.main_only(print)(line, file=sys.stderr)
    return replace(loaded, labels=labels, classes=theirs)


def from_flags(args, state=None, split="train"):
    """The dataset that named() names, which must have the classes of the checkpoint; says if its images are others.

    Raises:
        UsageError: nothing names a dataset, or it has other classes.
        DataError: it cannot be read.
    """
    dataset, data_dir, _ = named(args, state)
    if dataset is None:
        raise UsageError("the checkpoint does not name its images: give --dataset and --data_dir")
    size = networks.image_size(state["model_config"]) if state else args.image_size
    loaded = processes.first_of_host(load, dataset, data_dir, split, getattr(args, "cache_dir", None), size)
    if state:
        loaded = with_classes_of(state, loaded, dataset)
    mirrored = "; half of the images are mirrored (--flip 1)" if getattr(args, "flip", 0) else ""
    processes.main_only(print)(f"{dataset}: {loaded}{mirrored}")
    if state and split == "train" and trained_on(state) not in (None, loaded.digest()) and processes.MAIN:
        theirs = state.get("settings", {})
        theirs = f"{theirs.get('dataset')} {os.path.abspath(theirs.get('data_dir') or '')}"
        ours = f"{dataset} {os.path.abspath(data_dir)}"
        how = "have changed since it was trained" if ours == theirs else f"are not those it was trained on, of {theirs}"
        print(f"note: the checkpoint's images: those of {ours} {how}", file=sys.stderr)
    counts = loaded.labels.bincount(minlength=len(loaded.classes))
    if counts.max() > 1.1 * counts.min() and processes.MAIN:
        least, most = counts.min(), counts.max()
        print(f"note: the classes have {least} to {most} images; students learn as many of each", file=sys.stderr)
    return loaded
