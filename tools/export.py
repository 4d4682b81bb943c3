"""Export a student as one ONNX file that any runtime draws with, or as a page that draws in the browser.

    pip install -r requirements-export.txt
    python -m tools.export --checkpoint runs/dmd2 --out generator.onnx
    python -m tools.export --page page && python -m http.server --directory page      # http://localhost:8000

The file needs nothing of this project:

    import numpy as np, onnxruntime
    from PIL import Image
    generator = onnxruntime.InferenceSession("generator.onnx")
    z = np.random.default_rng(0).standard_normal((10, 3, 32, 32), dtype=np.float32)
    images, = generator.run(["images"], {"z": z, "labels": np.arange(10)})
    Image.fromarray(np.concatenate(list(images), axis=1)).show()

Inputs: z, unit noise, float32 [N, 3, H, W]; labels, int64 [N]; of a student of several steps also renoise, fresh unit
noise, float32 [N, steps - 1, 3, H, W]. Output: images, uint8 [N, H, W, 3]. The noise levels are inside; they, the
names of the classes and the checkpoint's SHA-256 are in the file's metadata.
"""

import argparse
import base64
import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import diffusion
from support import checkpoint, errors, files, flags, networks, resume, winograd
from support.data import to_uint8
from support.randomness import image_noise
from support.sampling import not_finite, refuse

PAGE = Path(__file__).resolve().parent / "page"
RUNTIME = "onnxruntime-web@1.30.0"                  # and the SHA-512 of its archive, as npm publishes it
RUNTIME_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
RUNTIME_FILES = {                                   # on the page <- in the archive; .js, as not all servers know .mjs
    "onnxruntime-wasm.js": "package/dist/ort.wasm.bundle.min.mjs",
    "onnxruntime-wasm.wasm": "package/dist/ort-wasm-simd-threaded.wasm",
    "onnxruntime-webgpu.js": "package/dist/ort.webgpu.bundle.min.mjs",
    "onnxruntime-webgpu.wasm": "package/dist/ort-wasm-simd-threaded.asyncify.wasm",
}
CHECKED_IMAGES = 20


class Generator(nn.Module):
    """What is exported: (z, labels, renoise) -> images, uint8 [N, H, W, 3], and float [N, 3, H, W] if asked for.

    fast: Winograd convolutions, with fewer multiplications, for browsers; native runtimes have their own.
    """

    def __init__(self, state, float_output=False, fast=False):
        super().__init__()
        self.net, self.sigmas = networks.averaged(state), state["denoising_sigmas"]
        self.float_output = float_output
        if fast:
            winograd.replace(self.net)

    @torch.no_grad()
    def draw(self, z, labels, renoise=None):
        """The images, float [N, 3, H, W], about [-1, 1]."""
        return diffusion.few_step_sample(self.net, z, labels, self.sigmas, lambda i: renoise[:, i - 1])

    def forward(self, z, labels, renoise=None):
        x = self.draw(z, labels, renoise)
        images = to_uint8(x).permute(0, 2, 3, 1)
        return (images, x) if self.float_output else images

    def example(self, n):
        """Inputs for n images: the noise of seed 0, the classes in turn."""
        size = self.net.image_size
        inputs = dict(z=image_noise(0, range(n), size), labels=torch.arange(n) % max(1, self.net.label_dim))
        if len(self.sigmas) > 1:
            draws = range(1, len(self.sigmas))
            inputs["renoise"] = torch.stack([image_noise(0, range(n), size, draw) for draw in draws], dim=1)
        return inputs


def to_onnx(generator, half, metadata):
    """The generator as an onnx.ModelProto for any number of images.

    Args:
        half: store the weights of convolutions and linear layers as float16; they are computed with in float32.
        metadata: name -> text.
    """
    import onnx

    example, batch = generator.example(2), {0: torch.export.Dim("N")}
    with warnings.catch_warnings():                 # torch's own: that two inputs have one N
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            generator, kwargs=example, dynamic_shapes=dict.fromkeys(example, batch), input_names=list(example),
            output_names=["images", "float"][: 1 + generator.float_output], dynamo=True, verbose=False,
        )
    model = program.model_proto
    if half:
        halve(model.graph, {f"net.{name}" for name, p in generator.net.named_parameters() if p.ndim > 1})
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output, model.graph):
        part.ClearField("metadata_props")           # stack traces, with the paths of this machine
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    return model


