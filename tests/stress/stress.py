"""Tests that take too long for the test suite: random kills, and an hour of training. `make stress` runs both.

    python tests/stress/stress.py kills --number 100        # of each script
    python tests/stress/stress.py hour --minutes 60

The results go to runs/stress/kills.json and runs/stress/hour.json; the exit code is 1 if a check fails.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"                 # bit-identical on every machine, and safe to fork

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

import train
import train0
from support import checkpoint, data, records

SMALL = ["--device", "cpu", "--batch_size", "4", "--log_every", "1", "--sample_every", "10", "--save_every", "1"]
# The learning rate must not depend on --steps, whose last value is unknown while the run is still being killed.
TEACHER = ["--dataset", "shapes", "--channels", "8", "--lr_schedule", "constant", *SMALL]
STUDENT = [*SMALL, "--conditioning_sigma", "80", "--dfake_gen_update_ratio", "2", "--gen_cls_loss_weight", "3e-2"]


def forked(function, *args):
    """Fork a child that calls function and ends, with no need to import again; returns its process number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*args)
            code = 0
        finally:
            os._exit(code)
    return pid


def result(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_silence(script, argv, log):
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    script.main(argv)


def curves(run):
    """Steps of the loss curve as log.jsonl and as TensorBoard have it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    name = "loss" if "loss" in rows[0] else "loss_fake"
    board = EventAccumulator(str(run / "tensorboard"), size_guidance=dict(scalars=0))
    board.Reload()
    return [row["step"] for row in rows], [event.step for event in board.Scalars(name)]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def check(path, least):
    """Fail unless the newest checkpoint loads and is not older than step least; its step goes to path/seen."""
    step = checkpoint.load(path)["step"]
    assert step >= least, (step, least)
    (path / "seen").write_text(str(step))


def wait_for_save(run, since, pid):
    """Wait until the run of process pid saves; fail if it ends by itself, as only the caller may kill it."""
    while (run / checkpoint.NAME).stat().st_mtime <= since:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run ended by itself"
        time.sleep(0.01)


def kill_often(name, script, argv, work, number, rng):
    """Kill and resume a run at random moments, number times; then let it end, and compare with a run never killed."""
    run, log = work / name, work / f"{name}.log"
    start = time.perf_counter()
    pid = forked(in_silence, script, [*argv, "--run_dir", str(run), "--steps", "1"], log)
    assert result(pid) == 0, log.read_text()
    kills, seen, leftovers, during = 0, 0, 0, dict(start=0, steps=0)
    # Too many steps for a killed process to reach the end; the run is finished after the last kill.
    while kills < number:
        pid = forked(in_silence, script, [*argv, "--run_dir", str(run), "--steps", "1000000", "--resume"], log)
        # One kill in four comes at a random moment of the start, the others within a second after its first new save.
        if kills % 4 == 0:
            time.sleep(rng.uniform(0, 3))
        else:
            wait_for_save(run, time.time(), pid)
            time.sleep(rng.uniform(0, 1))
        os.kill(pid, signal.SIGKILL)
        assert result(pid) == -signal.SIGKILL, log.read_text()
        kills += 1
        leftovers += any(run.glob("*.tmp"))
        assert result(forked(check, run, seen)) == 0, f"after kill {kills}"
        before, seen = seen, int((run / "seen").read_text())
        during["steps" if seen > before else "start"] += 1
    (run / "seen").unlink()
    steps = seen + 3
    pid = forked(in_silence, script, [*argv, "--run_dir", str(run), "--steps", str(steps), "--resume"], log)
    assert result(pid) == 0, log.read_text()
    assert not list(run.glob("*.tmp"))
    straight = work / f"{name}_straight"
    pid = forked(in_silence, script, [*argv, "--run_dir", str(straight), "--steps", str(steps)], log)
    assert result(pid) == 0, log.read_text()
    one, other = checkpoint.load(run), checkpoint.load(straight)
    different = [key for key in one if key != "settings" and not same(one[key], other[key])]    # it holds --steps
    wanted = list(range(1, steps + 1))
    report = dict(
        kills=kills, steps=steps, kills_before_the_first_new_save=during["start"], kills_while_stepping=during["steps"],
        half_written_files_left_by_kills=leftovers, every_newest_checkpoint_loads=True,
        identical_to_a_run_never_killed=one.keys() == other.keys() and not different, different=different,
        log_has_every_step_once=curves(run)[0] == wanted, tensorboard_has_every_step_once=curves(run)[1] == wanted,
        seconds=round(time.perf_counter() - start, 1),
    )
    print(name, report, flush=True)
    return report


def kills(args):
    torch.set_num_threads(1)
    data.SHAPES_TRAIN_IMAGES = 500                  # else drawing the images would take most of a start
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        what = "SIGKILL at random moments, most of them while stepping; a save after every step; 8 channels"
        report = dict(what=what, seed=args.seed)
        report["train0"] = kill_often("train0", train0, TEACHER, work, args.number, rng)
        student = [*STUDENT, "--teacher", str(work / "train0")]
        report["train"] = kill_often("train", train, student, work, args.number, rng)
    records.write_json(args.out or ROOT / "runs" / "stress" / "kills.json", report, torch.device("cpu"))
    scripts = [report["train0"], report["train"]]
    enough = all(script["kills_while_stepping"] >= args.number / 4 for script in scripts)
    return enough and all(value for script in scripts for value in script.values() if isinstance(value, bool))


def hour(args):
    with tempfile.TemporaryDirectory() as folder:
        teacher, run = Path(folder) / "teacher", Path(folder) / "dmd2"
        python = [sys.executable]
        few = ["--steps", "20", "--save_every", "20", "--run_dir", str(teacher)]
        subprocess.run([*python, "train0.py", *TEACHER, *few], cwd=ROOT, check=True, capture_output=True)
        flags = ["--steps", "100000000", "--max_minutes", str(args.minutes), "--save_every", "100", "--log_every", "20"]
        command = [*python, "train.py", *STUDENT, "--teacher", str(teacher), "--run_dir", str(run), *flags]
        process = subprocess.Popen(
            [*command, "--sample_every", "200"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        begin, readings = time.monotonic(), []
        while process.poll() is None:
            try:
                stat = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
                cpu = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
                memory = int(stat[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20
                files = len(os.listdir(f"/proc/{process.pid}/fd"))
                lines = (run / "log.jsonl").read_text().splitlines()
                readings.append((time.monotonic() - begin, json.loads(lines[-1])["step"], cpu, memory, files))
            except (OSError, IndexError, ValueError):           # starting, ending, or a line just being written
                pass
            time.sleep(5)
        code, steps = process.returncode, checkpoint.load(run)["step"]
    span = min(600, 60 * args.minutes / 6)
    begin, end = readings[0][0], readings[-1][0]
    parts = dict(
        first=[r for r in readings if r[0] <= begin + span], last=[r for r in readings if r[0] >= end - span]
    )
    report = dict(
        what="train.py with a GAN at 8 channels, one thread, a save every 100 steps, a grid every 200: first and last "
        "minutes; medians; resident memory", minutes=args.minutes, span_seconds=span, steps=steps, exit_code=code,
    )
    for name, rows in parts.items():
        (_, step_0, cpu_0, _, _), (_, step_1, cpu_1, _, _) = rows[0], rows[-1]
        report[name] = dict(
            memory_mib=statistics.median(r[3] for r in rows), open_files=statistics.median(r[4] for r in rows),
            steps_per_cpu_second=(step_1 - step_0) / (cpu_1 - cpu_0),
            steps_per_second=(step_1 - step_0) / (rows[-1][0] - rows[0][0]),
        )
    first, last = report["first"], report["last"]
    report["memory_ratio"] = last["memory_mib"] / first["memory_mib"]
    report["speed_ratio_per_cpu_second"] = last["steps_per_cpu_second"] / first["steps_per_cpu_second"]
    records.write_json(args.out or ROOT / "runs" / "stress" / "hour.json", report, torch.device("cpu"))
    print(report)
    flat = report["memory_ratio"] < 1.02 and report["speed_ratio_per_cpu_second"] > 0.9
    return code == 0 and flat and last["open_files"] <= first["open_files"]


def main():
    parser = argparse.ArgumentParser(description="Kill training at random moments, or train for an hour.")
    parser.add_argument("part", choices=["kills", "hour"])
    parser.add_argument("--number", type=int, default=100, help="kills of each script")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="the JSON file to write; default: in runs/stress")
    args = parser.parse_args()
    sys.exit(0 if dict(kills=kills, hour=hour)[args.part](args) else 1)


if __name__ == "__main__":
    main()
