"""A training script's settings: the flags given, over those of the run that goes on, over a preset's.

    args, state = resume.parse(parser, "teacher", PRESETS, choose)  # state: the checkpoint to go on from, or None
    resume.restore(args, state, dict(model=net, ema=ema))
"""

import contextlib
import sys
from pathlib import Path

import torch

from support import checkpoint, flags, processes, validation
from support.errors import UsageError

SESSION_FLAGS = ("stamp", "given", "run_dir", "device", "max_minutes", "resume", "overwrite", "preset")


def settings(args):
    """What a checkpoint remembers of the flags: all but those that belong to one session at the machine."""
    return {name: value for name, value in vars(args).items() if name not in SESSION_FLAGS}


def fitting(args, figures):
    """The name of the preset for the machine of --device, and for the figures of `shapes` or for photographs."""
    if figures:
        return "demo"
    gpu = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    return "cifar10_gpu" if gpu else "cifar10"


def parse(parser, kind, presets, choose, argv=None, fixed=()):
    """Parse a training script's flags: those given, over the resumed run's settings, or over the preset's.

    Args:
        kind: "teacher" or "student", what the script trains.
        presets: name -> dict of defaults.
        choose: args -> the name of the preset for a new run that was given none.
        fixed: flags that a resumed run cannot change.

    Returns:
        the flags, with the names of those that were given as `given`; and the checkpoint to resume from or None.
    """
    first = flags.Parser(add_help=False)            # before --help, which shows the preset's values
    first.add_argument("--preset")
    preset = first.parse_known_args(argv)[0].preset
    if preset is not None and preset not in (*presets, "none"):
        raise UsageError(f"unknown preset {preset!r}: choose one of {', '.join(presets)}, none")
    plain = {name: parser.get_default(name) for name in presets.get(preset, {})}
    parser.set_defaults(**presets.get(preset, {}))
    args = parser.parse_args(argv)
    given = parser.given(argv)
    stamp = checkpoint.stamp(args.run_dir)          # before it is read
    found = checkpoint.find(args.run_dir) if Path(args.run_dir).is_dir() else None
    check_folder(args, found)
    state, defaults = None, {}
    if found and args.resume:
        state = checkpoint.load(found, kind=kind)
        if "settings" not in state:
            raise checkpoint.CheckpointError(f"{found} holds weights only: nothing to resume")
        for name, value in state["settings"].items():
            if not hasattr(args, name):
                raise UsageError(f"{found} is of a run with --{name} {value}, a flag that is no more")
        defaults = plain | state["settings"]        # not the preset's, which a later version may have changed
    elif preset is None:
        preset = choose(args)
        defaults = presets[preset]
        processes.main_only(print)(f"--preset {preset} by the images and the device (--preset none: the plain losses)")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    check(args, state, {name: parser.get_default(name) for name in fixed})
    args.preset, args.given, args.stamp = preset, given, stamp
    return args, state


def check_folder(args, found):
    """Raise UsageError unless a run may begin in --run_dir, or go on from the checkpoint found there."""
    folder = Path(args.run_dir)
    left = [name for name in (checkpoint.BEST, checkpoint.GUIDE, checkpoint.LOG) if (folder / name).exists()]
    if left and not found and not args.overwrite:   # a new run would take them away
        raise UsageError(f"{folder} holds {left[0]} but no {checkpoint.NAME}: --overwrite starts anew in it")
    if found and not args.resume and not args.overwrite:
        raise UsageError(f"{folder} holds a run already: give --resume, --overwrite, or another --run_dir")
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude one another")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--run_dir {folder} is a file")
    if not flags.writable(folder):
        raise UsageError(f"--run_dir {folder} cannot be written")


def check(args, state, fixed):
    """Raise UsageError if flags exclude one another, or differ from the resumed run's: fixed ones, name -> default."""
    if args.sigma_min >= args.sigma_max:
        raise UsageError(f"--sigma_min {args.sigma_min} is not below --sigma_max {args.sigma_max}")
    if args.batch_size % (processes.WORLD * args.accumulate):
        parts = f"{processes.WORLD} processes" + (f" in {args.accumulate} parts each" if args.accumulate > 1 else "")
        raise UsageError(f"--batch_size {args.batch_size} cannot be shared out to {parts}")
    if state and args.batch_size != state["settings"]["batch_size"] and processes.MAIN:
        print(f"note: the batches were of {state['settings']['batch_size']} images before", file=sys.stderr)
    for name, default in fixed.items() if state else ():
        saved = state["settings"].get(name, default)            # no such flag in an older version
        none_yet = name == "dataset" and saved is None          # a student without a GAN that was not measured either
        if getattr(args, name) != saved and not none_yet:
            raise UsageError(f"--{name} {getattr(args, name)} differs from the resumed run's {saved}")
    if args.eval_every:
        validation.check_features(args)


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
