"""A teacher, its student and their samples: which networks, images and labels the scripts train and sample with."""

import argparse
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, log_of, teacher_flags
from PIL import Image

import train
import train0
from model import SimpleUNet
from support import checkpoint, data


def test_teacher_student_and_samples_through_the_real_scripts(tmp_path, tree):
    """One process for each script, with the commands of the README."""
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


def test_classes_of_unequal_size_are_said(tmp_path, tree, capsys):
    flags = teacher_flags(tree)
    assert call(train0, *flags, "--run_dir", f"{tmp_path}/a", "--steps", "1") == 0
    assert "note:" not in capsys.readouterr().err
    folder = shutil.copytree(tree, tmp_path / "tree")
    sorted(next(path for path in sorted(folder.iterdir()) if path.is_dir()).iterdir())[0].unlink()
    assert call(train0, *teacher_flags(str(folder)), "--run_dir", f"{tmp_path}/b", "--steps", "1") == 0
    assert "note: the classes have" in capsys.readouterr().err


def test_the_turns_alternate_at_the_ratio_and_the_ema_ticks_with_the_generator(tmp_path, teacher):
    flags = ["--teacher", teacher, "--run_dir", f"{tmp_path}/b", "--dfake_gen_update_ratio", "3", "--steps", "7"]
    rates = ["--generator_lr", "3e-4", "--guidance_lr", "7e-4", "--warmup_steps", "0"]
    assert call(train, *flags, *rates, "--precision", "bf16", *TINY) == 0
    state = checkpoint.load(f"{tmp_path}/b")        # generator turns at steps 0, 3 and 6
    for name, rate in (("generator", 3e-4), ("guidance", 7e-4)):
        assert [group["lr"] for group in state["dmd2"][name]["adam"]["param_groups"]] == [rate]
    adam = {name: state["dmd2"][name]["adam"]["state"] for name in ("generator", "guidance")}
    updates = {name: found[0]["step"].item() for name, found in adam.items()}
    assert updates == dict(generator=3, guidance=7) and state["ema"]["n_averaged"].item() == 3
    initial = checkpoint.load(teacher)["model_ema"]
    for name in ("feedforward_model", "guidance_model.fake_unet"):
        assert any(not torch.equal(state["model"][f"{name}.{k}"], v) for k, v in initial.items())
    assert any(not torch.equal(state["model_ema"][k], v) for k, v in initial.items())


def test_the_classifier_head_takes_the_teachers_images_and_trains(tmp_path, teacher, tree, monkeypatch, capsys):
    asked, load = [], train.data.load
    monkeypatch.setattr(train.data, "load", lambda *args: asked.append(args) or load(*args))
    flags = ["--teacher", teacher, "--run_dir", f"{tmp_path}/b", "--steps", "4", *TINY]
    assert call(train, *flags) == 0 and asked == []                 # without the head no dataset is read,
    assert checkpoint.load(f"{tmp_path}/b")["settings"]["dataset"] == "folder"      # but it is kept for evaluate.py
    head = ["--gen_cls_loss_weight", "3e-3", "--cls_head_lr", "1e-5", "--warmup_steps", "0"]
    assert call(train, *flags, *head, "--overwrite") == 0
    assert [call[:3] for call in asked] == [("folder", tree, "train")]
    first_row = log_of(f"{tmp_path}/b")[0]
    assert {"loss_dm", "gen_cls_loss", "loss_fake", "cls_loss", "logit_fake", "logit_real"} <= set(first_row)
    state = checkpoint.load(f"{tmp_path}/b")
    head = [name for name in state["model"] if "cls_head" in name]
    parameters = checkpoint.load(teacher)["model_ema"]              # fake_unet and its head share one optimizer
    assert head and len(state["dmd2"]["guidance"]["adam"]["state"]) == len(parameters) + len(head)
    assert [group["lr"] for group in state["dmd2"]["guidance"]["adam"]["param_groups"]] == [2e-4, 1e-5]
    for name in ("dataset", "data_dir"):
        assert state["settings"][name] == dict(dataset="folder", data_dir=tree)[name]
    assert call(train, "--run_dir", f"{tmp_path}/b", "--resume", "--gen_cls_loss_weight", "0", "--device", "cpu") == 2
    assert "--gen_cls_loss_weight cannot add or remove the classifier head" in capsys.readouterr().err


def test_the_teacher_inside_the_student_is_bit_identical(tmp_path, teacher):
    assert call(train, "--teacher", teacher, "--run_dir", f"{tmp_path}/b", "--steps", "4", *TINY) == 0
    ema, model = checkpoint.load(teacher)["model_ema"], checkpoint.load(f"{tmp_path}/b")["model"]
    for name, tensor in ema.items():
        assert torch.equal(model[f"guidance_model.real_unet.{name}"], tensor)
    moved = [not torch.equal(model[f"guidance_model.fake_unet.{name}"], tensor) for name, tensor in ema.items()]
    assert any(moved)


def test_a_teacher_that_was_stopped_is_said(tmp_path, teacher, capsys):
    state = checkpoint.load(teacher)
    checkpoint.save(tmp_path / "early.pt", dict(state, step=4))
    for path, said in ((teacher, False), (f"{tmp_path}/early.pt", True)):
        capsys.readouterr()
        assert call(train, "--teacher", path, "--run_dir", f"{tmp_path}/{said}", "--steps", "1", *TINY) == 0
        assert ("step 4 of 6, 2 classes" in capsys.readouterr().out) == said


@pytest.mark.parametrize(("asked", "wanted"), [
    (None, ("folder", "mine", 0)), ("folder", ("folder", "mine", 0)), ("cifar10", ("cifar10", "data", 1)),
])
def test_the_folder_and_the_mirroring_of_other_images_are_not_taken_over(asked, wanted):
    known = dict(settings=dict(dataset="folder", data_dir="mine", flip=0))
    args = argparse.Namespace(dataset=asked, data_dir=None, flip=None)
    assert data.named(args, known) == wanted
    args = argparse.Namespace(dataset=asked, data_dir="here", flip=1)
    assert data.named(args, known)[1:] == ("here", 1)
