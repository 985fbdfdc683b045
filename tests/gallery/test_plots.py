from __future__ import annotations

import importlib
import json
import math
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from omninft.cli import app
from omninft.evaluation.leaderboard import build_leaderboard, published_ablation
from omninft.evaluation.paired import Estimate, Measure, compare_paired
from omninft.evaluation.results import ClipScores, EvaluationResult, Metric, MetricResult, Protocol
from omninft.gallery import plots
from omninft.gallery.paper_figures import (
    bar_panels,
    curve_panels,
    group_runs,
    section_dots,
    table_dots,
    write_figures,
)
from omninft.gallery.plots import Dot
from omninft.gallery.run_folder import read_run_folder
from omninft.runs.metrics import MetricsLog
from omninft.types import OmniNFTError

MEASURES = [
    Measure("sync", "trained", "joint"),
    Measure("offset_ms", "held_out", "joint", higher_is_better=False, unit="ms"),
]
QUALITY = Metric("quality", "Quality $x$", "how good")
LAG = Metric("lag", "Lag", "how late", higher_is_better=False, unit="s")
DEPTH = Metric("depth", "Depth", "how deep")


def make_run(folder: Path, recipe: str, seed: int, gain: float, *, shuffle: bool = False, table: bool = True) -> Path:
    folder.mkdir(parents=True)
    config = {
        "recipe": recipe,
        "seed": seed,
        "credit": {"shuffle": shuffle},
        "run": {"name": folder.name},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with MetricsLog(folder) as log:
        for i in range(4):
            if i % 2 == 0:
                log.evaluation("dev", i, evaluation(i * gain))
            log.iteration(i, {"reward/sync": 0.2 + i * gain, "seconds": 1.0})
        log.evaluation("dev", 4, evaluation(4 * gain))
    if table:
        rng = np.random.default_rng(seed)
        base = rng.normal([0.3, 150], [0.1, 40], (20, 2))
        trained = base + np.array([gain, -100 * gain]) + rng.normal(0, [0.01, 1], (20, 2))
        text = compare_paired(MEASURES, base, trained, [f"p{i}" for i in range(20)]).to_json()
        (folder / "evaluation.json").write_text(text)
    return folder


def evaluation(gain: float) -> dict[str, dict[str, float]]:
    return {
        "sync": {"mean": 0.3 + gain, "low": 0.25 + gain, "high": 0.35 + gain, "n": 8},
        "offset_ms": {"mean": 150 - gain, "low": 140 - gain, "high": 160 - gain, "n": 8},
    }


def make_result(folder: Path, system: str, values: tuple[float | None, ...], clips: np.ndarray | None = None) -> Path:
    metrics = (QUALITY, LAG, DEPTH)
    overall = {
        m.name: MetricResult(v, None if v is None else v - 0.1, None if v is None else v + 0.1, 4)
        for m, v in zip(metrics, values, strict=True)
    }
    rows = [] if clips is None else clips.tolist()
    scores = tuple(
        ClipScores(i, f"{i}.mp4", f"p{i}", "", (), dict(zip(("quality", "lag", "depth"), row, strict=True)))
        for i, row in enumerate(rows)
    )
    result = EvaluationResult(system, Protocol("world", "1"), metrics, overall, {}, scores)
    return result.save(folder)


def png_size(path: Path) -> tuple[int, int]:
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    return width, height


def svg_texts(path: Path) -> list[str]:
    return ["".join(e.itertext()) for e in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_published_figures_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    first, second = (write_figures([], tmp_path / name) for name in ("a", "b"))
    names = [path.name for path in first]
    assert names == [
        f"{stem}.{kind}"
        for stem in ("dots-LTX-2-OmniNFT-vs-LTX-2", "radar-LTX-2-OmniNFT-vs-LTX-2", "ablation-published")
        for kind in ("png", "svg")
    ] + ["captions.md"]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert png_size(first[0])[0] == round(3.35 * 300)  # one column at 300 dots per inch
    assert png_size(first[4])[0] == 6.9 * 300
    svg = first[1].read_text(encoding="utf-8")
    assert "<dc:date>" not in svg
    texts = svg_texts(first[1])
    for text in ("VQ ↑", "DeSync (s) ↓", "0.569 → 0.269", "2.038 → 3.326", "(% of its value; right is better)"):
        assert text in texts
    captions = first[-1].read_text(encoding="utf-8")
    assert "percent of its absolute value" in captions
    assert "There are no intervals" in captions
    assert all(f"## {Path(n).stem}" in captions for n in names[:-1])


def test_published_dots_point_right_for_better() -> None:
    (section,) = build_leaderboard().sections
    dots, normalised, notes = section_dots(section, section.compared[1])
    assert normalised == "%"
    assert notes == []
    change = {dot.label.split()[0]: dot for dot in dots}
    assert change["VQ"].change.mean == pytest.approx(100 * 1.288 / 2.038)
    assert change["DeSync"].change.mean == pytest.approx(100 * 0.300 / 0.569)  # a fall that is drawn to the right
    assert change["TV-IB"].change.mean == pytest.approx(-100 * 0.011 / 0.272)
    assert [d for d, dot in change.items() if dot.tone == "worse"] == ["TV-IB", "CLIP"]
    assert all(math.isnan(dot.change.low) for dot in dots)


def test_dots_of_systems_with_incomplete_rows_say_what_is_left_out() -> None:
    (section,) = build_leaderboard((), "LTX-2").sections
    tempo = next(row for row in section.rows if row.name == "TempoTkn")
    dots, _, notes = section_dots(section, tempo)
    assert [dot.label.split()[0] for dot in dots] == ["TV-IB", "CLIP", "AV-IB", "AVHScore", "JavisScore", "DeSync"]
    assert notes == ["Left out, for want of a value or for a base of 0: VQ, AQ, TA-IB, CLAP."]


def test_tone_of_unpaired_intervals_needs_a_gap() -> None:
    def tone(mean: float, low: float, high: float, base_low: float, base_high: float) -> str:
        return Dot("", Estimate(mean, low, high), "", "", base_low, base_high).tone

    assert tone(5, 3, 7, -2, 2) == "better"
    assert tone(5, 1, 9, -2, 2) == "same"
    assert tone(-5, -7, -3, -2, 2) == "worse"
    assert tone(5, 1, 9, math.nan, math.nan) == "better"
    assert tone(5, -1, 9, math.nan, math.nan) == "same"
    assert tone(-5, math.nan, math.nan, math.nan, math.nan) == "worse"


def test_table_dots_are_standardised_differences(tmp_path: Path) -> None:
    run = read_run_folder(make_run(tmp_path / "a", "omninft", 1, 0.05))
    assert run.table is not None
    dots = table_dots(run.table)
    assert [(dot.label, dot.group) for dot in dots] == [
        ("sync ↑", "Trained rewards"),
        ("offset (ms) ↓", "Held-out measures"),
    ]
    rng = np.random.default_rng(1)
    base = rng.normal([0.3, 150], [0.1, 40], (20, 2))
    moved = np.array([0.05, -5.0]) + rng.normal(0, [0.01, 1], (20, 2))
    expected = moved.mean(axis=0) / base.std(axis=0, ddof=1) * [1, -1]
    assert [dot.change.mean for dot in dots] == pytest.approx(expected)
    assert all(dot.tone == "better" for dot in dots)


def test_seeds_of_one_configuration_make_a_group_and_a_band(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "one", "omninft", 1, 0.05),
        make_run(tmp_path / "two", "omninft", 2, 0.09),
        make_run(tmp_path / "none", "placebo", 1, -0.02, shuffle=True),
    ]
    groups = group_runs([read_run_folder(run) for run in runs])
    assert [(g.label, len(g.runs)) for g in groups] == [("omninft", 2), ("placebo", 1)]
    assert groups[1].color == plots.FAINT
    assert groups[0].color != plots.FAINT
    panels = curve_panels(groups, ["sync", "offset_ms"], {m.name: m for m in MEASURES})
    assert [(p.title, p.y_label) for p in panels] == [("sync", "higher is better"), ("offset", "ms, lower is better")]
    band, training, bars, _ = panels[0].curves
    assert (band.name, band.kind, list(band.x)) == ("omninft, 2 seeds", "band", [0, 2, 4])
    assert list(band.mean) == pytest.approx([0.3, 0.3 + 2 * 0.07, 0.3 + 4 * 0.07])
    assert list(band.low) == pytest.approx([0.3, 0.4, 0.5])
    assert list(band.high) == pytest.approx([0.3, 0.48, 0.66])
    assert list(training.mean) == pytest.approx([0.2 + i * 0.07 for i in range(4)])
    assert bars.kind == "bars"
    assert list(bars.low) == pytest.approx([0.25, 0.21, 0.17])
    assert len(panels[1].curves) == 2  # a held-out measure has no training mean


def test_groups_that_share_a_recipe_are_named_by_folder(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "omninft", 1, 0.05), make_run(tmp_path / "b", "omninft", 1, 0.05)]
    config = yaml.safe_load((runs[1] / "config.yaml").read_text()) | {"optimiser": {"learning_rate": 1.0}}
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(config))
    assert [g.label for g in group_runs([read_run_folder(r) for r in runs])] == ["a", "b"]


