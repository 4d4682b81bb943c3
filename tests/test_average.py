"""tools/average.py: the mean of checkpoints is the mean of their weights, and wrong calls write nothing."""

import pytest
import torch
from conftest import call, save_net, trained_net

import sample
from support import checkpoint
from tools import average


def scaled_student(path, factor=1.0, **changes):
    """A checkpoint of one small network, its weights times a factor."""
    torch.manual_seed(0)
    net = trained_net(channels=8, label_dim=2)
    weights = {name: factor * weight for name, weight in net.state_dict().items()}
    return save_net(path, net, **(dict(classes=["a", "b"], model_ema=weights) | changes))


def test_the_mean_of_the_weights(tmp_path):
    paths = [scaled_student(tmp_path / f"{i}.pt", factor) for i, factor in enumerate([1.0, 2.0, 6.0])]
    out = str(tmp_path / "mean.pt")
    assert call(average, *paths, "--out", out) == 0
    weights, mean = checkpoint.load(paths[0])["model_ema"], checkpoint.load(out, kind="student")
    assert weights.keys() == mean["model_ema"].keys()
    for name, weight in mean["model_ema"].items():
        torch.testing.assert_close(weight, 3 * weights[name])
    assert mean["denoising_sigmas"] == [80.0] and mean["step"] == 7
    assert call(sample, "--checkpoint", out, "--out", str(tmp_path / "grid.png"), "--device", "cpu") == 0


@pytest.mark.parametrize("changes, line", [
    (dict(classes=["a", "c"]), "differ in their classes"),
    (dict(denoising_sigmas=[3.0]), "differ in their denoising_sigmas"),
    (dict(kind="teacher"), "differ in their kind"),
    (dict(sigma_min=0.01), "differ in their sigma_min"),
    (dict(teacher_digest="2"), "differ in their teacher"),
    (dict(model_config=dict(channels=8, label_dim=2, blocks=2)), "does not fit"),
    (dict(model_ema={}), "does not fit"),
])
def test_of_checkpoints_that_differ_there_is_no_mean(tmp_path, capsys, changes, line):
    one = scaled_student(tmp_path / "one.pt", teacher_digest="1")
    other = scaled_student(tmp_path / "other.pt", **(dict(teacher_digest="1") | changes))
    assert call(average, one, other, "--out", str(tmp_path / "mean.pt")) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "mean.pt").exists()


def test_wrong_calls(tmp_path, capsys):
    one = scaled_student(tmp_path / "one.pt")
    before = (tmp_path / "one.pt").read_bytes()
    assert call(average, one, "--out", str(tmp_path / "mean.pt")) == 2
    assert "two checkpoints" in capsys.readouterr().err
    assert call(average, one, one, "--out", one) == 2
    assert f"{one} is there already" in capsys.readouterr().err
    assert call(average, one, str(tmp_path / "none"), "--out", str(tmp_path / "mean.pt")) == 2
    assert f"no checkpoint at {tmp_path}/none" in capsys.readouterr().err
    assert call(average, one, one, "--out", f"{one}/mean.pt") == 2
    assert f"--out: '{one}/mean.pt': Not a directory" in capsys.readouterr().err
    assert (tmp_path / "one.pt").read_bytes() == before and not (tmp_path / "mean.pt").exists()


def test_what_is_averaged_is_said_and_an_older_file_of_the_same_network_fits(tmp_path, capsys):
    """An older version had not named the network, nor written what was its only choice then."""
    one = scaled_student(tmp_path / "one.pt", teacher_digest="1")
    old = scaled_student(tmp_path / "old.pt", 3.0, model_config=dict(channels=8, label_dim=2), step=9)
    assert checkpoint.load(one)["model_config"] != checkpoint.load(old)["model_config"]
    out = str(tmp_path / "mean.pt")
    assert call(average, one, old, "--out", out) == 0
    said = capsys.readouterr()
    assert said.out.strip() == f"{out}: the mean of 2 students, {one} (step 7), {old} (step 9)"
    assert said.err.strip() == f"note: {old} does not say of which teacher it is"
    weights, mean = checkpoint.load(one)["model_ema"], checkpoint.load(out)
    for name, weight in mean["model_ema"].items():
        torch.testing.assert_close(weight, 2 * weights[name])
    assert mean["teacher_digest"] == "1"
    other = scaled_student(tmp_path / "other.pt", teacher_digest="2")
    assert call(average, old, one, other, "--out", str(tmp_path / "no.pt")) == 2
    assert f"{other} and {one} differ in their teacher" in capsys.readouterr().err


def test_weights_that_are_not_finite_have_no_mean(tmp_path, capsys):
    one, bad = scaled_student(tmp_path / "one.pt"), scaled_student(tmp_path / "bad.pt", float("nan"))
    assert call(average, one, bad, "--out", str(tmp_path / "mean.pt")) == 2
    assert f"the weights of {bad} are NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "mean.pt").exists()
