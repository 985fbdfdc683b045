"""The comparison page in a real browser, opened from disk, as a person would use it.

Skipped where there is no Chromium (set OMNINFT_CHROMIUM to name one).
"""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path

import pytest
from scipy.stats import binomtest

from omninft.gallery.compare import write_comparison
from omninft.types import Prompt
from tests.gallery.chromium import Opener, find_chromium
from tests.gallery.clip_folders import beeping_clip, evaluation_folder, scored_folder

PROGRAM = find_chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here; install one or set OMNINFT_CHROMIUM")

AV_IB: dict[str, list[list[float | None]]] = {
    "Cascade": [[0.1, 0.2, 0.3, None, 0.5, 0.9], [0.5, 0.4, 0.3, 0.2, 0.1, 0.3]],
    "Joint": [[0.4, 0.1, 0.3, 0.8, 0.6, 0.2], [0.1, 0.4, 0.9, 0.2, 0.1, 0.4]],
}
SHOWN = "[...document.querySelectorAll('[data-players]:not([hidden])')].map(r => Number(r.dataset.order))"
VIDEOS = "[...document.querySelectorAll('[data-players]')].find(r => !r.hidden).querySelectorAll('video')"
SET = """((name, value) => {
  const control = document.querySelector(`[data-${name}]`);
  control.value = value;
  control.dispatchEvent(new Event('input', { bubbles: true }));
})"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("systems")
    folders = [
        evaluation_folder(
            root / name.lower(),
            name,
            {"av_ib": AV_IB[name][0], "desync": AV_IB[name][1]},
            beeping_clip(seconds=3, rate=24, size=64, brightness=brightness),
        )
        for name, brightness in (("Cascade", 40), ("Joint", 120))
    ]
    return [str(f) for f in folders]


@pytest.fixture(scope="module")
def two(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(inputs, tmp_path_factory.mktemp("pages") / "two", seed=1).page


def test_opens_from_disk_and_asks_for_nothing_but_its_clips(two: Path, opened: Opener) -> None:
    page = opened(two)
    page.until(f"[...{VIDEOS}].every(v => v.readyState >= 1)")
    assert page.url.startswith("file:///")
    folder = two.parent.resolve().as_uri()
    assert page.requests
    assert {u for u in page.requests if not u.startswith((folder, "data:", "blob:"))} == set()
    assert page.js("document.title") == "Cascade and Joint: OmniNFT comparison"


def test_clips_play_together_with_the_sound_of_one(two: Path, opened: Opener) -> None:
    page = opened(two)
    page.js("document.querySelector('[data-play]').click()")
    page.until(f"[...{VIDEOS}].every(v => v.currentTime > 0.4)")
    drift = page.js(f"""new Promise(resolve => {{
      const [a, b] = {VIDEOS}, seen = [];
      const look = () => {{
        seen.push(Math.abs(a.currentTime - b.currentTime));
        if (a.currentTime > 2 || seen.length > 200) resolve(seen); else requestAnimationFrame(look);
      }};
      look();
    }})""")
    assert len(drift) > 5
    assert max(drift) < 0.05
    assert page.js(f"[...{VIDEOS}].map(v => v.muted)") == [True, False]
    assert page.js(f"[...{VIDEOS}].every(v => v.webkitAudioDecodedByteCount > 0 && v.webkitDecodedFrameCount > 5)")
    print(f"largest drift {1000 * max(drift):.1f} ms of {len(drift)} looks")
    page.key("1")
    assert page.js(f"[...{VIDEOS}].map(v => v.muted)") == [False, True]
    page.key(" ")
    page.until(f"[...{VIDEOS}].every(v => v.paused)")


def test_seeking_moves_both(two: Path, opened: Opener) -> None:
    page = opened(two)
    page.js("""(() => {
      const seek = document.querySelector('[data-seek]');
      seek.value = 1.5;
      seek.dispatchEvent(new Event('input'));
    })()""")
    page.until(f"[...{VIDEOS}].every(v => !v.seeking && v.readyState >= 2)")
    assert page.js(f"[...{VIDEOS}].map(v => v.currentTime)") == pytest.approx([1.5, 1.5], abs=0.05)
    page.js("document.querySelector('[data-play]').click()")
    page.until(f"{VIDEOS}[0].currentTime > 1.8")
    times = page.js(f"[...{VIDEOS}].map(v => v.currentTime)")
    assert times[0] == pytest.approx(times[1], abs=0.05)
    page.key(",")  # pauses, a frame back
    page.until(f"[...{VIDEOS}].every(v => v.paused && !v.seeking)")
    before = page.js(f"{VIDEOS}[0].currentTime")
    page.key(".")
    page.until(f"[...{VIDEOS}].every(v => !v.seeking)")
    assert page.js(f"[...{VIDEOS}].map(v => v.currentTime)") == pytest.approx([before + 1 / 24] * 2, abs=1e-3)


@pytest.mark.parametrize("shift", [0.1, -0.4])
def test_a_clip_that_falls_behind_is_brought_back(two: Path, opened: Opener, shift: float) -> None:
    page = opened(two)
    page.js("document.querySelector('[data-play]').click()")
    page.until(f"[...{VIDEOS}].every(v => v.currentTime > 0.5)")
    page.js(f"{VIDEOS}[0].currentTime += {shift}")
    page.until(f"!{VIDEOS}[0].seeking && Math.abs({VIDEOS}[0].currentTime - {VIDEOS}[1].currentTime) < 0.05", seconds=2)
    assert page.js(f"{VIDEOS}[1].playbackRate") == 1  # the one that is heard is never bent


def test_only_one_prompt_sounds_at_a_time(two: Path, opened: Opener) -> None:
    page = opened(two)
    for place in (0, 1):
        page.js(f"document.querySelectorAll('[data-play]')[{place}].click()")
        page.until(f"document.querySelectorAll('[data-players]')[{place}].querySelector('video').currentTime > 0.1")
    assert page.js("[...document.querySelectorAll('video')].filter(v => !v.paused && !v.muted).length") == 1
    assert page.js("[...document.querySelectorAll('video')].filter(v => !v.paused).length") == 2


def test_search_category_and_order(two: Path, opened: Opener) -> None:
    page = opened(two)

    def shown(**controls: str) -> list[int]:
        page.js("document.querySelector('[data-filters]').reset()")
        time.sleep(0.05)
        for name, value in controls.items():
            page.js(f"{SET}({json.dumps(name)}, {json.dumps(value)})")
        return page.js(SHOWN)

    assert shown(search="WATERFALL") == [1, 4]
    assert page.js("document.querySelector('[data-count]').textContent") == "2 of 6 prompts"
    assert shown(search="take guitar 5") == [5]
    assert shown(search="nothing like it") == []
    assert not page.js("document.querySelector('[data-nothing]').hidden")
    assert shown(category="indoors") == [1, 3, 5]
    assert shown(category="indoors", search="dog") == [3]
    assert shown() == [0, 1, 2, 3, 4, 5]
    # Differences of AV-IB: .3, -.1, 0, missing, .1, -.7
    assert shown(measure="0") == [0, 4, 2, 1, 5, 3]
    assert shown(measure="0", direction="1") == [5, 1, 2, 4, 0, 3]
    assert shown(measure="0", of="size") == [5, 0, 1, 4, 2, 3]
    assert shown(measure="0", of="0") == [5, 4, 2, 1, 0, 3]
    assert shown(measure="0", of="1", **{"from": "0.35"}) == [3, 4, 0]
    assert shown(measure="0", **{"from": "-0.2", "to": "0.2"}) == [4, 2, 1]
    assert shown(measure="category") == [3, 0, 5, 2, 1, 4]
    values = page.js("omninft.data.prompts.map(p => p.disagreement)")
    assert shown(measure="disagreement") == sorted(range(6), key=lambda i: -values[i])
    assert shown(measure="disagreement", **{"from": "1"}) == [
        i for i in sorted(range(6), key=lambda i: -values[i]) if values[i] >= 1
    ]


def test_keys_walk_through_prompts_and_open_help(two: Path, opened: Opener) -> None:
    page = opened(two)
    page.key("ArrowRight")
    page.key("ArrowRight")
    assert page.js("document.activeElement.dataset.order") == "2"
    page.key("ArrowLeft")
    assert page.js("document.activeElement.dataset.order") == "1"
    page.key("?")
    assert page.js("document.querySelector('dialog').open")
    page.key("ArrowRight")
    page.key("Escape")
    page.until("!document.querySelector('dialog').open")
    assert page.js("document.activeElement.dataset.order") == "1"
    page.key("/")
    assert page.js("document.activeElement.type") == "search"
    page.key("b")
    assert page.js("!document.body.classList.contains('blind')")  # it was typed into the search
    assert page.js("document.activeElement.value") == "b"


def test_the_first_stop_of_the_tab_key_skips_to_the_clips(two: Path, opened: Opener) -> None:
    page = opened(two)
    page.key("Tab")
    assert page.js("document.activeElement.textContent") == "Skip to the clips"
    stops = []
    for _ in range(12):
        page.key("Tab")
        stops.append(page.js("document.activeElement.closest('[data-filters], .actions, article')?.className ?? ''"))
    places = [s for i, s in enumerate(stops) if s and (i == 0 or stops[i - 1] != s)]
    assert places == ["filters", "actions", "group"]


def test_blind_mode_hides_whose_clips_they_are(two: Path, opened: Opener) -> None:
    page = opened(two)
    page.key("b")
    seen = page.js("""(() => {
      const shown = [...document.body.querySelectorAll('*')].filter(e => e.checkVisibility());
      const told = ['title', 'aria-label', 'alt', 'src', 'poster', 'href'];
      const words = shown.flatMap(e => told.map(name => e.getAttribute(name) ?? ''));
      return [document.body.innerText, ...words].join('\\n');
    })()""")
    for secret in ("Cascade", "Joint", "cascade", "joint", "AV-IB", "0.40", "sample_000"):
        assert secret not in seen
    assert "Left" in seen
    assert "Right" in seen
    assert "Pair 1 of 6, 0 judged" in seen
    assert page.js(f"[...{VIDEOS}].map(v => v.getAttribute('aria-label'))") == ["Left", "Right"]
    assert page.js(f"[...{VIDEOS}].map(v => v.muted)") == [False, True]
    page.key("b")
    assert page.js(SHOWN) == [0, 1, 2, 3, 4, 5]
    names = page.js("[...document.querySelectorAll('.take-name')].map(e => e.textContent)")
    assert names == ["Cascade", "Joint"] * 6
    labels = page.js("[...document.querySelectorAll('video')].map(v => v.getAttribute('aria-label'))")
    assert labels[:2] == ["Cascade: a dog, take 0", "Joint: a dog, take 0"]


def test_sides_are_shuffled_by_the_seed(two: Path, opened: Opener) -> None:
    page = opened(two)
    share = page.js("""(() => {
      const keys = [...Array(4000).keys()].map(i => `1|side|p${String(i).padStart(3, '0')}#0`);
      const flips = keys.map(key => omninft.statistics.bits(key) & 1);
      return flips.reduce((a, b) => a + b) / flips.length;
    })()""")
    assert share == pytest.approx(0.5, abs=0.03)
    orders = {}
    for seed in ("1", "2", "1"):
        page.key("b")
        page.js(f"""(() => {{
          const seed = document.querySelector('[data-seed]');
          seed.value = {seed};
          seed.dispatchEvent(new Event('change'));
        }})()""")
        walk = []
        for _ in range(6):
            order = page.js(f"{SHOWN}[0]")
            walk.append((order, page.js(f"{VIDEOS}[0].closest('[data-take]').dataset.take")))
            page.key("n")
        assert orders.setdefault(seed, walk) == walk
        page.key("b")
    assert sorted(p for p, _ in orders["1"]) == [0, 1, 2, 3, 4, 5]
    assert orders["1"] != orders["2"]
    assert {left for walk in orders.values() for _, left in walk} == {"0", "1"}


def test_votes_are_kept_exported_and_tested(two: Path, opened: Opener, tmp_path: Path) -> None:
    page = opened(two)
    page.downloads_to(tmp_path)
    page.key("b")
    page.js("""(() => {
      const rater = document.querySelector('[data-rater]');
      rater.value = 'Ann, "A"';
      rater.dispatchEvent(new Event('change'));
    })()""")
    cast = {}
    keys = {"ArrowLeft": "left", "ArrowRight": "right", "ArrowDown": "tie", "s": "skip"}
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown", "s", "ArrowLeft"):
        prompt = page.js(f"omninft.data.prompts[{SHOWN}[0]].prompt_id")
        sides = page.js(f"[...{VIDEOS}].map(v => omninft.data.systems[v.closest('[data-take]').dataset.take])")
        winner = {"left": sides[0], "right": sides[1]}.get(keys[key], "")
        cast[prompt] = (keys[key], winner, *sides)
        page.key(key)
    assert page.js("document.querySelector('[data-progress]').textContent") == "Pair 6 of 6, 5 judged"
    assert page.js("document.querySelector('[data-seed]').disabled")

    page.load()  # votes outlive the page
    page.key("b")
    assert page.js("document.querySelector('[data-progress]').textContent") == "Pair 6 of 6, 5 judged"
    for kind in ("json", "csv"):
        page.js(f"document.querySelector('[data-export={kind}]').click()")
    files = _downloaded(tmp_path, 2)
    saved = json.loads(files[".json"].read_text(encoding="utf-8"))
    assert {v["prompt_id"]: (v["choice"], v["winner"], v["left"], v["right"]) for v in saved["votes"]} == cast
    assert saved["rater"] == 'Ann, "A"'
    assert saved["seed"] == 1
    assert not any(v["after_result"] for v in saved["votes"])
    rows = list(csv.DictReader(files[".csv"].open(encoding="utf-8", newline="")))
    assert {r["prompt_id"]: (r["choice"], r["winner"], r["left"], r["right"]) for r in rows} == cast
    assert rows[0]["rater"] == 'Ann, "A"'

    wins = sum(winner == "Joint" for _, winner, *_ in cast.values())
    assert saved["result"]["preferred"] == [3 - wins, wins]
    assert saved["result"]["ties"] == saved["result"]["skipped"] == 1
    expected = binomtest(wins, 3)
    assert saved["result"]["p_value"] == pytest.approx(expected.pvalue, abs=1e-12)
    interval = expected.proportion_ci(method="wilson")
    assert saved["result"]["wilson_95"] == pytest.approx([interval.low, interval.high], abs=1e-9)

    assert "preferred" not in page.js("document.querySelector('.ballot').innerText")
    page.js("document.querySelector('[data-reveal]').click()")
    told = page.js("document.querySelector('[data-result]').innerText").replace("\u00a0", " ")
    assert f"p = {expected.pvalue:.3f}" in told
    assert "of 3 decided votes" in told
    page.key("ArrowLeft")
    assert page.js("document.querySelector('[data-progress]').textContent") == "Pair 6 of 6, all judged"
    assert "1 votes came after the result was shown" in page.js("document.querySelector('[data-result]').innerText")


def _downloaded(folder: Path, count: int) -> dict[str, Path]:
    for _ in range(200):
        files = {p.suffix: p for p in folder.iterdir() if p.suffix in (".json", ".csv")}
        if len(files) == count:
            return files
        time.sleep(0.05)
    raise AssertionError(f"only {list(folder.iterdir())} came")


def test_the_page_works_where_nothing_can_be_stored(two: Path, opened: Opener) -> None:
    page = opened(two)
    page.js("Object.defineProperty(window, 'localStorage', { get() { throw new Error('no'); } }); true")
    page.key("b")
    page.key("ArrowLeft")
    assert page.js("document.querySelector('[data-progress]').textContent") == "Pair 2 of 6, 1 judged"
    assert "keeps nothing" in page.js("document.querySelector('[data-keeping]').textContent")
    page.key("b")
    page.key("b")
    assert page.js("document.querySelector('[data-progress]').textContent").endswith("1 judged")


def test_statistics_agree_with_scipy(two: Path, opened: Opener) -> None:
    page = opened(two)
    cases = [(0, 1), (1, 1), (3, 4), (5, 10), (0, 20), (14, 20), (130, 200), (700, 1500), (0, 1200)]
    both = "[omninft.statistics.binomialTest(k, n), ...omninft.statistics.wilson(k, n)]"
    found = page.js(f"{json.dumps(cases)}.map(([k, n]) => {both})")
    for (wins, total), (p, low, high) in zip(cases, found, strict=True):
        expected = binomtest(wins, total)
        interval = expected.proportion_ci(method="wilson")
        assert p == pytest.approx(expected.pvalue, rel=1e-8, abs=1e-300)
        assert [low, high] == pytest.approx([interval.low, interval.high], abs=1e-9)
    assert page.js("omninft.statistics.binomialTest(0, 0)") is None


@pytest.mark.parametrize("dark", [False, True])
def test_follows_the_colour_scheme(two: Path, opened: Opener, dark: bool) -> None:
    page = opened(two, dark=dark)
    colours = page.js("['color', 'backgroundColor'].map(n => getComputedStyle(document.body)[n])")
    ink, paper = (sum(map(int, c[4:-1].split(","))) for c in colours)
    assert (ink > paper) is dark


def test_fits_a_phone(two: Path, opened: Opener) -> None:
    page = opened(two, width=375, height=700)
    widths = "[document.documentElement.scrollWidth, innerWidth]"
    assert page.js(widths) == [375, 375]
    page.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.js(f"{SET}('measure', '0')")
    assert page.js(widths) == [375, 375]
    page.js("document.querySelector('[data-blind-start]').click()")
    assert page.js(widths) == [375, 375]
    boxes = page.js("[...document.querySelectorAll('[data-vote]')].map(b => b.getBoundingClientRect().toJSON())")
    assert all(b["height"] >= 44 and b["bottom"] <= 700 for b in boxes)
    videos = page.js(f"[...{VIDEOS}].map(v => v.getBoundingClientRect().toJSON())")
    assert videos[0]["top"] == videos[1]["top"]  # side by side even here


def test_three_systems_let_one_choose_the_pair(inputs: list[str], opened: Opener, tmp_path: Path) -> None:
    page = opened(write_comparison([*inputs, f"Third={inputs[0]}"], tmp_path / "three", seed=3).page)
    page.js(f"{SET}('measure', '0')")
    assert page.js(SHOWN)[:2] == [0, 1]  # Third is Cascade again: no difference anywhere
    page.js(f"{SET}('second', '1')")
    assert page.js(SHOWN) == [0, 4, 2, 1, 5, 3]
    page.key("b")
    shown = page.js(f"[...{VIDEOS}].map(v => [v.closest('[data-take]').dataset.take, v.checkVisibility()])")
    assert {take for take, visible in shown if visible} == {"0", "1"}
    page.js("document.querySelector('[data-play]').click()")
    page.until(f"[...{VIDEOS}].filter(v => v.checkVisibility()).every(v => v.currentTime > 0.2)")
    assert page.js(f"[...{VIDEOS}].filter(v => !v.paused).length") == 2


def test_a_prompt_without_both_clips_is_shown_but_not_judged(opened: Opener, tmp_path: Path) -> None:
    clip = beeping_clip()
    prompts = [Prompt(f"p{i}", "", "", f"prompt {i}") for i in range(3)]
    a = scored_folder(tmp_path / "a", clip, prompts, [{}] * 3)
    b = scored_folder(tmp_path / "b", clip, prompts[1:], [{}] * 2)
    page = opened(write_comparison([str(a), str(b)], tmp_path / "page").page)
    assert "b has no clip of this prompt." in page.js("document.querySelector('.absent').textContent")
    page.js("document.querySelector('[data-play]').click()")
    page.until("document.querySelector('video').currentTime > 0.2")
    page.js(f"{SET}('present', 'lacking')")
    assert page.js(SHOWN) == [0]
    page.js(f"{SET}('present', 'complete')")
    assert page.js(SHOWN) == [1, 2]
    page.key("b")
    assert page.js("document.querySelector('[data-progress]').textContent") == "Pair 1 of 2, 0 judged"


def test_a_single_file_plays_and_seeks(inputs: list[str], opened: Opener, tmp_path: Path) -> None:
    page = opened(write_comparison(inputs, tmp_path / "one", single_file=True).page)
    page.js("document.querySelector('[data-play]').click()")
    page.until(f"[...{VIDEOS}].every(v => v.currentTime > 0.3)")
    page.js("omninft.groups[0].pause(); omninft.groups[0].seek(2)")
    page.until(f"[...{VIDEOS}].every(v => !v.seeking)")
    assert page.js(f"[...{VIDEOS}].map(v => v.currentTime)") == pytest.approx([2, 2], abs=0.05)
    assert page.js(f"[...{VIDEOS}].map(v => v.captureStream().getAudioTracks().length)") == [1, 1]
    assert {u.split(":")[0] for u in page.requests} <= {"file", "data", "blob"}
    assert len([u for u in page.requests if u.startswith("file:")]) == 1


def test_two_hundred_prompts_load_lazily(opened: Opener, tmp_path: Path) -> None:
    clip = beeping_clip(size=32)
    scores: dict[str, list[float | None]] = {"vq": [i / 200 for i in range(200)]}
    folders = [evaluation_folder(tmp_path / name, name, scores, clip) for name in ("A", "B")]
    path = write_comparison([str(f) for f in folders], tmp_path / "page").page
    page = opened(path)
    seconds = page.load()
    loaded = "document.querySelectorAll('video[src]').length"
    page.until(f"{loaded} >= 2")
    at_load = page.js(loaded)
    size = path.stat().st_size / 2**20
    print(f"{size:.1f} MiB, load event after {seconds:.2f} s, {at_load} of 400 videos have a source")
    assert at_load <= 16
    assert seconds < 8
    began = time.monotonic()
    page.js(f"{SET}('measure', '0')")
    page.js(f"{SET}('search', 'take 19')")
    assert page.js(SHOWN) == [19, 119, *range(190, 200)]
    assert time.monotonic() - began < 3
    page.js("document.querySelector('[data-filters]').reset()")
    page.until("document.querySelectorAll('[data-players]:not([hidden])').length === 200")
    # A walk down to the end lets go of what is far behind.
    for share in (0.2, 0.4, 0.6, 0.8, 1.0):
        page.js(f"window.scrollTo(0, {share} * document.documentElement.scrollHeight)")
        time.sleep(0.15)
    page.until("omninft.groups[199].videos[0].hasAttribute('src')")
    page.until("!omninft.groups[0].videos[0].hasAttribute('src')")
    page.until("omninft.groups[199].videos.every(v => v.readyState >= 1)")
    assert page.js(loaded) < 120


def _axe() -> Path | None:
    places = [os.environ.get("OMNINFT_AXE"), "node_modules/axe-core/axe.min.js"]
    return next((Path(p) for p in places if p and Path(p).is_file()), None)


@pytest.mark.parametrize("mode", ["list", "dark", "blind", "phone"])
def test_axe_finds_nothing(two: Path, opened: Opener, mode: str) -> None:
    axe = _axe()
    if axe is None:
        pytest.skip("no axe-core here; `npm install axe-core`, or set OMNINFT_AXE to axe.min.js")
    page = opened(two, dark=mode == "dark", width=390 if mode == "phone" else 1280)
    page.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    if mode == "blind":
        page.key("b")
        page.key("ArrowLeft")
        page.js("document.querySelector('[data-reveal]').click()")
    page.js(axe.read_text(encoding="utf-8") + "; true")
    found = page.js(
        "axe.run(document).then(r => r.violations.map(v => [v.id, v.impact, v.nodes.map(n => n.html.slice(0, 160))]))"
    )
    assert found == []


def test_every_control_that_is_shown_has_a_name(two: Path, opened: Opener) -> None:
    page = opened(two)
    nameless = """(() => {
      const name = (e) => e.getAttribute('aria-label') || [...(e.labels ?? [])].map(l => l.textContent.trim()).join('')
        || e.textContent.trim();
      const controls = [...document.querySelectorAll('button, input, select, video, a')];
      return controls.filter(e => e.checkVisibility() && !name(e)).length;
    })()"""
    assert page.js(nameless) == 0
    page.key("b")
    assert page.js(nameless) == 0
    live = page.js("[...document.querySelectorAll('[aria-live]')].filter(e => e.checkVisibility()).length")
    assert live >= 2
