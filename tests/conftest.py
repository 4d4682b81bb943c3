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
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TINY = ["--preset", "none", "--device", "cpu", "--batch_size", "4"]
TINY += ["--log_every", "2", "--sample_every", "5", "--save_every", "3"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def handlers():
    """A script's signal handlers end with its test."""
    from support import signals

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
    from support import errors

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
