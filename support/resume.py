"""The settings of a training script: the flags given, over those of the resumed run, over those of a preset.

    args, state = resume.parse(parser, "teacher", choose)           # state: the checkpoint to resume from, or None
    resume.restore(args, state, dict(model=net, ema=ema))
"""

import contextlib
import os
import sys
import textwrap
from pathlib import Path

import torch

from constants import IMAGE_SIZE
from support import checkpoint, processes, validation
from support.errors import UsageError

# The last version whose checkpoints do not name the commit that made them.
LAST_UNNAMED = "804d3b3"
SESSION_FLAGS = ("stamp", "given", "run_dir", "device", "max_minutes", "resume", "overwrite", "preset")
PATH_FLAGS = ("data_dir", "teacher", "guide", "init", "gan_features", "feature_extractor", "inception_weights")


def settings(args):
    """The flags that a checkpoint remembers: all but those of one session at the machine. Paths become absolute."""
    return {name: absolute(name, value) for name, value in vars(args).items() if name not in SESSION_FLAGS}


def absolute(name, value):
    """The value of a flag, a path as an absolute one: it must mean the same from another directory."""
    return os.path.abspath(value) if name in PATH_FLAGS and value else value


def choose_preset(args, figures, size):
    """The name of the preset for the machine of --device, and for the figures of `shapes` or for photographs.

    size: height and width of the images.
    """
    if figures:
        return "demo" if size <= IMAGE_SIZE else "demo64"
    gpu = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    return "cifar10_gpu" if gpu else "cifar10"


def parse(parser, kind, choose, argv=None, fixed=()):
    """Parse a training script's flags: those given, over the resumed run's settings or over the preset's.

    Args:
        kind: "teacher" or "student": what the script trains.
        choose: the preset of a new run: args -> its name, --preset's or else the one for the images and the machine;
            and its values for images of their size.
        fixed: flags that a resumed run cannot change.

    Returns:
        the flags, with `given`, the names of those on the command line; and the checkpoint to resume from, or None.
    """
    preset = parser.preset
    args = parser.parse_args(argv)
    given = parser.given(argv)
    stamp = checkpoint.stamp(args.run_dir)          # before the checkpoint is read
    found = checkpoint.find(args.run_dir) if Path(args.run_dir).is_dir() else None
    go_on = args.resume or restarted()
    check_folder(args, found, go_on)
    state, defaults = None, {}
    if found and go_on:
        state = checkpoint.load(args.run_dir, kind=kind)
        if "settings" not in state:
            raise checkpoint.CheckpointError(f"{found} holds weights only: nothing to resume")
        unknown = [name for name in state["settings"] if not hasattr(args, name)]
        if unknown:
            version = state.get("commit") or f"{LAST_UNNAMED} or an earlier one"
            raise UsageError(f"{found} was made by commit {version}, whose --{unknown[0]} this version does not have: "
                             "resume it there, or start a new run")
        defaults = parser.plain | state["settings"]        # not the preset, which may have changed since
    else:
        preset, defaults = choose(args)
    if not state and parser.preset is None:
        processes.main_only(print)(f"--preset {preset} by the images and the device (--preset none: no additions)")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    check(args, state, {name: parser.get_default(name) for name in fixed})
    if state:
        how = "" if args.resume else ", as torchrun has restarted this script"
        processes.main_only(print)(f"resumes {found}, step {state['step']} of {args.steps}{how}")
    elif args.resume:
        checkpoint.note(f"note: there is no run in {args.run_dir} to resume: a new one begins")
    args.preset, args.given, args.stamp = preset, given, stamp
    return args, state


def restarted():
    """Whether torchrun --max_restarts has started this script again: it must not overwrite what it did before."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def check_folder(args, found, go_on):
    """Raise UsageError unless a run may begin in --run_dir, or go on from the checkpoint found there."""
    folder = Path(args.run_dir)
    if str(folder) != str(folder).encode(errors="replace").decode():
        raise UsageError(f"--run_dir {folder}: TensorBoard writes only into folders whose names are UTF-8")
    left = [name for name in (*checkpoint.NAMES[1:], checkpoint.LOG) if (folder / name).exists()]
    if left and not found and not args.overwrite:   # a new run would delete them
        raise UsageError(f"{folder} holds {left[0]} but no {checkpoint.NAME}: --overwrite starts anew in it")
    if found and not go_on and not args.overwrite:
        raise UsageError(f"{folder} holds a run already: give --resume, --overwrite, or another --run_dir")
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude one another")


def check(args, state, fixed):
    """Raise UsageError if flags exclude one another, or if a fixed one (name -> default) differs on a resume."""
    evaluations = getattr(args, "num_denoising_steps", 1)           # of a student
    if args.batch_size % (processes.WORLD * args.accumulate * evaluations):
        shares = f"{processes.WORLD} processes" + (f" of --accumulate {args.accumulate}" if args.accumulate > 1 else "")
        shares += f" of --num_denoising_steps {evaluations}" if evaluations > 1 else ""
        raise UsageError(f"--batch_size {args.batch_size} cannot be divided among {shares}")
    if state and args.batch_size != state["settings"]["batch_size"] and processes.MAIN:
        print(f"note: --batch_size was {state['settings']['batch_size']} before", file=sys.stderr)
    if state and args.steps < state["step"]:
        raise UsageError(f"--steps {args.steps}: the run in {args.run_dir} has taken {state['step']} steps already")
    for name, default in fixed.items() if state else ():
        saved = state["settings"].get(name, default)            # an older version may not have had the flag
        none_yet = name == "dataset" and saved is None          # a student that has needed no real images so far
        if absolute(name, getattr(args, name)) != absolute(name, saved) and not none_yet:
            raise UsageError(f"--{name} {getattr(args, name)} differs from the resumed run's {saved}")
    if args.eval_every:
        validation.check_features(args)


@contextlib.contextmanager
def restoring(path, part=None):
    """Context in which a state that does not fit becomes a CheckpointError; part: what of it is restored, if not all.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else textwrap.shorten(str(error), 200)
        reason = f"{part}: {reason}" if part else reason
        raise checkpoint.CheckpointError(f"the checkpoint at {path} does not fit this version: {reason}") from error


def restore(args, state, stateful):
    """Load what has a state_dict (name -> object) from the resumed run's checkpoint; nothing if state is None."""
    with restoring(args.run_dir):
        states = {name: state[name] for name in stateful} if state else {}
    for name, found in states.items():
        with restoring(args.run_dir, name):
            stateful[name].load_state_dict(found)
