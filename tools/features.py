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
from tqdm import tqdm

from support import archive, data, errors, flags, hardware, metrics, shapes
from support.classifier import Classifier, conv_body, small_body
from support.optimizers import Optimizer
from support.randomness import StepRandom

SHAPES_IMAGES = 20_000
SHAPES_TRAIN, SHAPES_TEST = 101, 102                # seeds; data.py draws its two splits from 0 and 1


def noised(x, flip, rng):
    return (x + 12 * torch.randn_like(x)).clamp(0, 255)         # 12 of 255: samples have noise too


def shifted(x, flip, rng):
    """Shift each image by up to an eighth of its size; with flip, also mirror half of them."""
    x = data.random_shift(x, x.shape[-1] // 8, rng)                                 # [B, 3, H, W]
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
