"""sampling.py: the images of a checkpoint are those of its network, by its levels, for the classes asked for."""

import pytest
import torch
from test_model import trained_net

import diffusion
from support import data, sampling
from support.randomness import image_noise

LABELS, CPU = torch.tensor([1, 0, 1]), torch.device("cpu")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return trained_net(channels=8, label_dim=2).requires_grad_(False)


def images(state, **how):
    sample = sampling.sampler(state, CPU, **how)
    return sampling.generate(sample, 3, LABELS, batch_size=2, device=CPU)


def state_of(net, kind, **more):
    weights = dict(model_config=net.config, model_ema=net.state_dict())
    return dict(kind=kind, sigma_min=0.01, sigma_max=40.0, **weights, **more)


def assert_alike(found, wanted):
    assert found.dtype == torch.uint8 and (found.int() - data.to_uint8(wanted).int()).abs().max() <= 1     # rounding


def test_a_teachers_are_those_of_heuns_method_between_its_own_levels(net):
    z, state = image_noise(3, range(3)), state_of(net, "teacher")
    assert_alike(images(state, num_steps=4), diffusion.heun_sample(net, z, LABELS, 4, 0.01, 40.0))
    cfg = dict(cfg_scale=3.0, cfg_interval=(0.1, 10))
    wanted = diffusion.heun_sample(diffusion.guided(net, 3.0, (0.1, 10)), z, LABELS, 5, 0.01, 40.0)
    assert_alike(images(state, num_steps=5, cfg=cfg), wanted)


def test_a_students_are_those_of_its_levels_with_fresh_noise_before_each(net):
    x = net(3.0 * image_noise(3, range(3)), 3.0, LABELS)
    assert_alike(images(state_of(net, "student", denoising_sigmas=[3.0])), x)
    for draw, sigma in ((1, 1.5), (2, 0.4)):
        x = net(x + sigma * image_noise(3, range(3), draw), sigma, LABELS)
    assert_alike(images(state_of(net, "student", denoising_sigmas=[3.0, 1.5, 0.4])), x)


def test_the_images_of_this_network_tell_classes_levels_and_steps_apart(net):
    """What the others would miss if it did not."""
    z = image_noise(3, range(3))
    teacher = diffusion.heun_sample(net, z, LABELS, 4, 0.01, 40.0)
    others = [
        diffusion.heun_sample(net, z, 1 - LABELS, 4, 0.01, 40.0), diffusion.heun_sample(net, z, LABELS, 5, 0.01, 40.0),
        diffusion.heun_sample(net, z, LABELS, 4), teacher[[1, 0, 2]],
    ]
    for other in others:
        assert (data.to_uint8(other).int() - data.to_uint8(teacher).int()).abs().max() > 8
