"""tools/export.py: the file, and the page in a browser, draw what torch draws; wrong calls leave nothing behind."""

import base64
import copy
import functools
import http.server
import io
import json
import os
import re
import shutil
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import call, save_net, trained_net
from PIL import Image

import diffusion
import sample
from edm_unet import EDMUNet
from support import checkpoint, data, networks, sampling, winograd
from support.errors import UsageError
from support.randomness import image_noise
from tools import export

CLASSES = [f"class {i}" for i in range(10)]
ONE_STEP, THREE_STEPS = [3.0], [3.0, 1.5, 0.4]


def contrasty_student(path, sigmas=ONE_STEP, kind="student", seed=0, size=32):
    """A checkpoint of a small network whose layers all matter, and whose images have the contrast of real ones."""
    torch.manual_seed(seed)
    net = trained_net(channels=8, label_dim=len(CLASSES), image_size=size)
    net.out_conv.weight.data *= 5
    return save_net(path, net, kind=kind, classes=CLASSES, denoising_sigmas=sigmas)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two students and their files: of one step as by default; of three and 16x16, in float32, with output `float`."""
    folder = tmp_path_factory.mktemp("export")
    contrasty_student(folder / "one.pt"), contrasty_student(folder / "three.pt", THREE_STEPS, size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(export, "--checkpoint", "one.pt") == 0
        os.rename("generator.onnx", "one.onnx")
        assert call(export, "--checkpoint", "three.pt", "--out", "three.onnx", "--no-half", "--float_output") == 0
    return folder


def inputs(n, sigmas):
    size = 32 if len(sigmas) == 1 else 16
    noise = [image_noise(1, range(n), size, i) for i in range(len(sigmas))]
    renoise = dict(renoise=torch.stack(noise[1:], dim=1)) if len(sigmas) > 1 else {}
    return dict(z=noise[0], labels=torch.arange(n) % len(CLASSES), **renoise)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("name, sigmas", [("one", ONE_STEP), ("three", THREE_STEPS)])
def test_the_files_images_are_those_of_the_network(folder, name, sigmas, n):
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
    given = inputs(n, sigmas)
    images, *floats = session.run(None, {name: value.numpy() for name, value in given.items()})
    net, renoise = networks.averaged(checkpoint.load(folder / f"{name}.pt")), given.get("renoise")
    wanted = diffusion.few_step_sample(net, given["z"], given["labels"], sigmas, lambda i: renoise[:, i - 1])
    apart = abs(images.astype(int) - data.to_uint8(wanted).permute(0, 2, 3, 1).numpy())
    assert images.dtype == np.uint8 and images.std() > 30
    assert apart.max() <= 1 and (apart == 0).mean() > (0.97 if name == "one" else 0.999)
    assert all(np.abs(x - wanted.numpy()).max() < 1e-4 for x in floats) and len(floats) == (name == "three")


def test_the_file_tells_what_it_holds_and_not_where_it_was_made(folder):
    content = (folder / "one.onnx").read_bytes()
    about = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
    assert json.loads(about["classes"]) == CLASSES and json.loads(about["sigmas"]) == ONE_STEP
    assert len(about["checkpoint_sha256"]) == 64 and b".py" not in content


def test_weights_are_stored_as_float16_and_all_else_is_float32(folder):
    graph = onnx.load(folder / "one.onnx").graph
    kinds = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    net = networks.averaged(checkpoint.load(folder / "one.pt"))
    halves = {f"net.{name}.half" for name, parameter in net.named_parameters() if parameter.ndim > 1}
    assert {name for name, kind in kinds.items() if kind == "FLOAT16"} == halves
    assert {node.op_type for node in graph.node if halves & set(node.input)} == {"Cast"}


def test_a_file_that_does_not_draw_what_torch_draws_is_not_written(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "to_onnx", lambda *how: onnx.load(folder / "one.onnx"))
    other = contrasty_student(tmp_path / "s.pt", seed=1)
    assert call(export, "--checkpoint", other, "--out", f"{tmp_path}/g.onnx") == 2
    assert "largest difference" in capsys.readouterr().err and os.listdir(tmp_path) == ["s.pt"]


def test_images_that_are_not_finite_are_not_exported(folder, tmp_path, monkeypatch, capsys):
    state = checkpoint.load(contrasty_student(tmp_path / "s.pt"))
    state["model_ema"]["label_embedding.weight"][3] = float("inf")
    checkpoint.save(tmp_path / "s.pt", state)
    monkeypatch.setattr(export, "to_onnx", lambda *how: onnx.load(folder / "one.onnx"))
    monkeypatch.setattr(export, "fetch_runtime", lambda: {})
    assert call(export, "--checkpoint", f"{tmp_path}/s.pt", f"--out={tmp_path}/g", f"--page={tmp_path}/page") == 1
    assert "error: 2 of 20 images hold NaN or infinity" in capsys.readouterr().err and os.listdir(tmp_path) == ["s.pt"]


def test_wrong_calls_end_in_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch):
    def refused(words, *flags):
        before = sorted(tmp_path.rglob("*"))
        assert call(export, *flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error and sorted(tmp_path.rglob("*")) == before

    good, out, page = contrasty_student(tmp_path / "s.pt"), f"--out={tmp_path}/g.onnx", f"--page={tmp_path}/page"
    (tmp_path / "other").write_text("no checkpoint")
    teacher = contrasty_student(tmp_path / "t.pt", kind="teacher")
    refused(f"{teacher} holds a teacher, but a student is needed", "--checkpoint", teacher, out)
    refused(f"{tmp_path}/other is not a checkpoint", "--checkpoint", f"{tmp_path}/other", out)
    refused(f"no checkpoint at {tmp_path}/none: no such file", "--checkpoint", f"{tmp_path}/none", out)
    refused(f"cannot write {tmp_path}: it is a folder", "--checkpoint", good, "--out", str(tmp_path))
    refused("argument --page: '", "--checkpoint", good, "--page", f"{good}/page")
    refused(f"--page: {tmp_path} is there already", "--checkpoint", good, "--page", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("--page needs npm", "--checkpoint", good, out, page)
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
    shutil.copy("one.onnx", "generator.onnx")
    monkeypatch.setattr(Image.Image, "show", lambda image: shown.append(image.size))
    code = re.search("nothing of this project:\n\n(.*?)\n\n", export.__doc__, re.DOTALL)[1]
    exec(re.sub("(?m)^    ", "", code), {})
    assert shown == [(320, 32)]


READY = "progress.hidden && /^Ready|ms an image/.test(message.textContent)"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder, and the address of a server of it."""
    if not CHROMIUM:
        pytest.skip("no Chromium is installed")
    folder = tmp_path_factory.mktemp("site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def address(folder, site):
    """That of the students' pages, one/ and three/."""
    pages, address = site
    if not shutil.which("npm"):
        pytest.skip("npm, which fetches onnxruntime-web, is not installed")
    try:
        runtime = export.fetch_runtime()
    except UsageError as error:
        if "could not fetch" not in str(error):
            raise
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "fetch_runtime", lambda: runtime)
        assert call(export, "--checkpoint", f"{folder}/one.pt", "--page", f"{pages}/one") == 0
        patch.setattr(export, "to_onnx", lambda *how: onnx.load(folder / "three.onnx"))
        flags = "--page", f"{pages}/three", "--float_output"
        assert call(export, "--checkpoint", f"{folder}/three.pt", *flags) == 0
    return address


