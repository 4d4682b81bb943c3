"""The datasets that torchvision downloads, read from small files in their own published formats."""

import gzip
import hashlib
import os
import pickle
import struct
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from support import data, flags, image_files, published

RNG = np.random.default_rng(0)


def md5(file):
    return hashlib.md5(file.read_bytes()).hexdigest()


def archive(root, monkeypatch, source, contents):
    """Pack files, name -> bytes, into the archive that a class of torchvision's reads. Returns name -> MD5."""
    hashes = {}
    with tarfile.open(root / source.filename, "w:gz") as packed:
        for name, content in contents.items():
            (root / "x").write_bytes(content)
            hashes[name] = md5(root / "x")
            packed.add(root / "x", f"{source.base_folder}/{name}")
    (root / "x").unlink()
    monkeypatch.setattr(source, "tgz_md5", md5(root / source.filename))
    for part in "train_list", "test_list":
        kept = [[name, hashes[name]] for name, _ in getattr(source, part) if name in hashes]
        monkeypatch.setattr(source, part, kept)
    if hasattr(source, "meta"):
        monkeypatch.setattr(source, "meta", dict(source.meta, md5=hashes[source.meta["filename"]]))
    return hashes


def cifar(root, monkeypatch, name):
    """Rows of 1024 red, 1024 green and 1024 blue values. Returns split -> (images, labels), and the class names."""
    source, kinds = getattr(datasets, published.PUBLISHED[name].source), 10 if name == "cifar10" else 100
    fine = "labels" if name == "cifar10" else "fine_labels"
    batches = {
        file: {"data": RNG.integers(0, 256, (3, 3072), np.uint8), fine: RNG.integers(0, kinds, 3).tolist()}
        for file, _ in source.train_list + source.test_list
    }
    names = [f"class {i}" for i in range(kinds)]
    meta = {source.meta["filename"]: {source.meta["key"]: names}}
    archive(root, monkeypatch, source, {file: pickle.dumps(value) for file, value in (batches | meta).items()})
    wanted = {}
    for split, files in ("train", source.train_list), ("test", source.test_list):
        found = [batches[file] for file, _ in files]
        pixels = np.concatenate([batch["data"] for batch in found]).reshape(-1, 3, 32, 32)
        wanted[split] = pixels, [label for batch in found for label in batch[fine]]
    return wanted, names


def mnist(root, monkeypatch, name):
    """Big-endian magic number, sizes, then bytes; gzipped. The border is black."""
    source, wanted, resources = getattr(datasets, published.PUBLISHED[name].source), {}, []
    (root / source.__name__ / "raw").mkdir(parents=True)
    for split, prefix in ("train", "train"), ("test", "t10k"):
        images, labels = RNG.integers(0, 256, (4, 28, 28), np.uint8), RNG.integers(0, 10, 4, np.uint8)
        for kind, array in ("images-idx3", images), ("labels-idx1", labels):
            file = root / source.__name__ / "raw" / f"{prefix}-{kind}-ubyte.gz"
            head = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
            file.write_bytes(gzip.compress(head + array.tobytes()))
            resources.append((file.name, md5(file)))
        wanted[split] = np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None].repeat(3, 1), labels.tolist()
    monkeypatch.setattr(source, "resources", resources)
    names = ["0 - zero", "9 - nine"] if name == "mnist" else ["T-shirt/top", "Ankle boot"]
    return wanted, [names[0], *source.classes[1:9], names[1]]


