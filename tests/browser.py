"""A headless Chromium, driven by the DevTools protocol over a pipe: needs nothing but the browser."""

import contextlib
import json
import os
import shutil
import signal
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (                                           # no requests for updates; as root no sandbox is possible
    "--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", *(["--no-sandbox"] * (os.getuid() == 0)),
)
KEYS = dict(Tab=9, Enter=13, PageUp=33, End=35, Home=36)        # Windows key codes, which Chromium expects
SECONDS = 120                                       # the longest that a test waits


class NavigatedError(Exception):
    """The page was left before a call had its answer."""


class Browser:
    """One tab, as a context manager; its profile and its downloads go to a folder."""

    def __init__(self, folder):
        self.folder, self.calls, self.session, self.received = folder, 0, {}, b""

    def __enter__(self):
        (commands, self.commands), (self.answers, answers) = os.pipe(), os.pipe()
        null = os.open(os.devnull, os.O_RDWR)
        self.process = os.posix_spawn(
            CHROMIUM, [CHROMIUM, *FLAGS, f"--user-data-dir={self.folder}/profile"], os.environ, setpgroup=0,
            file_actions=[(os.POSIX_SPAWN_DUP2, *ends) for ends in ((null, 1), (null, 2), (commands, 3), (answers, 4))],
        )
        for end in (null, commands, answers):
            os.close(end)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = dict(sessionId=self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.folder))
        return self

    def __exit__(self, *error):
        os.killpg(self.process, signal.SIGKILL)     # with its renderers
        os.waitpid(self.process, 0)
        os.close(self.commands)
        os.close(self.answers)

    def send(self, method, **params):
        """Call a method of the DevTools protocol and return its result."""
        self.calls += 1
        message = dict(id=self.calls, method=method, params=params, **self.session)
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.received:
                part = os.read(self.answers, 2**16)
                assert part, "the browser has ended"
                self.received += part
            answer, _, self.received = self.received.partition(b"\0")
            answer = json.loads(answer)
            if answer.get("id") == self.calls:      # else an event
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise NavigatedError(answer["error"]["message"])
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression):
        """The value of a JavaScript expression, awaited where it is a promise."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition):
        """Wait until a JavaScript expression is true, of this page or of the one that it loads next."""
        for _ in range(50 * SECONDS):
            with contextlib.suppress(NavigatedError):
                if self.value(f"(() => {{ try {{ return !!({condition}) }} catch {{ return false }} }})()"):
                    return
            time.sleep(0.02)
        shown = self.value("document.body.innerText")
        raise AssertionError(f"not within {SECONDS} seconds: {condition}; the page says: {shown}")

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def click(self, node):
        """Press the mouse in the middle of the element that a JavaScript expression gives."""
        box = f"({node}).getBoundingClientRect()"
        x, y = self.value(f"[{box}.x + {box}.width / 2, {box}.y + {box}.height / 2]")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, *keys):
        """Press keys of KEYS, or characters, one after the other."""
        for key in keys:
            text = dict(Enter="\r").get(key, "" if key in KEYS else key)
            for how in (dict(type="keyDown", text=text), dict(type="keyUp")):
                self.send("Input.dispatchKeyEvent", key=key, windowsVirtualKeyCode=KEYS.get(key, 0), **how)

    def downloaded(self, name):
        """Wait until the page has downloaded a file of this name, and return its path."""
        for _ in range(100 * SECONDS):
            if (self.folder / name).exists():
                return self.folder / name
            time.sleep(0.01)
        raise AssertionError(f"no {name} was downloaded")
