"""Both phases, a resume, measurements and sampling on each kind of device that is here: a GPU's, where there is one."""

import signal

import numpy as np
import pytest
import torch
from conftest import DEVICES, TINY, call, interrupted, teacher_flags

import sample
import train
import train0
from support import checkpoint, recorded
from support.recorded import Recorded


@pytest.mark.parametrize("device", DEVICES)
def test_every_part_runs_there_and_the_images_are_those_of_the_cpu(tmp_path, many, features, device, monkeypatch):
    monkeypatch.setattr(recorded, "WARM_UP", 1)     # so that these few steps are replayed, where they can be
    a, b, cache = (str(tmp_path / name) for name in "abc")
    there = ["--device", device, "--optimizer", "muon", *(["--compile"] if device == "cuda" else [])]
    measured = ["--eval_every", "2", "--eval_images", "64", "--feature_extractor", features, "--cache_dir", cache]
    first = ["--run_dir", a, "--label_dropout", "0.5", "--precision", "bf16", *measured, *there]
    assert call(train0, *teacher_flags(many), *first, "--steps", "2") == 0
    every_loss = ["--gen_cls_loss_weight", "1e-2", "--max_step_percent", "1"]
    every_loss += ["--cfg_scale", "2", "--cfg_interval", "0.1", "10", "--fake_noise", "dm"]
    every_loss += ["--autoguidance_scale", "2", "--warmup_steps", "0"]
    every_loss += ["--gan_steps", "2", "--discriminator_warmup_steps", "0"]
    second = ["--teacher", a, "--run_dir", b, "--num_denoising_steps", "2", *every_loss]
    with monkeypatch.context() as patch:
        interrupted(patch, train, 1, signal.SIGTERM)
        assert call(train, *TINY, *second, *measured, *there, "--steps", "4") == 143
    assert call(train, "--run_dir", b, "--resume", *there) == 0
    assert checkpoint.load(b)["step"] == 4 and checkpoint.load(tmp_path / "b" / "best.pt")["best"]["distance"] > 0

    for run in (a, b):
        images = []
        for where in (device, "cpu"):
            npz = str(tmp_path / f"{where}.npz")
            out = ["--out", str(tmp_path / "grid.png"), "--npz", npz, "--num_images", "8"]
            assert call(sample, "--checkpoint", run, "--device", where, "--precision", "fp32", *out) == 0
            images.append(np.load(npz)["arr_0"].astype(float))
        assert np.abs(images[0] - images[1]).mean() < 0.1 and images[0].std() > 1


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_gpu_replays_what_it_would_launch(tmp_path, tree, optimizer, monkeypatch):
    """Not compiled, as compiled sums have no fixed order: twice the same bits, and the plain steps to rounding."""
    flags = ["--device", "cuda", "--optimizer", optimizer, "--precision", "fp32", "--warmup_steps", "4"]
    losses = ["--gen_cls_loss_weight", "1e-2", "--num_denoising_steps", "2", "--cfg_scale", "2"]
    teacher = [*teacher_flags(tree), *flags, "--label_dropout", "0.5", "--lr_schedule", "constant"]
    student = [*TINY, *flags, *losses, "--teacher", str(tmp_path / "teacher0"), "--dfake_gen_update_ratio", "2"]
    for script, name, first in ((train0, "teacher", teacher), (train, "student", student)):
        made = []

        def record(device, wanted, made=made):
            return lambda step: made.append(Recorded(step)) or made[-1]

        def weights(run, *stops, script=script, first=first):
            for i, steps in enumerate(stops):
                again = ["--resume", "--device", "cuda"] if i else first
                assert call(script, *again, "--run_dir", str(tmp_path / run), "--steps", str(steps)) == 0
            state = checkpoint.load(tmp_path / run)
            return {**state["model"], **{f"ema {key}": value for key, value in state["model_ema"].items()}}

        plain = weights(f"{name}0", 24)
        with monkeypatch.context() as patch:
            patch.setattr(script, "recorded", record)
            one, two, resumed = weights(f"{name}1", 24), weights(f"{name}2", 24), weights(f"{name}3", 6, 24)
        assert any(recording.replay for recorder in made for recording in recorder.recordings.values())
        assert all(torch.equal(one[key], two[key]) for key in one)
        torch.testing.assert_close(one, plain, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(resumed, plain, rtol=1e-2, atol=1e-4)
