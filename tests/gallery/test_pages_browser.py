"""Report, comparison and leaderboard in a real browser: what fits, and how far colours are apart."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from omninft.evaluation.leaderboard import PUBLISHED_METRICS, build_leaderboard
from omninft.evaluation.paired import Measure, compare_paired
from omninft.evaluation.results import ClipScores, EvaluationResult, MetricResult, Protocol
from omninft.gallery.compare import write_comparison
from omninft.gallery.leaderboard_page import leaderboard_page
from omninft.gallery.report import write_report
from tests.gallery.chromium import Opener, Page, find_chromium
from tests.gallery.clip_folders import beeping_clip, evaluation_folder
from tests.gallery.run_folders import finished_run

in_browser = pytest.mark.skipif(find_chromium() is None, reason="no Chromium here; install one or set OMNINFT_CHROMIUM")
WIDTHS = (360, 390, 768, 1024, 1280)
# What lies beyond the window and in no box that scrolls by itself.
CUT = """(() => {
  const width = document.documentElement.clientWidth;
  const own = 'pre, .scroller, .scroll, svg, .hidden, .skip';
  return [...document.querySelectorAll('body *')].filter((e) => {
    const box = e.getBoundingClientRect();
    return box.width && !e.closest(own) && (box.right > width + 0.5 || box.left < -0.5);
  }).map((e) => `${e.tagName}.${e.className}`);
})()"""


def resize(page: Page, width: int) -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = finished_run(tmp_path_factory.mktemp("runs") / "a-run-with-a-long-name")
    rng = np.random.default_rng(0)
    measures = [
        Measure("steadiness", "trained", "video"),
        Measure("a_measure_with_quite_a_long_name", "held_out", "joint", higher_is_better=False, unit="frame sides/s"),
    ]
    base = np.stack([rng.normal(0.99854, 1e-3, 20), rng.normal(1234.5, 10, 20)], axis=1)
    table = compare_paired(
        measures, base, base + np.array([-3e-5, 5.0]) + rng.normal(0, 1e-4, (20, 2)), list(map(str, range(20)))
    )
    assert table.rows[1].verdict == "worse"
    (run / "evaluation.json").write_text(table.to_json(), encoding="utf-8")
    return write_report(run)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compared")
    folders = [
        str(evaluation_folder(root / name, name, {"av_ib": [0.1, 0.2], "desync": [0.3, 0.4]}, beeping_clip()))
        for name in ("Cascade", "Joint")
    ]
    return write_comparison(folders, root / "page").page


@pytest.fixture(scope="module")
def leaderboard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our own rows in the eleven columns of the published table, all with intervals."""
    rng = np.random.default_rng(0)
    results = []
    for system in ("base", "omninft-seed-1", "omninft-seed-2"):
        values = {m.name: rng.normal(0.5, 0.2, 24) for m in PUBLISHED_METRICS}
        clips = tuple(
            ClipScores(i, f"{i}.mp4", f"p{i}", "", (), {n: float(v[i]) for n, v in values.items()}) for i in range(24)
        )
        overall = {
            n: MetricResult(float(v.mean()), float(v.mean()) - 0.123, float(v.mean()) + 0.123, 24)
            for n, v in values.items()
        }
        results.append(
            (Path(system), EvaluationResult(system, Protocol("javisbench", "1"), PUBLISHED_METRICS, overall, {}, clips))
        )
    page = tmp_path_factory.mktemp("board") / "index.html"
    page.write_text(leaderboard_page(build_leaderboard(results, base="base")), encoding="utf-8")
    return page


@in_browser
@pytest.mark.parametrize("name", ["report", "comparison", "leaderboard"])
def test_pages_fit_every_width(name: str, request: pytest.FixtureRequest, opened: Opener) -> None:
    page = opened(request.getfixturevalue(name))
    page.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    for width in WIDTHS:
        resize(page, width)
        assert page.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), width
        assert page.js("innerWidth") == width
        assert page.js(CUT) == [], width


@in_browser
def test_verdicts_are_seen_at_every_width(report: Path, opened: Opener) -> None:
    page = opened(report)
    for width in WIDTHS:
        resize(page, width)
        words = page.js("""[...document.querySelectorAll('.final .word')].map((e) => {
          const box = e.getBoundingClientRect();
          return [e.textContent.trim(), box.left >= 0 && box.right <= innerWidth && box.width > 20];
        })""")
        assert words == [["no difference", True], ["\u2191 worse", True]], width


@in_browser
def test_own_leaderboard_with_intervals_needs_no_scrolling_on_a_desktop(leaderboard: Path, opened: Opener) -> None:
    page = opened(leaderboard, width=1280)
    boxes = page.js("[...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth, e.clientWidth])")
    assert len(boxes) >= 2
    for inner, outer in boxes:
        assert inner <= outer


@in_browser
def test_players_show_a_still_before_they_play(report: Path, comparison: Path, opened: Opener) -> None:
    size = "Promise.all([...document.querySelectorAll('video')].slice(0, 2).map(v => { const i = new Image(); \
      i.src = v.poster; return i.decode().then(() => i.naturalWidth); }))"
    assert opened(report).js(size) == [32, 32]
    page = opened(comparison)
    page.until("document.querySelectorAll('video[poster]').length >= 2")
    assert page.js(size) == [32, 32]


def colours(scheme: str) -> dict[str, tuple[float, float, float]]:
    css = resources.files("omninft.gallery").joinpath("templates", "report.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    found = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", light if scheme == "light" else dark))
    return {name: tuple(int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)) for name, text in found.items()}


def contrast(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    """WCAG 2.2, relative luminance of sRGB."""

    def luminance(colour: tuple[float, float, float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_its_ground(scheme: str) -> None:
    found = colours(scheme)
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    for ground in ("paper", "wash"):
        for text in ("ink", "muted", "accent"):
            assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
        assert contrast(found["faint"], found[ground]) >= 3, ground  # lines of charts
    assert contrast(found["paper"], found["accent"]) >= 4.5  # the button that plays
