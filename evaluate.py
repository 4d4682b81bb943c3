"""Measure a checkpoint, or images made elsewhere, against a dataset: FID, KID, Inception Score, precision, recall.

    python evaluate.py                                                   # runs/dmd2 against its teacher's dataset
    python evaluate.py --checkpoint runs/teacher --num_steps 18
    python evaluate.py --npz samples.npz --dataset cifar10               # arr_0 uint8 [N, H, W, 3]
    python evaluate.py --images DIR --dataset folder --data_dir REAL
    python evaluate.py --feature_extractor features.pt2                  # distances in another network's features

Prints a table and writes one JSON with everything needed to do it again. Distances fall with the number of images: only
those of equal --num_images compare. Below 10,000 the name says how many they were (FID@2048), and a floor is given: the
distance of as many of the real images, equally many of each class.
"""

import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")       # which torch reads when it is loaded

import settings
from support import errors

if __name__ == "__main__":                          # --help and wrong flags, before torch, which takes seconds to load
    errors.early(settings.evaluate_parser)

import sys
import time

import numpy as np
import torch
import torch_fidelity

from constants import IMAGE_SIZE
from settings import LEAST_IMAGES
from support import (
    checkpoint,
    data,
    files,
    hardware,
    image_files,
    metrics,
    networks,
    processes,
    records,
    resume,
    sampling,
    teachers,
    validation,
)


def parse_args(argv=None):
    parser = settings.evaluate_parser()
    args = parser.parse_args(argv)
    if args.npz or args.images:
        args.checkpoint, args.image_size = None, args.image_size or IMAGE_SIZE
        if args.repeats > 1:
            parser.error("--repeats needs a checkpoint: the images of --npz and --images are what they are")
        if args.dataset is None:
            parser.error("--npz and --images need --dataset, the real images to measure against")
    else:
        if args.image_size:
            parser.error("--image_size is for --npz and --images: a checkpoint has its own")
        args.checkpoint = checkpoint.or_shipped(args.checkpoint, "runs/dmd2", "student.pt")
    validation.check_features(args)
    return args


def read_npz(path, size):
    """Images uint8 [N, 3, size, size] and labels [N] or None of a file in the format of openai/guided-diffusion."""
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is a .npy, a single array: --npz takes a .npz, as np.savez(file, images) writes it")
        with file:
            images, labels = file["arr_0"], file.get("arr_1")
        if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
            wanted = f"uint8 [N, {size}, {size}, 3] (--image_size {size})"
            raise ValueError(f"arr_0 is {images.dtype} {list(images.shape)}, not {wanted}")
        if labels is not None and labels.shape != images.shape[:1]:
            raise ValueError(f"arr_1 has shape {list(labels.shape)} for {len(images)} images")
        with np.errstate(invalid="ignore"):
            numbers = None if labels is None else labels.astype(np.int64)
        if labels is not None and not np.array_equal(numbers, labels):
            raise ValueError("arr_1 holds labels that are not integers")
        labels = None if labels is None else torch.from_numpy(numbers)
    except Exception as error:                      # numpy, zipfile and zlib have many
        raise data.DataError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def check_labels(path, labels, dataset):
    """Raise UsageError where the labels of --npz are not numbers of the dataset's classes."""
    last = len(dataset.classes) - 1
    if labels is not None and not 0 <= labels.min() <= labels.max() <= last:
        found = f"arr_1 holds labels of {labels.min()} to {labels.max()}"
        raise errors.UsageError(f"{path}: {found}, and the classes of --dataset are 0 to {last}; images alone will do")


def read_images(folder, size):
    """All images below a folder, by name: uint8 [N, 3, size, size]; others are resized as those of a dataset are."""
    paths, others = image_files.find(folder)
    if not paths:
        raise data.DataError(f"no images in {folder}")
    images, notes = image_files.read(paths, size)
    notes += [image_files.left_out(others)] if others else []
    if notes and processes.MAIN:
        print(f"note: {folder}: {', '.join(notes)}", file=sys.stderr)
    return images


