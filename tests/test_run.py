"""What a run does around its steps: when it saves, draws and ends."""

import errno
import fcntl
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, call, image_tree, teacher_flags
from PIL import Image

import train0
from support import checkpoint, run, signals

LONG = ["--steps", "100000", "--save_every", "100000", "--sample_every", "100000", "--log_every", "1"]


def until(condition):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 60
        time.sleep(0.05)


def test_a_closed_terminal_stops_a_run_saved(tmp_path, tree):
    folder, (terminal, theirs) = tmp_path / "a", pty.openpty()
    argv = ["train0.py", *teacher_flags(tree), *LONG, "--run_dir", str(folder)]
    process = subprocess.Popen(
        [sys.executable, *argv], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, 0x540E, 0),           # TIOCSCTTY: its terminal, whose end it is told
    )
    os.close(theirs)
    log = folder / "log.jsonl"
    until(lambda: log.exists() and log.read_text().count("\n") > 3)
    os.close(terminal)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert checkpoint.load(folder)["step"] > 3 and len(os.listdir(folder / "grids")) == 1


def test_a_run_says_how_many_classes_its_grids_show(tmp_path, capsys):
    tree = image_tree(tmp_path / "tree", classes=[f"class {i:02}" for i in range(20)], n=1)
    assert call(train0, *teacher_flags(str(tree)), "--steps", "1", "--run_dir", str(tmp_path / "run")) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith("grids, of 16 of 20 classes")
    with Image.open(tmp_path / "run" / "grids" / "0000001_teacher.png") as grid:
        assert grid.size == (8 * 34 + 2, 16 * 34 + 2)


def test_what_nohup_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals.StopSignal()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_saves_and_draws_by_the_clock_too(tmp_path, tree, monkeypatch):
    saved, save, clock = [], checkpoint.save, run.time.monotonic
    monkeypatch.setattr(checkpoint, "save", lambda path, state: saved.append(state["step"]) or save(path, state))
    steps = []
    monkeypatch.setattr(run.Run, "count", lambda self, count=run.Run.count, **values: (
        steps.append(self.step), count(self, **values)
    ))
    monkeypatch.setattr(run.time, "monotonic", lambda: clock() + 240 * len(steps))              # four minutes a step
    assert call(train0, *teacher_flags(tree), *LONG, "--steps", "7", "--guide_at", "0", "--run_dir", str(tmp_path)) == 0
    assert saved == [0, 3, 6, 7]
    assert sorted(os.listdir(tmp_path / "grids")) == ["0000001_teacher.png", "0000007_teacher.png"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK])
def test_a_file_system_without_locks_is_said_and_used(tmp_path, tree, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert call(train0, *teacher_flags(tree), "--steps", "1", "--run_dir", str(tmp_path)) == 0
    assert f"no locks where {tmp_path} is" in capsys.readouterr().err and checkpoint.load(tmp_path)["step"] == 1
