"""Both phases, a resume, measurements and sampling on each kind of device that is here: a GPU's, where there is one."""

import numpy as np
import pytest
from conftest import DEVICES, TINY, call, teacher_flags

import sample
import train
import train0
from support import checkpoint


@pytest.mark.parametrize("device", DEVICES)
def test_every_part_runs_there_and_the_images_are_those_of_the_cpu(tmp_path, tree, features, device):
    a, b, cache = (str(tmp_path / name) for name in "abc")
    there = ["--device", device, "--optimizer", "muon", *(["--compile"] if device == "cuda" else [])]
    measured = ["--eval_every", "2", "--eval_images", "64", "--feature_extractor", features, "--cache_dir", cache]
    first = ["--run_dir", a, "--label_dropout", "0.5", "--precision", "bf16", *measured, *there]
    assert call(train0, *teacher_flags(tree), *first, "--steps", "2") == 0
    every_loss = ["--gen_cls_loss_weight", "1e-2", "--f_div", "js", "--max_step_percent", "1"]
    every_loss += ["--cfg_scale", "2", "--cfg_interval", "0.1", "10", "--fake_noise", "dm"]
    every_loss += ["--autoguidance_scale", "2"]
    second = ["--teacher", a, "--run_dir", b, "--num_denoising_steps", "2", *every_loss]
    assert call(train, *TINY, *second, *measured, *there, "--steps", "2") == 0
    assert call(train, "--run_dir", b, "--resume", "--steps", "4", *there) == 0
    assert checkpoint.load(b)["step"] == 4 and checkpoint.load(tmp_path / "b" / "best.pt")["best"]["distance"] > 0

    for run in (a, b):
        images = []
        for where in (device, "cpu"):
            npz = str(tmp_path / f"{where}.npz")
            out = ["--out", str(tmp_path / "grid.png"), "--npz", npz, "--num_images", "8"]
            assert call(sample, "--checkpoint", run, "--device", where, "--precision", "fp32", *out) == 0
            images.append(np.load(npz)["arr_0"].astype(float))
        assert np.abs(images[0] - images[1]).mean() < 0.1 and images[0].std() > 1
