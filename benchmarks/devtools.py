"""A page in headless Chromium, worked by real keys and clicks over the DevTools pipe; nothing else is needed for it."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
PATIENCE = 30  # seconds to wait for an answer


class Tab:
    """One page. `events` is what the browser told beside answers: errors, requests, logs."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._held, self._number = commands, answers, b"", 0
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its answer. Raises RuntimeError for one that is refused."""
        self._number += 1
        words = {"id": self._number, "method": method, "params": params}
        if self.session is not None:
            words["sessionId"] = self.session
        os.write(self._commands, json.dumps(words).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self._number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]
            self.events.append(told)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            if not select.select([self._answers], [], [], PATIENCE)[0]:
                raise TimeoutError(f"The browser said nothing for {PATIENCE} seconds.")
            part = os.read(self._answers, 1 << 16)
            if not part:
                raise RuntimeError("The browser has ended.")
            self._held += part
        line, _, self._held = self._held.partition(b"\0")
        return json.loads(line)

    def open(self, page: Path) -> None:
        """Open a file, and wait until its scripts say that it is ready (`data-ready` of the root)."""
        self.call("Page.navigate", url=page.resolve().as_uri())
        end = time.monotonic() + PATIENCE
        while self.get("document.documentElement?.dataset.ready ?? null") is None:
            if self.errors or time.monotonic() > end:
                raise TimeoutError(f"{page} is not ready: {self.errors or 'no error was told'}")
            time.sleep(0.02)

    def get(self, expression: str) -> Any:
        """What an expression of JavaScript gives; of a promise, what it comes to."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    @property
    def errors(self) -> list[str]:
        """What scripts threw, and what was logged as an error or a warning."""
        found = []
        for event in self.events:
            kind, words = event.get("method"), event.get("params", {})
            if kind == "Runtime.exceptionThrown":
                found.append(str(words["exceptionDetails"]))
            elif kind == "Runtime.consoleAPICalled" and words["type"] in ("error", "warning", "assert"):
                found.append(str(words["args"]))
            elif kind == "Log.entryAdded" and words["entry"]["level"] in ("error", "warning"):
                found.append(words["entry"]["text"])
        return found

    @property
    def requests(self) -> list[str]:
        """The addresses that were asked for, the page's own among them."""
        sent = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    def hover(self, selector: str) -> None:
        """Move the pointer to the middle of the first element that a selector finds."""
        x, y = self._middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        x, y = self._middle(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def press(self, *keys: str) -> None:
        """Keys one after another: letters, or names such as ArrowRight."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def wheel(self, selector: str, down: float) -> None:
        x, y = self._middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=down)

    def picture(self) -> bytes:
        """What is seen, as a PNG."""
        return b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def _middle(self, selector: str) -> tuple[float, float]:
        found = self.get(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)})?.getBoundingClientRect(); "
            "return box ? [box.x + box.width / 2, box.y + box.height / 2] : null; })()"
        )
        if found is None:
            raise LookupError(f"The page has no {selector}.")
        return found[0], found[1]


@contextmanager
def browsing(profile: Path, *, size: tuple[int, int] = (1280, 800), dark: bool = False) -> Iterator[Tab]:
    """A new browser with one page, which ends with the block. Raises FileNotFoundError where there is none."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise FileNotFoundError("There is no browser: apt-get install chromium.")
    (theirs_in, ours_out), (ours_in, theirs_out) = _pipe(), _pipe()

    def place() -> None:  # where the browser looks for commands, and leaves answers
        os.dup2(theirs_in, 3)
        os.dup2(theirs_out, 4)

    flags = [f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        [browser, *QUIET, *flags],
        preexec_fn=place,
        pass_fds=(3, 4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        tab = Tab(ours_out, ours_in)
        width, height = size
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", features=[scheme])
        yield tab
    finally:
        os.close(ours_out)  # the browser ends when nobody can talk to it
        os.close(ours_in)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _pipe() -> tuple[int, int]:
    """Both ends, to read and to write, with numbers that leave the low ones free."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]