# In place of onnxruntime-web: each value of an image is how many images it draws at a time. It throws a number, as
# WebAssembly does, for FAULT.
STAND_IN = b"""
export const env = {wasm: {}}
export class Tensor { constructor(kind, data, dims) { Object.assign(this, {data, dims}) } }
export const InferenceSession = {create: async () => ({run: async ({z: {dims: [n, c, h, w]}, labels}) => {
  if (FAULT) throw 7
  return {images: {data: new Uint8Array(n * h * w * c).fill(n)}}
}})}
"""


@pytest.fixture
def stand_in(site):
    """A function (classes, size, fault) -> address and folder of a page whose network is STAND_IN."""
    pages, address = site
    path = pages / "stand_in"

    def make(classes=CLASSES, size=32, fault=b"false"):
        state = dict(model_config=dict(image_size=size), denoising_sigmas=ONE_STEP, classes=classes)
        runtime = dict.fromkeys(export.RUNTIME_FILES, b" ") | {"onnxruntime-wasm.js": STAND_IN.replace(b"FAULT", fault)}
        export.write_page(path, b" ", state, runtime)
        return f"{address}/{path.name}/", path

    yield make
    shutil.rmtree(path)


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path) as browser:              # as a phone has it
        browser.send("Emulation.setDeviceMetricsOverride", width=360, height=1000, deviceScaleFactor=1, mobile=True)
        yield browser


