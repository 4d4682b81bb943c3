"""Windows, macOS, other terminals and other launchers, as far as they can be imitated on Linux."""

import ast
import io
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, call, image_tree, log_of, teacher_flags

import sample
import train0
from support import checkpoint, data, files, hardware, launch, processes

SCRIPTS = ["train0", "train", "sample", "evaluate", "tools.features", "tools.benchmark"]
SOURCES = [path for folder in (".", "support", "tools") for path in sorted((ROOT / folder).glob("*.py"))]

# Calls of scripts, one after another, without the modules, signals and open folders that Windows does not have.
# "break" before a call: Ctrl-Break in its step 1.
WINDOWS = """
import importlib, json, os, signal, sys, warnings

for name in ("fcntl", "resource", "pwd", "grp", "termios", "pty", "tty"):
    sys.modules[name] = None
for name in {name for name in dir(signal) if name.startswith("SIG") and name[3] != "_"} - {"SIGINT", "SIGTERM"}:
    delattr(signal, name)
signal.SIGBREAK = 21
open_file = os.open

def open_no_folder(path, *args, **how):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return open_file(path, *args, **how)

os.open = open_no_folder
warnings.filterwarnings("error", category=EncodingWarning, module=r"train0?$|sample$|evaluate$|support\\.")
from support import errors

for script, *argv in json.loads(sys.argv[1]):
    script, _, stop = script.partition(" ")
    module = importlib.import_module(script)
    if stop:
        def step_random(seed, step, *where, original=module.StepRandom):
            if step == 1:
                signal.raise_signal(signal.SIGBREAK)
            return original(seed, step, *where)
        module.StepRandom, original = step_random, module.StepRandom
    try:
        errors.run(lambda: module.main(argv))
    except SystemExit as end:
        assert (end.code or 0) == (128 + 21 if stop else 0), end.code
    if stop:
        module.StepRandom = original
"""


def test_the_whole_pipeline_runs_without_what_windows_lacks(tmp_path, features):
    tree = str(image_tree(tmp_path / "images", classes=("café", "aux.x"), n=128))
    a, b, images = (str(tmp_path / name) for name in ("teacher", "student", "made"))
    of_student = ["--checkpoint", b, "--device", "cpu"]
    real = ["--dataset", "folder", "--data_dir", tree]
    calls = [
        ["train0 break", *teacher_flags(tree), "--run_dir", a, "--steps", "9"],
        ["train0", "--run_dir", a, "--device", "cpu", "--resume", "--steps", "3"],
        ["train", "--teacher", a, "--run_dir", b, "--steps", "2", "--gen_cls_loss_weight", "1e-3", *TINY],
        ["sample", *of_student, "--num_images", "4", "--images", images, "--out", f"{tmp_path}/grid.png"],
        ["evaluate", *of_student, *real, "--num_images", "256", "--feature_extractor", features,
         "--cache_dir", f"{tmp_path}/cache", "--out", f"{tmp_path}/x.json"],
    ]
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", WINDOWS, json.dumps(calls)], cwd=ROOT, encoding="ascii",
        capture_output=True, env=os.environ | dict(PYTHONIOENCODING="ascii", PYTHONPATH=str(ROOT)), timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert r"256 images (256 resized to 32x32), 2 classes (aux.x, caf\xe9)" in done.stdout
    assert "stopped; continue with --resume: step 2 of 9" in done.stdout and checkpoint.load(a)["step"] == 3
    assert "note: in the file names of --images: aux.x as aux_.x" in done.stderr
    assert sorted(os.listdir(images)) == ["aux_.x_00000.png", "aux_.x_00002.png", "café_00001.png", "café_00003.png"]
    assert {"loss", "images_per_second"} < set(log_of(a)[-1]) and "memory_mib" not in log_of(a)[-1]
    assert json.loads((tmp_path / "x.json").read_text())["num_images"] == 256


def test_every_text_file_is_opened_as_utf8():
    """Python's default is another encoding on Windows."""
    def left_open(call):
        given, function = {keyword.arg for keyword in call.keywords}, ast.unparse(call.func)
        text = "text" in given or function.endswith((".read_text", ".write_text"))
        text = text or (function == "open" and "b" not in ast.unparse(call.args[1:]))
        return text and not given & {"encoding", None}

    found = [
        f"{path}:{node.lineno}" for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and left_open(node)
    ]
    assert found == []


