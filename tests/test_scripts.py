"""The scripts as a user calls them: a smoke run through all, exact resume, stop signals, and wrong calls."""

import argparse
import ast
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, image_tree, teacher_flags
from PIL import Image

import diffusion
import evaluate
import sample
import train
import train0
from model import SimpleUNet
from support import checkpoint, data, pictures, processes, run_folder
from tools import benchmark, features


@pytest.fixture(scope="module")
def teacher(tree, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs") / "teacher")
    assert call(train0, *teacher_flags(tree), "--run_dir", folder, "--steps", "6") == 0
    return folder


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs") / "student")
    assert call(train, "--teacher", teacher, "--run_dir", folder, "--steps", "1", *TINY) == 0
    return folder


def read(path):
    return Path(path).read_bytes()


def assert_same_run(one, other):
    """Two run folders hold the same weights, averages, optimizer states, logged losses and grids, bit for bit."""
    def flat(value, prefix=""):
        if isinstance(value, dict):
            return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}/{key}").items()}
        return {prefix: value}

    a, b = flat(checkpoint.load(one)), flat(checkpoint.load(other))
    assert a.keys() == b.keys()
    different = [k for k in a if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]
    assert different == []
    speed = ("images_per_second", "memory_mib")
    log_a, log_b = (
        [{k: v for k, v in json.loads(s).items() if k not in speed} for s in read(f"{run}/log.jsonl").splitlines()]
        for run in (one, other)
    )
    assert log_a == log_b
    grids = set(os.listdir(f"{one}/grids"))
    assert grids and grids <= set(os.listdir(f"{other}/grids"))     # which may have one more, of a stop
    for name in grids:
        assert read(f"{one}/grids/{name}") == read(f"{other}/grids/{name}")


def test_teacher_student_and_samples_through_the_real_scripts(tmp_path, tree):
    """One process each, by the README's commands."""
    def python(*argv):
        subprocess.run([sys.executable, *argv], cwd=ROOT, check=True, capture_output=True, timeout=300)

    a, b = str(tmp_path / "teacher"), str(tmp_path / "dmd2")
    python("train0.py", "--run_dir", a, "--steps", "3", *teacher_flags(tree))
    python("train.py", "--teacher", a, "--run_dir", b, "--steps", "3", "--conditioning_sigma", "80", *TINY)
    out, npz = str(tmp_path / "grid.png"), str(tmp_path / "samples.npz")
    python("sample.py", "--checkpoint", b, "--out", out, "--npz", npz, "--num_images", "6", "--device", "cpu")
    assert Image.open(out).size == (3 * 34 + 2, 2 * 34 + 2)         # a row for each of the two classes
    arrays = np.load(npz)
    assert arrays["arr_0"].shape == (6, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [0, 1, 0, 1, 0, 1] and arrays["arr_1"].dtype == np.int64
    for run in (a, b):
        assert {"checkpoint.pt", "log.jsonl", "tensorboard", "grids"} <= set(os.listdir(run))


@pytest.mark.parametrize("preset", train0.PRESETS)
def test_the_presets_run_on_shapes(tmp_path, monkeypatch, preset):
    for script in (train0, train):
        monkeypatch.delitem(script.PRESETS[preset], "compile", raising=False)       # a minute, and tried elsewhere
    few = ["--preset", preset, "--steps", "1", "--batch_size", "4", "--device", "cpu"]
    a, b = f"{tmp_path}/a", f"{tmp_path}/b"
    assert call(train0, "--dataset", "shapes", "--channels", "8", "--run_dir", a, *few) == 0
    assert call(train, "--teacher", a, "--run_dir", b, *few, "--fit_steps", "0", "--gan_steps", "0") == 0
    assert checkpoint.load(b)["settings"]["generator_lr"] == train.PRESETS[preset]["generator_lr"]


@pytest.mark.parametrize("script", [train0, train])
def test_presets_set_flags_that_there_are(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                     # argparse takes defaults of any name
    args = [vars(script.parse_args(["--preset", preset])[0]) for preset in script.PRESETS]
    plain = vars(script.parse_args(["--preset", "none"])[0])
    assert all(found.keys() == plain.keys() for found in args)


def test_a_resumed_run_takes_nothing_new_from_its_preset(tmp_path, tree, monkeypatch):
    run = f"{tmp_path}/a"
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "1") == 0
    state = checkpoint.load(run)
    del state["settings"]["label_dropout"]          # as of a version that did not have it
    checkpoint.save(Path(run) / checkpoint.NAME, state)
    monkeypatch.setitem(train0.PRESETS, "new", dict(label_dropout=0.5, lr=0.5, compile=True))
    args, _ = train0.parse_args(["--run_dir", run, "--resume", "--preset", "new"])
    assert args.label_dropout == 0 and args.lr == state["settings"]["lr"] and not args.compile


def test_a_resumed_run_is_compiled_as_before_unless_told_otherwise(tmp_path, tree):
    run = Path(tmp_path / "a")
    assert call(train0, *teacher_flags(tree), "--run_dir", str(run), "--steps", "1") == 0
    state = checkpoint.load(run)
    checkpoint.save(run / checkpoint.NAME, dict(state, settings=dict(state["settings"], compile=True)))
    assert train0.parse_args(["--run_dir", str(run), "--resume"])[0].compile
    assert not train0.parse_args(["--run_dir", str(run), "--resume", "--no-compile"])[0].compile


def test_compiling_that_fails_is_one_line_and_can_be_left_out_of_a_preset(capsys, tmp_path, monkeypatch):
    from torch._dynamo.exc import BackendCompilerFailed

    def fails(*_, **__):
        raise BackendCompilerFailed(lambda: None, RuntimeError("no compiler"), None)

    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **_: setattr(net, "_compiled_call_impl", fails))
    assert call(sample, "--checkpoint", f"{ROOT}/weights/student.pt", "--compile", "--out", f"{tmp_path}/x.png") == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--compile failed, --no-compile does without" in message and not list(tmp_path.iterdir())
    assert train0.parse_args(["--preset", "cifar10_gpu"])[0].compile
    assert not train0.parse_args(["--preset", "cifar10_gpu", "--no-compile"])[0].compile


