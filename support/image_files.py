"""Find the image files in a folder, and read them, of any format, as 32x32 RGB images.

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

Image.init()                                        # registers all of Pillow's formats, not only common ones
# Not all formats that Pillow knows: some it only writes, some need another program, and an EPS file is a program.
FORMATS = {*Image.OPEN, "MPO"} - {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Else Pillow refuses a PNG with a text chunk or colour profile above 1 MiB. All text of a PNG stays below 64 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# EXIF orientation: the operation that turns the image upright.
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
    """The files below a folder, at any depth and through links; names that begin with a dot are skipped.

    Args:
        seen: real paths of folders to skip; those entered are added, so that none is read twice.

    Returns:
        the images, recognised by suffix, and the other files: two sorted lists of paths.

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
    files.sort(key=lambda file: file.parts)         # Windows would put Cat and cat together
    return [file for file in files if is_image(file)], [file for file in files if not is_image(file)]


def few(names, most=10):
    """The first of the names, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def left_out(files):
    """A message about the files that were not read: "30 files left out (.heic, notes)"."""
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

    Of several frames the first is read. Transparent images are put on a white background.
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
    """An image of any of Pillow's modes as RGB, on white where it is transparent."""
    if image.mode.startswith(("I", "F")):
        image = grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def grey(image):
    """Scale a grey image of more than 8 bits to 8 bits; Pillow itself would clip it.

    White is the largest value of the integer type, or 1.0 for floats. 32-bit images whose values fit in 16 bits, as
    saved arrays often do, count as 16-bit.

    Raises:
        ValueError: there are values outside that range.
    """
    tags = getattr(image, "tag_v2", {})             # of a TIFF; in other files Pillow scales integers to 16 bits
    bits, signed = tags.get(BITSPERSAMPLE, (16,))[0], tags.get(SAMPLEFORMAT) == (2,)
    values = np.asarray(image)
    if image.mode == "I" and not signed:
        values = values.view(np.uint32)
    low, high = values.min(), values.max()
    white = 1 if image.mode == "F" else 2 ** (16 if bits == 32 and high < 2**16 else bits - signed) - 1
    if not 0 <= low <= high <= white:               # also true for NaN
        raise ValueError(f"its values are from {low} to {high}, not within 0 to {white}")
    levels = values.astype(np.float32) * (255 / white)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:   # zero is white
        levels = 255 - levels
    if "transparency" in image.info:                # in a PNG: the value that means transparent
        levels[values == image.info["transparency"]] = 255
    return Image.fromarray(levels.round().astype(np.uint8))


def upright(image, file):
    """The image rotated as its file's EXIF says, or as it is stored if the EXIF is damaged."""
    try:
        orientation = file.getexif().get(ExifTags.Base.Orientation)
    except Exception:                               # its type depends on the damage
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image