def svhn(root, monkeypatch, name):
    """Matlab's arrays X [32, 32, 3, N] and y [N, 1], in which the digit 0 is 10."""
    try:
        from scipy.io import savemat
    except ModuleNotFoundError:                     # not required: then numpy's files do for Matlab's
        scipy, scipy.io = types.ModuleType("scipy"), types.ModuleType("scipy.io")
        scipy.__spec__ = scipy.io                   # find_spec wants any
        scipy.io.loadmat = lambda path: dict(np.load(path))
        monkeypatch.setitem(sys.modules, "scipy", scipy)
        monkeypatch.setitem(sys.modules, "scipy.io", scipy.io)

        def savemat(path, arrays):
            with open(path, "wb") as file:
                np.savez(file, **arrays)

    splits, wanted = {}, {}
    for split, n in ("train", 10), ("test", 3):
        images, file = RNG.integers(0, 256, (n, 3, 32, 32), np.uint8), root / f"{split}_32x32.mat"
        savemat(file, dict(X=images.transpose(2, 3, 1, 0), y=np.arange(1, n + 1, dtype=np.uint8)[:, None]))
        splits[split], wanted[split] = ["", file.name, md5(file)], (images, [label % 10 for label in range(1, n + 1)])
    monkeypatch.setattr(datasets.SVHN, "split_list", splits)
    return wanted, list("0123456789")


def stl10(root, monkeypatch, name):
    """Columns before rows; labels from 1."""
    wanted, contents, names = {}, {}, [f"class {i}" for i in range(10)]
    for split, n in ("train", 5), ("test", 2):
        images = RNG.integers(0, 256, (n, 3, 96, 96), np.uint8)
        contents[f"{split}_X.bin"] = images.transpose(0, 1, 3, 2).tobytes()
        contents[f"{split}_y.bin"] = bytes(range(1, n + 1))
        wanted[split] = images, list(range(n))
    contents |= {"unlabeled_X.bin": bytes(3 * 96 * 96), "class_names.txt": "\n".join(names).encode()}
    archive(root, monkeypatch, datasets.STL10, contents)
    return wanted, names


MAKERS = dict(cifar10=cifar, cifar100=cifar, mnist=mnist, fashion_mnist=mnist, svhn=svhn, stl10=stl10)


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_each_is_read_from_the_files_that_are_already_there(tmp_path, monkeypatch, name):
    wanted, names = MAKERS[name](tmp_path, monkeypatch, name)
    for split, (images, labels) in wanted.items():
        dataset = data.load(name, tmp_path, split, size=images.shape[-1])
        assert dataset.images.is_contiguous() and torch.equal(dataset.images, torch.from_numpy(images))
        assert dataset.labels.dtype == torch.int64 and dataset.labels.tolist() == labels
        assert dataset.classes == names
        assert dataset.notes == (["with a border of 2 pixels"] if "mnist" in name else [])


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("name", published.PUBLISHED)
def test_each_comes_in_any_size(tmp_path, monkeypatch, name, size):
    wanted, _ = MAKERS[name](tmp_path, monkeypatch, name)
    dataset = data.load(name, tmp_path, size=size)
    side = 28 if "mnist" in name else 96 if name == "stl10" else 32
    assert dataset.notes == [f"resized from {side}x{side}"]
    usual = wanted["train"][0].transpose(0, 2, 3, 1)
    if "mnist" in name:                             # without a border
        usual = usual[:, 2:-2, 2:-2]
    paths = [tmp_path / f"{i}.png" for i in range(len(usual))]
    for path, image in zip(paths, usual, strict=True):
        Image.fromarray(image).save(path)
    assert torch.equal(dataset.images, image_files.read(paths, size)[0])


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_without_a_download_it_tells_the_alternatives(tmp_path, monkeypatch, name):
    def no_network(url, root=None, *args, download_root=None, **kwargs):
        Path(root or download_root).mkdir(parents=True, exist_ok=True)              # as torchvision does before it asks
        raise RuntimeError("no\nnetwork")

    def unreachable(*args, **kwargs):
        raise RuntimeError("no network")

    kind = published.PUBLISHED[name]
    source = getattr(datasets, kind.source)
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda package: True)
    module = sys.modules[source.__module__]
    downloads = "download_url" if name == "svhn" else "download_and_extract_archive"
    monkeypatch.setattr(module, downloads, no_network)
    file = Path(kind.archives(source, "train")[0][0])
    alternatives = f"{file.name}.*--dataset folder.*--dataset shapes"
    with pytest.raises(data.DataError, match=rf"{name} is not complete in .*no network.*{alternatives}") as raised:
        data.load(name, tmp_path / "new" / "data")
    assert "\n" not in str(raised.value)
    assert not any(tmp_path.iterdir())              # no empty folder is left behind
    (tmp_path / file.parent).mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"cut")
    monkeypatch.setattr(module, downloads, unreachable)
    with pytest.raises(data.DataError, match=rf"{file} is damaged .*no network.* put a whole {file.name} into"):
        data.load(name, tmp_path)


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    def too_large(*args, **kwargs):
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(datasets.CIFAR10, "__init__", too_large)
    with pytest.raises(MemoryError, match="9 GiB"):
        data.load("cifar10", tmp_path)


