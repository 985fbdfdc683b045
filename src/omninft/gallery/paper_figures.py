"""From runs, results and the published table to figure files and their captions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omninft.evaluation.leaderboard import (
    Row,
    Section,
    build_leaderboard,
    choose_base,
    heading,
    measured_sections,
    number,
    paired_rows,
    published_ablation,
    read_results,
)
from omninft.evaluation.paired import GROUP_TITLES, Estimate, Measure, PairedRow, PairedTable
from omninft.evaluation.results import RESULT_FILE, Metric
from omninft.files import write_text
from omninft.gallery import plots
from omninft.gallery.curves import thin
from omninft.gallery.plots import BarPanel, Curve, CurvePanel, Dot
from omninft.gallery.run_folder import RunFolder, read_run_folder
from omninft.types import OmniNFTError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS_FILE = "captions.md"
_TONES = "Blue: better, orange: worse, grey: the interval holds 0."
_NAN = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Drawing:
    """One figure to be: file name without ending, what to write below it, how it is drawn."""

    stem: str
    caption: str
    source: str  # where the numbers are from
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class RunGroup:
    """Runs of one configuration, which differ by seed only."""

    label: str
    runs: tuple[RunFolder, ...]
    color: str


def write_figures(sources: Sequence[Path], output: Path, base: str | None = None) -> list[Path]:
    """Draw what the sources allow into `output` as PNG and SVG, with captions.md; returns the files.

    Runs: reward curves, all runs in one, and base against trained of each. Results: every system against `base`
    (default: the first of its protocol) and all of them as bars. No sources: the published table and ablation.

    Raises:
        OmniNFTError: matplotlib is missing, a source is neither run nor result, or there is nothing to draw.
    """
    plots.require_matplotlib()
    runs, results = _sorted_sources(sources)
    drawings: list[Drawing] = []
    if not sources:
        drawings += _published_drawings(base)
    if results:
        drawings += _result_drawings(results, base)
    elif base is not None and sources:
        raise OmniNFTError(f"base {base!r}: runs carry their own base; a base is chosen among results")
    if runs:
        drawings += run_drawings(runs)
    if not drawings:
        raise OmniNFTError(
            f"nothing to draw in {', '.join(map(str, sources))}: expected two results of one protocol at least, or a "
            "run with evaluations"
        )
    written: list[Path] = []
    captions = ["# Captions", ""]
    with plots.styled():
        for drawing in _unlike(drawings):
            files = plots.save_figure(drawing.draw(), output / drawing.stem)
            written += files
            captions += [f"## {drawing.stem}", "", f"![{drawing.stem}]({files[0].name})", "", drawing.caption, ""]
            captions += [f"Files: `{files[0].name}`, `{files[1].name}`. Numbers: {drawing.source}.", ""]
    path = output / CAPTIONS_FILE
    write_text(path, "\n".join(captions))
    return [*written, path]


def section_dots(section: Section, row: Row) -> tuple[list[Dot], str, list[str]]:
    """Base of the section against `row`: dots, how they are normalised ("%" or "sd"), and what a caption must add.

    Normalised by the standard deviation of the base's clips where every metric was compared clip by clip, else by the
    absolute value of the base.
    """
    base = section.base
    if base is None:
        raise ValueError("the section has no base")
    both = [m for m in section.metrics if section.value(base, m) is not None and section.value(row, m) is not None]
    paired: dict[str, PairedRow] = {}
    if base.result is not None and row.result is not None:
        paired = paired_rows(base.result, row.result, drop_missing=True)
    by_spread = bool(both) and all(m.name in paired and paired[m.name].base_spread > 0 for m in both)
    dots = []
    for metric in both:
        old, new = (number(section.value(r, metric), metric.decimals) for r in (base, row))
        if by_spread:
            dots.append(Dot(heading(metric), paired[metric.name].standardised, old, new))
        elif section.value(base, metric):
            change, low, high = _relative(section, base, row, metric)
            dots.append(Dot(heading(metric), change, old, new, low, high))
    drawn = {dot.label for dot in dots}
    left_out = [m.label for m in section.metrics if heading(m) not in drawn]
    notes = [f"Left out, for want of a value or for a base of 0: {', '.join(left_out)}."] if left_out else []
    if by_spread:
        dropped = (f"{m.label} {paired[m.name].num_dropped}" for m in both if paired[m.name].num_dropped)
        if listed := ", ".join(dropped):
            notes.append(f"Clips without a score in one of the two, which the difference leaves out: {listed}.")
    return dots, "sd" if by_spread else "%", notes


def table_dots(table: PairedTable) -> list[Dot]:
    """Base against trained of a run, in standard deviations of the base clips."""
    dots = []
    for group, title in GROUP_TITLES.items():
        for row in table.group(group):
            if math.isfinite(row.standardised.mean):
                base, trained = (number(e.mean, min(row.decimals, 4)) for e in (row.base, row.trained))
                dots.append(Dot(_title(row.measure), row.standardised, base, trained, group=title))
    return dots


def group_runs(runs: Sequence[RunFolder]) -> list[RunGroup]:
    """Runs whose configurations differ in nothing but seed and place; placebo runs are grey.

    A group is named by its recipe, or by its folders where two groups share one.
    """
    by_config: dict[str, list[RunFolder]] = {}
    for run in runs:
        by_config.setdefault(_config_key(run), []).append(run)
    labels = [str(group[0].setting("recipe", group[0].path.absolute().name)) for group in by_config.values()]
    colors = iter(plots.PALETTE * len(runs))
    groups = []
    for label, members in zip(labels, by_config.values(), strict=True):
        if labels.count(label) > 1:
            label = ", ".join(run.path.absolute().name for run in members)
        placebo = bool(members[0].setting("credit.shuffle", False))
        groups.append(RunGroup(label, tuple(members), plots.FAINT if placebo else next(colors)))
    return groups


def curve_panels(groups: Sequence[RunGroup], names: Sequence[str], measures: dict[str, Measure]) -> list[CurvePanel]:
    """A panel per measure: dev evaluations of every group, and the training mean where there is one."""
    panels = []
    for name in names:
        curves = [c for g in groups for c in (_dev_curve(g, name), _training_curve(g, name)) if c is not None]
        if curves:
            measure = measures.get(name)
            title = _words(name, measure.unit if measure else "")
            panels.append(CurvePanel(title, measure.hint if measure else "mean", tuple(curves)))
    return panels


def bar_panels(section: Section, rows: Sequence[Row]) -> list[BarPanel]:
    """A panel per metric; best is the best of these rows."""
    section = replace(section, rows=tuple(rows))
    panels = []
    for metric in section.metrics:
        values = []
        for row in section.rows:
            found = row.values.get(metric.name)
            values.append(_NAN if found is None else found.estimate)
        texts = tuple(number(v.mean, metric.decimals) for v in values)
        best = frozenset(i for i, row in enumerate(section.rows) if section.rank(row, metric) == 1)
        panels.append(BarPanel(heading(metric), tuple(values), texts, best))
    return panels


def run_drawings(runs: Sequence[RunFolder]) -> list[Drawing]:
    """Curves of all runs together, and base against trained of every run that has its final table."""
    measures = {row.measure.name: row.measure for run in runs if run.table is not None for row in run.table.rows}
    trained = _in_order(
        k.removeprefix("reward/") for r in runs for i in r.iterations for k in i if k.startswith("reward/")
    )
    evaluated = _in_order(n for r in runs for row in r.evaluations().get("dev", []) for n in row.get("measures") or {})
    groups = group_runs(runs)
    folders = ", ".join(f"`{run.path.absolute().name}`" for run in runs)
    drawings = []
    for stem, names, what in (
        ("curves-rewards", trained, "Rewards that were trained"),
        ("curves-held-out", [n for n in evaluated if n not in trained], "Measures that were never trained on"),
    ):
        if panels := curve_panels(groups, names, measures):
            draw = _later(plots.curves_figure, panels)
            drawings.append(Drawing(stem, _curves_caption(what, groups, panels), f"metrics.jsonl of {folders}", draw))
    for run in runs:
        if run.table is not None and (dots := table_dots(run.table)):
            name = run.path.absolute().name
            caption = (
                f"Base against trained, run {name}. Dots: mean difference of the clips of a pair, in standard "
                f"deviations of the base clips' scores, signed so that right is better; "
                f"bars: its {run.table.confidence:.0%} interval. {_TONES} Numbers: means of base → trained. "
                f"Arrows: the direction in which the number itself improves. {run.table.caption}"
            )
            drawings += _dot_drawings(
                _slug(name), dots, "sd", ("base", "trained"), caption, f"evaluation.json of `{name}`"
            )
    return drawings


def _published_drawings(base: str | None) -> list[Drawing]:
    section = build_leaderboard((), base).sections[0]
    compared = section.compared[-1:] if base is None else section.compared
    source = "the published table of JavisBench"
    drawings = [d for row in compared for d in _section_drawings(section, row, source)]
    ablation = published_ablation()
    caption = (
        "Published ablation on LTX-2 (JavisBench): every row adds one part to the row before. Bars start at 0; bold "
        "and full colour: best. The paper gives no intervals. Arrows point to better."
    )
    draw = _later(plots.bars_figure, bar_panels(ablation, ablation.rows), [row.name for row in ablation.rows])
    return [*drawings, Drawing("ablation-published", caption, "the published ablation", draw)]


def _result_drawings(paths: Sequence[Path], base: str | None) -> list[Drawing]:
    results = read_results(paths)
    drawings: list[Drawing] = []
    for section in choose_base(measured_sections(results), base):
        if len(section.rows) < 2:
            continue
        if section.base is None:
            section = replace(section, base=section.rows[0], compared=section.rows[1:])
        rows = [section.base or section.rows[0], *section.compared]
        source = f"{RESULT_FILE} of {len(section.rows)} systems, protocol {section.protocol}"
        for row in section.compared:
            drawings += _section_drawings(section, row, source)
        counts = ", ".join(f"{row.name}: {row.clips}" for row in section.rows)
        caption = (
            f"{section.title}, protocol {section.protocol}. Bars start at 0; whiskers: 95 % interval by a bootstrap "
            f"over prompts; bold and full colour: best; grey: the base. Arrows point to better. Clips: {counts}."
        )
        draw = _later(plots.bars_figure, bar_panels(section, rows), [row.name for row in rows])
        drawings.append(Drawing(f"bars-{_slug(section.title)}", caption, source, draw))
    return drawings


def _section_drawings(section: Section, row: Row, source: str) -> list[Drawing]:
    dots, normalised, notes = section_dots(section, row)
    if section.base is None or not dots:
        return []
    base = section.base.name
    what = {
        "%": f"Dots: change from {base} in percent of its absolute value",
        "sd": f"Dots: mean difference from {base} over the same clips, in standard deviations of its clips' scores",
    }[normalised]
    known = [dot for dot in dots if math.isfinite(dot.change.low)]
    if not known:
        intervals = "There are no intervals: blue (better) and orange (worse) tell only the direction."
    elif normalised == "sd":
        intervals = f"Bars: 95 % interval of that difference, by a bootstrap over prompts. {_TONES}"
    else:
        intervals = (
            "Bars: 95 % intervals of both values (wide and pale: the base), by a bootstrap over prompts. Blue: better, "
            "orange: worse, grey: the intervals overlap."
        )
    clips = f" n = {row.clips} clips of {row.name} and {section.base.clips} of {base}." if row.clips else ""
    noted = f" {' '.join(notes)}" if notes else ""
    caption = (
        f"{row.name} against {base}; {section.title}, protocol {section.protocol}. {what}, signed so that right "
        f"is better. {intervals} Numbers: values of {base} → {row.name}. Arrows: the "
        f"direction in which the number itself improves.{clips}{noted}"
    )
    return _dot_drawings(_slug(f"{row.name} vs {base}"), dots, normalised, (base, row.name), caption, source)


def _dot_drawings(
    name: str, dots: Sequence[Dot], normalised: str, names: tuple[str, str], caption: str, source: str
) -> list[Drawing]:
    unit = {"%": "% of its value", "sd": "standard deviations of base clips"}[normalised]
    label = f"change from {names[0]}\n({unit}; right is better)"
    drawings = [Drawing(f"dots-{name}", caption, source, _later(plots.dot_figure, dots, label))]
    if len(dots) > 2:
        draw = _later(plots.radar_figure, dots, names, " %" if normalised == "%" else " sd")
        around = (
            f"The numbers of dots-{name} around a circle: the dashed ring is {names[0]}, outside it is better; thin "
            "lines along the spokes are the intervals. For what is compared, n and the intervals see there."
        )
        drawings.append(Drawing(f"radar-{name}", around, source, draw))
    return drawings


def _relative(section: Section, base: Row, row: Row, metric: Metric) -> tuple[Estimate, float, float]:
    """Percent of |base|, positive is better: the row's change with its own interval, and the base's interval."""
    first, second = base.values[metric.name].estimate, row.values[metric.name].estimate
    sign = 1 if metric.higher_is_better else -1

    def percent(value: float) -> float:
        return sign * 100 * (value - first.mean) / abs(first.mean)

    low, high = sorted((percent(second.low), percent(second.high)))
    base_low, base_high = sorted((percent(first.low), percent(first.high)))
    return Estimate(percent(second.mean), low, high), base_low, base_high


def _dev_curve(group: RunGroup, name: str) -> Curve | None:
    """One run: means with intervals. Several: their mean and extremes at the iterations that all have."""
    tables = [_dev_points(run, name) for run in group.runs]
    tables = [t for t in tables if t]
    if not tables:
        return None
    if len(tables) == 1:
        (table,) = tables
        means, lows, highs = ([v[i] for v in table.values()] for i in range(3))
        return Curve(group.label, list(table), means, lows, highs, "bars", group.color)
    shared = [x for x in tables[0] if all(x in t for t in tables)]
    table_of_means = np.array([[t[x][0] for x in shared] for t in tables])
    label = f"{group.label}, {len(tables)} {'seeds' if len({_seed(r) for r in group.runs}) == len(tables) else 'runs'}"
    mean, low, high = (f(table_of_means, axis=0) for f in (np.mean, np.min, np.max))
    return Curve(label, shared, mean.tolist(), low.tolist(), high.tolist(), kind="band", color=group.color)


def _training_curve(group: RunGroup, name: str) -> Curve | None:
    tables = []
    for run in group.runs:
        values = {r["iteration"] + 1: r.get(f"reward/{name}") for r in run.iterations}
        tables.append({x: float(v) for x, v in values.items() if isinstance(v, int | float)})
    shared = [x for x in tables[0] if all(x in t for t in tables)]
    if not shared:
        return None
    x, mean = thin([float(x) for x in shared], [float(np.mean([t[x] for t in tables])) for x in shared])
    blank = [math.nan] * len(x)
    return Curve(f"{group.label}, training prompts", x, mean, blank, blank, kind="thin", color=group.color)


def _dev_points(run: RunFolder, name: str) -> dict[float, tuple[float, float, float]]:
    """Iteration -> mean, low, high of the evaluations on dev."""
    points = {}
    for row in run.evaluations().get("dev", []):
        found = (row.get("measures") or {}).get(name) or {}
        if found.get("mean") is not None:
            mean, low, high = (
                float(v) if (v := found.get(k)) is not None else math.nan for k in ("mean", "low", "high")
            )
            points[float(row["iteration"])] = (mean, low, high)
    return points


def _curves_caption(what: str, groups: Sequence[RunGroup], panels: Sequence[CurvePanel]) -> str:
    kinds = {curve.kind for panel in panels for curve in panel.curves}
    sizes = sorted(
        {
            int(m["n"])
            for g in groups
            for run in g.runs
            for row in run.evaluations().get("dev", [])
            for m in (row.get("measures") or {}).values()
            if m.get("n")
        }
    )
    clips = " to ".join(dict.fromkeys(str(n) for n in (sizes[0], sizes[-1]))) if sizes else "no"
    parts = [
        f"{what}, over iterations. Points: means on the dev prompts (n = {clips} clips, always of the "
        "same prompts and noise)."
    ]
    if "bars" in kinds:
        parts.append("Bars at points: 95 % interval of one run's mean (normal, over clips).")
    if "band" in kinds:
        listed = "; ".join(f"{g.label}: {', '.join(_seed(r) for r in g.runs)}" for g in groups if len(g.runs) > 1)
        parts.append(
            f"Line and band: mean, lowest and highest of the runs (seeds of {listed}); a band is not an interval."
        )
    if "thin" in kinds:
        parts.append("Pale lines: means over the training prompts, which change with every iteration.")
    if placebo := [g.label for g in groups if g.color == plots.FAINT]:
        parts.append(f"Grey: {', '.join(placebo)}, a placebo whose advantages were shuffled.")
    return " ".join(parts)


def _sorted_sources(sources: Sequence[Path]) -> tuple[list[RunFolder], list[Path]]:
    """Runs and results. A folder with both is a result."""
    runs, results = [], []
    for source in sources:
        if source.is_file() or (source / RESULT_FILE).is_file():
            results.append(source)
        elif any((source / name).is_file() for name in ("metrics.jsonl", "evaluation.json")):
            run = read_run_folder(source)
            for problem in run.problems:
                if not problem.startswith("samples/"):  # figures need no clips
                    raise OmniNFTError(f"{source}: {problem}")
            runs.append(run)
        else:
            raise OmniNFTError(f"{source}: expected a run folder (metrics.jsonl) or a result ({RESULT_FILE})")
    return runs, results


def _config_key(run: RunFolder) -> str:
    """The configuration without what names a run; the folder where there is no configuration."""
    if not run.config:
        return str(run.path.absolute())
    tree: dict[str, Any] = {k: v for k, v in run.config.items() if k not in ("seed", "run")}
    tree["run"] = {k: v for k, v in dict(run.config.get("run") or {}).items() if k not in ("name", "folder")}
    return json.dumps(tree, sort_keys=True, default=str)


def _unlike(drawings: Sequence[Drawing]) -> list[Drawing]:
    """Drawings whose file names differ, also in a file system that ignores case."""
    taken: dict[str, int] = {}
    kept = []
    for drawing in drawings:
        number_of = taken[drawing.stem.lower()] = taken.get(drawing.stem.lower(), 0) + 1
        stem = drawing.stem if number_of == 1 else f"{drawing.stem}-{number_of}"
        kept.append(Drawing(stem, drawing.caption, drawing.source, drawing.draw))
    return kept


def _later(draw: Callable[..., Figure], *data: Any) -> Callable[[], Figure]:
    return lambda: draw(*data)


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _title(measure: Measure) -> str:
    unit = f" ({measure.unit})" if measure.unit else ""
    return f"{_words(measure.name, measure.unit)}{unit} {'↑' if measure.higher_is_better else '↓'}"


def _seed(run: RunFolder) -> str:
    return str(run.setting("seed", run.path.absolute().name))


def _words(name: str, unit: str = "") -> str:
    """A measure's name in words, without the unit that is written beside it."""
    return name.removesuffix(f"_{unit}").replace("_", " ")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "figure"
