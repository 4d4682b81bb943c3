"""Images of other sizes than 32x32, from the teacher's training to the measured student."""

import os

import numpy as np
import pytest
import torch
from conftest import TINY, Features, assert_same_run, call, export, image_tree, save_net, trained_net
from PIL import Image

import evaluate
import sample
import train
import train0
from model import SimpleUNet
from support import checkpoint, metrics, networks
from support.randomness import StepRandom, image_noise
from tools import average, gradient
from tools import features as tools_features
from tools.export import Generator
from unified_model import UnifiedModel

SIZES = pytest.mark.parametrize("size", [16, 64])


def teacher_of(folder, tree, size, *flags):
    flags = ["--dataset", "folder", "--data_dir", tree, "--channels", "8", "--image_size", str(size), *TINY, *flags]
    return call(train0, "--run_dir", str(folder), "--steps", "4", *flags)


@pytest.mark.parametrize("size", [16])             # the cheapest; of 64x64 are the networks of test_edm.py
def test_all_phases_sampling_and_measuring(tmp_path, many, size):
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    assert teacher_of(teacher, many, size, "--label_dropout", "0.3") == 0
    assert networks.image_size(checkpoint.load(teacher)["model_config"]) == size
    flags = ["--teacher", teacher, "--fit_steps", "2", "--ode_pairs", "4", "--gan_steps", "2", *TINY]
    flags += ["--discriminator_warmup_steps", "1", "--gen_cls_loss_weight", "0.1", "--cfg_scale", "2"]
    flags += ["--num_denoising_steps", "2", "--dfake_gen_update_ratio", "1", "--warmup_steps", "0"]
    features = export(tmp_path / "f.pt2", Features(), torch.zeros(4, 3, size, size, dtype=torch.uint8))
    flags += ["--eval_every", "3", "--eval_images", "64", "--feature_extractor", features]
    assert call(train, *flags, "--run_dir", student, "--steps", "6") == 0
    for end in "3", "6":                            # stopped in the second phase
        assert call(train, *flags, "--run_dir", f"{student}2", "--steps", "6", "--resume",
                    *(["--max_minutes", "1e-6"] if end == "3" else [])) == 0
    assert_same_run(student, f"{student}2")
    grids = {Image.open(f"{student}/grids/{name}").size for name in os.listdir(f"{student}/grids")}
    panel = 8 * (size + 2) + 2, 2 * (size + 2) + 2
    assert grids == {panel, (2 * panel[0] + 8, panel[1])}

    flags = ["--checkpoint", student, "--device", "cpu", "--num_images", "4", "--out", f"{tmp_path}/x.png"]
    flags += ["--npz", f"{tmp_path}/x.npz", "--images", f"{tmp_path}/images", "--walk", f"{tmp_path}/x.gif"]
    assert call(sample, *flags) == 0
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (4, size, size, 3)
    assert Image.open(tmp_path / "images" / "cat_00000.png").size == (size, size)
    assert Image.open(tmp_path / "x.gif").size == Image.open(tmp_path / "x.png").size == (2 * (size + 2) + 2,) * 2
    measure = ["--device", "cpu", "--feature_extractor", features, "--num_images", "256", "--dataset", "folder"]
    big = str(image_tree(tmp_path / "big", n=128))
    assert call(evaluate, *measure, "--data_dir", big, "--checkpoint", student, "--out", f"{tmp_path}/x.json") == 0


