"""The cache of images: read where nothing has changed, and never stale."""

import os
import tracemalloc

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from support import image_cache, image_files


@pytest.fixture(autouse=True)
def always_kept(monkeypatch):
    monkeypatch.setattr(image_cache, "WORTH_KEEPING", 0)
    monkeypatch.setattr(image_cache, "SETTLED", -60)


def write(path, level):
    """A BMP: all are of one size in bytes; and all have one time of change, as files of an archive may."""
    Image.new("L", (32, 32), level).save(path)
    os.utime(path, ns=(10**18, 10**18))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        write(tmp_path / "photos" / f"{i}.bmp", 50 * i)
    return tmp_path / "photos"


def levels(folder):
    """The level of each image, and whether they came from the cache."""
    images, notes = image_cache.read(sorted(folder.iterdir()), folder, folder.parent / "cache", 32)
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32) and images.is_contiguous()
    return images[:, 0, 0, 0].tolist(), notes == [f"read from the cache in {folder.parent / 'cache'}"]


def test_images_are_read_once(folder, monkeypatch):
    assert levels(folder) == ([0, 50, 100], False)
    monkeypatch.setattr(image_files, "read", None)
    assert levels(folder) == ([0, 50, 100], True)
    assert len(list((folder.parent / "cache").iterdir())) == 1


def test_two_sizes_of_a_folder_are_kept_side_by_side(folder):
    paths, cache = sorted(folder.iterdir()), folder.parent / "cache"
    for times in range(2):
        for size in 16, 32, 64:
            images, notes = image_cache.read(paths, folder, cache, size)
            assert images.shape == (3, 3, size, size) and images[:, 0, 0, 0].tolist() == [0, 50, 100]
            assert [note for note in notes if "cache" in note] == [f"read from the cache in {cache}"] * times
    assert len(list(cache.iterdir())) == 3


def test_images_need_little_more_memory_than_their_array(tmp_path):
    paths = [tmp_path / "photos" / f"{i}.bmp" for i in range(60)]
    paths[0].parent.mkdir()
    for path in paths:
        write(path, 7)
    for source in "files", "cache":
        tracemalloc.start()
        images, notes = image_cache.read(paths, tmp_path / "photos", tmp_path / "cache", 512)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert notes[0].startswith("read from the cache") == (source == "cache")
        assert images.numel() <= peak < 1.75 * images.numel()       # numpy writes 16 MiB at a time


def swap(folder):
    (folder / "0.bmp").rename(folder / "x")
    (folder / "1.bmp").rename(folder / "0.bmp")
    (folder / "x").rename(folder / "1.bmp")


def link(folder):
    write(folder.parent / "other.bmp", 7)
    (folder / "2.bmp").unlink()
    (folder / "2.bmp").symlink_to(folder.parent / "other.bmp")


@pytest.mark.parametrize("change, wanted", [
    (lambda folder: write(folder / "1.bmp", 9), [0, 9, 100]),
    (swap, [50, 0, 100]),
    (link, [0, 50, 7]),
    (lambda folder: write(folder / "3.bmp", 9), [0, 50, 100, 9]),
    (lambda folder: (folder / "0.bmp").unlink(), [50, 100]),
    (lambda folder: (folder / "0.bmp").rename(folder / "9.bmp"), [50, 100, 0]),
], ids=["rewritten", "swapped", "linked", "added", "removed", "renamed"])
def test_what_changes_is_read_anew_though_size_and_time_are_the_same(folder, change, wanted):
    levels(folder)
    assert levels(folder)[1]
    change(folder)
    assert levels(folder) == (wanted, False) and levels(folder) == (wanted, True)
    assert len(list((folder.parent / "cache").iterdir())) == 1      # it does not grow


def test_another_version_of_the_reading_code_reads_anew(folder, monkeypatch, tmp_path):
    levels(folder)
    (tmp_path / "pixels.py").write_text("# another")
    monkeypatch.setattr(image_cache.pixels, "__file__", str(tmp_path / "pixels.py"))
    assert not levels(folder)[1] and levels(folder)[1]
    monkeypatch.setattr(PIL, "__version__", "0.1")
    assert not levels(folder)[1]


class Trap:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_damaged_cache_is_made_anew_and_no_code_in_it_is_run(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    levels(folder)
    file, = (folder.parent / "cache").iterdir()
    content = file.read_bytes()
    key, _ = image_cache.state_of(sorted(folder.iterdir()))
    middle = len(content) // 2
    for damage in (
        lambda: file.write_bytes(b""), lambda: file.write_bytes(content[:middle]),
        lambda: file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]),
        lambda: np.savez(file, key=key, notes="[]", images=np.array([Trap()], dtype=object)),
    ):
        damage()
        assert levels(folder) == ([0, 50, 100], False) and levels(folder) == ([0, 50, 100], True)
    assert not (tmp_path / "ran").exists()


def test_a_cache_that_cannot_be_written_is_one_note(folder, capsys):
    (folder.parent / "cache").write_text("a file")
    assert levels(folder) == ([0, 50, 100], False)
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and f"cannot keep the images in --cache_dir {folder.parent / 'cache'}" in note


def test_little_work_and_files_that_have_just_changed_are_not_kept(folder, monkeypatch):
    monkeypatch.setattr(image_cache, "WORTH_KEEPING", 60)
    levels(folder)
    monkeypatch.setattr(image_cache, "WORTH_KEEPING", 0)
    assert not levels(folder)[1] and levels(folder)[1]
    monkeypatch.setattr(image_cache, "SETTLED", 2)
    os.utime(folder / "1.bmp")
    assert not levels(folder)[1] and not levels(folder)[1]


def test_a_file_that_changes_while_it_is_read_is_not_kept(folder, monkeypatch):
    read = image_files.read

    def slowly(paths, size):
        found = read(paths, size)
        write(folder / "0.bmp", 200)
        return found

    monkeypatch.setattr(image_files, "read", slowly)
    levels(folder)
    monkeypatch.setattr(image_files, "read", read)
    assert levels(folder) == ([200, 50, 100], False)


def test_a_file_that_cannot_be_read_is_named_with_and_without_a_cache(folder):
    levels(folder)
    (folder / "1.bmp").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(image_files.DataError, match=r"cannot read image .*1\.bmp"):
            levels(folder)
    (folder / "1.bmp").unlink()
    (folder / "1.bmp").symlink_to("nowhere")
    with pytest.raises(image_files.DataError, match=r"cannot read image .*1\.bmp"):
        levels(folder)
