"""The command line that the scripts share: flag types, shared flags, presets, resume, and one-line errors.

Exit codes: 0 finished or stopped on request, 2 a wrong call (nothing was written), 1 something failed later.
"""

import argparse
import contextlib
import math
import os
import re
import sys
from pathlib import Path

import torch

import checkpoint
import data
import diffusion
import distributed
from checkpoint import CheckpointError
from data import DATASETS, DataError
from distributed import OutOfStepError
from runtime import LOG, NonFiniteError, RunInUseError, pick_device, stamp


class UsageError(Exception):
    """A wrong call: one line for the user, exit code 2."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):             # where the default is None, the help says what that means
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        for action in self._actions:                # older Pythons make an empty list of --flag=--
            if action.nargs in (None, "+", 2) and getattr(parsed, action.dest, None) == []:
                self.error(f"argument {action.option_strings[0]}: expected one argument")
        return parsed

    def error(self, message):
        raise UsageError(f"{message} (see --help)")


def number(kind, low, high=math.inf, open_low=False):
    """An argparse type: an int or float in [low, high], or (low, high]; NaN and infinity are refused."""
    high = min(high, 10**12) if kind is int else high

    def parse(text):
        value = kind(text)
        inside = (low < value if open_low else low <= value) and value <= high      # NaN is not
        if not inside or value == math.inf:
            limit = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if open_low else 'at least'} {low}{limit}")
        return value

    parse.__name__ = kind.__name__                  # argparse names it in "invalid int value"
    return parse


count = number(int, 1)
natural = number(int, 0)
positive = number(float, 0, open_low=True)
fraction = number(float, 0, 1)
# Beyond these float32 overflows in the first step.
rate = number(float, 0, 1, open_low=True)
weight = number(float, 0, 1e6)
noise = number(float, 1e-4, 1e4)


def path(text):
    """An argparse type: a name that the file system can have."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    try:
        os.lstat(text)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:          # too long, through a file, unreadable; a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: {reason}") from error
    return text


def writable(path):
    """Whether a file or folder of this name could be made or replaced, its folders made where they are not there."""
    path = Path(path).resolve()
    existing = next(place for place in (path, *path.parents) if place.exists())
    folder = path.parent if path.is_file() else existing        # a file is replaced by a new one
    return folder.is_dir() and os.access(folder, os.W_OK)


def add_common(parser):
    """Flags of every script."""
    parser.add_argument("--seed", type=natural, default=0, help="everything random follows from it")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--precision", choices=["auto", "bf16", "tf32", "fp32"], default="auto",
        help="of the networks: auto is bf16 where the hardware has it; weights and preconditioning stay float32",
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile: slow to start, then faster",
    )


