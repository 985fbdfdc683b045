"""The page of `omninft demo` as a user has it: the command itself, and a browser that clicks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from omninft.export.lora import export_lora
from omninft.models.ltx2 import LTX2Policy
from tests.gallery.chromium import Chromium, Page, find_chromium
from tests.random_models import random_pipeline

pytestmark = [
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed"),
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium here"),
]
VIDEOS = "['base', 'trained'].map(id => document.querySelector('#' + id + ' video'))"


class OpenedAt(Page):
    """A page from an address."""

    def __init__(self, browser: Chromium, url: str) -> None:
        self._address = url
        super().__init__(browser, Path())

    def load(self) -> float:
        self.url = self._address
        return super().load()


@pytest.fixture
def served(tmp_path: Path, moved_policy: LTX2Policy) -> Iterator[str]:
    """Address of a running demo of a small random model, in a folder with one run."""
    random_pipeline("ltx-2").save_pretrained(tmp_path / "model")
    export_lora(moved_policy.adapters, tmp_path / "runs" / "mine" / "export")
    clip = {"num_frames": 9, "height": 32, "width": 32, "frame_rate": 12.0}
    (tmp_path / "model" / "clip_defaults.json").write_text(json.dumps(clip))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    demo = subprocess.Popen(
        [sys.executable, "-m", "omninft", "demo", "--model", "model", "--port", str(port)],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                assert demo.poll() is None
                assert time.monotonic() < end
                time.sleep(0.2)
        yield url
    finally:
        demo.send_signal(signal.SIGINT)
        try:
            demo.wait(20)
        except subprocess.TimeoutExpired:
            demo.kill()
            demo.wait(20)


def type_prompt(page: Page, text: str) -> None:
    page.js("document.querySelector('#prompt textarea, #prompt input').select()")
    page.call("Input.insertText", text=text)


def click(page: Page) -> None:
    page.js("document.querySelector('#make').click()")


def test_a_click_makes_two_clips_with_sound_and_an_error_is_a_line(browser: Chromium, served: str) -> None:
    page = OpenedAt(browser, served)
    page.until("document.querySelector('#make') && document.querySelector('#prompt textarea, #prompt input')", 60)
    said = "document.querySelector('#said textarea, #said input').value"
    type_prompt(page, "a violin plays")
    click(page)
    page.until(f"{VIDEOS}.every(video => video && video.readyState >= 1 && video.duration > 0)", 90)
    page.js(f"{VIDEOS}.forEach(video => video.play())")
    page.until(f"{VIDEOS}.every(video => video.webkitAudioDecodedByteCount > 0)")
    assert page.js(f"new Set({VIDEOS}.map(video => video.src)).size") == 2
    assert "runs/mine/export at strength 1, seed 0, 16 steps" in page.js(said)
    assert "violin" in page.js(said)
    type_prompt(page, " ")
    click(page)
    page.until(f"{said} === 'error: the prompt is empty: expected a text, a prompt file, or world:test'", 30)
    origin = served.rstrip("/")
    assert {r for r in page.requests if not r.startswith((origin, "data:", "blob:"))} == set()
    page.close()