def test_run_figures_and_captions(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "one", "omninft", 1, 0.05),
        make_run(tmp_path / "two", "omninft", 2, 0.09),
        make_run(tmp_path / "none", "placebo", 1, -0.02, shuffle=True, table=False),
    ]
    written = write_figures(runs, tmp_path / "figures")
    stems = [path.stem for path in written if path.suffix == ".svg"]
    assert stems == ["curves-rewards", "curves-held-out", "dots-one", "dots-two"]  # two measures make no radar
    texts = svg_texts(tmp_path / "figures" / "curves-held-out.svg")
    assert {"ms, lower is better", "iterations done", "omninft, 2 seeds", "placebo"} <= set(texts)
    captions = (tmp_path / "figures" / "captions.md").read_text(encoding="utf-8")
    assert "n = 8 clips" in captions
    assert "95 % interval of one run's mean (normal, over clips)" in captions
    assert "seeds of omninft: 1, 2" in captions
    assert "Grey: placebo, a placebo whose advantages were shuffled." in captions
    assert "20 pairs of clips from 20 prompts" in captions


def test_results_are_compared_clip_by_clip_where_possible(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0.5, 0.2, (30, 3))
    other = base + np.array([0.1, 0.1, 0.0]) + rng.normal(0, 0.02, (30, 3))
    paths = [
        make_result(tmp_path / "a", "base", tuple(base.mean(axis=0).tolist()), base),
        make_result(tmp_path / "b", "tuned", tuple(other.mean(axis=0).tolist()), other),
    ]
    written = write_figures(paths, tmp_path / "figures")
    stems = [path.stem for path in written if path.suffix == ".png"]
    assert stems == ["dots-tuned-vs-base", "radar-tuned-vs-base", "bars-world-1-measured"]
    texts = svg_texts(tmp_path / "figures" / "dots-tuned-vs-base.svg")
    assert "Quality $x$ ↑" in texts  # not read as mathematics
    assert "(standard deviations of base clips; right is better)" in texts
    captions = (tmp_path / "figures" / "captions.md").read_text(encoding="utf-8")
    assert "n = 30 clips of tuned and 30 of base" in captions
    assert "bootstrap over prompts" in captions


