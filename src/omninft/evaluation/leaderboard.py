"""The published table of JavisBench and own results, in sections whose rows share a protocol.

Only rows of one protocol are ranked or subtracted. Published rows come from the package's CSV files; what is known of
how they were made is the paper, so they form a section of their own, whatever protocol an own result has.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

from omninft.evaluation.paired import Measure, PairedRow, Verdict, compare_paired
from omninft.evaluation.results import EvaluationResult, Metric, MetricResult
from omninft.naming import did_you_mean
from omninft.types import OmniNFTError

Source = Literal["published", "measured"]
BENCHMARK = "javisbench"
AS_PUBLISHED = "as published"  # protocol of rows that are copied from a paper
PUBLISHED_BASE = "LTX-2"  # what the paper's differences are from
ABSENT, MINUS = "\u2013", "\u2212"
# Columns of the published table; `label` is the heading of the CSV.
PUBLISHED_METRICS = (
    Metric("vq", "VQ", "visual quality by VideoAlign"),
    Metric("aq", "AQ", "audio quality by AudioBox Aesthetics"),
    Metric("tv_ib", "TV-IB", "ImageBind cosine of text and video"),
    Metric("ta_ib", "TA-IB", "ImageBind cosine of text and sound"),
    Metric("clip", "CLIP", "CLIP cosine of text and frames"),
    Metric("clap", "CLAP", "CLAP cosine of text and sound"),
    Metric("av_ib", "AV-IB", "ImageBind cosine of sound and video"),
    Metric("avh_score", "AVHScore", "mean ImageBind cosine of frames and sound"),
    Metric("javis_score", "JavisScore", "the least synchronous parts of sliding windows, by ImageBind"),
    Metric("desync", "DeSync", "mean absolute offset of sound and picture by Synchformer", False, "s"),
)


@dataclass(frozen=True)
class Row:
    """One system."""

    name: str  # unlike that of any other row of its source
    source: Source
    values: Mapping[str, MetricResult]  # by metric name; a metric that is not there is missing
    group: str = ""  # kind of system, as published
    size: str = ""  # parameters, as published
    result: EvaluationResult | None = None  # of a measured row

    @property
    def clips(self) -> int:
        """Clips that were evaluated; 0 where that is not known."""
        return len(self.result.clips) if self.result is not None else 0


@dataclass(frozen=True)
class Difference:
    """A row minus the base on one metric; low and high are NaN where clips were not compared pair by pair."""

    absolute: float
    relative: float  # absolute / |base|; NaN for a base of 0
    verdict: Verdict  # by the interval where there is one, else by sign
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Section:
    """Rows of one protocol, which may be ranked together."""

    title: str
    protocol: str  # AS_PUBLISHED, or the digest
    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]
    base: Row | None = None
    compared: tuple[Row, ...] = ()  # rows whose differences from the base are shown
    notes: tuple[str, ...] = ()

    def value(self, row: Row, metric: Metric) -> float | None:
        found = row.values.get(metric.name)
        return None if found is None or found.value is None or not math.isfinite(found.value) else found.value

    def rank(self, row: Row, metric: Metric) -> Literal[0, 1, 2]:
        """1 for the best value of the column, 2 for the second best, else 0."""
        return self._ranks[metric.name].get(row.name, 0)

    def difference(self, row: Row, metric: Metric) -> Difference | None:
        """Against the base; None where either value is missing or there is no base."""
        if self.base is None:
            return None
        value, base = self.value(row, metric), self.value(self.base, metric)
        if value is None or base is None:
            return None
        paired = self._paired.get(row.name, {}).get(metric.name)
        if paired is not None:
            d = paired.difference
            # What reads as 0 is neither better nor worse.
            flat = round(d.mean, metric.decimals) == 0 and paired.verdict != "unclear"
            return Difference(
                d.mean, paired.relative_change, "no difference" if flat else paired.verdict, d.low, d.high
            )
        if row.values[metric.name].missing or self.base.values[metric.name].missing:
            return None  # means over different clips
        absolute = value - base
        # What reads as 0 is none: published values carry no more digits than are shown.
        gain = round(absolute, metric.decimals) * (1 if metric.higher_is_better else -1)
        verdict: Verdict = "no difference" if gain == 0 else "better" if gain > 0 else "worse"
        return Difference(absolute, absolute / abs(base) if base else math.nan, verdict)

    @cached_property
    def _ranks(self) -> dict[str, dict[str, Literal[0, 1, 2]]]:
        """Metric -> row -> rank. Values that read alike share a rank; a column of one value has none."""
        ranks: dict[str, dict[str, Literal[0, 1, 2]]] = {}
        for metric in self.metrics:
            cells = {r.name: (v, r.values[metric.name]) for r in self.rows if (v := self.value(r, metric)) is not None}
            # A mean over fewer clips than others have is another number: the missing ones may be the hard ones.
            complete = any(cell.missing == 0 for _, cell in cells.values())
            known = {name: v for name, (v, cell) in cells.items() if not (complete and cell.missing)}
            shown = {name: float(f"{v:.{metric.decimals}f}") for name, v in known.items()}
            order = sorted(set(shown.values()), reverse=metric.higher_is_better)
            places: dict[float, Literal[0, 1, 2]] = dict(zip(order, (1, 2), strict=False)) if len(order) > 1 else {}
            ranks[metric.name] = {name: places.get(v, 0) for name, v in shown.items()}
        return ranks

    @cached_property
    def _paired(self) -> dict[str, dict[str, PairedRow]]:
        base = self.base.result if self.base is not None else None
        if base is None:
            return {}
        return {row.name: paired_rows(base, row.result) for row in self.compared if row.result is not None}


@dataclass(frozen=True)
class Leaderboard:
    """Everything that is shown, in order."""

    sections: tuple[Section, ...]


def read_results(paths: Iterable[Path]) -> list[tuple[Path, EvaluationResult]]:
    """Results with where they came from, each file once.

    Raises OmniNFTError for a path that is not a result of `omninft evaluate`.
    """
    found: dict[Path, tuple[Path, EvaluationResult]] = {}
    for path in paths:
        found.setdefault(_folder(path.resolve()), (path, EvaluationResult.load(path)))
    return list(found.values())


def build_leaderboard(results: Sequence[tuple[Path, EvaluationResult]] = (), base: str | None = None) -> Leaderboard:
    """The published table where it has a place (no results, or JavisBench among them), and the results by protocol.

    Differences are shown in every section that has the row `base`: of all its other rows. Without `base` the
    published section shows those of the systems built on LTX-2, as the paper does.

    Raises:
        OmniNFTError: no section has that row (the nearest name is given), or the name is that of several.
    """
    sections = []
    if not results or any(r.protocol.benchmark == BENCHMARK for _, r in results):
        sections.append(published_section())
    sections += measured_sections(results)
    return Leaderboard(tuple(choose_base(sections, base)))


def choose_base(sections: Sequence[Section], base: str | None) -> list[Section]:
    """The sections with what is compared in each: see `build_leaderboard`, also for what is raised."""
    if base is None:
        return [_with_published_base(section) for section in sections]
    chosen = [_with_base(section, base) for section in sections]
    if all(after.base is None for after in chosen):
        raise OmniNFTError(f"no row is named {base!r}{_nearest(base, [r.name for s in sections for r in s.rows])}")
    pairs = zip(sections, chosen, strict=True)
    return [_with_published_base(before) if after.base is None else after for before, after in pairs]


def published_section() -> Section:
    """The paper's table."""
    rows = tuple(
        Row(line["model"], "published", _published_values(line), line["group"], line["size"])
        for line in _lines("javisbench_published.csv")
    )
    note = (
        "Copied from the paper, which gives no intervals: no number of this table was measured by this program, and "
        "none of it is ranked with numbers that were."
    )
    return Section("JavisBench, published", AS_PUBLISHED, PUBLISHED_METRICS, rows, notes=(note,))


