from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from omninft.cli import app
from omninft.evaluation.leaderboard import (
    PUBLISHED_METRICS,
    build_leaderboard,
    number,
    published_ablation,
    published_section,
    read_results,
)
from omninft.evaluation.leaderboard_text import render, to_csv, to_markdown
from omninft.evaluation.results import ClipScores, EvaluationResult, Metric, MetricResult, Protocol
from omninft.gallery.leaderboard_page import leaderboard_page
from omninft.types import OmniNFTError

QUALITY = Metric("quality", "Quality", "how good", decimals=2)
LAG = Metric("lag", "Lag", "how late", higher_is_better=False, unit="ms", decimals=1)
TOTAL = Metric("total", "Total", "of the whole set")
# Read off the paper's table by eye: the best and the second best of every column.
BEST = {
    "VQ": ({"LTX-2 + OmniNFT"}, {"LTX-2 + GDPO"}),
    "AQ": ({"LTX-2 + OmniNFT"}, {"LTX-2 + GDPO"}),
    "TV-IB": ({"JavisDiT++"}, {"UniVerse-1", "LTX-2"}),
    "TA-IB": ({"LTX-2 + OmniNFT"}, {"LTX-2 + GDPO"}),
    "CLIP": ({"JavisDiT++"}, {"LTX-2"}),
    "CLAP": ({"LTX-2 + OmniNFT"}, {"LTX-2 + GDPO"}),
    "AV-IB": ({"LTX-2 + OmniNFT"}, {"LTX-2 + GDPO"}),
    "AVHScore": ({"LTX-2 + OmniNFT"}, {"LTX-2", "LTX-2 + GDPO"}),
    "JavisScore": ({"LTX-2 + OmniNFT"}, {"LTX-2"}),
    "DeSync": ({"LTX-2 + OmniNFT"}, {"LTX-2 + GDPO"}),
}
OMNINFT_AGAINST_LTX2 = {  # worked out by hand from the paper's table
    "VQ": ("+1.288", "+63.2 %", "better"),
    "AQ": ("+0.518", "+10.0 %", "better"),
    "TV-IB": ("\u22120.011", "\u22124.0 %", "worse"),
    "TA-IB": ("+0.019", "+11.2 %", "better"),
    "CLIP": ("\u22120.001", "\u22120.3 %", "worse"),
    "CLAP": ("+0.033", "+8.0 %", "better"),
    "AV-IB": ("+0.030", "+12.9 %", "better"),
    "AVHScore": ("+0.034", "+15.2 %", "better"),
    "JavisScore": ("+0.028", "+14.6 %", "better"),
    "DeSync": ("\u22120.300", "\u221252.7 %", "better"),
}


def make_result(
    system: str,
    quality: list[float | None],
    lag: list[float | None],
    *,
    benchmark: str = "javisbench",
    settings: dict[str, object] | None = None,
    notes: tuple[str, ...] = (),
) -> EvaluationResult:
    clips = tuple(
        ClipScores(i, f"sample_{i:04d}.mp4", f"p{i}", "a prompt", (), {"quality": q, "lag": t})
        for i, (q, t) in enumerate(zip(quality, lag, strict=True))
    )
    overall = {"total": MetricResult(1.0 + len(system))}
    for name, values in (("quality", quality), ("lag", lag)):
        known = [v for v in values if v is not None]
        mean = float(np.mean(known)) if known else None
        ends = (mean - 0.1, mean + 0.1) if mean is not None else (None, None)
        overall[name] = MetricResult(mean, *ends, count=len(known), missing=len(values) - len(known))
    protocol = Protocol(benchmark, "1", settings if settings is not None else {"prompts": "abc", "seconds": 4})
    return EvaluationResult(system, protocol, (QUALITY, LAG, TOTAL), overall, {}, clips, notes=notes)


def saved(folder: Path, *results: tuple[str, EvaluationResult]) -> list[Path]:
    return [result.save(folder / name) for name, result in results]


def test_published_table_has_the_papers_twelve_systems_and_ten_columns() -> None:
    section = published_section()
    assert [m.label for m in section.metrics] == list(BEST)
    assert [m.label for m in section.metrics if not m.higher_is_better] == ["DeSync"]
    assert len(section.rows) == 12
    assert {r.source for r in section.rows} == {"published"}
    known = sum(section.value(r, m) is not None for r in section.rows for m in section.metrics)
    assert known == 2 * 6 + 4 * 6 + 6 * 10
    tempo = section.rows[0]
    assert (tempo.name, tempo.size, tempo.group) == ("TempoTkn", "1.3B", "T2A+A2V")
    assert section.value(tempo, PUBLISHED_METRICS[0]) is None
    assert section.value(tempo, PUBLISHED_METRICS[9]) == 1.532


