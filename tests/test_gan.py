"""The GAN phase: its discriminator, its losses, its steps, and the average of the weights that it leaves."""

import copy
import os
import shutil
import signal
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, assert_same_run, call, interrupted, log_of, read_bytes, trained_net

import train
from gan import CLASSIFIER_NOISE, Discriminator, FeatureHead, classifier_features, compute_gan_losses, teacher_features
from guidance import GuidanceModel
from support import archive, checkpoint, classifier, data, networks
from support.classifier import Classifier, conv_body, small_body
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
    net = trained_net(channels=8)
    guidance = GuidanceModel(net, diffusion_gan_max_timestep=300)
    discriminator = Discriminator(net.feature_channels, 10)
    x_gen, x_real = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    rng, logits = StepRandom(5, 0), []
    for x, labels in ((x_gen, LABELS), (x_real, REAL_LABELS)):
        sigma = guidance.sigmas[rng.integers(0, 299, 4, 1, 1, 1)]
        features = guidance.real_unet(x + sigma * rng.normal(4, 3, 32, 32), sigma, labels, return_features=True)
        logits.append(20 * discriminator(features, labels))             # [4, 4], on both sides of the hinges
        assert (discriminator(features, labels.flip(0)) - logits[-1] / 20).abs().max() > 1e-3              # y matters
    forward = discriminator.forward
    discriminator.forward = lambda *args: 20 * forward(*args)
    losses, log = compute_gan_losses(
        partial(teacher_features, guidance), discriminator, x_gen, LABELS, x_real, REAL_LABELS, StepRandom(5, 0))
    fake, real = logits
    assert (1 + fake).min() < 0 < (1 + fake).max() and (1 - real).min() < 0 < (1 - real).max()
    torch.testing.assert_close(losses["loss_gan"], -fake.mean())
    torch.testing.assert_close(losses["loss_discriminator"], (1 + fake).clamp(min=0).mean() + F.relu(1 - real).mean())
    assert log["logit_fake"] == pytest.approx(fake.mean().item()) and log["logit_real"].ndim == 0
    torch.testing.assert_close(log["logit_real"], real.mean().detach())