def published_ablation() -> Section:
    """The paper's ablation on LTX-2: every row adds one part to the row before."""
    lines = _lines("javisbench_ablation_published.csv")
    metrics = tuple(m for m in PUBLISHED_METRICS if m.label in lines[0])
    rows = tuple(Row(line["model"], "published", _published_values(line)) for line in lines)
    return Section("Ablation on JavisBench, published", AS_PUBLISHED, metrics, rows)


def measured_sections(results: Sequence[tuple[Path, EvaluationResult]]) -> list[Section]:
    """Results grouped by protocol, in the order of first appearance; systems of one name are told apart by path."""
    names = _told_apart(results)
    by_digest: dict[str, list[Row]] = {}
    for name, (_, result) in zip(names, results, strict=True):
        row = Row(name, "measured", result.overall, result=result)
        by_digest.setdefault(result.protocol.digest, []).append(row)
    return [_measured_section(digest, rows, by_digest) for digest, rows in by_digest.items()]


def paired_rows(base: EvaluationResult, other: EvaluationResult, *, drop_missing: bool = False) -> dict[str, PairedRow]:
    """Metric -> comparison clip by clip, for what is a plain mean over clips in both results.

    Metrics of whole sets (FVD) and totals are left out, and so are metrics that only one result has on some clip: the
    paired difference would not be that of the two values. `drop_missing` drops those clips instead.
    """
    first, second = _clip_scores(base), _clip_scores(other)
    keys = [key for key in first if key in second]
    if len(keys) < max(len(first), len(second)) or not keys:
        return {}
    metrics = [m for m in base.metrics if m.name in {n.name for n in other.metrics}]
    columns = {}
    for metric in metrics:
        pair = np.array([[table[key].get(metric.name, math.nan) for key in keys] for table in (first, second)])
        if _is_plain_mean(pair[0], base.overall, metric.name) and _is_plain_mean(pair[1], other.overall, metric.name):
            columns[metric] = pair
    if not drop_missing:
        columns = {m: pair for m, pair in columns.items() if (np.isfinite(pair[0]) == np.isfinite(pair[1])).all()}
    if not columns:
        return {}
    measures = [Measure(m.name, "held_out", None, m.higher_is_better, m.unit) for m in columns]
    stacked = np.stack(list(columns.values()), axis=2)
    table = compare_paired(measures, stacked[0], stacked[1], [prompt_id for _, prompt_id, _ in keys])
    return {row.measure.name: row for row in table.rows}


