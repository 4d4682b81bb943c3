"""Images of every kind against the pixels that went into them."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from support import image_files, pixels

RAMP = np.linspace(0, 1, 32)                        # black on the left, white on the right
SQUARE = np.pad(np.full((16, 16), 255, np.uint8), 8)            # what is opaque


def read_file(path):
    """The pixels, uint8 [32, 32, 3], of a file that is a dataset of its own."""
    return image_files.read([path], 32)[0][0].permute(1, 2, 0).numpy()


def read(folder, image, suffix=".png", **options):
    """The pixels of an image that was saved."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(folder / f"a{suffix}", **options)
    return read_file(folder / f"a{suffix}")


def png(values, bits=16, colour_type=0, **chunks):
    """The bytes of a PNG that Pillow does not write: values [H, W] or [H, W, C] as they are, and extra chunks."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape[:2]
    flat = values.reshape(height, -1)
    packed = flat.astype(">u2").view(np.uint8) if bits == 16 else np.packbits(
        (flat[..., None] >> np.arange(bits - 1, -1, -1) & 1).astype(np.uint8).reshape(height, -1), axis=1
    )
    content = np.pad(packed, ((0, 0), (1, 0))).tobytes()        # each row begins with its filter, 0: none
    parts = {"IHDR": struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0), **chunks}
    parts |= {"IDAT": zlib.compress(content), "IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name.encode(), part) for name, part in parts.items())


def read_bytes(folder, *contents, suffix=".png"):
    """The images [N, 32, 32, 3] of files of these bytes, and the notes about them."""
    paths = [folder / f"{i}{suffix}" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    images, notes = image_files.read(paths, 32)
    return images.permute(0, 2, 3, 1).numpy(), notes


def rows(values, kind):
    return np.tile(np.asarray(values).astype(kind), (32, 1))


def test_images_of_32_pixels_are_kept_bit_for_bit_and_larger_ones_keep_their_proportions(tmp_path):
    random = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(read(tmp_path, random), random)
    wide = np.zeros((64, 256, 3), dtype=np.uint8)
    wide[:, 96:160] = 255                           # the central square is white, the sides are black
    assert (read(tmp_path, wide)[:, 2:-2] == 255).all()


@pytest.mark.parametrize("size", [16, 64, 128])
def test_images_come_in_the_size_asked_for(tmp_path, size):
    random = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(random).save(tmp_path / "a.png")
    assert np.array_equal(pixels.decode(tmp_path / "a.png", size).pixels, random)
    wide = np.zeros((100, 300, 3), dtype=np.uint8)
    wide[:, 100:200] = 255                          # the central square is white, the sides are black
    Image.fromarray(wide).save(tmp_path / "b.png")
    images, _ = image_files.read([tmp_path / "a.png", tmp_path / "b.png"], size)
    assert images.shape == (2, 3, size, size) and np.array_equal(images[0].permute(1, 2, 0), random)
    assert (images[1, :, :, 4:-4] > 250).all()


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
    found = read(tmp_path, rows(RAMP * white, kind), suffix)
    assert np.abs(found - rows(255 * RAMP, float)[..., None]).max() < 0.51
    assert not found[:, 0].any() and (found[:, -1] == 255).all()


@pytest.mark.parametrize("white, kind, bits, sample_format", [
    (2**32 - 1, "<u4", 32, 1), (2**31 - 1, "<i4", 32, 2), (2**15 - 1, "<i2", 16, 2), (2**12 - 1, "<u2", 12, 1),
    (2**7 - 1, "i1", 8, 2),
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
    found = read_file(tmp_path / "a.tif")
    assert np.abs(found - rows(255 / white * values[0].astype(float), float)[..., None]).max() < 0.51


def flat(value, *channels):
    return np.full((32, 32, *channels), value)


@pytest.mark.parametrize("colour_type, channels", [(0, ()), (2, (3,)), (4, (2,)), (6, (4,))])
@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_16_bits_that_hold_fewer_are_scaled_by_the_largest_value_of_all_files(tmp_path, bits, colour_type, channels):
    white = 2**bits - 1
    half, full = flat(white // 2 + 1, *channels), flat(white, *channels)
    if channels in ((2,), (4,)):
        half[..., -1] = white                       # opaque, as its alpha has no more bits
    images, notes = read_bytes(tmp_path, *(png(values, 16, colour_type) for values in (half, full)))
    assert (images[0] == 128).all() and (images[1] == 255).all()
    assert notes == [f"2 of 16 bits read with {white} as white, their largest value being {white}"]


def test_one_bright_image_tells_that_the_others_are_dark(tmp_path):
    images, notes = read_bytes(tmp_path, png(flat(1000)), png(flat(65535)), png(flat(1000, 3), 16, 2))
    assert [image.mean() for image in images] == [4, 255, 3] and notes == []        # 3: Pillow keeps the upper byte
    for i, value in enumerate((128, 255)):
        Image.fromarray(flat(value).astype(np.int32)).save(tmp_path / f"{i}.tif")
    images, notes = image_files.read([tmp_path / "0.tif", tmp_path / "1.tif"], 32)
    assert (images[0] == 128).all() and "2 of 32 bits read with 255 as white" in notes[0]


def test_a_png_names_its_bits(tmp_path):
    """Values that fill the 16 bits, as the standard wants, and such as were left as they are."""
    for content in (
        png(flat(512), sBIT=b"\x0a"), png(flat(32800), sBIT=b"\x0a"), png(flat(2056, 3), 16, 2, sBIT=b"\x0c" * 3),
        png(flat(32896, 3), 16, 2, sBIT=b"\x0c" * 3),
    ):
        assert (read_bytes(tmp_path, content)[0] == 128).all()
    # The others do not tell what white is: this one's chunk does.
    images, notes = read_bytes(tmp_path, png(flat(512), sBIT=b"\x0a"), png(flat(65535)))
    assert images[0].max() == 128 and notes == ["1 scaled by the bits that their PNG's sBIT chunk names"]


def test_a_tiff_of_16_bits_and_colour_keeps_its_low_bits(tmp_path):
    """Ten bits in 16, in the byte order of either kind of machine."""
    for order, kind in (b"II*\0", "<"), (b"MM\0*", ">"):
        tags = {256: 32, 257: 32, 258: 16, 259: 1, 262: 2, 273: 200, 277: 3, 278: 32, 279: 32 * 32 * 6}
        header = order + struct.pack(kind + "IH", 8, len(tags))
        for tag, value in tags.items():
            content = struct.pack(kind + "HH", value, 0) if tag != 258 else struct.pack(kind + "I", 190)
            header += struct.pack(kind + "HHI", tag, 3, 3 if tag == 258 else 1) + content
        header = header.ljust(190, b"\0") + struct.pack(kind + "HHH", 16, 16, 16)
        contents = [header.ljust(200, b"\0") + flat(v, 3).astype(kind + "u2").tobytes() for v in (514, 1023)]
        images, notes = read_bytes(tmp_path, *contents, suffix=".tif")
        assert (images[0] == 128).all() and (images[1] == 255).all() and "2 of 16 bits" in notes[0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_level_of_a_grey_png_counts_in_its_own_bits(tmp_path, bits):
    values = np.repeat([0, 1], 16)[:, None] * np.ones(32, int)
    images, _ = read_bytes(tmp_path, png(values, bits, tRNS=struct.pack(">H", 0)))
    assert (images[0, :16] == 255).all() and (images[0, 16:] == {1: 255, 2: 85, 4: 17, 8: 1, 16: 1}[bits]).all()
    images, _ = read_bytes(tmp_path, png(values, bits, tRNS=struct.pack(">H", 1)))
    assert (images[0, :16] == 0).all() and (images[0, 16:] == 255).all()


def test_the_transparent_colour_of_a_16_bit_png_has_16_bits(tmp_path):
    values = flat(0x9034, 3)
    values[:16] = 0x9056                            # the same upper byte
    images, _ = read_bytes(tmp_path, png(values, 16, 2, tRNS=struct.pack(">HHH", *[0x9034] * 3)))
    assert (images[0, :16] == 0x90).all() and (images[0, 16:] == 255).all()
    images, _ = read_bytes(tmp_path, png(values, 16, 2, tRNS=struct.pack(">HHH", *[0x90] * 3)))
    assert (images == 0x90).all()                   # the key is the upper byte only: no pixel has it


def test_an_alpha_channel_of_zeros_is_none_where_formats_leave_it_unused(tmp_path):
    bgra, mask = np.zeros((32, 32, 4), np.uint8), np.zeros((32, 32), np.uint8)
    bgra[..., 2], mask[:8] = 200, 1                 # red; the icon's mask hides the top
    header = struct.pack("<IiiHHIIiiII", 40, 32, 64, 1, 32, 0, 0, 0, 0, 0, 0)
    dib = header + bgra[::-1].tobytes() + np.packbits(mask[::-1], axis=1).tobytes()
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 32, 32, 0, 0, 1, 32, len(dib), 22) + dib
    images, _ = read_bytes(tmp_path, icon, suffix=".ico")
    assert (images[0, :8] == 255).all() and (images[0, 8:] == [200, 0, 0]).all()
    targa = bytes([0, 0, 2] + [0] * 9) + struct.pack("<HHBB", 32, 32, 32, 0) + bgra.tobytes()
    bitmap = b"BM" + struct.pack("<IHHI", 0, 0, 0, 122) + struct.pack("<IiiHHIIiiII", 108, 32, 32, 1, 32, 3, *[0] * 5)
    bitmap += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + bytes(52) + bgra.tobytes()
    for content, suffix in (targa, ".tga"), (bitmap, ".bmp"):
        assert (read_bytes(tmp_path, content, suffix=suffix)[0] == [200, 0, 0]).all()
    clear = Image.new("RGBA", (32, 32), (200, 0, 0, 0))         # a PNG's alpha is meant, also in an icon
    assert (read(tmp_path, clear) == 255).all() and (read(tmp_path, clear, ".ico", sizes=[(32, 32)]) == 255).all()


D65, PROPHOTO_WHITE = (0.3127, 0.3290), (0.3457, 0.3585)
SRGB, P3 = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)), ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE, PROPHOTO = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001))


def to_xyz(primaries, white):
    """Linear RGB -> XYZ at D50, [3, 3], with the chromatic adaptation of Bradford, as ICC profiles have it."""
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    x, y = np.array([*primaries, white]).T
    xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])        # of red, green, blue and white
    matrix = xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])
    gains = bradford @ [0.9642, 1, 0.8249] / (bradford @ xyz[:, 3])
    return np.linalg.inv(bradford) @ np.diag(gains) @ bradford @ matrix


def linear(v):
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def encoded(v):
    v = v.clip(0, 1)
    return 255 * np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055)


def profile(space=b"RGB ", matrix=None, gamma=None):
    """An ICC profile of version 2: primaries as of to_xyz, and a gamma, None for that of sRGB."""
    def xyz(values):
        return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))

    table = (linear(np.arange(1024) / 1023) * 65535).round().astype(">u2").tobytes()
    curve = struct.pack(">I", 1024) + table if gamma is None else struct.pack(">IHxx", 1, round(gamma * 256))
    curve = b"curv" + bytes(4) + curve
    tags = {b"wtpt": xyz([0.9642, 1, 0.8249]), b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x" + bytes(83)}
    tags |= {b"kTRC": curve} if matrix is None else {
        name: content for i, c in enumerate((b"r", b"g", b"b"))
        for name, content in ((c + b"XYZ", xyz(matrix[:, i])), (c + b"TRC", curve))
    }
    start, index, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        index += name + struct.pack(">II", start + len(body), len(content))
        body += content
    header = struct.pack(">I4xI4s4s4s12x4s", start + len(body), 0x02400000, b"mntr", space, b"XYZ ", b"acsp")
    return header.ljust(68, b"\0") + xyz([0.9642, 1, 0.8249])[8:].ljust(60, b"\0") + index + body


@pytest.mark.parametrize("primaries, white, gamma", [
    (P3, D65, None), (ADOBE, D65, 2.19921875), (PROPHOTO, PROPHOTO_WHITE, 1.8),
], ids=["Display P3", "Adobe RGB", "ProPhoto"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_colours_become_srgb(tmp_path, primaries, white, gamma, suffix):
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    matrix = to_xyz(primaries, white)
    light = linear(values / 255) if gamma is None else (values / 255) ** gamma
    wanted = encoded(light @ (np.linalg.inv(to_xyz(SRGB, D65)) @ matrix).T)
    Image.fromarray(values).save(tmp_path / f"a{suffix}", icc_profile=profile(matrix=matrix, gamma=gamma))
    images, notes = image_files.read([tmp_path / f"a{suffix}"], 32)
    assert np.abs(images[0].permute(1, 2, 0).numpy() - wanted).max() < 2
    assert notes == ["1 converted to sRGB by a colour profile"]


def test_greys_become_srgb_too(tmp_path):
    values = rows(RAMP * 255, np.uint8)
    for image in Image.fromarray(values), Image.fromarray(values.astype(np.uint16) * 257):
        found = read(tmp_path, image, icc_profile=profile(b"GRAY", gamma=1.8))
        assert np.abs(found - encoded((values / 255) ** 1.8)[..., None]).max() < 2


def test_a_profile_of_inks_is_asked(tmp_path, monkeypatch):
    inks = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    inks.save(tmp_path / "a.jpg", icc_profile=profile(matrix=to_xyz(P3, D65)))      # of light, not of inks
    assert pixels.decode(tmp_path / "a.jpg", 64).notes == ("with an unusable colour profile, ignored",)
    monkeypatch.setattr(pixels, "to_srgb", lambda profile: ("CMYK", "a transform"))
    black, asked = Image.new("RGB", (32, 32)), []
    monkeypatch.setattr(ImageCms, "applyTransform", lambda image, _: asked.append(image) or black)
    assert not read_file(tmp_path / "a.jpg").any() and asked[0].mode == "CMYK" and asked[0].size == (32, 32)


def test_images_of_srgb_or_a_broken_profile_keep_every_bit(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pillows = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ours, p3 = profile(matrix=to_xyz(SRGB, D65)), profile(matrix=to_xyz(P3, D65))
    unusable = ["1 with an unusable colour profile, ignored"]
    for name, icc, wanted in (
        ("pillow", pillows, []), ("ours", ours, []), ("cut", p3[:300], unusable), ("noise", b"x" * 500, unusable),
        ("grey", profile(b"GRAY", gamma=1.0), unusable),
    ):
        Image.fromarray(values).save(tmp_path / f"{name}.png", icc_profile=icc)
        images, notes = image_files.read([tmp_path / f"{name}.png"], 32)
        assert np.array_equal(images[0].permute(1, 2, 0).numpy(), values) and notes == wanted, name


@pytest.mark.parametrize("size", [(1600, 1200), (1003, 777)])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_large_jpeg_is_decoded_at_an_eighth_and_stays_a_good_resize(tmp_path, monkeypatch, size, orientation, kind):
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    waves = [np.sin(40 * x + 9 * y * y), np.cos(31 * y + x), np.sin(60 * x * y)]
    values = (127 + 100 * np.stack(waves, -1) + np.random.default_rng(0).normal(0, 12, (*x.shape, 3))).clip(0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(save_all=True, append_images=[Image.new("RGB", size)]) if kind == "MPO" else {}
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "a.jpg", kind, quality=90, exif=exif, **options)
    boxes, resized = [], pixels.resized
    monkeypatch.setattr(pixels, "resized", lambda image, size, box=None: boxes.append(box) or resized(image, size, box))
    drafted = read_file(tmp_path / "a.jpg")
    assert boxes[0] == (0, 0, size[0] / 8, size[1] / 8)
    monkeypatch.setattr(pixels, "DRAFT_FROM", 10_000)
    difference = np.abs(drafted.astype(int) - read_file(tmp_path / "a.jpg"))
    assert len(boxes) == 3 and difference.max() <= 8 and difference.mean() < 0.75


def test_only_a_jpeg_of_24_times_the_size_is_decoded_at_an_eighth(tmp_path, monkeypatch):
    Image.new("RGB", (800, 384)).save(tmp_path / "a.jpg")
    boxes, resized = [], pixels.resized
    monkeypatch.setattr(pixels, "resized", lambda image, size, box=None: boxes.append(box) or resized(image, size, box))
    for size, wanted in (16, [(0, 0, 100, 48), None]), (24, [None]):
        boxes.clear()
        assert pixels.decode(tmp_path / "a.jpg", size).pixels.shape == (size, size, 3) and boxes == wanted


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
    for values in rgba, la:
        for suffix in (".png", ".tif"):
            assert (read(tmp_path, values, suffix) == wanted[..., None]).all()
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
    grey = np.full((32, 32, 3), 200, np.uint8)
    words = PngImagePlugin.PngInfo()
    words.add_text("parameters", "word " * 600_000, zip=True)
    more = dict(pnginfo=words, icc_profile=bytes(3_000_000)) if suffix == ".png" else {}
    if suffix != ".tif":                            # there it is the file itself
        more["exif"] = b"Exif\0\0garbage"
    assert (read(tmp_path, grey, suffix, **more) == grey).all()


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
