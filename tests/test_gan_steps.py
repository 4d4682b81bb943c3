"""The GAN alone that a distillation may end with: its losses, its steps in train.py, and what it is for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, call, log_of, trained_net

import train
from guidance import Discriminator, FeatureHead, GuidanceModel
from support import checkpoint, data, networks
from support.randomness import StepRandom
from unified_model import UnifiedModel

LABELS, REAL_LABELS = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7])


@pytest.mark.formula
def test_a_head_is_a_projection_of_its_layers_mean_on_the_class():
    head, features = FeatureHead(12, classes=3), torch.randn(4, 12, 5, 5)
    labels = torch.tensor([0, 1, 2, 0])
    h = head.layers(features).mean((2, 3))                                          # [4, 128]
    wanted = ((head.out.weight[0] + head.label_embedding.weight[labels]) * h).sum(1) + head.out.bias
    torch.testing.assert_close(head(features, labels), wanted)
    torch.testing.assert_close(head(100 * features, labels), wanted, rtol=1e-3, atol=1e-4)     # scale tells it nothing
    both = Discriminator([12, 12], classes=3)
    logits = [head([features, 2 * features][i], labels) for i, head in enumerate(both.heads)]
    assert torch.equal(both([features, 2 * features], labels), torch.stack(logits, 1))


@pytest.mark.formula
def test_the_losses_are_the_hinges_of_logits_on_the_frozen_teachers_features():
    guidance = GuidanceModel(trained_net(channels=8), discriminator=True, diffusion_gan_max_timestep=300)
    x_gen, x_real = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    rng, logits = StepRandom(5, 0), []
    for x, labels in ((x_gen, LABELS), (x_real, REAL_LABELS)):
        sigma = guidance.sigmas[rng.integers(0, 299, 4, 1, 1, 1)]
        features = guidance.real_unet(x + sigma * rng.normal(4, 3, 32, 32), sigma, labels, return_features=True)
        logits.append(20 * guidance.discriminator(features, labels))    # [4, 4], on both sides of the hinges
        assert (guidance.discriminator(features, labels.flip(0)) - logits[-1] / 20).abs().max() > 1e-3     # y matters
    forward = guidance.discriminator.forward
    guidance.discriminator.forward = lambda *args: 20 * forward(*args)
    losses, log = guidance.compute_gan_losses(x_gen, LABELS, x_real, REAL_LABELS, StepRandom(5, 0))
    fake, real = logits
    assert (1 + fake).min() < 0 < (1 + fake).max() and (1 - real).min() < 0 < (1 - real).max()
    torch.testing.assert_close(losses["loss_gan"], -fake.mean())
    torch.testing.assert_close(losses["loss_discriminator"], (1 + fake).clamp(min=0).mean() + F.relu(1 - real).mean())
    assert log["logit_fake"] == pytest.approx(fake.mean().item()) and log["logit_real"].ndim == 0
    torch.testing.assert_close(log["logit_real"], real.mean().detach())


def test_each_loss_moves_its_own_side_alone():
    model = UnifiedModel(trained_net(channels=8), discriminator=True)
    generator, guidance = model.feedforward_model, model.guidance_model
    for loss, moved, still in (
        ("loss_gan", generator, guidance.discriminator), ("loss_discriminator", guidance.discriminator, generator),
    ):
        model.zero_grad()
        x_gen = model.generate(torch.randn(4, 3, 32, 32), LABELS)
        losses, _ = model.gan_turn(x_gen, LABELS, torch.randn(4, 3, 32, 32), REAL_LABELS)
        losses[loss].backward()
        assert sum(p.grad.abs().sum() for p in moved.parameters()) > 0
        assert all(p.grad is None for p in still.parameters())
        for network in guidance.real_unet, guidance.fake_unet:
            assert all(p.grad is None for p in network.parameters())
    assert not any("discriminator" in name for name in UnifiedModel(trained_net(channels=8)).state_dict())


@pytest.mark.formula
def test_the_last_steps_are_of_the_gan_alone(tmp_path, tree, trained_teacher):
    flags = ["--preset", "none", "--teacher", trained_teacher, "--batch_size", "4", "--device", "cpu"]
    flags += ["--precision", "fp32", "--log_every", "1", "--warmup_steps", "2", "--seed", "7", "--flip", "1"]
    flags += ["--conditioning_sigma", "3", "--generator_lr", "1e-3", "--ema_decay", "0.5"]
    flags += ["--dfake_gen_update_ratio", "1", "--run_dir", str(tmp_path)]
    assert call(train, *flags, "--steps", "2") == 0
    before = checkpoint.load(tmp_path)
    last = ["--gan_steps", "5", "--gan_lr", "2e-3", "--discriminator_lr", "5e-3", "--diffusion_gan_max_timestep", "300"]
    assert call(train, *flags, "--steps", "7", *last, "--overwrite") == 0
    rows, state = log_of(tmp_path), checkpoint.load(tmp_path)
    assert ["loss_fake" in row for row in rows] == [True] * 2 + [False] * 5
    assert ["generator_grad_norm" in row for row in rows] == [True] * 2 + [False] * 2 + [True] * 3

    net, real_unet = networks.averaged(before), networks.averaged(checkpoint.load(trained_teacher))
    torch.manual_seed(7)
    guidance = GuidanceModel(real_unet, discriminator=True, diffusion_gan_max_timestep=300)
    guidance = guidance.to(memory_format=torch.channels_last)
    generator, heads = net.train().requires_grad_(True), guidance.discriminator
    way = [before["model_ema"]]                     # what the mean is of: the student before the GAN, and each turn's
    for key, weight in generator.state_dict().items():
        weight.copy_(before["model"][f"feedforward_model.{key}"])
    adam, adam_heads = (
        torch.optim.Adam(network.parameters(), lr=rate, betas=(0.0, 0.99))
        for network, rate in ((generator, 2e-3), (heads, 5e-3))
    )
    batches = data.Batches(data.load("folder", tree), 4, 7, "cpu")
    for step in range(2, 7):
        rng = StepRandom(7, step, torch.device("cpu"))
        rng.choice(1)
        z, labels = rng.normal(4, 3, 32, 32).to(memory_format=torch.channels_last), rng.integers(0, 1, 4)
        x_gen = generator(3 * z, 3.0, labels)
        x_real, real_labels = batches(step)
        x_real = torch.where(rng.uniform(4, 1, 1, 1) < 0.5, x_real.flip(-1), x_real)
        losses, _ = guidance.compute_gan_losses(x_gen, labels, x_real, real_labels, rng)
        for key, value in losses.items():
            assert rows[step][key] == pytest.approx(value.item(), rel=1e-3, abs=1e-4)
        for network in generator, heads:
            network.zero_grad()
        sum(losses.values()).backward()
        adam_heads.step()
        if step >= 4:                               # before that the discriminator learns alone
            adam.step()
            way.append(copy.deepcopy(generator.state_dict()))
    mean = {key: sum(weights[key] for weights in way) / len(way) for key in way[0]}
    assert len(way) == 4
    for key, value in mean.items():
        torch.testing.assert_close(state["model_ema"][key], value, rtol=1e-3, atol=2e-4)
    for key, value in heads.state_dict().items():
        torch.testing.assert_close(
            state["model"][f"guidance_model.discriminator.{key}"], value, rtol=1e-3, atol=2e-4
        )
    for network in ("fake_unet", "real_unet"):      # which stay as they were
        for key, value in before["model"].items():
            if f".{network}." in key:
                assert torch.equal(state["model"][key], value)


def test_a_run_goes_on_as_a_gan_and_stays_whole_without(tmp_path, trained_teacher):
    run, few = tmp_path / "run", ["--device", "cpu", "--resume", "--run_dir", str(tmp_path / "run")]
    first = ["--teacher", trained_teacher, *TINY, "--steps", "2", "--log_every", "1"]
    assert call(train, *first, "--run_dir", str(run)) == 0
    assert call(train, *few, "--steps", "4", "--gan_steps", "2", "--warmup_steps", "1") == 0
    heads = {key: value for key, value in checkpoint.load(run)["model"].items() if ".discriminator." in key}
    assert call(train, *few, "--steps", "6", "--gan_steps", "0") == 0
    assert ["loss_gan" in row for row in log_of(run)] == [False, False, True, True, False, False]
    state = checkpoint.load(run)
    assert heads and all(torch.equal(state["model"][key], value) for key, value in heads.items())
    assert state["batches"]["step"] == 4
