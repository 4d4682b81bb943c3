"""EDM's published networks (Karras et al. 2022, arXiv 2206.00364), read without running anything that is in the file.

    state = edm_pickle.teacher("edm-cifar10-32x32-cond-vp.pkl")     # as checkpoint.load gives a teacher
    config, weights, images = edm_pickle.read("edm-cifar10-32x32-cond-vp.pkl")
    EDMUNet(**config).load_state_dict(weights)

Such a file, or a snapshot of EDM's train.py (network-snapshot-*.pkl), is a pickle that contains the source code of its
networks, which EDM's own loader runs, and a second pickle inside every tensor. Here every call that the file asks for
becomes a Call record and is never made. The configuration and the weights are then read from the records of the file's
EMA network, `ema`, and from no others.
"""

import collections
import io
import math
import os
import pickle
import pickletools

import torch
from tqdm import tqdm

from diffusion import SIGMA_MAX, SIGMA_MIN
from edm_unet import EDMUNet
from support import processes

# Ten times what the published files have. An opcode may take a hundred times its own size in memory, and hashing deeply
# nested tuples overflows Python's stack.
MOST_OPCODES, MOST_TUPLES = 1_000_000, 20_000

# Arguments of the file's network. COUNTS: integers or lists of them, passed to EDMUNet. CHOICES: the values that are
# read, by class of network; passed to EDMUNet except NOT_PASSED. IGNORED: without effect on a trained network, as the
# augmentation labels are zero and dropout is off. All others are refused. DEFAULTS: EDM's own, for those left out.
COUNTS = "model_channels", "label_dim", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions"
IGNORED = "augment_dim", "dropout"
COMMON = dict(
    img_resolution=range(16, 129, 8), img_channels=[3], label_dropout=[0], sigma_min=[0], sigma_max=[float("inf")],
    sigma_data=[0.5], use_fp16=[False, True],                   # how it was run: the weights are float32
)
CHOICES = dict(
    SongUNet=dict(
        COMMON, embedding_type=["positional", "fourier"], encoder_type=["standard", "residual"],
        decoder_type=["standard"], channel_mult_noise=[1, 2], resample_filter=[[1, 1], [1, 3, 3, 1]],
    ),
    DhariwalUNet=COMMON,
)
NOT_PASSED = "img_channels", "label_dropout", "sigma_min", "sigma_max", "decoder_type", "use_fp16"
DEFAULTS = dict(
    SongUNet=dict(label_dim=0, model_channels=128, channel_mult=[1, 2, 2, 2], num_blocks=4, attn_resolutions=[16]),
    DhariwalUNet=dict(
        label_dim=0, model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3, attn_resolutions=[32, 16, 8]
    ),
)
CIFAR10_IMAGES = 50_000, 100_000                               # the second with mirrored copies (EDM's --xflip)
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MODULES = (
    "SongUNet", "DhariwalUNet", "PositionalEmbedding", "FourierEmbedding", "Linear", "Conv2d", "GroupNorm", "UNetBlock",
    "ModuleDict",
)


class Refused(Exception):
    """A file is not read; the message is one line that says why."""


class Call:
    """Record of a call that the file asks for: its arguments, and the state that its result would be given."""

    args, state = (), None

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class Persistent(Call):
    """An object of a class whose source is in the file: (dict(class_name, state, module_src, ..),)."""


class ModuleDict(Call):
    """torch's ModuleDict, described by its state alone."""


class Parameter(Call):
    """(tensor, requires_grad, hooks)."""


class Tensor(Call):
    """(storage, offset, size, stride, ..), in elements."""


class Storage(Call):
    """(bytes,): a pickle in torch's old format, from before its zip files."""


GLOBALS = {
    "torch_utils.persistence._reconstruct_persistent_obj": Persistent,
    "torch.nn.modules.container.ModuleDict": ModuleDict,
    "torch._utils._rebuild_parameter": Parameter,
    "torch._utils._rebuild_tensor_v2": Tensor,
    "torch.storage._load_from_bytes": Storage,
    "numpy.dtype": Call, "numpy.core.multiarray.scalar": Call, "numpy._core.multiarray.scalar": Call,
    "collections.OrderedDict": collections.OrderedDict, "builtins.set": set, "dnnlib.util.EasyDict": dict,
}


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if f"{module}.{name}" not in GLOBALS:
            raise Refused(f"it asks for {f'{module}.{name}'[:80]!r}, which is not in the files of EDM's networks")
        return GLOBALS[f"{module}.{name}"]


def teacher(path):
    """The network in a file as a teacher's checkpoint; raises what read raises.

    The file names no classes, so they are named "0", "1", ...; but 32x32 images of ten classes, or of none, are taken
    to be CIFAR-10's unless the file says that they are not as many. An unconditional network gets one class with an
    empty name, and ignores its label.
    """
    config, weights, images = read(path)
    label_dim, classes = config["label_dim"], [str(label) for label in range(config["label_dim"])] or [""]
    cifar10 = config["img_resolution"] == 32 and label_dim in (0, 10)
    cifar10 = cifar10 and images.get("max_size", CIFAR10_IMAGES[0]) in CIFAR10_IMAGES
    return dict(
        kind="teacher", step=0, model_config=dict(config, network="EDMUNet"), model_ema=weights, label_dropout=0.0,
        classes=list(CIFAR10) if cifar10 and label_dim else classes,
        sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, settings=dict(dataset="cifar10") if cifar10 else {},
    )