def test_unpaired_results_fall_back_to_relative_changes(tmp_path: Path) -> None:
    from omninft.evaluation.leaderboard import read_results

    paths = [
        make_result(tmp_path / "a", "base", (-2.0, 0.5, 0.0)),
        make_result(tmp_path / "b", "tuned", (-1.5, 0.4, 1.0)),
    ]
    (section,) = build_leaderboard(read_results(paths), "base").sections
    dots, normalised, notes = section_dots(section, section.compared[0])
    assert normalised == "%"
    assert [dot.change.mean for dot in dots] == pytest.approx([25.0, 20.0])  # a negative base; a lower lag
    assert (dots[1].change.low, dots[1].change.high) == pytest.approx((0.0, 40.0))
    assert (dots[0].base_low, dots[0].base_high) == pytest.approx((-5.0, 5.0))
    assert [dot.tone for dot in dots] == ["better", "same"]
    assert notes == ["Left out, for want of a value or for a base of 0: Depth."]


def test_bars_of_the_published_ablation() -> None:
    section = published_ablation()
    panels = bar_panels(section, section.rows)
    assert [p.title for p in panels] == ["VQ ↑", "AQ ↑", "TA-IB ↑", "AVHScore ↑", "JavisScore ↑", "DeSync (s) ↓"]
    assert [sorted(p.best) for p in panels] == [[4], [3], [3], [4], [4], [4]]
    assert panels[5].texts == ("0.569", "0.412", "0.322", "0.334", "0.269")
    with plots.styled():
        figure = plots.bars_figure(panels, [row.name for row in section.rows])
    for axes, panel in zip(figure.axes, panels, strict=True):
        widths = [patch.get_width() for patch in axes.patches]  # type: ignore[attr-defined]
        assert widths == pytest.approx([v.mean for v in panel.values])
        assert axes.get_xlim()[0] == 0


