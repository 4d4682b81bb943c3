"""Files that are never half-written."""

import errno
import hashlib
import os
import re
import time
from pathlib import Path

from support.launch import main_only

# Windows does not replace a file while another program has it open: try again after so many seconds.
PAUSES = 0.1, 0.2, 0.4, 0.8
# What a file name on Windows cannot hold, and what it cannot be up to its first dot.
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
RESERVED = re.compile(r"^(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(?= *(\.|$))", re.IGNORECASE)


@main_only
def write(path, writer):
    """Call writer(file) on a temporary file and rename it to path: a kill leaves the old file or the new one, whole.

    Makes path's folder where there is none; where path is a link, what it points to is written. Of several processes
    only the main one writes.

    Raises:
        OSError: it could not be written (a full disk, say); the old file stands.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")                    # two processes may write one cache
    try:
        with open(temporary, "wb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())                 # the data must be on disk before the name is
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace(source, path):
    """os.replace that waits, for a second or two, for a reader of path to close it."""
    for pause in (*PAUSES, None):
        try:
            return os.replace(source, path)
        except PermissionError as error:
            if pause is None:
                reason = f"{error.strerror} (does another program have it open?)"
                raise PermissionError(error.errno, reason, str(path)) from error
            time.sleep(pause)


def portable(name):
    """The file name that every system can have: a_b.png for a:b.png, con_.x.png for con.x.png."""
    return RESERVED.sub(r"\1_", FORBIDDEN.sub("_", name))


def sync_folder(path):
    """Flush a folder's names to disk where that can be done: not on Windows, nor on some network file systems."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:                         # Windows opens no folders
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)


def sha256(path):
    """SHA-256, hex, of a file that may be larger than memory."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest()
