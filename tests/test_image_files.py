"""Which files are images, and that reading them in parallel keeps their order."""

import pytest
from PIL import Image

from support import image_files


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
def test_every_kind_that_pillow_writes_and_reads_is_found(tmp_path):
    written = set()
    for suffix, kind in Image.registered_extensions().items():
        name = f"a{suffix.upper() if len(written) % 2 else suffix}"
        try:
            Image.new("RGB", (32, 32)).save(tmp_path / name, kind)
            image_files.read([tmp_path / name], 32)
            written.add(name)
        except (OSError, KeyError, ValueError, image_files.DataError):
            (tmp_path / name).unlink(missing_ok=True)
    images, others = image_files.find(tmp_path)
    assert {path.name for path in images} | {"a.ps", "a.eps"} >= written and len(written) > 30 and not others
    assert "a.h5" not in written and not image_files.is_image(tmp_path / "a.h5")


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(image_files.DataError, match=r"cannot read folder .*nothing_here: No such file"):
        image_files.find(tmp_path / "nothing_here")


def test_an_error_without_words_is_named(tmp_path, monkeypatch):
    def too_large(*args):
        raise MemoryError                           # as Pillow raises it

    monkeypatch.setattr(image_files.pixels, "decode", too_large)
    with pytest.raises(image_files.DataError, match=r"cannot read image a\.png: MemoryError"):
        image_files.read(["a.png"], 32)


@pytest.mark.parametrize("portion", [1, 7, 64])
def test_images_come_in_the_order_of_their_paths(tmp_path, monkeypatch, portion):
    monkeypatch.setattr(image_files, "PORTION", portion)
    paths = []
    for i in range(70):                             # the first take the longest
        paths.append(tmp_path / f"{99 - i}.png")
        Image.new("L", (1200 if i < 3 else 32, 32), 3 * i).save(paths[-1])
    images, _ = image_files.read(paths, 32)
    assert images[:, 0, 0, 0].tolist() == [3 * i for i in range(70)]


def test_images_of_another_size_are_counted(tmp_path):
    """Also what becomes smaller before it is decoded, stands upright or is only cut."""
    exif = Image.Exif()
    exif[0x0112] = 6                                # turned by a quarter
    for name, sides, options in (
        ("a.png", (32, 32), {}), ("b.png", (64, 64), {}), ("c.png", (32, 48), {}), ("d.png", (40, 16), {}),
        ("e.jpg", (1000, 1000), {}), ("f.jpg", (24, 32), dict(exif=exif)), ("g.jpg", (32, 32), dict(exif=exif)),
    ):
        Image.new("RGB", sides).save(tmp_path / name, **options)
    paths = sorted(tmp_path.iterdir())
    assert image_files.read(paths, 32)[1] == ["2 enlarged", "5 resized to 32x32"]
    assert image_files.read(paths, 16)[1] == ["7 resized to 16x16"]


def test_hidden_names_and_systems_folders_are_left_out_and_said(tmp_path):
    names = ["a.png", "b.txt", ".c.png", "sub/d.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "sub/__MACOSX/d.png",
             "lost+found/e.png", "sub/.ipynb_checkpoints/d.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32)).save(tmp_path / name, "PNG")
    images, others = image_files.find(tmp_path)
    assert images == [tmp_path / "a.png", tmp_path / "sub" / "d.png"]
    said = "2 files left out (.txt, hidden), 4 folders left out (.ipynb_checkpoints, @eaDir, __MACOSX, lost+found)"
    assert image_files.left_out(others) == said
    assert image_files.left_out(others[:1]) == "1 file left out (hidden)"
