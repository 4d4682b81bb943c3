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
    (dict(model_ema={}), "does not fit"),
])
def test_of_checkpoints_that_differ_there_is_no_mean(tmp_path, capsys, changes, line):
    one, other = scaled_student(tmp_path / "one.pt"), scaled_student(tmp_path / "other.pt", **changes)
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
