"""Files that are never half-written."""

import errno
import os
from pathlib import Path

from support import processes


@processes.main_only
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
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path):
    """Flush a folder's names to disk where its file system can; some network file systems cannot."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)
