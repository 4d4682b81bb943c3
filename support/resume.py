"""A training script's settings: the flags given, over those of the run that goes on, over a preset's.

    args, state = resume.parse(parser, "teacher", PRESETS)       # state: the checkpoint to go on from, or None
    resume.restore(args, state, dict(model=net, ema=ema))
"""

import contextlib
from pathlib import Path

import torch

from support import checkpoint, flags, processes, validation
from support.errors import UsageError

SESSION_FLAGS = ("stamp", "run_dir", "device", "max_minutes", "resume", "overwrite", "preset")


def settings(args):
    """What a checkpoint remembers of the flags: all but those that belong to one session at the machine."""
    return {name: value for name, value in vars(args).items() if name not in SESSION_FLAGS}


def parse(parser, kind, presets, argv=None, fixed=()):
    """Parse a training script's flags: those given, over the resumed run's settings, or over the preset's.

    Args:
        kind: "teacher" or "student", what the script trains.
        presets: name -> dict of defaults.
        fixed: flags that a resumed run cannot change.

    Returns:
        the flags, and the checkpoint to resume from or None.
    """
    args = parser.parse_args(argv)
    if args.preset is not None and args.preset not in presets:
        raise UsageError(f"unknown preset {args.preset!r}: choose one of {', '.join(presets)}")
    defaults = presets.get(args.preset, {})
    seen = checkpoint.stamp(args.run_dir)                      # before it is read
    found = checkpoint.find(args.run_dir) if Path(args.run_dir).is_dir() else None
    former = checkpoint.BEST, checkpoint.GUIDE, checkpoint.LOG
    left = [name for name in former if (Path(args.run_dir) / name).exists()]
    if left and not found and not args.overwrite:   # a new run would take them away
        raise UsageError(f"{args.run_dir} holds {left[0]} but no {checkpoint.NAME}: --overwrite starts anew in it")
    if found and not args.resume and not args.overwrite:
        raise UsageError(f"{args.run_dir} holds a run already: give --resume, --overwrite, or another --run_dir")
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude one another")
    if Path(args.run_dir).exists() and not Path(args.run_dir).is_dir():
        raise UsageError(f"--run_dir {args.run_dir} is a file")
    if not flags.writable(args.run_dir):
        raise UsageError(f"--run_dir {args.run_dir} cannot be written")
    state = None
    if found and args.resume:
        state = checkpoint.load(found, kind=kind)
        if "settings" not in state:
            raise checkpoint.CheckpointError(f"{found} holds weights only: nothing to resume")
        defaults = state["settings"]                # not the preset's, which a later version may have changed
        for name in defaults:
            if not hasattr(args, name):
                raise UsageError(f"{found} is of a run with --{name} {defaults[name]}, a flag that is no more")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.sigma_min >= args.sigma_max:
        raise UsageError(f"--sigma_min {args.sigma_min} is not below --sigma_max {args.sigma_max}")
    if args.batch_size % processes.WORLD:
        raise UsageError(f"--batch_size {args.batch_size} cannot be shared out to {processes.WORLD} processes")
    for name in fixed if state else ():
        saved = state["settings"].get(name, parser.get_default(name))               # no such flag in an older version
        none_yet = name == "dataset" and saved is None          # a student without a GAN that was not measured either
        if getattr(args, name) != saved and not none_yet:
            raise UsageError(f"--{name} {getattr(args, name)} differs from the resumed run's {saved}")
    if args.eval_every:
        validation.check_features(args)
    args.stamp = seen
    return args, state


@contextlib.contextmanager
def restoring(path):
    """Turns what does not fit into the networks and optimizers of today into a CheckpointError that names the file."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise checkpoint.CheckpointError(f"the checkpoint at {path} does not fit this version: {reason}") from error


def restore(args, state, parts):
    """Load the parts, name -> what has a state_dict, from the checkpoint of a run that goes on; None: leave them."""
    with restoring(args.run_dir):
        for name, part in parts.items() if state else ():
            part.load_state_dict(state[name])
