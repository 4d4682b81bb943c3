"""Find the image files in a folder, and read them, of any format, as RGB images of one size.

    images, others = find("photos")          # paths: what Pillow reads, and the rest
    pixels, notes = read(images, size=64)    # uint8 [N, 3, 64, 64]; what was done to them
"""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support import pixels, processes
from support.errors import UsageError

# Folders of thumbnails, of deleted files and the like, which systems and programs put between images; in lower case.
SYSTEM_FOLDERS = {
    "@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "__macosx",
    "__pycache__", "lost+found", "system volume information",
}
PORTION = 64                                        # images that a thread reads at a time, at most


class DataError(UsageError):
    """Images cannot be read; the message is one line that names the file or folder."""


def is_image(path):
    return Image.registered_extensions().get(path.suffix.lower()) in pixels.FORMATS


def skipped(name):
    """Whether a file or folder of this name is hidden, or a system's."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def find(folder, seen=None):
    """The files below a folder, at any depth and through links.

    Args:
        seen: real paths of folders to skip; those entered are added, so that none is read twice.

    Returns:
        the images, recognised by suffix, and what is left out, the other files, the hidden ones and the folders that
        skipped() names: two sorted lists of paths.

    Raises:
        DataError: a folder cannot be read.
    """
    def refuse(error):
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}") from error

    seen, files, others = set() if seen is None else seen, [], []
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        others += [Path(place, name) for name in [*folders, *names] if skipped(name)]
        folders[:] = sorted(name for name in folders if not skipped(name))
        for file in (Path(place, name) for name in names if not skipped(name)):
            (files if is_image(file) else others).append(file)
    return tuple(sorted(some, key=lambda path: path.parts) for some in (files, others))


def few(names, most=10):
    """The first of the names, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def number(n, thing, things=None):
    """ "1 file" or "3 files"."""
    return f"{n} {thing if n == 1 else things or thing + 's'}"


def left_out(paths):
    """A message about what was not read: "30 files left out (.heic, notes), 1 folder left out (@eaDir)"."""
    folders = [path for path in paths if path.is_dir()]
    files = sorted({*paths} - {*folders})
    kinds = {"hidden" if path.name.startswith(".") else path.suffix.lower() or path.name for path in files}
    words = [f"{number(len(files), 'file')} left out ({few(sorted(kinds))})"] if files else []
    if folders:
        words.append(f"{number(len(folders), 'folder')} left out ({few(sorted({path.name for path in folders}))})")
    return ", ".join(words)


def read(paths, size):
    """The images, uint8 [N, 3, size, size] RGB, and a list of what was done to them: ["3 resized to 32x32", ...].

    The order is that of the paths. Threads decode on all cores, as decoders release the interpreter lock. They make
    photographs faster, not PNGs of 32x32; on two cores, processes gained less there than they took to start.

    Integers of 16 or 32 bits often use fewer. Where the files do not name the value of white, it is the largest number
    of 8, 10, 12, 14, 16 or 24 bits, or of all, that is enough for the largest value in any of these files.

    Raises:
        DataError: some cannot be read; it names the first few, and says how many.
    """
    images = np.empty((len(paths), 3, size, size), np.uint8)
    depths, failed, notes = {}, {}, [()] * len(paths)

    def attempt(rows):
        unknown = []
        for i in rows:
            try:
                found = pixels.decode(paths[i], size, depths)
            except Exception as error:              # each of Pillow's readers has its own ways to fail
                failed[i] = f"cannot read image {paths[i]}: {str(error) or type(error).__name__}"
            else:
                images[i], notes[i] = found.pixels.transpose(2, 0, 1), found.notes
                if found.unknown:
                    unknown.append((i, *found.unknown))
        return unknown

    def attempt_all(rows):
        unknown = parallel(attempt, rows)
        if failed:
            count = f"{len(failed)} of {len(paths)} images cannot be read: " if len(failed) > 1 else ""
            raise DataError(count + few([failed[i] for i in sorted(failed)], 3))
        return unknown

    unknown, scaled = attempt_all(range(len(paths))), []
    for bits in sorted({bits for _, bits, _ in unknown}):
        rows = [i for i, kind, _ in unknown if kind == bits]
        largest = max(high for _, kind, high in unknown if kind == bits)
        depths[bits] = next((depth for depth in pixels.DEPTHS if largest < 2**depth and depth < bits), bits)
        if depths[bits] < bits:
            attempt_all(rows)
            white = f"{2 ** depths[bits] - 1} as white, their largest value being {largest}"
            scaled.append(f"{len(rows)} of {bits + bits % 2} bits read with {white}")           # the sign is a bit, too
    counts = Counter(note for some in notes for note in some)
    return torch.from_numpy(images), [f"{n} {note}" for note, n in sorted(counts.items())] + scaled


def parallel(function, items):
    """function(some of the items), a list, for all items on all cores: the lists joined, in the order of the items.

    Shows a progress bar after a second.
    """
    size = max(1, min(PORTION, len(items) // 64))
    portions = [items[start : start + size] for start in range(0, len(items), size)]
    results, pool = [], ThreadPoolExecutor()
    bar = tqdm(total=len(items), desc="reading images", unit="image", delay=1, leave=False, disable=not processes.MAIN)
    try:
        for portion, result in zip(portions, pool.map(function, portions), strict=True):
            results += result
            bar.update(len(portion))
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)          # Ctrl-C does not wait for the rest
    return results
