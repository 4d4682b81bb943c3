"""The denoising loss of a teacher on images that it has not seen: a quieter measure of its training than a distance.

    python results/heldout_loss.py --checkpoint runs/teacher --name "teacher, Adam"

For each of a few noise levels: the mean of w(sigma) (x0_hat - x_0)^2 over 1,000 images of the test split, with the
Karras weight and always the same noise. What --out holds of other names is kept, so that one file compares them.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import cli
import diffusion
import records
from data import to_float
from randomness import image_noise
from runtime import autocast

SIGMAS = (0.05, 0.15, 0.4, 1.0, 2.5, 8.0)
IMAGES = 1000


def main():
    parser = cli.Parser(description="The denoising loss of a teacher on the test split.")
    cli.add_common(parser)
    parser.add_argument("--checkpoint", type=cli.path, default="runs/teacher", help="run folder or checkpoint")
    cli.add_dataset(parser, "images, by default those that the checkpoint was trained on", None, None, flip=False)
    parser.add_argument("--name", default="teacher", help="what to call it in --out")
    parser.add_argument("--out", type=cli.path, default="results/heldout_loss.json", help="JSON file, added to")
    args = parser.parse_args()
    device = cli.device(args)
    state = checkpoint.load(args.checkpoint, kind="teacher")
    dataset = cli.dataset(args, state, split="test")
    net = checkpoint.ema_model(state, device)
    rows = torch.arange(IMAGES) * len(dataset.images) // IMAGES     # as many of each class where they are in order
    x_0 = to_float(dataset.images[rows]).to(device)
    labels, eps = dataset.labels[rows].to(device), image_noise(args.seed, rows).to(device)
    losses = {}
    for sigma in SIGMAS:
        total = 0.0
        for x, e, y in zip(x_0.split(250), eps.split(250), labels.split(250), strict=True):
            with torch.no_grad(), autocast(device, args.precision):
                x0_hat = net(x + sigma * e, sigma, y)
            total += ((x0_hat - x) ** 2).sum().item()
        losses[str(sigma)] = diffusion.karras_weight(sigma) * total / x_0.numel()
    rows = json.loads(Path(args.out).read_text()).get("rows", {}) if Path(args.out).exists() else {}
    command = " ".join(["python results/heldout_loss.py", *sys.argv[1:]])
    rows[args.name] = dict(mean=sum(losses.values()) / len(losses), losses=losses, step=state["step"], command=command)
    records.write_json(args.out, dict(rows=rows, images=IMAGES), device)
    print(f"{args.name}: {rows[args.name]['mean']:.4f} {losses}")


if __name__ == "__main__":
    cli.run(main)
