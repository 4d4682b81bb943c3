import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, GaussianDenoiser

import diffusion
from model import VelocityDenoiser

MU, S0 = 0.3, 0.5
# Runs the commands of docs/fork.md, shortened.
PROGRAM = """
import os, shlex, torch, flow, sample, train
from PIL import Image
from support import archive, checkpoint, errors, networks
from support.classifier import Classifier, small_body
torch.save(flow.Flow().state_dict(), "ema.pt")
exec(open("teacher.py").read())
few = dict(sample="--num_images 2", train="--batch_size 2 --steps 2")
for line in COMMANDS:
    _, script, *argv = shlex.split(line)
    name = script.removesuffix(".py")
    dict(sample=sample, train=train)[name].main([*argv, "--device", "cpu", *few[name].split()])
for flag in "--gen_cls_loss_weight 0.1", "--gan_steps 300":
    try:
        train.main(["--preset", "none", "--teacher", "mine.pt", "--run_dir", "no", "--device", "cpu", *flag.split()])
    except errors.UsageError as error:
        assert "--gan_steps need features, which mine.pt has not" in str(error)
    else:
        raise AssertionError(flag)
assert not os.path.exists("no")
archive.save(Classifier(small_body(32), 128, 10), "features.pt2", 32)
for name in checkpoint.load("mine.pt")["classes"]:
    os.makedirs(f"images/{name}")
    for i in range(2):
        Image.new("RGB", (32, 32), (100 * i, 90, 200)).save(f"images/{name}/{i}.png")
train.main([*"--preset none --teacher mine.pt --run_dir gan --device cpu --dataset folder --data_dir images".split(),
            *"--gan_steps 2 --steps 2 --discriminator_warmup_steps 1 --batch_size 2".split(),
            "--gan_features", "features.pt2"])
assert checkpoint.load("gan", kind="student")["step"] == 2
assert isinstance(networks.averaged(checkpoint.load("runs/dmd2", kind="student")), flow.Flow)
"""


class GaussianFlow(VelocityDenoiser):
    """The velocity E[eps - x_0 | y_t] of data N(mu, s0^2 I), exactly."""

    def __init__(self, flipped=False):
        super().__init__()
        self.flipped, self.seen = flipped, []

    def velocity(self, y, t):
        variance = (1 - t) ** 2 * S0**2 + t**2                                      # of y_t, around (1 - t) mu
        return (t - (1 - t) * S0**2) * (y - (1 - t) * MU) / variance - MU

    def network(self, y, t, labels, return_features=False):
        self.seen.append(t)
        t = t.view(-1, 1, 1, 1)
        if return_features:
            return [y, t]
        return -self.theirs(y, 1 - t) if self.flipped else self.velocity(y, t)

    def theirs(self, y, s):
        """The same flow where s = 1 is the data: dy/ds = x_0 - eps."""
        return -self.velocity(y, 1 - s)


@pytest.mark.parametrize("flipped", [False, True])
def test_the_exact_velocity_gives_the_ideal_denoiser(flipped):
    flow, ideal, labels = GaussianFlow(flipped), GaussianDenoiser(MU, S0), torch.zeros(5, dtype=torch.long)
    sigma = torch.tensor([0.002, 0.05, 0.5, 5.0, 80.0]).view(-1, 1, 1, 1)
    x = MU + S0 * torch.randn(5, 3, 32, 32) + sigma * torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(flow(x, sigma, labels), ideal(x, sigma, labels), rtol=0, atol=1e-5)
    assert flow.seen[0].shape == (5,)
    torch.testing.assert_close(flow.seen[0], (sigma / (1 + sigma)).flatten())


def test_the_network_sees_the_flows_noisy_images():
    x_0, eps, t = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.tensor([0.1, 0.4, 0.8, 0.98])
    sigma = t / (1 - t)
    y, _ = GaussianFlow()(x_0 + sigma.view(-1, 1, 1, 1) * eps, sigma, None, return_features=True)
    t = t.view(-1, 1, 1, 1)
    torch.testing.assert_close(y, (1 - t) * x_0 + t * eps, rtol=1e-5, atol=1e-5)


def test_every_form_of_sigma_means_the_same():
    flow, x, labels = GaussianFlow(), torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
    wanted = flow(x, torch.full((2, 1, 1, 1), 0.7), labels)
    for sigma in (0.7, torch.tensor(0.7), torch.full((2,), 0.7), torch.tensor(0.7, dtype=torch.float64)):
        torch.testing.assert_close(flow(x, sigma, labels), wanted)
    with pytest.raises(ValueError, match="sigma"):
        flow(x, torch.ones(3), labels)


def test_the_formula_is_float32_whatever_the_networks_precision():
    flow, x, labels = GaussianFlow(), 80 * torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
    flow.network = lambda y, t, *_: torch.ones_like(y, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        x0_hat = flow(x.double(), 80.0, labels)
    torch.testing.assert_close(x0_hat, (x - 80) / 81)


def test_heuns_sampler_makes_images_of_the_data():
    z = torch.randn(64, 3, 32, 32)
    images = diffusion.heun_sample(GaussianFlow(), z, torch.zeros(64, dtype=torch.long), num_steps=64)
    assert images.mean().item() == pytest.approx(MU, abs=0.01) and images.std().item() == pytest.approx(S0, abs=0.01)
    # The ODE of Gaussian data has a closed solution: x(sigma) - mu shrinks as sqrt(s0^2 + sigma^2).
    exact = MU + (80 * z - MU) * S0 / (S0**2 + 80**2) ** 0.5
    torch.testing.assert_close(images, exact, rtol=0, atol=0.01)


def test_the_worked_example_of_a_flow_runs(tmp_path):
    page = (ROOT / "docs" / "fork.md").read_text(encoding="utf-8")
    section = page.partition("### An example: a flow")[2].partition("\n## ")[0]
    (patch,) = re.findall(r"```diff\n(.*?)```", section, re.DOTALL)
    network, teacher = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    left_out = shutil.ignore_patterns(".*", "runs", "data", "weights", "*.png", "tests")
    copy = shutil.copytree(ROOT, tmp_path / "fork", ignore=left_out)
    subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=copy, check=True)
    (copy / "flow.py").write_text(network)
    (copy / "teacher.py").write_text(teacher)
    program = PROGRAM.replace("COMMANDS", repr(re.findall(r"^    (python .*)", section, re.MULTILINE)))
    done = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
