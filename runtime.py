"""Where and how a script runs: device, precision, stop signals, and the run folder with its logs."""

import contextlib
import fcntl
import json
import math
import os
import platform
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image

import checkpoint
import distributed
from data import to_uint8

LOG = "log.jsonl"
GRID_ROWS = 16                                      # classes shown in the grids of a run


def pick_device(name, precision="auto"):
    """The torch.device for --device; "auto" prefers CUDA, and of several GPUs the one of this process.

    Raises ValueError if it is not there.

    Also sets what holds for the whole process: TF32 where the device has it, unless precision is "fp32"; and of cuDNN's
    algorithms only those that give the same result each time, which an exact resume needs. On a GPU it may not be
    enough for one: what --compile makes of an embedding's backward adds with atomics, in no fixed order.
    Attention takes the plain products for the same reason: the fused kernels' backward need not repeat itself, and 16
    tokens gain nothing by them.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.WORLD > 1 and name.startswith("cuda"):
        if name != "cuda" or torch.cuda.device_count() < distributed.LOCAL_WORLD:
            found = f"{torch.cuda.device_count()} GPUs for {distributed.LOCAL_WORLD} processes"
            raise ValueError(f"{name!r} with torchrun: {found}, of which each takes its own of --device cuda")
        name = f"cuda:{distributed.LOCAL_RANK}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("choose auto, cpu, cuda, cuda:N or mps")
        torch.empty(1, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)           # events and collectives go by the current one
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from error
    allow_tf32(precision != "fp32")
    torch.backends.cudnn.deterministic = True
    for fused in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{fused}_sdp")(False)
    return device


def allow_tf32(allowed):
    """Whether the float32 products and convolutions of this process may round their factors to TF32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def full_float32(device):
    """Context of what must not depend on --precision: no bf16, no TF32."""
    before = torch.backends.cudnn.allow_tf32
    allow_tf32(False)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        allow_tf32(before)


def has_fast_bf16(device):
    """Whether bf16 is computed in hardware; emulated it would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def uses_bf16(device, precision):
    return precision == "bf16" or (precision == "auto" and has_fast_bf16(device))


def autocast(device, precision):
    """Context in which networks run: precision is "bf16", "tf32", "fp32" or "auto" (bf16 where it is fast)."""
    return torch.autocast(device.type, torch.bfloat16) if uses_bf16(device, precision) else contextlib.nullcontext()


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a flag that the loop reads between two steps; a second one ends at once.

    To read it is to ask all processes: one that gets the signal stops them all, at the same step.
    """

    def __init__(self, max_minutes=None):
        self.signum, self.since = None, 0.0
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.handle)

    def handle(self, signum, frame):
        # Ctrl-C under torchrun reaches a process twice, from the terminal and from torchrun: that is one.
        if self.signum is not None and time.monotonic() - self.since > 1:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif self.signum is None:
            self.signum, self.since = signum, time.monotonic()

    def __bool__(self):
        late = self.deadline is not None and time.monotonic() > self.deadline
        return distributed.any_process(self.signum is not None or late)


def lr_factor(step, args):
    """Learning rate at a step, as a fraction of its peak: a linear rise, then constant or half a cosine to zero."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2 if args.lr_schedule == "cosine" else 1.0


class NonFiniteError(Exception):
    """A loss or gradient norm became NaN or infinite."""


class Meter:
    """Scalars of the steps since the last reading, kept on the device: only read() and state() synchronise.

    With several processes they are the means over these.
    """

    def __init__(self, step, device, state=None):
        self.history = {}                           # name -> {step: 0-d tensor}
        for name, entries in (state or {}).items():
            self.history[name] = {step: torch.tensor(value, device=device) for step, value in entries.items()}
        self.step, self.since = step, time.perf_counter()

    def add(self, step, **scalars):
        for name, value in scalars.items():
            self.history.setdefault(name, {})[step] = value.detach()

    def state(self):
        """The unread scalars as numbers, for a checkpoint. Raises NonFiniteError naming the first bad step."""
        state, bad = {}, []
        for name, entries in self.history.items():
            values = torch.stack([value.float() for value in entries.values()]).cpu().double()
            # In float64, as a resume reads means and takes them again: of equal numbers the mean is the number.
            values = (distributed.sum_on_host(values) / distributed.WORLD).float().tolist()
            state[name] = dict(zip(entries, values, strict=True))
            bad += [(step, name, value) for step, value in state[name].items() if not math.isfinite(value)]
        if bad:
            step, name, value = min(bad)
            raise NonFiniteError(f"{name} is {value} at step {step}: stopped; the last checkpoint stands")
        return state

    def read(self):
        """Mean of each scalar since the last call, and a new start. Raises NonFiniteError like state()."""
        means = {name: sum(entries.values()) / len(entries) for name, entries in self.state().items()}
        self.history.clear()
        return means

    def rate(self, step):
        """Steps per second since the last call, pauses left out."""
        now = time.perf_counter()
        rate = (step - self.step) / max(now - self.since, 1e-9)
        self.step, self.since = step, now
        return rate

    @contextlib.contextmanager
    def paused(self):
        """What happens inside (grids, saves) does not count in rate()."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start


