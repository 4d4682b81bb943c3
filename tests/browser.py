"""A headless Chromium, driven by its DevTools protocol over a pipe: nothing to install but the browser."""

import json
import os
import shutil
import signal

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (                                           # it asks nobody for updates; as root it has no sandbox
    "--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", *(["--no-sandbox"] * (os.getuid() == 0)),
)


class Browser:
    """One tab. Use as a context; folder is where its profile and its downloads go."""

    def __init__(self, folder, *flags):
        self.folder, self.flags, self.last, self.session = folder, flags, 0, None

    def __enter__(self):
        (read, self.commands), (answers, write) = os.pipe(), os.pipe()
        arguments = [CHROMIUM, *FLAGS, *self.flags, f"--user-data-dir={self.folder}/profile"]
        null = os.open(os.devnull, os.O_RDWR)
        self.process = os.posix_spawn(CHROMIUM, arguments, os.environ, setpgroup=0, file_actions=[
            (os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, null, 2),
            (os.POSIX_SPAWN_DUP2, read, 3), (os.POSIX_SPAWN_DUP2, write, 4),
        ])
        for end in (null, read, write):
            os.close(end)
        self.answers = os.fdopen(answers, "rb")
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")
        self.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(self.folder))
        return self

    def __exit__(self, *error):
        os.killpg(self.process, signal.SIGKILL)     # its renderers too
        os.waitpid(self.process, 0)
        os.close(self.commands)
        self.answers.close()

    def send(self, method, **params):
        """Call a method of the DevTools protocol and return its result."""
        self.last += 1
        message = dict(id=self.last, method=method, params=params, **({"sessionId": self.session} if self.session else {}))
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = bytearray()
            while (byte := self.answers.read(1)) != b"\0":
                assert byte, "the browser has ended"
                answer += byte
            answer = json.loads(answer)
            if answer.get("id") == self.last:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression):
        """The value of a JavaScript expression, awaited where it is a promise."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition):
        """Wait until a JavaScript expression is true."""
        self.value(f"new Promise(function look(done) {{ ({condition}) ? done() : setTimeout(look, 20, done) }})")

    def click(self, node):
        """Press the mouse in the middle of the node that a JavaScript expression means."""
        x, y = self.value(f"(() => {{ const b = ({node}).getBoundingClientRect(); "
                          "return [b.x + b.width / 2, b.y + b.height / 2] })()")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key, **how):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, **how)
