"""The folder of a run: one process at a time writes it; its logs and grids."""

import contextlib
import fcntl
import json
import os
import platform
import threading
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image

from support import checkpoint, processes
from support.errors import UsageError
from support.pictures import class_grid, side_by_side


class RunInUseError(UsageError):
    """Another process writes to the run folder; the message names both."""


class RunFolder:
    """Logs of one run: TensorBoard, log.jsonl (one line per reading) and grids/*.png; of several processes one writes.

    Args:
        known: checkpoint.stamp() of the folder at the time when it was decided how to go on from it.

    Raises:
        RunInUseError: another process is at work on this folder, or was since.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, path, known):
        self.path = Path(path)
        if not processes.MAIN:
            return
        (self.path / "grids").mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / "lock", "a+")  # noqa: SIM115  held, and given back by the kernel if we are killed
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.lock.seek(0)
            raise RunInUseError(f"{path} is being written by {self.lock.read().strip()}") from error
        if checkpoint.stamp(path) != known:                    # by a run that has ended while this one started
            raise RunInUseError(f"another process has saved to {path} just now: start again")
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {platform.node()}, started {time.strftime('%F %T')}\n")
        self.lock.flush()
        for name in (*checkpoint.NAMES, checkpoint.LOG):       # of a save that was killed
            (self.path / f"{name}.tmp").unlink(missing_ok=True)

    @processes.main_only
    def begin(self, start_step):
        """Open the logs, once there is a checkpoint.

        Args:
            start_step: of the checkpoint; what was logged later is taken back. At 0 nothing in the folder is this run's
                own yet, so what a former run kept of itself goes.
        """
        self.start_step, self.log_path = start_step, self.path / checkpoint.LOG
        former = [checkpoint.BEST, checkpoint.GUIDE, checkpoint.LOG, "grids/*.png", "tensorboard/events.out.tfevents.*"]
        for file in (file for pattern in former for file in self.path.glob(pattern) if start_step == 0):
            file.unlink()
        # A run killed between a save and now has logged steps that are about to be taken again: drop those.
        lines = []
        if self.log_path.exists():
            lines = [line for line in self.log_path.read_text().splitlines() if json_step(line) <= start_step]
            temporary = self.path / f"{checkpoint.LOG}.tmp"
            temporary.write_text("".join(line + "\n" for line in lines))
            os.replace(temporary, self.log_path)
        # What it measured after its last save is taken again: log that once.
        self.logged = [set(json.loads(line)) for line in lines if json_step(line) == start_step]
        # TensorBoard's writer thread prints its failure and raises it again in the main thread: once is enough.
        threading.excepthook = lambda e: issubclass(e.exc_type, OSError) or threading.__excepthook__(e)
        # TensorBoard reads its files in the order of their names, which begin with the second they were made in: a run
        # killed and resumed within one could come out reversed, and lose its last steps.
        while list(self.path.glob(f"tensorboard/*.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)
        self.board = SummaryWriter(self.path / "tensorboard", purge_step=start_step + 1)

    @contextlib.contextmanager
    def writing(self):
        """Names the folder where a write fails; a full disk does not say it."""
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
            self.board.flush()                      # before the checkpoint of this step, or a kill would leave a gap
            with open(self.log_path, "a") as file:
                file.write(json.dumps(dict(step=step, **values)) + "\n")

    @processes.main_only
    def grid(self, step, name, rows, *panels):
        """Write class_grid pictures, side by side, as grids/<step>_<name>.png and to TensorBoard."""
        picture = side_by_side(*(class_grid(images, rows) for images in panels))
        with self.writing():
            save_image(picture, self.path / "grids" / f"{step:07d}_{name}.png")
            self.board.add_image(name, picture, step)

    @processes.main_only
    def close(self):
        with self.writing():
            self.board.close()
        self.lock.close()


def json_step(line):
    """The step of a log line; infinite for a line cut short by a kill."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