def number(value: float | None, decimals: int, signed: bool = False) -> str:
    """A value as it is shown: a true minus, a sign on request, a dash for missing."""
    if value is None or not math.isfinite(value):
        return ABSENT
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def heading(metric: Metric) -> str:
    """E.g. "DeSync (s) ↓": the arrow points to better."""
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{metric.label}{unit} {'↑' if metric.higher_is_better else '↓'}"


def interval(row: Row, metric: Metric) -> str:
    """The interval of a value in brackets; empty where there is none."""
    found = row.values.get(metric.name)
    if found is None or found.value is None or found.low is None or found.high is None:
        return ""
    return f"[{number(found.low, metric.decimals)}, {number(found.high, metric.decimals)}]"


def lacking(row: Row, metric: Metric) -> str:
    """E.g. "3 of 100 missing": clips without a score, where the value leaves some out."""
    found = row.values.get(metric.name)
    return f"{found.missing} of {found.missing + found.count} missing" if found is not None and found.missing else ""


def percent(difference: Difference) -> str:
    """The relative difference, e.g. "−52.7 %"; empty for a base of 0."""
    return f"{number(100 * difference.relative, 1, signed=True)} %" if math.isfinite(difference.relative) else ""


def _lines(file: str) -> list[dict[str, str]]:
    text = resources.files("omninft.evaluation").joinpath("data", file).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _published_values(line: Mapping[str, str]) -> dict[str, MetricResult]:
    return {m.name: MetricResult(float(line[m.label])) for m in PUBLISHED_METRICS if line.get(m.label)}


