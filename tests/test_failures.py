"""A failure in the middle of a run ends it with one line of error, and its last checkpoint is left as it was."""

import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, call, make_teacher, read_bytes, teacher_flags
from PIL import Image

import train
import train0
from support import checkpoint, processes


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_checkpoint_stands(tmp_path, tree, capsys):
    run = make_teacher(tmp_path / "a", tree, "--steps", "3")
    state = checkpoint.load(run)
    next(iter(state["model"].values()))[:] = 1e38   # so large that its square is infinite
    checkpoint.save(f"{run}/checkpoint.pt", state)
    before = read_bytes(f"{run}/checkpoint.pt")
    capsys.readouterr()
    assert call(train0, "--run_dir", run, "--resume", "--device", "cpu", "--steps", "9") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(lines) == 1 and " at step " in lines[0] and ("loss" in lines[0] or "grad_norm" in lines[0])
    assert read_bytes(f"{run}/checkpoint.pt") == before


def test_images_that_are_not_finite_stop_the_run_and_the_last_checkpoint_stands(tmp_path, many, features, capsys):
    run = make_teacher(tmp_path / "a", many, "--steps", "3")
    state = checkpoint.load(run)                    # no loss tells of this: only the average is bad
    state["ema"] = {name: value * float("nan") if value.is_floating_point() else value
                    for name, value in state["ema"].items()}
    checkpoint.save(f"{run}/checkpoint.pt", state)
    before = read_bytes(f"{run}/checkpoint.pt")
    measured = ["--eval_images", "64", "--feature_extractor", features, "--cache_dir", str(tmp_path / "cache")]
    measured += ["--sample_every", "100", "--steps", "9", "--eval_every", "4"]
    for flags, words in (
        (["--steps", "9", "--save_every", "9"], "16 of 16 images hold NaN or infinity in the grid teacher at step 5"),
        (measured, "64 of 64 images hold NaN or infinity in the measurement at step 4"),
    ):
        capsys.readouterr()
        assert call(train0, "--run_dir", run, "--resume", "--device", "cpu", *flags) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
        assert len(lines) == 1 and lines[0].endswith(f"{words}: stopped; the last checkpoint stands")
        if flags is not measured:                   # before which the run saves
            assert read_bytes(f"{run}/checkpoint.pt") == before
    assert not list((tmp_path / "a" / "grids").glob("000000[4-9]*"))


def test_a_dm_gradient_of_zero_is_a_grid_like_another(tmp_path, teacher):
    """As in float16, whose first steps may be left out: fake_unet is then the teacher still."""
    flags = ["--teacher", teacher, "--run_dir", str(tmp_path / "a"), *TINY, "--steps", "1", "--precision", "fp32"]
    assert call(train, *flags, "--guidance_lr", "1e-30") == 0
    picture = np.asarray(Image.open(tmp_path / "a" / "grids" / "0000001_dm_gradient.png"))
    assert (picture == 128).mean() > 0.8


def test_processes_whose_weights_differ_stop_and_save_nothing(tmp_path, tree, monkeypatch, capsys):
    run = make_teacher(tmp_path / "a", tree, "--steps", "2")
    before = read_bytes(f"{run}/checkpoint.pt")
    monkeypatch.setattr(processes, "same", lambda *modules: False)
    assert call(train0, "--run_dir", run, "--resume", "--steps", "4", "--device", "cpu") == 1
    assert "the processes hold different weights: stopped" in capsys.readouterr().err
    assert read_bytes(f"{run}/checkpoint.pt") == before


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stands(tmp_path, tree):
    run = make_teacher(tmp_path / "a", tree, "--steps", "3")
    before = read_bytes(f"{run}/checkpoint.pt")
    command = [sys.executable, "train0.py", "--run_dir", run, "--resume", "--steps", "9", "--device", "cpu"]

    def limit():                                    # no file may grow past half a checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, timeout=300)
    lines = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert len(lines) == 1 and "cannot save" in lines[0] and "checkpoint.pt" in lines[0]
    assert read_bytes(f"{run}/checkpoint.pt") == before
    assert not [name for name in os.listdir(run) if name.endswith(".tmp")]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 13 MiB, room for two checkpoints of a teacher, and the same one mounted read-only."""
    place, read_only = tmp_path / "disk", tmp_path / "read_only"
    place.mkdir(), read_only.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=13m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    subprocess.run(["mount", "--bind", place, read_only], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", read_only], check=True)
    yield place, read_only
    subprocess.run(["umount", "--lazy", read_only, place], check=True)       # a failed run holds its lock there


def test_a_small_disk_stops_the_run_in_one_line_and_a_read_only_one_refuses_it(small_disk, tree, teacher, capsys):
    small_disk, read_only = small_disk
    run = str(small_disk / "run")

    def said(script, *flags):
        capsys.readouterr()
        code = call(script, *flags, "--device", "cpu")
        return code, [line for line in capsys.readouterr().err.splitlines() if "error: " in line]

    size = os.path.getsize(f"{teacher}/checkpoint.pt")
    code, lines = said(train, "--teacher", teacher, "--run_dir", str(small_disk / "student"), *TINY, "--steps", "2")
    assert code == 1 and len(lines) == 1 and "No space left" in lines[0]
    assert not list(small_disk.rglob("*.tmp")) and checkpoint.load(small_disk / "student")["step"] == 0
    shutil.rmtree(small_disk / "student")
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "3") == 0
    before = read_bytes(f"{run}/checkpoint.pt")
    (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free - size // 4))  # take what is left
    code, lines = said(train0, "--run_dir", run, "--resume", "--steps", "6")
    assert code == 1 and len(lines) == 1 and "stands" in lines[0] and read_bytes(f"{run}/checkpoint.pt") == before
    assert read_bytes(f"{run}/previous.pt") == before
    (small_disk / "others").unlink()
    code, lines = said(train0, "--run_dir", str(read_only / "run"), "--resume", "--steps", "6")
    assert code == 2 and len(lines) == 1 and f"--run_dir: cannot write {read_only}/run: " in lines[0]
    assert call(train0, "--run_dir", run, "--resume", "--steps", "6", "--device", "cpu") == 0


def test_a_tensorboard_that_cannot_be_written_is_one_line(tmp_path, tree, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "tensorboard").write_text("in the way")
    assert call(train0, *teacher_flags(tree), "--run_dir", str(run), "--steps", "3") == 1
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err and len(err.splitlines()) == 1 and str(run) in err
