"""Metrics over iterations as panels of small charts: rewards, health of the run, and whatever else was recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from omninft.evaluation.paired import JUDGED_ON, Measure
from omninft.gallery.figures import Series, Tone, format_number, line_chart, stacked_bar
from omninft.gallery.run_folder import RunFolder

# Longer runs are drawn as means over equal stretches of iterations.
MAX_POINTS = 400
_NOT_PLOTTED = {"kind", "iteration", "optimiser_step", "elapsed"}
# Known names or name prefixes: title, what a reader should know, unit.
_HEALTH: dict[str, tuple[str, str, str]] = {
    "advantage/conflict_share": (
        "Opposite advantages",
        "Share of clips whose picture and sound advantages have opposite signs.",
        "",
    ),
    "gradient_norm/": ("Gradient norm", "Per branch, before clipping. Zero means that nothing is learnt.", ""),
    "old_deviation_sample/": (
        "Distance from old",
        "Between the predictions of current and old policy, after the step. Zero means that nothing is learnt.",
        "",
    ),
    "update_norm/": ("Update norm", "How far the parameters moved in the iteration.", ""),
    "advantage/mean_abs_": ("Advantage", "Mean absolute advantage per branch: the strength of the signal.", ""),
    "loss/": ("Loss", "Its value says little about learning: it need not fall while rewards rise.", ""),
    "reference/": ("Distance from base", "The term that holds the policy near where it started.", ""),
    "advantage/zero_variance_groups": (
        "Groups without contrast",
        "Prompt groups whose clips all scored alike: nothing to learn from.",
        "",
    ),
    "seconds": ("Time per iteration", "", "s"),
    "memory_gb": ("Memory", "Peak of the iteration.", "GB"),
}
_BRANCH_TONES: dict[str, Tone] = {"video": "accent", "audio": "ink"}


@dataclass(frozen=True)
class Panel:
    """One chart with its words."""

    title: str
    note: str
    svg: Markup
    legend: tuple[tuple[str, Tone], ...]  # series name, tone; empty for a single series


@dataclass(frozen=True)
class StageTimes:
    """Mean seconds of an iteration by stage."""

    svg: Markup
    parts: tuple[tuple[str, str, str], ...]  # stage, seconds, share
    total: str


def reward_panels(run: RunFolder, measures: Mapping[str, Measure]) -> list[Panel]:
    """One panel per reward or evaluated measure: training mean and evaluations with intervals."""
    rows, evaluations = run.iterations, run.evaluations()
    trained = [key.removeprefix("reward/") for row in rows for key in row if key.startswith("reward/")]
    evaluated = [n for split in evaluations.values() for row in split for n in row.get("measures") or {}]
    panels = []
    for name in dict.fromkeys([*trained, *evaluated]):
        series = [
            s
            for s in [_iteration_series(rows, f"reward/{name}", "training", "faint" if evaluations else "accent")]
            if s
        ]
        for split in sorted(evaluations):
            points = _evaluation_series(evaluations[split], name, split, "accent" if split == "dev" else "ink")
            series += [points] if points else []
        if not series:
            continue
        measure = measures.get(name)
        note = f"{JUDGED_ON[measure.route].capitalize()}; {measure.hint}." if measure else ""
        if measure is not None and measure.group == "held_out":
            note = f"{note[:-1]}; never trained on."
        panels.append(_panel(_words(name), note, series, measure.unit if measure else ""))
    return panels


def health_panels(run: RunFolder) -> list[Panel]:
    """The known figures of a healthy run, in a fixed order, those that were recorded."""
    rows = run.iterations
    panels = []
    for key, (title, note, unit) in _HEALTH.items():
        series = _family(rows, key)
        if series:
            panels.append(_panel(title, note, series, unit))
    missing = [k for k in _keys(rows) if k.startswith("missing/")]
    totals = [sum(_value(row, k) or 0 for k in missing) for row in rows]
    if any(totals):
        whole = [{"iteration": row["iteration"], "all": total} for row, total in zip(rows, totals, strict=True)]
        counts = missing_scores(run)
        note = "Clips without a score: " + ", ".join(f"{_words(n)} {c}" for n, c in counts.items()) + "."
        series = [s for s in [_iteration_series(whole, "all", "missing scores", "accent")] if s]
        panels.append(_panel("Missing scores", note, series, ""))
    return panels


def other_panels(run: RunFolder) -> list[Panel]:
    """Every recorded number that the report has no place of its own for."""
    rows = run.iterations
    known = (*_HEALTH, "reward/", "missing/", "time/")
    keys = [
        k for k in _keys(rows) if k not in _NOT_PLOTTED and not any(k == n or _starts_with_family(k, n) for n in known)
    ]
    families = dict.fromkeys(k.rpartition("/")[0] + "/" if k.rpartition("/")[2] in _BRANCH_TONES else k for k in keys)
    panels = []
    for family in families:
        series = _family(rows, family)
        if series:
            panels.append(_panel(_words(family.strip("/").replace("/", ": ")), "", series, ""))
    return panels


def stage_times(run: RunFolder) -> StageTimes | None:
    """Where the time of an iteration goes, from `time/*`; None when that was not recorded."""
    rows = run.iterations
    means = {}
    for key in _keys(rows):
        values = [v for row in rows if (v := _value(row, key)) is not None]
        if key.startswith("time/") and values and np.mean(values) > 0:
            means[_words(key.removeprefix("time/"))] = float(np.mean(values))
    if not means:
        return None
    seconds = [v for row in rows if (v := _value(row, "seconds")) is not None]
    rest = float(np.mean(seconds)) - sum(means.values()) if seconds else 0.0
    if rest > 0.01 * sum(means.values()):
        means["other"] = rest
    total = sum(means.values())
    label = "Mean time per iteration: " + ", ".join(f"{n} {v:.2f} s" for n, v in means.items())
    parts = tuple((n, f"{format_number(v)} s", f"{v / total:.0%}") for n, v in means.items())
    return StageTimes(Markup(stacked_bar(means, label=label)), parts, f"{format_number(total)} s")


def missing_scores(run: RunFolder) -> dict[str, int]:
    """Number of missing scores over the run for every reward that had any."""
    rows = run.iterations
    keys = [k for k in _keys(rows) if k.startswith("missing/")]
    totals = {k.removeprefix("missing/"): sum(_value(row, k) or 0 for row in rows) for k in keys}
    return {name: int(total) for name, total in totals.items() if total}


def thin(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most `limit` points: means over equal runs of neighbours; a run with no finite value stays NaN."""
    if len(x) <= limit:
        return list(x), list(y)
    size = math.ceil(len(x) / limit)
    starts = range(0, len(x), size)
    means = []
    for i in starts:
        values = [v for v in y[i : i + size] if math.isfinite(v)]
        means.append(float(np.mean(values)) if values else math.nan)
    return [float(np.mean(x[i : i + size])) for i in starts], means