@pytest.mark.parametrize("refusals", [0, 3, 99])
def test_a_file_that_a_reader_has_open_is_replaced_when_it_is_closed(tmp_path, monkeypatch, refusals):
    """As Windows refuses it."""
    path, waited, replace = tmp_path / "a", [], os.replace

    def refusing(source, target):
        if len(waited) < refusals:
            raise PermissionError(13, "Permission denied", source, 32, target)
        replace(source, target)

    path.write_text("old")
    monkeypatch.setattr(os, "replace", refusing)
    monkeypatch.setattr(time, "sleep", waited.append)
    if refusals < 99:
        files.write(path, lambda file: file.write(b"new"))
    else:
        with pytest.raises(PermissionError, match=r"Permission denied \(does another program have it open\?\)"):
            files.write(path, lambda file: file.write(b"new"))
        with pytest.raises(OSError, match=f"cannot save {path}: Permission denied .*have it open"):
            checkpoint.save(path, {})
    assert path.read_text() == ("old" if refusals == 99 else "new") and os.listdir(tmp_path) == ["a"]
    assert len(waited) >= min(refusals, 4) and 0 <= sum(waited) <= 4


@pytest.mark.parametrize(("name", "wanted"), [
    ("cat_00000.png", "cat_00000.png"), ("a/b\\c:d.png", "a_b_c_d.png"), ('<>"|?*\n.png', "_______.png"),
    ("aux_00000.png", "aux_00000.png"), ("aux.x_00000.png", "aux_.x_00000.png"), ("NUL .x.png", "NUL_ .x.png"),
    ("com1.png", "com1_.png"), ("com10.png", "com10.png"), ("falcon.png", "falcon.png"), ("con", "con_"),
    ("v1.2_00000.png", "v1.2_00000.png"), ("café.png", "café.png"),
])
def test_file_names_are_those_that_every_system_can_have(name, wanted):
    assert files.portable(name) == wanted


def test_classes_are_ordered_by_the_bytes_of_their_names(tmp_path, monkeypatch):
    """Windows compares paths without regard to case: the labels would be others there."""
    tree = image_tree(tmp_path / "a", classes=("apple", "Zebra"))
    with monkeypatch.context() as patch:
        patch.setattr(type(tree), "__lt__", lambda one, other: str(one).lower() < str(other).lower())
        loaded = data.load("folder", tree)
    assert loaded.classes == ["Zebra", "apple"]


# --- macOS -----------------------------------------------------------------------------------------------------------


