"""sample.py: which images it makes of which checkpoint, and how it writes them."""

import os
import shutil

import numpy as np
import torch
from conftest import TINY, call, save_net, trained_net
from PIL import Image

import sample
import train
from support import checkpoint, pictures


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
    assert call(sample, "--device", "cpu") == 2                     # no run, and nothing shipped
    assert "no checkpoint at runs/dmd2" in capsys.readouterr().err
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
    assert abs(a - b).max() <= 2                    # shipped weights are rounded to bfloat16
    assert call(sample, "--checkpoint", "nowhere", "--device", "cpu") == 2          # shipped weights do not stand in
    assert "no checkpoint at nowhere" in capsys.readouterr().err
    shutil.copy(weights / "student.pt", work / "elsewhere" / "checkpoint.pt")
    assert call(train, "--run_dir", "elsewhere", "--resume", "--device", "cpu") == 2
    assert "elsewhere/checkpoint.pt holds weights only: nothing to resume" in capsys.readouterr().err


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


def test_class_grid_puts_a_class_in_each_row():
    labels = torch.arange(6) % 3                    # images 0..5, 3 rows
    images = (labels.float() / 2 * 2 - 1).reshape(6, 1, 1, 1).expand(6, 3, 32, 32)
    picture = pictures.class_grid(images, 3)
    for row in range(3):
        cells = picture[:, 34 * row + 2 : 34 * row + 34, 2:34]
        torch.testing.assert_close(cells, torch.full_like(cells, row / 2), atol=0.01, rtol=0)


def test_single_images_go_into_an_empty_folder_only(tmp_path, teacher, capsys):
    common = ["--checkpoint", teacher, "--device", "cpu", "--num_steps", "1", "--out", f"{tmp_path}/x.png", "--images"]
    folder = tmp_path / "images"
    folder.mkdir()
    assert call(sample, *common, str(folder), "--num_images", "3") == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert call(sample, *common, str(folder), "--num_images", "2") == 2
    assert f"--images: {folder} is there already and is not empty" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before and len(before) == 5


def test_images_that_are_not_finite_are_one_line_and_not_written(tmp_path, capsys):
    net = trained_net(channels=8, label_dim=2)
    good, bad = (save_net(tmp_path / f"{name}.pt", net, classes=["a", "b"]) for name in ("good", "bad"))
    state = checkpoint.load(bad)
    state["model_ema"]["label_embedding.weight"][1] = float("nan")
    checkpoint.save(bad, state)
    flags = ["--num_images", "5", "--batch_size", "2", "--device", "cpu", "--out", f"{tmp_path}/x.png"]
    flags += ["--npz", f"{tmp_path}/x.npz", "--checkpoint"]
    assert call(sample, *flags, bad) == 1           # two of the five are of class b
    err = capsys.readouterr().err.strip()
    assert err.splitlines()[-1].endswith("error: 2 of 5 images hold NaN or infinity") and "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == ["bad.pt", "good.pt"]
    assert call(sample, *flags, good) == 0


def test_a_grid_of_many_classes_shows_the_first_and_says_so(tmp_path, capsys):
    net = trained_net(channels=8, label_dim=150)
    many = save_net(tmp_path / "many.pt", net, classes=[f"c{i}" for i in range(150)])
    flags = ["--out", f"{tmp_path}/x.png", "--npz", f"{tmp_path}/x.npz", "--num_images", "320", "--device", "cpu"]
    assert call(sample, "--checkpoint", many, *flags) == 0
    assert f"{tmp_path}/x.png shows 220 of 320 images and 100 of 150 classes" in capsys.readouterr().out
    picture, images = np.asarray(Image.open(tmp_path / "x.png")), np.load(tmp_path / "x.npz")["arr_0"]
    assert picture.shape == (100 * 34 + 2, 3 * 34 + 2, 3)
    for row, column in ((0, 0), (99, 1), (19, 2)):
        cell = picture[34 * row + 2 : 34 * row + 34, 34 * column + 2 : 34 * column + 34]
        assert np.array_equal(cell, images[150 * column + row])
    assert call(sample, "--checkpoint", many, "--labels", "7", "3", *flags) == 0
    assert "shows" not in capsys.readouterr().out and Image.open(tmp_path / "x.png").size[1] == 2 * 34 + 2
