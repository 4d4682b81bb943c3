import argparse
import collections
import io
import json
import math
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY as SHORT
from conftest import call, image_tree
from torch import nn

import diffusion
import sample
import train
from edm_unet import Block, EDMUNet
from model import SimpleUNet
from support import checkpoint, data, edm_pickle, networks
from support.randomness import image_noise
from tools import benchmark

DATA = Path(__file__).parent / "data"
TINY = DATA / "edm-tiny.pkl"            # published format, random weights; its embedded source raises when it is run


class Reduced:
    """Pickled as the call of a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the file was believed")


@pytest.fixture(autouse=True)
def persistence(monkeypatch):
    """The module that EDM's files name."""
    name = "torch_utils.persistence"
    monkeypatch.setattr(_reconstruct_persistent_obj, "__module__", name)
    module = types.SimpleNamespace(_reconstruct_persistent_obj=_reconstruct_persistent_obj)
    monkeypatch.setitem(sys.modules, "torch_utils", types.SimpleNamespace(persistence=module))
    monkeypatch.setitem(sys.modules, name, module)


def persistent(class_name, **state):
    meta = dict(type="class", module_src="raise SystemExit", class_name=class_name, state=state)
    return Reduced(_reconstruct_persistent_obj, meta)


def state_of(module, *names):
    """The state of a module of a file, or of one inside it."""
    state = module.__dict__ if isinstance(module, nn.ModuleDict) else module.args[0]["state"]
    return state_of(state["_modules"][names[0]], *names[1:]) if names else state


def as_in_a_file(module):
    inner = {name: as_in_a_file(m) for name, m in module.named_children() if any(True for _ in m.parameters())}
    state = dict(_parameters=dict(module._parameters), _buffers=dict(resample_filter=None), _modules=inner)
    if isinstance(module, nn.ModuleDict):
        copy = nn.ModuleDict.__new__(nn.ModuleDict)
        copy.__dict__.update(state)
        return copy
    name = {EDMUNet: "SongUNet", Block: "UNetBlock"}.get(type(module), type(module).__name__)
    return persistent(name, **state)


def ema_of(net, **changes):
    """The averaged network of a file."""
    kwargs = dict(net.config, model_type="SongUNet", augment_dim=9, dropout=np.sqrt(0.5), sigma_max=math.inf) | changes
    return persistent(
        "EDMPrecond", _parameters={}, _buffers={}, _modules=dict(model=as_in_a_file(net)),
        _init_args=(), _init_kwargs=kwargs,
    )


def write(path, ema):
    with open(path, "wb") as file:
        pickle.dump(dict(ema=ema, loss_fn=persistent("EDMLoss")), file)
    return path


def tiny(**config):
    return EDMUNet(**dict(dict(model_channels=4, num_blocks=1, channel_mult=[2, 1], label_dim=3), **config))


def test_known_answers():
    answers = {name: torch.from_numpy(array) for name, array in np.load(DATA / "edm-tiny-answers.npz").items()}
    x, sigma, labels = answers["x"], answers["sigma"], answers["labels"]
    config, weights = edm_pickle.read(TINY)
    net = EDMUNet(**config)
    net.load_state_dict(weights)
    level = sigma.view(-1, 1, 1, 1)
    raw = net.network(x / (level**2 + 0.25).sqrt(), sigma.log() / 4, labels)
    features = net(x, sigma, labels, return_features=True)
    assert [level.shape[1] for level in features] == net.feature_channels
    assert [level.shape[2] for level in features] == [32, 16, 8, net.bottleneck_size]
    for found, name in (
        (net(x, sigma, labels), "denoised"), (raw, "raw_F"), (features[-1], "bottleneck_after_in1")
    ):
        torch.testing.assert_close(found, answers[name], rtol=1e-5, atol=1e-5)


