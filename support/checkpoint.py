"""Checkpoints: one self-describing file per save, never half-written, never running code when loaded.

    checkpoint.save("runs/teacher/checkpoint.pt", dict(kind="teacher", ...))
    state = checkpoint.load("runs/teacher", kind="teacher")      # a file, or a run folder
"""

import errno
import io
import math
import os
import re
import zipfile
from pathlib import Path

import torch

from support import edm_pickle, processes
from support.errors import UsageError

FORMAT = "dmd2 checkpoint 1"
# What a run folder holds: the newest, the one of the least distance, and of a teacher's run an early one.
NAMES = NAME, BEST, GUIDE = "checkpoint.pt", "best.pt", "guide.pt"
LOG = "log.jsonl"                                   # beside them, a line per reading of the losses
SHIPPED = Path(__file__).resolve().parent.parent / "weights"
KEYS = ("step", "model_config", "model_ema", "classes", "sigma_min", "sigma_max")
KINDS = {"teacher": KEYS, "student": (*KEYS, "denoising_sigmas")}


class CheckpointError(UsageError):
    """There is no usable checkpoint; the message is one line that names the file."""


@processes.main_only
def save(path, state, compressed=False):
    """Write state to path so that a kill at any instant leaves either the old file or the new one, whole.

    Of several processes one writes; the others only have to make the same state. Compressing takes longer than a run
    should wait: it is for files to pass on.

    Raises:
        OSError: it could not be written (a full disk, say); the old file stands.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            plain = io.BytesIO() if compressed else file
            torch.save(dict(state, format=FORMAT), plain)
            if compressed:                          # torch's format is a zip, of which it reads compressed members too
                with zipfile.ZipFile(plain) as members, zipfile.ZipFile(file, "w") as packed:
                    for member in members.infolist():
                        packed.writestr(member, members.read(member), zipfile.ZIP_DEFLATED, compresslevel=9)
            file.flush()
            os.fsync(file.fileno())                 # the data must be on disk before the name is
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:        # torch turns a write error into a RuntimeError
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        raise OSError(f"cannot save {path}: {reason}; what was saved there before stands") from error


def sync_folder(path):
    """Put the names in a folder on disk, where its file system can: some of networks cannot, and the file is saved."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)


def find(path):
    """The checkpoint file that path means: itself, or the newest save of a run folder; None if there is none."""
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    return path if path.is_file() else None


def load(path, kind=None):
    """Read and check a checkpoint; one of EDM's published networks is read as a teacher's.

    Args:
        path: a file, or a run folder.
        kind: "teacher" or "student" where only that one will do.

    Raises:
        CheckpointError: there is none, it is damaged or of another kind.
    """
    file = find(path)
    if file is None:
        what = f"no {NAME} in this folder" if Path(path).is_dir() else "no such file or folder"
        raise CheckpointError(f"no checkpoint at {path}: {what}")
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
    """What is in a checkpoint's file, by today's names."""
    try:
        with zipfile.ZipFile(file) as archive:      # torch's format is a zip: its checksums find cuts and flipped bits
            damaged = archive.testzip()
        state = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:                      # many types, as a damaged file can break any layer of the reader
        raise CheckpointError(f"{file} is not a checkpoint, or is damaged ({type(error).__name__})") from error
    if damaged:
        raise CheckpointError(f"{file} is damaged: checksum of {damaged} does not match")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not a checkpoint of this project ({FORMAT})")
    upgrade(state)
    return state


# Flags by their former names, and former flags with the value that today's code has no flag for.
RENAMED = dict(guidance_scale="cfg_scale", guidance_interval="cfg_interval")
FORMER = dict(sigma_sampling="lognormal", more_ema_decays=[])


def upgrade(state):
    """Give what older versions saved today's names, in place; what is no dict is left for others to refuse."""
    settings = state.get("settings")
    if isinstance(settings, dict):
        for old, new in RENAMED.items():
            if old in settings:
                settings[new] = settings.pop(old)
        for name, value in FORMER.items():
            if settings.get(name) == value:
                del settings[name]
    if isinstance(settings, dict) and isinstance(state.get("step"), int):
        # Batches that were a function of the step alone.
        seen = state["step"] * settings.get("batch_size", 0)
        state.setdefault("batches", dict(step=state["step"], seen=seen, digest=None))
    if isinstance(state.get("emas"), dict) and state["emas"]:   # several averages, of which the first was sampled from
        state["ema"] = next(iter(state.pop("emas").values()))
    if isinstance(state.get("best"), dict) and "of" in state["best"]:
        state["best"]["metric"] = state["best"].pop("of")
    for name in ("model_ema", "model", "ema"):
        if isinstance(state.get(name), dict):
            state[name] = {re.sub(r"(^|\.)head\.", r"\1out_block.", key): v for key, v in state[name].items()}


def consistent(state):
    """Whether what scripts take for granted is so: the fields beside the weights, which the network checks itself."""
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
    """What sampling, evaluation and distillation need of a loaded checkpoint, the averaged weights in half precision.

    A sixth of its size or less; nothing to resume from. save(path, slim(load(run)), compressed=True) makes a file to
    pass on. Of the two half precisions bfloat16, to which networks round their weights where they are fast, and whose
    few exponents compress: a fifth less than two bytes a weight.
    """
    kept = {key: state[key] for key in ("kind", "label_dropout", "ema_decay", *KINDS[state["kind"]]) if key in state}
    return dict(kept, model_ema={name: value.bfloat16() for name, value in state["model_ema"].items()})


def stamp(folder):
    """What tells one save of a run folder's checkpoint from the next; None where there is none."""
    try:
        found = os.stat(Path(folder) / NAME)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def or_shipped(path, default, name, say=True):
    """path, or the weights that come with the code where path was not asked for and holds no run."""
    shipped = SHIPPED / name
    if path != default or Path(path).exists() or not shipped.exists():
        return path
    if say:
        processes.main_only(print)(f"there is no run in {path}: taking the shipped weights, {shipped}")
    return str(shipped)
