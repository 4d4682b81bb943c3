"""What a run takes over: guidance its teacher can give, its former images and batches, weights of --init."""

import os
import shutil
from pathlib import Path

import torch
from conftest import TINY, call, image_tree, make_teacher

import train
import train0
from support import checkpoint


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
    assert "folder: 6 images, 2 classes (cat, dog), 1 file left out (.txt)" in capsys.readouterr().out
    assert call(train, "--teacher", a, *few, "--gen_cls_loss_weight", "0.1", "--run_dir", b) == 0
    assert f"teacher: {a}/checkpoint.pt, step 2, 2 classes (cat, dog)" in capsys.readouterr().out
    resumed = ["--run_dir", b, "--resume", "--device", "cpu", "--steps"]
    assert call(train, *resumed, "3") == 0
    assert "note:" not in capsys.readouterr().err
    shutil.copy(tree / "cat" / "0.png", tree / "cat" / "9.png")
    assert call(train0, "--run_dir", a, "--resume", "--device", "cpu", "--steps", "3", "--batch_size", "2") == 0
    err = capsys.readouterr().err
    assert "the images are not those that the run had before" in err and "--batch_size was 4 before" in err
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

    other = make_teacher(tmp_path / "other", tree, "--channels", "16", "--steps", "1")
    for flag, said in (
        (["--conditioning_sigma", "80"], "the student of --init starts at the noise levels [3.0], not [80.0]"),
        (["--init", teacher], f"{teacher}/checkpoint.pt holds a teacher, but a student is needed"),
        (["--teacher", other], f"{first} does not fit this version: its network is"),
    ):
        assert call(train, *flags, "--init", first, *flag, "--run_dir", str(tmp_path / "c")) == 2
        assert said in capsys.readouterr().err and not os.path.exists(tmp_path / "c")


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