def test_the_published_size():
    with torch.device("meta"):
        net = EDMUNet()
        assert net(torch.empty(2, 3, 32, 32), torch.empty(2), torch.zeros(2, dtype=torch.long)).shape == (2, 3, 32, 32)
    augment = 9 * 128                   # weights of its inputs for labels of augmentation, which are left out
    assert sum(p.numel() for p in net.parameters()) == 55_735_299 - augment
    assert net.feature_channels == [256] * 4


def test_preconditioning_is_float32_under_autocast():
    net, x, sigma, labels = tiny(), torch.randn(2, 3, 32, 32), torch.tensor([0.002, 80.0]), torch.tensor([0, -1])
    nn.init.zeros_(net.dec["32x32_aux_conv"].weight)
    nn.init.zeros_(net.dec["32x32_aux_conv"].bias)
    with torch.autocast("cpu", torch.bfloat16):
        x0_hat = net(x, sigma, labels)
    torch.testing.assert_close(x0_hat, (0.25 / (sigma**2 + 0.25)).view(-1, 1, 1, 1) * x)


def test_labels():
    x, sigma = torch.randn(1, 3, 32, 32).expand(3, -1, -1, -1), torch.ones(3)
    a, b, none = tiny()(x, sigma, torch.tensor([0, 2, -1]))
    assert not any(torch.allclose(*pair) for pair in ((a, b), (a, none), (b, none)))
    net = tiny(label_dim=0)
    a, b, none = net(x, sigma, torch.tensor([0, 7, -1]))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, none)
    assert not [name for name in net.state_dict() if "label" in name]


@pytest.mark.parametrize(
    "config",
    [
        dict(label_dim=0),
        dict(model_channels=16, num_blocks=2, channel_mult=[1, 2, 2], attn_resolutions=[32, 8], channel_mult_emb=2),
    ],
)
def test_networks_of_other_sizes_come_back_from_a_file(tmp_path, config):
    net = tiny(**config)
    found, weights = edm_pickle.read(write(tmp_path / "net.pkl", ema_of(net)))
    copy = EDMUNet(**found)
    copy.load_state_dict(weights)
    assert copy.config == net.config
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_bad_arguments_are_refused():
    for config in (dict(model_channels=6), dict(label_dim=-1), dict(num_blocks=0), dict(channel_mult=[])):
        with pytest.raises(ValueError, match=next(iter(config))):
            EDMUNet(**config)


def refused(path):
    with pytest.raises(edm_pickle.Refused) as error:
        edm_pickle.read(path)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 200
    return str(error.value)


