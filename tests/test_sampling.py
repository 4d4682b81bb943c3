"""sampling.py: the images of a checkpoint are those of its network, by its levels, for the classes asked for."""

import numpy as np
import pytest
import torch
from conftest import call, save_net, trained_net
from PIL import Image, ImageSequence

import diffusion
import sample
from support import data, sampling
from support.randomness import image_noise

LABELS, CPU = torch.tensor([1, 0, 1]), torch.device("cpu")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return trained_net(channels=8, label_dim=2).requires_grad_(False)


def images(state, **how):
    sample = sampling.sampler(state, CPU, **how)
    return sampling.generate(sample, 32, 3, LABELS, batch_size=2, device=CPU)


def checkpoint_of(net, kind, **more):
    weights = dict(model_config=net.config, model_ema=net.state_dict())
    return dict(kind=kind, sigma_min=0.01, sigma_max=40.0, **weights, **more)


def assert_same_images(found, wanted):
    assert found.dtype == torch.uint8 and (found.int() - data.to_uint8(wanted).int()).abs().max() <= 1     # rounding


def test_a_teachers_are_those_of_heuns_method_between_its_own_levels(net):
    z, state = image_noise(3, range(3), 32), checkpoint_of(net, "teacher")
    assert_same_images(images(state, num_steps=4), diffusion.heun_sample(net, z, LABELS, 4, 0.01, 40.0))
    cfg = dict(cfg_scale=3.0, cfg_interval=(0.1, 10))
    wanted = diffusion.heun_sample(diffusion.guided(net, 3.0, (0.1, 10)), z, LABELS, 5, 0.01, 40.0)
    assert_same_images(images(state, num_steps=5, cfg=cfg), wanted)


def test_a_students_are_those_of_its_levels_with_fresh_noise_before_each(net):
    x = net(3.0 * image_noise(3, range(3), 32), 3.0, LABELS)
    assert_same_images(images(checkpoint_of(net, "student", denoising_sigmas=[3.0])), x)
    for draw, sigma in ((1, 1.5), (2, 0.4)):
        x = net(x + sigma * image_noise(3, range(3), 32, draw), sigma, LABELS)
    assert_same_images(images(checkpoint_of(net, "student", denoising_sigmas=[3.0, 1.5, 0.4])), x)


def test_a_temperature_scales_the_noise_that_they_begin_with_and_no_other(net):
    z, teacher = image_noise(3, range(3), 32), checkpoint_of(net, "teacher")
    assert_same_images(
        images(teacher, num_steps=4, temperature=1.3), diffusion.heun_sample(net, 1.3 * z, LABELS, 4, 0.01, 40.0)
    )
    x = net(1.3 * 3.0 * z, 3.0, LABELS)
    assert_same_images(images(checkpoint_of(net, "student", denoising_sigmas=[3.0]), temperature=1.3), x)
    x = net(x + 1.5 * image_noise(3, range(3), 32, 1), 1.5, LABELS)
    assert_same_images(images(checkpoint_of(net, "student", denoising_sigmas=[3.0, 1.5]), temperature=1.3), x)


def test_the_images_of_this_network_tell_classes_levels_and_steps_apart(net):
    """What the others would miss if it did not."""
    z = image_noise(3, range(3), 32)
    teacher = diffusion.heun_sample(net, z, LABELS, 4, 0.01, 40.0)
    others = [
        diffusion.heun_sample(net, z, 1 - LABELS, 4, 0.01, 40.0), diffusion.heun_sample(net, z, LABELS, 5, 0.01, 40.0),
        diffusion.heun_sample(net, z, LABELS, 4), teacher[[1, 0, 2]],
        diffusion.heun_sample(net, 1.3 * z, LABELS, 4, 0.01, 40.0),
    ]
    for other in others:
        assert (data.to_uint8(other).int() - data.to_uint8(teacher).int()).abs().max() > 8


def test_the_walk_goes_from_a_seeds_noise_to_the_nexts_through_unit_noise():
    a, b, middle = image_noise(3, range(9), 32), image_noise(4, range(9), 32), image_noise(3, range(9), 32, walk=0.5)
    assert torch.equal(image_noise(3, range(9), 32, walk=0.0), a)
    torch.testing.assert_close(image_noise(3, range(9), 32, walk=1.0), b)
    torch.testing.assert_close(middle, (a + b) / 2**0.5)
    assert abs(middle.std() - 1) < 0.01


def test_the_gif_of_a_walk_shows_the_grids_on_the_way_and_back(net, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "WALK_FRAMES", 2)
    save_net(tmp_path / "s.pt", net, denoising_sigmas=[3.0], sigma_min=0.01, sigma_max=40.0, classes=["a", "b"])
    common = ["--checkpoint", f"{tmp_path}/s.pt", "--num_images", "4", "--device", "cpu", "--seed"]
    assert call(sample, *common, "3", "--out", f"{tmp_path}/0.png", "--walk", f"{tmp_path}/walk.gif") == 0
    assert call(sample, *common, "4", "--out", f"{tmp_path}/1.png") == 0
    assert call(sample, *common, "3", "--temperature", "2", "--out", f"{tmp_path}/warm.png") == 0
    assert (tmp_path / "warm.png").read_bytes() != (tmp_path / "0.png").read_bytes()
    gif = Image.open(tmp_path / "walk.gif")
    frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(gif)]
    first, last = (np.asarray(Image.open(tmp_path / f"{seed}.png")).astype(int) for seed in (0, 1))
    assert len(frames) == 4 and gif.info["loop"] == 0
    near = [abs(one - other).mean() for one, other in ((frames[0], first), (frames[2], last), (frames[1], frames[3]))]
    apart = [abs(frames[i] - frames[j]).mean() for i, j in ((0, 1), (1, 2), (0, 2))]
    assert max(near) < 4 < 8 < min(apart)           # 256 colours are near to all
