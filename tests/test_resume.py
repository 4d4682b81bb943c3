"""What a run takes over: guidance its teacher can give, its former images and batches, weights of --init."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, call, image_tree, make_teacher, read_bytes, teacher_flags

import evaluate
import sample
import settings
import train
import train0
from support import checkpoint, flags, resume


def test_guidance_that_a_teacher_cannot_give_is_left_out_of_a_preset_and_refused_of_a_flag(tmp_path, teacher, capsys):
    alone = str(shutil.copy(f"{teacher}/checkpoint.pt", tmp_path / "alone.pt"))     # with no guide.pt beside it
    few = ["--teacher", alone, "--steps", "1", "--batch_size", "4", "--device", "cpu", "--preset", "cifar10"]
    few += ["--fit_steps", "0"]
    assert call(train, *few, "--run_dir", str(tmp_path / "a")) == 0
    said = "no --cfg_scale, as it was trained without --label_dropout; no --autoguidance_scale, as there is no guide.pt"
    assert f"2 classes (cat, dog); {said} beside it" in capsys.readouterr().out
    settings = checkpoint.load(tmp_path / "a")["settings"]
    assert (settings["cfg_scale"], settings["autoguidance_scale"]) == (1, 1)
    for flag in "--cfg_scale", "--autoguidance_scale":
        assert call(train, *few, flag, "2", "--run_dir", str(tmp_path / "b")) == 2
        assert flag in capsys.readouterr().err
    # A shipped teacher does not say where its images are.
    state, bare = checkpoint.load(teacher), str(tmp_path / "bare.pt")
    checkpoint.save(bare, checkpoint.slim(state))
    gpu = ["--teacher", bare, "--batch_size", "4", "--device", "cpu", "--preset", "cifar10_gpu", "--no-compile"]
    gpu += ["--fit_steps", "0", "--run_dir", str(tmp_path / "c")]
    assert call(train, *gpu, "--max_minutes", "1e-6") == 0
    assert "no --gan_steps, as it does not name its images (--dataset)" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "c")["settings"]["gan_steps"] == 0
    assert call(train, *gpu, "--gan_steps", "600", "--overwrite") == 2
    assert "give --dataset and --data_dir" in capsys.readouterr().err


def test_a_run_says_what_it_is_made_of_and_notices_that_it_has_changed(tmp_path, capsys):
    tree = image_tree(tmp_path / "tree")
    (tree / "cat" / "notes.txt").write_text("")
    few = [*TINY, "--steps", "2"]
    images = ["--dataset", "folder", "--data_dir", str(tree), "--channels", "8"]
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert call(train0, *images, *few, "--run_dir", a) == 0
    said = "folder: 6 images (6 resized to 32x32), 2 classes (cat, dog), 1 file left out (.txt)"
    assert said in capsys.readouterr().out
    assert call(train, "--teacher", a, *few, "--gen_cls_loss_weight", "0.1", "--run_dir", b) == 0
    assert f"teacher: {a}/checkpoint.pt, step 2, 2 classes (cat, dog)" in capsys.readouterr().out
    resumed = ["--run_dir", b, "--resume", "--device", "cpu", "--steps"]
    assert call(train, *resumed, "3") == 0
    assert "note:" not in capsys.readouterr().err
    shutil.copy(tree / "cat" / "0.png", tree / "cat" / "9.png")
    assert call(train0, "--run_dir", a, "--resume", "--device", "cpu", "--steps", "3", "--batch_size", "2") == 0
    said = capsys.readouterr()
    assert f"resumes {a}/checkpoint.pt, step 2 of 3" in said.out
    assert f"those of folder {tree} have changed since it was trained" in said.err
    assert "--batch_size was 4 before" in said.err
    assert call(train, *resumed, "4") == 0
    assert f"note: {a} is another teacher now" in capsys.readouterr().err
    shutil.rmtree(a)
    assert call(train, *resumed, "5") == 0


def test_a_teacher_begins_with_the_weights_of_another(tmp_path, teacher, capsys, tree):
    image_tree(tmp_path / "tree", classes=("ant", "cat", "bee"))
    flags = ["--dataset", "folder", "--data_dir", str(tmp_path / "tree"), *TINY, "--init", teacher, "--steps", "1"]
    flags += ["--lr", "1e-12", "--seed", "1", "--run_dir"]
    assert call(train0, *flags, str(tmp_path / "a")) == 0
    assert "step 6, 1 of 3 classes known to it" in capsys.readouterr().out
    source, state = checkpoint.load(teacher), checkpoint.load(tmp_path / "a")
    assert state["model_config"] == dict(source["model_config"], label_dim=3)
    table, theirs = (found["model_ema"].pop("label_embedding.weight") for found in (state, source))
    torch.testing.assert_close(table[2], theirs[0])                 # cat
    assert table.shape == (3, theirs.shape[1]) and not torch.equal(table[0], theirs[0])         # ant, not cat
    for name, value in source["model_ema"].items():
        torch.testing.assert_close(state["model_ema"][name], value)
    assert call(train0, "--run_dir", str(tmp_path / "a"), "--resume", "--device", "cpu", "--steps", "2") == 0
    assert call(train0, *flags, str(tmp_path / "b"), "--channels", "16") == 2
    assert "--channels 16: the teacher of --init has 8" in capsys.readouterr().err
    assert call(train0, *flags, str(tmp_path / "b"), "--init", "no_such_run") == 2
    assert "no checkpoint at no_such_run" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "b")


def test_a_student_begins_with_the_weights_of_another(tmp_path, teacher, capsys, tree):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    flags = ["--teacher", teacher, *TINY, "--conditioning_sigma", "3", "--steps", "1"]
    far = ["--generator_lr", "1e-2", "--warmup_steps", "0", "--dfake_gen_update_ratio", "1", "--steps", "2"]
    assert call(train, *flags, *far, "--run_dir", first) == 0
    assert call(train, *flags, "--generator_lr", "1e-12", "--run_dir", second, "--init", first) == 0
    assert f"begins with the student {first}/checkpoint.pt, step 2" in capsys.readouterr().out
    theirs, state = checkpoint.load(first), checkpoint.load(second)
    for name, value in theirs["model_ema"].items():
        torch.testing.assert_close(state["model_ema"][name], value)
    assert any(not torch.equal(value, state["model"][f"guidance_model.real_unet.{name}"])
               for name, value in theirs["model_ema"].items())
    assert call(train, "--run_dir", second, "--resume", "--device", "cpu", "--steps", "2") == 0
    assert "begins with" not in capsys.readouterr().out

    more = str(tmp_path / "more")                   # its noise levels begin with those of the first
    few = [*flags, "--num_denoising_steps", "2", "--generator_lr", "1e-12"]
    assert call(train, *few, "--init", first, "--run_dir", more) == 0
    state = checkpoint.load(more)
    assert state["denoising_sigmas"][0] == 3 and len(state["denoising_sigmas"]) == 2
    for name, value in theirs["model_ema"].items():
        torch.testing.assert_close(state["model_ema"][name], value)

    new = str(image_tree(tmp_path / "tree", classes=("ant", "cat", "bee")))     # its classes need not be the teacher's
    ants, third = make_teacher(tmp_path / "ants", new, "--steps", "1"), str(tmp_path / "third")
    few = [*flags, "--teacher", ants, "--generator_lr", "1e-12"]
    assert call(train, *few, "--init", first, "--run_dir", third) == 0
    assert "step 2, 1 of 3 classes known to it" in capsys.readouterr().out
    state, row = checkpoint.load(third)["model_ema"], "label_embedding.weight"
    table, old = state.pop(row), checkpoint.load(ants)["model_ema"][row]
    torch.testing.assert_close(table, torch.stack([old[0], old[1], theirs["model_ema"][row][0]]))     # ant, bee, cat
    for name, value in state.items():
        torch.testing.assert_close(value, theirs["model_ema"][name])

    other = make_teacher(tmp_path / "other", tree, "--channels", "16", "--steps", "1")
    for flag, said in (
        (["--conditioning_sigma", "80"], "the student of --init starts at the noise levels [3.0], not [80.0]"),
        (["--init", more], "the student of --init starts at the noise levels [3.0, "),
        (["--init", more, "--num_denoising_steps", "4"], "the student of --init starts at the noise levels [3.0, "),
        (["--init", teacher], f"{teacher}/checkpoint.pt holds a teacher, but a student is needed"),
        (["--teacher", other], f"{first} does not fit this version: its network is"),
    ):
        assert call(train, *flags, "--init", first, *flag, "--run_dir", str(tmp_path / "c")) == 2
        assert said in capsys.readouterr().err and not os.path.exists(tmp_path / "c")


def test_a_run_whose_evaluations_shared_a_fake_unet_still_samples_but_does_not_resume(tmp_path, teacher, capsys):
    run, out = str(tmp_path / "run"), str(tmp_path / "new")
    few = ["--num_denoising_steps", "2", "--conditioning_sigma", "3", "--steps", "1"]
    assert call(train, "--teacher", teacher, *TINY, *few, "--run_dir", run) == 0
    state = checkpoint.load(run)
    state["model"] = {name: value for name, value in state["model"].items() if "later_" not in name}
    checkpoint.save(f"{run}/checkpoint.pt", state)
    capsys.readouterr()
    assert call(train, "--run_dir", run, "--resume", "--device", "cpu", "--steps", "2") == 2
    said = capsys.readouterr().err.splitlines()
    assert "the evaluations of this run shared one fake_unet" in said[-1] and "--init" in said[-1]
    assert call(train, "--teacher", teacher, *TINY, *few, "--init", run, "--run_dir", out) == 0
    images = ["--out", str(tmp_path / "grid.png"), "--num_images", "2", "--device", "cpu"]
    assert call(sample, "--checkpoint", run, *images) == 0


def test_too_few_real_images_and_no_home_to_keep_their_features_in(tmp_path, features, capsys, monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    for n, code in ((31, 2), (32, 0)):
        tree = image_tree(tmp_path / str(n), n=n)
        flags = ["--dataset", "folder", "--data_dir", str(tree), "--channels", "8", *TINY, "--steps", "1"]
        measured = ["--eval_every", "1", "--eval_images", "64", "--feature_extractor", features]
        monkeypatch.setattr(Path, "expanduser", no_home)
        assert call(train0, *flags, *measured, "--run_dir", str(tmp_path / f"run{n}")) == code
        assert ("64 real images" if code else "cannot keep the features in --cache_dir") in capsys.readouterr().err
        assert (tmp_path / f"run{n}").exists() == (code == 0)


def test_the_images_of_a_checkpoint_are_found_from_another_directory_and_told_from_others(
    tmp_path, features, capsys, monkeypatch
):
    """Two folders of one relative name, with the same classes and other images."""
    for place, size in (("a", (48, 40)), ("b", (32, 32))):
        image_tree(tmp_path / place / "mine", n=128, size=size)
    (tmp_path / "b" / "mine" / "cat" / "0.png").write_bytes(read_bytes(tmp_path / "b" / "mine" / "dog" / "9.png"))
    monkeypatch.chdir(tmp_path / "a")
    teacher, student, other = (str(tmp_path / name) for name in ("teacher", "student", "other"))
    assert call(train0, *teacher_flags("mine"), "--run_dir", teacher, "--steps", "1") == 0
    assert call(train, "--teacher", teacher, *TINY, "--steps", "1", "--run_dir", student) == 0
    monkeypatch.chdir(tmp_path / "b")
    measured = ["--num_images", "256", "--num_steps", "1", "--device", "cpu", "--feature_extractor", features]
    measured += ["--cache_dir", str(tmp_path / "cache"), "--out", str(tmp_path / "x.json"), "--checkpoint"]
    head = ["--teacher", teacher, *TINY, "--steps", "1", "--gen_cls_loss_weight", "0.1", "--run_dir", other]
    calls = [(evaluate, *measured, teacher), (evaluate, *measured, student), (train, *head, "--overwrite")]
    theirs, ours = f"folder {tmp_path}/a/mine", f"folder {tmp_path}/b/mine"

    def notes(*more):
        said = []
        for script, *argv in calls:
            capsys.readouterr()
            assert call(script, *argv, *more) == 0
            said.append([line for line in capsys.readouterr().err.splitlines() if "images: those of" in line])
        return said

    assert notes() == [[], [], []]                  # those in a, though there are some at the same name here
    for run in (teacher, student, other):
        assert checkpoint.load(run)["settings"]["data_dir"] == f"{tmp_path}/a/mine"
    wanted = f"note: the checkpoint's images: those of {ours} are not those it was trained on, of {theirs}"
    assert notes("--dataset", "folder", "--data_dir", "mine") == [[wanted]] * 3
    (tmp_path / "a" / "mine" / "dog" / "0.png").write_bytes(read_bytes(tmp_path / "a" / "mine" / "dog" / "9.png"))
    wanted = f"note: the checkpoint's images: those of {theirs} have changed since it was trained"
    assert notes() == [[wanted]] * 3
    assert call(evaluate, *measured, teacher, "--split", "test") == 2               # another split is no change


def test_every_path_that_a_checkpoint_remembers_is_absolute(tmp_path, teacher, monkeypatch, capsys):
    parsers = []
    monkeypatch.setattr(resume, "parse", lambda parser, *how: parsers.append(parser) or 1 / 0)
    for parse in settings.parse_teacher, settings.parse_student:
        with pytest.raises(ZeroDivisionError):
            parse([])
    paths = {action.dest for parser in parsers for action in parser._actions if action.type is flags.path}
    assert paths == {*resume.PATH_FLAGS, "cache_dir"}
    monkeypatch.undo()
    monkeypatch.chdir(Path(teacher).parent)
    name, run = Path(teacher).name, str(tmp_path / "run")
    assert call(train, "--teacher", name, *TINY, "--steps", "1", "--run_dir", run) == 0
    assert checkpoint.load(run)["settings"]["teacher"] == teacher
    again = ["--run_dir", run, "--resume", "--device", "cpu", "--teacher"]
    assert call(train, *again, name, "--steps", "2") == 0           # the same one, typed as before
    monkeypatch.chdir(tmp_path)
    assert call(train, *again, name, "--steps", "3") == 2 and f"--teacher {name} differs" in capsys.readouterr().err
    assert call(train, *again, teacher, "--steps", "3") == 0


def test_what_is_resumed_is_said_and_so_is_that_nothing_is(tmp_path, tree, capsys):
    run, mistyped = str(tmp_path / "run"), str(tmp_path / "rnu")
    assert call(train0, *teacher_flags(tree), "--run_dir", run, "--steps", "4") == 0
    said = capsys.readouterr()
    assert "resumes" not in said.out and "to resume" not in said.err
    assert call(train0, "--run_dir", run, "--resume", "--steps", "3", "--device", "cpu") == 2
    assert f"--steps 3: the run in {run} has taken 4 steps already" in capsys.readouterr().err
    assert call(train0, "--run_dir", run, "--resume", "--device", "cpu") == 0
    assert f"resumes {run}/checkpoint.pt, step 4 of 4\n" in capsys.readouterr().out
    assert call(train0, *teacher_flags(tree), "--run_dir", mistyped, "--resume", "--steps", "1") == 0
    assert f"note: there is no run in {mistyped} to resume: a new one begins" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--overwrite"], []])
def test_a_restart_by_torchrun_goes_on_with_the_run(tmp_path, tree, capsys, monkeypatch, more):
    run = str(tmp_path / "run")
    flags = [*teacher_flags(tree), "--run_dir", run, *more, "--steps"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert call(train0, *flags, "3") == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    steps, count = [], train0.Run.count
    monkeypatch.setattr(train0.Run, "count", lambda self, **log: steps.append(self.step) or count(self, **log))
    assert call(train0, *flags, "5") == 0 and steps == [3, 4]
    assert f"resumes {run}/checkpoint.pt, step 3 of 5, as torchrun has restarted this" in capsys.readouterr().out
    assert call(train0, *teacher_flags(tree), "--run_dir", f"{run}2", *more, "--steps", "1") == 0   # before any save


@pytest.mark.parametrize("lost, said", [
    (lambda state: state.pop("ema"), "does not fit this version: there is no 'ema'"),
    (lambda state: state["optimizer"].pop("adam"), "does not fit this version: optimizer: there is no 'adam'"),
    (lambda state: state["model"].pop("out_conv.bias"), '"out_conv.bias"'),
])
def test_what_does_not_fit_is_named(tmp_path, teacher, capsys, lost, said):
    state = checkpoint.load(teacher)
    lost(state)
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    assert call(train0, "--run_dir", str(tmp_path), "--resume", "--steps", "7", "--device", "cpu") == 2
    assert said in capsys.readouterr().err and os.listdir(tmp_path) == ["checkpoint.pt"]