def test_cut_files_are_refused(tmp_path):
    content = TINY.read_bytes()
    for length in (0, 1, 2, 300, 5000, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.pkl").write_bytes(content[:length])
        refused(tmp_path / "cut.pkl")


def storage(n, dtype=torch.float32):
    """The nested pickle of a tensor's numbers."""
    function, (content,) = torch.zeros(n, dtype=dtype).storage().__reduce__()
    assert function is torch.storage._load_from_bytes
    return content


def tensor(content, size, stride=(1,), offset=0):
    args = offset, size, stride, False, collections.OrderedDict()
    return Reduced(torch._utils._rebuild_tensor_v2, Reduced(torch.storage._load_from_bytes, content), *args)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_code_and_tensors_that_are_not_what_they_say_are_refused(tmp_path):
    ran, ema, zip_file = tmp_path / "ran", ema_of(tiny()), io.BytesIO()
    code = Reduced(os.mkdir, str(ran))
    torch.save(torch.zeros(16), zip_file)
    parameters = state_of(ema, "model", "map_layer0")["_parameters"]
    for bias in (
        code, tensor(pickle.dumps(code, 2), (16,)), 5, Reduced(torch.storage._load_from_bytes, storage(16)),
        tensor(zip_file.getvalue(), (16,)), tensor(storage(16, torch.float64), (16,)), tensor(storage(16)[:-4], (16,)),
        tensor(storage(16), (16,), (2,)), tensor(storage(16), (16,), (-1,)), tensor(storage(16), (16,), (1,), 1),
        tensor(storage(16), (16,), (1,), -1), tensor(storage(16), (4, 4), (4, 1)),
    ):
        parameters["bias"] = bias
        refused(write(tmp_path / "net.pkl", ema))
        assert not ran.exists()
    parameters["bias"] = tensor(storage(16), (16,))
    edm_pickle.read(write(tmp_path / "net.pkl", ema))


def test_other_networks_are_refused_by_name(tmp_path):
    for key, value in dict(
        embedding_type="fourier", encoder_type="residual", resample_filter=[1, 3, 3, 1], model_type="DhariwalUNet",
        img_resolution=64, label_dropout=0.1, use_fp16=True, sigma_data=1.0, heads=4,
    ).items():
        assert key in refused(write(tmp_path / "net.pkl", ema_of(tiny(), **{key: value})))
    for key, value in dict(num_blocks=10**9, model_channels=10**6, attn_resolutions=[32], channel_mult="wide").items():
        refused(write(tmp_path / "net.pkl", ema_of(tiny(), **{key: value})))

    def change_class(ema):
        ema.args[0]["class_name"] = "VPPrecond\n"

    for change, message in (
        (change_class, "VPPrecond"),
        (lambda ema: state_of(ema)["_modules"].update(model=persistent("Mine")), "Mine"),
        (lambda ema: state_of(ema, "model")["_modules"].update(more=persistent("Mine")), "Mine"),
        (lambda ema: state_of(ema, "model", "map_layer1")["_parameters"].pop("bias"), "map_layer1.bias"),
        (lambda ema: state_of(ema, "model")["_modules"].update(it=state_of(ema)["_modules"]["model"]), "KeyError"),
        (lambda ema: state_of(ema).update(_init_args=(32,)), "32"),
    ):
        ema = ema_of(tiny())
        change(ema)
        assert message in refused(write(tmp_path / "net.pkl", ema))


def test_a_small_file_takes_little_memory(tmp_path):
    for code in (
        b"}r\xff\xff\xff\x0f",                                  # an object to remember as number 2^28
        1_100_000 * b"}",
        b"}()" + 300_000 * b"\x85" + b"Nu",                     # a key of tuples in tuples
    ):
        (tmp_path / "net.pkl").write_bytes(b"\x80\x04" + code + b".")
        assert "memory" in refused(tmp_path / "net.pkl")
    with torch.device("meta"):
        ema = ema_of(tiny(model_channels=4000))

    def shrink(module):                                         # every tensor one number, repeated
        state = state_of(module)
        for name, value in state["_parameters"].items():
            state["_parameters"][name] = tensor(storage(1), tuple(value.shape), (0,) * value.dim())
        for inner in state["_modules"].values():
            shrink(inner)

    shrink(ema)
    assert "larger than itself" in refused(write(tmp_path / "net.pkl", ema))


def test_a_file_is_a_teacher_of_cifar10(tmp_path):
    state = checkpoint.load(TINY, kind="teacher")
    assert state["classes"] == checkpoint.load(checkpoint.SHIPPED / "teacher.pt")["classes"]
    assert (state["sigma_min"], state["sigma_max"]) == (0.002, 80)
    assert isinstance(networks.averaged(state), EDMUNet)
    of_others = checkpoint.load(write(tmp_path / "net.pt", ema_of(tiny())))                 # its name says nothing
    assert of_others["classes"] == ["0", "1", "2"]
    with pytest.raises(checkpoint.CheckpointError, match=r"net.pt .* it asks for 'posix.mkdir'"):
        checkpoint.load(write(tmp_path / "net.pt", Reduced(os.mkdir, str(tmp_path / "ran"))))


def test_images_for_a_network_without_classes_have_none_either(tmp_path):
    state = checkpoint.load(write(tmp_path / "net.pkl", ema_of(tiny(label_dim=0))))
    folder = str(image_tree(tmp_path / "images"))
    found = data.from_flags(argparse.Namespace(dataset="folder", data_dir=folder), state)
    assert found.classes == state["classes"] == [""] and not found.labels.any()


def test_it_is_sampled_by_heuns_method_and_cannot_be_guided(tmp_path, capsys):
    path, out = write(tmp_path / "net.pkl", ema_of(tiny())), str(tmp_path / "grid.png")
    flags = ["--device", "cpu", "--checkpoint", str(path), "--out", out]
    assert call(sample, *flags, "--num_images", "6", "--npz", str(tmp_path / "images.npz")) == 0
    net = networks.averaged(checkpoint.load(path))
    images = diffusion.heun_sample(net, image_noise(0, range(6)), torch.arange(6) % 3, num_steps=18)
    with np.load(tmp_path / "images.npz") as file:
        found = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    assert (found.int() - data.to_uint8(images).int()).abs().max() <= 1
    assert call(sample, *flags, "--cfg_scale", "2") == 2 and "--cfg_scale 2.0 needs" in capsys.readouterr().err


@pytest.mark.parametrize("label_dim, steps", [(2, 20), (0, 2)])
def test_a_student_with_a_gan_resumes_bit_for_bit(tmp_path, label_dim, steps):
    teacher = write(tmp_path / "net.pkl", ema_of(tiny(channel_mult=[1, 1, 1], label_dim=label_dim)))
    images = image_tree(tmp_path / "images", classes=("0", "1"))
    flags = [*SHORT, "--preset", "edm", "--accumulate", "2", "--no-compile"]
    flags += ["--teacher", str(teacher), "--dataset", "folder", "--data_dir", str(images)]
    flags += ["--save_every", "20", "--sample_every", "20"]
    for run, end in (("whole", steps), ("halves", steps // 2), ("halves", steps)):
        assert call(train, *flags, "--resume", "--run_dir", str(tmp_path / run), "--steps", str(end)) == 0
    whole, halves = (checkpoint.load(tmp_path / run, kind="student") for run in ("whole", "halves"))
    for name in ("model", "model_ema"):
        assert all(torch.equal(value, halves[name][key]) for key, value in whole[name].items())
    head = whole["model"]["guidance_model.cls_head.layers.3.weight"]
    assert head.shape[2:] == (4, 4)                             # of the 8x8 features that are halved before it
    start = checkpoint.load(teacher)["model_ema"]
    assert not any(torch.equal(value, start[name]) for name, value in whole["model_ema"].items() if "weight" in name)

    slim = tmp_path / "slim.pt"
    checkpoint.save(slim, checkpoint.slim(whole), compressed=True)
    flags = ["--device", "cpu", "--num_images", "2", "--out", str(tmp_path / "grid.png")]
    assert call(sample, *flags, "--checkpoint", str(slim)) == 0
    assert isinstance(networks.averaged(checkpoint.load(slim)), EDMUNet)


def test_its_turns_are_timed(tmp_path):
    teacher, out = write(tmp_path / "net.pkl", ema_of(tiny(label_dim=0))), tmp_path / "benchmark.json"
    flags = ["--teacher", str(teacher), "--batch_size", "2", "--repeats", "1", "--device", "cpu"]
    assert call(benchmark, *flags, "--out", str(out)) == 0
    flops = {name: part["gflop_per_image"] for name, part in json.loads(out.read_text())["parts"].items()}
    # In units of one evaluation: the teacher 1, fake_unet 1 and 3, the generator 3; in the other turn its image alone.
    assert set(flops) == {"both_turns", "guidance_turn", "gan_turn"}
    assert flops["both_turns"] / flops["guidance_turn"] == pytest.approx(8 / 4, rel=0.02)


def test_a_checkpoint_names_its_network():
    for net in (EDMUNet(8, num_blocks=1), SimpleUNet(8, blocks=2)):
        assert networks.rebuild(networks.described(net)).config == net.config
    assert isinstance(networks.rebuild(dict(channels=8)), SimpleUNet)           # an older file's
    with pytest.raises(ValueError, match=r"'os\.system'"):
        networks.rebuild(dict(network="os.system"))