def test_the_defaults_are_the_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, _ = train.parse_args(["--preset", "none"])
    wanted = dict(
        conditioning_sigma=80.0, dfake_gen_update_ratio=10, min_step_percent=0.02, max_step_percent=0.98,
        sigma_min=0.002, sigma_max=80.0, fake_noise="all", cls_loss_weight=1e-2,
    )
    assert {name: getattr(args, name) for name in wanted} == wanted
    args, _ = train0.parse_args(["--preset", "none"])
    wanted = dict(
        p_mean=-1.2, p_std=1.2, flip=1, sigma_min=0.002, sigma_max=80.0,
        lr_schedule="cosine",
    )
    assert {name: getattr(args, name) for name in wanted} == wanted


def interrupted(monkeypatch, script, at_step, signum):
    """Make the script receive a signal in the middle of step at_step."""
    original = script.StepRandom

    def step_random(seed, step, *where):
        if step == at_step and not done:
            done.append(True)
            os.kill(os.getpid(), signum)
        return original(seed, step, *where)

    done = []
    monkeypatch.setattr(script, "StepRandom", step_random)


@pytest.mark.parametrize(("at_step", "signum", "decay", "optimizer"), [
    (2, signal.SIGTERM, "0.999", "muon"), (5, signal.SIGINT, "0", "adam"), (3, signal.SIGUSR1, "0.9", "adam"),
])
def test_teacher_resumes_bit_for_bit(tmp_path, monkeypatch, tree, at_step, signum, decay, optimizer, capsys):
    a, b = str(tmp_path / "straight"), str(tmp_path / "resumed")
    flags = [*teacher_flags(tree), "--ema_decay", decay, "--steps", "7"]
    flags += ["--optimizer", optimizer]
    assert call(train0, *flags, "--run_dir", a) == 0
    interrupted(monkeypatch, train0, at_step, signum)
    assert call(train0, *flags, "--run_dir", b) == 128 + signum
    assert f"{at_step + 1:07}_teacher.png" in os.listdir(f"{b}/grids")
    assert checkpoint.load(b)["step"] == at_step + 1
    assert f"stopped; --resume goes on: step {at_step + 1} of 7" in capsys.readouterr().out
    assert call(train0, "--run_dir", b, "--resume", "--device", "cpu") == 0
    assert_same_run(a, b)


EVERYTHING = [
    "--gen_cls_loss_weight", "3e-3", "--f_div", "kl", "--num_denoising_steps", "2",
    "--optimizer", "muon",
]


