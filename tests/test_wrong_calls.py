"""Wrong calls of the scripts: one line that names what is wrong, exit code 2, and nothing written."""

import os

import pytest
from conftest import TINY, call, image_tree, read_bytes

import evaluate
import sample
import train
import train0
from support import checkpoint
from tools import features

# A script, flags of a wrong call of it, and what the error line must say.
WRONG = [
    (train, ["--conditioning_sigma", "-1"], "--conditioning_sigma"),
    (train, ["--conditioning_sigma", "nan"], "--conditioning_sigma"),
    (train, ["--min_step_percent", "0.9", "--max_step_percent", "0.1"], "--min_step_percent 0.9 is above --max"),
    (train, ["--max_step_percent", "1.5"], "--max_step_percent"),
    (train, ["--fit_steps", "9", "--steps", "8"], "--fit_steps 9 and --gan_steps 0 are more than --steps 8"),
    (train, ["--fit_steps", "4", "--gan_steps", "5", "--steps", "8"], "--gan_steps 5 are more than --steps 8"),
    (train, ["--gan_steps", "9", "--discriminator_warmup_steps", "9"], "must exceed --discriminator_warmup_steps 9"),
    (train0, ["--dataset", "shapes", "--sigma_min", "90"], "--sigma_min 90.0 is not below --sigma_max 80.0"),
    (train, ["--dfake_gen_update_ratio", "0"], "--dfake_gen_update_ratio"),
    (train, ["--generator_lr", "inf"], "--generator_lr"),
    (train, ["--teacher", "no_such_run"], "no checkpoint at no_such_run"),
    (train, ["--teacher", "{tree}"], "no checkpoint at {tree}: no checkpoint.pt in this folder"),
    (train, ["--teacher", "{tree}/cat/0.png"], "{tree}/cat/0.png is not a checkpoint"),
    (train, ["--teacher", "{cut}"], "{cut} is"),
    (train, ["--teacher", "{teacher}", "--device", "cuda:99"], "--device: "),
    (train, ["--teacher", "{teacher}", "--guide", "{teacher}"], "--guide needs an --autoguidance_scale"),
    (train, ["--preset", "nothing"], "unknown preset 'nothing'"),
    (train, ["--run_dir", "{tree}/cat/0.png"], "--run_dir: cannot write {tree}/cat/0.png: it is a file"),
    (train, ["--teacher", "{teacher}", "--run_dir", "{teacher}", "--overwrite"], "{teacher} is the teacher's own"),
    (train, ["--steps", "9" * 400], "--steps"),
    (train, ["--gen_cls_loss_weight", "-1"], "--gen_cls_loss_weight"),
    (train, ["--gen_cls_loss_weight", "1e7"], "--gen_cls_loss_weight: 1e7 is not at least 0 and at most 1000000"),
    (train, ["--generator_lr", "1.5"], "--generator_lr: 1.5 is not above 0 and at most 1"),
    (train, ["--conditioning_sigma", "1e5"], "--conditioning_sigma: 1e5 is not at least 0.0001 and at most 10000"),
    (train, ["--diffusion_gan_max_timestep", "1001"], "--diffusion_gan_max_timestep"),
    (train, ["--num_denoising_steps", "0"], "--num_denoising_steps"),
    (train, ["--num_denoising_steps", "3", "--batch_size", "64"],
     "--batch_size 64 cannot be divided among 1 processes of --num_denoising_steps 3"),
    (train, ["--num_denoising_steps", "2", "--conditioning_sigma", "0.001"], "--conditioning_sigma 0.001 is not"),
    (train, ["--num_denoising_steps", "4", "--conditioning_sigma", "80", "--max_step_percent", "0.6"],
     "--max_step_percent 0.6 is below it"),
    (train, ["--teacher", "{teacher}", "--cfg_scale", "2"], "--cfg_scale 2.0 needs"),
    (train, ["--teacher", "{teacher}", "--cfg_interval", "2", "2"], "--cfg_interval 2.0 2.0"),
    (train, ["--cfg_interval", "2"], "--cfg_interval"),
    (train, ["--cfg_interval", "-1", "2"], "--cfg_interval"),
    (sample, ["--checkpoint", "{teacher}", "--cfg_interval", "0", "2"], "--cfg_interval needs a --cfg_scale"),
    (train, ["--teacher", "{teacher}", "--gen_cls_loss_weight", "1", "--dataset", "shapes"], "--dataset shapes has"),
    (train0, ["--dataset", "shapes", "--label_dropout", "1.5"], "--label_dropout"),
    (sample, ["--checkpoint", "{teacher}", "--cfg_scale", "2"], "--cfg_scale 2.0 needs"),
    (train0, ["--dataset", "imagenet"], "--dataset"),
    (train0, ["--dataset", "folder", "--data_dir", "{tree}/cat/0.png"], "--data_dir {tree}/cat/0.png"),
    (features, ["--dataset", "folder", "--data_dir", "{tree}/cat"], "--dataset folder has one class, cat, and a"),
    (train0, ["--dataset", "shapes", "--device", "meta"], "--device"),
    (train0, ["--resume", "--overwrite"], "--resume and --overwrite exclude one another"),
    (train0, ["--dataset", "folder", "--data_dir", "no_such_folder"], "--data_dir no_such_folder"),
    # Before the dataset is read, or downloaded.
    (train0, ["--data_dir", "no_such_folder", "--eval_every", "5", "--feature_extractor", "no.pt2"], "no file no.pt2"),
    (train0, ["--dataset", "folder", "--data_dir", "{broken}"], "{broken}/dog/1.png"),
    (train0, ["--dataset", "shapes", "--channels", "12"], "--channels"),
    (train0, ["--dataset", "shapes", "--batch_size", "1.5"], "--batch_size"),
    (train0, ["--dataset", "shapes", "--steps", "-3"], "--steps"),
    (train0, ["--dataset", "shapes", "--no_such_flag", "1"], "--no_such_flag"),
    (train0, ["--dataset", "shapes", "--device", "tpu"], "--device"),
    (train0, ["--run_dir", "{teacher}"], "{teacher} holds a run already"),
    (train0, ["--run_dir", "{teacher}", "--resume", "--dataset", "shapes"], "--dataset shapes differs"),
    (train0, ["--run_dir", "{teacher}", "--resume", "--channels", "16"], "--channels 16 differs"),
    (train0, ["--run_dir", "{teacher}", "--resume", "--blocks", "2"], "--blocks 2 differs"),
    (train0, ["--run_dir", "{teacher}", "--resume", "--accumulate", "3"], "among 1 processes of --accumulate 3"),
    (train0, ["--run_dir", "{teacher}", "--resume", "--seed", "1"], "--seed 1 differs"),
    (train0, ["--run_dir", "{teacher}", "--resume", "--optimizer", "muon"], "--optimizer muon differs"),
    (train, ["--run_dir", "{student}", "--resume", "--teacher", "{tree}"], "--teacher {tree} differs"),
    (train, ["--run_dir", "{student}", "--resume", "--seed", "1"], "--seed 1 differs"),
    (train, ["--run_dir", "{student}", "--resume", "--optimizer", "muon"], "--optimizer muon differs"),
    (train, ["--run_dir", "{student}", "--resume", "--conditioning_sigma", "3"], "--conditioning_sigma 3.0 differs"),
    (train, ["--run_dir", "{student}", "--resume", "--num_denoising_steps", "2"], "--num_denoising_steps 2 differs"),
    (train, ["--run_dir", "{student}", "--resume", "--fit_steps", "1"], "--fit_steps 1 differs"),
    (train, ["--run_dir", "{student}", "--resume", "--gan_steps", "1"], "--gan_steps 1 differs"),
    (train, ["--run_dir", "{teacher}", "--resume"], "{teacher}/checkpoint.pt holds a teacher, but a student"),
    (sample, ["--checkpoint", "no_such_run"], "no checkpoint at no_such_run"),
    (sample, ["--checkpoint", "{teacher}", "--labels", "cow"], "--labels cow: the classes are 0..1: cat, dog"),
    (sample, ["--checkpoint", "{teacher}", "--out", "{tree}/cat/0.png/x.png"], "--out: '{tree}/cat/0.png/x.png'"),
    (sample, ["--checkpoint", "{teacher}", "--out", "{tree}"], "--out: {tree} does not end in .png"),
    (sample, ["--checkpoint", "{teacher}", "--npz", "{tree}"], "--npz: cannot write {tree}: it is a folder"),
    (sample, ["--checkpoint", "{teacher}", "--num_images", "0"], "--num_images"),
    (sample, ["--checkpoint", "{teacher}", "--walk", "walk.png"], "--walk: walk.png does not end in .gif"),
    (sample, ["--checkpoint", "{teacher}", "--images", "{tree}/cat/0.png"], "--images: cannot write {tree}/cat/0.png"),
]


