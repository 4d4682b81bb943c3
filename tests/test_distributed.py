"""Two processes by torchrun against one: the same gradients, weights, images; one writer; one death ends all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_same_run, call, log_of, teacher_flags

import evaluate
import sample
import train
import train0
from support import checkpoint, data
from support.randomness import StepRandom

FP32 = [*TINY, "--precision", "fp32", "--sample_every", "2", "--save_every", "2"]
TEACHER = ["--dataset", "shapes", "--channels", "8", *FP32]
STUDENT = [
    *FP32, "--dfake_gen_update_ratio", "2", "--gen_cls_loss_weight", "3e-2", "--num_denoising_steps", "2",
    "--conditioning_sigma", "80",
]
PLAIN = [*FP32, "--optimizer", "muon", "--dfake_gen_update_ratio", "2", "--ema_decay", "0"]
PLAIN += ["--fit_steps", "2", "--ode_pairs", "8"]
# At rates that rounding, of which Adam's first steps make whole ones, does not show with.
GAN = [*FP32, "--warmup_steps", "1", "--gan_steps", "3", "--discriminator_warmup_steps", "1"]
GAN += ["--gan_lr", "1e-6", "--discriminator_lr", "1e-6"]


STARTED = []


@pytest.fixture(autouse=True, scope="module")
def ended():
    """No process outlives the tests, whatever fails."""
    yield
    for process in STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def torchrun(*argv):
    """A torchrun of two processes, started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *argv]
    STARTED.append(subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ))
    return STARTED[-1]


def test_the_shares_of_the_processes_make_up_one_process(tmp_path):
    one, shares = StepRandom(3, 5), [StepRandom(3, 5, rank=rank, world=2) for rank in range(2)]
    for draw in (lambda r, n: r.normal(n, 3), lambda r, n: r.uniform(n), lambda r, n: r.integers(0, 999, n, 1)):
        assert torch.equal(draw(one, 6), torch.cat([draw(share, 3) for share in shares]))
    assert len({r.choice(1000) for r in (one, *shares)}) == 1
    images = torch.arange(10).view(10, 1, 1, 1).expand(10, 3, 32, 32).to(torch.uint8)
    dataset = data.Dataset(images, torch.arange(10), list("abcdefghij"))
    batches = data.Batches(dataset, 4, 0, "cpu")
    for step in range(4):                           # beyond the first epoch
        both = [batches(step, rank, 2) for rank in range(2)]
        for i, wanted in enumerate(batches(step)):
            assert torch.equal(wanted, torch.cat([pair[i] for pair in both]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, features):
    """The same calls in one process and in two; in two also with a stop in between, and with the student of one."""
    root = tmp_path_factory.mktemp("processes")
    measured = ["--feature_extractor", features, "--cache_dir", str(root / "cache")]

    def calls(name, teacher):
        folder = root / name
        images = ["--checkpoint", str(root / "one" / "student"), "--device", "cpu", "--batch_size", "100"]
        few = ["--num_images", "300", "--precision", "fp32"]
        evaluations = ["--eval_every", "2", "--eval_images", "64", *measured]
        folder.mkdir()
        return [
            ["train0", *TEACHER, *evaluations, "--steps", "4", "--run_dir", str(folder / "teacher")],
            ["train", *STUDENT, "--teacher", teacher, "--steps", "4", "--run_dir", str(folder / "student")],
            ["train", *PLAIN, "--teacher", teacher, "--steps", "4", "--run_dir", str(folder / "plain")],
            ["train", *GAN, "--teacher", teacher, "--steps", "4", "--run_dir", str(folder / "gan")],
            ["sample", *images, "--num_images", "250", "--out", f"{folder}/a.png", "--npz", f"{folder}/a.npz"],
            ["evaluate", *images, *few, *measured, "--out", str(folder / "evaluation.json")],
        ]

    teacher = str(root / "one" / "teacher")
    scripts = dict(train0=train0, train=train, sample=sample, evaluate=evaluate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHAPES_TRAIN_IMAGES", 2500)
        for script, *argv in calls("one", teacher):
            assert call(scripts[script], *argv) == 0
    both = calls("two", teacher)
    for script, *argv in both[:2]:                  # stopped after 2 of 4 steps, and gone on with
        argv[-1] = argv[-1] + "_resumed"
        steps = argv.index("--steps") + 1
        both += [[script, *argv[:steps], "2", *argv[steps + 1 :]], [script, *argv, "--resume"]]
    process = torchrun("tests/processes.py", json.dumps(both), str(root))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return root, out


@pytest.mark.parametrize("name", ["teacher", "student", "plain", "gan"])
def test_two_processes_take_the_steps_of_one(runs, name):
    root, _ = runs
    one, two = (checkpoint.load(root / processes / name) for processes in ("one", "two"))
    moved = 0.0
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-4, atol=2e-6)
    phase, optimizer = dict(gan=("gan", "discriminator")).get(name, ("dmd2", "guidance"))
    optimizers = (found["optimizer"] if name == "teacher" else found[phase][optimizer] for found in (one, two))
    states = (found["adam"]["state"].values() for found in optimizers)
    for path, other in zip(*states, strict=True):   # Adam's first moment: the gradients themselves
        torch.testing.assert_close(other["exp_avg"], path["exp_avg"], rtol=1e-3, atol=1e-6)
        moved = max(moved, path["exp_avg"].abs().max().item())
    assert moved > 1e-3                             # so that the tolerance means something
    logs = [log_of(root / processes / name) for processes in ("one", "two")]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    for a, b in zip(*logs, strict=True):
        losses = [key for key in a if "loss" in key or "norm" in key or key.startswith("fd")]
        assert losses and all(a[key] == pytest.approx(b[key], rel=1e-3) for key in losses)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_resume_on_two_processes_is_exact(runs, name):
    assert_same_run(runs[0] / "two" / name, runs[0] / "two" / f"{name}_resumed")


def test_one_process_writes_and_all_make_the_same_images(runs):
    root, out = runs
    for line in ("step 4 of 4", "250 images"):      # each said once
        assert out.count(line) == {"step 4 of 4": 6}.get(line, 1)
    one, two = (np.load(root / processes / "a.npz") for processes in ("one", "two"))
    assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["arr_1"], two["arr_1"])
    assert len({image.tobytes() for image in one["arr_0"]}) == 250
    assert (root / "one" / "a.png").read_bytes() == (root / "two" / "a.png").read_bytes()
    reports = [json.loads((root / processes / "evaluation.json").read_text()) for processes in ("one", "two")]
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert not list(root.rglob("*.tmp"))


