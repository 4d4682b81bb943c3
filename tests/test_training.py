"""The two loops against the same steps written out here, and what they log."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from conftest import call, log_of, make_teacher, teacher_flags
from PIL import Image

import diffusion
import guidance as guidance_module
import train
import train0
from guidance import GuidanceModel
from model import SimpleUNet
from support import checkpoint, data, hardware, networks, optimizers, pictures, processes, signals
from support.meter import Meter
from support.randomness import StepRandom, image_noise
from unified_model import UnifiedModel

CPU = torch.device("cpu")
SIGMAS = ["--sigma_min", "0.01", "--sigma_max", "40"]
# Clipping, rise and cosine all act within a few steps.
STEPS = ["--preset", "none", "--precision", "fp32", "--log_every", "1", "--max_grad_norm", "0.005"]
STEPS += ["--warmup_steps", "2"]
STEPS += ["--lr_schedule", "cosine", "--ema_decay", "0.2", "--flip", "1"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of images that mirroring changes."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return str(root)


@pytest.fixture(scope="module")
def photo_teacher(tmp_path_factory, photographs):
    """One that can be guided, and whose network is not zero any more."""
    flags = ["--steps", "5", "--warmup_steps", "0", "--lr", "1e-2", "--label_dropout", "0.5", *SIGMAS]
    return make_teacher(tmp_path_factory.mktemp("runs") / "teacher", photographs, *flags)


def step_of_adam(optimizer, loss, rates, step, steps):
    """A step at gradients of length 0.005 at most, after a rise of two steps on a cosine; returns their length."""
    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    length = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    for gradient in gradients:
        gradient *= min(1, 0.005 / length)
    factor = (step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / (steps - 2))) / 2
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
    optimizer.step()
    return length


@torch.no_grad()
def average_in(average, net, update):
    decay = min(0.2, (1 + update) / (10 + update))
    for mean, value in zip(average.parameters(), net.parameters(), strict=True):
        mean.copy_(decay * mean + (1 - decay) * value)


def assert_as_trained(state, net, start):
    """A state dict is that of net, to what rounding makes of the way from start."""
    ours, theirs, first = ([value.flatten() for value in s.values()] for s in (state, net.state_dict(), start))
    ours, theirs, first = torch.cat(ours), torch.cat(theirs), torch.cat(first)
    assert (theirs - first).norm() > 0 and (ours - theirs).norm() < 0.01 * (theirs - first).norm()


@pytest.mark.formula
def test_the_teachers_loop(tmp_path, photographs):
    flags = ["--p_mean", "-0.3", "--p_std", "0.7", "--label_dropout", "0.3"]
    flags += ["--blocks", "2", "--seed", "5", "--steps", "6", "--lr", "1e-2", "--run_dir", str(tmp_path)]
    assert call(train0, *teacher_flags(photographs), *STEPS, *SIGMAS, *flags) == 0

    torch.manual_seed(5)
    net = SimpleUNet(8, 2, 2).to(memory_format=torch.channels_last)
    average, start = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters())
    batches = data.Batches(data.load("folder", photographs), 4, 5, "cpu")
    expected = []
    for step in range(6):
        x_0, labels = batches(step)
        rng = StepRandom(5, step, CPU)
        x_0 = torch.where(rng.uniform(4, 1, 1, 1) < 0.5, x_0.flip(-1), x_0)
        labels = torch.where(rng.uniform(4) < 0.3, -1, labels)
        sigma = torch.exp(-0.3 + 0.7 * rng.normal(4, 1, 1, 1))
        x_t = (x_0 + sigma * rng.normal(4, 3, 32, 32)).to(memory_format=torch.channels_last)
        loss = ((1 / sigma**2 + 1 / 0.5**2) * (net(x_t, sigma, labels) - x_0) ** 2).mean()
        length = step_of_adam(optimizer, loss, [1e-2], step, 6)
        average_in(average, net, step)
        expected.append((loss.item(), length, optimizer.param_groups[0]["lr"]))
    assert min(length for _, length, _ in expected) > 0.005, "no gradient was clipped: nothing is said of clipping"
    for row, wanted in zip(log_of(tmp_path), expected, strict=True):
        assert (row["loss"], row["grad_norm"], row["lr"]) == pytest.approx(wanted, rel=0.01)
    state = checkpoint.load(tmp_path)
    assert_as_trained(state["model"], net, start)
    assert_as_trained(state["model_ema"], average, start)


@pytest.mark.formula
@pytest.mark.parametrize("head", [False, True])
def test_the_students_loop(tmp_path, photographs, photo_teacher, head, monkeypatch):
    flags = ["--teacher", photo_teacher, "--run_dir", str(tmp_path), "--batch_size", "4", "--device", "cpu"]
    flags += ["--seed", "7", "--steps", "5", "--dfake_gen_update_ratio", "2", "--generator_lr", "3e-3"]
    flags += ["--guidance_lr", "5e-3", "--conditioning_sigma", "3", "--fake_noise", "dm", "--min_step_percent", "0.3"]
    flags += ["--max_step_percent", "0.6", "--cfg_scale", "5", "--cfg_interval", "0.5", "2"]
    if head:
        flags += ["--gen_cls_loss_weight", "0.1", "--cls_loss_weight", "0.2", "--cls_head_lr", "2e-3"]
        flags += ["--diffusion_gan_max_timestep", "700"]
    grads, generate = [], UnifiedModel.generate

    def spy(*args, **how):
        grads.append(torch.is_grad_enabled())
        return generate(*args, **how)

    monkeypatch.setattr(UnifiedModel, "generate", spy)
    assert call(train, *STEPS, *flags) == 0
    assert grads == [True, False, True, False, True]                # a guidance turn alone needs none

    net = networks.averaged(checkpoint.load(photo_teacher))
    start = copy.deepcopy(net.state_dict())
    adversarial = dict(cls_head=True, diffusion_gan_max_timestep=700) if head else {}
    torch.manual_seed(7)
    guidance = GuidanceModel(
        net, 0.3, 0.6, 0.01, 40.0, cfg_scale=5, cfg_interval=(0.5, 2), fake_noise="dm", **adversarial
    ).to(memory_format=torch.channels_last)
    generator, average = copy.deepcopy(guidance.fake_unet), copy.deepcopy(net)
    generator_adam = torch.optim.Adam(generator.parameters())
    trained = [guidance.fake_unet, guidance.cls_head] if head else [guidance.fake_unet]
    guidance_adam = torch.optim.Adam(dict(params=network.parameters()) for network in trained)
    batches = data.Batches(data.load("folder", photographs), 4, 7, "cpu")
    rows = log_of(tmp_path)
    for step in range(5):
        rng, wanted = StepRandom(7, step, CPU), {}
        z, labels = rng.normal(4, 3, 32, 32).to(memory_format=torch.channels_last), rng.integers(0, 1, 4)
        x_gen = generator(3 * z, 3.0, labels)
        if step % 2 == 0:
            loss = wanted["loss_dm"] = guidance.compute_distribution_matching_loss(x_gen, labels, rng)[0]
            if head:
                wanted["gen_cls_loss"] = guidance.compute_generator_cls_loss(x_gen, labels, rng)[0]
                loss = loss + 0.1 * wanted["gen_cls_loss"]
            wanted["generator_grad_norm"] = step_of_adam(generator_adam, loss, [3e-3], step, 5)
            assert wanted["generator_grad_norm"] > 0.005, "no gradient was clipped: nothing is said of clipping"
            average_in(average, generator, step // 2)
        if head:
            x_real, real_labels = batches(step)
            x_real = torch.where(rng.uniform(4, 1, 1, 1) < 0.5, x_real.flip(-1), x_real)
        loss = wanted["loss_fake"] = guidance.compute_loss_fake(x_gen, labels, rng)[0]
        if head:
            wanted["cls_loss"] = guidance.compute_cls_loss(x_gen, labels, x_real, real_labels, rng)[0]
            loss = loss + 0.2 * wanted["cls_loss"]
        wanted["fake_grad_norm"] = step_of_adam(guidance_adam, loss, [5e-3, 2e-3][:len(trained)], step, 5)
        assert {name: rows[step][name] for name in wanted} == {
            name: pytest.approx(torch.as_tensor(value).item(), rel=0.01) for name, value in wanted.items()
        }
    state = checkpoint.load(tmp_path)

    def part(name):
        return {key[len(name):]: value for key, value in state["model"].items() if key.startswith(name)}

    assert_as_trained(part("feedforward_model."), generator, start)
    assert_as_trained(part("guidance_model.fake_unet."), guidance.fake_unet, start)
    assert_as_trained(state["model_ema"], average, start)
    assert all(torch.equal(part("guidance_model.real_unet.")[name], value) for name, value in start.items())


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_give_the_steps_of_the_whole_batch(tmp_path, photographs, photo_teacher, microbatches):
    both = ["--preset", "none", "--batch_size", "8", "--device", "cpu", "--steps", "4", "--warmup_steps", "0"]
    calls = {train0: ["--dataset", "folder", "--data_dir", photographs, "--channels", "8", "--label_dropout", "0.5"]}
    calls[train] = ["--teacher", photo_teacher, "--gen_cls_loss_weight", "0.1", "--dfake_gen_update_ratio", "2"]
    calls[train] += ["--num_denoising_steps", "2", "--conditioning_sigma", "3", "--generator_lr", "1e-3"]
    calls[train] += ["--gan_steps", "1", "--discriminator_warmup_steps", "0"]
    for script, flags in calls.items():
        runs = [tmp_path / f"{script.__name__}{n}" for n in (1, microbatches)]
        for run, n in zip(runs, (1, microbatches), strict=True):
            how = ["--precision", "fp32", "--log_every", "1", "--accumulate", str(n), "--run_dir", str(run)]
            assert call(script, *flags, *both, *how) == 0
        logs = [log_of(run) for run in runs]
        assert len(logs[0]) == 4
        for one, other in zip(*logs, strict=True):
            assert one.keys() == other.keys()
            names = [name for name in one if "loss" in name or "norm" in name or "logit" in name]
            assert [other[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-3)


def test_float16_learns_as_float32_does(tmp_path, photographs, photo_teacher):
    few = ["--preset", "none", "--batch_size", "4", "--device", "cpu", "--steps", "3", "--warmup_steps", "0"]
    few += ["--log_every", "1"]
    student = ["--teacher", photo_teacher, "--gan_steps", "1", "--discriminator_warmup_steps", "0"]
    student += ["--num_denoising_steps", "2"]
    calls = {train0: teacher_flags(photographs), train: student}
    for script, flags in calls.items():
        losses = {}
        for precision in ("fp32", "fp16"):
            run = tmp_path / script.__name__ / precision
            assert call(script, *flags, *few, "--precision", precision, "--run_dir", str(run)) == 0
            names = ("loss", "loss_fake", "loss_discriminator")
            losses[precision] = [row[name] for row in log_of(run) for name in names if name in row]
        assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.05) and losses["fp16"] != losses["fp32"]
        state = checkpoint.load(run)
        optimizer, steps = (state["optimizer"], 3) if script is train0 else (state["dmd2"]["guidance"], 2)
        assert optimizer["scale"] == (2.0**16, steps)


def test_what_a_generators_loss_leaves_on_fake_unet_does_not_train_it(tmp_path, photo_teacher, monkeypatch):
    flags = ["--preset", "none", "--teacher", photo_teacher, "--batch_size", "4", "--device", "cpu"]
    flags += ["--steps", "2", "--gen_cls_loss_weight", "0.1", "--cfg_scale", "5", "--precision", "fp32"]
    assert call(train, *flags, "--run_dir", str(tmp_path / "a")) == 0
    monkeypatch.setattr(guidance_module, "frozen", lambda *modules: contextlib.nullcontext())
    assert call(train, *flags, "--run_dir", str(tmp_path / "b")) == 0
    one, other = (checkpoint.load(tmp_path / name)["model"] for name in "ab")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_grid_shows_the_guided_teacher_and_the_averaged_student_from_the_same_noise(tmp_path, photo_teacher):
    flags = ["--teacher", photo_teacher, "--run_dir", str(tmp_path), "--batch_size", "4", "--device", "cpu"]
    flags += ["--preset", "none", "--precision", "fp32"]
    flags += ["--conditioning_sigma", "3", "--cfg_scale", "5", "--generator_lr", "1e-2"]
    flags += ["--warmup_steps", "0", "--steps", "2", "--dfake_gen_update_ratio", "1", "--sample_every", "2"]
    assert call(train, *flags) == 0

    z, labels = image_noise(0, range(16), 32), torch.arange(16) % 2
    net, state = networks.averaged(checkpoint.load(photo_teacher)), checkpoint.load(tmp_path)
    from_teacher = diffusion.heun_sample(diffusion.guided(net, 5), z, labels, 18, 0.01, 40)
    from_student = networks.averaged(state)(3 * z, 3.0, labels)
    expected = pictures.side_by_side(*(pictures.class_grid(images, 2) for images in (from_teacher, from_student)))
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "grids" / "0000002_teacher_student.png"))).movedim(2, 0)
    assert (picture - 255 * expected).abs().max() <= 1
    # Another network than the average, or the teacher unguided, is told apart.
    state["model_ema"] = {name: state["model"][f"feedforward_model.{name}"] for name in state["model_ema"]}
    for one, other in ((networks.averaged(state)(3 * z, 3.0, labels), from_student),
                       (diffusion.heun_sample(net, z, labels, 18, 0.01, 40), from_teacher)):
        assert (data.to_uint8(one).int() - data.to_uint8(other).int()).abs().max() > 4


def test_a_reading_is_the_mean_of_its_steps_and_begins_anew():
    meter = Meter(CPU)
    for step, loss in enumerate((1.0, 2.0, 6.0)):
        meter.add(step, loss=torch.tensor(loss))
    meter.add(2, other=torch.tensor(5.0))
    assert meter.read() == dict(loss=3.0, other=5.0) and meter.state() == {}


def test_a_mean_over_processes_that_a_resume_restores_is_still_the_mean(monkeypatch):
    monkeypatch.setattr(processes, "WORLD", 3)
    monkeypatch.setattr(processes, "sum_on_host", lambda numbers: numbers + numbers + numbers)
    value = 11184814 * 2.0**-23                     # a third of its triple in float32 is another number
    assert Meter(CPU, dict(loss={1: value})).state() == dict(loss={1: value})


def test_precision_is_that_of_the_networks_products():
    a = torch.randn(2, 2)
    for precision, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32), ("fp32", torch.float32)):
        with hardware.autocast(CPU, precision):
            assert (a @ a).dtype == dtype


def test_a_second_signal_ends_the_process_but_not_the_same_one_twice(monkeypatch):
    killed = []
    monkeypatch.setattr(signals.signal, "raise_signal", killed.append)
    stop = signals.StopSignal()
    assert not stop
    for _ in range(2):                              # Ctrl-C, which torchrun passes on
        stop.handle(2, None)
    assert stop and killed == []
    stop.since -= 2
    stop.handle(2, None)
    assert killed == [2]


def test_the_learning_rate_rises_and_then_stays_or_falls_to_zero():
    def factors(*steps, **how):
        return [optimizers.lr_factor(i, 110, **how) for i in steps]

    cosine = dict(warmup_steps=10, schedule="cosine")
    assert factors(*range(10), **cosine) == pytest.approx([0.1 * n for n in range(1, 11)])
    assert factors(10, 35, 60, 110, **cosine) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0])
    assert factors(9, 10, 109, 500, warmup_steps=10) == [1, 1, 1, 1] and factors(0) == [1]
    assert factors(0, 55, schedule="cosine") == pytest.approx([1, 0.5])
    assert optimizers.lr_factor(0, 0, schedule="cosine") == 1       # a phase without steps
