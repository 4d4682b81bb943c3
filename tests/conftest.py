"""Fixtures and helpers that more than one test file needs."""

import json
import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"                 # the nets here are tiny: threads would only wait for one another

import pytest
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
import train0
from model import SimpleUNet
from support import checkpoint, errors, signals

GPUS = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
DEVICES = ["cpu", *(name for name, there in GPUS.items() if there)]
TINY = ["--preset", "none", "--device", "cpu", "--batch_size", "4"]
TINY += ["--log_every", "2", "--sample_every", "5", "--save_every", "3"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def handlers():
    """A script's signal handlers end with its test."""
    before = [(s, signal.getsignal(s)) for s in signals.SIGNALS]
    yield
    for signum, handler in before:
        signal.signal(signum, handler)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.failed and item.get_closest_marker("formula"):
        report.sections.append(("what this means", (
            "This test writes a formula or a loop out again, so it fails by design where that is changed: change both."
        )))


def call(script, *argv):
    """Exit code of `python script.py argv`, in this process."""
    with pytest.raises(SystemExit) as exit_info:
        errors.run(lambda: script.main(list(argv)))
    return exit_info.value.code or 0


def image_tree(root, classes=("cat", "dog"), n=3, size=(48, 40)):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", size, (50 * label, 10 * i, 200)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return str(image_tree(tmp_path_factory.mktemp("data") / "tree"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A tree of as many images as a measurement needs."""
    return str(image_tree(tmp_path_factory.mktemp("data") / "many", n=32))


def teacher_flags(tree):
    return ["--dataset", "folder", "--data_dir", tree, "--channels", "8", *TINY]


def make_teacher(folder, tree, *flags):
    """Train a tiny teacher on the images of `tree`; returns its run folder as a string."""
    assert call(train0, *teacher_flags(tree), "--run_dir", str(folder), *flags) == 0
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tree, tmp_path_factory):
    """Six steps at the default learning rate; no label dropout, so no classifier-free guidance."""
    return make_teacher(tmp_path_factory.mktemp("runs") / "teacher", tree, "--steps", "6")


@pytest.fixture(scope="module")
def trained_teacher(tree, tmp_path_factory):
    """A teacher that can be guided, trained at a rate that takes its weights far from their initial zeros."""
    few = ["--steps", "3", "--warmup_steps", "0", "--lr", "1e-2", "--label_dropout", "0.5"]
    return make_teacher(tmp_path_factory.mktemp("runs") / "trained_teacher", tree, *few)


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs") / "student")
    assert call(train, "--teacher", teacher, "--run_dir", folder, "--steps", "1", *TINY) == 0
    return folder


def trained_net(**config):
    """A network whose zero-initialised layers are not zero any more, so that every path matters."""
    net = SimpleUNet(**config)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return net


def save_net(path, net, **fields):
    """Write a checkpoint with the averaged weights `net`, by default that of a one-step student; returns its path."""
    known = dict(kind="student", step=7, model_config=net.config, model_ema=net.state_dict())
    known.update(sigma_min=0.002, sigma_max=80.0, denoising_sigmas=[80.0])
    checkpoint.save(path, known | fields)
    return str(path)


def read_bytes(path):
    return Path(path).read_bytes()


def log_of(run, speed=True):
    """The lines of a run's log.jsonl as dicts; speed=False leaves out what differs between two runs of the same."""
    rows = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    left_out = () if speed else ("images_per_second", "memory_mib")
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


def assert_same_run(one, other):
    """Two run folders hold the same weights, averages, optimizer states, logged losses and grids, bit for bit."""
    def flat(value, prefix=""):
        if isinstance(value, dict):
            return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}/{key}").items()}
        return {prefix: value}

    a, b = flat(checkpoint.load(one)), flat(checkpoint.load(other))
    assert a.keys() == b.keys()
    different = [k for k in a if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]
    assert different == []
    assert log_of(one, speed=False) == log_of(other, speed=False)
    grids = set(os.listdir(f"{one}/grids"))
    assert grids and grids <= set(os.listdir(f"{other}/grids"))     # `other` may have one more, drawn when it stopped
    for name in grids:
        assert read_bytes(f"{one}/grids/{name}") == read_bytes(f"{other}/grids/{name}")


def interrupted(monkeypatch, script, at_step, signum):
    """Make the script receive a signal in the middle of step at_step, once."""
    original = script.StepRandom

    def step_random(seed, step, *where):
        if step == at_step and not done:
            done.append(True)
            os.kill(os.getpid(), signum)
        return original(seed, step, *where)

    done = []
    monkeypatch.setattr(script, "StepRandom", step_random)


class Features(nn.Module):
    """Fixed random features of 8 numbers, and the red, green and blue means as logits."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, stride=8)

    def forward(self, images):
        x = images.float() / 255
        return self.conv(x).tanh().mean((2, 3)), x.mean((2, 3))


def export(path, network, example=None, **extra_files):
    example = torch.zeros(4, 3, 32, 32, dtype=torch.uint8) if example is None else example
    batch = ({0: torch.export.Dim("n")},)
    program = torch.export.export(network.eval(), (example,), dynamic_shapes=batch)
    torch.export.save(program, path, extra_files=extra_files)
    return str(path)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    torch.manual_seed(1)
    return export(tmp_path_factory.mktemp("features") / "features.pt2", Features())


class GaussianDenoiser(nn.Module):
    """The ideal denoiser of data N(mu, s0^2 I), which DMD2's networks approximate: E[x_0 | x_t]."""

    def __init__(self, mu, s0):
        super().__init__()
        self.mu, self.s0 = mu, s0

    def forward(self, x, sigma, labels):
        sigma = torch.as_tensor(sigma, dtype=x.dtype)
        return (self.s0**2 * x + sigma**2 * self.mu) / (self.s0**2 + sigma**2)