def test_what_was_extracted_and_is_damaged_is_said(tmp_path, monkeypatch):
    mnist(tmp_path, monkeypatch, "mnist")
    data.load("mnist", tmp_path)
    raw = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    content = raw.read_bytes()
    for damage in content[:-100], content[:10], b"", bytes(100):
        raw.write_bytes(damage)
        with pytest.raises(data.DataError, match=r"extracted of mnist below .* is not whole \(.+\); either remove it"):
            data.load("mnist", tmp_path)
    raw.write_bytes(content)
    labels = raw.with_name("train-labels-idx1-ubyte")
    labels.write_bytes(labels.read_bytes().replace(struct.pack(">I", 4), struct.pack(">I", 3))[:-1])
    with pytest.raises(data.DataError, match="4 images and 3 labels"):
        data.load("mnist", tmp_path)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_only_what_has_its_published_md5_is_unpickled(tmp_path, monkeypatch, name):
    """An extracted file that was changed is extracted anew; an archive that was changed is refused."""
    monkeypatch.chdir(tmp_path)
    cifar(tmp_path, monkeypatch, name)
    source, dataset = getattr(datasets, published.PUBLISHED[name].source), data.load(name, tmp_path)
    for file in (source.train_list[0][0], source.test_list[0][0]):
        (tmp_path / source.base_folder / file).write_bytes(pickle.dumps(Trap()))
        assert data.load(name, tmp_path).digest() == dataset.digest()
    (tmp_path / source.base_folder / source.meta["filename"]).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(data.DataError, match=r"extracted .* is not whole .*metadata"):
        data.load(name, tmp_path)
    for file in (tmp_path / source.base_folder).iterdir():
        file.unlink()
    with tarfile.open(tmp_path / source.filename, "w:gz") as packed:
        (tmp_path / "trap").write_bytes(pickle.dumps(Trap()))
        for file, _ in source.train_list + source.test_list:
            packed.add(tmp_path / "trap", f"{source.base_folder}/{file}")

    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(datasets.utils, "download_url", unreachable)
    with pytest.raises(data.DataError, match="is damaged"):
        data.load(name, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(data.DataError, match="--dataset svhn needs scipy, which is not installed"):
        data.load("svhn", tmp_path / "data")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "flip"), [("mnist", 0), ("svhn", 0), ("fashion_mnist", 1), ("folder", 1)])
def test_digits_are_not_mirrored_unless_asked(name, flip):
    args = types.SimpleNamespace(dataset=name, data_dir=None, flip=None)
    assert data.named(args, None)[2] == flip
    args.flip = 1 - flip
    assert data.named(args, None)[2] == 1 - flip
    known = dict(settings=dict(dataset=name, flip=1 - flip))
    assert data.named(types.SimpleNamespace(dataset=None, data_dir=None, flip=None), known)[2] == 1 - flip


def test_the_flag_names_what_there_is():
    assert (*published.PUBLISHED, "folder", "shapes") == flags.DATASETS