def test_a_mac_is_told_to_fall_back_to_the_cpu_before_torch_is_loaded():
    program = """
import importlib, os, sys
class Finder:
    def find_spec(name, *rest):
        if name == "torch":
            raise KeyError(os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"))
sys.meta_path.insert(0, Finder)
for script in sys.argv[1:]:
    os.environ.pop("PYTORCH_ENABLE_MPS_FALLBACK", None)
    try:
        importlib.import_module(script)
    except KeyError as found:
        print(script, found.args[0])
"""
    done = subprocess.run([sys.executable, "-c", program, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == [f"{script} 1" for script in SCRIPTS], done.stderr


def test_auto_is_cuda_then_mps_then_the_cpu(monkeypatch, capsys):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, device="cpu": zeros(n))           # no Mac here to have any on
    for cuda, mps, world, wanted in ((0, 1, 1, "mps"), (0, 0, 1, "cpu"), (1, 1, 1, "cuda"), (0, 1, 2, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: bool(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: bool(mps))
        monkeypatch.setattr(processes, "WORLD", world)
        assert hardware.pick_device("auto").type == wanted
    with pytest.raises(ValueError, match="'mps' is for one process"):
        hardware.pick_device("mps")
    monkeypatch.setattr(processes, "WORLD", 1)
    for precision, number in (("auto", "float32"), ("bf16", "bf16"), ("fp16", "fp16")):
        args = type("Args", (), dict(device="auto", precision=precision))
        assert hardware.start(args).type == "mps"
        assert capsys.readouterr().out.startswith(f"--device mps, in {number}; operators that MPS lacks run on the CPU")


# --- names and terminals ---------------------------------------------------------------------------------------------

LATIN = "caf\udce9"                                 # what Python makes of the bytes b"caf\xe9"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("name", ["café", LATIN, "猫"])
def test_every_name_is_printed_on_every_terminal(tmp_path, monkeypatch, encoding, name):
    def printed(script, *argv):
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            code = call(script, *argv)
        out.flush(), err.flush()
        return code, (out.buffer.getvalue() + err.buffer.getvalue()).decode(encoding)

    shown = name.encode(encoding, errors="backslashreplace").decode(encoding)
    tree = str(image_tree(tmp_path / name, classes=("cat", name)))
    run, images = f"{tmp_path}/run", f"{tmp_path}/{name}2"
    code, text = printed(train0, *teacher_flags(tree), "--steps", "1", "--run_dir", run)
    assert code == 0 and shown in text
    assert name in checkpoint.load(run)["classes"] and checkpoint.load(run)["settings"]["data_dir"] == tree
    few = ["--checkpoint", run, "--device", "cpu", "--num_images", "1", "--num_steps", "1", "--labels"]
    code, text = printed(sample, *few, name, "--images", images, "--out", f"{images}.png")
    assert code == 0 and shown in text and os.listdir(images) == [f"{name}_00000.png"]
    code, text = printed(sample, *few, "dog")
    assert code == 2 and shown in text and len(text.splitlines()) == 1


def test_a_run_folder_that_tensorboard_cannot_name_is_refused(tmp_path, tree, capsys):
    run = f"{tmp_path}/{LATIN}"
    assert call(train0, *teacher_flags(tree), "--steps", "1", "--run_dir", run) == 2
    assert f"--run_dir {tmp_path}/caf\\udce9: TensorBoard writes only" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_torchrun_is_told_of_an_error_whatever_the_names_in_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "LAUNCHED", True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert call(sample, "--checkpoint", LATIN) == 2
    found = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert found.startswith(f"no checkpoint at {LATIN}: ")


# --- launchers -------------------------------------------------------------------------------------------------------

STEP = dict(SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0")
TORCHRUN = dict(TORCHELASTIC_RUN_ID="1", RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")


@pytest.mark.parametrize(("variables", "said"), [
    ({}, None),
    (dict(SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1"), None),     # srun --pty, or of one task
    (dict(SLURM_NTASKS="4"), None),                                                 # salloc
    (dict(STEP, ENVIRONMENT="BATCH"), None),                                        # sbatch --ntasks=2
    (dict(STEP, ENVIRONMENT="BATCH", SLURM_STEP_NUM_TASKS="1"), None),              # and in it srun --ntasks=1
    (dict(STEP, ENVIRONMENT="BATCH", SLURM_STEP_NUM_TASKS="2"), "SLURM_STEP_NUM_TASKS says"),       # and srun
    (STEP, "SLURM_NTASKS says that this is one of 2 processes"),
    (dict(STEP, **TORCHRUN), None),                                                 # srun torchrun
    (dict(OMPI_COMM_WORLD_SIZE="3"), "start a single `torchrun --nproc_per_node=3 ...` instead"),
    (dict(PMI_SIZE="2"), "PMI_SIZE says"),
    (dict(RANK="0", WORLD_SIZE="2"), "unset WORLD_SIZE"),
    (dict(TORCHELASTIC_RUN_ID="1"), "TORCHELASTIC_RUN_ID is set but not RANK"),
    (dict(TORCHRUN, WORLD_SIZE=""), "TORCHELASTIC_RUN_ID is set but not WORLD_SIZE"),
])
def test_only_torchrun_starts_several_processes(monkeypatch, variables, said, tmp_path, tree, capsys):
    for name in (*STEP, *TORCHRUN, "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = launch.misled()
    assert found is None if said is None else said in found
    if said:
        monkeypatch.setattr(launch, "MISLED", found)
        assert call(train0, *teacher_flags(tree), "--steps", "1", "--run_dir", f"{tmp_path}/run") == 2
        assert capsys.readouterr().err.endswith(f"error: {found}\n") and os.listdir(tmp_path) == []


@pytest.mark.parametrize(("variables", "code"), [
    (dict(SLURM_NTASKS="1", SLURM_PROCID="0"), 0), (dict(STEP, SLURM_STEP_NUM_TASKS="2"), 2),
    (dict(TORCHELASTIC_RUN_ID="1"), 2),
])
def test_a_script_started_otherwise_is_alone_or_ends_in_one_line(variables, code):
    program = "from support import errors, processes; errors.run(lambda: print(processes.RANK, processes.WORLD))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=os.environ | variables
    )
    assert done.returncode == code and done.stdout == ("" if code else "0 1\n")
    assert len(done.stderr.splitlines()) == (1 if code else 0)
