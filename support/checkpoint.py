"""Checkpoints: one self-describing file per save, never half-written, never running code when loaded.

    checkpoint.keep_previous("runs/teacher")                     # what the next line replaces
    checkpoint.save("runs/teacher/checkpoint.pt", dict(kind="teacher", ...))
    state = checkpoint.load("runs/teacher", kind="teacher")      # a file, or a run folder
"""

import functools
import io
import math
import os
import sys
import zipfile
from pathlib import Path

import torch

from support import edm_pickle, files, networks, processes
from support.errors import UsageError

FORMAT = "dmd2 checkpoint 1"
# The checkpoints in a run folder: the newest, the one with the lowest FD, for a teacher an early one, and the one that
# the newest has replaced.
NAMES = NAME, BEST, GUIDE, PREVIOUS = "checkpoint.pt", "best.pt", "guide.pt", "previous.pt"
LOG = "log.jsonl"                                   # beside them, one line per reading of the losses
SHIPPED = Path(__file__).resolve().parent.parent / "weights"
KEYS = ("step", "model_config", "model_ema", "classes", "sigma_min", "sigma_max")
KINDS = {"teacher": KEYS, "student": (*KEYS, "denoising_sigmas")}


class CheckpointError(UsageError):
    """There is no usable checkpoint; the message is one line that names the file."""


@processes.main_only
def save(path, state, compressed=False):
    """Write state to path so that a kill at any instant leaves either the old file or the new one, whole.

    Of several processes only the main one writes; the others just have to build the same state. Compression takes
    longer than a run should wait: it is for files to pass on.

    Raises:
        OSError: it could not be written (a full disk, say); the old file stands.
    """
    def write(file):
        plain = io.BytesIO() if compressed else file
        torch.save(dict(state, format=FORMAT), plain)
        if compressed:                              # torch's format is a zip, and it reads compressed members too
            with zipfile.ZipFile(plain) as members, zipfile.ZipFile(file, "w") as packed:
                for member in members.infolist():
                    packed.writestr(member, members.read(member), zipfile.ZIP_DEFLATED, compresslevel=9)

    try:
        files.write(path, write)
    except (OSError, RuntimeError) as error:        # torch turns a write error into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        raise OSError(f"cannot save {path}: {reason}; what was saved there before stands") from error


@processes.main_only
def keep_previous(folder):
    """Give a run folder's checkpoint a second name, so that it stays, as previous.pt, when a new one replaces it.

    A second name takes no room. What had the name before goes first, so that a save needs room for one more file, as
    it would without this, and checkpoint.pt is there and whole all the time.
    """
    newest, previous = Path(folder, NAME), Path(folder, PREVIOUS)
    try:
        previous.unlink(missing_ok=True)
        os.link(os.path.realpath(newest), previous)
    except OSError as error:                        # a file system without hard links, or a link to another one
        note(f"note: {folder} cannot keep a {PREVIOUS} beside {NAME}: {error.strerror}")


def restore_previous(folder):
    """Make previous.pt the run folder's checkpoint where find() takes it: the next save must not replace it."""
    found = find(folder)
    if found and found.name == PREVIOUS:
        os.replace(found, os.path.realpath(Path(folder, NAME)))


@functools.cache
def note(line):
    """Print a line for the user, once."""
    if processes.MAIN:
        print(line, file=sys.stderr)


def find(path):
    """The checkpoint file that path means, None if there is none: itself, or the newest save of a run folder.

    Where the newest is damaged or gone, that is the one before it, if that one is whole.
    """
    path = Path(path)
    if not path.is_dir():
        return path if path.is_file() else None
    newest, previous = path / NAME, path / PREVIOUS
    if previous.is_file() and not whole(newest, stamp(path)) and whole(previous, stamp(path, PREVIOUS)):
        return previous
    return newest if newest.is_file() else None


