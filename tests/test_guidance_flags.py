"""Classifier-free guidance and autoguidance (by guide.pt, an earlier teacher), from training to samples."""

import signal

import numpy as np
import torch
from conftest import TINY, assert_same_run, call, interrupted, log_of, make_teacher, teacher_flags

import diffusion
import sample
import train
import train0
from support import checkpoint


def test_several_steps_and_a_guided_teacher_from_training_to_samples(tmp_path, tree, capsys):
    a, b = make_teacher(tmp_path / "a", tree, "--steps", "2", "--label_dropout", "0.5"), f"{tmp_path}/b"
    flags = ["--cfg_scale", "1.5", "--num_denoising_steps", "4", "--steps", "2"]
    assert call(train, "--teacher", a, "--run_dir", b, *flags, *TINY) == 0
    assert checkpoint.load(b)["denoising_sigmas"] == diffusion.denoising_sigmas(80.0, 4)
    paths = ["--out", f"{tmp_path}/x.png", "--npz", f"{tmp_path}/x.npz", "--device", "cpu"]
    images = []
    for more in (["--num_images", "6"], ["--num_images", "4", "--batch_size", "3"]):
        capsys.readouterr()
        assert call(sample, "--checkpoint", b, *more, *paths) == 0
        assert "4 evaluations each" in capsys.readouterr().out
        images.append(np.load(f"{tmp_path}/x.npz")["arr_0"].astype(int))
    assert abs(images[0][:4] - images[1]).max() <= 1                # each image has its own noise between steps, too
    for scale, evaluations in (("0", 6), ("1", 3), ("3", 6)):
        assert call(sample, "--checkpoint", a, "--cfg_scale", scale, "--num_steps", "2", *paths) == 0
        assert f" {evaluations} evaluations each" in capsys.readouterr().out
        images.append(np.load(f"{tmp_path}/x.npz")["arr_0"])
    assert not np.array_equal(images[2], images[3]) and not np.array_equal(images[3], images[4])
    for low, high, alike in (("0", "100", 4), ("90", "100", 3)):    # guided at all noise levels but the first; unguided
        flags = ["--cfg_scale", "3", "--cfg_interval", low, high, "--num_steps", "2"]
        assert call(sample, "--checkpoint", a, *flags, *paths) == 0
        assert abs(np.load(f"{tmp_path}/x.npz")["arr_0"] - images[alike].astype(int)).max() <= 1
    flags = ["--cfg_scale", "3", "--cfg_interval", "0.1", "10", "--steps", "1"]
    assert call(train, "--teacher", a, "--run_dir", f"{tmp_path}/c", *flags, *TINY) == 0
    assert checkpoint.load(f"{tmp_path}/c")["settings"]["cfg_interval"] == [0.1, 10.0]
    capsys.readouterr()
    assert call(sample, "--checkpoint", b, "--cfg_scale", "2", *paths) == 2         # it would do nothing
    assert "--cfg_scale is for teachers" in capsys.readouterr().err