@pytest.mark.parametrize(("at_step", "signum", "more"), [
    (2, signal.SIGINT, []), (5, signal.SIGTERM, ["--ema_decay", "0"]), (4, signal.SIGTERM, EVERYTHING),
    (2, signal.SIGTERM, ["--fit_steps", "5", "--ode_pairs", "8", "--batch_size", "4"]),
    (4, signal.SIGTERM, ["--gan_steps", "4", "--warmup_steps", "1", "--gan_lr", "1e-2", "--optimizer", "muon"]),
    (3, signal.SIGTERM, ["--gan_steps", "4", "--warmup_steps", "2"]),
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

    def step_random(seed, step, *where):            # dies in step 5: saved at 3, logged at 2 and 4
        if step == 5:
            raise KeyboardInterrupt
        return original(seed, step, *where)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train0, "StepRandom", step_random)
        train0.main([*teacher_flags(tree), "--run_dir", b, "--steps", "7"])
    assert checkpoint.load(b)["step"] == 3
    with open(f"{b}/log.jsonl", "a") as file:       # and the kill cut a line
        file.write('{"step": 6, "lo')
    assert call(train0, "--run_dir", b, "--resume", "--device", "cpu") == 0
    assert_same_run(a, b)


def test_the_turns_alternate_at_the_ratio_and_the_ema_ticks_with_the_generator(tmp_path, teacher):
    flags = ["--teacher", teacher, "--run_dir", f"{tmp_path}/b", "--dfake_gen_update_ratio", "3", "--steps", "7"]
    rates = ["--generator_lr", "3e-4", "--guidance_lr", "7e-4", "--warmup_steps", "0"]
    assert call(train, *flags, *rates, "--precision", "bf16", *TINY) == 0
    state = checkpoint.load(f"{tmp_path}/b")        # generator turns at steps 0, 3 and 6
    for name, rate in (("generator", 3e-4), ("guidance", 7e-4)):
        assert [group["lr"] for group in state[f"{name}_optimizer"]["adam"]["param_groups"]] == [rate]
    adam = {name: state[f"{name}_optimizer"]["adam"]["state"] for name in ("generator", "guidance")}
    updates = {name: found[0]["step"].item() for name, found in adam.items()}
    assert updates == dict(generator=3, guidance=7) and state["ema"]["n_averaged"].item() == 3
    initial = checkpoint.load(teacher)["model_ema"]
    for name in ("feedforward_model", "guidance_model.fake_unet"):
        assert any(not torch.equal(state["model"][f"{name}.{k}"], v) for k, v in initial.items())
    assert any(not torch.equal(state["model_ema"][k], v) for k, v in initial.items())


def test_the_gan_takes_the_teachers_images_and_trains_its_head(tmp_path, teacher, tree, monkeypatch):
    asked, load = [], train.data.load
    monkeypatch.setattr(train.data, "load", lambda *args: asked.append(args) or load(*args))
    flags = ["--teacher", teacher, "--run_dir", f"{tmp_path}/b", "--steps", "4", *TINY]
    assert call(train, *flags) == 0 and asked == []                 # without a GAN no dataset is looked at,
    assert checkpoint.load(f"{tmp_path}/b")["settings"]["dataset"] == "folder"      # but evaluate.py will want to know
    gan = ["--gen_cls_loss_weight", "3e-3", "--cls_head_lr", "1e-5", "--warmup_steps", "0"]
    assert call(train, *flags, *gan, "--overwrite") == 0
    assert asked == [("folder", tree, "train")]
    rows = [json.loads(line) for line in read(f"{tmp_path}/b/log.jsonl").splitlines()]
    assert {"loss_dm", "gen_cls_loss", "loss_fake", "cls_loss", "logit_fake", "logit_real"} <= set(rows[0])
    state = checkpoint.load(f"{tmp_path}/b")
    head = [name for name in state["model"] if "cls_head" in name]
    parameters = checkpoint.load(teacher)["model_ema"]              # fake_unet and its head share one optimizer
    assert head and len(state["guidance_optimizer"]["adam"]["state"]) == len(parameters) + len(head)
    assert [group["lr"] for group in state["guidance_optimizer"]["adam"]["param_groups"]] == [2e-4, 1e-5]
    for name in ("dataset", "data_dir"):
        assert state["settings"][name] == dict(dataset="folder", data_dir=tree)[name]
    assert call(train, "--run_dir", f"{tmp_path}/b", "--resume", "--gen_cls_loss_weight", "0", "--device", "cpu") == 2


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_label_dropout_hides_that_share_of_the_classes(share, tmp_path, tree, monkeypatch):
    seen, forward = [], SimpleUNet.forward

    def spy(self, x_t, sigma, labels, *args):
        if self.training:
            seen.append(labels)
        return forward(self, x_t, sigma, labels, *args)

    monkeypatch.setattr(SimpleUNet, "forward", spy)
    flags = ["--steps", "40", "--batch_size", "16", "--sample_every", "100", "--label_dropout", str(share)]
    assert call(train0, *teacher_flags(tree), "--run_dir", f"{tmp_path}/a", *flags) == 0
    labels = torch.cat(seen)
    assert len(labels) == 640 and set(labels.tolist()) == ({-1, 0, 1} if share else {0, 1})
    assert (labels == -1).double().mean() == pytest.approx(share, abs=0.06)         # 3 standard deviations


def test_several_steps_and_a_guided_teacher_from_training_to_samples(tmp_path, tree, capsys):
    a, b = f"{tmp_path}/a", f"{tmp_path}/b"
    assert call(train0, *teacher_flags(tree), "--run_dir", a, "--steps", "2", "--label_dropout", "0.5") == 0
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
    assert abs(images[0][:4] - images[1]).max() <= 1                # the noise between steps goes by image as well
    for scale, evaluations in (("0", 6), ("1", 3), ("3", 6)):
        assert call(sample, "--checkpoint", a, "--cfg_scale", scale, "--num_steps", "2", *paths) == 0
        assert f" {evaluations} evaluations each" in capsys.readouterr().out
        images.append(np.load(f"{tmp_path}/x.npz")["arr_0"])
    assert not np.array_equal(images[2], images[3]) and not np.array_equal(images[3], images[4])
    for low, high, alike in (("0", "100", 4), ("90", "100", 3)):    # from 80 down: all of it, none of it
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
    assert call(train0, *flags, "0", "--overwrite") == 0 and not guide.exists()     # that of the former run is gone
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
    losses = [json.loads(line)["loss_dm"] for line in read(f"{b}/log.jsonl").splitlines() if b"loss_dm" in line]
    interrupted(monkeypatch, train, 5, signal.SIGTERM)
    assert call(train, "--run_dir", f"{tmp_path}/c", *flags) == 143
    guide.unlink()                                                  # the run stands on its own
    assert call(train, "--run_dir", f"{tmp_path}/c", "--resume") == 0
    assert_same_run(b, tmp_path / "c")
    assert call(train, "--run_dir", f"{tmp_path}/d", *flags, "--autoguidance_scale", "1") == 0
    plain = [json.loads(line)["loss_dm"] for line in read(f"{tmp_path}/d/log.jsonl").splitlines() if b"loss_dm" in line]
    assert losses[0] != plain[0]

    other = f"{tmp_path}/other"
    assert call(train0, "--dataset", "shapes", "--run_dir", other, "--steps", "1", "--channels", "8", *TINY) == 0
    auto = ["--autoguidance_scale", "2"]
    for script, argv, said in (
        (sample, ["--checkpoint", a, *auto, *paths], "guide.pt"),   # it was deleted above
        (train, ["--teacher", a, "--run_dir", f"{tmp_path}/e", "--steps", "1", *auto, *TINY], "guide.pt"),
        (train, [*flags, "--run_dir", f"{tmp_path}/e", "--guide", other], "classes of --guide"),
        (train, ["--run_dir", f"{tmp_path}/d", "--resume", *auto], "resumed run"),
        (train, ["--run_dir", b, "--resume", "--guide", other], "--guide"),
        (sample, ["--checkpoint", b, *auto, *paths], "--autoguidance_scale is for teachers"),
        (sample, ["--checkpoint", a, "--guide", other, *paths], "--guide needs"),
    ):
        capsys.readouterr()
        assert call(script, *argv) == 2 and said in capsys.readouterr().err, argv
    assert not (tmp_path / "e").exists()


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
    monkeypatch.setattr(checkpoint, "save", save)
    assert call(train0, *flags, "--resume") == 0
    assert checkpoint.load(tmp_path / "a" / "guide.pt")["step"] == 3


def test_classes_of_unequal_size_are_said(tmp_path, tree, capsys):
    flags = teacher_flags(tree)
    assert call(train0, *flags, "--run_dir", f"{tmp_path}/a", "--steps", "1") == 0
    assert "note:" not in capsys.readouterr().err
    folder = shutil.copytree(tree, tmp_path / "tree")
    sorted(next(path for path in sorted(folder.iterdir()) if path.is_dir()).iterdir())[0].unlink()
    assert call(train0, *teacher_flags(str(folder)), "--run_dir", f"{tmp_path}/b", "--steps", "1") == 0
    assert "note: the classes have" in capsys.readouterr().err


def test_overwrite_starts_anew_and_keeps_the_old_checkpoint_until_the_new_one_is_saved(tmp_path, tree, monkeypatch):
    run = str(tmp_path / "a")
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "6") == 0
    record = [path for path in Path(run).rglob("*") if path.is_file() and path.name != "lock"]
    before = {path: read(path) for path in record}
    assert {path.name for path in record} > {"checkpoint.pt", "log.jsonl", "guide.pt"} and len(record) > 4

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "3", "--overwrite") == 1
    assert {path: read(path) for path in record} == before
    assert {path for path in Path(run).rglob("*") if path.is_file() and path.name != "lock"} == set(record)
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "3", "--overwrite") == 0
    assert checkpoint.load(run)["step"] == 3 and len(list(Path(run, "tensorboard").iterdir())) == 1

    with monkeypatch.context() as patch:            # stopped between the first save and the rest
        patch.setattr(run_folder.RunFolder, "begin", full_disk)
        assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "9", "--overwrite") == 1
    assert checkpoint.load(f"{run}/guide.pt")["step"] == 1
    assert call(train0, "--run_dir", run, "--resume", "--steps", "3", "--guide_at", "0.9") == 0
    assert checkpoint.load(f"{run}/guide.pt")["step"] == 3
    assert [json.loads(line)["step"] for line in read(f"{run}/log.jsonl").splitlines()] == [2, 3]


