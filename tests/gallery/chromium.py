"""A headless Chromium for tests, driven over the DevTools protocol through a pipe: no port, no further package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--mute-audio",
    "--remote-debugging-pipe",
)
KEYS = {
    " ": ("Space", 32),
    "ArrowLeft": ("ArrowLeft", 37),
    "ArrowRight": ("ArrowRight", 39),
    "ArrowDown": ("ArrowDown", 40),
    "Escape": ("Escape", 27),
    "Tab": ("Tab", 9),
}


def find_chromium() -> str | None:
    """The browser named by OMNINFT_CHROMIUM, or the first of the usual names that is installed."""
    named = os.environ.get("OMNINFT_CHROMIUM")
    return next((found for name in ([named] if named else NAMES) if (found := shutil.which(name))), None)


class Chromium:
    """One browser process; `open` gives pages."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def hand_over() -> None:
            # The browser reads descriptor 3 and writes 4; move ours out of the way of those numbers first.
            high = (os.dup2(to_browser, 103), os.dup2(from_browser, 104))
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=hand_over,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._count = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._read, 1 << 16)
            if not piece:
                raise EOFError("the browser is gone")
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)

    def open(self, page: Path, **view: Any) -> Page:
        return Page(self, page, **view)

    def close(self) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(10)
        except (EOFError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait(10)
        os.close(self._write)
        os.close(self._read)


class Page:
    """One tab with a page from disk, loaded."""

    def __init__(self, browser: Chromium, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.browser = browser
        browser.events.clear()
        # Each page its own browsing context: nothing stored by another test is seen.
        self.context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=self.context)["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call(
            "Emulation.setEmulatedMedia", features=[scheme, {"name": "prefers-reduced-motion", "value": "reduce"}]
        )
        self.url = path.resolve().as_uri()
        self.load()

    def load(self) -> float:
        """Load the page (again) and return the seconds until its load event was done."""
        self.call("Page.navigate", url=self.url)
        self.until(f"location.href.split('#')[0] === {json.dumps(self.url)} && document.readyState === 'complete'")
        self.until("performance.getEntriesByType('navigation')[0].loadEventEnd > 0")
        return self.js("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", "error in the page"))
        return answer["result"].get("value")

    def until(self, condition: str, seconds: float = 15.0) -> None:
        """Wait until a condition holds in the page."""
        end = time.monotonic() + seconds
        while not self.js(f"Boolean({condition})"):
            assert time.monotonic() < end, f"not within {seconds:g} s: {condition}"
            time.sleep(0.05)

    def key(self, key: str) -> None:
        code, number = KEYS.get(key, (key, ord(key[0].upper())))
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=code, windowsVirtualKeyCode=number, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=code, windowsVirtualKeyCode=number)

    def downloads_to(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.browser.call(
            "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), browserContextId=self.context
        )

    def _mine(self, method: str) -> list[dict[str, Any]]:
        self.js("1")  # takes in what has come
        return [
            e["params"] for e in self.browser.events if e["method"] == method and e.get("sessionId") == self.session
        ]

    @property
    def complaints(self) -> list[str]:
        """Exceptions, console messages and log entries of the page."""
        return [
            *(str(p["exceptionDetails"]) for p in self._mine("Runtime.exceptionThrown")),
            *(str(p["args"]) for p in self._mine("Runtime.consoleAPICalled")),
            *(p["entry"]["text"] for p in self._mine("Log.entryAdded")),
        ]

    @property
    def requests(self) -> set[str]:
        return {p["request"]["url"] for p in self._mine("Network.requestWillBeSent")}

    def close(self) -> None:
        self.browser.call("Target.disposeBrowserContext", browserContextId=self.context)


Opener = Callable[..., Page]