def peak_memory_mib(device):
    """Peak memory of this process so far, MiB: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class RunInUseError(Exception):
    """Another process writes to the run folder; the message names both."""


def stamp(path):
    """What tells one save of the checkpoint in a run folder from the next; None where there is none."""
    try:
        found = os.stat(Path(path) / checkpoint.NAME)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


class RunFolder:
    """Logs of one run: TensorBoard, log.jsonl (one line per reading) and grids/*.png; of several processes one writes.

    Args:
        known: stamp() of the folder at the time when it was decided how to go on from it.

    Raises:
        RunInUseError: another process is at work on this folder, or was since.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, path, known):
        self.path = Path(path)
        if not distributed.MAIN:
            return
        (self.path / "grids").mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / "lock", "a+")  # noqa: SIM115  held, and given back by the kernel if we are killed
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.lock.seek(0)
            raise RunInUseError(f"{path} is being written by {self.lock.read().strip()}") from error
        if stamp(path) != known:                    # by a run that has ended while this one started
            raise RunInUseError(f"another process has saved to {path} just now: start again")
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {platform.node()}, started {time.strftime('%F %T')}\n")
        self.lock.flush()
        for name in (*checkpoint.NAMES, LOG):       # of a save that was killed
            (self.path / f"{name}.tmp").unlink(missing_ok=True)

    @distributed.main_only
    def begin(self, start_step):
        """Open the logs, once there is a checkpoint.

        Args:
            start_step: of the checkpoint; what was logged later is taken back. At 0 nothing in the folder is this run's
                own yet, so what a former run kept of itself goes.
        """
        self.start_step, self.log_path = start_step, self.path / LOG
        former = [checkpoint.BEST, checkpoint.GUIDE, LOG, "grids/*.png", "tensorboard/events.out.tfevents.*"]
        for file in (file for pattern in former for file in self.path.glob(pattern) if start_step == 0):
            file.unlink()
        # A run killed between a save and now has logged steps that are about to be taken again: drop those.
        lines = []
        if self.log_path.exists():
            lines = [line for line in self.log_path.read_text().splitlines() if json_step(line) <= start_step]
            temporary = self.path / f"{LOG}.tmp"
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

    @distributed.main_only
    def scalars(self, step, values):
        if step == self.start_step and {"step", *values} in self.logged:
            return
        with self.writing():
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()                      # before the checkpoint of this step, or a kill would leave a gap
            with open(self.log_path, "a") as file:
                file.write(json.dumps(dict(step=step, **values)) + "\n")

    @distributed.main_only
    def grid(self, step, name, rows, *panels):
        """Write class_grid pictures, side by side, as grids/<step>_<name>.png and to TensorBoard."""
        picture = side_by_side(*(class_grid(images, rows) for images in panels))
        with self.writing():
            save_image(picture, self.path / "grids" / f"{step:07d}_{name}.png")
            self.board.add_image(name, picture, step)

    @distributed.main_only
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


def class_grid(images, rows):
    """A picture, float [3, H, W] in [0, 1], of images [N, 3, 32, 32] in [-1, 1]; row r shows images r, r + rows, ..."""
    blank = -torch.ones(-len(images) % rows, *images.shape[1:])
    images = torch.cat([images.cpu().float(), blank])                               # [rows * columns, 3, 32, 32]
    columns = len(images) // rows
    images = images.unflatten(0, (columns, rows)).transpose(0, 1).flatten(0, 1)
    return make_grid(to_uint8(images).float() / 255, nrow=columns, padding=2, pad_value=0.5)


def side_by_side(*pictures):
    """Pictures of one height, float [3, H, W], with a gap between each two."""
    gap = torch.ones(3, pictures[0].shape[1], 8)
    return torch.cat([part for picture in pictures for part in (gap, picture)][1:], dim=2)
