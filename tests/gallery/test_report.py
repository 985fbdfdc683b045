from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml

from omninft.evaluation.paired import compare_paired
from omninft.gallery import curves
from omninft.gallery.report import duration, headline, progress, write_report
from omninft.gallery.run_folder import read_run_folder, shown_sets
from omninft.runs.metrics import MetricsLog
from omninft.types import OmniNFTError
from tests.gallery.run_folders import MEASURES, PROMPTS, finished_run, write_metrics, write_samples

VOID = {"meta", "link", "input", "br", "img", "hr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    pieces: list[Element | str] = field(default_factory=list)

    @property
    def children(self) -> list[Element]:
        return [piece for piece in self.pieces if isinstance(piece, Element)]

    @property
    def text(self) -> str:
        return "".join(piece for piece in self.pieces if isinstance(piece, str))

    def all(self, tag: str) -> list[Element]:
        found = [self] if self.tag == tag else []
        return found + [e for child in self.children for e in child.all(tag)]

    def by_class(self, name: str) -> list[Element]:
        found = [self] if name in self.attributes.get("class", "").split() else []
        return found + [e for child in self.children for e in child.by_class(name)]

    def words(self) -> str:
        parts = [piece if isinstance(piece, str) else piece.words() for piece in self.pieces]
        return " ".join(" ".join(parts).split())


class StrictParser(HTMLParser):
    """Builds the tree and refuses tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].pieces.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].pieces.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].pieces.append(data)


def parse(path: Path) -> Element:
    parser = StrictParser()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == [parser.root]
    return parser.root


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "my-run")


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished_once, tmp_path / "runs" / "my-run"))


@pytest.fixture(scope="module")
def page(finished_once: Path) -> Element:
    return parse(write_report(finished_once))


def test_report_is_one_file_in_the_run_folder(finished: Path) -> None:
    before = {p for p in finished.rglob("*") if p.is_file()}
    assert write_report(finished) == finished / "report.html"
    assert {p for p in finished.rglob("*") if p.is_file()} - before == {finished / "report.html"}


def test_headline_and_facts(finished_once: Path, page: Element) -> None:
    sentence = "2 of 2 trained rewards better; 1 of 2 held-out measures better, 1 worse."
    assert headline(read_run_folder(finished_once)) == sentence
    assert page.by_class("lead")[0].words() == sentence
    facts = dict(
        zip([e.words() for e in page.all("dt")], [e.words() for e in page.all("dd")], strict=True),
    )
    assert facts == {
        "Recipe": "bounce",
        "Model": "Lightricks/LTX-2",
        "Seed": "3",
        "Iterations": "4 of 4",
        "Time": "50 s",
        "Test clips": "40 pairs",
    }


def test_final_table_has_every_measure_with_its_verdict(page: Element) -> None:
    (table,) = page.by_class("final")
    rows = {
        row.by_class("measure")[0].text: (row.by_class("word")[0].words(), row.attributes["class"])
        for row in table.all("tr")
        if row.by_class("measure")
    }
    assert rows == {
        "quality": ("\u2191 better", "is-better"),
        "sync": ("\u2191 better", "is-better"),
        "onset_error": ("\u2193 better", "is-better"),
        "sharpness": ("\u2193 worse", "is-worse"),
    }
    # Right of the zero line is better, whichever way the number went.
    places = [
        (float(svg.by_class("zero")[0].attributes["x1"]), float(svg.by_class("dot")[0].attributes["cx"]))
        for svg in table.by_class("row")
    ]
    assert [dot > zero for zero, dot in places] == [True, True, True, False]
    assert "score was missing: sync 1." in page.words()


def test_players_point_at_clips_that_exist(finished_once: Path, page: Element) -> None:
    sources = [video.attributes["src"] for video in page.all("video")]
    assert len(sources) == 2 * len(PROMPTS)
    for source in sources:
        assert (finished_once / unquote(source)).is_file()
    assert sources[0] == "samples/test-base/ball%201%232-0.mp4"
    assert all(video.attributes["preload"] == "none" for video in page.all("video"))
    assert all("small" in video.attributes["class"] for video in page.all("video"))
    posters = [video.attributes["poster"] for video in page.all("video")]
    assert all(p.startswith("data:image/jpeg;base64,/9j/") and len(p) < 8000 for p in posters)


def test_nothing_is_loaded_from_elsewhere(finished_once: Path, page: Element) -> None:
    text = (finished_once / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    for element in [e for tag in ("script", "link", "img", "a", "video", "source", "iframe") for e in page.all(tag)]:
        for name in ("src", "href"):
            target = element.attributes.get(name, "#")
            assert target.startswith(("#", "samples/", "data:,")), target
    assert not page.all("iframe")
    assert all("src" not in script.attributes for script in page.all("script"))


def test_text_from_the_run_cannot_become_markup(finished_once: Path, page: Element) -> None:
    text = (finished_once / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert len(page.all("script")) == 2
    assert PROMPTS[1].prompt_av in [e.words() for e in page.by_class("prompt")]
    assert "1 of 32 scores missing <why>" in page.words()


def test_prompts_are_told_once(page: Element) -> None:
    headers = [group.all("header")[0].words() for group in page.by_class("group")]
    assert headers[0] == "Seen a red ball bounces Heard a low tone"
    assert headers[2] == f"{PROMPTS[2].prompt_av} Seen a lamp flashes Heard a buzz"


def test_scores_and_differences_of_the_clips(page: Element) -> None:
    groups = page.by_class("group")
    gains = [json.loads(group.attributes["data-gains"]) for group in groups]
    assert gains[0] == pytest.approx({"sync": 0.3, "onset_error": 80.0, "quality": 0.0})
    assert gains[1] == pytest.approx({"sync": -0.05, "onset_error": -5.0, "quality": 0.0})
    assert "sync" not in gains[2]
    rows = {row.all("th")[0].words(): row for row in groups[0].by_class("scores")[0].all("tr")[1:]}
    assert [cell.words() for cell in rows["onset_error"].all("td")] == ["120", "40", "\u221280"]
    assert "is-better" in rows["onset_error"].all("td")[-1].attributes["class"]
    assert "is-same" in rows["quality"].all("td")[-1].attributes["class"]
    (missing,) = groups[2].by_class("why")
    assert missing.words() == "missing"
    assert missing.attributes["title"] == "no onset was found"
    options = [
        (o.attributes["value"], o.attributes.get("data-sign")) for o in page.by_class("toolbar")[0].all("option")
    ]
    assert options[:3] == [("", None), ("sync", "-1"), ("sync", "1")]


def test_waveforms_carry_marks_inside_the_clip(page: Element) -> None:
    lamp = page.by_class("group")[2]
    waves = lamp.by_class("wave")
    assert len(waves) == 2
    assert [m.attributes["x1"] for m in waves[0].by_class("seen")] == ["500.0"]
    assert [m.attributes["x1"] for m in waves[0].by_class("heard")] == ["520.0"]  # 9.0 s is past the end
    assert "seen at 0.25 s" in waves[0].attributes["aria-label"]
    assert all(wave.by_class("sound") for wave in waves)


def test_reward_charts_hold_training_and_evaluations(page: Element) -> None:
    panels = {p.by_class("panel-title")[0].words(): p for p in page.by_class("panel")}
    hover = json.loads(panels["sync"].all("svg")[0].attributes["data-hover"])
    assert hover[0][1:] == ["after 0 iterations", [["dev", "0.400 [0.350, 0.450]"]]]
    assert hover[1][1:] == ["after 1 iteration", [["training", "0.400"]]]  # the row of iteration 0
    assert hover[-1][1:] == ["after 4 iterations", [["training", "0.400"], ["dev", "0.600 [0.550, 0.650]"]]]
    assert {"iterations done"} == {t.words() for t in panels["sync"].by_class("axis") if t.tag == "text"}
    assert "onset error (ms)" in panels
    assert "never trained on" in panels["onset error (ms)"].words()
    assert {"Opposite advantages", "Gradient norm", "Missing scores"} <= set(panels)
    assert "sync 1." in panels["Missing scores"].words()
    assert "strange: new number" in panels


def test_time_bar_adds_up(page: Element) -> None:
    (stages,) = page.by_class("stages")
    assert stages.by_class("panel-title")[0].words() == "Where an iteration's 10.0 s go"
    widths = [float(r.attributes["width"]) for r in stages.all("rect")]
    assert widths == [200.0, 600.0, 200.0]
    assert [li.words() for li in stages.all("li")] == ["sampling 20% 2.00 s", "update 60% 6.00 s", "other 20% 2.00 s"]


def test_events_config_and_commands(page: Element) -> None:
    text = page.words()
    assert "sync: 1 of 32 scores missing" in text
    assert "recipe: bounce" in text
    assert "steps: 16" in text
    commands = [c.text for c in page.all("code") if "omninft" in c.text or "diffusers" in c.text]
    folder = "my-run"
    assert commands[0].startswith("omninft train --resume ")
    assert commands[0].endswith(folder)
    assert commands[1].startswith("omninft sample 'a red ball bounces, a low tone' --model Lightricks/LTX-2 --lora ")
    assert 'LTX2Pipeline.from_pretrained("Lightricks/LTX-2")' in commands[2]
    assert 'weight_name="pytorch_lora_weights.safetensors"' in commands[2]


def test_controls_and_pictures_have_names(page: Element) -> None:
    for svg in page.all("svg"):
        assert svg.attributes.get("aria-label") or svg.attributes.get("aria-hidden") == "true"
    for button in page.all("button"):
        assert button.words() or button.attributes["aria-label"]
    labelled = [s for label in page.all("label") for s in label.all("select")]
    assert len(labelled) == len(page.all("select"))
    assert all(i.attributes["aria-label"] for i in page.all("input"))
    assert page.all("html")[0].attributes["lang"] == "en"
    for table in page.all("table"):
        assert all("scope" in th.attributes for th in table.all("th"))


def test_page_follows_the_readers_scheme_and_width(finished_once: Path) -> None:
    text = (finished_once / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    assert "image-rendering: pixelated" in text
    assert 'name="viewport" content="width=device-width' in text


def test_a_clip_that_cannot_be_shown_says_why(finished: Path) -> None:
    trained = finished / "samples" / "test-trained"
    (trained / "evil-0.mp4").unlink()
    (trained / "lamp-0.mp4").write_bytes(b"not a video")
    scores = json.loads((finished / "samples" / "test-base" / "scores.json").read_text(encoding="utf-8"))
    scores["clips"] = scores["clips"][1:]
    (finished / "samples" / "test-base" / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    page = parse(write_report(finished))
    absent = [e.words() for e in page.by_class("absent")]
    assert len(absent) == 3
    assert any("evil-0.mp4: no such file" in text for text in absent)
    assert any("lamp-0.mp4: not a video" in text for text in absent)
    assert "No clip of this prompt here." in absent
    for video in page.all("video"):
        assert (finished / unquote(video.attributes["src"])).is_file()
    assert len(page.all("video")) == 3


def test_an_unfinished_run_tells_what_it_has(tmp_path: Path) -> None:
    run = tmp_path / "half"
    scores: list[dict[str, float | None]] = [{"sync": 0.4}, {"sync": 0.5}, {"sync": 0.6}]
    for at in (0, 2):
        write_samples(run, f"dev-{at:06d}", scores)
    write_metrics(run, 3)
    (run / "config.yaml").write_text(yaml.safe_dump({"run": {"iterations": 40}}), encoding="utf-8")
    assert headline(read_run_folder(run)) == (
        "3 of 40 iterations done; no final evaluation yet. On the dev prompts 1 of 2 means rose from 0 to 2 iterations."
    )
    page = parse(write_report(run))
    assert not page.by_class("final")
    rows = [[c.words() for c in r.children] for r in page.by_class("first-look")[0].all("tr")[1:]]
    assert rows == [["sync", "0.400", "0.500", "+0.100"], ["onset_error", "100", "98.0", "\u22122.00"]]
    assert [e.words() for e in page.by_class("take-name")[:2]] == ["Base", "After 2 iterations"]
    # Without a table nobody knows which direction is better: no colours, and neutral words.
    assert all("is-same" in cell.attributes["class"] for cell in page.by_class("gain"))
    assert "sync: largest rise first" in page.words()


def test_an_empty_folder_and_a_run_that_just_began(tmp_path: Path) -> None:
    assert headline(read_run_folder(tmp_path)) == "Nothing has been recorded yet."
    assert "There is no evaluation yet." in parse(write_report(tmp_path)).words()
    with MetricsLog(tmp_path) as log:
        log.evaluation("dev", 0, {"sync": {"mean": 0.5}})
    assert headline(read_run_folder(tmp_path)) == "0 iterations done; no final evaluation yet."
    assert parse(write_report(tmp_path)).all("h1")[0].words() == tmp_path.name


def unevaluated(run: Path, iterations: int, **config: object) -> Path:
    with MetricsLog(run) as log:
        for i in range(iterations):
            log.iteration(i, {"seconds": 2.0, "reward/sync": 0.1 * i, "gradient_norm/video": 0.0})
        log.event(0, "info", "self-check not passed, video got a gradient of exactly 0: 4 LoRA modules")
    (run / "config.yaml").write_text(yaml.safe_dump({"run": {"iterations": 3}, **config}), encoding="utf-8")
    return run


def test_a_run_without_evaluations_does_not_speak_of_any(tmp_path: Path) -> None:
    evaluation = {"every": 0, "dev_clips": 64, "test_clips": 0}
    run = unevaluated(tmp_path, 3, evaluation=evaluation)
    page = parse(write_report(run))
    assert page.by_class("lead")[0].words() == "3 of 3 iterations done; without a final evaluation."
    sections = {s.attributes["id"]: s for s in page.all("section")}
    assert sections["result"].words() == "Result This run makes no evaluations."
    assert "evaluation" not in sections["rewards"].words()
    assert "clips" not in sections
    assert "Self-check not passed, video got a gradient of exactly 0: 4 LoRA modules." in sections["health"].words()


def test_a_run_that_was_stopped_after_one_iteration(tmp_path: Path) -> None:
    run = unevaluated(tmp_path, 1, evaluation={"every": 2, "dev_clips": 8, "test_clips": 16})
    result = "There is no evaluation yet. A finished run compares base and trained clips on the test prompts here."
    assert parse(write_report(run)).all("section")[0].words() == f"Result {result}"
    with MetricsLog(run) as log:
        log.evaluation("dev", 0, {"sync": {"mean": 0.5}})
    write_samples(run, "dev-000000", [{"sync": 0.5}] * 3)
    page = parse(write_report(run))
    assert page.by_class("lead")[0].words() == "1 of 3 iterations done; no final evaluation yet."
    assert "Only one evaluation was made so far, on the dev prompts" in page.all("section")[0].words()
    assert {e.words() for e in page.by_class("take-name")} == {"Base"}


def test_a_running_run_says_how_far_it_is(tmp_path: Path) -> None:
    run = unevaluated(tmp_path, 2, evaluation={"every": 0, "test_clips": 16})
    assert progress(read_run_folder(run), running=True) == (
        "Running: 2 of 3 iterations done, about 2 s of training left"
    )
    assert progress(read_run_folder(run)) == "2 of 3 iterations done"
    with MetricsLog(run) as log:
        log.iteration(2, {"seconds": 2.0})
    assert headline(read_run_folder(run), running=True) == (
        "Running: 3 of 3 iterations done, the final evaluation goes on."
    )


def test_a_placebo_says_what_it_is(tmp_path: Path) -> None:
    run = unevaluated(tmp_path, 2, credit={"kind": "omninft", "shuffle": True})
    assert headline(read_run_folder(run)) == (
        "2 of 3 iterations done; no final evaluation yet. "
        "This is a placebo: its advantages were shuffled, so it must not learn."
    )


def test_damage_is_named_and_the_rest_is_shown(finished: Path) -> None:
    (finished / "evaluation.json").write_text("{", encoding="utf-8")
    (finished / "samples" / "test-base" / "scores.json").write_text('{"clips": [{"file": 1}]}', encoding="utf-8")
    (finished / "config.yaml").write_text("a: [", encoding="utf-8")
    metrics = finished / "metrics.jsonl"
    metrics.write_text("oops\n" + metrics.read_text(encoding="utf-8"), encoding="utf-8")
    page = parse(write_report(finished))
    problems = page.by_class("problems")[0].words()
    assert "evaluation.json: not a paired evaluation table" in problems
    assert "samples/test-base/scores.json cannot be read" in problems
    assert "config.yaml is not valid YAML" in problems
    assert "line 1: expected a JSON object" in problems
    assert len(page.all("video")) == len(PROMPTS)  # test-trained is still there


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OmniNFTError, match="no such run folder"):
        write_report(tmp_path / "nowhere")


def test_no_clear_difference_is_said_so(finished: Path) -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(0, 1, (20, 2))
    table = compare_paired(MEASURES[:2], base, base + rng.normal(0, 1, (20, 2)), [f"p{i}" for i in range(20)])
    (finished / "evaluation.json").write_text(table.to_json(), encoding="utf-8")
    assert headline(read_run_folder(finished)) == "No clear difference in the 2 trained rewards."
    one = compare_paired(MEASURES[:1], base[:1, :1], base[:1, :1], ["p"])
    (finished / "evaluation.json").write_text(one.to_json(), encoding="utf-8")
    assert headline(read_run_folder(finished)) == "No clear difference in the trained reward."
    assert parse(write_report(finished)).by_class("final")


def test_sets_to_show_prefer_the_test_pair_then_the_widest_dev_pair(finished: Path) -> None:
    assert [label for label, _ in shown_sets(read_run_folder(finished))] == ["Base", "Trained"]
    shutil.rmtree(finished / "samples" / "test-trained")
    assert [label for label, _ in shown_sets(read_run_folder(finished))] == ["test-base"]
    for name in ("dev-000002", "dev-000010", "dev-000100"):
        shutil.copytree(finished / "samples" / "test-base", finished / "samples" / name)
    labels = [label for label, _ in shown_sets(read_run_folder(finished))]
    assert labels == ["After 2 iterations", "After 100 iterations"]


def test_rows_done_twice_count_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for value in (1.0, 2.0):
            log.iteration(0, {"a": value})
            log.evaluation("dev", 0, {"sync": {"mean": value}})
    run = read_run_folder(tmp_path)
    assert [row["a"] for row in run.iterations] == [2.0]
    assert [row["measures"]["sync"]["mean"] for row in run.evaluations()["dev"]] == [2.0]


def test_long_runs_are_drawn_as_means() -> None:
    x, y = curves.thin(list(range(10)), [float(i) for i in range(10)], limit=5)
    assert x == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert y == [0.5, 2.5, 4.5, 6.5, 8.5]
    _, gaps = curves.thin(list(range(4)), [math.nan, math.nan, 1.0, math.nan], limit=2)
    assert math.isnan(gaps[0])
    assert gaps[1] == 1.0
    assert curves.thin([0, 1], [5.0, 6.0], limit=2) == ([0, 1], [5.0, 6.0])


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.4, "8 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (11100, "3 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