def test_an_early_teacher_guides_the_later_one_from_training_to_samples(tmp_path, tree, capsys, monkeypatch):
    a, b, guide = f"{tmp_path}/a", f"{tmp_path}/b", tmp_path / "a" / "guide.pt"
    flags = [*teacher_flags(tree), "--run_dir", a, "--steps", "6", "--guide_at"]
    assert call(train0, *flags, "0.5") == 0 and guide.exists()
    assert call(train0, *flags, "0", "--overwrite") == 0 and not guide.exists()     # --overwrite has removed it
    assert call(train0, *flags, "0.3", "--overwrite") == 0
    early, last = checkpoint.load(guide, kind="teacher"), checkpoint.load(a)
    assert early["step"] == 2 and last["step"] == 6                 # the first after 0.3 of 6
    weights = [torch.cat([v.flatten() for v in state["model_ema"].values()]) for state in (early, last)]
    assert not torch.equal(*weights) and "optimizer" not in early

    paths = ["--out", f"{tmp_path}/x.png", "--npz", f"{tmp_path}/x.npz", "--device", "cpu", "--num_images", "6"]
    images = {}
    for name, more in dict(alone=[], auto=["--autoguidance_scale", "4"],
                           itself=["--autoguidance_scale", "4", "--guide", a]).items():
        capsys.readouterr()
        assert call(sample, "--checkpoint", a, "--num_steps", "2", *more, *paths) == 0
        assert f" {6 if more else 3} evaluations each" in capsys.readouterr().out
        images[name] = np.load(f"{tmp_path}/x.npz")["arr_0"].astype(int)
    assert not np.array_equal(images["alone"], images["auto"])
    assert abs(images["alone"] - images["itself"]).max() <= 1       # it does not differ from itself

    flags = ["--teacher", a, "--autoguidance_scale", "2", "--steps", "8", *TINY]
    assert call(train, "--run_dir", b, *flags) == 0
    state = checkpoint.load(b)
    assert all(torch.equal(state["model"][f"guidance_model.guide.{name}"], v) for name, v in early["model_ema"].items())
    interrupted(monkeypatch, train, 5, signal.SIGTERM)
    assert call(train, "--run_dir", f"{tmp_path}/c", *flags) == 143
    guide.unlink()                                                  # the run stands on its own
    assert call(train, "--run_dir", f"{tmp_path}/c", "--resume") == 0
    assert_same_run(b, tmp_path / "c")
    assert call(train, "--run_dir", f"{tmp_path}/d", *flags, "--autoguidance_scale", "1") == 0
    guided, plain = ([row["loss_dm"] for row in log_of(run) if "loss_dm" in row] for run in (b, f"{tmp_path}/d"))
    assert guided[0] != plain[0]

    other = f"{tmp_path}/other"
    assert call(train0, "--dataset", "shapes", "--run_dir", other, "--steps", "1", "--channels", "8", *TINY) == 0
    auto = ["--autoguidance_scale", "2"]
    missing = f"--autoguidance_scale needs a weaker teacher, and there is no {guide}"
    for script, argv, said in (
        (sample, ["--checkpoint", a, *auto, *paths], missing),      # it was deleted above
        (train, ["--teacher", a, "--run_dir", f"{tmp_path}/e", "--steps", "1", *auto, *TINY], missing),
        (train, [*flags, "--run_dir", f"{tmp_path}/e", "--guide", other], f"the classes of --guide {other} are not"),
        (train, ["--run_dir", f"{tmp_path}/d", "--resume", *auto], "--autoguidance_scale cannot begin in a resumed"),
        (train, ["--run_dir", b, "--resume", "--guide", other], f"--guide {other} differs"),
        (sample, ["--checkpoint", b, *auto, *paths], "--autoguidance_scale is for teachers"),
        (sample, ["--checkpoint", a, "--guide", other, *paths], "--guide needs an --autoguidance_scale"),
    ):
        capsys.readouterr()
        assert call(script, *argv) == 2 and said in capsys.readouterr().err, argv
    assert not (tmp_path / "e").exists()


def test_a_guide_is_kept_once_in_a_run_that_is_shortened_or_prolonged(tmp_path, tree, monkeypatch):
    run = str(tmp_path / "a")
    interrupted(monkeypatch, train0, 1, signal.SIGTERM)
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "20") == 143
    assert checkpoint.load(run)["step"] == 2 and not (tmp_path / "a" / "guide.pt").exists()         # due after 6.7
    for steps in "4", "10":                         # due after 1.3, which has passed; after 3.3
        assert call(train0, "--run_dir", run, "--resume", "--steps", steps) == 0
        assert checkpoint.load(f"{run}/guide.pt")["step"] == 3


def test_a_run_that_diverges_leaves_no_guide(tmp_path, tree, monkeypatch, capsys):
    weights = iter([1.0, 1.0, float("nan")])        # NaN in step 3, when the guide is due, but no log and no save
    monkeypatch.setattr(train0.diffusion, "karras_weight", lambda sigma: next(weights, 1.0))
    assert call(train0, *teacher_flags(tree), "--run_dir", str(tmp_path), "--steps", "9", "--save_every", "9") == 1
    assert "is nan at step 2" in capsys.readouterr().err and not (tmp_path / "guide.pt").exists()


def test_a_disk_that_fills_up_where_the_guide_is_kept_costs_no_guide(tmp_path, tree, capsys, monkeypatch):
    saves, save = [], checkpoint.save

    def second_fails(path, state):
        if saves and saves[-1] == state["step"] == 3:
            raise OSError(28, "No space left on device")
        saves.append(state["step"])
        save(path, state)

    flags = ["--run_dir", str(tmp_path / "a"), *teacher_flags(tree)]
    monkeypatch.setattr(checkpoint, "save", second_fails)
    assert call(train0, *flags, "--steps", "6", "--save_every", "3", "--guide_at", "0.5") == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "save", save)
    assert call(train0, *flags, "--resume") == 0
    assert checkpoint.load(tmp_path / "a" / "guide.pt")["step"] == 3