def test_best_and_second_best_of_the_published_table() -> None:
    section = published_section()
    for metric in section.metrics:
        ranked = {place: {r.name for r in section.rows if section.rank(r, metric) == place} for place in (1, 2)}
        assert (ranked[1], ranked[2]) == BEST[metric.label], metric.label


def test_differences_of_the_paper() -> None:
    (section,) = build_leaderboard().sections
    assert section.base is not None
    assert section.base.name == "LTX-2"
    assert [r.name for r in section.compared] == ["LTX-2 + GDPO", "LTX-2 + OmniNFT"]
    for metric in section.metrics:
        found = section.difference(section.compared[1], metric)
        assert found is not None
        shown = (number(found.absolute, 3, signed=True), f"{number(100 * found.relative, 1, signed=True)} %")
        assert (*shown, found.verdict) == OMNINFT_AGAINST_LTX2[metric.label]
    gdpo = {m.label: section.difference(section.compared[0], m) for m in section.metrics}
    assert gdpo["AVHScore"] is not None
    assert (gdpo["AVHScore"].absolute, gdpo["AVHScore"].verdict) == (0.0, "no difference")
    assert gdpo["JavisScore"] is not None
    assert gdpo["JavisScore"].verdict == "worse"


def test_ablation_rows_agree_with_the_published_table() -> None:
    ablation, table = published_ablation(), published_section()
    assert len(ablation.rows) == 5
    whole = {r.name: r for r in table.rows}
    for row, name in ((0, "LTX-2"), (1, "LTX-2 + GDPO"), (4, "LTX-2 + OmniNFT")):
        for metric in ablation.metrics:
            assert ablation.value(ablation.rows[row], metric) == table.value(whole[name], metric)


def test_other_protocols_are_never_ranked_together(tmp_path: Path) -> None:
    paths = saved(
        tmp_path,
        ("a", make_result("a", [0.1, 0.2], [5.0, 7.0])),
        ("b", make_result("b", [0.3, 0.2], [6.0, 7.0])),
        ("c", make_result("c", [9.0, 9.0], [0.0, 0.0], settings={"prompts": "xyz", "seconds": 4})),
    )
    board = build_leaderboard(read_results(paths))
    published, first, second = board.sections
    assert published.protocol == "as published"
    assert [[r.name for r in s.rows] for s in (first, second)] == [["a", "b"], ["c"]]
    assert first.rank(first.rows[1], QUALITY) == 1
    assert first.rank(first.rows[0], QUALITY) == 2
    assert first.rank(first.rows[0], LAG) == 1  # lower is better
    assert second.rank(second.rows[0], QUALITY) == 0  # the best of one is no best
    text = to_markdown(board)
    assert text.count("not ranked with the published table") == 2
    assert f"Not ranked with protocol {second.protocol}, which differs in prompts." in text
    assert published.rank(published.rows[-1], PUBLISHED_METRICS[0]) == 1  # as without results


def test_other_benchmarks_do_not_bring_the_published_table(tmp_path: Path) -> None:
    paths = saved(tmp_path, ("a", make_result("a", [0.1], [5.0], benchmark="world")))
    (section,) = build_leaderboard(read_results(paths)).sections
    assert section.title.startswith("world")
    assert not section.notes


def test_values_that_read_alike_share_a_rank(tmp_path: Path) -> None:
    values = {"a": 0.5012, "b": 0.4988, "c": 0.49, "d": 0.48}
    paths = saved(tmp_path, *((n, make_result(n, [v], [1.0])) for n, v in values.items()))
    section = build_leaderboard(read_results(paths)).sections[1]
    assert [section.rank(r, QUALITY) for r in section.rows] == [1, 1, 2, 0]
    assert [section.rank(r, LAG) for r in section.rows] == [0, 0, 0, 0]  # all equal: nothing to mark


def test_missing_values_are_dashes_and_counted(tmp_path: Path) -> None:
    paths = saved(
        tmp_path,
        ("a", make_result("a", [0.5, None, 0.7], [None, None, None])),
        ("b", make_result("b", [0.1, 0.1, 0.1], [1.0, 2.0, 3.0])),
    )
    board = build_leaderboard(read_results(paths), base="b")
    section = board.sections[1]
    assert section.value(section.rows[0], LAG) is None
    assert section.difference(section.rows[0], LAG) is None
    row = next(line for line in to_markdown(board).splitlines() if line.startswith("| a | 3"))
    assert "1 of 3 missing" in row
    assert "| \u2013 3 of 3 missing |" in row


