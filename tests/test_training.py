"""The lines of the two loops against known answers: what a step sees, its loss, its gradient and its size."""

import argparse
import json
import math

import pytest
import torch
from conftest import call, teacher_flags

import checkpoint
import data
import diffusion
import runtime
import train
import train0
from model import SimpleUNet
from randomness import StepRandom

ONE_STEP = ["--precision", "fp32", "--steps", "1", "--log_every", "1", "--max_grad_norm", "1e6"]


def logged(run):
    return json.loads((run / "log.jsonl").read_text().splitlines()[0])


def gradients(state):
    """name -> the gradient of a first step of Adam, whose first moment is a tenth of it."""
    return {i: 10 * entry["exp_avg"] for i, entry in state["adam"]["state"].items()}


def norm(tensors):
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


@pytest.mark.parametrize(("flip", "sigma_sampling"), [("0", "lognormal"), ("1", "lognormal"), ("0", "grid")])
def test_the_teachers_loss_is_the_weighted_error_of_the_clean_image(tmp_path, tree, flip, sigma_sampling):
    noise = ["--p_mean", "-0.3", "--p_std", "0.7", "--sigma_sampling", sigma_sampling, "--flip", flip, "--seed", "5"]
    assert call(train0, *teacher_flags(tree), *ONE_STEP, *noise, "--run_dir", str(tmp_path)) == 0

    torch.manual_seed(5)
    net = SimpleUNet(8, 2)
    x_0, labels = data.Batches(data.load("folder", tree), 4, 5, "cpu")(0)
    rng = StepRandom(5, 0, torch.device("cpu"))
    if flip == "1":
        mirrored = rng.uniform(4, 1, 1, 1) < 0.5
        assert 0 < mirrored.sum() < 4
        x_0 = torch.where(mirrored, x_0.flip(-1), x_0)
    if sigma_sampling == "grid":
        sigma = diffusion.karras_sigmas()[rng.integers(0, 999, 4, 1, 1, 1)].float()
    else:
        sigma = torch.exp(-0.3 + 0.7 * rng.normal(4, 1, 1, 1))
    x0_hat = net(x_0 + sigma * rng.normal(4, 3, 32, 32), sigma, labels)
    loss = ((1 / sigma**2 + 1 / 0.5**2) * (x0_hat - x_0) ** 2).mean()
    loss.backward()
    found = logged(tmp_path)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert found["grad_norm"] == pytest.approx(norm(p.grad for p in net.parameters()), rel=1e-3)


def test_a_long_gradient_is_shortened_and_the_first_step_is_as_long_as_the_rise_allows(tmp_path, tree):
    flags = [*teacher_flags(tree), *ONE_STEP[:-1], "0.01", "--lr", "1e-2", "--warmup_steps", "4"]
    assert call(train0, *flags, "--run_dir", str(tmp_path)) == 0
    state = checkpoint.load(tmp_path)
    assert logged(tmp_path)["grad_norm"] > 0.1
    assert norm(gradients(state["optimizer"]).values()) == pytest.approx(0.01, rel=1e-3)
    torch.manual_seed(0)
    before = SimpleUNet(8, 2).state_dict()
    longest = max((value - before[name]).abs().max().item() for name, value in state["model"].items())
    assert longest == pytest.approx(1e-2 / 4, rel=1e-2)             # Adam's first step: the rate, whatever the gradient


def test_the_losses_of_the_gan_count_by_their_weights(tmp_path, tree):
    teacher = str(tmp_path / "teacher")
    flags = ["--steps", "3", "--warmup_steps", "0", "--lr", "1e-2", "--label_dropout", "0.5"]
    assert call(train0, *teacher_flags(tree), "--run_dir", teacher, *flags) == 0
    found = []
    for i in range(3):
        weights = ["--gen_cls_loss_weight", str(0.1 * 2**i), "--cls_loss_weight", str(0.2 * 3**i)]
        run = tmp_path / str(i)
        # Guided, as without it real_unet and fake_unet are one in the first step.
        flags = ["--teacher", teacher, "--guidance_scale", "5", "--batch_size", "4", "--device", "cpu", *ONE_STEP]
        assert call(train, *flags, *weights, "--run_dir", str(run)) == 0
        state = checkpoint.load(run)
        found.append([
            torch.cat([g.flatten() for g in gradients(state[f"{name}_optimizer"]).values()])
            for name in ("generator", "guidance")
        ])
        head = sum(value.numel() for name, value in state["model"].items() if "cls_head" in name)
    # gradient(w) = a + w b, at w = 0.1, 0.2, 0.4 and at 0.2, 0.6, 1.8; the head's has no a.
    for (a, b, c), (near, far) in zip(zip(*found, strict=True), ((0.1, 0.2), (0.4, 1.2)), strict=True):
        assert (b - a).norm() > 1e-2 * a.norm()
        torch.testing.assert_close((c - b) / far, (b - a) / near, rtol=1e-2, atol=1e-3 * (b / near).abs().max().item())
        assert (a - (b - a) * 0.1 / near).norm() > 1e-2 * a.norm()                  # the other loss, of weight 1
    one, three = found[0][1][-head:], found[1][1][-head:]
    torch.testing.assert_close(three, 3 * one, rtol=1e-3, atol=1e-5 * one.abs().max().item())


def test_the_learning_rate_rises_and_then_stays_or_falls_to_zero():
    args = argparse.Namespace(warmup_steps=10, steps=110, lr_schedule="cosine")
    rise = [runtime.lr_factor(step, args) for step in range(10)]
    assert rise == pytest.approx([0.1 * n for n in range(1, 11)])
    fall = [runtime.lr_factor(step, args) for step in (10, 35, 60, 110)]
    assert fall == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0])
    args.lr_schedule = "constant"
    assert [runtime.lr_factor(step, args) for step in (9, 10, 109, 500)] == [1, 1, 1, 1]
    args.warmup_steps = 0
    assert runtime.lr_factor(0, args) == 1