def _measured_section(digest: str, rows: Sequence[Row], all_rows: Mapping[str, Sequence[Row]]) -> Section:
    results = [row.result for row in rows if row.result is not None]
    protocol = results[0].protocol
    metrics = {m.name: m for result in reversed(results) for m in result.metrics}
    order = dict.fromkeys(m.name for result in results for m in result.metrics)
    notes = []
    if protocol.benchmark == BENCHMARK:
        notes.append(
            f"Measured by this program (protocol {digest}) and not ranked with the published table: prompts, clips "
            "and judging weights of the paper may differ from these."
        )
    for other, others in all_rows.items():
        second = others[0].result
        if other != digest and second is not None and second.protocol.benchmark == protocol.benchmark:
            keys = _differing(protocol.settings, second.protocol.settings)
            keys += ["version"] if protocol.version != second.protocol.version else []
            notes.append(f"Not ranked with protocol {other}, which differs in {', '.join(keys)}.")
    notes += [f"{row.name}: {note}" for row in rows if row.result is not None for note in row.result.notes]
    title = f"{protocol.benchmark} {protocol.version}, measured"
    return Section(title, digest, tuple(metrics[n] for n in order), tuple(rows), notes=tuple(notes))


def _differing(first: Mapping[str, object], second: Mapping[str, object]) -> list[str]:
    keys = dict.fromkeys([*first, *second])
    return [k for k in keys if json.dumps(first.get(k), sort_keys=True) != json.dumps(second.get(k), sort_keys=True)]


def _with_published_base(section: Section) -> Section:
    if section.protocol != AS_PUBLISHED:
        return section
    chosen = _with_base(section, PUBLISHED_BASE)
    return replace(chosen, compared=tuple(r for r in chosen.compared if r.name.startswith(f"{PUBLISHED_BASE} + ")))


def _with_base(section: Section, base: str) -> Section:
    """The section with that base, or as it is when no row has the name."""
    exact = [r for r in section.rows if r.name == base]
    alike = exact or [r for r in section.rows if base == (r.result.system if r.result is not None else r.name)]
    if len(alike) > 1:
        names = ", ".join(repr(r.name) for r in alike)
        raise OmniNFTError(f"the base {base!r} names {len(alike)} rows; choose one of {names}")
    if not alike:
        return section
    return replace(section, base=alike[0], compared=tuple(r for r in section.rows if r is not alike[0]))


def _nearest(word: str, known: Sequence[str]) -> str:
    return did_you_mean(word, known) or f"; there are {', '.join(dict.fromkeys(known))}"


def _told_apart(results: Sequence[tuple[Path, EvaluationResult]]) -> list[str]:
    """Names of systems, with the part of the path that differs where a name is used twice."""
    names = [result.system for _, result in results]
    labels = list(names)
    for name in {n for n in names if names.count(n) > 1}:
        places = [i for i, other in enumerate(names) if other == name]
        folders = [_folder(results[i][0].resolve()) for i in places]
        shared = os.path.commonpath(folders)
        for i, folder in zip(places, folders, strict=True):
            part = os.path.relpath(folder, shared)
            labels[i] = f"{name} ({folder.name if part == '.' else Path(part).as_posix()})"
    # A label may still equal another system's own name.
    return [label if labels.index(label) == i else f"{label} #{i + 1}" for i, label in enumerate(labels)]


def _folder(path: Path) -> Path:
    """What names a result: the folder of a result.json, else the file."""
    return path.parent if path.name == "result.json" else path


def _clip_scores(result: EvaluationResult) -> dict[tuple[int, str, int], dict[str, float]]:
    """(row of the prompt file, prompt id, how many-th clip of it) -> scores that are there."""
    scores: dict[tuple[int, str, int], dict[str, float]] = {}
    for clip in sorted(result.clips, key=lambda c: (c.index, c.file)):
        repeat = 0
        while (clip.index, clip.prompt_id, repeat) in scores:
            repeat += 1
        scores[clip.index, clip.prompt_id, repeat] = {n: v for n, v in clip.scores.items() if v is not None}
    return scores


def _is_plain_mean(scores: np.ndarray, overall: Mapping[str, MetricResult], name: str) -> bool:
    known = scores[np.isfinite(scores)]
    value = overall[name].value if name in overall else None
    return value is not None and known.size > 0 and math.isclose(float(known.mean()), value, rel_tol=1e-6, abs_tol=1e-9)