def test_the_teacher_inside_the_student_is_bit_identical(tmp_path, teacher):
    assert call(train, "--teacher", teacher, "--run_dir", f"{tmp_path}/b", "--steps", "4", *TINY) == 0
    ema, model = checkpoint.load(teacher)["model_ema"], checkpoint.load(f"{tmp_path}/b")["model"]
    for name, tensor in ema.items():
        assert torch.equal(model[f"guidance_model.real_unet.{name}"], tensor)
    moved = [not torch.equal(model[f"guidance_model.fake_unet.{name}"], tensor) for name, tensor in ema.items()]
    assert any(moved)


def test_a_finished_run_resumes_to_nothing_and_can_be_prolonged(tmp_path, tree):
    run = str(tmp_path / "a")
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "2", "--resume") == 0    # nothing there yet
    assert call(train0, "--run_dir", run, "--resume", "--device", "cpu") == 0
    assert checkpoint.load(run)["step"] == 2
    assert call(train0, "--run_dir", run, "--resume", "--device", "cpu", "--steps", "3") == 0
    assert checkpoint.load(run)["step"] == 3 and checkpoint.load(run)["settings"]["channels"] == 8


@pytest.mark.parametrize(("asked", "wanted"), [
    (None, ("folder", "mine", 0)), ("folder", ("folder", "mine", 0)), ("cifar10", ("cifar10", "data", 1)),
])
def test_the_folder_and_the_mirroring_of_other_images_are_not_taken_over(asked, wanted):
    known = dict(settings=dict(dataset="folder", data_dir="mine", flip=0))
    args = argparse.Namespace(dataset=asked, data_dir=None, flip=None)
    data.name_dataset(args, known)
    assert (args.dataset, args.data_dir, args.flip) == wanted
    args = argparse.Namespace(dataset=asked, data_dir="here", flip=1)
    data.name_dataset(args, known)
    assert (args.data_dir, args.flip) == ("here", 1)


def test_a_guide_is_kept_once_in_a_run_that_is_shortened_or_prolonged(tmp_path, tree, monkeypatch):
    run = str(tmp_path / "a")
    interrupted(monkeypatch, train0, 1, signal.SIGTERM)
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "20") == 143
    assert checkpoint.load(run)["step"] == 2 and not (tmp_path / "a" / "guide.pt").exists()         # due after 6.7
    for steps in "4", "10":                         # due after 1.3, which has passed; after 3.3
        assert call(train0, "--run_dir", run, "--resume", "--steps", steps) == 0
        assert checkpoint.load(f"{run}/guide.pt")["step"] == 3


def test_a_run_that_diverges_leaves_no_guide(tmp_path, tree, monkeypatch, capsys):
    weights = iter([1.0, 1.0, float("nan")])        # in step 3, after which the guide is due, before a log or a save
    monkeypatch.setattr(train0.diffusion, "karras_weight", lambda sigma: next(weights, 1.0))
    assert call(train0, *teacher_flags(tree), "--run_dir", str(tmp_path), "--steps", "9", "--save_every", "9") == 1
    assert "is nan at step 2" in capsys.readouterr().err and not (tmp_path / "guide.pt").exists()


@pytest.mark.parametrize("name", ["best.pt", "guide.pt", "log.jsonl"])
def test_a_folder_with_the_rest_of_a_run_is_not_taken_for_a_new_one(tmp_path, tree, capsys, name):
    run = tmp_path / "a"
    run.mkdir()
    (run / name).write_text("kept")
    for more in [], ["--resume"]:
        assert call(train0, *teacher_flags(tree), "--run_dir", str(run), "--steps", "1", *more) == 2
        assert f"holds {name} but no checkpoint.pt" in capsys.readouterr().err
        assert [path.name for path in run.iterdir()] == [name] and (run / name).read_text() == "kept"
    assert call(train0, *teacher_flags(tree), "--run_dir", str(run), "--steps", "1", "--overwrite") == 0


def test_a_teacher_that_was_stopped_is_said(tmp_path, teacher, capsys):
    state = checkpoint.load(teacher)
    checkpoint.save(tmp_path / "early.pt", dict(state, step=4))
    for path, said in ((teacher, False), (f"{tmp_path}/early.pt", True)):
        capsys.readouterr()
        assert call(train, "--teacher", path, "--run_dir", f"{tmp_path}/{said}", "--steps", "1", *TINY) == 0
        assert ("step 4 of 6, 2 classes" in capsys.readouterr().out) == said