def test_paired_interval_of_measured_differences(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base, noise = rng.normal(0, 5, 40), rng.normal(0, 0.1, 40)
    better = make_result("b", list(base + 0.5 + noise), list(20 + base))
    paths = saved(tmp_path, ("a", make_result("a", list(base), list(20 + base))), ("b", better))
    section = build_leaderboard(read_results(paths), base="a").sections[1]
    row = section.compared[0]
    found = section.difference(row, QUALITY)
    assert found is not None
    gain = 0.5 + noise
    half = 2.02 * gain.std(ddof=1) / math.sqrt(40)  # Student's t, 39 degrees of freedom
    assert found.absolute == pytest.approx(gain.mean())
    assert (found.low, found.high) == pytest.approx((gain.mean() - half, gain.mean() + half), abs=0.01)
    assert found.relative == pytest.approx(gain.mean() / abs(base.mean()))
    assert found.verdict == "better"
    same = section.difference(row, LAG)
    assert same is not None
    assert same.verdict == "no difference"
    total = section.difference(row, TOTAL)  # no clip has it: no pairs, no interval
    assert total is not None
    assert math.isnan(total.low)


def test_no_paired_interval_when_clips_are_not_the_same(tmp_path: Path) -> None:
    a = make_result("a", [0.1, 0.2, 0.4], [1.0, 2.0, 3.0])
    fewer = make_result("b", [0.2, 0.3, None], [2.0, 3.0, 4.0])
    other = replace(make_result("c", [0.2, 0.3, 0.4], [2.0, 3.0, 4.0]))
    other = replace(other, clips=tuple(replace(c, prompt_id=f"q{c.index}") for c in other.clips))
    paths = saved(tmp_path, ("a", a), ("b", fewer), ("c", other))
    section = build_leaderboard(read_results(paths), base="a").sections[1]
    differences = [section.difference(row, QUALITY) for row in section.compared]
    assert differences[0] is None  # means over different clips
    assert differences[1] is not None
    assert math.isnan(differences[1].low)
    # Nor does a mean without the hard clips win a rank from one with them.
    assert [section.rank(row, QUALITY) for row in section.rows if row.name == "b"] == [0]
    lag = section.difference(section.compared[0], LAG)
    assert lag is not None
    assert math.isfinite(lag.low)
    assert lag.verdict == "worse"  # later by 1 ms on every clip


def test_equal_names_are_told_apart_and_one_file_counts_once(tmp_path: Path) -> None:
    one, two = make_result("mine", [0.1], [1.0]), make_result("mine", [0.2], [2.0])
    paths = saved(tmp_path, ("runs/x/eval", one), ("runs/y/eval", two))
    results = read_results([*paths, paths[0].parent])
    assert [r.name for r in build_leaderboard(results).sections[1].rows] == ["mine (x/eval)", "mine (y/eval)"]
    with pytest.raises(OmniNFTError, match=r"names 2 rows; choose one of 'mine \(x/eval\)'"):
        build_leaderboard(results, base="mine")
    section = build_leaderboard(results, base="mine (x/eval)").sections[1]
    assert [r.name for r in section.compared] == ["mine (y/eval)"]


def test_base_of_one_section_leaves_the_papers_base_to_the_other(tmp_path: Path) -> None:
    paths = saved(tmp_path, ("a", make_result("a", [0.1], [1.0])), ("b", make_result("b", [0.2], [1.0])))
    published, measured = build_leaderboard(read_results(paths), base="a").sections
    assert published.base is not None
    assert measured.base is not None
    assert (published.base.name, measured.base.name) == ("LTX-2", "a")
    published, measured = build_leaderboard(read_results(paths), base="JavisDiT").sections
    assert len(published.compared) == 11
    assert measured.base is None


def test_unknown_base_names_the_nearest() -> None:
    with pytest.raises(OmniNFTError, match="did you mean 'LTX-2 \\+ OmniNFT'"):
        build_leaderboard((), base="ltx2+omninft")
    with pytest.raises(OmniNFTError, match="there are TempoTkn, "):
        build_leaderboard((), base="zzzz")


def test_markdown_tables_are_valid(tmp_path: Path) -> None:
    nasty = make_result("a|b *x* <i>\nc", [0.1, 0.2], [1.0, 3.0], notes=("see [1] | <b>",))
    paths = saved(tmp_path, ("a", nasty), ("b", make_result("b", [0.3, 0.4], [1.5, 2.0])))
    text = to_markdown(build_leaderboard(read_results(paths), base="b"))
    assert r"a\|b \*x\* &lt;i> c" in text
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)]
    assert len(tables) == 4
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
        assert len(widths) == 1
        assert re.fullmatch(r"\|(---\||--:\|)+", table[1])
    assert "| **3.326** ★ | **5.715** ★ | 0.261 | **0.189** ★ |" in text
    assert "<ins>0.272</ins> ☆" in text
    assert "\u22120.300 (\u221252.7 %) better" in text
    assert "| VQ ↑ |" in text
    assert "| DeSync (s) ↓ |" in text
    assert "**0.35** ★ [0.25, 0.45]" in text
    assert "| published |" in text
    assert "| measured |" in text


