"""DMD2 on a plane with exact scores, where the right answers are known; and the program that shows it."""

import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, GaussianDenoiser, call
from PIL import Image
from torch import nn

from diffusion import heun_sample, karras_sigmas
from support import plots, points
from support.points import Mixture
from support.randomness import StepRandom
from tools import plane


def pair():
    """Two Gaussians of weights 1:3 and widths 0.1 and 0.2."""
    return Mixture([[-0.6, 0.0], [0.5, 0.2]], [0.1, 0.2], [1.0, 3.0])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setitem(points.MIXTURES, "pair", pair)
    monkeypatch.setattr(plane, "TEACHER_STEPS", 200)


def distilled(*flags, change=lambda student: None, data="pair"):
    """A student after its training, and its points."""
    args = plane.parse_args(["--conditioning_sigma", "3", "--batch_size", "128", *flags])
    args.data = data
    student = plane.Distillation(args, 0)
    change(student)
    for step in range(args.steps):
        student.step(step)
    return student, student.points()


# --- the distributions ------------------------------------------------------------------------------------------------


def test_a_mixture_of_one_has_the_gaussians_denoiser():
    mixture, x_t, sigma = Mixture([[0.3, 0.3]], [0.2]), torch.randn(5, 2, 1, 1), torch.rand(5, 1, 1, 1) + 0.01
    torch.testing.assert_close(mixture(x_t, sigma, torch.zeros(5)), GaussianDenoiser(0.3, 0.2)(x_t, sigma, None))


def test_the_exact_denoiser_takes_noise_to_the_data():
    data, labels = points.MIXTURES["grid"](), torch.randint(0, 3, (4000,))
    x = heun_sample(data, torch.randn(4000, 2, 1, 1), labels, 40)
    real, _ = data.sample(4000, StepRandom(0, 0), labels)
    assert points.sliced_distance(x, real) < 0.03
    row = data.classes[data.nearest(x)[0]]
    assert (row == labels).double().mean() > 0.99                   # of their own class
    assert data.width_ratio(x) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["circle", "grid", "many", "moons", "spiral", "pair"])
def test_samples_have_the_shares_and_the_widths_of_the_data(name):
    data = points.MIXTURES[name]()
    x, labels = data.sample(20_000, StepRandom(1, 0))
    assert x.shape == (20_000, 2, 1, 1) and x.abs().max() < 2
    if name in ("circle", "grid"):                  # whose modes do not touch
        torch.testing.assert_close(data.mode_shares(x), data.true_shares(), atol=0.02, rtol=0)
        assert data.width_ratio(x) == pytest.approx(1, abs=0.02)
    assert labels.bincount().div(20_000) == pytest.approx(data.class_shares(), abs=0.02)
    again, _ = data.sample(20_000, StepRandom(2, 0))
    assert points.sliced_distance(x, x) == 0 and points.sliced_distance(x, again) < 0.02
    moved = x + torch.tensor([0.1, 0.0])[:, None, None]
    assert points.sliced_distance(x, moved) == pytest.approx(0.2 / math.pi, abs=1e-3)


# --- DMD2 -------------------------------------------------------------------------------------------------------------


def test_with_an_exact_teacher_the_students_shares_and_widths_become_the_datas():
    student, x = distilled("--steps", "700")
    assert student.data.mode_shares(x).tolist() == pytest.approx([0.25, 0.75], abs=0.05)
    assert student.data.width_ratio(x) == pytest.approx(1, abs=0.25)


def test_without_fake_unet_the_student_falls_onto_the_centres_of_the_modes():
    student, x = distilled("--steps", "500", "--without", "fake_unet", "--max_step_percent", "0.35")
    assert student.data.width_ratio(x) < 0.3


def test_guidance_narrows_the_student_as_theory_says():
    class ByLabel(nn.Module):                       # N(0, 0.3^2) for the class, N(0, 0.6^2) for no class
        def forward(self, x_t, sigma, labels):
            own, none = GaussianDenoiser(0, 0.3)(x_t, sigma, None), GaussianDenoiser(0, 0.6)(x_t, sigma, None)
            return torch.where(labels[:, None, None, None] >= 0, own, none)

    sigmas = karras_sigmas()
    t = int((sigmas < 0.2).sum())
    flags = ["--steps", "600", "--min_step_percent", str(t / 1000), "--max_step_percent", str(t / 1000)]
    widths = {}
    for scale in ("1", "2"):
        def change(student):
            student.guidance.real_unet = ByLabel()

        _, x = distilled(*flags, "--cfg_scale", scale, change=change)
        widths[scale] = x.std().item()
    # At one noise level a student N(0, v) has the guided score where
    # 1 / (v + sigma^2) = w / (0.3^2 + sigma^2) - (w - 1) / (0.6^2 + sigma^2)
    square = sigmas[t].item() ** 2
    v = 1 / (2 / (0.09 + square) - 1 / (0.36 + square)) - square
    assert widths["1"] == pytest.approx(0.3, rel=0.1) and widths["2"] == pytest.approx(math.sqrt(v), rel=0.1)


