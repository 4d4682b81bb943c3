"""The networks that checkpoints hold."""

import torch

from model import SimpleUNet


def rebuild(config):
    """A fresh network from its config, the arguments that it was made with."""
    return SimpleUNet(**config)


def averaged(state, device="cpu"):
    """The averaged network of a loaded checkpoint: frozen, in evaluation mode, channels_last."""
    net = rebuild(state["model_config"])
    net.load_state_dict(state["model_ema"])
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
