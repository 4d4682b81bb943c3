"""The flags that scripts share, and the types of their values.

    parser = flags.Parser(description="...")
    flags.add_common(parser)
    parser.add_argument("--lr", type=flags.rate, default=1e-3)
"""

import argparse
import math
import os
from pathlib import Path

from constants import IMAGE_SIZE
from support.errors import UsageError

# What support/published.py and support/data.py load.
DATASETS = ("cifar10", "cifar100", "mnist", "fashion_mnist", "svhn", "stl10", "folder", "shapes")


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
        """The names of the flags on the command line."""
        unset = object()
        found = super().parse_args(args, argparse.Namespace(**{action.dest: unset for action in self._actions}))
        return {name for name, value in vars(found).items() if value is not unset}

    def take_preset(self, presets, args=None):
        """Let the preset (name -> dict of defaults) that --preset names on the command line give the defaults.

        Sets preset, its name or None, and plain, the defaults that it has replaced. Returns the parser.
        """
        first = Parser(add_help=False)
        first.add_argument("--preset")
        self.preset = first.parse_known_args(args)[0].preset
        if self.preset is not None and self.preset not in (*presets, "none"):
            raise UsageError(f"unknown preset {self.preset!r}: choose one of {', '.join(presets)}, none")
        chosen = presets.get(self.preset, {})
        self.plain = {name: self.get_default(name) for name in chosen}
        self.set_defaults(**chosen)
        return self

    def error(self, message):
        raise UsageError(f"{message} (see --help)")


def number(kind, low, high=math.inf, open_low=False, multiple_of=None):
    """An argparse type: an int or float in [low, high], or (low, high]; NaN and infinity are refused."""
    high = min(high, 10**12) if kind is int else high

    def parse(text):
        value = kind(text)
        inside = (low < value if open_low else low <= value) and value <= high      # NaN is not
        if not inside or value == math.inf:
            limit = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if open_low else 'at least'} {low}{limit}")
        if multiple_of and value % multiple_of:
            raise argparse.ArgumentTypeError(f"{text} is not a multiple of {multiple_of}")
        return value

    parse.__name__ = kind.__name__                  # argparse names it in "invalid int value"
    return parse


count = number(int, 1)
natural = number(int, 0)
positive = number(float, 0, open_low=True)
fraction = number(float, 0, 1)
# Beyond these limits float32 overflows in the first step.
rate = number(float, 0, 1, open_low=True)
weight = number(float, 0, 1e6)
noise = number(float, 1e-4, 1e4)


