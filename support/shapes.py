"""The built-in dataset `shapes`: ten anti-aliased figures on a dark background, drawn from a seed, nothing to download.

    images, labels = draw(1000, seed=0, size=32)     # uint8 [1000, 3, 32, 32], int64 [1000]

Image i depends on (seed, n) alone, so each new seed gives fresh test images of the same distribution; another size
shows the same figures in more or fewer pixels. Poses and colours vary little on purpose: a small network learns the
dataset in minutes on a laptop.
"""

import numpy as np

UNITS = 32                                          # lengths are in 32nds of an image's side
SUPERSAMPLE = 4                                     # sub-pixels a side; 16 coverage levels per pixel


def star(x, y):
    """Five-pointed star of outer radius 1, one point up."""
    angle = np.mod(np.arctan2(x, -y), 2 * np.pi / 5) - np.pi / 5                    # 0 between two points
    radius = np.hypot(x, y)
    tip, notch = np.pi / 5, 0.45                    # a straight edge runs from (notch, 0) to (1, tip) in polar form
    ax, ay = notch, 0.0
    bx, by = np.cos(tip), np.sin(tip)
    px, py = radius * np.cos(angle), radius * np.abs(np.sin(angle))
    return (bx - ax) * (py - ay) - (by - ay) * (px - ax) > 0


# A point (x, y), y downwards, is inside the figure where the formula holds; each fits a disk of radius about 1.
FIGURES = {
    "disk": lambda x, y: x**2 + y**2 < 0.85**2,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.75,
    "triangle": lambda x, y: (y < 0.7) & (y > 2 * abs(x) - 0.95),
    "diamond": lambda x, y: abs(x) / 0.7 + abs(y) < 1,
    "plus": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.25) & (np.maximum(abs(x), abs(y)) < 0.95),
    "cross": lambda x, y: (np.minimum(abs(x + y), abs(x - y)) < 0.34) & (np.maximum(abs(x), abs(y)) < 0.8),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.72) < 0.2,
    "star": star,
    "crescent": lambda x, y: (x**2 + y**2 < 0.9**2) & ((x - 0.45) ** 2 + y**2 > 0.72**2),
    "bars": lambda x, y: (abs(x) < 0.85) & (abs(abs(y) - 0.5) < 0.22),
}
CLASSES = list(FIGURES)
# Red, yellow, green, blue and white: as far apart as five can be, so that a generated colour in between is visible.
COLOURS = np.array([[230, 60, 60], [235, 220, 70], [90, 200, 80], [80, 120, 240], [235, 235, 235]], dtype=np.float32)
BACKGROUND = np.array([20, 20, 28], dtype=np.float32)


def draw(n, seed, size):
    """Draw n images, classes in turn.

    Returns:
        images: uint8 [n, 3, size, size] RGB.
        labels: int64 [n], indices into CLASSES; labels[i] = i mod 10.
    """
    rng = np.random.default_rng([0x5AFE5, seed])
    labels = np.arange(n) % len(CLASSES)
    radius = rng.uniform(10.5, 11.5, n).astype(np.float32)
    centre = UNITS / 2 + rng.uniform(-1, 1, (2, n)).astype(np.float32)
    angle = np.deg2rad(rng.uniform(-6, 6, n)).astype(np.float32)
    mirror = rng.choice(np.array([-1, 1], dtype=np.float32), n)                     # so a flip keeps the distribution
    colour = COLOURS[rng.integers(len(COLOURS), size=n)]                            # [n, 3]

    images = np.empty((n, 3, size, size), dtype=np.uint8)
    side = size * SUPERSAMPLE
    grid = (np.arange(side, dtype=np.float32) + 0.5) / (side / UNITS)               # centres of the sub-pixels
    for label, inside in enumerate(FIGURES.values()):
        figures = np.arange(label, n, len(CLASSES))
        # Two of 32x32 at a time: their arrays are small enough for malloc to use the same memory again.
        for chunk in np.array_split(figures, max(1, len(figures) * size**2 // (2 * 32**2))):
            u = (grid[None, None, :] - centre[0, chunk, None, None]) / (mirror * radius)[chunk, None, None]
            v = (grid[None, :, None] - centre[1, chunk, None, None]) / radius[chunk, None, None]
            cos, sin = np.cos(angle[chunk])[:, None, None], np.sin(angle[chunk])[:, None, None]
            cover = inside(cos * u + sin * v, cos * v - sin * u)                    # [m, side, side] bool
            cover = cover.reshape(-1, size, SUPERSAMPLE, size, SUPERSAMPLE).mean((2, 4), dtype=np.float32)
            cover = cover[:, None]                                                  # [m, 1, size, size]
            pixels = cover * colour[chunk, :, None, None] + (1 - cover) * BACKGROUND[:, None, None]
            images[chunk] = np.rint(pixels)
    return images, labels