def _panel(title: str, note: str, series: Sequence[Series], unit: str) -> Panel:
    names = ", ".join(s.name for s in series)
    label = f"{title} over iterations: {names}. Latest: " + "; ".join(_latest(s, unit) for s in series)
    legend = tuple((s.name, s.tone) for s in series) if len(series) > 1 else ()
    heading = f"{title} ({unit})" if unit else title
    return Panel(heading, note, Markup(line_chart(series, label=label, unit=unit)), legend)


def _latest(series: Series, unit: str) -> str:
    known = [y for y in series.y if math.isfinite(y)]
    return f"{series.name} {format_number(known[-1])} {unit}".rstrip()


def _family(rows: Sequence[Mapping[str, Any]], name: str) -> list[Series]:
    """Series of a number, or of all of a family that ends in "/" or "_" ("loss/": loss/video and loss/audio)."""
    if name[-1] not in "/_":
        one = _iteration_series(rows, name, _words(name.rpartition("/")[2]), "accent")
        return [one] if one else []
    members = [key for key in _keys(rows) if key.startswith(name)]
    found = []
    for key in members:
        member = key.removeprefix(name)
        tone = _BRANCH_TONES.get(member, "accent" if len(members) == 1 else "faint")
        series = _iteration_series(rows, key, _words(member), tone)
        found += [series] if series else []
    return found


def _starts_with_family(key: str, name: str) -> bool:
    return name[-1] in "/_" and key.startswith(name)


def _iteration_series(rows: Sequence[Mapping[str, Any]], key: str, name: str, tone: Tone) -> Series | None:
    ys = [math.nan if (v := _value(row, key)) is None else v for row in rows]
    if not any(math.isfinite(y) for y in ys):
        return None
    # Rows count from 0 what was going on, the axis counts what is done: so do folders, checkpoints and evaluations.
    x, y = thin([float(row["iteration"] + 1) for row in rows], ys)
    return Series(name, x, y, tone=tone)


def _evaluation_series(rows: Sequence[Mapping[str, Any]], name: str, split: str, tone: Tone) -> Series | None:
    kept = [row for row in rows if _value((row.get("measures") or {}).get(name) or {}, "mean") is not None]
    if not kept:
        return None
    columns = {
        key: [math.nan if (v := _value(row["measures"][name], key)) is None else v for row in kept]
        for key in ("mean", "low", "high")
    }
    x = [float(row["iteration"]) for row in kept]
    return Series(split, x, columns["mean"], columns["low"], columns["high"], kind="points", tone=tone)


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of recorded numbers in the order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row if _value(row, key) is not None))


def _value(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None  # type: ignore[arg-type]


def _words(name: str) -> str:
    return name.replace("_", " ")
