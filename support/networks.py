"""The networks that checkpoints hold."""

import hashlib

import torch

from constants import IMAGE_SIZE
from edm_unet import EDMUNet
from model import SimpleUNet

NETWORKS = dict(SimpleUNet=SimpleUNet, EDMUNet=EDMUNet)


def described(net):
    """What a checkpoint holds of a network besides its weights: the name of its class, and its arguments."""
    config = dict(net.config, network=type(net).__name__)
    if image_size(config) != net.image_size:
        raise ValueError(f"the config of {type(net).__name__} lacks its image_size, {net.image_size}")
    return config


def rebuild(config):
    """A new network from what described() returned."""
    arguments = dict(config)
    name = arguments.pop("network", "SimpleUNet")   # older checkpoints do not name it
    if name not in NETWORKS:
        raise ValueError(f"its network is a {name!r:.60}, not one of {', '.join(NETWORKS)}")
    return NETWORKS[name](**arguments)


def image_size(config):
    """The height and width of the images of the network that described() described."""
    return config.get("image_size") or config.get("img_resolution", IMAGE_SIZE)     # as EDM calls it; none, formerly


def averaged(state, device="cpu"):
    """The EMA network of a loaded checkpoint: frozen, in evaluation mode, channels_last."""
    net = rebuild(state["model_config"])
    net.load_state_dict(state["model_ema"])
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def digest(weights):
    """SHA-256, hex, of a network's weights, name -> tensor."""
    found = hashlib.sha256()
    for value in weights.values():
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