def on_each_page(browser, script):
    browser.send("Page.enable")
    browser.send("Page.addScriptToEvaluateOnNewDocument", source=script)


def canvas(browser):
    browser.wait(READY)
    png = base64.b64decode(browser.value("canvas.toDataURL()").split(",")[1])
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def assert_same_picture(found, wanted):
    assert found.shape == wanted.shape and wanted.std() > 30
    assert abs(found.astype(int) - wanted.astype(int)).max() <= 1


@pytest.mark.parametrize("name", ["one", "three"])
def test_a_click_draws_the_grid_of_sample_py(folder, address, browser, tmp_path, name):
    browser.open(f"{address}/{name}/")
    browser.wait(READY)
    browser.click("classes.children[0]")
    found = canvas(browser)
    assert call(sample, "--checkpoint", f"{folder}/{name}.pt", "--out", f"{tmp_path}/grid.png", "--device", "cpu") == 0
    assert_same_picture(found, np.asarray(Image.open(tmp_path / "grid.png")))
    assert browser.value("message.textContent").startswith("100 images of all classes, seed 0: ")
    assert browser.value("document.documentElement.scrollWidth") <= 360             # nothing sticks out
    fetched = browser.value("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(fetched) >= 3 and all(name.startswith((address, "data:")) for name in fetched)
    browser.click("save")
    downloaded = Image.open(browser.downloaded("all-classes-seed-0.png")).convert("RGB")
    assert (np.asarray(downloaded) == found).all()


def test_keys_choose_the_class_the_seed_and_the_walk(folder, address, browser):
    sample = sampling.sampler(checkpoint.load(folder / "one.pt"), torch.device("cpu"))

    def images(seed, walk=0.0):                     # uint8 [20, 32, 32, 3]
        labels = torch.full((20,), 3)
        made = sampling.generate(sample, 32, seed, labels, 20, torch.device("cpu"), walk=walk)
        return made.permute(0, 2, 3, 1).numpy()

    def pressed(*keys):                             # the same, of the canvas: 4 rows of 5
        browser.press(*keys)
        cells = canvas(browser)[2:, 2:].reshape(4, 34, 5, 34, 3).swapaxes(1, 2)[:, :, :32, :32]
        return cells.reshape(20, 32, 32, 3)

    browser.open(f"{address}/one/")
    browser.wait(READY)
    assert_same_picture(pressed(*["Tab"] * 5, "Enter"), images(0))             # past all and three classes
    assert browser.value("document.querySelector('[aria-pressed=true]').textContent") == "class 3"
    assert_same_picture(pressed(*["Tab"] * 7, "7"), images(7))
    assert_same_picture(pressed("Tab", "End"), images(8))
    assert_same_picture(pressed("Home", *["PageUp"] * 3), images(7, walk=0.3))
    assert browser.value("canvas.ariaLabel") == "20 images of class 3, seed 7, 30 % of the way to seed 8"


def test_the_noise_of_the_page_is_numpys(address, browser):
    browser.open(f"{address}/one/")
    browser.wait(READY)                             # its service worker may have loaded it anew
    for seed, image, draw, walk in [(0, 0, 0, 0), (1, 99, 2, 0), (2**32 - 1, 5, 0, 0.3), (10**12, 7, 1, 0)]:
        call = f"imageNoise({seed}, {image}, 32, {draw}, {walk})"
        found = np.array(browser.value(f"import('./noise.js').then(({{imageNoise}}) => Array.from({call}))"))
        wanted = image_noise(seed, [image], 32, draw, walk).flatten().double().numpy()
        exact = (abs(wanted) < 3.65) & (walk == 0)                                  # beyond by the browser's logarithm
        assert (found[exact] == wanted[exact]).all() and np.allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_where_webassembly_is_missing_the_page_says_so(address, browser):
    on_each_page(browser, "delete globalThis.WebAssembly")
    browser.open(f"{address}/one/")
    browser.wait("message.textContent")
    assert browser.value("message.textContent") == (
        "This page cannot draw here: the browser lacks WebAssembly, or it is switched off.")


def said(browser):
    """What the page says when it has drawn images of all classes."""
    browser.wait(READY)
    browser.click("classes.children[0]")
    browser.wait(READY)
    return browser.value("message.textContent")


def test_threads_draw_though_the_server_sends_no_headers_and_progress_is_shown(address, browser):
    browser.open(f"{address}/one/")
    browser.wait(READY)
    assert browser.value("crossOriginIsolated")
    browser.value("""void new MutationObserver((all) => all.forEach(() => seen.push([progress.hidden, progress.value])))
        .observe(progress, {attributes: true}, globalThis.seen = [])""")
    n = browser.value("navigator.hardwareConcurrency")
    assert said(browser).endswith(f" ms an image, {n} thread{'s' * (n > 1)}.")
    shown = [value for hidden, value in browser.value("seen") if not hidden]
    assert shown == sorted(shown) and {0, 4, 20, 84} <= {*shown}


@pytest.mark.parametrize(("how", "isolated"), [
    ("delete Navigator.prototype.serviceWorker", False),                            # a private window, or http
    ("ServiceWorkerContainer.prototype.register = () => Promise.reject(Error('refused'))", False),
    ("Object.defineProperty(ServiceWorkerContainer.prototype, 'ready', {value: new Promise(() => {})}); "
     "globalThis.setTimeout = (run) => run()", False),                              # it waits some seconds, here none
    ("Object.defineProperty(globalThis, 'sessionStorage', {get() { throw Error('blocked') }})", False),
    ("Object.defineProperty(navigator, 'gpu', {value: {requestAdapter: async () => ({})}})", True),     # no real one
])
def test_what_the_browser_lacks_is_done_without(folder, address, browser, how, isolated):
    on_each_page(browser, how)
    browser.open(f"{address}/one/")
    threads = browser.value("navigator.hardwareConcurrency") if isolated else 1
    assert said(browser).endswith(f" ms an image, {threads} thread{'s' * (threads > 1)}.")
    assert browser.value("crossOriginIsolated") == isolated
    sample = sampling.sampler(checkpoint.load(folder / "one.pt"), torch.device("cpu"))
    images = sampling.generate(sample, 32, 0, torch.arange(100) % 10, 100, torch.device("cpu"))
    assert_same_picture(canvas(browser)[2:34, 2:34], images[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("adapter", ["{isFallbackAdapter: true}", "{info: {isFallbackAdapter: true}}"])
def test_a_gpu_in_software_is_not_used(stand_in, browser, adapter):
    gpu = f"{{requestAdapter: async () => ({adapter})}}"
    on_each_page(browser, f"Object.defineProperty(navigator, 'gpu', {{value: {gpu}}})")
    browser.open(stand_in()[0])
    browser.wait(READY)
    fetched = browser.value("performance.getEntriesByType('resource').map((entry) => entry.name).join()")
    assert "onnxruntime-wasm.wasm" in fetched and "webgpu" not in fetched


def test_a_worker_that_does_not_load_is_told_however_long_the_files_take(stand_in, browser):
    on_each_page(browser, """{
        const {fetch} = globalThis
        globalThis.fetch = async (name) => {
          if (name.endsWith('.onnx')) await new Promise((resolve) => setTimeout(resolve, 500))
          return fetch(name)
        }
    }""")
    page, path = stand_in()
    (path / "worker.js").unlink()
    browser.open(page)
    browser.wait("message.textContent === 'This page cannot draw here: its worker does not load'")


def test_after_a_failure_the_page_goes_on(stand_in, browser):
    browser.open(stand_in(fault=b"labels.data[0] === 3n")[0])
    browser.wait(READY)
    browser.click("classes.children[4]")
    browser.wait("message.textContent === 'This page cannot draw here: 7'")
    browser.click("classes.children[5]")
    browser.wait("message.textContent.startsWith('20 images of class 4, seed 0: ')")


@pytest.mark.parametrize("instead", ["nothing", "a page"])
def test_the_service_worker_goes_with_its_page(stand_in, browser, instead):
    page, path = stand_in()
    browser.open(page)
    browser.wait(f"crossOriginIsolated && {READY}")
    shutil.rmtree(path)
    path.mkdir()
    if instead == "a page":                         # as of a server that has one for every address
        (path / "isolate.js").mkdir()
    (path / "index.html").write_text("another site")
    browser.open(f"{page}?now")                     # a visit: the same address would reload
    browser.wait("document.body.textContent === 'another site'")
    assert not browser.value("crossOriginIsolated")
    assert browser.value("navigator.serviceWorker.getRegistrations().then((all) => all.length)") == 0


def test_of_many_classes_the_first_100_are_shown(stand_in, browser):
    browser.open(stand_in([f"class {i}" for i in range(1000)])[0])
    assert said(browser).startswith("100 images of the first 100 of 1000 classes, seed 0: ")
    assert canvas(browser).shape == (3402, 36, 3)
    assert browser.value("classes.children[0].textContent") == "the first 100 of 1000"
    assert browser.value("classes.children.length") == 1001 and browser.value("classes.clientHeight") < 300
    assert browser.value("document.documentElement.scrollWidth") <= 360


def test_a_network_without_classes_draws_images(stand_in, browser):
    browser.open(stand_in([""])[0])
    assert said(browser).startswith("20 images, seed 0: ")
    assert browser.value("[...classes.children].map((button) => button.textContent)") == ["images"]
    browser.click("save")
    browser.downloaded("images-seed-0.png")


@pytest.mark.parametrize(("size", "first", "most", "all_classes", "one_class"), [
    (32, 4, 16, (684, "pixelated"), (344, "pixelated")),                            # twice as large, 342 and 172
    (64, 1, 4, (662, "pixelated"), (664, "pixelated")),                             # 662, and twice 332
    (128, 1, 1, (684, "auto"), (652, "pixelated")),                                 # less than 1302, and 652
])
def test_the_canvas_fits_and_large_images_are_drawn_a_few_at_a_time(
    stand_in, browser, size, first, most, all_classes, one_class
):
    def shown():
        return tuple(browser.value("[canvas.clientWidth, getComputedStyle(canvas).imageRendering]"))

    narrow, wide = (dict(width=width, height=1000, deviceScaleFactor=1, mobile=True) for width in (360, 1000))
    browser.send("Emulation.setDeviceMetricsOverride", **wide)
    browser.open(stand_in(size=size)[0])
    said(browser)
    drawn = canvas(browser)[2 :: size + 2, 2 :: size + 2]
    assert (drawn[0, 0, 0], drawn[:10, :10].max()) == (first, most) and shown() == all_classes
    browser.send("Emulation.setDeviceMetricsOverride", **narrow)
    browser.wait("canvas.clientWidth === 328 && canvas.style.imageRendering === 'auto'")
    browser.send("Emulation.setDeviceMetricsOverride", **wide)
    browser.click("classes.children[1]")            # 5 columns
    canvas(browser)
    assert shown() == one_class


@pytest.mark.parametrize("size", [2, 4, 6, 8, 32])
def test_winograds_convolution_is_the_convolution(size):
    conv, x = torch.nn.Conv2d(16, 24, 3, padding=1), torch.randn(2, 16, size, size)
    with torch.no_grad():
        assert torch.allclose(winograd.Winograd(conv)(x), conv(x), atol=1e-5)


EDM = dict(model_channels=16, channel_mult=[1, 1, 1], num_blocks=1, label_dim=3, img_resolution=16)
VE = dict(embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1])


@pytest.mark.parametrize("net", [
    lambda: trained_net(channels=16, label_dim=3, image_size=16), lambda: EDMUNet(**EDM), lambda: EDMUNet(**EDM, **VE),
    lambda: EDMUNet(**EDM, model_type="DhariwalUNet"),
], ids=["SimpleUNet", "vp", "ve", "adm"])
def test_a_network_draws_the_same_with_winograds_convolutions(net):
    net, x = net(), torch.randn(2, 3, 16, 16)
    fast = copy.deepcopy(net)
    winograd.replace(fast)
    assert any(isinstance(module, winograd.Winograd) for module in fast.modules())
    with torch.no_grad():
        wanted, found = (network(x, torch.full((2,), 3.0), torch.tensor([0, 2])) for network in (net, fast))
    assert wanted.std() > 0.1 and torch.allclose(found, wanted, atol=1e-4)


def test_other_convolutions_stay():
    class Other(torch.nn.Conv2d):
        pass

    others = [dict(stride=2), dict(padding=0), dict(dilation=2), dict(groups=2), dict(bias=False)]
    others += [dict(padding_mode="circular"), dict(kernel_size=5)]
    plain = dict(kernel_size=3, padding=1)
    convs = [torch.nn.Conv2d(32, 32, **plain | other) for other in others] + [Other(32, 32, **plain)]
    net = torch.nn.Sequential(*convs, torch.nn.Conv2d(32, 32, **plain))
    winograd.replace(net)
    assert [*net][:-1] == convs and isinstance(net[-1], winograd.Winograd)