def test_max_minutes_saves_and_stops(tmp_path, tree):
    run = str(tmp_path / "a")
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "100000", "--max_minutes", "0.02") == 0
    assert 0 < checkpoint.load(run)["step"] < 100000


def test_a_second_writer_is_refused_and_named_the_first(tmp_path, tree, capsys):
    run = str(tmp_path / "a")
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "2") == 0
    before = {path: read(path) for path in tmp_path.rglob("*") if path.is_file()}
    hold = "import sys, time; from support import checkpoint, run_folder; run = sys.argv[1]; "
    hold += "r = run_folder.RunFolder(run, checkpoint.stamp(run)); print(1, flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", hold, run], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"1\n"
        for flags in (["--resume"], ["--overwrite", *teacher_flags(tree)]):
            capsys.readouterr()
            assert call(train0, "--run_dir", run, "--steps", "4", "--device", "cpu", *flags) == 2
            assert f"process {holder.pid} on " in capsys.readouterr().err
        kept = {path for path in before if path.name != "lock"}
        assert all(read(path) == before[path] for path in kept)
    finally:
        holder.kill()                               # the kernel gives the lock back
        holder.wait()
    assert call(train0, "--run_dir", run, "--resume", "--steps", "4", "--device", "cpu") == 0


@pytest.mark.parametrize("flags", [["--resume"], []], ids=["resumed", "fresh"])
def test_a_save_between_reading_and_locking_the_folder_is_not_lost(flags, tmp_path, tree, capsys, monkeypatch):
    run, other = str(tmp_path / "a"), str(tmp_path / "b")
    for path in (run, other) if flags else (other,):
        assert call(train0, *teacher_flags(tree), "--run_dir", path, "--steps", "2") == 0
    load = data.from_flags

    def meanwhile(*args):                           # another process saves and ends
        os.makedirs(run, exist_ok=True)
        shutil.copy(f"{other}/checkpoint.pt", f"{run}/checkpoint.pt")
        return load(*args)

    monkeypatch.setattr(data, "from_flags", meanwhile)
    capsys.readouterr()
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "4", *flags) == 2
    assert "another process has saved" in capsys.readouterr().err
    assert read(f"{run}/checkpoint.pt") == read(f"{other}/checkpoint.pt")


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_checkpoint_stands(tmp_path, tree, capsys):
    run = str(tmp_path / "a")
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "3") == 0
    state = checkpoint.load(run)
    next(iter(state["model"].values()))[:] = 1e38   # so large that its square is infinite
    checkpoint.save(f"{run}/checkpoint.pt", state)
    before = read(f"{run}/checkpoint.pt")
    capsys.readouterr()
    assert call(train0, "--run_dir", run, "--resume", "--device", "cpu", "--steps", "9") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(lines) == 1 and " at step " in lines[0] and ("loss" in lines[0] or "grad_norm" in lines[0])
    assert read(f"{run}/checkpoint.pt") == before


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stands(tmp_path, tree):
    run = str(tmp_path / "a")
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "3") == 0
    before = read(f"{run}/checkpoint.pt")
    command = [sys.executable, "train0.py", "--run_dir", run, "--resume", "--steps", "9", "--device", "cpu"]

    def limit():                                    # no file may grow past half a checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, timeout=300)
    lines = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert len(lines) == 1 and "cannot save" in lines[0] and "checkpoint.pt" in lines[0]
    assert read(f"{run}/checkpoint.pt") == before
    assert not [name for name in os.listdir(run) if name.endswith(".tmp")]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 13 MiB, room for a teacher's checkpoint and its successor, and the same one read-only."""
    place, read_only = tmp_path / "disk", tmp_path / "read_only"
    place.mkdir(), read_only.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=13m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    subprocess.run(["mount", "--bind", place, read_only], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", read_only], check=True)
    yield place, read_only
    subprocess.run(["umount", read_only, place], check=True)


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
    before = read(f"{run}/checkpoint.pt")
    (small_disk / "others").write_bytes(bytes(13 * 2**20 - size * 3 // 2))      # other files take what is left
    code, lines = said(train0, "--run_dir", run, "--resume", "--steps", "6")
    assert code == 1 and len(lines) == 1 and "stands" in lines[0] and read(f"{run}/checkpoint.pt") == before
    (small_disk / "others").unlink()
    code, lines = said(train0, "--run_dir", str(read_only / "run"), "--resume", "--steps", "6")
    assert code == 2 and len(lines) == 1 and "cannot be written" in lines[0]
    assert call(train0, "--run_dir", run, "--resume", "--steps", "6", "--device", "cpu") == 0


def test_a_tensorboard_that_cannot_be_written_is_one_line(tmp_path, tree, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "tensorboard").write_text("in the way")
    assert call(train0, *teacher_flags(tree), "--run_dir", str(run), "--steps", "3") == 1
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err and len(err.splitlines()) == 1 and str(run) in err


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
    # As if made in this second, by a process whose name comes late: what the resumed run writes must be read after it.
    file, = Path(run, "tensorboard").iterdir()
    file.rename(file.with_name(f"events.out.tfevents.{int(time.time()):010d}.zzz.9.9"))
    assert call(train0, "--run_dir", run, "--resume", "--device", "cpu") == 0
    board = EventAccumulator(f"{run}/tensorboard", size_guidance=dict(scalars=0))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 8))


def test_images_depend_on_seed_and_index_alone(tmp_path, teacher):
    def images(*flags):
        path = f"{tmp_path}/x.npz"
        flags = ["--num_steps", "3", "--device", "cpu", "--out", f"{tmp_path}/x.png", "--npz", path, *flags]
        assert call(sample, "--checkpoint", teacher, *flags) == 0
        return np.load(path)["arr_0"].astype(int)

    twelve = images("--num_images", "12")
    assert len(np.unique(twelve.reshape(12, -1), axis=0)) == 12
    for flags in (["--batch_size", "5"], ["--batch_size", "1"]):
        # Another batch size may take another kernel, which rounds differently: one grey level at the very most.
        assert abs(images("--num_images", "12", *flags) - twelve).max() <= 1
    assert abs(images("--num_images", "4") - twelve[:4]).max() <= 1
    assert abs(images("--num_images", "12", "--seed", "1") - twelve).max() > 1


def test_without_a_run_the_shipped_weights_are_taken_and_said(tmp_path, teacher, monkeypatch, capsys):
    weights, work = tmp_path / "weights", tmp_path / "work"
    weights.mkdir(), work.mkdir()
    monkeypatch.setattr(checkpoint, "SHIPPED", weights)
    monkeypatch.chdir(work)
    assert call(sample, "--device", "cpu") == 2                     # none are shipped, none are there
    checkpoint.save(weights / "teacher.pt", checkpoint.slim(checkpoint.load(teacher)))
    assert os.path.getsize(weights / "teacher.pt") < os.path.getsize(f"{teacher}/checkpoint.pt") / 5
    capsys.readouterr()
    assert call(train, *TINY, "--steps", "1", "--run_dir", "elsewhere") == 0
    assert f"no run in runs/teacher: taking the shipped weights, {weights}/teacher.pt" in capsys.readouterr().out
    student = checkpoint.load("elsewhere")
    checkpoint.save(weights / "student.pt", checkpoint.slim(student), compressed=True)
    assert call(sample, "--num_images", "2", "--npz", "a.npz", "--device", "cpu") == 0
    assert f"{weights}/student.pt" in capsys.readouterr().out
    assert call(sample, "--num_images", "2", "--npz", "b.npz", "--device", "cpu", "--checkpoint", "elsewhere") == 0
    a, b = (np.load(name)["arr_0"].astype(int) for name in ("a.npz", "b.npz"))
    assert abs(a - b).max() <= 2                    # half precision of the weights
    assert call(sample, "--checkpoint", "nowhere", "--device", "cpu") == 2          # what is asked for is not replaced
    shutil.copy(weights / "student.pt", work / "elsewhere" / "checkpoint.pt")
    assert call(train, "--run_dir", "elsewhere", "--resume", "--device", "cpu") == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_labels_by_name_and_number(tmp_path, teacher):
    paths = ["--out", f"{tmp_path}/x.png", "--npz", f"{tmp_path}/x.npz", "--num_steps", "2", "--device", "cpu"]
    assert call(sample, "--checkpoint", teacher, "--labels", "dog", "0", "1", "--num_images", "5", *paths) == 0
    assert np.load(f"{tmp_path}/x.npz")["arr_1"].tolist() == [1, 0, 1, 1, 0]


def test_single_images_are_those_of_the_npz_named_by_class_and_number(tmp_path, teacher):
    paths = ["--images", f"{tmp_path}/new/images", "--npz", f"{tmp_path}/x.npz", "--out", f"{tmp_path}/x.png"]
    assert call(sample, "--checkpoint", teacher, "--num_images", "3", "--device", "cpu", *paths) == 0
    names = ["cat_00000.png", "cat_00002.png", "dog_00001.png"]
    assert sorted(os.listdir(tmp_path / "new" / "images")) == names
    for name in names:
        pixels = np.asarray(Image.open(tmp_path / "new" / "images" / name))
        assert np.array_equal(pixels, np.load(f"{tmp_path}/x.npz")["arr_0"][int(name[4:9])])


WRONG = [
    (train, ["--conditioning_sigma", "-1"], "--conditioning_sigma"),
    (train, ["--conditioning_sigma", "nan"], "--conditioning_sigma"),
    (train, ["--min_step_percent", "0.9", "--max_step_percent", "0.1"], "--min_step_percent"),
    (train, ["--max_step_percent", "1.5"], "--max_step_percent"),
    (train, ["--fit_steps", "9", "--steps", "8"], "--fit_steps 9 and --gan_steps 0 are more than --steps 8"),
    (train, ["--fit_steps", "4", "--gan_steps", "5", "--steps", "8"], "--gan_steps 5 are more than --steps 8"),
    (train, ["--gan_steps", "9", "--warmup_steps", "9"], "in which the generator waits"),
    (train, ["--sigma_min", "90"], "--sigma_min"),
    (train, ["--dfake_gen_update_ratio", "0"], "--dfake_gen_update_ratio"),
    (train, ["--generator_lr", "inf"], "--generator_lr"),
    (train, ["--teacher", "no_such_run"], "no_such_run"),
    (train, ["--teacher", "{tree}"], "no checkpoint.pt in this folder"),
    (train, ["--teacher", "{tree}/cat/0.png"], "0.png is not a checkpoint"),
    (train, ["--teacher", "{cut}"], "cut.pt"),
    (train, ["--teacher", "{teacher}", "--device", "cuda:99"], "--device"),
    (train, ["--teacher", "{teacher}", "--guide", "{teacher}"], "--guide needs"),
    (train, ["--preset", "nothing"], "unknown preset"),
    (train, ["--run_dir", "{tree}/cat/0.png"], "is a file"),
    (train, ["--teacher", "{teacher}", "--run_dir", "{teacher}", "--overwrite"], "teacher's own folder"),
    (train, ["--teacher", "{teacher}", "--sigma_max", "40"], "--sigma_max 80"),
    (train, ["--steps", "9" * 400], "--steps"),
    (train, ["--teacher", "{teacher}", "--f_div", "kl"], "--gen_cls_loss_weight"),
    (train, ["--f_div", "js", "--gen_cls_loss_weight", "1", "--diffusion_gan_max_timestep", "900"], "every noise"),
    (train, ["--f_div", "js", "--gen_cls_loss_weight", "1", "--diffusion_gan_max_timestep", "980"], "every noise"),
    (train, ["--f_div", "chi2"], "--f_div"),
    (train, ["--gen_cls_loss_weight", "-1"], "--gen_cls_loss_weight"),
    (train, ["--gen_cls_loss_weight", "1e7"], "at most 1000000"),
    (train, ["--generator_lr", "1.5"], "at most 1"),
    (train, ["--conditioning_sigma", "1e5"], "at most 10000"),
    (train, ["--diffusion_gan_max_timestep", "1001"], "--diffusion_gan_max_timestep"),
    (train, ["--num_denoising_steps", "0"], "--num_denoising_steps"),
    (train, ["--num_denoising_steps", "2", "--conditioning_sigma", "0.001"], "--conditioning_sigma"),
    (train, ["--teacher", "{teacher}", "--cfg_scale", "2"], "--label_dropout"),
    (train, ["--teacher", "{teacher}", "--cfg_interval", "2", "2"], "--cfg_interval 2.0 2.0"),
    (train, ["--cfg_interval", "2"], "--cfg_interval"),
    (train, ["--cfg_interval", "-1", "2"], "--cfg_interval"),
    (sample, ["--checkpoint", "{teacher}", "--cfg_interval", "0", "2"], "--cfg_scale"),
    (train, ["--teacher", "{teacher}", "--gen_cls_loss_weight", "1", "--dataset", "shapes"], "classes"),
    (train0, ["--dataset", "shapes", "--label_dropout", "1.5"], "--label_dropout"),
    (sample, ["--checkpoint", "{teacher}", "--cfg_scale", "2"], "--label_dropout"),
    (train0, ["--dataset", "imagenet"], "--dataset"),
    (train0, ["--dataset", "folder", "--data_dir", "{tree}/cat/0.png"], "0.png"),
    (train0, ["--dataset", "shapes", "--device", "meta"], "--device"),
    (train0, ["--resume", "--overwrite"], "exclude one another"),
    (train0, ["--dataset", "folder", "--data_dir", "no_such_folder"], "no_such_folder"),
    # Before the dataset is read, or downloaded.
    (train0, ["--data_dir", "no_such_folder", "--eval_every", "5", "--feature_extractor", "no.pt2"], "no.pt2"),
    (train0, ["--dataset", "folder", "--data_dir", "{broken}"], "dog/1.png"),
    (train0, ["--dataset", "shapes", "--channels", "12"], "--channels"),
    (train0, ["--dataset", "shapes", "--batch_size", "1.5"], "--batch_size"),
    (train0, ["--dataset", "shapes", "--steps", "-3"], "--steps"),
    (train0, ["--dataset", "shapes", "--no_such_flag", "1"], "--no_such_flag"),
    (train0, ["--dataset", "shapes", "--device", "tpu"], "--device"),
    (train0, ["--run_dir", "{teacher}"], "holds a run already"),
    (train0, ["--run_dir", "{teacher}", "--resume", "--dataset", "shapes"], "--dataset shapes differs"),
    (train0, ["--run_dir", "{teacher}", "--resume", "--channels", "16"], "--channels 16 differs"),
    (train0, ["--run_dir", "{teacher}", "--resume", "--blocks", "2"], "--blocks 2 differs"),
    (train0, ["--run_dir", "{teacher}", "--resume", "--accumulate", "3"], "cannot be shared out to 1 processes in 3"),
    (train0, ["--run_dir", "{teacher}", "--resume", "--seed", "1"], "--seed 1 differs"),
    (train0, ["--run_dir", "{teacher}", "--resume", "--optimizer", "muon"], "--optimizer muon differs"),
    (train, ["--run_dir", "{student}", "--resume", "--teacher", "{tree}"], "--teacher"),
    (train, ["--f_div", "kl", "--gen_cls_loss_weight", "1", "--accumulate", "2"], "the whole batch"),
    (train, ["--run_dir", "{student}", "--resume", "--seed", "1"], "--seed 1 differs"),
    (train, ["--run_dir", "{student}", "--resume", "--optimizer", "muon"], "--optimizer muon differs"),
    (train, ["--run_dir", "{student}", "--resume", "--conditioning_sigma", "3"], "--conditioning_sigma 3.0 differs"),
    (train, ["--run_dir", "{student}", "--resume", "--num_denoising_steps", "2"], "--num_denoising_steps 2 differs"),
    (train, ["--run_dir", "{student}", "--resume", "--sigma_min", "0.1"], "--sigma_min 0.1 differs"),
    (train, ["--run_dir", "{student}", "--resume", "--sigma_max", "40"], "--sigma_max 40.0 differs"),
    (train, ["--run_dir", "{teacher}", "--resume"], "holds a teacher, but a student is needed"),
    (sample, ["--checkpoint", "no_such_run"], "no_such_run"),
    (sample, ["--checkpoint", "{teacher}", "--labels", "cow"], "cat, dog"),
    (sample, ["--checkpoint", "{teacher}", "--out", "no_such_folder/x.png"], "no_such_folder"),
    (sample, ["--checkpoint", "{teacher}", "--num_images", "0"], "--num_images"),
    (sample, ["--checkpoint", "{teacher}", "--walk", "walk.png"], "does not end in .gif"),
    (sample, ["--checkpoint", "{teacher}", "--images", "{tree}/cat/0.png"], "--images"),
]


@pytest.mark.parametrize(("script", "flags", "said"), WRONG, ids=[f"{s.__name__} {' '.join(f)}" for s, f, _ in WRONG])
def test_a_wrong_call_is_one_line_exit_code_2_and_writes_nothing(
    script, flags, said, tmp_path, tree, teacher, student, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    image_tree(tmp_path / "broken")
    (tmp_path / "broken" / "dog" / "1.png").write_bytes(b"broken")
    (tmp_path / "cut.pt").write_bytes(read(f"{teacher}/checkpoint.pt")[:-1000])
    names = dict(tree=tree, teacher=teacher, student=student, broken=tmp_path / "broken", cut=tmp_path / "cut.pt")
    here = sorted(os.listdir(tmp_path))
    saved = [read(f"{run}/checkpoint.pt") for run in (teacher, student)]
    plain = ["--preset", "none"] if script in (train0, train) else []
    assert call(script, *plain, *(flag.format(**names) for flag in flags)) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "error: " in err and said in err
    assert sorted(os.listdir(tmp_path)) == here
    assert [read(f"{run}/checkpoint.pt") for run in (teacher, student)] == saved


def test_a_feature_network_that_has_gone_hinders_only_who_measures(tmp_path, capsys):
    flags = [*TINY, "--dataset", "shapes", "--channels", "8", "--feature_extractor", "gone.pt2", "--run_dir"]
    run = str(tmp_path / "run")
    assert call(train0, *flags, run, "--steps", "1") == 0
    assert call(train0, "--run_dir", run, "--resume", "--steps", "2", "--eval_every", "1") == 2
    assert "gone.pt2" in capsys.readouterr().err.splitlines()[-1]
    assert call(train0, "--run_dir", run, "--resume", "--steps", "2") == 0


def test_weights_of_another_width_than_the_checkpoint_says_are_one_line(tmp_path, teacher, capsys):
    state = checkpoint.load(teacher)
    state["model_config"]["channels"] = 16
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    for script, *flags in ((train, "--teacher"), (sample, "--checkpoint"), (evaluate, "--checkpoint")):
        out = ["--run_dir", str(tmp_path / "run")] if script is train else ["--out", str(tmp_path / "out.png")]
        assert call(script, *flags, str(tmp_path), *out, "--device", "cpu") == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and str(tmp_path) in err and "does not fit" in err
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("script", [train0, train, sample, evaluate, benchmark, features])
def test_help_states_every_default(script, capsys):
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--help"])
    out = capsys.readouterr().out
    assert exit_info.value.code == 0
    entries = re.split(r"\n  (?=--)", out.split("options:")[1])[1:]
    assert {"--seed", "--device"} <= {entry.split()[0] for entry in entries}
    assert "(default: None)" not in out
    assert [entry for entry in entries if "default: " not in " ".join(entry.lower().split())] == []


def imports(path):
    """Files of this project that a file imports, as paths from its root without suffix."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.replace(".", "/") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module.replace(".", "/")
            found |= {module, *(f"{module}/{alias.name}" for alias in node.names)}
    return {name for name in found if (ROOT / f"{name}.py").exists()}


def test_imports_run_one_way():
    files = [path for folder in ("", "support", "tools") for path in (ROOT / folder).glob("*.py")]
    graph = {path.relative_to(ROOT).with_suffix("").as_posix(): imports(path) for path in files}
    assert {name for name in graph if "/" not in name} >= {"train0", "train", "sample", "evaluate", "unified_model"}
    scripts = {"train0", "train", "sample", "evaluate"}
    for name, needed in graph.items():
        assert name == "tools/benchmark" or not needed & scripts, name              # which times their very steps
        assert not any(file.startswith("tools/") for file in needed), name
        if name.startswith("support/"):             # what any training needs knows no loss and no turn
            assert not needed & {"guidance", "unified_model"}, name
    while graph:                                    # take away what needs nothing: in the end all, or there is a circle
        free = {name for name, needed in graph.items() if not needed & set(graph)}
        assert free, sorted(graph)
        graph = {name: needed for name, needed in graph.items() if name not in free}


@pytest.mark.parametrize("program", ["import sample", "from support import checkpoint, sampling"])
def test_sampling_needs_neither_a_lock_nor_tensorboard(program):
    heavy = {"support.run_folder", "tensorboard", "torch_fidelity"}
    check = f"import sys; {program}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_processes_whose_weights_differ_stop_and_save_nothing(tmp_path, tree, monkeypatch, capsys):
    run = str(tmp_path / "a")
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "2") == 0
    before = read(f"{run}/checkpoint.pt")
    monkeypatch.setattr(processes, "same", lambda *modules: False)
    assert call(train0, "--run_dir", run, "--resume", "--steps", "4", "--device", "cpu") == 1
    assert "the processes hold different weights: stopped" in capsys.readouterr().err
    assert read(f"{run}/checkpoint.pt") == before


@pytest.mark.parametrize("changed", [{}, dict(sigma_sampling="grid")])
def test_a_run_of_an_older_version_goes_on_unless_it_used_a_flag_that_is_gone(tmp_path, tree, capsys, changed):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert call(train0, *teacher_flags(tree), "--run_dir", a, "--steps", "3") == 0
    state = checkpoint.load(a)

    def old_name(key):
        return key.replace("out_block.", "head.")

    for name in ("model", "model_ema", "ema"):
        state[name] = {old_name(key): value for key, value in state[name].items()}
    state["emas"] = {0.9995: state.pop("ema")}
    state["settings"].update(dict(sigma_sampling="lognormal", more_ema_decays=[]) | changed)
    shutil.copytree(a, b)
    checkpoint.save(f"{b}/checkpoint.pt", state)
    resumed = call(train0, "--run_dir", b, "--resume", "--steps", "5", "--device", "cpu")
    if changed:
        assert resumed == 2 and "--sigma_sampling grid, a flag that is no more" in capsys.readouterr().err
        return
    assert resumed == 0 and call(train0, "--run_dir", a, "--resume", "--steps", "5", "--device", "cpu") == 0
    assert_same_run(a, b)


def test_class_grid_puts_a_class_in_each_row():
    labels = torch.arange(6) % 3                    # images 0..5, 3 rows
    images = (labels.float() / 2 * 2 - 1).reshape(6, 1, 1, 1).expand(6, 3, 32, 32)
    picture = pictures.class_grid(images, 3)
    for row in range(3):
        cells = picture[:, 34 * row + 2 : 34 * row + 34, 2:34]
        torch.testing.assert_close(cells, torch.full_like(cells, row / 2), atol=0.01, rtol=0)