def test_csv_has_a_line_per_row_and_metric(tmp_path: Path) -> None:
    paths = saved(tmp_path, ("a", make_result("a, b", [0.1, 0.3], [1.0, 3.0])))
    rows = list(csv.DictReader(io.StringIO(to_csv(build_leaderboard(read_results(paths))))))
    assert len(rows) == 12 * 10 + 3
    omninft = next(r for r in rows if r["model"] == "LTX-2 + OmniNFT" and r["metric"] == "DeSync")
    assert omninft["protocol"] == "as published"
    assert omninft["direction"] == "lower"
    assert omninft["rank"] == "1"
    assert float(omninft["difference"]) == pytest.approx(-0.3)
    assert float(omninft["relative"]) == pytest.approx(-0.3 / 0.569)
    assert omninft["verdict"] == "better"
    mine = next(r for r in rows if r["source"] == "measured" and r["metric"] == "Quality")
    assert (mine["model"], mine["value"], mine["count"], mine["rank"]) == ("a, b", "0.2", "2", "")
    assert mine["protocol"] == read_results(paths)[0][1].protocol.digest


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_is_self_contained_and_accessible(tmp_path: Path) -> None:
    paths = saved(
        tmp_path,
        ("a", make_result("<script>a", [0.1, 0.2], [1.0, 3.0], notes=("a <b> note",))),
        ("b", make_result("b", [0.3, 0.4], [1.5, 2.0])),
    )
    text = leaderboard_page(build_leaderboard(read_results(paths), base="b"))
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    assert not any(a.get("src") or (t == "link" and a.get("href") != "data:,") for t, a in page.tags)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "prefers-color-scheme: dark" in text
    assert tags.count("table") == tags.count("caption") == 4
    assert all(a.get("scope") in ("col", "row", "rowgroup") for t, a in page.tags if t == "th")
    words = " ".join(" ".join(page.words).split())
    assert "<script>a" in words
    assert "not ranked with the published table" in words
    assert "DeSync (s) ↓ , lower is better" in words
    assert "3.326 ★ , best" in words
    assert "3.209 ☆ , second best" in words
    assert "\u2013 missing" in words


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_terminal_tables_fit_and_show_every_value(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    render(build_leaderboard(), console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for shown in ("3.326 ★", "0.272 ☆", "1.532", "+1.288", "(+63.2 %)", "(\u221252.7 %)", "JavisScore ↑"):
        assert shown in text


def test_number() -> None:
    assert number(-0.3, 3, signed=True) == "\u22120.300"
    assert number(-0.0001, 3, signed=True) == "0.000"
    assert number(math.nan, 3) == number(None, 3) == "\u2013"


def test_command(tmp_path: Path) -> None:
    run = CliRunner().invoke
    shown = run(app, ["leaderboard"])
    assert shown.exit_code == 0
    assert "+1.288" in shown.output
    assert run(app, ["leaderboard", "--format", "md"]).output.startswith("## JavisBench, published")
    for ending, opening in (("md", "## Jav"), ("csv", "section,"), ("html", "<!DOCTYPE html>")):
        path = tmp_path / "new" / f"board.{ending}"
        assert run(app, ["leaderboard", "-o", str(path)]).exit_code == 0
        assert path.read_text(encoding="utf-8").lstrip().startswith(opening)
    bad = run(app, ["leaderboard", "-o", str(tmp_path / "board.txt")])
    assert isinstance(bad.exception, OmniNFTError)
    assert "unknown format 'txt'" in str(bad.exception)
    absent = run(app, ["leaderboard", str(tmp_path / "nothing")])
    assert isinstance(absent.exception, OmniNFTError)
