"""Datasets that torchvision downloads and reads, as RGB images of any size.

    images, labels, classes, notes = load("mnist", Path("data"), "train", size=32)

Torchvision unpickles CIFAR's files only where their MD5 is the published one; no other format here is pickled.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from support import image_files, pixels
from support.image_files import DataError, few


def one_archive(source, split):
    return [(source.filename, source.tgz_md5)]


def mnist_archives(source, split):
    return [(f"{source.__name__}/raw/{file}", md5) for file, md5 in source.resources]


def svhn_archives(source, split):
    return [source.split_list[split][1:]]


class Published(NamedTuple):
    """How torchvision's class of a dataset is used."""

    source: str                                     # its name in torchvision.datasets
    archives: Callable                              # (source, split) -> [(file below --data_dir, its MD5), ...]
    split: str = "train"                            # the argument that chooses the split: train=True or split="train"
    labels: str = "targets"                         # the attribute that holds them
    classes: str = ""                               # their names, where the class has none
    flip: int = 1                                   # default of --flip: a mirrored digit is another sign
    needs: str = ""                                 # a package that only this dataset needs


PUBLISHED = dict(
    cifar10=Published("CIFAR10", one_archive),
    cifar100=Published("CIFAR100", one_archive),
    mnist=Published("MNIST", mnist_archives, flip=0),
    fashion_mnist=Published("FashionMNIST", mnist_archives),
    svhn=Published("SVHN", svhn_archives, "split", "labels", classes="0123456789", flip=0, needs="scipy"),
    stl10=Published("STL10", one_archive, "split", "labels"),
)


def load(name, root, split, size):
    """A dataset of PUBLISHED, which is downloaded to root if it is not there.

    Greys become RGB. Images of 28x28 get a black border of 2 pixels at size 32; other sizes are resized and cropped as
    the images of folders are.

    Returns:
        images, uint8 [N, 3, size, size]; labels, int64 [N]; the names of the classes; and what was done to the images.

    Raises:
        DataError: it can be neither found whole nor downloaded.
    """
    kind = PUBLISHED[name]
    if kind.needs and not importlib.util.find_spec(kind.needs):
        raise DataError(f"--dataset {name} needs {kind.needs}, which is not installed: pip install {kind.needs}")
    # Here, as it is slow to load and other images do without.
    from torchvision import datasets

    source = getattr(datasets, kind.source)
    archives = [(root / file, md5) for file, md5 in kind.archives(source, split)]
    absent = [folder for folder in archives[0][0].parents if not folder.exists()]
    try:
        found = source(root, download=True, **{kind.split: split if kind.split == "split" else split == "train"})
        images, labels = np.asarray(found.data), torch.as_tensor(getattr(found, kind.labels), dtype=torch.int64)
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images and {len(labels)} labels")
        classes = list(kind.classes or found.classes)
    except MemoryError:                             # the files are not to blame
        raise
    except Exception as error:                      # torchvision raises whatever urllib, tarfile and pickle do
        for folder in absent:                       # torchvision made it for the download that failed
            with contextlib.suppress(OSError):
                folder.rmdir()
        reason = " ".join(str(error).split()) or type(error).__name__
        advice = "or train on other images: --dataset folder --data_dir DIR, or --dataset shapes"
        raise DataError(f"{incomplete(name, root, archives, reason)}, {advice}") from error
    images = rgb(images)
    side, notes = images.shape[1], []
    if (side, size) == (28, 32):
        images, notes = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))), ["with a border of 2 pixels"]
    elif side != size:
        notes = [f"resized from {side}x{side}"]
    return fitted(images, size), labels, classes, notes


def incomplete(name, root, archives, reason):
    """What is wrong with a dataset's archives, [(path, MD5), ...], and what to do about it."""
    from torchvision.datasets.utils import check_integrity

    wrong = [path for path, md5 in archives if path.exists() and not check_integrity(path, md5)]
    state = f"{wrong[0]} is damaged" if wrong else f"{name} is not complete in {root}"
    wrong = wrong or [path for path, _ in archives if not path.exists() and not path.with_suffix("").exists()]
    if not wrong:                                   # torchvision does not verify all that it has extracted
        return f"what was extracted of {name} below {root} is not whole ({reason}); either remove it"
    whole = f"{few([path.name for path in wrong])} into {wrong[0].parent}"
    return f"{state} and could not be downloaded ({reason}); either put a whole {whole}"


def rgb(images):
    """Images of any layout, grey [N, H, W] or RGB [N, 3, H, W] or [N, H, W, 3], as [N, H, W, 3]."""
    if images.ndim == 3:
        return images[..., None].repeat(3, axis=-1)
    return images.transpose(0, 2, 3, 1) if images.shape[1] == 3 else images


def fitted(images, size):
    """Images, uint8 [N, H, W, 3], as a tensor [N, 3, size, size], resized as those of folders are where they differ."""
    if images.shape[1:3] == (size, size):
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    found = np.empty((len(images), 3, size, size), np.uint8)

    def fit(rows):
        for i in rows:
            image = pixels.centre(pixels.resized(Image.fromarray(images[i]), size), size)
            found[i] = np.asarray(image).transpose(2, 0, 1)
        return []

    image_files.parallel(fit, range(len(images)))
    return torch.from_numpy(found)