def spread(values):
    """The standard deviation of a sample, over sampling seeds; None of one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def main(argv=None):
    args = parse_args(argv)
    device = hardware.start(args)
    state, given, size = None, None, args.image_size
    if args.checkpoint:
        state = checkpoint.load(args.checkpoint)
        cfg = teachers.sampling_cfg(args, state, device)
        guide = teachers.guide_path(args, args.checkpoint)
        # Now, as a run at work saves anew while its images are made.
        digest, guide_digest = (file and files.sha256(checkpoint.find(file)) for file in (args.checkpoint, guide))
        with resume.restoring(args.checkpoint):
            size = networks.image_size(state["model_config"])
            sample = sampling.sampler(state, device, args.num_steps, cfg, args.temperature, args.compile)
    else:
        given, labels = read_npz(args.npz, size) if args.npz else (read_images(args.images, size), None)
        if len(given) < LEAST_IMAGES:
            raise errors.UsageError(f"{args.npz or args.images} has {len(given)} images: {LEAST_IMAGES} are the least")
    args.dataset, args.data_dir, _ = data.named(args, state)
    dataset = data.from_flags(args, state, args.split)
    if len(dataset.images) < LEAST_IMAGES:
        raise errors.UsageError(f"the dataset has {len(dataset.images)} images: {LEAST_IMAGES} are the least")
    if not state:
        check_labels(args.npz, labels, dataset)
    extractor = validation.extractor(args, size, device)

    if state and args.num_images < len(state["classes"]) and processes.MAIN:
        many = f"{len(state['classes'])} classes, --num_images {args.num_images}"
        print(f"note: {many}: images of the first {args.num_images} classes only", file=sys.stderr)
    start = time.perf_counter()
    real = processes.main_only(metrics.reference)(dataset.images, extractor, args.cache_dir)
    runs, making = [], 0.0
    if state and (args.compile or device.type == "cuda"):       # what the first batch compiles or loads is no speed
        with hardware.autocast(device, args.precision):
            warm = args.batch_size * processes.WORLD + args.num_images % args.batch_size      # the last is smaller
            sampling.generate(sample, size, args.seed, torch.zeros(warm).long(), args.batch_size, device)
    for seed in range(args.seed, args.seed + args.repeats):
        if state:
            labels = torch.arange(args.num_images) % len(state["classes"])          # as many of each class
            began = time.perf_counter()
            with hardware.autocast(device, args.precision):
                given = sampling.generate(sample, size, seed, labels, args.batch_size, device, bar=True)
            making += time.perf_counter() - began
        known = labels if extractor.classes == dataset.classes else None
        values = processes.from_main(metrics.distances, given, known, real, extractor, args.neighbours)
        runs.append(dict(seed=seed, **values))

    n = len(given)
    names = {name: f"{name}@{n}" if n < 10_000 else name for name in runs[0] if name != "seed"}
    values = {
        shown: dict(mean=float(np.mean([run[name] for run in runs])), std=spread([run[name] for run in runs]))
        for name, shown in names.items()
    }
    report = dict(
        metrics=values, runs=runs, num_images=n, feature_extractor=extractor.identity, neighbours=args.neighbours,
        reference=dict(dataset=args.dataset, split=args.split, images=len(dataset.images)),
        torch_fidelity=torch_fidelity.__version__, seconds=round(time.perf_counter() - start, 1),
    )
    if n < 10_000:
        report["floor"] = processes.from_main(metrics.floor, real, dataset.labels, n)
    if state:
        report["checkpoint"] = dict(
            sha256=digest, kind=state["kind"], step=state["step"], ema_decay=state.get("ema_decay"),
            evaluations=sampling.evaluations(state, args.num_steps, cfg),
            temperature=args.temperature, cfg_scale=args.cfg_scale, cfg_interval=args.cfg_interval,
            autoguidance_scale=args.autoguidance_scale, guide_sha256=guide_digest,
            bf16=hardware.uses_bf16(device, args.precision), batch_size=args.batch_size,
            images_per_second=round(n * args.repeats / making, 1),
        )
    records.write_json(args.out, report, device)
    if processes.MAIN:
        for name, value in values.items():
            deviation = f" +- {value['std']:.4f}" if args.repeats > 1 else ""
            print(f"{name.upper():24} {value['mean']:10.4f}{deviation}")
        if n < 10_000:
            floor = report["floor"]
            print(f"{f'FLOOR OF {extractor.name}@{n}':24} {floor['mean']:10.4f} +- {floor['std']:.4f}")
        print(args.out)


if __name__ == "__main__":
    errors.run(main)
