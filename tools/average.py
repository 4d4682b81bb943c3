"""A model soup: the average of the weights of several runs with a common start, as a checkpoint to sample from.

    python -m tools.average runs/a runs/b --out mean.pt
    python sample.py --checkpoint mean.pt

The average can be better than each of them (Wortsman et al. 2022, arXiv 2203.05482, section 2). It is for students of
one teacher, or for runs with the same `--init`: the weights of networks with different starts do not correspond.
"""

from support import checkpoint, errors, flags, networks, resume

SAME = "kind", "classes", "model_config", "denoising_sigmas"    # must be equal in all that are averaged


def mean(paths):
    """A checkpoint with the average of the checkpoints' EMA weights; all else is the first's. It cannot be resumed.

    Raises:
        CheckpointError: one of them cannot be read, or its weights do not fit its network.
        UsageError: they differ in kind, network, classes or noise levels.
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
    parser.add_argument("--out", type=flags.output(new=True), required=True, help="the new file")
    args = parser.parse_args(argv)
    if len(args.checkpoints) < 2:
        parser.error("name two checkpoints or more")
    return args


def main(argv=None):
    args = parse_args(argv)
    checkpoint.save(args.out, mean(args.checkpoints))
    print(f"{args.out}: the mean of {len(args.checkpoints)} networks")


if __name__ == "__main__":
    errors.run(main)