def add_training(parser, presets, run_dir, steps, batch_size, sample_every, save_every):
    """Flags of the two training scripts."""
    add_common(parser)
    parser.add_argument("--run_dir", type=path, default=run_dir, help="where checkpoint, logs and grids/ go")
    parser.add_argument("--steps", type=count, default=steps, help="steps in all, those before a resume included")
    parser.add_argument("--batch_size", type=count, default=batch_size, help="images per step")
    parser.add_argument("--log_every", type=count, default=50, help="steps between two readings of the losses")
    parser.add_argument("--sample_every", type=count, default=sample_every, help="steps between two image grids")
    parser.add_argument("--save_every", type=count, default=save_every, help="steps between two checkpoints")
    parser.add_argument(
        "--max_minutes", type=positive, help="save and stop after so many minutes, --resume goes on; default: no limit"
    )
    parser.add_argument(
        "--optimizer", choices=["adam", "muon"], default="adam",
        help="muon: Muon for the convolutions inside the networks, Adam for the rest",
    )
    parser.add_argument("--warmup_steps", type=natural, default=100, help="steps of linear rise to the learning rate")
    parser.add_argument(
        "--lr_schedule", choices=["cosine", "constant"], default="constant", help="after the rise; cosine ends at zero"
    )
    parser.add_argument("--max_grad_norm", type=positive, default=10.0, help="longer gradients are scaled down")
    parser.add_argument("--preset", help=f"a named set of defaults: {', '.join(presets)}; default: none")
    parser.add_argument(
        "--resume", action="store_true", help="go on from run_dir's checkpoint with its settings, if it has one"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew in a run_dir that holds a run")
    parser.add_argument(
        "--eval_every", type=natural, default=0,
        help="steps between two measurements of the averaged weights' images as by evaluate.py; the checkpoint of the "
        "least Frechet distance is kept as best.pt; 0: none",
    )
    parser.add_argument(
        "--more_ema_decays", type=fraction, nargs="*", default=[], metavar="DECAY",
        help="of further averages, measured beside that of --ema_decay; best.pt samples from the best of all",
    )
    parser.add_argument("--eval_images", type=number(int, 64), default=2048, help="images of such a measurement")
    add_features(parser)
    schedule = "of the Karras schedule; images span [-1, 1]"
    parser.add_argument("--sigma_min", type=noise, default=diffusion.SIGMA_MIN, help=f"least noise {schedule}")
    parser.add_argument("--sigma_max", type=noise, default=diffusion.SIGMA_MAX, help=f"most noise {schedule}")


def add_dataset(parser, title, dataset="cifar10", data_dir="data", flip=True):
    group = parser.add_argument_group(title)
    otherwise = "" if dataset else "; default: the checkpoint's"
    group.add_argument(
        "--dataset", choices=DATASETS, default=dataset, help=f"folder: any tree of <class>/<image>{otherwise}"
    )
    group.add_argument(
        "--data_dir", type=path, default=data_dir,
        help=f"where cifar10 is, or is downloaded to; or the folder{otherwise}",
    )
    if flip:
        group.add_argument(
            "--flip", type=number(int, 0, 1), default=1 if dataset else None,
            help=f"1: mirror half of the images, 0: none{otherwise}",
        )


def add_guidance(parser, whose):
    parser.add_argument(
        "--guidance_scale", type=weight, default=1.0, help=f"classifier-free guidance of {whose}, 1: none"
    )
    parser.add_argument(
        "--guidance_interval", type=number(float, 0), nargs=2, metavar=("LOW", "HIGH"),
        help="noise levels above LOW up to HIGH at which guidance of either kind acts; default: all",
    )
    parser.add_argument(
        "--autoguidance_scale", type=weight, default=1.0, help=f"guidance of {whose} by a weaker teacher, 1: none"
    )
    parser.add_argument(
        "--guide", type=path, help="that weaker teacher; default: guide.pt beside the teacher, which train0.py makes"
    )


def add_features(parser):
    """Flags of what measures images."""
    parser.add_argument(
        "--feature_extractor", type=path, help="a network saved by torch.export, uint8 [N, 3, 32, 32] -> features or "
        "(features, logits); a program: from people you trust. Default: Inception, fetched on first use",
    )
    parser.add_argument(
        "--inception_weights", type=path, help="where Inception's weights are; default: torch.hub's folder"
    )
    parser.add_argument(
        "--cache_dir", type=path, default="~/.cache/dmd2", help="keeps the features of datasets, by content"
    )


def check_features(args):
    """Raise UsageError if a file of add_features is not there: now, and not after a dataset was downloaded."""
    for name in ("feature_extractor", "inception_weights"):
        given = getattr(args, name)
        if given and not os.path.isfile(given):
            raise UsageError(f"--{name}: no file {given}")


def extractor(args, device):
    """The feature network of the flags of add_features."""
    # torch-fidelity is slow to import, and rarely needed.
    import metrics

    if args.feature_extractor:
        return metrics.exported(args.feature_extractor, device)
    return distributed.first_of_host(metrics.inception, device, args.inception_weights)


def validation(args, dataset, device):
    """metrics.Validation for --eval_every, or None where that is 0."""
    if not args.eval_every:
        return None
    import metrics

    return metrics.Validation(dataset, extractor(args, device), args.eval_images, args.seed, args.cache_dir, device)


def or_shipped(path, default, name):
    """path, or the weights that come with the code where path was not asked for and holds no run."""
    shipped = Path(__file__).resolve().parent / "weights" / name
    if path != default or Path(path).exists() or not shipped.exists():
        return path
    distributed.main_only(print)(f"there is no run in {path}: taking the shipped weights, {shipped}")
    return str(shipped)


SESSION_FLAGS = ("stamp", "run_dir", "device", "max_minutes", "resume", "overwrite", "preset")


def settings(args):
    """What a checkpoint remembers of the flags: all but those that belong to one session at the machine."""
    return {name: value for name, value in vars(args).items() if name not in SESSION_FLAGS}


def parse_training(parser, kind, presets, argv=None, fixed=()):
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
    seen = stamp(args.run_dir)                      # before it is read
    found = checkpoint.find(args.run_dir) if Path(args.run_dir).is_dir() else None
    left = [name for name in (checkpoint.BEST, checkpoint.GUIDE, LOG) if (Path(args.run_dir) / name).exists()]
    if left and not found and not args.overwrite:   # a new run would take them away
        raise UsageError(f"{args.run_dir} holds {left[0]} but no {checkpoint.NAME}: --overwrite starts anew in it")
    if found and not args.resume and not args.overwrite:
        raise UsageError(f"{args.run_dir} holds a run already: give --resume, --overwrite, or another --run_dir")
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude one another")
    if Path(args.run_dir).exists() and not Path(args.run_dir).is_dir():
        raise UsageError(f"--run_dir {args.run_dir} is a file")
    if not writable(args.run_dir):
        raise UsageError(f"--run_dir {args.run_dir} cannot be written")
    state = None
    if found and args.resume:
        state = checkpoint.load(found, kind=kind)
        if "settings" not in state:
            raise CheckpointError(f"{found} holds weights only: nothing to resume")
        defaults = state["settings"]                # not the preset's, which a later version may have changed
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.sigma_min >= args.sigma_max:
        raise UsageError(f"--sigma_min {args.sigma_min} is not below --sigma_max {args.sigma_max}")
    if args.batch_size % distributed.WORLD:
        raise UsageError(f"--batch_size {args.batch_size} cannot be shared out to {distributed.WORLD} processes")
    for name in fixed if state else ():
        saved = state["settings"].get(name, parser.get_default(name))               # no such flag in an older version
        none_yet = name == "dataset" and saved is None          # a student without a GAN that was not measured either
        if getattr(args, name) != saved and not none_yet:
            raise UsageError(f"--{name} {getattr(args, name)} differs from the resumed run's {saved}")
    if args.eval_every:
        check_features(args)
    args.stamp = seen
    return args, state


def name_dataset(args, state):
    """Fill in the flags of add_dataset, where they are not given, with what the checkpoint's network was trained on."""
    known = state.get("settings", {}) if state else {}
    args.dataset = args.dataset or known.get("dataset")
    known = known if args.dataset == known.get("dataset") else {}
    args.data_dir = args.data_dir or known.get("data_dir") or "data"
    if getattr(args, "flip", 1) is None:
        args.flip = known.get("flip", 1)


def dataset(args, state=None, split="train"):
    """The dataset of --dataset, or where that is not given what the checkpoint's network was trained on."""
    name_dataset(args, state)
    if args.dataset is None:
        raise UsageError("the checkpoint does not name its images: give --dataset and --data_dir")
    loaded = distributed.first_of_host(data.load, args.dataset, args.data_dir, split)
    if state and loaded.classes != state["classes"]:
        raise UsageError(f"the classes of --dataset {args.dataset} are not those of the checkpoint")
    counts = loaded.labels.bincount(minlength=len(loaded.classes))
    if counts.max() > 1.1 * counts.min() and distributed.MAIN:
        few, many = counts.min(), counts.max()
        print(f"note: the classes have {few} to {many} images; students learn as many of each", file=sys.stderr)
    return loaded


def sampling_guidance(args, state, device):
    """Keyword arguments of diffusion.guided for a checkpoint that is sampled, from the flags of add_guidance.

    Raises UsageError if these ask for nothing, or for what the checkpoint cannot do.
    """
    scales = dict(guidance_scale=args.guidance_scale, autoguidance_scale=args.autoguidance_scale)
    for name, scale in scales.items():
        if scale != 1 and state["kind"] == "student":
            raise UsageError(f"--{name} is for teachers: a student keeps the guidance that it was distilled with")
    if args.guidance_interval and set(scales.values()) == {1}:
        raise UsageError("--guidance_interval needs a --guidance_scale or --autoguidance_scale other than 1")
    if args.guide and args.autoguidance_scale == 1:
        raise UsageError("--guide needs an --autoguidance_scale other than 1")
    check_guidance(args, state)
    return dict(
        scales, guidance_interval=args.guidance_interval, guide=load_guide(args, state, args.checkpoint, device)
    )


def guide_path(args, teacher):
    """Where the weaker teacher is that --autoguidance_scale asks for, or None where it asks for none."""
    if args.autoguidance_scale == 1:
        return None
    return args.guide or checkpoint.find(teacher).with_name(checkpoint.GUIDE)


def load_guide(args, state, teacher, device):
    """The network at guide_path, for the teacher at a path with this state; None where there is none.

    Raises:
        UsageError: it has other classes.
        CheckpointError: there is no teacher.
    """
    path = guide_path(args, teacher)
    if path is None:
        return None
    if not args.guide and not path.exists():
        raise UsageError(f"--autoguidance_scale needs a weaker teacher, and there is no {path}: give --guide, or 1")
    guide = checkpoint.load(path, kind="teacher")
    if guide["classes"] != state["classes"]:
        raise UsageError(f"the classes of --guide {path} are not those of the teacher")
    with restoring(path):
        return checkpoint.ema_model(guide, device)


def check_guidance(args, state):
    """Raises UsageError if the guidance flags ask for what the checkpoint's network cannot do."""
    if args.guidance_interval and args.guidance_interval[0] >= args.guidance_interval[1]:
        raise UsageError("--guidance_interval {} {}: the first is not below the second".format(*args.guidance_interval))
    if args.guidance_scale != 1 and not state.get("label_dropout"):
        raise UsageError(
            f"--guidance_scale {args.guidance_scale} needs a teacher that was trained with --label_dropout above 0"
        )


def device(args):
    """The device of --device, once all processes of a run are there: what they check before is not yet changed."""
    try:
        picked = pick_device(args.device, args.precision)
    except ValueError as error:
        raise UsageError(f"--device: {error}") from error
    distributed.start()
    return picked


@contextlib.contextmanager
def restoring(path):
    """Turns what does not fit into the networks and optimizers of today into a CheckpointError that names the file."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"the checkpoint at {path} does not fit this version: {reason}") from error


def run(main):
    """Call a script's main() and turn what a user can cause into one line and an exit code."""
    script = Path(sys.argv[0]).name
    try:
        main()
        distributed.finish()
        sys.exit()
    except (UsageError, CheckpointError, DataError, RunInUseError) as error:
        code, line = 2, error
    except (NonFiniteError, OutOfStepError, OSError) as error:
        code, line = 1, error
    except ModuleNotFoundError as error:            # torch-fidelity, which only a measurement imports
        code, line = 1, f"{error}: pip install -r requirements.txt"
    except KeyboardInterrupt:                       # before the loop, which has its own way to stop
        code, line = 1, "interrupted"
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        code, reason = 1, str(error).partition("\n")[0]
        if isinstance(error, MemoryError) or re.search("out of memory|allocate|not enough memory", str(error)):
            line = f"out of memory, try a smaller --batch_size: {reason}"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            line = f"--compile failed, --no-compile does without: {reason}"
        elif distributed.lost(error):
            line = f"another process of this run has ended; the last checkpoint stands ({reason})"
        else:
            raise
    if distributed.WORLD > 1 and code == 1:         # a wrong call is the same line for all: once a host is enough
        line = f"process {distributed.RANK} of {distributed.WORLD}: {line}"
    if code == 1 or distributed.LOCAL_RANK == 0:
        below_the_bar, line = "\n" if code == 1 else "", " ".join(str(line).split())
        print(f"{below_the_bar}{script}: error: {line}", file=sys.stderr, flush=True)
    sys.exit(code)
