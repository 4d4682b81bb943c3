"""Pairs of noise and the teacher's image: what they are, and the steps of train.py that learn from them."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, call, log_of

import diffusion
import train
from fit import Fit
from support import checkpoint, data, networks
from support.ema import EMA
from support.optimizers import Optimizer
from support.pairs import SEED, Pairs
from support.randomness import StepRandom, image_noise
from unified_model import UnifiedModel


def shrunk(z, labels, renoise):
    """Some teacher's images: the noise, smaller, and a brightness a class."""
    return z / 8 + labels.view(-1, 1, 1, 1) / 8


def test_a_batch_of_pairs_is_noise_and_what_is_made_of_it(device="cpu"):
    made = []

    def sample(z, labels, renoise):
        made.append(labels)
        return shrunk(z, labels, renoise)

    pairs = Pairs(sample, 32, 7, num_classes=3, batch_size=4, seed=5, device=device)
    for step, wanted in enumerate(([0, 1, 2, 0], [1, 2, 0, 1], [0, 1, 2, 0])):      # 7 pairs make two batches
        z, labels, x_ode = pairs(step)
        assert labels.tolist() == wanted
        assert torch.equal(z, image_noise(5 + SEED + step % 2, range(4), 32))
        assert torch.equal(x_ode, data.to_float(data.to_uint8(shrunk(z, labels, None))))
    assert len(made) == 2                           # each batch once
    later = Pairs(sample, 32, 7, num_classes=3, batch_size=4, seed=5, device=device)    # of a resumed run
    assert all(torch.equal(one, other) for one, other in zip(later(2), pairs(2), strict=True)) and len(made) == 3


def test_pairs_come_mirrored_every_other_time_and_in_shares():
    pairs = Pairs(shrunk, 32, 8, num_classes=3, batch_size=4, seed=0, device="cpu", mirrored=True)
    first, second, third = pairs(1), pairs(3), pairs(5)
    for i, flipped in enumerate((True, False, True)):
        assert torch.equal(second[i], first[i].flip(-1) if flipped else first[i]) and torch.equal(third[i], first[i])
    shares = [pairs(3, rank, 2) for rank in range(2)]
    for i, whole in enumerate(second):
        assert torch.equal(whole, torch.cat([share[i] for share in shares]))


@pytest.mark.formula
def test_the_fit_is_the_squared_error_of_the_generators_first_step():
    class Teacher(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x_t, sigma, labels):
            return self.gain * x_t / sigma

    model = UnifiedModel(Teacher(), 80.0, num_denoising_steps=2, shape=(3, 32, 32))
    gain, (z, x_ode), labels = model.feedforward_model.gain, torch.randn(2, 4, 3, 32, 32), torch.zeros(4).long()
    start, optimizer, asked = gain.item(), Optimizer("adam", {model.feedforward_model: 1e-3}), []
    fit = Fit(
        model, EMA(model.feedforward_model, 0), start=0, steps=4, batch_size=2, lr_schedule="cosine",
        pairs=lambda *step: asked.append(step) or (z, labels, x_ode), optimizers=dict(generator=optimizer),
    )
    log = fit.step(2, [StepRandom(0, 2), StepRandom(0, 3)])         # two microbatches
    error = start * z - x_ode
    torch.testing.assert_close(log["loss_fit"], error.square().mean())
    torch.testing.assert_close(log["generator_grad_norm"], (2 * error * z).mean().abs())
    assert gain.item() == pytest.approx(start - 5e-4 * (error * z).mean().sign().item(), abs=1e-6)  # at half the rate
    assert fit.ema.module.gain.item() == gain.item() and asked == [(2, 0, 1)]


@pytest.mark.formula
def test_the_fit_teaches_every_evaluation_the_images_that_it_will_get():
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x_t, sigma, labels):
            seen.append((sigma.item(), x_t))
            return self.gain * x_t

    model = UnifiedModel(Spy(), 80.0, num_denoising_steps=2, shape=(3, 32, 32))
    (z, x_ode), labels = torch.randn(2, 4, 3, 32, 32), torch.zeros(4).long()
    optimizers = dict(generator=Optimizer("adam", {model.feedforward_model: 0.0}))
    fit = Fit(model, EMA(model.feedforward_model, 0), start=0, steps=40, batch_size=2, num_denoising_steps=2,
              pairs=lambda *step: (z, labels, x_ode), optimizers=optimizers)
    levels = []
    for step in range(40):
        seen.clear()
        log = fit.step(step, [StepRandom(0, step, rank=i, world=2) for i in range(2)])          # two microbatches
        sigma, rng = seen[0][0], StepRandom(0, step)
        levels.append(model.denoising_sigmas.index(pytest.approx(sigma)))
        x_t = x_ode + sigma * rng.normal(4, 3, 32, 32) if levels[-1] else sigma * z
        torch.testing.assert_close(torch.cat([x for _, x in seen]), x_t)
        torch.testing.assert_close(log["loss_fit"], (0.5 * x_t - x_ode).square().mean())
    assert 10 < sum(levels) < 30


def test_the_first_steps_fit_the_generator_to_the_guided_teachers_images(tmp_path, trained_teacher):
    flags = ["--preset", "none", "--teacher", trained_teacher, "--batch_size", "4", "--device", "cpu"]
    flags += ["--precision", "fp32", "--steps", "6", "--fit_steps", "4", "--ode_pairs", "8", "--generator_lr", "1e-2"]
    flags += ["--cfg_scale", "2", "--ema_decay", "0", "--log_every", "1", "--dfake_gen_update_ratio", "3"]
    assert call(train, *flags, "--run_dir", str(tmp_path / "student")) == 0
    log = log_of(tmp_path / "student")
    assert [sorted(name for name in row if "loss" in name) for row in log] == [["loss_fit"]] * 4 + [["loss_fake"]] * 2

    net = networks.averaged(checkpoint.load(trained_teacher))
    teacher = diffusion.guided(net, 2)
    student = networks.averaged(checkpoint.load(trained_teacher)).requires_grad_(True)
    optimizer = torch.optim.Adam(student.parameters())
    for step in range(4):                           # two batches, and both again, mirrored
        z, labels = image_noise(SEED + step % 2, range(4), 32), (torch.arange(4) + 4 * (step % 2)) % 2
        x_ode = data.to_float(data.to_uint8(diffusion.heun_sample(teacher, z, labels, 9)))
        if step >= 2:
            z, x_ode = z.flip(-1), x_ode.flip(-1)
        loss = F.mse_loss(student(80 * z, 80.0, labels), x_ode)
        assert log[step]["loss_fit"] == pytest.approx(loss.item(), rel=1e-3)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 4)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, value in networks.averaged(checkpoint.load(tmp_path / "student")).state_dict().items():
        torch.testing.assert_close(value, student.state_dict()[name], rtol=1e-3, atol=1e-4)     # no generator turn yet


def test_without_fit_steps_no_pair_is_made(tmp_path, trained_teacher, monkeypatch):
    monkeypatch.setattr(Pairs, "__call__", None)
    assert call(train, "--teacher", trained_teacher, *TINY, "--steps", "2", "--run_dir", str(tmp_path / "student")) == 0
