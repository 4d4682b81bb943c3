import argparse
import collections
import io
import json
import math
import os
import pickle
import sys
import tracemalloc
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
import train0
from edm_unet import AuxResidual, Block, EDMUNet
from model import SimpleUNet
from support import checkpoint, data, edm_pickle, errors, networks, pictures
from support.randomness import image_noise
from tools import benchmark

DATA = Path(__file__).parent / "data"
TINY = DATA / "edm-tiny.pkl"            # published format, random weights; its embedded source raises when it is run
FILES = "edm-tiny", "edm-tiny-64", "edm-tiny-ve", "edm-tiny-adm"
VE = dict(
    embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1]
)
ADM = dict(model_type="DhariwalUNet")
KINDS = pytest.mark.parametrize("kind", [dict(), VE, ADM], ids=["vp", "ve", "adm"])


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
    inner = {name: as_in_a_file(m) for name, m in module.named_children() if m.state_dict()}
    buffers = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
    buffers["resample_filter"] = None
    state = dict(_parameters=dict(module._parameters), _buffers=buffers, _modules=inner)
    if isinstance(module, nn.ModuleDict):
        copy = nn.ModuleDict.__new__(nn.ModuleDict)
        copy.__dict__.update(state)
        return copy
    if isinstance(module, EDMUNet):
        return persistent(module.config["model_type"], **state)
    return persistent({Block: "UNetBlock", AuxResidual: "Conv2d"}.get(type(module), type(module).__name__), **state)


def ema_of(net, **changes):
    """The averaged network of a file."""
    kwargs = dict(net.config, augment_dim=9, dropout=np.sqrt(0.5), sigma_max=math.inf)
    if net.adm:
        kwargs = {name: value for name, value in kwargs.items() if name not in VE} | dict(use_fp16=True)
    kwargs |= changes
    return persistent(
        "EDMPrecond", _parameters={}, _buffers={}, _modules=dict(model=as_in_a_file(net)),
        _init_args=(), _init_kwargs=kwargs,
    )


def write(path, ema, **more):
    with open(path, "wb") as file:
        pickle.dump(dict(ema=ema, loss_fn=persistent("EDMLoss"), **more), file)
    return path


def tiny(**config):
    return EDMUNet(**dict(dict(model_channels=4, num_blocks=1, channel_mult=[2, 1], label_dim=3), **config))


def read(name):
    config, weights, _ = edm_pickle.read(DATA / f"{name}.pkl")
    net = EDMUNet(**config)
    net.load_state_dict(weights)
    return net