def halve(graph, names):
    """Store the weights named so as float16, each cast to float32 before its use."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = list(graph.node)
    for weight in graph.initializer:
        if weight.name in names:
            name = weight.name
            nodes.insert(0, helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
            with np.errstate(over="ignore"):        # of weights beyond 65504; check() refuses the file
                half = numpy_helper.to_array(weight).astype(np.float16)
            weight.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
    graph.ClearField("node")
    graph.node.extend(nodes)


def check(model, generator):
    """Compare the file's images with torch's and say how far apart they are.

    Raises:
        NonFiniteError: torch's images hold NaN or infinity.
        UsageError: more than one value in a thousand is more than 1 of 255 apart.
    """
    import onnxruntime

    example = generator.example(CHECKED_IMAGES)
    x = generator.draw(**example)
    refuse(not_finite(x))
    wanted = to_uint8(x).permute(0, 2, 3, 1)
    session = onnxruntime.InferenceSession(model)
    found = session.run(None, {name: value.numpy() for name, value in example.items()})
    if generator.float_output:
        found, y = found
        print(f"largest difference from torch before rounding to uint8: {abs(x.numpy() - y).max():.1e}")
    else:
        found, = found
    apart = (torch.from_numpy(found).int() - wanted.int()).abs()
    line = (
        f"largest difference from torch: {apart.max()} of 255, {100 * (apart > 0).double().mean():.3f} % of the values "
        f"of {CHECKED_IMAGES} images differ"
    )
    if (apart > 1).double().mean() > 1e-3:
        raise errors.UsageError(f"{line}: nothing was written; --no-half may come nearer")
    print(line)


def fetch_runtime():
    """The files of onnxruntime-web, name -> bytes, from npm and its registry, by their pinned hash."""
    npm, (name, _, version) = shutil.which("npm"), RUNTIME.partition("@")
    if not npm:
        raise errors.UsageError(f"--page needs npm, which comes with Node.js, to fetch {RUNTIME}")
    with tempfile.TemporaryDirectory() as folder:
        text = dict(encoding="utf-8", errors="replace")
        done = subprocess.run([npm, "pack", RUNTIME], cwd=folder, capture_output=True, **text)
        archive = Path(folder) / f"{name}-{version}.tgz"
        if done.returncode or not archive.exists():
            reason = next((line for line in done.stderr.splitlines() if "code" not in line), "")
            raise errors.UsageError(f"npm could not fetch {RUNTIME}: {reason}")
        content = archive.read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != RUNTIME_SHA512:
        raise errors.UsageError(f"what npm fetched as {RUNTIME} does not have the SHA-512 that is expected")
    with tarfile.open(fileobj=io.BytesIO(content)) as members:
        return {name: members.extractfile(member).read() for name, member in RUNTIME_FILES.items()}


def write_page(path, model, state, runtime):
    """A folder that any static server shows: the page, the model, and onnxruntime-web with its licences."""
    import onnxruntime

    contents = {"generator.onnx": model, **runtime}
    sizes = {name: len(content) for name, content in contents.items()}
    size, steps = networks.image_size(state["model_config"]), len(state["denoising_sigmas"])
    about = dict(classes=state["classes"], size=size, steps=steps, bytes=sizes)
    contents["generator.json"] = json.dumps(about).encode()
    contents |= {file.name: file.read_bytes() for file in PAGE.iterdir()}
    for name in ("LICENSE", "ThirdPartyNotices.txt"):
        contents[f"onnxruntime-{name}"] = (Path(onnxruntime.__file__).parent / name).read_bytes()
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as temporary:
        folder = Path(temporary) / path.name
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        folder.rename(path)


def parse_args(argv=None):
    parser = flags.Parser(
        prog="python -m tools.export", description="Export a student as an ONNX file, or as a page for the browser."
    )
    parser.add_argument(
        "--checkpoint", type=flags.path, default="runs/dmd2", help="run folder or checkpoint of a student"
    )
    parser.add_argument(
        "--out", type=flags.output(), help="the ONNX file; default: generator.onnx, or none with --page"
    )
    parser.add_argument(
        "--page", type=flags.output("folder", new=True),
        help="a new folder for a page that draws in the browser; default: none",
    )
    parser.add_argument(
        "--half", action=argparse.BooleanOptionalAction, default=True,
        help="store weights as float16, half the size; computed with in float32 all the same",
    )
    parser.add_argument(
        "--float_output", action="store_true", help="also an output `float`, [N, 3, H, W], about [-1, 1], not clipped"
    )
    args = parser.parse_args(argv)
    args.checkpoint = checkpoint.or_shipped(args.checkpoint, "runs/dmd2", "student.pt")
    if not args.out and not args.page:
        args.out = "generator.onnx"
    return args


def main(argv=None):
    args = parse_args(argv)
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if not importlib.util.find_spec(name):
            raise errors.UsageError(f"exporting needs {name}: pip install -r requirements-export.txt")
    state = checkpoint.load(args.checkpoint, kind="student")
    with resume.restoring(args.checkpoint):
        generator = Generator(state, args.float_output)
    runtime = fetch_runtime() if args.page else {}
    metadata = dict(
        classes=json.dumps(state["classes"]), sigmas=json.dumps(state["denoising_sigmas"]),
        checkpoint_sha256=files.sha256(checkpoint.find(args.checkpoint)),
    )
    models = {}
    for path, fast in ((args.out, False), (args.page, True)):
        if path:
            exported = Generator(state, args.float_output, fast) if fast else generator
            models[path] = to_onnx(exported, args.half, metadata).SerializeToString()
            check(models[path], generator)
    if args.out:
        files.write(args.out, lambda file: file.write(models[args.out]))
    if args.page:
        write_page(args.page, models[args.page], state, runtime)
    for path, model in models.items():
        print(f"{path}: {len(model) / 1e6:.1f} MB")


if __name__ == "__main__":
    errors.run(main)