def test_the_gan_phase_repairs_a_teacher_that_is_wrong():
    flags = ["--teacher", "wrong", "--steps", "700"]
    _, alone = distilled(*flags)
    student, x = distilled(*flags, "--gan_steps", "350", "--discriminator_warmup_steps", "50", "--gan_lr", "1e-3")
    rare = student.data.mode_shares(alone)[1].item()
    assert rare < 0.35                              # a tenth of 3, to 1: 0.23; right is 0.75
    assert student.data.mode_shares(x)[1] > rare + 0.15


def test_two_evaluations_are_nearer_than_one_where_the_network_is_too_small(monkeypatch):
    monkeypatch.setattr(plane, "TEACHER_STEPS", 1500)
    small, distances = ["--width", "16", "--steps", "1500", "--batch_size", "256"], []
    for more in [], ["--num_denoising_steps", "2"]:
        student, x = distilled(*small, *more, data="circle")
        distances.append(student.measure(x)["distance"])
    assert distances[1] < 0.85 * distances[0], distances            # 0.036 +- 0.007 and 0.051 +- 0.002, four seeds


# --- the program ------------------------------------------------------------------------------------------------------


def test_the_program_writes_its_pictures_and_says_what_it_found(tmp_path, capsys):
    out, strip = tmp_path / "new" / "a.gif", tmp_path / "strip.png"
    flags = ["--steps", "12", "--fit_steps", "4", "--gan_steps", "4", "--discriminator_warmup_steps", "2"]
    flags += ["--gen_cls_loss_weight", "0.1", "--num_denoising_steps", "2", "--batch_size", "16", "--ode_pairs", "32"]
    assert call(plane, *flags, "--data", "grid", "--seeds", "0", "1", "--out", str(out), "--strip", str(strip)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("grid, seed 0: distance ") and lines[1].startswith("grid, seed 1: distance ")
    assert [line.split()[0] for line in lines[2:7]] == ["distance", "modes", "error", "width", "outside"]
    assert all(" +- " in line for line in lines[2:7])
    animation = Image.open(out)
    assert animation.size == (400, 540) and animation.n_frames == 13
    assert Image.open(out.with_suffix(".png")).size == (400, 540) and Image.open(strip).size == (4 * 300, 330)
    for wrong, said in (
        (["--without", "fake_unet", "--gen_cls_loss_weight", "1"], "--without fake_unet"),
        (["--width", "9"], "--width 9"),
        (["--autoguidance_scale", "2"], "--autoguidance_scale"), (["--out", str(tmp_path / "a.png")], "--out"),
    ):
        assert call(plane, "--steps", "1", *wrong) == 2 and said in capsys.readouterr().err


def test_equal_seeds_give_equal_students():
    one, other = (distilled("--steps", "5", "--gen_cls_loss_weight", "0.1", data="moons")[1] for _ in range(2))
    assert torch.equal(one, other)


def test_a_plot_has_its_points_and_arrows_where_their_coordinates_are():
    canvas = plots.Canvas(100, 100)
    axes = canvas.axes((0, 0, 100, 100), (-1, 1), (-1, 1))
    axes.points([(0.5, 0.5), (3.0, 0.0)], colour=(255, 0, 0), radius=4)
    axes.arrows([(-0.5, -0.5)], [(0.0, 5.0)], colour=(0, 0, 255), longest=0.5)
    picture = canvas.image()
    assert picture.getpixel((75, 25))[1] < 160 < picture.getpixel((75, 25))[0]      # red, upper right
    assert picture.getpixel((25, 62))[2] > picture.getpixel((25, 62))[0] + 50       # blue, upwards from the lower left
    assert picture.getpixel((25, 40)) == (255, 255, 255)                            # and not longer


def test_the_worked_example_of_a_new_loss_applies_and_runs(tmp_path):
    patch, *_ = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "fork.md").read_text(encoding="utf-8"), re.DOTALL)
    left_out = shutil.ignore_patterns(".*", "runs", "data", "weights", "*.png", "tests")
    copy = shutil.copytree(ROOT, tmp_path / "fork", ignore=left_out)
    subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=copy, check=True)
    program = "from tools import plane; plane.TEACHER_STEPS = 2; plane.main(['--steps', '4', '--no-animate'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "circle, seed 0: distance" in done.stdout
