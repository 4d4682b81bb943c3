"""Presets and defaults: which values a run takes from them, and how --help shows them."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, make_teacher, save_net, teacher_flags, trained_net

import diffusion
import evaluate
import presets
import sample
import train
import train0
from support import checkpoint, data, networks, shapes
from tools import benchmark, features

PRESETS = {train0: presets.TEACHER, train: presets.STUDENT}


@pytest.mark.parametrize("preset", presets.TEACHER)
def test_the_presets_run_on_shapes(tmp_path, monkeypatch, preset):
    monkeypatch.setattr(data, "SHAPES_TRAIN_IMAGES", 500)
    for values in PRESETS.values():
        monkeypatch.delitem(values[preset], "compile", raising=False)               # compiling takes a minute
    few = ["--preset", preset, "--steps", "1", "--batch_size", "4", "--device", "cpu"]
    a, b = f"{tmp_path}/a", f"{tmp_path}/b"
    assert call(train0, "--dataset", "shapes", "--channels", "8", "--run_dir", a, *few) == 0
    assert call(train, "--teacher", a, "--run_dir", b, *few, "--fit_steps", "0", "--gan_steps", "0") == 0
    assert checkpoint.load(b)["settings"]["generator_lr"] == presets.STUDENT[preset]["generator_lr"]


@pytest.mark.parametrize("script", [train0, train])
def test_presets_set_flags_that_there_are(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                     # argparse also accepts defaults of flags that do not exist
    args = [vars(script.parse_args(["--preset", preset])[0]) for preset in PRESETS[script]]
    plain = vars(script.parse_args(["--preset", "none"])[0])
    assert all(found.keys() == plain.keys() for found in args)


def test_the_defaults_are_the_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, _ = train.parse_args(["--preset", "none"])
    wanted = dict(
        conditioning_sigma=80.0, dfake_gen_update_ratio=10, min_step_percent=0.02, max_step_percent=0.98,
        fake_noise="all", cls_loss_weight=1e-2,
    )
    assert {name: getattr(args, name) for name in wanted} == wanted
    args, _ = train0.parse_args(["--preset", "none"])
    wanted = dict(p_mean=-1.2, p_std=1.2, flip=1, sigma_min=0.002, sigma_max=80.0, lr_schedule="cosine")
    assert {name: getattr(args, name) for name in wanted} == wanted


@pytest.mark.parametrize(("flags", "gpu", "wanted"), [
    (["--dataset", "shapes"], True, "demo"), (["--dataset", "folder"], True, "cifar10_gpu"),
    (["--dataset", "shapes", "--image_size", "64"], True, "demo64"),
    ([], False, "cifar10"), (["--device", "cpu"], True, "cifar10"), (["--preset", "none"], True, "none"),
])
def test_a_new_run_takes_the_preset_of_its_images_and_machine(tmp_path, monkeypatch, capsys, flags, gpu, wanted):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    args, _ = train0.parse_args([*flags, "--lr", "0.5"])
    values = presets.TEACHER.get(wanted, dict(steps=50_000))
    assert args.preset == wanted and args.lr == 0.5 and args.steps == values["steps"]
    assert (f"--preset {wanted} by" in capsys.readouterr().out) == (wanted != "none")


def test_a_student_takes_the_preset_of_its_teacher(tmp_path, monkeypatch, teacher):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.parse_args(["--teacher", teacher])[0].preset == "cifar10"
    state = checkpoint.load(teacher)
    config = dict(state["model_config"], label_dim=10)
    net = networks.rebuild(config)
    checkpoint.save(tmp_path / "a.pt", dict(
        state, classes=shapes.CLASSES, model_config=config, model_ema=net.state_dict()
    ))
    assert train.parse_args(["--teacher", "a.pt"])[0].preset == "demo"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for path, wanted in (
        (teacher, "cifar10_gpu"), (f"{ROOT}/tests/data/edm-tiny.pkl", "edm"),
        (f"{ROOT}/tests/data/edm-tiny-64.pkl", "edm_ffhq64"), (f"{ROOT}/tests/data/edm-tiny-adm.pkl", "edm_imagenet64"),
    ):
        assert train.parse_args(["--teacher", path])[0].preset == wanted


def test_a_run_of_days_says_which_preset_fits(tmp_path, tree, capsys):
    flags = [*teacher_flags(tree), "--log_every", "1", "--max_minutes", "0.02", "--run_dir"]
    assert call(train0, *flags, str(tmp_path / "a"), "--steps", "1000000000") == 0
    assert capsys.readouterr().err.count("hours to go; --preset cifar10 fits this machine") == 1
    assert call(train0, *flags, str(tmp_path / "b"), "--steps", "1") == 0
    assert "hours to go" not in capsys.readouterr().err


def test_a_resumed_run_takes_nothing_new_from_its_preset(tmp_path, tree, monkeypatch):
    run = make_teacher(tmp_path / "a", tree, "--steps", "1")
    state = checkpoint.load(run)
    del state["settings"]["label_dropout"]          # as if saved by a version without this flag
    checkpoint.save(Path(run) / checkpoint.NAME, state)
    monkeypatch.setitem(presets.TEACHER, "new", dict(label_dropout=0.5, lr=0.5, compile=True))
    args, _ = train0.parse_args(["--run_dir", run, "--resume", "--preset", "new"])
    assert args.label_dropout == 0 and args.lr == state["settings"]["lr"] and not args.compile


def test_a_resumed_run_is_compiled_as_before_unless_told_otherwise(tmp_path, tree):
    run = make_teacher(tmp_path / "a", tree, "--steps", "1")
    state = checkpoint.load(run)
    checkpoint.save(Path(run) / checkpoint.NAME, dict(state, settings=dict(state["settings"], compile=True)))
    assert train0.parse_args(["--run_dir", run, "--resume"])[0].compile
    assert not train0.parse_args(["--run_dir", run, "--resume", "--no-compile"])[0].compile


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


def test_help_shows_a_presets_values_and_the_flags_of_a_beginner_first(capsys):
    def entries(*argv):
        with pytest.raises(SystemExit):
            train.main([*argv, "--help"])
        lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
        return {flag: " ".join(rest) for flag, *rest in lines}

    assert list(entries())[:4] == ["--teacher", "--preset", "--run_dir", "--resume"]
    assert "default: 50000" in entries()["--steps"] and "default: 1900" in entries("--preset", "cifar10")["--steps"]


def test_a_student_of_larger_images_has_more_noise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = trained_net(channels=8, label_dim=10, image_size=64)
    teacher = save_net(tmp_path / "net.pt", net, kind="teacher", classes=shapes.CLASSES, label_dropout=0.1)
    given = ["--teacher", teacher, "--device", "cpu", "--min_step_percent", "0.2"]
    args, _ = train.parse_args([*given, "--preset", "cifar10_gpu"])
    plain, sigmas = presets.STUDENT["cifar10_gpu"], diffusion.karras_sigmas(1001)
    assert args.conditioning_sigma == 80 and args.min_step_percent == 0.2           # of the schedule, its end; given
    assert args.cfg_interval == [0.3, 10.0]
    twice = sigmas[round(1000 * args.max_step_percent)] / sigmas[round(1000 * plain["max_step_percent"])]
    assert twice == pytest.approx(2, rel=0.01)
    assert train.parse_args(given)[0].conditioning_sigma == 6.0                     # of preset demo64, by the classes


def test_at_its_own_size_a_preset_is_as_it_is_written():
    sizes = dict(
        demo=32, demo64=64, cifar10=32, gan=32, few=32, cifar10_gpu=32,
        edm=32, edm_imagenet64=64, edm_ffhq64=64, edm_afhqv2_64=64,
    )
    assert sizes.keys() == presets.STUDENT.keys()
    for name, values in presets.STUDENT.items():
        assert presets.for_size(name, sizes[name]) == values
    assert presets.for_size("none", 64) == {}


def test_a_run_says_which_values_of_its_preset_the_size_has_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net = trained_net(channels=8, label_dim=10, image_size=16)
    teacher = save_net(tmp_path / "net.pt", net, kind="teacher", classes=shapes.CLASSES)
    train.parse_args(["--teacher", teacher, "--preset", "demo", "--max_step_percent", "0.75"])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("its noise levels for images")]
    assert len(said) == 1 and "conditioning_sigma 1.5, min_step_percent 0." in said[0] and "max_step" not in said[0]