@pytest.mark.parametrize(("script", "flags", "said"), WRONG, ids=[f"{s.__name__} {' '.join(f)}" for s, f, _ in WRONG])
def test_a_wrong_call_is_one_line_exit_code_2_and_writes_nothing(
    script, flags, said, tmp_path, tree, teacher, student, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    image_tree(tmp_path / "broken")
    (tmp_path / "broken" / "dog" / "1.png").write_bytes(b"broken")
    (tmp_path / "cut.pt").write_bytes(read_bytes(f"{teacher}/checkpoint.pt")[:-1000])
    names = dict(tree=tree, teacher=teacher, student=student, broken=tmp_path / "broken", cut=tmp_path / "cut.pt")
    here = sorted(os.listdir(tmp_path))
    saved = [read_bytes(f"{run}/checkpoint.pt") for run in (teacher, student)]
    plain = ["--preset", "none"] if script in (train0, train) else []
    assert call(script, *plain, *(flag.format(**names) for flag in flags)) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "error: " in err and said.format(**names) in err
    assert sorted(os.listdir(tmp_path)) == here
    assert [read_bytes(f"{run}/checkpoint.pt") for run in (teacher, student)] == saved


def test_a_feature_network_that_has_gone_hinders_only_who_measures(tmp_path, capsys):
    flags = [*TINY, "--dataset", "shapes", "--channels", "8", "--feature_extractor", "gone.pt2", "--run_dir"]
    run = str(tmp_path / "run")
    assert call(train0, *flags, run, "--steps", "1") == 0
    assert call(train0, "--run_dir", run, "--resume", "--steps", "2", "--eval_every", "1") == 2
    gone = os.path.abspath("gone.pt2")              # as the checkpoint remembers it
    assert f"--feature_extractor: no file {gone}" in capsys.readouterr().err.splitlines()[-1]
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
