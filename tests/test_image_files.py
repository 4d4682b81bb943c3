"""Images of every kind against the pixels that went into them."""

import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from support import image_files

RAMP = np.linspace(0, 1, 32)                        # black on the left, white on the right
SQUARE = np.pad(np.full((16, 16), 255, np.uint8), 8)            # what is opaque


def read_file(path):
    """The pixels, uint8 [32, 32, 3], of a file that is a dataset of its own."""
    return image_files.read([path])[0][0].permute(1, 2, 0).numpy()


def read(folder, image, suffix=".png", **options):
    """The pixels of an image that was saved."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(folder / f"a{suffix}", **options)
    return read_file(folder / f"a{suffix}")


def rows(values, kind):
    return np.tile(np.asarray(values).astype(kind), (32, 1))


def test_images_of_32_pixels_are_kept_bit_for_bit_and_larger_ones_keep_their_proportions(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(read(tmp_path, pixels), pixels)
    wide = np.zeros((64, 256, 3), dtype=np.uint8)
    wide[:, 96:160] = 255                           # the central square is white, the sides are black
    assert (read(tmp_path, wide)[:, 2:-2] == 255).all()


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "LA", "PA", "YCbCr", "LAB", "RGBX"])
def test_images_of_other_modes_become_rgb(tmp_path, mode):
    white = Image.new("RGBA", (40, 40), "white")
    image = read(tmp_path, white.convert(mode if mode in ("PA", "LA") else "RGB").convert(mode), ".tif")
    assert image.shape == (32, 32, 3) and image.min() > 250


@pytest.mark.parametrize("white, kind, suffix", [
    (2**16 - 1, np.uint16, ".png"), (2**16 - 1, np.uint16, ".tif"), (2**16 - 1, ">u2", ".tif"),
    (2**16 - 1, np.uint16, ".pgm"), (2**16 - 1, np.int32, ".tif"), (2**31 - 1, np.int32, ".tif"),
    (1, np.float32, ".tif"), (1, np.float32, ".pfm"),
])
def test_greys_of_more_than_8_bits_keep_all_their_levels(tmp_path, white, kind, suffix):
    pixels = read(tmp_path, rows(RAMP * white, kind), suffix)
    assert np.abs(pixels - rows(255 * RAMP, float)[..., None]).max() < 0.51
    assert not pixels[:, 0].any() and (pixels[:, -1] == 255).all()


@pytest.mark.parametrize("white, kind, bits, sample_format", [
    (2**32 - 1, "<u4", 32, 1), (2**31 - 1, "<i4", 32, 2), (2**15 - 1, "<i2", 16, 2), (2**12 - 1, "<u2", 12, 1),
])
def test_a_tiff_says_what_its_type_is(tmp_path, white, kind, bits, sample_format):
    """Types that Pillow reads and does not write."""
    values = rows(RAMP * white, kind)
    content = values.tobytes()
    if bits == 12:                                  # two values in three bytes
        one, two = values[:, ::2], values[:, 1::2]
        content = np.stack([one >> 4, (one << 4 | two >> 8) & 255, two & 255], -1).astype(np.uint8).tobytes()
    tags = {256: 32, 257: 32, 258: bits, 259: 1, 262: 1, 273: 130, 277: 1, 278: 32, 279: len(content)}
    tags[339] = sample_format
    header = b"II*\0" + struct.pack("<IH", 8, len(tags))
    header += b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags.items())
    (tmp_path / "a.tif").write_bytes(header.ljust(130, b"\0") + content)
    pixels = read_file(tmp_path / "a.tif")
    assert np.abs(pixels - rows(255 * RAMP, float)[..., None]).max() < 0.6


def test_zero_may_be_white(tmp_path):
    assert not read(tmp_path, rows([65535] * 32, np.uint16), ".tif", tiffinfo={262: 0}).any()


@pytest.mark.parametrize("values", [RAMP * 2, RAMP - 0.5, RAMP * np.nan])
def test_levels_that_nobody_knows_the_white_of_are_refused(tmp_path, values):
    with pytest.raises(image_files.DataError, match=r"a\.tif: its values are from .* not within 0 to 1"):
        read(tmp_path, rows(values, np.float32), ".tif")
    with pytest.raises(image_files.DataError, match=r"from -4 to 5, not within 0 to \d+"):
        read(tmp_path, rows(RAMP * 9 - 4, np.int32), ".tif")


def test_transparent_images_lie_on_white(tmp_path):
    """A black square in the middle of hidden black."""
    wanted = 255 - SQUARE
    rgba, la = np.dstack([0 * SQUARE] * 3 + [SQUARE]), np.dstack([0 * SQUARE, SQUARE])
    for pixels in rgba, la:
        for suffix in (".png", ".tif"):
            assert (read(tmp_path, pixels, suffix) == wanted[..., None]).all()
    palette = Image.fromarray(SQUARE // 255)
    palette.putpalette([9, 9, 9, 0, 0, 0], "RGB")
    assert (read(tmp_path, palette.copy(), transparency=0) == wanted[..., None]).all()
    assert (read(tmp_path, palette.copy(), ".gif", transparency=0) == wanted[..., None]).all()
    assert (read(tmp_path, palette.copy(), transparency=bytes([0, 255])) == wanted[..., None]).all()
    for grey in Image.fromarray(255 - SQUARE), Image.fromarray((255 - SQUARE).astype(np.uint16)):
        assert (read(tmp_path, grey, transparency=255) == wanted[..., None]).all()
    half = np.dstack([0 * SQUARE] * 3 + [SQUARE // 2])
    assert abs(read(tmp_path, half)[16, 16].astype(int) - 128).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, orientation):
    """The turns of EXIF, by where the first row and the first column of what is stored belong."""
    first_row, first_column = [
        ("top", "left"), ("top", "right"), ("bottom", "right"), ("bottom", "left"), ("left", "top"), ("right", "top"),
        ("right", "bottom"), ("left", "bottom"),
    ][orientation - 1]
    stored = np.zeros((32, 32, 3), np.uint8)
    stored[:8, :, 0] = stored[:, :8, 1] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = read(tmp_path, stored, exif=exif)
    side = dict(top=np.s_[:8], bottom=np.s_[-8:], left=np.s_[:, :8], right=np.s_[:, -8:])
    for channel, name in enumerate((first_row, first_column)):
        assert seen[..., channel][side[name]].all() and seen[..., channel].mean() == 255 / 4


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".jpg"])
def test_damaged_or_long_words_beside_a_picture_do_not_matter(tmp_path, suffix):
    pixels = np.full((32, 32, 3), 200, np.uint8)
    words = PngImagePlugin.PngInfo()
    words.add_text("parameters", "word " * 600_000, zip=True)
    more = dict(pnginfo=words, icc_profile=bytes(3_000_000)) if suffix == ".png" else {}
    if suffix != ".tif":                            # there it is the file itself
        more["exif"] = b"Exif\0\0garbage"
    assert (read(tmp_path, pixels, suffix, **more) == pixels).all()


def test_a_photograph_of_40_megapixels_is_read_and_a_bomb_is_named(tmp_path, monkeypatch):
    assert (read(tmp_path, Image.new("L", (8000, 5000), 200)) == 200).all()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000_000)      # Pillow refuses twice as many
    with pytest.raises(image_files.DataError, match=r"a\.png"):
        read_file(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".tiff", ".webp", ".ppm", ".bmp", ".jpeg", ".png", ".gif", ".avif"])
def test_a_cut_image_of_any_kind_is_named(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(image_files.DataError, match="cannot read image"):
        read_file(path)


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
def test_every_kind_that_pillow_writes_and_reads_is_found(tmp_path):
    written = set()
    for suffix, kind in Image.registered_extensions().items():
        name = f"a{suffix.upper() if len(written) % 2 else suffix}"
        try:
            Image.new("RGB", (32, 32)).save(tmp_path / name, kind)
            read_file(tmp_path / name)
            written.add(name)
        except (OSError, KeyError, ValueError, image_files.DataError):
            (tmp_path / name).unlink(missing_ok=True)
    images, others = image_files.find(tmp_path)
    assert {path.name for path in images} | {"a.ps", "a.eps"} >= written and len(written) > 30 and not others
    assert "a.h5" not in written and not image_files.is_image(tmp_path / "a.h5")


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(image_files.DataError, match=r"cannot read folder .*nothing_here: No such file"):
        image_files.find(tmp_path / "nothing_here")
