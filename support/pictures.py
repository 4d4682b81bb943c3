"""Grids of images."""

import torch
import torch.nn.functional as F
from PIL import Image

from support.data import to_uint8
from support.randomness import image_noise
from support.sampling import not_finite, refuse

MAX_ROWS = 16                                       # classes shown in the grids of a run


def class_grid(images, rows):
    """A picture, float [3, H, W] in [0, 1], of images [N, 3, H, W] in [-1, 1]; row r shows images r, r + rows, ...

    Raises NonFiniteError where an image holds NaN or infinity.
    """
    refuse(not_finite(images))
    blank = -torch.ones(-len(images) % rows, *images.shape[1:])
    images = torch.cat([images.cpu().float(), blank])                               # [rows * columns, 3, H, W]
    columns = len(images) // rows
    images = images.unflatten(0, (columns, rows)).transpose(0, 1).flatten(0, 1)
    images = to_uint8(images).float() / 255
    if len(images) == 1:
        return images[0]
    framed = F.pad(images, (2, 0, 2, 0), value=0.5).unflatten(0, (rows, columns))      # [rows, columns, 3, 34, 34]
    return F.pad(framed.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2), (0, 2, 0, 2), value=0.5)


def image(picture):
    """The PIL.Image of a picture, float [3, H, W] in [0, 1]."""
    return Image.fromarray((picture * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def save_png(picture, file):
    """Write a picture, float [3, H, W] in [0, 1], into an open file."""
    image(picture).save(file, format="png")


def side_by_side(*pictures):
    """Pictures of equal height, float [3, H, W], side by side with a gap between them."""
    gap = torch.ones(3, pictures[0].shape[1], 8)
    return torch.cat([part for picture in pictures for part in (gap, picture)][1:], dim=2)


def grid_inputs(seed, num_classes, size, device):
    """What the grids of a run show: rows, the labels [N] of 8 images each, and draw -> noise [N, 3, size, size]."""
    rows = min(num_classes, MAX_ROWS)
    labels = torch.arange(8 * rows, device=device) % rows
    return rows, labels, lambda draw: image_noise(seed, range(8 * rows), size, draw).to(device)
