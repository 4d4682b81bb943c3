"""The folder of a run: --overwrite loses nothing before the new run is saved, and only one process writes to it."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_run, call, log_of, make_teacher, read_bytes, teacher_flags

import train0
from support import checkpoint, data, run_folder


def test_overwrite_starts_anew_and_keeps_the_old_checkpoint_until_the_new_one_is_saved(
    tmp_path, tree, monkeypatch, capsys
):
    run = make_teacher(tmp_path / "a", tree, "--steps", "6")
    record = [path for path in Path(run).rglob("*") if path.is_file() and path.stem != "lock"]
    before = {path: read_bytes(path) for path in record}
    assert {path.name for path in record} > {"checkpoint.pt", "log.jsonl", "guide.pt"} and len(record) > 4

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "3", "--overwrite") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {path: read_bytes(path) for path in record} == before
    assert {path for path in Path(run).rglob("*") if path.is_file() and path.stem != "lock"} == set(record)
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "3", "--overwrite") == 0
    assert checkpoint.load(run)["step"] == 3 and len(list(Path(run, "tensorboard").iterdir())) == 1

    with monkeypatch.context() as patch:            # fails between its first save and the rest of its start
        patch.setattr(run_folder.RunFolder, "begin", full_disk)
        assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "9", "--overwrite") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert checkpoint.load(f"{run}/guide.pt")["step"] == 1
    assert call(train0, "--run_dir", run, "--resume", "--steps", "3", "--guide_at", "0.9") == 0
    assert checkpoint.load(f"{run}/guide.pt")["step"] == 3
    assert [row["step"] for row in log_of(run)] == [2, 3]


@pytest.mark.parametrize("name", ["best.pt", "guide.pt", "previous.pt", "log.jsonl"])
def test_a_folder_with_the_rest_of_a_run_is_not_taken_for_a_new_one(tmp_path, tree, capsys, name):
    run = tmp_path / "a"
    run.mkdir()
    (run / name).write_text("kept")
    for more in [], ["--resume"]:
        assert call(train0, *teacher_flags(tree), "--run_dir", str(run), "--steps", "1", *more) == 2
        assert f"{run} holds {name} but no checkpoint.pt" in capsys.readouterr().err
        assert [path.name for path in run.iterdir()] == [name] and (run / name).read_text() == "kept"
    assert call(train0, *teacher_flags(tree), "--run_dir", str(run), "--steps", "1", "--overwrite") == 0


def test_a_second_writer_is_refused_and_named_the_first(tmp_path, tree, capsys):
    run = make_teacher(tmp_path / "a", tree, "--steps", "2")
    before = {path: read_bytes(path) for path in tmp_path.rglob("*") if path.is_file()}
    hold = "import sys, time; from support import checkpoint, run_folder; run = sys.argv[1]; "
    hold += "r = run_folder.RunFolder(run, checkpoint.stamp(run)); print(1, flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", hold, run], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"1\n"
        for flags in (["--resume"], ["--overwrite", *teacher_flags(tree)]):
            capsys.readouterr()
            assert call(train0, "--run_dir", run, "--steps", "4", "--device", "cpu", *flags) == 2
            assert f"{run} is being written by process {holder.pid} on " in capsys.readouterr().err
        kept = {path for path in before if path.stem != "lock"}
        assert all(read_bytes(path) == before[path] for path in kept)
    finally:
        holder.kill()                               # whereupon the kernel releases the lock
        holder.wait()
    assert call(train0, "--run_dir", run, "--resume", "--steps", "4", "--device", "cpu") == 0


def test_a_run_that_failed_in_this_process_does_not_keep_the_folder(tmp_path, tree, monkeypatch):
    flags = [*teacher_flags(tree), "--steps", "1", "--run_dir", str(tmp_path / "a")]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError) as kept:             # as a notebook keeps it
        patch.setattr(run_folder.RunFolder, "begin", lambda *args: 1 / 0)
        train0.main(flags)
    assert call(train0, *flags, "--overwrite") == 0 and kept.value.__traceback__


@pytest.mark.parametrize("flags", [["--resume"], []], ids=["resumed", "fresh"])
def test_a_save_between_reading_and_locking_the_folder_is_not_lost(flags, tmp_path, tree, capsys, monkeypatch):
    run, other = str(tmp_path / "a"), str(tmp_path / "b")
    for path in (run, other) if flags else (other,):
        make_teacher(path, tree, "--steps", "2")
    load = data.from_flags

    def meanwhile(*args):                           # another process saves and ends
        os.makedirs(run, exist_ok=True)
        shutil.copy(f"{other}/checkpoint.pt", f"{run}/checkpoint.pt")
        return load(*args)

    monkeypatch.setattr(data, "from_flags", meanwhile)
    capsys.readouterr()
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "4", *flags) == 2
    assert f"another process has saved to {run} just now" in capsys.readouterr().err
    assert read_bytes(f"{run}/checkpoint.pt") == read_bytes(f"{other}/checkpoint.pt")


def test_a_run_keeps_its_last_two_checkpoints_and_goes_on_from_the_older_one(tmp_path, tree, capsys):
    straight, run = (make_teacher(tmp_path / name, tree, "--steps", "9") for name in "ab")
    assert [checkpoint.load(f"{run}/{name}.pt")["step"] for name in ("previous", "checkpoint")] == [6, 9]
    Path(run, "checkpoint.pt").write_bytes(read_bytes(f"{run}/checkpoint.pt")[:-999])
    capsys.readouterr()
    assert call(train0, "--run_dir", run, "--resume", "--device", "cpu") == 0
    said = capsys.readouterr()
    assert f"note: {run}/checkpoint.pt is damaged: taking the save before it, {run}/previous.pt" in said.err
    assert f"resumes {run}/previous.pt, step 6 of 9" in said.out
    assert_same_run(straight, run)
    assert [checkpoint.load(f"{run}/{name}.pt")["step"] for name in ("previous", "checkpoint")] == [6, 9]
    Path(run, "checkpoint.pt").unlink()
    assert call(train0, "--run_dir", run, "--resume", "--device", "cpu") == 0
    assert_same_run(straight, run)
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "1", "--overwrite") == 0
    assert [checkpoint.load(f"{run}/{name}.pt")["step"] for name in ("previous", "checkpoint")] == [0, 1]


def test_a_run_folder_that_is_a_link_to_nothing_is_made(tmp_path, tree):
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "deep")
    make_teacher(tmp_path / "run", tree, "--steps", "1")
    assert checkpoint.load(tmp_path / "disk" / "deep")["step"] == 1 and (tmp_path / "run").is_symlink()


@pytest.mark.parametrize("hours", [0, -1, -10**5])
def test_tensorboard_has_every_step_whatever_the_clock_does(tmp_path, monkeypatch, hours):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    now = time.time()                               # it stands still
    for session in range(4):
        monkeypatch.setattr(time, "time", lambda at=now + 3600 * hours * session: at)
        folder = run_folder.RunFolder(tmp_path, None)
        folder.begin(2 * session)
        for step in (2 * session + 1, 2 * session + 2):
            folder.scalars(step, dict(loss=float(step)))
        folder.close()
    board = EventAccumulator(f"{tmp_path}/tensorboard", size_guidance=dict(scalars=0))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(i, i) for i in range(1, 9)]
    assert len(os.listdir(tmp_path / "tensorboard")) == 4
