"""The flags that the scripts share, and the types of their values.

    parser = flags.Parser(description="...")
    flags.add_common(parser)
    parser.add_argument("--lr", type=flags.rate, default=1e-3)
"""

import argparse
import math
import os
from pathlib import Path

import diffusion
from support.data import DATASETS
from support.errors import UsageError


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=40, width=120)

    def _get_help_string(self, action):             # where the default is None, the help says what that means
        return action.help if action.default is None else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "__name__", "name").upper()


class Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, allow_abbrev=False, usage="%(prog)s [--FLAG VALUE ...]", **kwargs)

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        for action in self._actions:                # older Pythons make an empty list of --flag=--
            if action.nargs in (None, "+", 2) and getattr(parsed, action.dest, None) == []:
                self.error(f"argument {action.option_strings[0]}: expected one argument")
        return parsed

    def given(self, args=None):
        """The names of the flags that were given: not those at their defaults."""
        unset = object()
        found = super().parse_args(args, argparse.Namespace(**{action.dest: unset for action in self._actions}))
        return {name for name, value in vars(found).items() if value is not unset}

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
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    folder = path.parent if path.is_file() else existing        # a file is replaced by a new one
    return folder.is_dir() and os.access(folder, os.W_OK)


def check_file(parser, path):
    """Refuse the name of a file that cannot be written."""
    if Path(path).is_dir() or not Path(path).resolve().parent.is_dir() or not writable(path):
        parser.error(f"cannot write {path}: it is a folder, or its folder is not there or not writable")


def add_common(parser, compile=False):
    """Flags of every script; compile: whether they do, None where the device decides."""
    parser.add_argument("--seed", type=natural, default=0, help="everything random follows from it")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--precision", choices=["auto", "bf16", "fp16", "tf32", "fp32"], default="auto",
        help="of the networks: auto is bf16 where the hardware has it, fp16 is for older GPUs; weights and "
        "preconditioning stay float32",
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=compile,
        help="torch.compile: slow to start, then faster" + ("; default: on CUDA" if compile is None else ""),
    )


def add_training(parser, presets, run_dir, steps, batch_size, sample_every, save_every):
    """Flags of the two training scripts. Returns the group of those that say how the networks learn, to add to."""
    parser.add_argument(
        "--preset", help=f"a named set of defaults, shown by --preset NAME --help: {', '.join(presets)}, or none, the "
        "plain losses; default: the one for these images and this machine",
    )
    parser.add_argument("--run_dir", type=path, default=run_dir, help="where checkpoint, logs and grids/ go")
    parser.add_argument(
        "--resume", action="store_true", help="go on from run_dir's checkpoint with its settings, if it has one"
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--overwrite", action="store_true", help="start anew in a run_dir that holds a run")
    run.add_argument("--steps", type=count, default=steps, help="steps in all, those before a resume included")
    run.add_argument(
        "--max_minutes", type=positive, help="save and stop after so many minutes, --resume goes on; default: no limit"
    )
    run.add_argument("--log_every", type=count, default=50, help="steps between two readings of the losses")
    run.add_argument("--sample_every", type=count, default=sample_every, help="steps between two image grids")
    run.add_argument(
        "--save_every", type=count, default=save_every, help="steps between two checkpoints, ten minutes at most"
    )
    add_common(run)
    run.add_argument(
        "--record", action=argparse.BooleanOptionalAction, default=True,
        help="with --compile on one GPU: record the kernels of a step once and replay them",
    )
    learning = parser.add_argument_group("how the networks learn")
    learning.add_argument("--batch_size", type=count, default=batch_size, help="images per step")
    learning.add_argument(
        "--accumulate", type=count, default=1, help="parts that a batch is cut into, one after another, to save memory"
    )
    learning.add_argument(
        "--optimizer", choices=["adam", "muon"], default="adam",
        help="muon: Muon for the convolutions inside the networks, Adam for the rest",
    )
    learning.add_argument("--warmup_steps", type=natural, default=100, help="steps of linear rise to the learning rate")
    learning.add_argument(
        "--lr_schedule", choices=["cosine", "constant"], default="constant", help="after the rise; cosine ends at zero"
    )
    learning.add_argument("--max_grad_norm", type=positive, default=10.0, help="longer gradients are scaled down")
    schedule = "of the Karras schedule; images span [-1, 1]"
    learning.add_argument("--sigma_min", type=noise, default=diffusion.SIGMA_MIN, help=f"least noise {schedule}")
    learning.add_argument("--sigma_max", type=noise, default=diffusion.SIGMA_MAX, help=f"most noise {schedule}")
    return learning


def add_measuring(parser):
    """Flags of the two training scripts, for their last group."""
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--eval_every", type=natural, default=0,
        help="steps between two measurements of the averaged weights' images as by evaluate.py; the checkpoint of the "
        "least Frechet distance is kept as best.pt; 0: none",
    )
    measuring.add_argument("--eval_images", type=number(int, 64), default=2048, help="images of such a measurement")
    add_features(measuring)


def add_dataset(parser, dataset="cifar10", data_dir="data", flip=True):
    """Flags of the real images, for a parser or a group of it; None: those of the checkpoint."""
    otherwise = "" if dataset else "; default: the checkpoint's"
    parser.add_argument(
        "--dataset", choices=DATASETS, default=dataset, help=f"folder: any tree of <class>/<image>{otherwise}"
    )
    parser.add_argument(
        "--data_dir", type=path, default=data_dir,
        help=f"where cifar10 is, or is downloaded to; or the folder{otherwise}",
    )
    if flip:
        parser.add_argument(
            "--flip", type=number(int, 0, 1), default=1 if dataset else None,
            help=f"1: mirror half of the images, 0: none{otherwise}",
        )


def add_sampling(parser):
    """Flags of what makes images of a checkpoint."""
    parser.add_argument("--num_steps", type=count, default=18, help="Heun steps, for a teacher")
    parser.add_argument(
        "--temperature", type=noise, default=1.0,
        help="standard deviation of the noise that images begin with, 1 in training; a student's vary more above it",
    )
    add_cfg(parser, "a teacher")


def add_cfg(parser, whose):
    parser.add_argument(
        "--cfg_scale", type=weight, default=1.0, help=f"classifier-free guidance of {whose}, 1: none"
    )
    parser.add_argument(
        "--cfg_interval", type=number(float, 0), nargs=2, metavar=("LOW", "HIGH"),
        help="noise levels above LOW up to HIGH at which this and autoguidance act; default: all",
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
