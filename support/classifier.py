"""Classifier: a small feature network of a dataset, which tools.features trains.

    net = load("features.pt2", size=32)             # frozen
    maps = net.maps(x)                              # activations [B, C, h, w] of several resolutions

evaluate.py measures with its features; the discriminator of gan.py can read its activations.
"""

from pathlib import Path

import torch
from torch import nn

from support import archive, data
from support.errors import UsageError


class Classifier(nn.Module):
    """uint8 [N, 3, H, W] -> features [N, D], logits [N, classes]; body: float images in [-1, 1] -> features."""

    def __init__(self, body, width, classes):
        super().__init__()
        self.body, self.out = body, nn.Linear(width, classes)

    def forward(self, images):
        features = self.body(data.to_float(images))
        return features, self.out(features)

    def maps(self, x):
        """Float images [B, 3, H, W] in [-1, 1] -> the last activations of each resolution, a list of [B, C, h, w]."""
        last = {}
        for layer in self.body:
            x = layer(x)
            if isinstance(layer, nn.ReLU) and x.ndim == 4:
                last[x.shape[-1]] = x
        return list(last.values())


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


def load(path, size):
    """The classifier that tools.features saved at this path, frozen; no pickled code is run.

    Its feature_channels are the channels of its maps.

    Raises:
        UsageError: the file is missing, holds something else, or a network of images of another size.
    """
    try:
        program = torch.export.load(archive.without_pickles(Path(path).read_bytes()))
        weights, shape = program.state_dict, program.example_inputs[0][0].shape
        classes, width = weights["out.weight"].shape
        net = Classifier({128: small_body, 256: conv_body}[width](shape[-1]), width, classes)
        net.load_state_dict(weights)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:                      # any layer of the reader
        raise UsageError(f"{path} is no network of tools.features: {str(error).splitlines()[0]}") from error
    if shape[-1] != size:
        raise UsageError(f"{path} is for images of {shape[-1]} pixels a side, not {size}")
    net.feature_channels = [h.shape[1] for h in net.eval().maps(torch.zeros(1, 3, size, size))]
    return net.requires_grad_(False)
