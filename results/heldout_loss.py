"""The denoising loss of a teacher on images that it has not seen: a quieter measure of its training than a distance.

    python results/heldout_loss.py --checkpoint weights/teacher.pt runs/teacher

For each of a few noise levels: the mean of w(sigma) (x0_hat - x_0)^2 over 1,000 images of the test split, with the
Karras weight and always the same noise. Several checkpoints in one call make one file that compares them.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import cli
import records
from data import to_float
from randomness import image_noise
from runtime import autocast

import diffusion

SIGMAS = (0.05, 0.15, 0.4, 1.0, 2.5, 8.0)
IMAGES = 1000


@torch.no_grad()
def losses(net, x_0, labels, eps, precision):
    """Mean loss at each of SIGMAS, for images and unit noise [N, 3, 32, 32] and labels [N]."""
    found = {}
    for sigma in SIGMAS:
        total = 0.0
        for x, y, e in zip(x_0.split(250), labels.split(250), eps.split(250), strict=True):
            with autocast(x.device, precision):
                x0_hat = net(x + sigma * e, sigma, y)
            total += ((x0_hat - x) ** 2).sum().item()
        found[str(sigma)] = diffusion.karras_weight(sigma) * total / x_0.numel()
    return found


def main():
    parser = cli.Parser(description="The denoising loss of teachers on the test split.")
    cli.add_common(parser)
    parser.add_argument("--checkpoint", type=cli.path, nargs="+", default=["runs/teacher"], help="run folders or files")
    cli.add_dataset(parser, "images, by default the first checkpoint's", None, None, flip=False)
    parser.add_argument("--out", type=cli.path, default="results/heldout_loss.json", help="where to write the JSON")
    args = parser.parse_args()
    device = cli.device(args)
    states = [checkpoint.load(path, kind="teacher") for path in args.checkpoint]
    dataset = cli.dataset(args, states[0], split="test")
    picked = torch.arange(IMAGES) * len(dataset.images) // IMAGES   # as many of each class where they are in order
    x_0, eps = to_float(dataset.images[picked]).to(device), image_noise(args.seed, picked).to(device)
    rows = []
    for path, state in zip(args.checkpoint, states, strict=True):
        found = losses(checkpoint.ema_model(state, device), x_0, dataset.labels[picked].to(device), eps, args.precision)
        rows.append(dict(checkpoint=path, step=state["step"], mean=sum(found.values()) / len(found), losses=found))
        print(f"{path}: {rows[-1]['mean']:.4f}")
    records.write_json(args.out, dict(rows=rows, images=IMAGES, seed=args.seed), device)


if __name__ == "__main__":
    cli.run(main)