def path(text):
    """An argparse type: a name that the file system can have; ~ is the home, as in a shell."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    text = os.path.expanduser(text)                 # a shell leaves the ~ in --flag=~/x as it is
    try:
        os.lstat(text)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:          # too long, through a file, unreadable; a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: {reason}") from error
    return text


def output(kind="file", suffix="", new=False):
    """An argparse type: the name of a file or folder to write; folders above it are made where there are none.

    Args:
        kind: "file" or "folder".
        suffix: what the name must end in, ".png" for instance.
        new: whether nothing may be there yet: no file, and no folder that is not empty.
    """
    def parse(text):
        text = path(text)
        place = Path(text).resolve()
        if suffix and place.suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"{text} does not end in {suffix}")
        if place.exists() and place.is_dir() != (kind == "folder"):
            raise argparse.ArgumentTypeError(f"cannot write {text}: it is a {'file' if kind == 'folder' else 'folder'}")
        existing = next(parent for parent in (place, *place.parents) if parent.exists())
        folder = place.parent if place.is_file() else existing  # a file is replaced, which its folder must allow
        if not folder.is_dir() or not os.access(folder, os.R_OK | os.W_OK):
            raise argparse.ArgumentTypeError(f"cannot write {text}: {folder} is not a writable folder")
        if new and place.exists() and (kind == "file" or os.listdir(place)):
            holds = " and is not empty" if kind == "folder" else ""
            raise argparse.ArgumentTypeError(f"{text} is there already{holds}: remove it, or give another name")
        return text

    parse.__name__ = "path"
    return parse


def add_common(parser, compile=False):
    """Flags of every script; compile: the default of --compile, None where the device decides."""
    parser.add_argument("--seed", type=natural, default=0, help="random seed")
    parser.add_argument("--device", default="auto", help="auto (CUDA or MPS if there is one), cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--precision", choices=["auto", "bf16", "fp16", "tf32", "fp32"], default="auto",
        help="arithmetic of the networks: auto is bf16 where the hardware has it, else float32; fp16 is for old GPUs; "
        "weights and preconditioning stay float32",
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=compile,
        help="torch.compile: slower to start, then faster" + ("; default: on CUDA" if compile is None else ""),
    )


def add_image_size(parser, default=IMAGE_SIZE, help=None):
    parser.add_argument(
        "--image_size", type=number(int, 16, 128, multiple_of=8), default=default,
        help=help or "height and width of the images, a multiple of 8 from 16 to 128",
    )


def add_channels(parser):
    parser.add_argument(
        "--channels", type=number(int, 8, multiple_of=8), default=64, help="base width of the network, a multiple of 8"
    )


def add_training(parser, presets, run_dir, steps, batch_size, sample_every, save_every):
    """Flags of both training scripts. Returns the group of those about learning, for a script to add its own."""
    parser.add_argument(
        "--preset", help=f"a named set of defaults, shown by --preset NAME --help: {', '.join(presets)}, or none: the "
        "papers' losses without additions; default: the one for these images and this machine",
    )
    parser.add_argument(
        "--run_dir", type=output("folder"), default=run_dir,
        help="folder for checkpoints, logs and grids; a relative path is relative to the current directory",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --run_dir with its settings, if there is one"
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--overwrite", action="store_true", help="replace the run in --run_dir by a new one")
    run.add_argument("--steps", type=count, default=steps, help="total steps, including those before a resume")
    run.add_argument(
        "--max_minutes", type=positive, help="save and stop after so many minutes, then --resume; default: no limit"
    )
    run.add_argument("--log_every", type=count, default=50, help="steps between two log lines")
    run.add_argument("--sample_every", type=count, default=sample_every, help="steps between two image grids")
    run.add_argument(
        "--save_every", type=count, default=save_every,
        help="steps between two checkpoints; there is one every ten minutes at least",
    )
    add_common(run)
    run.add_argument(
        "--record", action=argparse.BooleanOptionalAction, default=True,
        help="with --compile on one GPU: capture a step as a CUDA graph and replay it",
    )
    return add_learning(parser, batch_size)


def add_learning(parser, batch_size):
    """Flags of what trains networks. Returns their group, for a script to add its own."""
    learning = parser.add_argument_group("how the networks learn")
    learning.add_argument("--batch_size", type=count, default=batch_size, help="images per step")
    learning.add_argument(
        "--accumulate", type=count, default=1, help="microbatches per batch, one after another, to save memory"
    )
    learning.add_argument(
        "--optimizer", choices=["adam", "muon"], default="adam",
        help="muon: Muon for the convolutions inside the networks, Adam for the rest",
    )
    learning.add_argument(
        "--warmup_steps", type=natural, default=100,
        help="steps of linear learning-rate warm-up; for a student in the DMD2 phase only",
    )
    learning.add_argument(
        "--lr_schedule", choices=["cosine", "constant"], default="constant",
        help="after the warm-up; cosine ends at zero; a student's fit is always cosine",
    )
    learning.add_argument("--max_grad_norm", type=positive, default=10.0, help="gradients are clipped to this norm")
    return learning


def add_measuring(parser):
    """Flags of both training scripts: --eval_every and what it measures with."""
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--eval_every", type=natural, default=0,
        help="steps between two measurements of the EMA's images, as evaluate.py makes them; the checkpoint with the "
        "lowest Frechet distance is kept as best.pt; 0: none",
    )
    measuring.add_argument("--eval_images", type=number(int, 64), default=2048, help="images per measurement")
    add_features(measuring)


def add_dataset(parser, dataset="cifar10", data_dir="data", flip=True):
    """Flags of the real images, for a parser or a group of it; where a default is None, the checkpoint names them."""
    otherwise = "" if dataset else "; default: the checkpoint's"
    parser.add_argument(
        "--dataset", choices=DATASETS, default=dataset, help="folder: a tree of <class>/<image>, or images "
        f"without classes; shapes: figures that are drawn; all others are downloaded{otherwise}",
    )
    parser.add_argument(
        "--data_dir", type=path, default=data_dir,
        help="with --dataset folder, that folder; else where downloads are kept; a relative path is relative to the "
        f"current directory, and is remembered as an absolute one{otherwise}",
    )
    if flip:
        parser.add_argument(
            "--flip", type=number(int, 0, 1),
            help="1: mirror half of the images; 0: none; default: 1, but 0 for the digits of mnist and svhn"
            + ("" if dataset else "; where the checkpoint names its images, as it was trained"),
        )


def add_sampling(parser):
    """Flags of the scripts that sample a checkpoint."""
    parser.add_argument("--num_steps", type=count, default=18, help="Heun steps of a teacher")
    parser.add_argument(
        "--temperature", type=noise, default=1.0,
        help="standard deviation of the initial noise; it is 1 in training; above 1 a student's images vary more",
    )
    add_cfg(parser, "a teacher")


def add_cfg(parser, whose):
    parser.add_argument(
        "--cfg_scale", type=weight, default=1.0, help=f"classifier-free guidance of {whose}; 1: none"
    )
    parser.add_argument(
        "--cfg_interval", type=number(float, 0), nargs=2, metavar=("LOW", "HIGH"),
        help="noise levels (LOW, HIGH] at which this and autoguidance act; default: all",
    )
    parser.add_argument(
        "--autoguidance_scale", type=weight, default=1.0, help=f"guidance of {whose} by a weaker teacher; 1: none"
    )
    parser.add_argument(
        "--guide", type=path, help="the weaker teacher; default: guide.pt, which train0.py saves beside the teacher"
    )


def add_features(parser):
    """Flags of the scripts that measure images."""
    parser.add_argument(
        "--feature_extractor", type=path, help="a network saved by torch.export, uint8 [N, 3, H, W] -> features or "
        "(features, logits); it is a program, so take it from people you trust. Default: Inception, downloaded once",
    )
    parser.add_argument(
        "--inception_weights", type=path, help="file of Inception's weights; default: in torch.hub's folder"
    )
    parser.add_argument(
        "--cache_dir", type=path, default="~/.cache/dmd2",
        help="keeps the features of datasets, and the resized images of folders that take more than a second to read"
    )
