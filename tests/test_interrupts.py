"""Runs stopped by a signal, a kill or --max_minutes and then resumed equal an uninterrupted run, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, assert_same_run, call, interrupted, make_teacher, read_bytes, teacher_flags

import train
import train0
from support import checkpoint, records


@pytest.mark.parametrize(("at_step", "signum", "decay", "optimizer"), [
    (2, signal.SIGTERM, "0.999", "muon"), (5, signal.SIGINT, "0", "adam"), (3, signal.SIGUSR1, "0.9", "adam"),
])
def test_teacher_resumes_bit_for_bit(tmp_path, monkeypatch, tree, at_step, signum, decay, optimizer, capsys):
    a, b = str(tmp_path / "straight"), str(tmp_path / "resumed")
    flags = [*teacher_flags(tree), "--ema_decay", decay, "--steps", "7", "--optimizer", optimizer]
    assert call(train0, *flags, "--run_dir", a) == 0
    interrupted(monkeypatch, train0, at_step, signum)
    assert call(train0, *flags, "--run_dir", b) == 128 + signum
    assert f"{at_step + 1:07}_teacher.png" in os.listdir(f"{b}/grids")
    assert checkpoint.load(b)["step"] == at_step + 1
    assert f"stopped; continue with --resume: step {at_step + 1} of 7" in capsys.readouterr().out
    assert call(train0, "--run_dir", b, "--resume", "--device", "cpu") == 0
    assert_same_run(a, b)


EVERYTHING = ["--gen_cls_loss_weight", "3e-3", "--num_denoising_steps", "2", "--optimizer", "muon"]


@pytest.mark.parametrize(("at_step", "signum", "more"), [
    (2, signal.SIGINT, []), (5, signal.SIGTERM, ["--ema_decay", "0"]), (4, signal.SIGTERM, EVERYTHING),
    (2, signal.SIGTERM, ["--fit_steps", "5", "--ode_pairs", "8", "--batch_size", "4"]),
    (4, signal.SIGTERM, ["--gan_steps", "4", "--discriminator_warmup_steps", "1", "--optimizer", "muon"]),
    (3, signal.SIGTERM, ["--gan_steps", "4", "--discriminator_warmup_steps", "2"]),
])
def test_distillation_resumes_bit_for_bit(tmp_path, monkeypatch, teacher, at_step, signum, more):
    a, b = str(tmp_path / "straight"), str(tmp_path / "resumed")
    flags = ["--teacher", teacher, "--dfake_gen_update_ratio", "2", "--steps", "7", *more, *TINY]
    assert call(train, *flags, "--run_dir", a) == 0
    interrupted(monkeypatch, train, at_step, signum)
    assert call(train, *flags, "--run_dir", b) == 128 + signum
    assert f"{at_step + 1:07}_teacher_student.png" in os.listdir(f"{b}/grids")
    assert checkpoint.load(b)["step"] == at_step + 1
    assert call(train, "--run_dir", b, "--resume", "--device", "cpu") == 0
    assert_same_run(a, b)


def test_a_run_killed_after_its_last_save_logs_no_step_twice(tmp_path, monkeypatch, tree):
    a, b = str(tmp_path / "straight"), str(tmp_path / "killed")
    assert call(train0, *teacher_flags(tree), "--run_dir", a, "--steps", "7") == 0
    original = train0.StepRandom

    def step_random(seed, step, *where):            # dies in step 5, after a save at 3 and logs at 2 and 4
        if step == 5:
            raise KeyboardInterrupt
        return original(seed, step, *where)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train0, "StepRandom", step_random)
        train0.main([*teacher_flags(tree), "--run_dir", b, "--steps", "7"])
    assert checkpoint.load(b)["step"] == 3
    with open(f"{b}/log.jsonl", "a") as file:       # the kill came in the middle of a line
        file.write('{"step": 6, "lo')
    assert call(train0, "--run_dir", b, "--resume", "--device", "cpu") == 0
    assert_same_run(a, b)


KILLED_IN_STEP_5 = """
import os, sys, train0
original = train0.StepRandom
train0.StepRandom = lambda seed, step, *where: os._exit(9) if step == 5 else original(seed, step, *where)
train0.main(sys.argv[1:])
"""


def test_tensorboard_has_every_step_once_after_a_kill_and_a_resume(tmp_path, tree):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = str(tmp_path / "run")                     # saved at 3, logged to 5
    flags = [*teacher_flags(tree), "--log_every", "1", "--run_dir", run, "--steps", "7"]
    process = subprocess.run([sys.executable, "-c", KILLED_IN_STEP_5, *flags], cwd=ROOT, capture_output=True)
    assert process.returncode == 9 and checkpoint.load(run)["step"] == 3
    # TensorBoard reads its files in the order of their names. This one gets a name of this very second that sorts late,
    # and must still be read before the file of the resumed run.
    file, = Path(run, "tensorboard").iterdir()
    file.rename(file.with_name(f"events.out.tfevents.{int(time.time()):010d}.zzz.9.9"))
    assert call(train0, "--run_dir", run, "--resume", "--device", "cpu") == 0
    board = EventAccumulator(f"{run}/tensorboard", size_guidance=dict(scalars=0))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 8))


def test_max_minutes_saves_and_stops(tmp_path, tree):
    run = str(tmp_path / "a")
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "100000", "--max_minutes", "0.02") == 0
    assert 0 < checkpoint.load(run)["step"] < 100000


def test_a_finished_run_resumes_to_nothing_and_can_be_prolonged(tmp_path, tree):
    run = str(tmp_path / "a")
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "2", "--resume") == 0    # none to resume
    assert call(train0, "--run_dir", run, "--resume", "--device", "cpu") == 0
    assert checkpoint.load(run)["step"] == 2
    assert call(train0, "--run_dir", run, "--resume", "--device", "cpu", "--steps", "3") == 0
    assert checkpoint.load(run)["step"] == 3 and checkpoint.load(run)["settings"]["channels"] == 8


def test_a_run_with_a_flag_that_is_gone_names_the_version_that_can_resume_it(tmp_path, tree, capsys):
    run = make_teacher(tmp_path / "a", tree, "--steps", "3")
    state = checkpoint.load(run)
    assert state["commit"] == (records.GIT and records.GIT["commit"])
    for commit, said in (("0123abc", "commit 0123abc,"), (None, "commit 804d3b3 or an earlier one,")):
        settings = dict(state["settings"], sigma_sampling="grid")
        checkpoint.save(f"{run}/checkpoint.pt", dict(state, settings=settings, commit=commit))
        before = read_bytes(f"{run}/checkpoint.pt")
        assert call(train0, "--run_dir", run, "--resume", "--steps", "5", "--device", "cpu") == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert f"{run}/checkpoint.pt was made by {said} whose --sigma_sampling this version does not have" in err
        assert read_bytes(f"{run}/checkpoint.pt") == before