def test_each_loss_trains_its_own_side():
    net = trained_net(channels=8)
    model, discriminator = UnifiedModel(net), Discriminator(net.feature_channels, 10)
    generator, guidance = model.feedforward_model, model.guidance_model
    for loss, moved, still in (
        ("loss_gan", generator, discriminator), ("loss_discriminator", discriminator, generator),
    ):
        for network in model, discriminator:
            network.zero_grad()
        x_gen = model.generate(torch.randn(4, 3, 32, 32), LABELS)
        losses, _ = compute_gan_losses(
            partial(teacher_features, guidance), discriminator, x_gen, LABELS, torch.randn(4, 3, 32, 32), REAL_LABELS)
        losses[loss].backward()
        assert sum(p.grad.abs().sum() for p in moved.parameters()) > 0
        assert all(p.grad is None for p in still.parameters())
        for network in guidance.real_unet, guidance.fake_unet:
            assert all(p.grad is None for p in network.parameters())


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory):
    """A classifier of ten classes, untrained, as tools.features saves it."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("classifier") / "features.pt2"
    archive.save(Classifier(small_body(32), 128, 10), path, 32, list("abcdefghij"))
    return str(path)


@pytest.mark.formula
def test_a_classifiers_maps_are_the_last_activations_of_each_resolution(classifier_file):
    net, x = classifier.load(classifier_file, 32), torch.rand(2, 3, 32, 32) * 2 - 1
    wanted = [net.body[:3](x), net.body[:6](x), net.body[:9](x)]                    # after each convolution of stride 2
    assert [h.shape for h in wanted] == [(2, 32, 16, 16), (2, 64, 8, 8), (2, 128, 4, 4)]
    assert all(torch.equal(h, own) for h, own in zip(wanted, net.maps(x), strict=True))
    assert net.feature_channels == [32, 64, 128] and not any(p.requires_grad for p in net.parameters())
    large = Classifier(conv_body(32), 256, 10).eval()               # several layers, then a pooling, at each resolution
    wanted = [large.body[:end](x) for end in (3, 10, 17, 24)]
    assert [h.shape[1:] for h in wanted] == [(32, 32, 32), (64, 16, 16), (256, 8, 8), (256, 4, 4)]
    assert all(torch.equal(h, own) for h, own in zip(wanted, large.maps(x), strict=True))


@pytest.mark.formula
def test_a_classifier_sees_shifted_images_with_a_little_noise(classifier_file):
    net, x = classifier.load(classifier_file, 32), (torch.rand(3, 3, 32, 32) * 2 - 1).requires_grad_()
    maps = classifier_features(net, x, LABELS[:3], StepRandom(4, 2))
    rng = StepRandom(4, 2)
    noisy = x.detach() + CLASSIFIER_NOISE * rng.normal(3, 3, 32, 32)
    rows, columns = rng.integers(0, 8, 3, 1), rng.integers(0, 8, 3, 1)
    padded = F.pad(noisy, (4,) * 4, mode="reflect")
    places = [(int(r), int(c)) for r, c in zip(rows, columns, strict=True)]
    assert len(set(places)) == 3
    seen = torch.stack([padded[i, :, r : r + 32, c : c + 32] for i, (r, c) in enumerate(places)])
    for h, wanted in zip(maps, net.maps(seen), strict=True):
        torch.testing.assert_close(h, wanted)
    sum(h.sum() for h in maps).backward()
    assert x.grad.abs().sum() > 0


def test_a_gan_phase_through_a_classifier(tmp_path, tree, trained_teacher, classifier_file, monkeypatch, capsys):
    """The same steps as compute_gan_losses by hand; a resume is exact, though the file has changed; wrong files."""
    flags = [*TINY, "--teacher", trained_teacher, "--precision", "fp32", "--log_every", "1", "--steps", "4"]
    flags += ["--gan_steps", "4", "--discriminator_warmup_steps", "1", "--gan_lr", "1e-3"]
    file = str(tmp_path / "own.pt2")
    shutil.copy(classifier_file, file)
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert call(train, *flags, "--gan_features", file, "--run_dir", whole) == 0
    interrupted(monkeypatch, train, 1, signal.SIGTERM)
    assert call(train, *flags, "--gan_features", file, "--run_dir", parts) == 143
    monkeypatch.setattr(train, "StepRandom", StepRandom)
    archive.save(Classifier(small_body(32), 128, 10), file, 32)                     # other weights
    assert call(train, "--run_dir", parts, "--resume", "--device", "cpu") == 0
    assert_same_run(whole, parts)
    shutil.copy(classifier_file, file)
    assert call(train, *flags, "--run_dir", str(tmp_path / "teachers")) == 0
    through, teachers = (log_of(folder)[1]["loss_discriminator"] for folder in (whole, tmp_path / "teachers"))
    assert through != teachers
    capsys.readouterr()
    resumed = ["--run_dir", whole, "--resume", "--device", "cpu"]
    os.mkdir(tmp_path / "other")
    shutil.copy(file, tmp_path / "other" / "own.pt2")
    (tmp_path / "text.pt2").write_text("no archive")
    archive.save(Classifier(small_body(64), 128, 10), tmp_path / "64.pt2", 64)
    for argv, said in (
        ([*resumed, "--gan_features", str(tmp_path / "other" / "own.pt2")], "differs from the resumed run's"),
        ([*flags, "--gan_features", str(tmp_path / "missing.pt2")], "cannot read"),
        ([*flags, "--gan_features", str(tmp_path / "text.pt2")], "is no network of tools.features"),
        ([*flags, "--gan_features", str(tmp_path / "64.pt2")], "is for images of 64 pixels a side, not 32"),
        ([*flags, "--gan_features", file, "--gan_steps", "0"], "--gan_features needs --gan_steps"),
    ):
        assert call(train, *argv, *(() if argv[0] == "--run_dir" else ("--run_dir", str(tmp_path / "new")))) == 2, said
        err = capsys.readouterr().err
        assert said in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "new").exists()


def test_each_evaluation_of_the_generator_has_a_discriminator_of_its_own():
    net = trained_net(channels=8)
    guidance, discriminator = GuidanceModel(net), Discriminator(net.feature_channels, 10, evaluations=3)
    assert Discriminator(net.feature_channels, 10).state_dict().keys() < discriminator.state_dict().keys()
    parts, images = [discriminator.heads, *(later.heads for later in discriminator.later)], torch.randn(2, 4, 3, 32, 32)
    for level in range(3):
        discriminator.zero_grad()
        losses, _ = compute_gan_losses(
            partial(teacher_features, guidance), discriminator, images[0], LABELS, images[1], REAL_LABELS,
            StepRandom(0, 0), level)
        losses["loss_discriminator"].backward()
        for i, heads in enumerate(parts):
            assert all((p.grad is not None) == (i == level) for p in heads.parameters()), (level, i)


@pytest.mark.formula
def test_the_last_steps_train_with_the_gan_loss_only(tmp_path, tree, trained_teacher):
    flags = ["--preset", "none", "--teacher", trained_teacher, "--batch_size", "4", "--device", "cpu"]
    flags += ["--precision", "fp32", "--log_every", "1", "--warmup_steps", "2", "--seed", "7", "--flip", "1"]
    flags += ["--conditioning_sigma", "3", "--generator_lr", "1e-3", "--ema_decay", "0.5"]
    flags += ["--dfake_gen_update_ratio", "1", "--run_dir", str(tmp_path)]
    assert call(train, *flags, "--steps", "2") == 0
    before = checkpoint.load(tmp_path)
    last = ["--gan_steps", "5", "--discriminator_warmup_steps", "2", "--gan_lr", "2e-3", "--discriminator_lr", "5e-3"]
    last += ["--diffusion_gan_max_timestep", "300"]
    assert call(train, *flags, "--steps", "7", *last, "--overwrite") == 0
    rows, state = log_of(tmp_path), checkpoint.load(tmp_path)
    assert ["loss_fake" in row for row in rows] == [True] * 2 + [False] * 5
    assert ["generator_grad_norm" in row for row in rows] == [True] * 2 + [False] * 2 + [True] * 3

    net, real_unet = networks.averaged(before), networks.averaged(checkpoint.load(trained_teacher))
    torch.manual_seed(7)
    guidance = GuidanceModel(real_unet, diffusion_gan_max_timestep=300)
    discriminator = Discriminator([16, 32, 64, 64], 2).to(memory_format=torch.channels_last)
    generator = net.train().requires_grad_(True)
    averaged = [before["model_ema"]]                # the EMA before the phase, then the weights after each of its steps
    for key, weight in generator.state_dict().items():
        weight.copy_(before["model"][f"feedforward_model.{key}"])
    adam, discriminator_adam = (
        torch.optim.Adam(network.parameters(), lr=rate, betas=(0.0, 0.99))
        for network, rate in ((generator, 2e-3), (discriminator, 5e-3))
    )
    batches = data.Batches(data.load("folder", tree), 4, 7, "cpu")
    for step in range(2, 7):
        rng = StepRandom(7, step, torch.device("cpu"))
        rng.choice(1)
        z, labels = rng.normal(4, 3, 32, 32).to(memory_format=torch.channels_last), rng.integers(0, 1, 4)
        x_gen = generator(3 * z, 3.0, labels)
        x_real, real_labels = batches(step)
        x_real = torch.where(rng.uniform(4, 1, 1, 1) < 0.5, x_real.flip(-1), x_real)
        features = partial(teacher_features, guidance)
        losses, _ = compute_gan_losses(features, discriminator, x_gen, labels, x_real, real_labels, rng)
        for key, value in losses.items():
            assert rows[step][key] == pytest.approx(value.item(), rel=1e-3, abs=1e-4)
        for network in generator, discriminator:
            network.zero_grad()
        sum(losses.values()).backward()
        discriminator_adam.step()
        if step >= 4:                               # after the discriminator warm-up
            adam.step()
            averaged.append(copy.deepcopy(generator.state_dict()))
    assert len(averaged) == 4
    mean = dict(averaged[0])
    for n, weights in enumerate(averaged[1:], 1):       # Shamir & Zhang 2013, section 4, with eta = 3
        mean = {key: (n * mean[key] + 4 * weights[key]) / (n + 4) for key in mean}
    for key, value in mean.items():
        torch.testing.assert_close(state["model_ema"][key], value, rtol=1e-3, atol=2e-4)
    for key, value in discriminator.state_dict().items():
        torch.testing.assert_close(state["discriminator"][key], value, rtol=1e-3, atol=2e-4)
    for network in ("fake_unet", "real_unet"):      # these do not train
        for key, value in before["model"].items():
            if f".{network}." in key:
                assert torch.equal(state["model"][key], value)


def test_a_run_whose_gan_phase_has_begun_keeps_its_steps(tmp_path, trained_teacher, monkeypatch, capsys):
    run = str(tmp_path / "run")
    flags = ["--teacher", trained_teacher, *TINY, "--run_dir", run, "--log_every", "1"]
    interrupted(monkeypatch, train, 1, signal.SIGTERM)
    assert call(train, *flags, "--steps", "6", "--gan_steps", "3", "--discriminator_warmup_steps", "1") == 143
    resumed = ["--run_dir", run, "--resume", "--device", "cpu"]     # 2 of 6 steps are done, the GAN phase begins at 3
    for steps, begins in (("4", False), ("5", True), ("7", True)):
        monkeypatch.setattr(train, "StepRandom", StepRandom)
        args = ["--steps", steps, "--max_minutes", "1e-9"]
        assert call(train, *resumed, *args) == (0 if begins else 2), steps
        err = capsys.readouterr().err
        assert begins or "--steps 4: with --gan_steps 3 the GAN phase would begin" in err
        if begins:                                  # stopped after one step
            break
    assert checkpoint.load(run)["step"] == 3 and checkpoint.load(run)["settings"]["steps"] == 5
    for steps in ("4", "6"):                        # the phase began at step 2
        assert call(train, *resumed, "--steps", steps) == 2
        assert f"--steps {steps}: with --gan_steps 3 the GAN phase would begin" in capsys.readouterr().err
    assert call(train, *resumed) == 0
    assert ["loss_gan" in row for row in log_of(run)] == [False] * 2 + [True] * 3
    before = read_bytes(f"{run}/checkpoint.pt")
    assert call(train, *resumed, "--steps", "9") == 2 and "--init" in capsys.readouterr().err
    assert call(train, *resumed, "--gan_steps", "1") == 2 and "--gan_steps 1 differs" in capsys.readouterr().err
    assert read_bytes(f"{run}/checkpoint.pt") == before
