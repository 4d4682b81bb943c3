"""tools/export.py: the file draws what torch draws, for any number of images, and wrong calls leave nothing behind."""

import json
import os
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import call
from PIL import Image
from test_model import trained_net

import diffusion
from support import checkpoint, data, networks
from support.randomness import image_noise
from tools import export

CLASSES = [f"class {i}" for i in range(10)]
ONE_STEP, THREE_STEPS = [3.0], [3.0, 1.5, 0.4]


def student(path, sigmas=ONE_STEP, kind="student", seed=0):
    """A checkpoint of a small network, all of whose layers do something."""
    torch.manual_seed(seed)
    net = trained_net(channels=8, label_dim=len(CLASSES))
    net.out_conv.weight.data *= 5                   # as contrasty as images are
    checkpoint.save(path, dict(
        kind=kind, step=7, model_config=net.config, model_ema=net.state_dict(), classes=CLASSES,
        sigma_min=0.002, sigma_max=80.0, denoising_sigmas=sigmas,
    ))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two students and their files: of one step as by default, of three in float32 with the output `float`."""
    folder = tmp_path_factory.mktemp("export")
    student(folder / "one.pt"), student(folder / "three.pt", THREE_STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(export, "--checkpoint", "one.pt") == 0
        assert call(export, "--checkpoint", "three.pt", "--out", "three.onnx", "--no-half", "--float_output") == 0
    return folder


def inputs(n, sigmas):
    noise = [image_noise(1, range(n), i) for i in range(len(sigmas))]
    renoise = dict(renoise=torch.stack(noise[1:], dim=1)) if len(sigmas) > 1 else {}
    return dict(z=noise[0], labels=torch.arange(n) % len(CLASSES), **renoise)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("name, sigmas", [("one", ONE_STEP), ("three", THREE_STEPS)])
def test_the_files_images_are_those_of_the_network(folder, name, sigmas, n):
    session = onnxruntime.InferenceSession(folder / {"one": "generator.onnx", "three": "three.onnx"}[name])
    given = inputs(n, sigmas)
    images, *floats = session.run(None, {name: value.numpy() for name, value in given.items()})
    net, renoise = networks.averaged(checkpoint.load(folder / f"{name}.pt")), given.get("renoise")
    wanted = diffusion.few_step_sample(net, given["z"], given["labels"], sigmas, lambda i: renoise[:, i - 1])
    apart = abs(images.astype(int) - data.to_uint8(wanted).permute(0, 2, 3, 1).numpy())
    assert images.dtype == np.uint8 and images.std() > 30
    assert apart.max() <= 1 and (apart == 0).mean() > (0.97 if name == "one" else 0.999)
    assert all(np.abs(x - wanted.numpy()).max() < 1e-4 for x in floats) and len(floats) == (name == "three")


def test_the_file_tells_what_it_holds_and_not_where_it_was_made(folder):
    content = (folder / "generator.onnx").read_bytes()
    about = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
    assert json.loads(about["classes"]) == CLASSES and json.loads(about["sigmas"]) == ONE_STEP
    assert len(about["checkpoint_sha256"]) == 64 and b".py" not in content


def test_weights_are_stored_as_float16_and_all_else_is_float32(folder):
    graph = onnx.load(folder / "generator.onnx").graph
    kinds = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    net = networks.averaged(checkpoint.load(folder / "one.pt"))
    halves = {f"net.{name}.half" for name, parameter in net.named_parameters() if parameter.ndim > 1}
    assert {name for name, kind in kinds.items() if kind == "FLOAT16"} == halves
    assert {node.op_type for node in graph.node if halves & set(node.input)} == {"Cast"}


def test_a_file_that_does_not_draw_what_torch_draws_is_not_written(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "to_onnx", lambda *how: onnx.load(folder / "generator.onnx"))
    assert call(export, "--checkpoint", student(tmp_path / "s.pt", seed=1), "--out", f"{tmp_path}/g.onnx") == 2
    assert "largest difference" in capsys.readouterr().err and os.listdir(tmp_path) == ["s.pt"]


def test_wrong_calls_end_in_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch):
    def refused(words, *flags):
        before = sorted(tmp_path.rglob("*"))
        assert call(export, *flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error and sorted(tmp_path.rglob("*")) == before

    good, out, page = student(tmp_path / "s.pt"), f"--out={tmp_path}/g.onnx", f"--page={tmp_path}/page"
    (tmp_path / "other").write_text("no checkpoint")
    refused("holds a teacher, but a student is needed", "--checkpoint", student(tmp_path / "t.pt", kind="teacher"), out)
    refused("not a checkpoint", "--checkpoint", f"{tmp_path}/other", out)
    refused("no such file", "--checkpoint", f"{tmp_path}/none", out)
    refused("cannot write", "--checkpoint", good, "--out", str(tmp_path))
    refused("cannot write", "--checkpoint", good, "--page", f"{tmp_path}/none/page")
    refused("is there already", "--checkpoint", good, "--page", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("needs npm", "--checkpoint", good, out, page)
    (tmp_path / "npm").write_text("#!/bin/sh\necho npm error code E404 >&2\necho npm error 404 Not Found >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    refused("npm could not fetch onnxruntime-web@1.30.0: npm error 404 Not Found", "--checkpoint", good, out, page)
    (tmp_path / "npm").write_text("#!/bin/sh\necho something else > onnxruntime-web-1.30.0.tgz\n")
    refused("does not have the SHA-512", "--checkpoint", good, out, page)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    refused("pip install -r requirements-export.txt", "--checkpoint", good, out)


def test_the_lines_of_the_docstring_draw(folder, monkeypatch):
    shown = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Image.Image, "show", lambda image: shown.append(image.size))
    code = re.search("nothing of this project:\n\n(.*?)\n\n", export.__doc__, re.DOTALL)[1]
    exec(re.sub("(?m)^    ", "", code), {})
    assert shown == [(320, 32)]
