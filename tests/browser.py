"""Headless Chromium over its own pipe (the DevTools protocol, JSON between zero bytes): what a page does when opened.

No package is needed. Every request, console message and script error of the page is recorded.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = (
    "NO BROWSER: none of {names} is installed, so the report was not opened at all; "
    "install one (apt-get install chromium), as .ci/run does"
)


def find() -> str | None:
    """The browser's program, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def needed() -> str:
    """The browser's program; without one the test is skipped, or fails where CI is set."""
    path = find()
    if path is None:
        message = MISSING.format(names=", ".join(NAMES))
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


class Browser:
    """One tab. `requests` are the addresses it asked for, `messages` what it said on its console, errors included."""

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self._process, self._write, self._read = process, write, read
        self._buffer, self._next, self._session = b"", 0, None
        self.requests: list[str] = []
        self.messages: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file in a window of that size; its requests and messages start anew."""
        self.requests.clear()
        self.messages.clear()
        self.window(width, height, dark)
        self._loaded = False
        answer = self._call("Page.navigate", url=page.resolve().as_uri())
        assert "errorText" not in answer, answer
        end = time.monotonic() + 30
        while not self._loaded:
            self._receive(end)

    def window(self, width: int, height: int, dark: bool = False) -> None:
        """The window's size in CSS pixels, and what the reader's system prefers."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        preference = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[preference])

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self, clip: tuple[float, float, float, float] | None = None) -> bytes:
        """A PNG of the window, or of `(x, y, width, height)` of the page, beyond the window too."""
        more: dict[str, Any] = {}
        if clip is not None:
            more = {
                "clip": dict(zip(("x", "y", "width", "height"), clip, strict=True)) | {"scale": 1},
                "captureBeyondViewport": True,
            }
        return base64.b64decode(self._call("Page.captureScreenshot", format="png", **more)["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._next += 1
        number = self._next
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while True:
            answer = self._receive(end)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self._read, 1 << 20)
            assert piece, "the browser ended"
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, given: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(f"console.{given['type']}: {given['args']}")
        elif method == "Runtime.exceptionThrown":
            self.messages.append(f"exception: {given['exceptionDetails']}")
        elif method == "Log.entryAdded":
            self.messages.append(f"{given['entry']['level']}: {given['entry']['text']}")
        elif method == "Page.loadEventFired":
            self._loaded = True


@contextlib.contextmanager
def browser(program: str, profile: Path) -> Iterator[Browser]:
    """A running browser with a fresh profile in the folder `profile`; it ends with the block."""
    down_read, down_write = os.pipe()
    up_read, up_write = os.pipe()
    # The browser reads at 3 and writes at 4; these two must not be what is copied there.
    ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (down_read, up_write)]
    for fd in (down_read, up_write):
        os.close(fd)

    def place() -> None:
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    command = [
        program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank",
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(profile), "XDG_CONFIG_HOME": str(profile), "XDG_CACHE_HOME": str(profile)}
    profile.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False,
        preexec_fn=place, start_new_session=True, env=environment,
    )  # fmt: skip
    for fd in ends:
        os.close(fd)
    try:
        yield Browser(process, down_write, up_read)
    finally:
        for fd in (down_write, up_read):
            os.close(fd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