@functools.cache
def whole(file, stamp):
    """Whether the checksums in a file of torch's format match; stamp: stamp() of the file, as it may be replaced."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except PermissionError:                         # this is no damage, and load() says it
        return True
    except Exception:                               # of many types, as in read()
        return False


def load(path, kind=None):
    """Read and check a checkpoint; a published network of EDM is read as a teacher.

    Args:
        path: a file, or a run folder.
        kind: "teacher" or "student" where only one of them will do.

    Raises:
        CheckpointError: there is none, it is damaged, or of another kind.
    """
    file = find(path)
    if file is None:
        what = f"no {NAME} in this folder" if Path(path).is_dir() else "no such file or folder"
        raise CheckpointError(f"no checkpoint at {path}: {what}")
    if file.name == PREVIOUS and file != Path(path):
        what = "damaged" if file.with_name(NAME).exists() else "gone"
        note(f"note: {file.with_name(NAME)} is {what}: taking the save before it, {file}")
    try:
        with open(file, "rb") as opened:
            pickled = opened.read(1) == b"\x80"     # as pickles begin, and torch's zip files do not
        state = edm_pickle.teacher(file) if pickled else read(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except edm_pickle.Refused as error:
        raise CheckpointError(f"{file} is not a checkpoint, nor a network of EDM's to read here: {error}") from error
    if state.get("kind") not in list(KINDS) or any(key not in state for key in KINDS[state["kind"]]):
        raise CheckpointError(f"{file} is incomplete")
    if not consistent(state):
        raise CheckpointError(f"{file} contradicts itself: its classes, noise levels or step are not what they can be")
    if kind and state["kind"] != kind:
        raise CheckpointError(f"{file} holds a {state['kind']}, but a {kind} is needed")
    return state


def read(file):
    """The contents of a checkpoint file."""
    try:
        with zipfile.ZipFile(file) as archive:      # torch's format is a zip, whose checksums detect damage
            damaged = archive.testzip()
        state = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:                      # of many types: a damaged file can break any layer of the reader
        raise CheckpointError(f"{file} is not a checkpoint, or is damaged ({type(error).__name__})") from error
    if damaged:
        raise CheckpointError(f"{file} is damaged: checksum of {damaged} does not match")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not a checkpoint of this project ({FORMAT})")
    return state


def consistent(state):
    """Whether the fields beside the weights are what scripts rely on; the network checks the weights itself."""
    classes, config, levels = state["classes"], state["model_config"], state.get("denoising_sigmas", [1.0])
    numbers = [state["step"], state["sigma_min"], state["sigma_max"], *(levels if isinstance(levels, list) else [None])]
    return (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        and isinstance(config, dict) and (config.get("label_dim") or 1) == len(classes)
        and isinstance(state.get("settings", {}), dict) and isinstance(state["step"], int)
        and all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        and state["step"] >= 0 and 0 <= state["sigma_min"] < state["sigma_max"] and levels and min(levels) > 0
    )


def slim(state):
    """A loaded checkpoint reduced to what sampling, evaluation and distillation need, with the EMA in bfloat16.

    At most a sixth of the size; it cannot be resumed from. save(path, slim(load(run)), compressed=True) makes a file to
    pass on. bfloat16 rather than float16, as networks round their weights to it where it is fast, and as its exponents
    compress well: a fifth less than two bytes a weight. Buffers stay float32, as networks do not round them: it would
    shift the angles of a Fourier embedding.
    """
    keys = "kind", "label_dropout", "ema_decay", "teacher_digest", *KINDS[state["kind"]]
    kept = {key: state[key] for key in keys if key in state}
    with torch.device("meta"):
        rounded = dict(networks.rebuild(state["model_config"]).named_parameters())
    weights = state["model_ema"].items()
    return dict(kept, model_ema={name: value.bfloat16() if name in rounded else value for name, value in weights})


def stamp(folder, name=NAME):
    """Identifies one save of a run folder's checkpoint, so that the next one is noticed; None where there is none."""
    try:
        found = os.stat(Path(folder) / name)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def or_shipped(path, default, name, say=True):
    """path; or the shipped weights of this name, where path is the default and no run is there."""
    shipped = SHIPPED / name
    if path != default or Path(path).exists() or not shipped.exists():
        return path
    if say:
        processes.main_only(print)(f"there is no run in {path}: taking the shipped weights, {shipped}")
    return str(shipped)
