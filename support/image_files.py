"""Image files of any kind as small RGB images, and which ones a folder holds.

    images, others = find("photos")          # paths: what Pillow reads, and the rest
    pixels = read(images)                    # uint8 [N, 3, 32, 32]
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from model import IMAGE_SIZE
from support.errors import UsageError

Image.init()                                        # registers all of its formats, not only the most common
# Pillow has names for more than it decodes: some files it only writes, some need another program, EPS is a program.
FORMATS = {*Image.OPEN, "MPO"} - {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Above 1 MiB of text or colour profile it would refuse the image; all text of one stays within 64.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# EXIF's orientations, and what sets each upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DataError(UsageError):
    """Images cannot be read; the message is one line that names the file or folder."""


def is_image(path):
    return Image.registered_extensions().get(path.suffix.lower()) in FORMATS


def find(folder, seen=None):
    """The files below a folder, however deep, through links too. Names that begin with a dot are none.

    Args:
        seen: real folders not to enter, to which this adds those it enters: none is read twice.

    Returns:
        the images, known by suffix, and the other files: two sorted lists of paths.

    Raises:
        DataError: a folder cannot be read.
    """
    def refuse(error):
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}") from error

    seen, files = set() if seen is None else seen, []
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in names if not name.startswith(".")]
    files.sort()
    return [file for file in files if is_image(file)], [file for file in files if not is_image(file)]


def few(names, most=10):
    """The first of them, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def left_out(files):
    """What to say of files that were not taken: "30 files left out (.heic, notes)"."""
    kinds = sorted({file.suffix.lower() or file.name for file in files})
    return f"{len(files)} {'file' if len(files) == 1 else 'files'} left out ({few(kinds)})"


def read(paths):
    """The images as uint8 [N, 3, 32, 32] RGB.

    Raises:
        DataError: some cannot be read; it names the first few, and says how many.
    """
    def attempt(path):
        try:
            return read_one(path)
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:              # decoding releases the interpreter lock
        images = list(pool.map(attempt, paths))
    failed = [str(image) for image in images if isinstance(image, DataError)]
    if failed:
        count = f"{len(failed)} of {len(paths)} images cannot be read: " if len(failed) > 1 else ""
        raise DataError(count + few(failed, 3))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def read_one(path):
    """One image as uint8 [32, 32, 3] RGB: the shorter side is resized to 32 and the centre is cut out.

    Of several frames it is the first. Transparent ones lie on white.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = upright(rgb(file), file)
            if image.size != (IMAGE_SIZE, IMAGE_SIZE):
                scale = IMAGE_SIZE / min(image.size)
                size = [max(IMAGE_SIZE, round(side * scale)) for side in image.size]
                left, top = (size[0] - IMAGE_SIZE) // 2, (size[1] - IMAGE_SIZE) // 2
                image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
                image = image.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
            return np.asarray(image)
    except Exception as error:                      # each of Pillow's readers has its own ways to fail
        raise DataError(f"cannot read image {path}: {error}") from error


def rgb(image):
    """An image of any of Pillow's modes as RGB, upon white where it is transparent."""
    if image.mode.startswith(("I", "F")):
        image = grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def grey(image):
    """A grey image of more than 8 bits in 8, where Pillow would clip it.

    White is the largest value of the type, or 1.0; of 32 bits that only use 16, as in an array that was saved, those.

    Raises:
        ValueError: there are values outside that range.
    """
    tags = getattr(image, "tag_v2", {})             # of a TIFF; of other files Pillow scales integers to 16 bits
    bits, signed = tags.get(BITSPERSAMPLE, (16,))[0], tags.get(SAMPLEFORMAT) == (2,)
    values = np.asarray(image)
    if image.mode == "I" and not signed:
        values = values.view(np.uint32)
    low, high = values.min(), values.max()
    white = 1 if image.mode == "F" else 2 ** (16 if bits == 32 and high < 2**16 else bits - signed) - 1
    if not 0 <= low <= high <= white:               # nor is NaN
        raise ValueError(f"its values are from {low} to {high}, not within 0 to {white}")
    levels = values.astype(np.float32) * (255 / white)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:   # zero is white
        levels = 255 - levels
    if "transparency" in image.info:                # the value in a PNG that stands for no colour
        levels[values == image.info["transparency"]] = 255
    return Image.fromarray(levels.round().astype(np.uint8))


def upright(image, file):
    """The image turned as its file's EXIF says, or as it is stored where that is damaged."""
    try:
        orientation = file.getexif().get(ExifTags.Base.Orientation)
    except Exception:                               # each kind of damage has its own
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image
