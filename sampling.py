"""Images of a checkpoint: image i is a function of (checkpoint, seed, i, its label), whatever the batch size or count.

    sample = sampler(checkpoint.load("runs/dmd2"), device)
    for images in generate(sample, seed=0, labels=labels, batch_size=100, device=device): ...     # uint8 [B, 3, 32, 32]
"""

import torch

import checkpoint
import diffusion
from data import to_uint8
from randomness import image_noise


def evaluations(state, num_steps):
    """Network evaluations per image (NFE): a student's one, or the 2 n - 1 of n Heun steps."""
    return 1 if state["kind"] == "student" else 2 * num_steps - 1


def sampler(state, device, num_steps=18, compile=False):
    """The function (z, labels) -> images [B, 3, 32, 32] of a loaded checkpoint, by its averaged weights.

    A student makes an image in one step; a teacher in num_steps steps of Heun's method.
    """
    net = checkpoint.ema_model(state, device)
    if compile:
        net.compile()
    if state["kind"] == "student":
        return torch.no_grad()(lambda z, labels: diffusion.one_step_sample(net, z, labels, state["conditioning_sigma"]))
    return lambda z, labels: diffusion.heun_sample(net, z, labels, num_steps, state["sigma_min"], state["sigma_max"])


def generate(sample, seed, labels, batch_size, device):
    """Yield the images of labels[0], labels[1], ... in batches: uint8 [B, 3, 32, 32] on the CPU."""
    for start in range(0, len(labels), batch_size):
        batch = labels[start : start + batch_size]
        z = image_noise(seed, range(start, start + len(batch))).to(device, memory_format=torch.channels_last)
        yield to_uint8(sample(z, batch.to(device))).cpu()