def read(path):
    """The network in a file: EDMUNet's arguments; its state, float32; and what the file says of its training images.

    Shows a progress bar where this takes more than a second. Takes little more memory than the file is large.

    Raises:
        OSError: the file cannot be read.
        Refused: it is damaged, or its network is not one that EDMUNet implements.
    """
    try:
        size, shown = os.path.getsize(path), dict(delay=1, leave=False, disable=not processes.MAIN)
        with open(path, "rb") as file:
            # This reads the file from the disk, and the next lines only from memory.
            with tqdm.wrapattr(file, "read", size, desc=f"reading {os.path.basename(path)}", **shown) as counted:
                check_opcodes(counted)
            file.seek(0)
            content = Unpickler(file).load()
        class_name, state = described(content["ema"])
        expect(class_name, ["EDMPrecond"], "class")
        model = state["_modules"]["model"]
        arguments = configuration(state, expect(described(model)[0], list(CHOICES), "class"))
        found = {name: tensor for name, tensor in tensors(model) if name != "map_augment.weight"}
        if arguments["num_blocks"] > len(found):         # else building it might never end
            raise Refused(f"it holds {len(found)} tensors, too few for its num_blocks")
        try:
            with torch.device("meta"):
                net = EDMUNet(**arguments)
        except ValueError as error:
            raise Refused(f"its network cannot be built: {error!s:.120}") from error
        check_shapes(found, net, size)
        images = content.get("dataset_kwargs")
        weights = {name: materialise(tensor) for name, tensor in found.items()}
        return net.config, weights, images if isinstance(images, dict) else {}
    except (OSError, Refused):
        raise
    except Exception as error:                      # of many types: a damaged file can break any line above
        raise Refused(f"it is damaged, or not in the format of EDM's networks ({type(error).__name__})") from error


def check_opcodes(file):
    """Raise Refused if unpickling would take far more memory than the file; or ValueError if the pickle is cut off.

    The unpickler's memo is an array as long as the largest index in the file. In an honest file an index counts the
    objects before it, so it cannot be larger than its position in the file.
    """
    tuples = 0
    for count, (opcode, arg, position) in enumerate(pickletools.genops(file)):
        tuples += opcode.name.startswith("TUPLE")
        bomb = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and arg > position
        if bomb or count == MOST_OPCODES or tuples == MOST_TUPLES:
            raise Refused("it is made to take more memory than it is large")


def expect(value, known, what):
    """The one of the known values that this is."""
    if value not in known:
        multiples = isinstance(known, range) and f"a multiple of {known.step} from {known[0]} to {known[-1]}"
        only = multiples or " or ".join(map(repr, known))
        raise Refused(f"its network has {what} {value!r:.60}, where only {only} is read")
    return known[known.index(value)]


def described(module):
    """The class name of a module, and its state, a dict."""
    if isinstance(module, ModuleDict):
        return "ModuleDict", module.state
    (meta,) = module.args
    return meta["class_name"], meta["state"]


def configuration(state, model_type):
    """EDMUNet's arguments from the state of the module around the network, which is of this class."""
    expect(state["_init_args"], [()], "arguments without names")
    arguments, choices = dict(DEFAULTS[model_type], model_type=model_type), CHOICES[model_type]
    for name, value in state["_init_kwargs"].items():
        if name == "model_type":
            expect(value, [model_type], name)
        elif name in choices:
            value = expect(value, choices[name], name)
            if name not in NOT_PASSED:
                arguments[name] = value
        elif name in COUNTS:
            if any(type(number) is not int for number in (value if isinstance(value, list) else [value])):
                raise Refused(f"its network has {name} {value!r:.60}, where only integers are read")
            arguments[name] = value
        elif name not in IGNORED:
            raise Refused(f"its network has an argument {name!r:.60}, which {model_type} has not")
    return arguments


def tensors(module, prefix=""):
    """Yield names and Tensors of a module and of the modules inside it, except EDM's constant resampling filters."""
    class_name, state = described(module)
    if class_name not in MODULES:
        raise Refused(f"its network has a module of class {class_name!r:.60}, which EDMUNet has not")
    for name, value in (state["_parameters"] | state["_buffers"]).items():
        if value is not None and name != "resample_filter":
            yield prefix + name, value.args[0] if isinstance(value, Parameter) else value
    for name, inner in state.pop("_modules").items():           # popped, so that a module inside itself is an error
        yield from tensors(inner, f"{prefix}{name}.")


def check_shapes(found, net, file_size):
    """Raise Refused unless the Tensors have this network's names and shapes, and fit into the file."""
    wanted = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    shapes = {name: tuple(tensor.args[2]) for name, tensor in found.items()}
    wrong = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
    if wrong:
        raise Refused(f"{len(wrong)} of its tensors are not those of its arguments, {wrong[0]!r:.60} for one")
    if 4 * sum(math.prod(shape) for shape in shapes.values()) > file_size:
        raise Refused("its tensors are larger than itself")


def materialise(tensor):
    storage, offset, size, stride = tensor.args[:4]
    (content,), storage.args = storage.args, ()     # released, or all weights would be in memory twice
    if not content.startswith(b"\x80"):             # torch reads zip files too, which may unpack to far more
        raise Refused("a tensor in it is not in the format of torch's pickles")
    # set_ accepts float32 only, as_strided cannot reach outside the storage, and clone() keeps only what is used.
    flat = torch.empty(0).set_(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    if flat.numel() > len(content) // 4:
        raise Refused("a tensor in it has fewer numbers than it says")
    return flat.as_strided(size, stride, offset).clone()
