"""tools/page: in a real browser, clicked and typed at, the page draws the images of sample.py."""

import base64
import functools
import http.server
import io
import shutil
import threading

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import call
from PIL import Image
from test_export import ONE_STEP, THREE_STEPS, student

import sample
from support import checkpoint, sampling
from support.errors import UsageError
from support.randomness import image_noise
from tools import export

pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed"),
    pytest.mark.skipif(not shutil.which("npm"), reason="npm, which fetches onnxruntime-web, is not installed"),
]
READY = "progress.hidden && /^Ready|ms an image/.test(message.textContent)"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The students one.pt and three.pt, of so many steps, and their pages, one/ and three/."""
    try:
        runtime = export.fetch_runtime()
    except UsageError as error:
        if "could not fetch" not in str(error):
            raise
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "fetch_runtime", lambda: runtime)
        for name, sigmas in (("one", ONE_STEP), ("three", THREE_STEPS)):
            path = student(folder / f"{name}.pt", sigmas)
            assert call(export, "--checkpoint", path, "--page", str(folder / name)) == 0
    return folder


@pytest.fixture(scope="module")
def address(folder):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path) as browser:              # as a phone has it
        browser.send("Emulation.setDeviceMetricsOverride", width=360, height=1000, deviceScaleFactor=1, mobile=True)
        yield browser


def canvas(browser):
    browser.wait(READY)
    png = base64.b64decode(browser.value("canvas.toDataURL()").split(",")[1])
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def assert_alike(found, wanted):
    assert found.shape == wanted.shape and wanted.std() > 30
    assert (abs(found.astype(int) - wanted.astype(int)) <= 1).mean() >= 0.999


@pytest.mark.parametrize("name", ["one", "three"])
def test_a_click_draws_the_grid_of_sample_py(folder, address, browser, tmp_path, name):
    browser.open(f"{address}/{name}/")
    browser.wait(READY)
    browser.click("classes.children[0]")
    found = canvas(browser)
    assert call(sample, "--checkpoint", f"{folder}/{name}.pt", "--out", f"{tmp_path}/grid.png", "--device", "cpu") == 0
    assert_alike(found, np.asarray(Image.open(tmp_path / "grid.png")))
    assert browser.value("message.textContent").startswith("100 images of all classes, seed 0: ")
    assert browser.value("document.documentElement.scrollWidth") <= 360             # nothing sticks out
    fetched = browser.value("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(fetched) >= 5 and all(name.startswith((address, "data:")) for name in fetched)
    browser.click("save")
    downloaded = Image.open(browser.downloaded("all-classes-seed-0.png")).convert("RGB")
    assert (np.asarray(downloaded) == found).all()


def test_keys_choose_the_class_the_seed_and_the_walk(folder, address, browser):
    sample = sampling.sampler(checkpoint.load(folder / "one.pt"), torch.device("cpu"))

    def images(seed, walk=0.0):                     # uint8 [20, 32, 32, 3]
        labels = torch.full((20,), 3)
        return sampling.generate(sample, seed, labels, 20, torch.device("cpu"), walk=walk).permute(0, 2, 3, 1).numpy()

    def pressed(*keys):                             # the same, of the canvas: 4 rows of 5
        browser.press(*keys)
        cells = canvas(browser)[2:, 2:].reshape(4, 34, 5, 34, 3).swapaxes(1, 2)[:, :, :32, :32]
        return cells.reshape(20, 32, 32, 3)

    browser.open(f"{address}/one/")
    browser.wait(READY)
    assert_alike(pressed(*["Tab"] * 5, "Enter"), images(0))             # past all and three classes
    assert browser.value("document.querySelector('[aria-pressed=true]').textContent") == "class 3"
    assert_alike(pressed(*["Tab"] * 7, "7"), images(7))
    assert_alike(pressed("Tab", "End"), images(8))
    assert_alike(pressed("Home", *["PageUp"] * 3), images(7, walk=0.3))
    assert browser.value("canvas.ariaLabel") == "20 images of class 3, seed 7, 30 % of the way to seed 8"


def test_the_noise_of_the_page_is_numpys(address, browser):
    browser.open(f"{address}/one/")
    for seed, image, draw, walk in [(0, 0, 0, 0), (1, 99, 2, 0), (2**32 - 1, 5, 0, 0.3), (10**12, 7, 1, 0)]:
        call = f"imageNoise({seed}, {image}, {draw}, {walk})"
        found = np.array(browser.value(f"import('./noise.js').then(({{imageNoise}}) => Array.from({call}))"))
        wanted = image_noise(seed, [image], draw, walk).flatten().double().numpy()
        exact = (abs(wanted) < 3.65) & (walk == 0)                                  # beyond by the browser's logarithm
        assert (found[exact] == wanted[exact]).all() and np.allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_where_webassembly_is_missing_the_page_says_so(address, browser):
    browser.send("Page.enable")
    browser.send("Page.addScriptToEvaluateOnNewDocument", source="delete globalThis.WebAssembly")
    browser.open(f"{address}/one/")
    browser.wait("message.textContent")
    assert browser.value("message.textContent") == (
        "This page cannot draw here: it needs WebAssembly, which this browser lacks or has switched off.")
