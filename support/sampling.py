"""Images of a checkpoint. Image i depends on (checkpoint, seed, i, its label), not on the batch size or the number of
images; up to rounding, as libraries choose their kernels by the batch size.

    sample = sampler(checkpoint.load("runs/dmd2"), device)
    images = generate(sample, 32, seed=0, labels=labels, batch_size=100, device=device)   # uint8 [N, 3, 32, 32]
"""

import torch
from tqdm import tqdm

import diffusion
from support import networks, processes
from support.data import to_uint8
from support.meter import NonFiniteError
from support.randomness import image_noise


def not_finite(images):
    """Which images [N, 3, H, W] hold NaN or infinity, of which to_uint8 would make black or white: 0 or 1, [N]."""
    return (~images.isfinite()).flatten(1).any(1).int()


def refuse(bad):
    """Raise NonFiniteError where not_finite() has found any."""
    if bad.any():
        raise NonFiniteError(f"{int(bad.sum())} of {len(bad)} images hold NaN or infinity")


def evaluations(state, num_steps, cfg):
    """Network evaluations per image (NFE): of a student one per noise level, of a teacher 2 n - 1 for n Heun steps.

    With guidance (cfg: keyword arguments of diffusion.guided) the evaluations without a class and those of the guide
    count too.
    """
    if state["kind"] == "student":
        return len(state["denoising_sigmas"])

    def count(x_t, sigma, labels):
        nonlocal total
        total += 1
        return x_t

    total = 0
    denoise = diffusion.guided(count, **dict(cfg, guide=count))
    diffusion.heun_sample(denoise, torch.zeros(1), torch.zeros(1), num_steps, state["sigma_min"], state["sigma_max"])
    return total


def sampler(state, device, num_steps=18, cfg=None, temperature=1.0, compile=False):
    """The function (z, labels, renoise) -> images [B, 3, H, W] of a loaded checkpoint, with its EMA weights.

    A student takes the steps that it was trained for, usually one (renoise as in few_step_sample). A teacher takes
    num_steps Heun steps, guided as cfg says (keyword arguments of diffusion.guided). Both begin at temperature * z.
    """
    net, cfg = networks.averaged(state, device), cfg or {}
    for network in filter(None, (net, cfg.get("guide"))):
        if compile:
            network.compile(dynamic=False)          # a dynamic graph is slower: a smaller last batch gets its own
    if state["kind"] == "student":
        sigmas = state["denoising_sigmas"]

        @torch.no_grad()
        def sample(z, labels, renoise):
            return diffusion.few_step_sample(net, temperature * z, labels, sigmas, renoise)

        return sample
    denoise = diffusion.guided(net, **cfg)
    schedule = num_steps, state["sigma_min"], state["sigma_max"]
    return lambda z, labels, renoise: diffusion.heun_sample(denoise, temperature * z, labels, *schedule)


def generate(sample, size, seed, labels, batch_size, device, bar=False, walk=0.0):
    """The images of labels[0], labels[1], ...: uint8 [N, 3, size, size] on the CPU; walk as in image_noise.

    Several processes take turns with the batches, which are the same as with one process; each returns all images.
    Raises NonFiniteError where an image holds NaN or infinity.
    """
    images = torch.zeros(len(labels), 3, size, size, dtype=torch.uint8)
    progress = tqdm(total=len(labels), unit="image", disable=not (bar and processes.MAIN))
    bad = torch.zeros(len(labels), dtype=torch.int)
    starts = range(0, len(labels), batch_size)
    for start in starts[processes.RANK :: processes.WORLD]:
        batch = labels[start : start + batch_size]
        indices = range(start, start + len(batch))
        place = slice(start, start + len(batch))

        def noise(draw, indices=indices):
            return image_noise(seed, indices, size, draw, walk).to(device, memory_format=torch.channels_last)

        made = sample(noise(0), batch.to(device), renoise=noise)
        images[place], bad[place] = to_uint8(made).cpu(), not_finite(made).cpu()
        progress.update(min(processes.WORLD * len(batch), len(labels) - progress.n))
    progress.close()
    refuse(processes.sum_on_host(bad))
    return processes.sum_on_host(images)          # each image is zero in all processes but one