def test_bars_leave_out_missing_values(tmp_path: Path) -> None:
    paths = [
        make_result(tmp_path / "a", "base", (0.5, None, -1.0)),
        make_result(tmp_path / "b", "tuned", (0.6, 0.4, 1.0)),
    ]
    assert write_figures(paths, tmp_path / "figures", base="tuned")
    assert "\u2013" in svg_texts(tmp_path / "figures" / "bars-world-1-measured.svg")


def test_radar_needs_three_metrics() -> None:
    dot = Dot("a", Estimate(1, math.nan, math.nan), "1", "2")
    with plots.styled(), pytest.raises(ValueError, match="three"):
        plots.radar_figure([dot, dot], ("a", "b"), " %")


def test_style_does_not_leak_and_is_not_the_users(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path"}):
        written = write_figures([], tmp_path / "a")
    assert dict(matplotlib.rcParams) == before
    assert written[1].read_bytes() == write_figures([], tmp_path / "b")[1].read_bytes()


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    one = make_result(tmp_path / "a", "base", (0.5, 0.1, 1.0))
    with pytest.raises(OmniNFTError, match="two results of one protocol"):
        write_figures([one], tmp_path / "figures")
    two = make_result(tmp_path / "b", "tuned", (0.5, 0.1, 1.0))
    with pytest.raises(OmniNFTError, match="no row is named 'LTX-2'"):  # it is no row of theirs
        write_figures([one, two], tmp_path / "figures", base="LTX-2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OmniNFTError, match="expected a run folder"):
        write_figures([tmp_path / "empty"], tmp_path / "figures")
    run = make_run(tmp_path / "run", "omninft", 1, 0.1)
    (run / "evaluation.json").write_text(json.dumps({"rows": 1}))
    with pytest.raises(OmniNFTError, match=r"evaluation\.json"):
        write_figures([run], tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_missing_matplotlib_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", without)
    result = CliRunner().invoke(app, ["figures", "-o", str(tmp_path / "figures")])
    assert isinstance(result.exception, OmniNFTError)
    assert "pip install 'omninft[figures]'" in str(result.exception)


def test_command_lists_its_files(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["figures", "-o", str(tmp_path)])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) == 7
    assert str(tmp_path / "captions.md") in result.output
