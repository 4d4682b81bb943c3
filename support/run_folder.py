"""The folder of a run: its logs and grids, and a lock, as only one process at a time may write it."""

import contextlib
import json
import os
import platform
import sys
import threading
import time
from pathlib import Path

import filelock
from torch.utils.tensorboard import SummaryWriter

from support import checkpoint, files, processes
from support.errors import UsageError
from support.pictures import class_grid, image, side_by_side

LOCKS = {}                                          # path -> file, of the locks that this process has taken


class RunInUseError(UsageError):
    """Another process writes to the run folder; the message names that process."""


class RunFolder:
    """Logs of one run: TensorBoard, log.jsonl (one line per reading) and grids/*.png. Only the main process writes.

    Args:
        known: checkpoint.stamp() of the folder when its checkpoint was read.

    Raises:
        RunInUseError: another process writes to this folder, or has written since.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, path, known):
        self.path = Path(path)
        if not processes.MAIN:
            return
        Path(os.path.realpath(path), "grids").mkdir(parents=True, exist_ok=True)   # also where a link points to nothing
        place = (self.path / "lock").resolve()
        if place in LOCKS:                          # of a run that failed in this process, in a notebook for instance
            LOCKS[place].close()
        self.lock = LOCKS[place] = open(place, "ab")            # noqa: SIM115  stays open; the system releases it
        writer = self.path / "lock.txt"             # beside it, as Windows lets nobody read a locked file
        try:
            locked = filelock.lock_descriptor(self.lock.fileno(), blocking=False)
        except OSError as error:
            print(f"note: no locks where {path} is ({error.strerror}): start no second run in it", file=sys.stderr)
        else:
            if not locked:
                name = writer.read_text(encoding="utf-8").strip() if writer.exists() else "another process"
                raise RunInUseError(f"{path} is being written by {name}")
        if checkpoint.stamp(path) != known:                    # a run has ended here while this one started
            raise RunInUseError(f"another process has saved to {path} just now: start again")
        checkpoint.restore_previous(path)
        name = f"process {os.getpid()} on {platform.node()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        files.write(writer, lambda file: file.write(name.encode()))
        for name in (*checkpoint.NAMES, checkpoint.LOG, writer.name):       # leftovers of a killed save
            for file in self.path.glob(f"{name}.*tmp"):
                file.unlink()

    @processes.main_only
    def begin(self, start_step):
        """Open the logs, once there is a checkpoint.

        Args:
            start_step: step of the checkpoint; later log lines are dropped. At 0 the run is new, so all that a former
                run has left in the folder is deleted.
        """
        self.start_step, self.log_path = start_step, self.path / checkpoint.LOG
        former = [*checkpoint.NAMES[1:], checkpoint.LOG, "grids/*.png", "tensorboard/events.out.tfevents.*"]
        for file in (file for pattern in former for file in self.path.glob(pattern) if start_step == 0):
            file.unlink()
        # A killed run may have logged steps after its last save, which are about to be taken again: drop these lines.
        lines = []
        if self.log_path.exists():
            text = self.log_path.read_text(encoding="utf-8")
            lines = [line for line in text.splitlines() if json_step(line) <= start_step]
            files.write(self.log_path, lambda file: file.write("".join(line + "\n" for line in lines).encode()))
        # A measurement after its last save will be repeated: log it once.
        self.logged = [set(json.loads(line)) for line in lines if json_step(line) == start_step]
        # TensorBoard's writer thread prints its failure and raises it again in the main thread: print it once.
        threading.excepthook = lambda e: issubclass(e.exc_type, OSError) or threading.__excepthook__(e)
        # TensorBoard reads its files in the order of their names, which begin with the second of their creation. In the
        # same second, or after the clock was set back, the new file might not be the last, which would hide steps: then
        # give those before it the seconds 0, 1, 2, ...
        boards = sorted(self.path.glob("tensorboard/events.out.tfevents.*"))
        if boards and boards[-1].name.split(".")[3] >= f"{int(time.time()):010d}":
            for i, file in enumerate(boards):
                file.rename(file.with_name(".".join(["events.out.tfevents", f"{i:010d}", *file.name.split(".")[4:]])))
        self.board = SummaryWriter(self.path / "tensorboard", purge_step=start_step + 1)

    @contextlib.contextmanager
    def writing(self):
        """Context that adds the folder's name to a failed write."""
        try:
            yield
        except OSError as error:
            raise OSError(f"cannot write to {self.path}: {error.strerror}; the last checkpoint stands") from error

    @processes.main_only
    def scalars(self, step, values):
        if step == self.start_step and {"step", *values} in self.logged:
            return
        with self.writing():
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()                      # before this step's checkpoint, or a kill would leave a gap
            with open(self.log_path, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(dict(step=step, **values)) + "\n")

    @processes.main_only
    def grid(self, step, name, rows, *panels):
        """Write class_grid pictures, side by side, as grids/<step>_<name>.png and to TensorBoard."""
        picture = side_by_side(*(class_grid(images, rows) for images in panels))
        with self.writing():
            image(picture).save(self.path / "grids" / f"{step:07d}_{name}.png")
            self.board.add_image(name, picture, step)

    @processes.main_only
    def close(self):
        with self.writing():
            self.board.close()
        self.lock.close()


def json_step(line):
    """The step of a log line; infinity for a line that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
