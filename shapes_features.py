"""A feature network for `shapes`: a small classifier, trained on fresh images in half a minute, saved by torch.export.

    python shapes_features.py --out shapes_features.pt2
    python evaluate.py --checkpoint runs/demo/dmd2 --feature_extractor shapes_features.pt2

It has never seen the images that teacher and student learn from. On its own fresh test images it is right for all but a
few in a thousand; distances in its features compare runs on `shapes` with one another and mean nothing beside FID.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import cli
import records
import shapes

TRAIN_SEED, TEST_SEED = 101, 102                    # data.py draws its two splits from seeds 0 and 1


class Classifier(nn.Module):
    """uint8 [N, 3, 32, 32] -> features [N, 128], logits [N, 10]."""

    def __init__(self):
        super().__init__()
        def stage(c_in, c_out):                     # halves the resolution
            return nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()

        self.body = nn.Sequential(
            *stage(3, 32), *stage(32, 64), *stage(64, 128), nn.Flatten(), nn.Linear(128 * 4 * 4, 128), nn.ReLU()
        )
        self.out = nn.Linear(128, len(shapes.CLASSES))

    def forward(self, images):
        features = self.body(images.float() / 127.5 - 1)
        return features, self.out(features)


def train(num_images, epochs, seed):
    torch.manual_seed(seed)
    images, labels = (torch.from_numpy(array) for array in shapes.draw(num_images, TRAIN_SEED + 1000 * seed))
    net = Classifier()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(num_images).split(100):
            noise = 12 * torch.randn(len(rows), *images.shape[1:])                  # of 255: what samples have too
            loss = F.cross_entropy(net((images[rows] + noise).clamp(0, 255))[1], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def parse_args(argv=None):
    parser = cli.Parser(description="Train and save a feature network for the built-in dataset.")
    parser.add_argument("--out", type=cli.path, default="shapes_features.pt2", help="the network, for evaluate.py")
    parser.add_argument("--seed", type=cli.natural, default=0, help="of its images and its weights")
    parser.add_argument("--num_images", type=cli.number(int, 1000), default=20_000, help="fresh images to train on")
    parser.add_argument("--epochs", type=cli.count, default=3, help="passes over them")
    args = parser.parse_args(argv)
    if Path(args.out).is_dir() or not Path(args.out).resolve().parent.is_dir() or not cli.writable(args.out):
        parser.error(f"cannot write {args.out}: it is a folder, or its folder is not there or not writable")
    return args


def main(argv=None):
    args = parse_args(argv)
    net = train(args.num_images, args.epochs, args.seed)
    images, labels = (torch.from_numpy(array) for array in shapes.draw(5000, TEST_SEED + 1000 * args.seed))
    with torch.no_grad():
        accuracy = (net(images)[1].argmax(1) == labels).double().mean()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (images[:4],), dynamic_shapes=({0: batch},))
    records.write(args.out, lambda file: torch.export.save(program, file))
    print(f"{args.out}: {100 * accuracy:.2f} % of {len(images)} fresh test images right")


if __name__ == "__main__":
    cli.run(main)
