"""What was read of a folder of images, kept on disk while its files stay as they are.

    images, notes = read(paths, "photos", "~/.cache/dmd2", size=64)
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import PIL
import torch

from support import files, image_files, pixels, processes

WORTH_KEEPING = 1.0                                 # seconds that it took to read the files
SETTLED = 2.0                                       # seconds: the coarsest clock of file systems, that of FAT


def read(paths, root, cache_dir, size):
    """image_files.read(paths, size) of files below root, from cache_dir if that has them as they are now.

    There is one file per root and size; it is written only if reading took more than a second. A file that cannot be
    read, or has other contents, is made anew. Of several processes only the main one writes.

    Raises:
        DataError: as image_files.read.
    """
    try:
        root = os.path.realpath(root)
        cache = Path(cache_dir).expanduser() / f"images{size}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:32]}.npz"
    except RuntimeError as error:                   # this user has no home
        return not_kept(cache_dir, error) or image_files.read(paths, size)
    key, changed = state_of(paths)
    try:
        with np.load(cache, allow_pickle=False) as kept:
            if kept["key"] == key:
                notes = [f"read from the cache in {cache_dir}", *json.loads(str(kept["notes"]))]
                return torch.from_numpy(kept["images"]), notes
    except Exception:                               # not there yet, or damaged
        pass
    began, clock = time.perf_counter(), time.time()
    images, notes = image_files.read(paths, size)
    # The key is of before the reading, so later changes show, except within the same tick of the file system's clock.
    if time.perf_counter() - began > WORTH_KEEPING and changed < clock - SETTLED:
        arrays = dict(key=key, notes=json.dumps(notes), images=images.numpy())
        try:
            files.write(cache, lambda file: np.savez(file, **arrays))
        except OSError as error:                    # the images matter more than their cached copy
            not_kept(cache_dir, error.strerror)
    return images, notes


@processes.main_only
def not_kept(cache_dir, reason):
    print(f"note: cannot keep the images in --cache_dir {cache_dir}: {reason}", file=sys.stderr)


def state_of(paths):
    """A digest of all that the images are made of, as far as it shows without reading them; and the latest change.

    It covers the code that reads them, and of each file the path, size, inode and times of its contents and its inode:
    a file of equal size put in the place of another has another inode, or its inode has changed later.
    """
    digest, latest = hashlib.sha256(f"Pillow {PIL.__version__}".encode()), 0.0
    for code in pixels, image_files:
        digest.update(Path(code.__file__).read_bytes())
    for path in paths:
        try:
            found = os.stat(path)
        except OSError:                             # reading it will say what is wrong
            continue
        times = found.st_mtime_ns, found.st_ctime_ns
        digest.update(os.fsencode(path) + f"\0{found.st_size} {found.st_ino} {times}\0".encode())
        latest = max(latest, found.st_mtime)
    return digest.hexdigest(), latest
