"""Sample a checkpoint: a student in one step (or as many as it was trained for), or a teacher with Heun's method.

    python sample.py                                                     # runs/dmd2 -> grid.png
    python sample.py --checkpoint runs/teacher --num_steps 18 --out teacher.png
    python sample.py --labels cat dog 8 --num_images 30
    python sample.py --num_images 50000 --npz samples.npz                # for evaluation
    python sample.py --images DIR                                        # also single images, DIR/cat_00003.png, ...
    python sample.py --walk walk.gif                                     # the grid, its noise moving to the next seed's

Image i depends only on --seed, i and its label. Without --labels its class is i modulo the number of classes, so that
each row of the grid is one class.
"""

import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")       # which torch reads when it is loaded

import settings
from support import errors

if __name__ == "__main__":                          # --help and wrong flags, before torch, which takes seconds to load
    errors.early(settings.sample_parser)

import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support import checkpoint, files, hardware, networks, pictures, processes, resume, sampling, teachers
from support.data import to_float
from support.image_files import few

GRID_IMAGES, GRID_ROWS = 1000, 100                  # at most, in a grid
WALK_FRAMES, WALK_MILLISECONDS = 30, 60             # of --walk in one direction; how long each is shown


def parse_args(argv=None):
    args = settings.sample_parser().parse_args(argv)
    args.checkpoint = checkpoint.or_shipped(args.checkpoint, "runs/dmd2", "student.pt")
    return args


def class_indices(names, classes):
    """Class numbers of --labels, which are numbers or names."""
    numbers = {str(i): i for i in range(len(classes))} | {name: i for i, name in enumerate(classes)}
    for name in names:
        if name not in numbers:
            raise errors.UsageError(f"--labels {name}: the classes are 0..{len(classes) - 1}: {few(classes)}")
    return [numbers[name] for name in names]


@processes.main_only
def write_images(folder, images, names):
    """Write images, uint8 [N, 3, H, W], as folder/<name>_<index>.png."""
    prefixes = {name: files.portable(f"{name}_") for name in names}
    changed = [f"{name} as {prefix[:-1]}" for name, prefix in prefixes.items() if prefix != f"{name}_"]
    if changed:
        print(f"note: in the file names of --images: {few(changed)}", file=sys.stderr)
    for i, (pixels, name) in enumerate(zip(images.permute(0, 2, 3, 1).numpy(), names, strict=True)):
        path = Path(folder, f"{prefixes[name]}{i:05d}.png")
        files.write(path, lambda file, pixels=pixels: Image.fromarray(pixels).save(file, format="png"))


def main(argv=None):
    args = parse_args(argv)
    device = hardware.start(args)
    state = checkpoint.load(args.checkpoint)
    cfg = teachers.sampling_cfg(args, state, device)
    rows = class_indices(args.labels or state["classes"], state["classes"])
    labels = torch.tensor(rows)[torch.arange(args.num_images) % len(rows)]          # [N]
    with resume.restoring(args.checkpoint):
        size = networks.image_size(state["model_config"])
        sample = sampling.sampler(state, device, args.num_steps, cfg, args.temperature, args.compile)

    def generate(labels, **how):
        with hardware.autocast(device, args.precision):
            return sampling.generate(sample, size, args.seed, labels, args.batch_size, device, **how)

    shown = torch.arange(min(len(labels), GRID_IMAGES))
    shown = shown[shown % len(rows) < GRID_ROWS]                    # of the first images those of the first rows

    def grid(images):
        return pictures.class_grid(to_float(images[shown]), min(len(rows), GRID_ROWS))

    start = time.perf_counter()
    images = generate(labels, bar=True)
    rate = len(images) / (time.perf_counter() - start)

    files.write(args.out, lambda file: pictures.save_png(grid(images), file))
    if args.walk:
        steps = tqdm(range(WALK_FRAMES + 1), unit="frame", disable=not processes.MAIN)
        frames = [grid(generate(labels[:GRID_IMAGES], walk=step / WALK_FRAMES)) for step in steps]
        first, *others = map(pictures.image, frames)
        others += others[-2::-1]                    # and back, to where the loop begins
        files.write(args.walk, lambda file: first.save(
            file, format="gif", save_all=True, append_images=others, duration=WALK_MILLISECONDS, loop=0))
    if args.npz:
        arrays = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.numpy()
        files.write(args.npz, lambda file: np.savez(file, *arrays))
    if args.images:
        write_images(args.images, images, [state["classes"][label] for label in labels])
    if len(shown) < len(images):
        classes = f" and {GRID_ROWS} of {len(rows)} classes" if len(rows) > GRID_ROWS else ""
        processes.main_only(print)(f"{args.out} shows {len(shown)} of {len(images)} images{classes}")
    nfe = sampling.evaluations(state, args.num_steps, cfg)
    processes.main_only(print)(
        f"{state['kind']} at step {state['step']}: {len(images)} images, {nfe} evaluation{'s' * (nfe > 1)} each, "
        f"{rate:.1f} images/s, {', '.join(filter(None, (args.out, args.npz, args.images, args.walk)))}"
    )


if __name__ == "__main__":
    errors.run(main)
