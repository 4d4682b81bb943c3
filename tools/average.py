"""The mean of the weights of networks that went on from one and the same, as a checkpoint to sample from.

    python -m tools.average runs/a runs/b --out mean.pt
    python sample.py --checkpoint mean.pt

Such networks may err apart, and their mean less than each (model soups: Wortsman et al. 2022, arXiv 2203.05482, section
2). It is for students of one teacher, or runs of `--init`: weights of networks that began apart do not correspond.
"""

from pathlib import Path

from support import checkpoint, errors, flags, networks, resume

SAME = "kind", "classes", "model_config", "denoising_sigmas"    # of all that are averaged


def mean(paths):
    """The checkpoint of the mean of the averaged weights: the first's, without what only a resume needs.

    Raises:
        CheckpointError: one of them cannot be read, or its weights are not those of its network.
        UsageError: they are not of one kind, network, list of classes and list of noise levels.
    """
    first, total = None, {}
    for path in paths:
        state = checkpoint.load(path)
        with resume.restoring(path):
            weights = networks.averaged(state).state_dict()
        first = first or state
        for key in SAME:
            if state.get(key) != first.get(key):
                raise errors.UsageError(f"{path} and {paths[0]} differ in their {key}: there is no mean of them")
        total = {name: total.get(name, 0) + weight.double() for name, weight in weights.items()}
    average = {name: (weight / len(paths)).float() for name, weight in total.items()}
    return dict(checkpoint.slim(first), model_ema=average)


def parse_args(argv=None):
    parser = flags.Parser(prog="python -m tools.average", description="Average the weights of several checkpoints.")
    parser.add_argument("checkpoints", type=flags.path, nargs="+", help="run folders or checkpoints, two or more")
    parser.add_argument("--out", type=flags.path, required=True, help="the new file")
    args = parser.parse_args(argv)
    if len(args.checkpoints) < 2:
        parser.error("name two checkpoints or more")
    if Path(args.out).exists():                     # it may be a run
        parser.error(f"{args.out} is there already: remove it, or name a new file")
    if not Path(args.out).resolve().parent.is_dir() or not flags.writable(args.out):
        parser.error(f"cannot write {args.out}: its folder is not there or not writable")
    return args


def main(argv=None):
    args = parse_args(argv)
    checkpoint.save(args.out, mean(args.checkpoints))
    print(f"{args.out}: the mean of {len(args.checkpoints)} networks")


if __name__ == "__main__":
    errors.run(main)
