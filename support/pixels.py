"""One image file, of any of Pillow's formats, as a square of sRGB pixels.

    found = decode("photo.jpg", size=64)     # found.pixels: uint8 [64, 64, 3]
"""

import io
import re
import sys
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

Image.init()                                        # registers all of Pillow's formats, not only common ones
# Not all formats that Pillow knows: some it only writes, some need another program, and an EPS file is a program.
FORMATS = {*Image.OPEN, "MPO"} - {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Else Pillow refuses a PNG with a text chunk or colour profile above 1 MiB. All text of a PNG stays below 64 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def chunk_sbit(stream, position, length):
    """Pillow's PNG reader calls it for the chunk that says how many bits of a value were measured: info["sbit"]."""
    content = stream.fp.read(length)                # one byte per channel, alpha last
    stream.im_info["sbit"] = max(content[:1] if length < 3 else content[:3], default=0)
    return content


PngImagePlugin.PngStream.chunk_sBIT = chunk_sbit
# A JPEG whose sides are at least so many times the size asked for is decoded at an eighth: each pixel the mean of 8x8.
DRAFT_FROM = 8 * 3
# EXIF orientation: the operation that turns the image upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The factor between a PNG's grey levels of few bits and Pillow's.
GREY_STEPS = {"1": 255, "L;2": 85, "L;4": 17}
# Formats in which a file without transparency may still have an alpha channel, of zeros.
UNUSED_ALPHA = {"BMP", "DIB", "ICO", "TGA"}
# What a file may use of 16 or 32 bits per value.
DEPTHS = (8, 10, 12, 14, 16, 24)


class Decoded(NamedTuple):
    pixels: np.ndarray                              # uint8 [size, size, 3]
    notes: tuple = ()                               # what was done to it, to complete "3 images ..."
    unknown: tuple | None = None                    # (bits per value, largest value) if the file does not name white


def decode(path, size, depths=None):
    """Read an image: the shorter side is resized to so many pixels and the centre is cut out.

    Of several frames the first is read. Transparent images are put on white; colours are converted to sRGB by the
    file's colour profile.

    Args:
        depths: bits per value -> bits that are used of them, for files that do not say so; by default all.

    Raises:
        Exception: of any type, as Pillow's readers have; the file is not an image, is damaged, or has a range of values
            whose white is unknown.
    """
    with Image.open(path) as file:
        draft, fit = None, fit_notes(file.size, size)
        if min(file.size) >= DRAFT_FROM * size:
            draft = file.draft(None, [side // 8 for side in file.size])             # None unless it is a JPEG
        tiles = list(file.tile)
        file.load()
        mode, transform, notes = profile_of(file)
        image, more, unknown = eight_bits(file, path, tiles, depths or {})
        image = opaque(image)
        if not (transform and mode == "CMYK"):
            image = image.convert("RGB")
        if draft:                                   # the last row and column may be less than a pixel
            image = resized(image, size, box=draft[1])
        image = centre(resized(upright(image, file), size), size)
        if transform:                               # of these pixels only, as millions would take long
            image = ImageCms.applyTransform(image.convert(mode), transform)
        return Decoded(np.asarray(image), notes + more + fit, unknown)


def fit_notes(sides, size):
    """The notes on an image of these sides, in pixels, that becomes one of size x size."""
    resized = (f"resized to {size}x{size}",) if sides != (size, size) else ()
    return resized + (("enlarged",) if min(sides) < size else ())


def resized(image, size, box=None):
    """The image, or a box of it (left, top, right, bottom), with a shorter side of `size` pixels."""
    width, height = box[2:] if box else image.size
    scale = size / min(width, height)
    sides = tuple(max(size, round(side * scale)) for side in (width, height))
    return image if image.size == sides else image.resize(sides, Image.Resampling.BICUBIC, box, reducing_gap=3.0)


def centre(image, size):
    """The square of `size` pixels in the middle of an image."""
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def upright(image, file):
    """The image rotated as its file's EXIF says, or as it is stored if the EXIF is damaged."""
    try:
        orientation = file.getexif().get(ExifTags.Base.Orientation)
    except Exception:                               # its type depends on the damage
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def opaque(image):
    """The image on white where it is transparent."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def profile_of(file):
    """The mode and the transform to sRGB that a file's colour profile has, None without a usable one; and notes."""
    profile = file.info.get("icc_profile")
    if not profile:
        return None, None, ()
    try:
        mode, transform = to_srgb(profile)
        if (mode == "CMYK") != (file.mode == "CMYK") or (mode == "L" and file.mode[0] not in "1LIF"):
            raise ValueError("a profile of another kind of image")
    except Exception:                               # lcms and Pillow have several types
        return None, None, ("with an unusable colour profile, ignored",)
    return mode, transform, ("converted to sRGB by a colour profile",) if transform else ()


@lru_cache(64)
def to_srgb(profile):
    """A colour profile's mode ("RGB", "L" or "CMYK") and its transform to sRGB, None if it is sRGB itself.

    Raises:
        Exception: it cannot be used.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return mode, transform
    # sRGB has many profiles; what they share is that no colour changes by more than rounding.
    levels, channels = (np.arange(256), 1) if mode == "L" else (np.linspace(0, 255, 18).round(), 3)
    colours = np.stack(np.meshgrid(*[levels] * channels), -1).astype(np.uint8).reshape(1, -1, channels)
    image = Image.fromarray(colours.squeeze(-1) if mode == "L" else colours)
    change = np.abs(np.asarray(ImageCms.applyTransform(image, transform)).astype(int) - colours)
    return mode, transform if change.max() > 2 else None


def eight_bits(file, path, tiles, depths):
    """A loaded file with 8 bits per value; further notes; and what is unknown, as in Decoded."""
    rawmode = tiles[0][3] if tiles else ""
    rawmode = rawmode if isinstance(rawmode, str) else str(rawmode and rawmode[0])
    if file.format == "PNG" and rawmode in GREY_STEPS and "transparency" in file.info:
        file.info["transparency"] = min(255, file.info["transparency"] * GREY_STEPS[rawmode])
    signed = getattr(file, "tag_v2", {}).get(SAMPLEFORMAT) == (2,)
    if file.mode.startswith(("I", "F")) or (file.mode == "L" and signed):
        return grey(file, depths, signed)
    if file.format in ("PNG", "TIFF") and file.mode in ("RGB", "RGBA") and ";16" in rawmode and "a" not in rawmode:
        return colour(file, path, rawmode, depths)
    if file.format in UNUSED_ALPHA and file.mode == "RGBA" and not file.getchannel("A").getextrema()[1]:
        return without_alpha(file), (), None
    return file, (), None


def grey(file, depths, signed):
    """A grey image of more than 8 bits, or of signed ones, scaled to 8 bits; Pillow itself would clip it.

    Raises:
        ValueError: there are values below zero or above white.
    """
    tags = getattr(file, "tag_v2", {})              # of a TIFF; in other files Pillow scales integers to 16 bits
    bits = tags.get(BITSPERSAMPLE, (16,))[0] - signed
    values = np.asarray(file)
    if file.mode == "L":
        values = values.view(np.int8)
    elif file.mode == "I" and not signed:
        values = values.view(np.uint32)
    low, high = values.min(), values.max()
    white, notes, unknown = (1, (), None) if file.mode == "F" else white_of(file, bits, int(high), depths)
    if not 0 <= low <= high <= white:               # also true for NaN
        raise ValueError(f"its values are from {low} to {high}, not within 0 to {white}")
    levels = values.astype(np.float32) * (255 / white)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:   # zero is white
        levels = 255 - levels
    if "transparency" in file.info:                 # in a PNG: the value that means transparent
        levels[values == file.info["transparency"]] = 255
    return Image.fromarray(levels.round().astype(np.uint8)), notes, unknown


def colour(file, path, rawmode, depths):
    """A colour image of 16 bits scaled to 8 bits. Pillow itself keeps the upper 8 bits, which may be empty."""
    upper = np.asarray(file)                        # [H, W, 3 or 4]
    key = file.info.get("transparency")             # the colour that means transparent
    if key is None and "sbit" not in file.info and upper[..., :3].max() >= 2**6:    # more bits than any of DEPTHS
        return file, (), (16, 2**16 - 1)
    values = upper * np.uint16(256) + lower_bytes(path, rawmode)
    white, notes, unknown = white_of(file, 16, int(values[..., :3].max()), depths)
    if white < 2**16 - 1:
        alpha = values[..., 3:]
        full = white if not alpha.size or alpha.max() <= white else 2**16 - 1
        scales = [255 / white] * 3 + [255 / full] * alpha.shape[-1]
        upper = np.minimum(values * np.float32(scales), 255).round().astype(np.uint8)
    if key is not None:
        upper = np.dstack([upper, np.where((values == key).all(-1), 0, 255).astype(np.uint8)])
    return Image.fromarray(upper), notes, unknown


def lower_bytes(path, rawmode):
    """The lower 8 bits of a 16-bit colour image, [H, W, 3 or 4]: Pillow reads them as the upper of the other order."""
    with Image.open(path) as file:
        if rawmode.startswith("LA"):                # two values of two bytes, read as four of one
            file.tile = [tile._replace(args="RGBA") for tile in file.tile]
            return np.asarray(file)[..., [1, 1, 1, 3]]
        big = rawmode[-1] == "B" or (rawmode[-1] == "N" and sys.byteorder == "big")
        for i, tile in enumerate(file.tile):
            first, *rest = [tile.args] if isinstance(tile.args, str) else tile.args
            first = re.sub(";16.", ";16L" if big else ";16B", first)
            file.tile[i] = tile._replace(args=(first, *rest) if rest else first)
        return np.asarray(file)


def white_of(file, bits, high, depths):
    """The value of white among integers of so many bits; notes; and what is unknown, as in Decoded."""
    if significant := file.info.get("sbit"):
        # By the standard the values are already scaled to 16 bits; many writers leave them as they were measured.
        if significant < bits and high < 2**significant:
            return 2**significant - 1, ("scaled by the bits that their PNG's sBIT chunk names",), None
    elif file.format in ("PNG", "TIFF") and bits >= 15:
        return 2 ** depths.get(bits, bits) - 1, (), (bits, high)
    return 2**bits - 1, (), None


def without_alpha(file):
    """An image without its alpha channel of zeros. An icon may have a mask of one bit; if it is a PNG, zeros count."""
    if file.format != "ICO":
        return file.convert("RGB")
    file.ico.entry[0] = file.ico.entry[0]._replace(bpp=24)      # Pillow reads the mask where there is no alpha channel
    return file.ico.frame(0)