def test_processes_that_drift_apart_are_stopped(tmp_path):
    script = tmp_path / "drift.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from support import errors, processes
def main():
    processes.start()
    net = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(net.weight, 1), torch.nn.init.constant_(net.bias, 0)
    assert processes.same(net)
    net.weight.data[0, 0] += processes.RANK * 1e-7
    if not processes.same(net):
        raise errors.RunError("they differ")
errors.run(main)
""")
    process = torchrun(str(script))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "process 1 of 2: they differ" in out


def wait_for(path, process):
    start = time.monotonic()
    while not (Path(path).exists() and Path(path).read_text()):
        assert process.poll() is None and time.monotonic() - start < 120
        time.sleep(0.1)


def workers(process):
    """Process numbers of a torchrun's children."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the processes in Linux's /proc")
def test_one_death_ends_the_others_and_a_stop_stops_all(tmp_path, tree):
    run = tmp_path / "run"
    flags = ["train0.py", *teacher_flags(tree), "--log_every", "1", "--steps", "1000000", "--run_dir", str(run)]
    process = torchrun(*flags)
    wait_for(run / "log.jsonl", process)
    os.kill(workers(process)[1], signal.SIGKILL)
    began = time.monotonic()
    out, _ = process.communicate(timeout=90)
    assert time.monotonic() - began < 60 and process.returncode == 1
    assert "process 0 of 2: another process of this run has ended; the last checkpoint stands" in out
    saved = checkpoint.load(run)["step"]

    (run / "log.jsonl").unlink()
    process = torchrun(*flags, "--resume")
    wait_for(run / "log.jsonl", process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=90)
    assert "stopped; continue with --resume" in out
    assert checkpoint.load(run)["step"] > saved


def test_a_batch_that_cannot_be_shared_out_is_one_line(tmp_path):
    process = torchrun("train0.py", *TEACHER, "--batch_size", "5", "--run_dir", str(tmp_path / "run"))
    out, _ = process.communicate(timeout=120)
    said = "--batch_size 5 cannot be divided among 2 processes"
    assert process.returncode == 1 and out.count(f"train0.py: error: {said}") == 1
    assert said in "".join(out.splitlines()[-2:])   # after torchrun's own traceback
    assert not (tmp_path / "run").exists()