@SIZES
def test_it_is_the_same_network_on_other_images(size):
    torch.manual_seed(3)
    plain = trained_net(channels=8, label_dim=2)
    net = SimpleUNet(8, 2, image_size=size)
    net.load_state_dict(plain.state_dict())         # no weight depends on the size
    x, labels = torch.randn(2, 3, size, size), torch.tensor([0, 1])
    assert torch.equal(net(x, 0.5, labels), plain(x, 0.5, labels))
    features = net(x, 0.5, labels, return_features=True)
    assert [f.shape[-1] for f in features] == [size // 2, size // 4, size // 8, size // 8]
    assert features[-1].shape[-1] == net.bottleneck_size


def test_a_checkpoint_from_before_other_sizes_is_of_32x32():
    old = dict(channels=8, label_dim=2, blocks=1, sigma_data=0.5)
    assert networks.image_size(old) == 32 and networks.rebuild(old).config == SimpleUNet(8, 2).config


@pytest.mark.parametrize("size", [8, 20, 136])
def test_a_size_that_the_network_does_not_have_is_refused(size, tmp_path, tree, capsys):
    with pytest.raises(ValueError, match="image_size must be a multiple of 8 from 16 to 128"):
        SimpleUNet(8, image_size=size)
    assert teacher_of(tmp_path / "run", tree, size) == 2
    assert f"--image_size: {size} is not" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_what_is_of_another_size_is_refused(tmp_path, teacher, features, capsys):
    """The teacher and the features are of 32x32 images."""
    net = trained_net(channels=8, label_dim=2, image_size=64)
    large = save_net(tmp_path / "large.pt", net, kind="teacher", classes=["cat", "dog"])
    student = save_net(tmp_path / "student.pt", net, classes=["cat", "dog"])
    small = save_net(tmp_path / "small.pt", trained_net(channels=8, label_dim=2), classes=["cat", "dog"])
    np.savez(tmp_path / "x.npz", np.zeros((256, 64, 64, 3), np.uint8))
    out, run = str(tmp_path / "out.png"), str(tmp_path / "run")
    data = ["--dataset", "folder", "--data_dir", str(image_tree(tmp_path / "images", n=128))]
    before = sorted(os.listdir(tmp_path))
    for script, flags, said in (
        (train0, [*data, "--run_dir", teacher, "--image_size", "64", "--resume"], "--image_size 64 differs from"),
        (train, ["--teacher", teacher, "--init", student, "--preset", "none", "--run_dir", run], "does not fit this"),
        (train, ["--teacher", teacher, "--guide", large, "--autoguidance_scale", "2", "--run_dir", run],
         "makes images of 64 pixels a side, the teacher of 32"),
        (train, ["--teacher", large, *data, "--eval_every", "2", "--feature_extractor", features, "--run_dir", run],
         "it takes images [3, 32, 32], not [3, 64, 64]"),
        (sample, ["--checkpoint", teacher, "--guide", large, "--autoguidance_scale", "2", "--out", out], "64 pixels"),
        (evaluate, [*data, "--npz", f"{tmp_path}/x.npz", "--feature_extractor", features],
         "arr_0 is uint8 [256, 64, 64, 3], not uint8 [N, 32, 32, 3] (--image_size 32)"),
        (evaluate, [*data, "--npz", f"{tmp_path}/x.npz", "--image_size", "64", "--feature_extractor", features],
         "it takes images [3, 32, 32], not [3, 64, 64]"),
        (evaluate, [*data, "--checkpoint", large, "--feature_extractor", features], "it takes images [3, 32, 32]"),
        (evaluate, ["--checkpoint", large, "--image_size", "64"], "--image_size is for --npz and --images"),
        (average, [student, small, "--out", out], "differ in their network"),
        (gradient, ["--teacher", teacher, "--student", student, "--out", out], "make images of different sizes"),
    ):
        flags = flags if script is average else [*flags, "--device", "cpu"]
        assert call(script, *flags) == 2, said
        assert said in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == before


def test_the_student_is_given_noise_of_the_teachers_size():
    net = trained_net(channels=8, label_dim=2, image_size=16)
    z, _ = UnifiedModel(net).random_inputs(2, 2, StepRandom(0, 0))
    assert z.shape == (2, 3, 16, 16)


def test_noise_of_an_image_depends_on_its_size_and_index_alone():
    a, b = image_noise(0, [0, 1], 16), image_noise(0, [1], 16)
    assert a.shape == (2, 3, 16, 16) and torch.equal(a[1:], b)


def test_features_are_trained_for_images_of_a_size(tmp_path):
    out = str(tmp_path / "f.pt2")
    flags = ["--dataset", "folder", "--epochs", "1", "--device", "cpu", "--out", out, "--image_size", "48"]
    assert call(tools_features, *flags, "--data_dir", str(image_tree(tmp_path / "images", n=8))) == 0
    found, logits = metrics.exported(out, 48, torch.device("cpu"))(torch.zeros(3, 3, 48, 48, dtype=torch.uint8))
    assert found.shape == (3, 256) and logits.shape == (3, 2)
    with pytest.raises(metrics.MetricsError, match=r"it takes images \[3, 48, 48\], not \[3, 32, 32\]"):
        metrics.exported(out, 32, torch.device("cpu"))


def test_what_is_exported_takes_noise_of_that_size(tmp_path):
    net = trained_net(channels=8, label_dim=2, image_size=16)
    state = checkpoint.load(save_net(tmp_path / "net.pt", net, classes=["a", "b"]))
    generator = Generator(state)
    assert generator(**generator.example(3)).shape == (3, 16, 16, 3)


def test_a_teacher_goes_on_at_another_size(tmp_path, teacher, tree, capsys):
    flags = ["--dataset", "folder", "--data_dir", tree, "--init", teacher, *TINY, "--steps", "1", "--warmup_steps", "9"]
    for size, given in ((64, ["--image_size", "64"]), (32, [])):
        run = str(tmp_path / str(size))
        assert call(train0, *flags, *given, "--lr", "1e-9", "--run_dir", run) == 0
        state = checkpoint.load(run)
        assert networks.image_size(state["model_config"]) == state["settings"]["image_size"] == size
        weights = checkpoint.load(teacher)["model_ema"]
        assert all(torch.allclose(value, weights[name], atol=1e-6) for name, value in state["model_ema"].items())
        assert ("from 32x32 to 64x64 pixels" in capsys.readouterr().out) == (size == 64)
