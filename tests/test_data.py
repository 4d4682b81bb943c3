import argparse
import hashlib
import inspect

import numpy as np
import pytest
import torch
from conftest import image_tree
from PIL import Image

from model import SimpleUNet
from support import data, errors, image_cache, image_files, networks, pixels, published, shapes


def test_float_and_uint8_are_inverse():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.to_float(every)), every)
    assert data.to_float(every).min() == -1 and data.to_float(every).max() == 1
    assert torch.equal(data.to_uint8(torch.tensor([-7.0, 7.0])), torch.tensor([0, 255], dtype=torch.uint8))


def test_shapes_are_reproducible_balanced_and_fresh_for_another_seed():
    images, labels = shapes.draw(200, seed=3, size=32)
    again, _ = shapes.draw(200, seed=3, size=32)
    other, _ = shapes.draw(200, seed=4, size=32)
    assert images.shape == (200, 3, 32, 32) and images.dtype == np.uint8
    assert np.array_equal(images, again) and not np.array_equal(images, other)
    assert (np.bincount(labels) == 20).all()


def test_shapes_are_antialiased_and_tell_the_classes_apart():
    images, labels = shapes.draw(2000, seed=0, size=32)
    brightness = images.astype(np.float32).max(1)                                   # [N, 32, 32]
    assert len(np.unique(images)) > 100             # edges have many levels between figure and background
    # Nearest class mean by silhouette, on fresh images: the figures differ by more than pose and colour do.
    silhouette = (brightness / brightness.max((1, 2), keepdims=True)).reshape(2000, -1)
    means = np.stack([silhouette[labels == c].mean(0) for c in range(10)])
    fresh, fresh_labels = shapes.draw(500, seed=1, size=32)
    bright = fresh.astype(np.float32).max(1)
    bright = (bright / bright.max((1, 2), keepdims=True)).reshape(500, -1)
    guess = ((bright[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    assert (guess == fresh_labels).mean() > 0.8


def test_shapes_of_32_pixels_never_change():
    images, labels = shapes.draw(50, seed=3, size=32)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert digest == "cde177048d244fc7eefcf43d2401f104d5b3db1e5eb165e7e70e23ce01fc4d50"


@pytest.mark.parametrize("size", [16, 64])
def test_shapes_are_the_same_figures_at_any_size(size):
    """Both sizes, averaged over blocks of the same part of the image, agree up to the levels of their edges."""
    images, labels = shapes.draw(50, 3, size)
    usual, usual_labels = shapes.draw(50, 3, 32)
    assert images.shape == (50, 3, size, size) and np.array_equal(labels, usual_labels)
    coarse, fine = (some.reshape(50, 3, 16, n, 16, n).mean((3, 5)) for some, n in ((images, size // 16), (usual, 2)))
    assert np.abs(coarse - fine).mean() < 1 and np.abs(coarse - fine).max() < 60


def test_a_dataset_has_the_size_of_the_flag_or_of_the_checkpoint_s_network(tmp_path):
    args = argparse.Namespace(dataset="folder", data_dir=str(image_tree(tmp_path / "tree")), image_size=64)
    assert data.from_flags(args).images.shape == (6, 3, 64, 64)
    config = networks.described(SimpleUNet(channels=8, label_dim=2))
    assert data.from_flags(args, dict(model_config=config, classes=["cat", "dog"])).images.shape == (6, 3, 32, 32)


@pytest.mark.parametrize("function", [
    data.load_folder, shapes.draw, published.load, image_cache.read, image_files.read, pixels.decode,
])
def test_a_forgotten_size_is_an_error(function):
    """Networks of convolutions take images of any size: a default would pass unnoticed."""
    assert inspect.signature(function).parameters["size"].default is inspect.Parameter.empty


def test_train_and_test_split_of_shapes_differ():
    train, test = data.load("shapes"), data.load("shapes", split="test")
    assert train.classes == shapes.CLASSES and len(train.images) == data.SHAPES_TRAIN_IMAGES
    assert not torch.equal(train.images[:100], test.images[:100])


def test_folder_reads_classes_labels_and_pixels(tmp_path):
    dataset = data.load("folder", image_tree(tmp_path / "tree"))
    assert dataset.classes == ["cat", "dog"] and dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.images.shape == (6, 3, 32, 32) and dataset.images.dtype == torch.uint8
    assert dataset.images[4, :, 16, 16].tolist() == [50, 10, 200]


def test_folder_takes_its_split_where_there_is_one(tmp_path):
    image_tree(tmp_path / "train", n=2)
    image_tree(tmp_path / "test", n=1)
    assert len(data.load("folder", tmp_path).images) == 4
    assert len(data.load("folder", tmp_path, "test").images) == 2


def test_every_broken_image_is_counted_and_the_first_are_named(tmp_path):
    tree = image_tree(tmp_path / "tree", n=5)
    for i, content in enumerate([b"", b"not an image", (tree / "dog" / "2.png").read_bytes()[:60], b"", b""]):
        (tree / "dog" / f"{i}.png").write_bytes(content)
        with pytest.raises(data.DataError, match=r"image .*dog/0\.png") as raised:
            data.load("folder", tree)
        assert ("5 of 10" in str(raised.value)) == (i == 4) and ("of 10" in str(raised.value)) == (i > 0)
    assert "dog/2.png" in str(raised.value) and "dog/3.png" not in str(raised.value)


def test_a_folder_tells_what_it_found_and_what_it_left_out(tmp_path):
    tree = image_tree(tmp_path / "tree")
    Image.new("L", (32, 32), 9).save(tree / "dog" / "b.GIF")        # torchvision's own list has neither this
    Image.new("L", (32, 32), 9).save(tree / "cat" / "b.jfif", "JPEG")               # nor this
    for name in ("cat/a.heic", "dog/b.HEIC", "dog/notes", "labels.csv", "stray.png"):
        (tree / name).write_bytes(b"")
    dataset = data.load("folder", tree)
    said = "8 images (6 resized to 32x32), 2 classes (cat, dog), 5 files left out (.csv, .heic, .png, notes)"
    assert str(dataset) == said
    assert dataset.labels.tolist() == [0] * 4 + [1] * 4
    assert str(data.Dataset(dataset.images, dataset.labels, [*"abcdefghijklm"])).endswith("13 classes "
        "(a, b, c, d, e, f, g, h, i, j, ...)")


def test_hidden_names_are_no_classes_and_a_link_shows_no_image_twice(tmp_path):
    tree = image_tree(tmp_path / "tree")
    image_tree(tmp_path / "elsewhere", classes=("bird",))
    plain = data.load("folder", tree)
    (tree / ".ipynb_checkpoints").mkdir()
    image_tree(tree / "cat" / ".thumbnails")
    for hidden in ("._0.png", "cat/._0.png", "cat/.DS_Store"):
        (tree / hidden).write_bytes(b"\0")
    (tree / "cat" / "loop").symlink_to(".")
    (tree / "dog" / "cats").symlink_to("../cat")
    dataset = data.load("folder", tree)
    assert torch.equal(dataset.images, plain.images)
    said = ", 3 files left out (hidden), 2 folders left out (.ipynb_checkpoints, .thumbnails)"
    assert str(dataset) == str(plain) + said
    (tree / "bird").symlink_to(tmp_path / "elsewhere" / "bird")     # a class may lie elsewhere
    assert data.load("folder", tree).labels.bincount().tolist() == [3, 3, 3]
    (tree / "dove").symlink_to("bird")
    with pytest.raises(data.DataError, match="class folder dove"):
        data.load("folder", tree)


def test_the_digest_tells_images_labels_and_class_names_apart(tmp_path):
    tree = image_tree(tmp_path / "tree")
    digests = [data.load("folder", tree).digest(), data.load("folder", tree).digest()]
    assert digests[0] == digests[1]
    Image.new("L", (32, 32), 9).save(tree / "cat" / "new.png")
    digests.append(data.load("folder", tree).digest())
    (tree / "cat" / "new.png").rename(tree / "dog" / "!new.png")    # the same images in the same order
    digests.append(data.load("folder", tree).digest())
    (tree / "cat").rename(tree / "car")
    digests.append(data.load("folder", tree).digest())
    assert len(set(digests)) == 4


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    tree = image_tree(tmp_path / "tree", classes=("bicycle", "test", "train"))      # CIFAR-100 has trains
    assert data.load("folder", tree).classes == ["bicycle", "test", "train"]
    with pytest.raises(data.DataError, match="has no folder test"):
        data.load("folder", tree, "test")


def nested(root, *names):
    """A tree with one image in each of the named folders."""
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("L", (32, 32)).save(root / name / "a.png")
    return root


def test_a_system_s_folder_is_no_class(tmp_path):
    tree = nested(tmp_path, "car", "bus", "@eaDir/x", "__MACOSX/car", "car/@eaDir")
    (tree / "lost+found").mkdir()
    dataset = data.load("folder", tree)
    assert dataset.classes == ["bus", "car"] and len(dataset.images) == 2
    assert str(dataset) == "2 images, 2 classes (bus, car), 4 folders left out (@eaDir, __MACOSX, lost+found)"


def test_classes_that_may_be_a_split_are_refused(tmp_path):
    def refused(match, *names):
        with pytest.raises(data.DataError, match=match):
            data.load("folder", nested(tmp_path / str(len(list(tmp_path.iterdir()))), *names))

    years = [f"{name}/{year}" for name in ("car", "bus", "train") for year in (2019, 2020)]
    refused(r"is train a class beside bus, car, or the images of a split, with the classes 2019, 2020\?", *years)
    refused("no class folders, only Test, Train, names of splits: .*train/<class>", "Train/cat", "Test/cat")
    refused("no class folders, only training, a name of splits", "training")
    refused("class folder cat has the splits test, train", "cat/train", "cat/test", "dog/train")


def test_it_says_which_folders_are_the_classes(tmp_path, capsys):
    tree = nested(tmp_path / "split", "train/cat", "train/dog", "test/cat")
    (tree / "annotations").mkdir()
    (tree / "annotations" / "boxes.txt").write_text("")
    dataset = data.load("folder", tree)
    assert str(dataset) == f"2 images (in {tree}/train), 2 classes (cat, dog)" and capsys.readouterr().err == ""
    wrapped = nested(tmp_path / "wrapped", "all/cat", "all/dog")
    assert data.load("folder", wrapped).classes == ["all"]
    assert f"if the folders in it are classes (cat, dog), give --data_dir {wrapped}/all" in capsys.readouterr().err


def test_images_without_class_folders_are_one_class_named_after_the_folder(tmp_path, monkeypatch, capsys):
    photos = image_tree(tmp_path, classes=("photos",)) / "photos"
    said = "3 images (no class folders; 3 resized to 32x32), 1 class (photos)"
    assert str(data.load("folder", photos)) == said
    for name in ("annotations/boxes.txt", "labels/list.csv", "._0.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"\0")
    dataset = data.load("folder", photos)
    assert str(dataset) == f"{said}, 3 files left out (.csv, .txt, hidden)"
    assert dataset.images[:, 1, 0, 0].tolist() == [0, 10, 20] and dataset.labels.tolist() == [0, 0, 0]
    monkeypatch.chdir(photos)
    assert data.load("folder", ".").digest() == dataset.digest() and capsys.readouterr().err == ""
    monkeypatch.chdir(tmp_path)
    Image.new("L", (32, 32)).save(photos / "labels" / "a.png")      # is it a class, beside one that is empty?
    with pytest.raises(data.DataError, match="no images in class folder annotations"):
        data.load("folder", photos)
    Image.new("L", (32, 32)).save(photos / "annotations" / "a.png")
    said = "2 images, 2 classes (annotations, labels), 6 files left out (.csv, .png, .txt, hidden)"
    assert str(data.load("folder", photos)) == said


def test_class_folders_of_unreadable_files_are_refused_beside_a_few_images(tmp_path):
    tree = nested(tmp_path, "cat", "dog")
    for name in "cat", "dog":
        (tree / name / "a.png").rename(tree / name / "a.heic")
    Image.new("L", (32, 32)).save(tree / "preview.png")
    with pytest.raises(data.DataError, match="no images in class folder cat, dog"):
        data.load("folder", tree)
    Image.new("L", (32, 32)).save(tree / "second.png")              # as many: the files may describe the images
    said = f"2 images (no class folders), 1 class ({tmp_path.name}), 2 files left out (.heic)"
    assert str(data.load("folder", tree)) == said


def of_checkpoint(classes, folder):
    """What data.from_flags reads of a folder for a SimpleUNet of these classes."""
    config = networks.described(SimpleUNet(channels=8, label_dim=len(classes)))
    args = argparse.Namespace(dataset="folder", data_dir=str(folder))
    return data.from_flags(args, dict(model_config=config, classes=classes))


def test_classes_of_another_order_go_by_their_names(tmp_path):
    found = of_checkpoint(["dog", "owl", "cat"], image_tree(tmp_path, ("cat", "dog", "owl"), n=1, size=(32, 32)))
    assert found.classes == ["dog", "owl", "cat"] and found.labels.tolist() == [2, 0, 1]
    assert found.images[:, 0, 0, 0].tolist() == [0, 50, 100]
    with pytest.raises(errors.UsageError, match="has the classes cat, dog, owl; those of the checkpoint are dog, owl"):
        of_checkpoint(["dog", "owl"], tmp_path)


def test_digits_that_a_teacher_was_trained_on_are_no_other_classes(tmp_path):
    digits = [str(digit) for digit in range(10)]
    assert of_checkpoint(digits, image_tree(tmp_path / "digits", digits, n=1)).labels.tolist() == list(range(10))
    with pytest.raises(errors.UsageError, match=r"classes a, b, c, .* those of the checkpoint are 0, 1, 2"):
        of_checkpoint(digits, image_tree(tmp_path / "others", "abcdefghij", n=1))


def test_images_without_class_folders_are_of_the_checkpoint_s_one_class(tmp_path):
    faces = data.load("folder", image_tree(tmp_path, classes=("faces",)) / "faces")
    (tmp_path / "faces").rename(tmp_path / "people")
    found = of_checkpoint(["faces"], tmp_path / "people")
    assert found.classes == ["faces"] and found.digest() == faces.digest()
    for classes, folder in ((["faces"], tmp_path), (["faces", "cats"], tmp_path / "people")):
        with pytest.raises(errors.UsageError, match="has the classes people; those of the checkpoint are faces"):
            of_checkpoint(classes, folder)          # a class folder that is called people; a checkpoint of two classes


def test_a_dataset_without_classes_may_have_splits(tmp_path):
    faces = image_tree(tmp_path / "faces", classes=("train", "test"))
    train, test = (data.load("folder", faces, split) for split in ("train", "test"))
    assert str(train) == f"3 images (in {faces}/train; no class folders; 3 resized to 32x32), 1 class (faces)"
    assert test.classes == ["faces"] and test.images[0, 0, 0, 0] == 50
    image_tree(faces, classes=("bus",))             # beside another class they are classes
    assert data.load("folder", faces).classes == ["bus", "test", "train"]


def test_names_that_are_not_utf_8_are_names_too(tmp_path):
    class_name, file_name = b"caf\xe9".decode(errors="surrogateescape"), b"\xe9.png".decode(errors="surrogateescape")
    tree = nested(tmp_path / class_name, "dog", class_name)
    (tree / "dog" / "a.png").rename(tree / "dog" / file_name)
    dataset = data.load("folder", tree, "train", tmp_path / "cache")
    assert dataset.classes == [class_name, "dog"] and len(dataset.digest()) == 64
    (tree / "dog" / file_name).write_bytes(b"")
    with pytest.raises(data.DataError) as raised:
        data.load("folder", tree, "train", tmp_path / "cache")
    assert "cannot read image" in str(raised.value) and f"dog/{file_name}" in str(raised.value)
    torch.save(dataset.classes, tmp_path / "classes.pt")
    assert torch.load(tmp_path / "classes.pt", weights_only=True) == dataset.classes


def test_the_line_about_the_dataset_tells_of_mirroring_and_of_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_cache, "WORTH_KEEPING", 0)
    monkeypatch.setattr(image_cache, "SETTLED", -60)
    cache = str(tmp_path / "cache")
    folder = str(image_tree(tmp_path / "tree"))
    args = argparse.Namespace(dataset="folder", data_dir=folder, image_size=32, cache_dir=cache, flip=1)
    first = data.from_flags(args)
    mirrored = "; half of the images are mirrored (--flip 1)\n"
    resized, classes = "6 resized to 32x32", "2 classes (cat, dog)"
    assert capsys.readouterr().out == f"folder: 6 images ({resized}), {classes}{mirrored}"
    args.flip = 0
    assert data.from_flags(args).digest() == first.digest()
    read = f"read from the cache in {cache}; {resized}"
    assert capsys.readouterr().out == f"folder: 6 images ({read}), {classes}\n"


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(data.DataError, match="has no folder test"):
        data.load("folder", image_tree(tmp_path / "no_split"), "test")
    with pytest.raises(data.DataError, match="nothing_here"):
        data.load("folder", tmp_path / "nothing_here")
    (tmp_path / "without").mkdir()
    with pytest.raises(data.DataError, match="without has no class folders, and no images"):
        data.load("folder", tmp_path / "without")
    (image_tree(tmp_path / "tree") / "empty_class").mkdir()
    with pytest.raises(data.DataError, match="empty_class"):
        data.load("folder", tmp_path / "tree")
    with pytest.raises(data.DataError, match="unknown dataset"):
        data.load("imagenet")


def test_batches_depend_on_seed_and_step_and_use_every_image_once_an_epoch():
    n = 50
    values = torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1).expand(n, 3, 32, 32)
    dataset = data.Dataset(values, torch.arange(n), [])
    batches = data.Batches(dataset, 20, seed=1, device="cpu")
    assert batches.images.data_ptr() == values.data_ptr()           # not a copy
    labels = [batches(step)[1] for step in range(10)]
    stream = torch.cat(labels)
    for epoch in range(4):
        assert sorted(stream[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    assert stream[:n].tolist() != stream[n : 2 * n].tolist()
    resumed = data.Batches(dataset, 20, seed=1, device="cpu")       # starts in the middle, across an epoch's end
    assert all(torch.equal(resumed(step)[1], labels[step]) for step in (7, 8, 2))
    assert not torch.equal(data.Batches(dataset, 20, seed=2, device="cpu")(0)[1], labels[0])
    images, batch_labels = batches(3)
    assert torch.equal(data.to_uint8(images)[:, 0, 0, 0].long(), batch_labels)
    assert images.dtype == torch.float32 and batch_labels.dtype == torch.int64
    assert torch.equal(batches(3, 1, 4)[1], labels[3][5:10])        # the second of four shares
    large = data.Batches(dataset, 120, seed=1, device="cpu")(0)[1]  # a batch of more than two epochs
    assert torch.equal(large, stream[:120])


def test_batches_of_another_size_go_on_where_the_others_stopped():
    dataset = data.Dataset(torch.zeros(50, 3, 32, 32, dtype=torch.uint8), torch.arange(50), [])
    before, after = (data.Batches(dataset, size, seed=1, device="cpu") for size in (20, 5))
    stream = torch.cat([data.Batches(dataset, 20, 1, "cpu")(step)[1] for step in range(5)])
    for step in range(3):
        before(step)
    after.load_state_dict(before.state_dict())
    assert torch.equal(torch.cat([after(step)[1] for step in range(3, 7)]), stream[60:80])
    again = data.Batches(dataset, 20, seed=1, device="cpu")
    again.load_state_dict(after.state_dict())
    assert torch.equal(again(7)[1], stream[80:])