@pytest.mark.parametrize("name", FILES)
def test_known_answers(name):
    answers = {key: torch.from_numpy(array) for key, array in np.load(DATA / f"{name}-answers.npz").items()}
    x, sigma, labels = answers["x"], answers["sigma"], answers["labels"]
    net = read(name)
    level = sigma.view(-1, 1, 1, 1)
    raw = net.network(x / (level**2 + 0.25).sqrt(), sigma.log() / 4, labels)
    features = net(x, sigma, labels, return_features=True)
    assert [level.shape[1] for level in features] == net.feature_channels
    sizes = [x.shape[2] >> level for level in range(len(net.config["channel_mult"]))]
    assert [level.shape[2] for level in features] == [*sizes, net.bottleneck_size]
    bottleneck = answers["bottleneck_after_in1"]        # of the first image alone where it is large
    for found, wanted in (
        (net(x, sigma, labels), answers["denoised"]), (raw, answers["raw_F"]),
        (features[-1][: len(bottleneck)], bottleneck),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


LARGER = dict(img_resolution=64, channel_mult=[1, 2, 2, 2], label_dim=0)
IMAGENET = dict(
    ADM, img_resolution=64, channel_mult=[1, 2, 3, 4], label_dim=1000, model_channels=192, num_blocks=3,
    attn_resolutions=[32, 16, 8],
)


@pytest.mark.parametrize(
    "config, parameters",
    [
        (dict(), 55_735_299), (dict(label_dim=0), 55_733_891), (VE, 56_400_643),
        (LARGER, 61_805_571), (dict(LARGER, **VE), 62_761_091), (IMAGENET, 295_899_267),
    ],
)
def test_the_published_sizes(config, parameters):
    with torch.device("meta"):
        net = EDMUNet(**config)
        x = torch.empty(2, 3, net.image_size, net.image_size)
        assert net(x, torch.empty(2), torch.zeros(2, dtype=torch.long)).shape == x.shape
    # Weights of the inputs for labels of augmentation, which are left out.
    augment = 0 if net.adm else 9 * 128 * net.config["channel_mult_noise"]
    assert sum(p.numel() for p in net.parameters()) == parameters - augment


def test_attention_heads_are_of_64_channels():
    block, x = Block(128, 128, 8, heads=2), torch.randn(2, 128, 4, 4)
    qkv, heads = block.qkv(x).flatten(2), []
    for head in range(2):                               # channel 3 (64 head + c) + j: c of q, k, v
        q, k, v = (qkv[:, 3 * 64 * head + j : 3 * 64 * (head + 1) : 3] for j in range(3))
        heads.append(v @ (q.mT @ k / 8).softmax(-1).mT)
    torch.testing.assert_close(block.attend(x), block.proj(torch.cat(heads, 1).view(2, 128, 4, 4)))
    net = tiny(**ADM, model_channels=64, channel_mult=[1, 3], attn_resolutions=[32])
    assert {name: block.heads for name, block in net.dec.items()} == {
        "16x16_in0": 3, "16x16_in1": 0, "16x16_block0": 0, "16x16_block1": 0,
        "32x32_up": 0, "32x32_block0": 1, "32x32_block1": 1,
    }


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
        dict(VE, num_blocks=2, channel_mult=[1, 2, 2]), dict(VE, img_resolution=64, label_dim=0),
        dict(ADM, model_channels=32, num_blocks=2, channel_mult=[2, 4], attn_resolutions=[32, 16]),
        dict(ADM, img_resolution=64, label_dim=0),
    ],
)
def test_networks_of_other_sizes_come_back_from_a_file(tmp_path, config):
    net = tiny(**config)
    found, weights, _ = edm_pickle.read(write(tmp_path / "net.pkl", ema_of(net)))
    copy = EDMUNet(**found)
    copy.load_state_dict(weights)
    assert copy.config == net.config
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("size, levels", [(16, 2), (24, 4), (48, 3), (64, 4), (128, 5)])
@KINDS
def test_a_snapshot_of_edms_training_at_other_sizes(tmp_path, kind, size, levels):
    mult = [1, 2, 1, 2, 2][:levels]
    net = tiny(**kind, img_resolution=size, channel_mult=mult)
    # What EDM's train.py writes: any precision, no argument left at a default of its own.
    images = dict(class_name="training.dataset.ImageFolderDataset", path="mine.zip", resolution=size, max_size=400)
    ema = ema_of(net, img_channels=3, use_fp16=True)
    path = write(tmp_path / "network-snapshot-000100.pkl", ema, augment_pipe=None, dataset_kwargs=images)
    state = edm_pickle.teacher(path)
    assert state["classes"] == ["0", "1", "2"] and state["settings"] == {}
    copy = networks.averaged(state)
    x, labels = torch.randn(2, 3, size, size), torch.tensor([1, -1])
    torch.testing.assert_close(copy(x, 0.7, labels), net(x, 0.7, labels), rtol=1e-5, atol=1e-5)
    features = copy(x, 0.7, labels, return_features=True)
    sizes = [size // 2**level for level in range(levels)]
    assert [level.shape[2] for level in features] == [*sizes, copy.bottleneck_size]
    assert copy.bottleneck_size == sizes[-1]
    assert [level.shape[1] for level in features] == copy.feature_channels == [4 * m for m in mult] + [4 * mult[-1]]


@pytest.mark.parametrize("label_dim", [0, 10])
def test_a_network_of_other_images_is_not_one_of_cifar10(tmp_path, label_dim):
    ema = ema_of(tiny(label_dim=label_dim))
    for max_size, cifar10 in ((50_000, True), (100_000, True), (400, False), (Reduced(np.dtype, "f8"), False)):
        state = edm_pickle.teacher(write(tmp_path / "net.pkl", ema, dataset_kwargs=dict(max_size=max_size)))
        assert state["settings"] == (dict(dataset="cifar10") if cifar10 else {})
        assert (state["classes"][0] == "airplane") == (cifar10 and label_dim > 0)
    for said in (None, [], persistent("Dataset")):
        assert edm_pickle.teacher(write(tmp_path / "net.pkl", ema, dataset_kwargs=said))["settings"]


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_file_is_never_in_memory_twice(tmp_path, monkeypatch):
    path, made, most = write(tmp_path / "net.pkl", ema_of(tiny(model_channels=64))), [0], [0]
    original = edm_pickle.materialise

    def materialise(tensor):
        weight = original(tensor)
        made[0] += weight.nbytes
        most[0] = max(most[0], made[0] + tracemalloc.get_traced_memory()[0])    # torch's memory, and that of the pickle
        return weight

    monkeypatch.setattr(edm_pickle, "materialise", materialise)
    tracemalloc.start()
    try:
        edm_pickle.read(path)
    finally:
        tracemalloc.stop()
    assert 0.9 * path.stat().st_size < made[0] < most[0] < 1.2 * path.stat().st_size


def test_reading_shows_its_progress(monkeypatch, capsys):
    edm_pickle.read(TINY)
    assert not capsys.readouterr().err                          # it took less than a second
    at_once, original = dict(delay=0, mininterval=0), edm_pickle.tqdm.wrapattr
    monkeypatch.setattr(edm_pickle.tqdm, "wrapattr", lambda *args, **flags: original(*args, **(flags | at_once)))
    edm_pickle.read(TINY)
    said = capsys.readouterr().err
    assert "reading edm-tiny.pkl:" in said and "/483k [" in said           # k: 1024 bytes
    monkeypatch.setattr(edm_pickle.processes, "MAIN", False)
    edm_pickle.read(TINY)
    assert not capsys.readouterr().err


def test_bad_arguments_are_refused():
    for config in (
        dict(model_channels=6), dict(label_dim=-1), dict(num_blocks=0), dict(channel_mult=[]),
        dict(img_resolution=34, channel_mult=[1, 1, 1]), dict(img_resolution=16, channel_mult=[1] * 6),
        dict(model_type="UNet"), dict(resample_filter=[1, 2, 1]),
        dict(embedding_type="sine"), dict(encoder_type="skip"), dict(channel_mult_noise=0), dict(VE, **ADM),
    ):
        with pytest.raises(ValueError, match=next(iter(config))):
            EDMUNet(**config)


def refused(path):
    with pytest.raises(edm_pickle.Refused) as error:
        edm_pickle.read(path)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 200
    return str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_cut_files_are_refused(tmp_path, name):
    content = (DATA / f"{name}.pkl").read_bytes()
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
@KINDS
def test_code_and_tensors_that_are_not_what_they_say_are_refused(tmp_path, kind):
    ran, ema, zip_file = tmp_path / "ran", ema_of(tiny(**kind)), io.BytesIO()
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


@KINDS
def test_other_networks_are_refused_by_name(tmp_path, kind):
    for key, value in dict(
        embedding_type="sine", encoder_type="skip", decoder_type="skip", resample_filter=[1, 2, 1], model_type="UNet",
        img_resolution=36, img_channels=1, channel_mult_noise=3, label_dropout=0.1, use_fp16="yes", sigma_data=1.0,
        heads=4, num_blocks=1.0, attn_resolutions=["16"], channel_mult="wide", model_channels=Reduced(np.dtype, "f8"),
    ).items():
        assert key in refused(write(tmp_path / "net.pkl", ema_of(tiny(**kind), **{key: value})))
    for key, value in dict(
        num_blocks=10**9, model_channels=10**6, attn_resolutions=[32], channel_mult=[1] * 9,
        img_resolution=64, label_dim=10**9,
    ).items():
        # In ADM only where there are 64 channels is there attention.
        net = tiny(**dict(kind, model_channels=64) if kind is ADM else kind)
        refused(write(tmp_path / "net.pkl", ema_of(net, **{key: value})))
    others = dict(VE, resample_filter=[1, 1]) if kind is ADM else {}
    for key, value in others.items():                           # SongUNet's, even with its default
        assert key in refused(write(tmp_path / "net.pkl", ema_of(tiny(**kind), **{key: value})))
    for size in (8, 12, 33, 136, 256, "32", [32]):
        message = refused(write(tmp_path / "net.pkl", ema_of(tiny(**kind), img_resolution=size)))
        assert f"img_resolution {size!r}, where only a multiple of 8 from 16 to 128 is read" in message
    message = refused(write(tmp_path / "net.pkl", ema_of(tiny(**kind), img_resolution=24, channel_mult=[1] * 5)))
    assert "img_resolution 24 cannot be halved 4 times" in message

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
        ema = ema_of(tiny(**kind))
        change(ema)
        assert message in refused(write(tmp_path / "net.pkl", ema))


@KINDS
def test_a_small_file_takes_little_memory(tmp_path, kind):
    for code in (
        b"}r\xff\xff\xff\x0f",                                  # an object to remember as number 2^28
        1_100_000 * b"}",
        b"}()" + 300_000 * b"\x85" + b"Nu",                     # a key of tuples in tuples
    ):
        (tmp_path / "net.pkl").write_bytes(b"\x80\x04" + code + b".")
        assert "memory" in refused(tmp_path / "net.pkl")
    with torch.device("meta"):
        ema = ema_of(tiny(**kind, model_channels=4096))

    def shrink(module):                                         # every tensor one number, repeated
        state = state_of(module)
        for kept in state["_parameters"], state["_buffers"]:
            for name, value in kept.items():
                kept[name] = None if value is None else tensor(storage(1), tuple(value.shape), (0,) * value.dim())
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


@pytest.mark.parametrize("kind", [dict(label_dim=0), ADM], ids=["vp-uncond", "adm"])
def test_a_network_of_larger_images_is_sampled_and_distilled(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(pictures, "MAX_ROWS", 1)    # the teacher's grid would take longest
    path, images = str(tmp_path / "net.pkl"), str(image_tree(tmp_path / "images", "012", n=2))
    write(path, ema_of(tiny(img_resolution=64, channel_mult=[1, 1, 1], **kind)))
    state = checkpoint.load(path)
    assert state["classes"] == ([""] if kind == dict(label_dim=0) else list("012")) and not state["settings"]
    flags = ["--teacher", path, *SHORT, "--preset", "edm", "--no-compile", "--accumulate", "2", "--batch_size", "4"]
    flags += ["--dataset", "folder", "--data_dir", images, "--gan_steps", "2", "--discriminator_warmup_steps", "1"]
    flags += ["--dfake_gen_update_ratio", "1", "--sample_every", "20"]
    for run, end in (("whole", []), ("halves", ["--max_minutes", "1e-6"]), ("halves", [])):
        assert call(train, *flags, "--resume", "--run_dir", str(tmp_path / run), "--steps", "3", *end) == 0
    whole, halves = (checkpoint.load(tmp_path / run, kind="student") for run in ("whole", "halves"))
    assert all(torch.equal(value, halves["model_ema"][key]) for key, value in whole["model_ema"].items())
    for file in path, str(tmp_path / "whole"):
        flags = ["--checkpoint", file, "--num_images", "2", "--num_steps", "1", "--device", "cpu"]
        assert call(sample, *flags, "--out", f"{tmp_path}/x.png", "--npz", f"{tmp_path}/x.npz") == 0
        assert np.load(tmp_path / "x.npz")["arr_0"].shape == (2, 64, 64, 3)
    capsys.readouterr()
    assert call(train0, "--dataset", "shapes", "--run_dir", f"{tmp_path}/x", "--init", path, "--device", "cpu") == 2
    assert "holds a EDMUNet: train0.py trains a SimpleUNet" in capsys.readouterr().err


def test_rounded_weights_keep_their_fourier_frequencies(tmp_path):
    state = checkpoint.load(DATA / "edm-tiny-ve.pkl")
    slim = checkpoint.slim(state)["model_ema"]
    assert torch.equal(slim["map_noise.freqs"], state["model_ema"]["map_noise.freqs"])
    assert all(value.dtype == torch.bfloat16 for name, value in slim.items() if name != "map_noise.freqs")


def test_images_for_a_network_without_classes_have_none_either(tmp_path):
    state = checkpoint.load(write(tmp_path / "net.pkl", ema_of(tiny(label_dim=0))))
    folder = str(image_tree(tmp_path / "images"))
    found = data.from_flags(argparse.Namespace(dataset="folder", data_dir=folder), state)
    assert found.classes == state["classes"] == [""] and not found.labels.any()


def test_numbered_classes_are_those_of_the_images_in_their_order(tmp_path, capsys):
    state = checkpoint.load(write(tmp_path / "net.pkl", ema_of(tiny())))
    flags = argparse.Namespace(dataset="folder", data_dir=str(image_tree(tmp_path / "images", ("owl", "cat", "dog"))))
    found = data.from_flags(flags, state)
    assert found.classes == state["classes"] == ["0", "1", "2"] and found.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    reds = found.images[:, 0].float().mean((1, 2)).view(3, 3).mean(1)          # of image_tree: 50 for each class made
    assert reds.round().tolist() == [50, 100, 0]
    assert "taken to be, in this order: cat, dog, owl" in capsys.readouterr().err
    for folder, names in (("two", ("cat", "dog")), ("others", ("1", "2", "3"))):
        flags.data_dir = str(image_tree(tmp_path / folder, names))
        with pytest.raises(errors.UsageError, match="those of the checkpoint are 0, 1, 2"):
            data.from_flags(flags, state)


def test_numbered_folders_go_by_their_numbers_not_by_their_order(tmp_path, capsys):
    state = checkpoint.load(write(tmp_path / "net.pkl", ema_of(tiny(label_dim=12))))
    tree = image_tree(tmp_path / "images", [str(label) for label in range(12)], n=1, size=(32, 32))
    found = data.from_flags(argparse.Namespace(dataset="folder", data_dir=str(tree)), state)
    assert found.classes == state["classes"] and found.labels.tolist() == [0, 1, 10, 11, *range(2, 10)]
    assert found.images[:6, 0, 0, 0].tolist() == [0, 50, 255, 255, 100, 150]        # as the folders are numbered
    assert "taken to be, in this order: 0, 1, 2, 3," in capsys.readouterr().err


@KINDS
def test_it_is_sampled_by_heuns_method_and_cannot_be_guided(tmp_path, capsys, kind):
    path, out = write(tmp_path / "net.pkl", ema_of(tiny(**kind))), str(tmp_path / "grid.png")
    flags = ["--device", "cpu", "--checkpoint", str(path), "--out", out]
    assert call(sample, *flags, "--num_images", "6", "--npz", str(tmp_path / "images.npz")) == 0
    net = networks.averaged(checkpoint.load(path))
    images = diffusion.heun_sample(net, image_noise(0, range(6), 32), torch.arange(6) % 3, num_steps=18)
    with np.load(tmp_path / "images.npz") as file:
        found = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    assert (found.int() - data.to_uint8(images).int()).abs().max() <= 1
    assert call(sample, *flags, "--cfg_scale", "2") == 2 and "--cfg_scale 2.0 needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, label_dim, steps", [({}, 2, 20), ({}, 0, 2), (VE, 2, 6), (VE, 0, 2), (ADM, 2, 6)],
    ids=["vp", "vp-uncond", "ve", "ve-uncond", "adm"],
)
def test_a_student_with_a_gan_resumes_bit_for_bit(tmp_path, kind, label_dim, steps):
    teacher = write(tmp_path / "net.pkl", ema_of(tiny(**kind, channel_mult=[1, 1, 1], label_dim=label_dim)))
    images = image_tree(tmp_path / "images", classes=("0", "1"))
    flags = [*SHORT, "--preset", "edm", "--accumulate", "2", "--no-compile"]
    flags += ["--teacher", str(teacher), "--dataset", "folder", "--data_dir", str(images)]
    flags += ["--save_every", "20", "--sample_every", "20"]
    if kind:
        flags += ["--dfake_gen_update_ratio", "2"]
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


def test_a_checkpoint_from_before_the_other_networks_is_rebuilt():
    old = dict(
        model_channels=8, label_dim=10, channel_mult=[2, 2, 2], channel_mult_emb=4, num_blocks=1, attn_resolutions=[16],
        sigma_data=0.5, network="EDMUNet",
    )
    assert networks.rebuild(old).config == read("edm-tiny").config


def test_a_checkpoint_names_its_network():
    for net in (EDMUNet(8, num_blocks=1), SimpleUNet(8, blocks=2)):
        assert networks.rebuild(networks.described(net)).config == net.config
    assert isinstance(networks.rebuild(dict(channels=8)), SimpleUNet)           # an older file's
    with pytest.raises(ValueError, match=r"'os\.system'"):
        networks.rebuild(dict(network="os.system"))
