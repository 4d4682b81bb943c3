"""Train a feature network for evaluate.py, in place of Inception: a classifier of a dataset, saved by torch.export.

    python -m tools.features --dataset shapes                         # half a minute on a CPU; into features.pt2
    python -m tools.features --dataset cifar10 --out cifar10.pt2      # photographs: eleven minutes
    python evaluate.py --checkpoint runs/demo/dmd2 --feature_extractor features.pt2

Distances in its features compare runs on this dataset with one another; they do not compare with FID. For `shapes` it
learns from fresh images, for other datasets from the images that teacher and student are trained on.
"""

import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")       # which torch reads when it is loaded

import math

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from support import archive, data, errors, flags, hardware, metrics, shapes
from support.optimizers import Optimizer
from support.randomness import StepRandom

SHAPES_IMAGES = 20_000
SHAPES_TRAIN, SHAPES_TEST = 101, 102                # seeds; data.py draws its two splits from 0 and 1


class Classifier(nn.Module):
    """uint8 [N, 3, H, W] -> features [N, D], logits [N, classes]; body: float images in [-1, 1] -> features."""

    def __init__(self, body, width, classes):
        super().__init__()
        self.body, self.out = body, nn.Linear(width, classes)

    def forward(self, images):
        features = self.body(data.to_float(images))
        return features, self.out(features)


def small_body(size):
    """128 features: enough for the figures of `shapes`."""
    def stage(c_in, c_out):                         # halves the resolution
        return nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()

    return nn.Sequential(
        *stage(3, 32), *stage(32, 64), *stage(64, 128), nn.Flatten(), nn.Linear(128 * (size // 8) ** 2, 128), nn.ReLU()
    )


def conv_body(size):
    """256 features; most work is at 1/2 and 1/4 of the resolution, as in airbench (Jordan 2024, arXiv 2404.00498)."""
    def conv(c_in, c_out, *pool):
        return nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), *pool, nn.BatchNorm2d(c_out), nn.ReLU()

    def stage(c_in, c_out):                         # halves the resolution
        return *conv(c_in, c_out, nn.MaxPool2d(2)), *conv(c_out, c_out)

    return nn.Sequential(
        *conv(3, 32), *stage(32, 64), *stage(64, 256), *stage(256, 256), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def noised(x, flip, rng):
    return (x + 12 * torch.randn_like(x)).clamp(0, 255)         # 12 of 255: samples have noise too


def shifted(x, flip, rng):
    """Shift each image by up to an eighth of its size, with reflection padding; with flip, also mirror half of them."""
    n, size = len(x), x.shape[-1]
    pad, pixels = size // 8, torch.arange(size, device=x.device)
    rows, columns = (rng.integers(0, 2 * pad, n, 1) + pixels for _ in range(2))     # [B, H] each
    padded = F.pad(x, (pad,) * 4, mode="reflect").permute(0, 2, 3, 1)               # [B, 5/4 H, 5/4 W, 3]
    x = padded[torch.arange(n, device=x.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    x = x.permute(0, 3, 1, 2)                                                       # [B, 3, H, W]
    return data.random_flip(x, rng) if flip else x


# The network, its training (factor: of the learning rate, at a fraction t of the steps), and vary, the augmentation of
# images [B, 3, H, W] in [0, 255]. `shapes` takes float32, as for the numbers in results/.
FIGURES = dict(
    body=small_body, width=128, epochs=3, batch_size=100, optimizer="adam", lr=1e-3, factor=lambda t: 1.0,
    label_smoothing=0.0, precision="fp32", vary=noised,
)
PHOTOGRAPHS = dict(
    body=conv_body, width=256, epochs=10, batch_size=200, optimizer="muon", lr=4e-3,
    factor=lambda t: min(20 * t, 1 - t), label_smoothing=0.1, precision="auto", vary=shifted,
)


def train(net, dataset, recipe, args, device):
    images, labels = dataset.images.to(device), dataset.labels.to(device)
    forward = torch.compile(net) if args.compile else net
    precision = args.precision if recipe["precision"] == "auto" else recipe["precision"]
    optimizer = Optimizer(recipe["optimizer"], {net: recipe["lr"]}, hardware.uses_bf16(device, precision))
    n = min(recipe["batch_size"], math.ceil(len(images) / 10))     # few images: BatchNorm's averages need steps too
    steps = args.epochs * math.ceil(len(images) / n)
    rows = (rows for _ in range(args.epochs) for rows in torch.randperm(len(images)).to(device).split(n))
    for step, batch in enumerate(tqdm(rows, total=steps, unit="step")):
        x = recipe["vary"](images[batch].float(), args.flip, StepRandom(args.seed, step, device))   # [B, 3, H, W]
        with hardware.autocast(device, precision):
            logits = forward(x.to(memory_format=torch.channels_last))[1]
        loss = F.cross_entropy(logits.float(), labels[batch], label_smoothing=recipe["label_smoothing"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(recipe["factor"](step / steps))


def read(args, split):
    """A split of the dataset; for `shapes`, images that no other script uses."""
    if args.dataset != "shapes":
        return data.load(args.dataset, args.data_dir, split, size=args.image_size)
    n, seed = (SHAPES_IMAGES, SHAPES_TRAIN) if split == "train" else (5000, SHAPES_TEST)
    images, labels = (torch.from_numpy(array) for array in shapes.draw(n, seed + 1000 * args.seed, args.image_size))
    return data.Dataset(images, labels, shapes.CLASSES)


def parse_args(argv=None):
    parser = flags.Parser(description="Train and save a feature network for the images of a dataset.")
    flags.add_common(parser)
    flags.add_dataset(parser.add_argument_group("images to learn from"))
    flags.add_image_size(parser)
    parser.add_argument("--epochs", type=flags.count, help="passes over the data; default: 3 for shapes, 10 for others")
    parser.add_argument("--out", type=flags.output(), default="features.pt2", help="output file, for evaluate.py")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    args.flip = data.named(args, None)[2]
    device = hardware.start(args)
    recipe = FIGURES if args.dataset == "shapes" else PHOTOGRAPHS
    args.epochs = args.epochs or recipe["epochs"]
    dataset = read(args, "train")
    if len(dataset.classes) == 1:
        raise errors.UsageError(f"--dataset {args.dataset} has one class, {dataset.classes[0]}, and a classifier "
                                "needs two: measure with Inception, or with tools.imagenet_features")
    print(f"{args.dataset}: {dataset}")
    torch.manual_seed(args.seed)
    net = Classifier(recipe["body"](args.image_size), recipe["width"], len(dataset.classes))
    net = net.to(device, memory_format=torch.channels_last)
    train(net, dataset, recipe, args, device)
    archive.save(net, args.out, args.image_size, dataset.classes)
    print(args.out)
    try:
        test = read(args, "test")
        if test.classes != dataset.classes:
            raise data.DataError("the classes of its test images are others")
    except data.DataError as error:                 # a folder may have no test split
        print(f"accuracy unknown: {error}")
        return
    _, logits = metrics.exported(args.out, args.image_size, device)(test.images)
    print(f"{100 * (logits.argmax(1) == test.labels).double().mean():.2f} % of {len(test.images)} test images right")


if __name__ == "__main__":
    errors.run(main)
