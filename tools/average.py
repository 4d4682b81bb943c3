"""A model soup: the average of the weights of several runs with a common start, as a checkpoint to sample from.

    python -m tools.average runs/a runs/b --out mean.pt
    python sample.py --checkpoint mean.pt

The average can be better than each of them (Wortsman et al. 2022, arXiv 2203.05482, section 2). It is for students of
one teacher, or for teachers with the same `--init`: the weights of networks with different starts do not correspond.
"""

import sys

import torch

from support import checkpoint, errors, flags, networks, resume

SAME = "kind", "classes", "denoising_sigmas", "sigma_min", "sigma_max"      # must be equal in all that are averaged


def mean(paths):
    """Average the EMA weights of checkpoints.

    Returns:
        a checkpoint with their mean, all else the first's, which cannot be resumed; a line about what it is made of.

    Of students that do not say which teacher they are of, as the shipped one, that is said and not refused.

    Raises:
        CheckpointError: one of them cannot be read, or its weights do not fit its network.
        UsageError: they differ in kind, network, classes, noise levels or teacher, or their weights are not finite.
    """
    first, alike, total, said = None, {}, {}, []    # alike: what must be equal -> its value, and where it was found
    for path in paths:
        state = checkpoint.load(path)
        with resume.restoring(path):
            network = networks.averaged(state)
        weights = network.state_dict()
        if not all(torch.isfinite(weight).all() for weight in weights.values()):
            raise errors.UsageError(f"the weights of {path} are NaN or infinite")
        known = {key: state.get(key) for key in SAME} | dict(network=networks.described(network))
        if state.get("teacher_digest"):
            known["teacher"] = state["teacher_digest"]
        elif state["kind"] == "student":
            print(f"note: {path} does not say of which teacher it is", file=sys.stderr)
        for key, value in known.items():
            other, where = alike.setdefault(key, (value, path))
            if value != other:
                raise errors.UsageError(f"{path} and {where} differ in their {key}: there is no mean of them")
        first = first or state
        said.append(f"{checkpoint.find(path)} (step {state['step']})")
        total = {name: total.get(name, 0) + weight.double() for name, weight in weights.items()}
    average = {name: (weight / len(paths)).float() for name, weight in total.items()}
    state = dict(checkpoint.slim(first), model_ema=average)
    return state, f"the mean of {len(paths)} {first['kind']}s, {', '.join(said)}"


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
    state, said = mean(args.checkpoints)
    checkpoint.save(args.out, state)
    print(f"{args.out}: {said}")


if __name__ == "__main__":
    errors.run(main)
