"""Charts as SVG text: pure functions of data, without colours, which the page's style sheet gives by class.

Coordinates are in the view box's units with y downwards. Charts carry their data for the page's script in
`data-hover` (JSON, see `line_chart`), and are readable without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

Tone = Literal["accent", "ink", "faint"]
MINUS, ABSENT = "\u2212", "\u2013"

# Line chart: size and margins.
CHART_WIDTH, CHART_HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 8.0, 38.0
# Dot plot: width of one row's plot, its height, and what is kept free at both ends for the dot.
DOT_WIDTH, DOT_HEIGHT, DOT_MARGIN = 240.0, 58.0, 10.0
WAVE_WIDTH, WAVE_HEIGHT = 1000.0, 100.0


@dataclass(frozen=True)
class Series:
    """One line, or one set of points; `low` and `high` make a band around a line and bars on points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]  # a NaN breaks the line
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    kind: Literal["line", "points"] = "line"
    tone: Tone = "accent"


@dataclass(frozen=True)
class Scale:
    """A linear map from data to view box units."""

    domain: tuple[float, float]
    range: tuple[float, float]

    def __call__(self, value: float) -> float:
        (a, b), (p, q) = self.domain, self.range
        return p + (value - a) / (b - a) * (q - p) if b != a else (p + q) / 2


def format_number(value: float | None, digits: int | None = None, signed: bool = False) -> str:
    """A number for reading: three significant digits or `digits` after the point, a true minus, a dash for missing."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if digits is not None:
        text = f"{value:.{digits}f}"
    elif value != 0 and not 1e-3 <= abs(value) < 1e5:
        text = f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    else:
        text = f"{value:.{max(2 - math.floor(math.log10(abs(value))), 0) if value else 0}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    elif signed and value > 0:
        text = f"+{text}"
    return text.replace("-", MINUS)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers, about `count` of them, of which the first is at most `low` and the last at least `high`."""
    if low == high:
        pad = abs(low) / 10 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels of equally many decimals, or in powers of ten when those would be long."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    largest = max(abs(t) for t in ticks)
    if step < 1e-3 or largest >= 1e5:
        return ["0" if t == 0 else format_number(t).replace(".00e", "e").replace("0e", "e") for t in ticks]
    digits = next(d for d in range(5) if abs(round(step, d) - step) < step * 1e-6 or d == 4)
    return [format_number(t, digits) for t in ticks]


def line_chart(series: Sequence[Series], *, label: str, unit: str = "") -> str:
    """Lines with bands and points with bars over the number of iterations done.

    The x axis spans the data, the y axis round numbers around it. `data-hover` is a list of
    [x in view box units, heading, [[series, value], ...]], one for every x that any series has.

    Raises ValueError when no series has a finite point.
    """
    x_scale, y_scale, ticks = _axes(series)
    parts = [_grid(x_scale, y_scale, ticks)]
    for s in series:
        parts.append(_points(s, x_scale, y_scale) if s.kind == "points" else _line(s, x_scale, y_scale))
    hover = json.dumps(_hover(series, x_scale, unit), ensure_ascii=False)
    bottom = CHART_HEIGHT - BOTTOM
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP:g}" y2="{bottom:g}" visibility="hidden"/>')
    return (
        f'<svg class="chart" viewBox="0 0 {CHART_WIDTH:g} {CHART_HEIGHT:g}" role="img" tabindex="0" '
        f'aria-label="{escape(label)}" data-hover="{escape(hover)}">{"".join(parts)}</svg>'
    )


def _axes(series: Sequence[Series]) -> tuple[Scale, Scale, list[float]]:
    finite = [(x, v) for s in series for x, v in _extent(s) if math.isfinite(v)]
    if not finite:
        raise ValueError("a chart needs at least one finite point")
    xs = [x for x, _ in finite]
    ticks = nice_ticks(min(v for _, v in finite), max(v for _, v in finite))
    x_scale = Scale((min(xs), max(xs)), (LEFT, CHART_WIDTH - RIGHT))
    return x_scale, Scale((ticks[0], ticks[-1]), (CHART_HEIGHT - BOTTOM, TOP)), ticks


def _extent(series: Series) -> list[tuple[float, float]]:
    values = [series.y, *(v for v in (series.low, series.high) if v is not None)]
    return [(x, y) for column in values for x, y in zip(series.x, column, strict=True)]


def _grid(x_scale: Scale, y_scale: Scale, ticks: Sequence[float]) -> str:
    right, bottom = CHART_WIDTH - RIGHT, CHART_HEIGHT - BOTTOM
    parts = []
    for tick, text in zip(ticks, tick_labels(ticks), strict=True):
        y = y_scale(tick)
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6:g}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    low, high = x_scale.domain
    inside = [t for t in nice_ticks(low, high, count=5) if low <= t <= high] if high > low else [low]
    whole = [t for t in inside if float(t).is_integer()] or inside
    for tick, text in zip(whole, tick_labels(whole), strict=True):
        anchor = "end" if x_scale(tick) > right - 12 and high > low else "middle"
        parts.append(
            f'<text class="tick" x="{x_scale(tick):.1f}" y="{bottom + 15:g}" text-anchor="{anchor}">{text}</text>'
        )
    parts.append(f'<text class="tick axis" x="{right:g}" y="{bottom + 30:g}" text-anchor="end">iterations done</text>')
    parts.append(f'<line class="axis" x1="{LEFT:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}"/>')
    return "".join(parts)


def _line(series: Series, x_scale: Scale, y_scale: Scale) -> str:
    parts = []
    if series.low is not None and series.high is not None:
        rows = zip(series.x, series.low, series.high, strict=True)
        kept = [r for r in rows if all(math.isfinite(v) for v in r)]
        edge = [(x, high) for x, _, high in kept] + [(x, low) for x, low, _ in reversed(kept)]
        corners = " ".join(f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in edge)
        parts.append(f'<polygon class="band tone-{series.tone}" points="{corners}"/>')
    run: list[str] = []
    for x, y in [*zip(series.x, series.y, strict=True), (math.nan, math.nan)]:
        if math.isfinite(y):
            run.append(f"{x_scale(x):.1f},{y_scale(y):.1f}")
        elif run:
            # A run of one point is a dot: a line of no length would not be seen.
            px, py = run[0].split(",")
            parts.append(
                f'<polyline class="line tone-{series.tone}" points="{" ".join(run)}"/>'
                if len(run) > 1
                else f'<circle class="dot tone-{series.tone}" cx="{px}" cy="{py}" r="2"/>'
            )
            run = []
    return "".join(parts)


def _points(series: Series, x_scale: Scale, y_scale: Scale) -> str:
    parts = []
    known = [f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    if len(known) > 1:
        parts.append(f'<polyline class="line tone-{series.tone}" points="{" ".join(known)}"/>')
    for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        if not math.isfinite(y):
            continue
        px = f"{x_scale(x):.1f}"
        if series.low is not None and series.high is not None and math.isfinite(series.low[i] + series.high[i]):
            low, high = y_scale(series.low[i]), y_scale(series.high[i])
            parts.append(f'<line class="bar tone-{series.tone}" x1="{px}" x2="{px}" y1="{low:.1f}" y2="{high:.1f}"/>')
        parts.append(f'<circle class="dot tone-{series.tone}" cx="{px}" cy="{y_scale(y):.1f}" r="3"/>')
    return "".join(parts)


def _hover(series: Sequence[Series], x_scale: Scale, unit: str) -> list[tuple[float, str, list[tuple[str, str]]]]:
    values: dict[float, list[tuple[str, str]]] = {}
    suffix = f" {unit}" if unit else ""
    for s in series:
        for i, (x, y) in enumerate(zip(s.x, s.y, strict=True)):
            if not math.isfinite(y):
                continue
            text = format_number(y)
            if s.low is not None and s.high is not None and math.isfinite(s.low[i] + s.high[i]):
                text += f" [{format_number(s.low[i])}, {format_number(s.high[i])}]"
            # With one series the heading of the chart has said what it is.
            values.setdefault(x, []).append((s.name if len(series) > 1 else "", text + suffix))
    return [(round(x_scale(x), 1), f"after {x:g} iteration{'' if x == 1 else 's'}", values[x]) for x in sorted(values)]


def dot_plot(
    mean: float, low: float, high: float, *, domain: tuple[float, float], tone: str, label: str, margin: float = 0.0
) -> str:
    """One difference with its interval against a line at zero; rows with one `domain` line up.

    Without a finite mean only the zero line is drawn, and a band of `margin` on both sides of it.
    """
    scale = Scale(domain, (DOT_MARGIN, DOT_WIDTH - DOT_MARGIN))
    middle, zero = DOT_HEIGHT / 2, scale(0)
    parts = []
    if margin:
        left, right = scale(max(-margin, domain[0])), scale(min(margin, domain[1]))
        parts.append(f'<rect class="margin" x="{left:.1f}" width="{right - left:.1f}" y="0" height="{DOT_HEIGHT:g}"/>')
    parts += [f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{DOT_HEIGHT:g}"/>']
    if math.isfinite(low) and math.isfinite(high):
        parts.append(
            f'<line class="interval {tone}" x1="{scale(low):.1f}" x2="{scale(high):.1f}" '
            f'y1="{middle:g}" y2="{middle:g}"/>'
        )
    if math.isfinite(mean):
        parts.append(f'<circle class="dot {tone}" cx="{scale(mean):.1f}" cy="{middle:g}" r="4.5"/>')
    return (
        f'<svg class="dotplot row" viewBox="0 0 {DOT_WIDTH:g} {DOT_HEIGHT:g}" preserveAspectRatio="xMidYMid slice" '
        f'role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def dot_axis(domain: tuple[float, float]) -> str:
    """The scale under a column of dot plots of one domain."""
    scale = Scale(domain, (DOT_MARGIN, DOT_WIDTH - DOT_MARGIN))
    ticks = [t for t in nice_ticks(*domain, count=5) if domain[0] <= t <= domain[1]]
    parts = [f'<line class="axis" x1="{DOT_MARGIN:g}" x2="{DOT_WIDTH - DOT_MARGIN:g}" y1="1" y2="1"/>']
    for tick, text in zip(ticks, tick_labels(ticks), strict=True):
        x = scale(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="1" y2="5"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="17" text-anchor="middle">{text}</text>')
    return f'<svg class="dotplot" viewBox="0 0 {DOT_WIDTH:g} 20" aria-hidden="true">{"".join(parts)}</svg>'


def dot_heading(domain: tuple[float, float]) -> str:
    """Which side of the zero line is better, above a column of dot plots of one domain."""
    zero = Scale(domain, (DOT_MARGIN, DOT_WIDTH - DOT_MARGIN))(0)
    return (
        f'<svg class="dotplot" viewBox="0 0 {DOT_WIDTH:g} 16" role="img" aria-label="left worse, right better">'
        f'<text x="{zero - 8:.1f}" y="12" text-anchor="end">\u2190 worse</text>'
        f'<text x="{zero + 8:.1f}" y="12">better \u2192</text></svg>'
    )


def stacked_bar(parts: Mapping[str, float], *, label: str) -> str:
    """Shares of a whole as one horizontal bar, stretched to its place; part i has the class `part-i`.

    Raises ValueError when the parts are not all at least 0 with a positive sum.
    """
    total = sum(parts.values())
    if not (total > 0 and all(v >= 0 for v in parts.values())):
        raise ValueError(f"a stacked bar needs parts of at least 0 with a positive sum, found {dict(parts)}")
    drawn, x = [], 0.0
    for i, (name, value) in enumerate(parts.items()):
        width = value / total * 1000
        title = f"<title>{escape(name)}: {value / total:.0%}</title>"
        drawn.append(f'<rect class="part-{i}" x="{x:.2f}" y="0" width="{width:.2f}" height="10">{title}</rect>')
        x += width
    return (
        f'<svg class="stack" viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{"".join(drawn)}</svg>'
    )


def peaks(waveform: np.ndarray, buckets: int = 240) -> np.ndarray:
    """Lowest and highest sample over all channels in equal stretches of time, [buckets, 2]; waveform [channels, N]."""
    edges = np.linspace(0, waveform.shape[1], min(buckets, waveform.shape[1]) + 1).astype(int)[:-1]
    low = np.minimum.reduceat(waveform.min(axis=0), edges)
    high = np.maximum.reduceat(waveform.max(axis=0), edges)
    return np.stack([low, high], axis=1)


def waveform(
    envelope: np.ndarray,
    duration: float,
    *,
    sound_seconds: float | None = None,
    seen: Sequence[float] = (),
    heard: Sequence[float] = (),
    label: str,
) -> str:
    """The envelope of a clip's sound over `duration` seconds, and marks at times in seconds.

    `envelope` is [buckets, 2] from `peaks`, -1..1, spread over `sound_seconds` (default: the whole duration). What is
    seen is marked from the top edge, what is heard from the bottom edge: marks of one instant meet in the middle. The
    picture is stretched to its place; `line.playhead` is for the page's script to move over 0..1000.
    """
    middle = WAVE_HEIGHT / 2
    parts = [f'<line class="midline" x1="0" x2="{WAVE_WIDTH:g}" y1="{middle:g}" y2="{middle:g}"/>']
    if len(envelope):
        across = WAVE_WIDTH * ((sound_seconds or duration) / duration)
        xs = (np.arange(len(envelope)) + 0.5) / len(envelope) * across
        # A silent stretch keeps a hair of height, so that silence can be told from no sound at all.
        top = middle - np.maximum(envelope[:, 1], 0.01) * middle * 0.92
        bottom = middle - np.minimum(envelope[:, 0], -0.01) * middle * 0.92
        corners = [*zip(xs, top, strict=True), *zip(xs[::-1], bottom[::-1], strict=True)]
        parts.append(f'<path class="sound" d="M{"L".join(f"{x:.0f},{y:.1f}" for x, y in corners)}Z"/>')
    for times, name, y1, y2 in ((seen, "seen", 0.0, middle), (heard, "heard", middle, WAVE_HEIGHT)):
        for time in times:
            x = f"{time / duration * WAVE_WIDTH:.1f}"
            parts.append(
                f'<line class="mark {name}" x1="{x}" x2="{x}" y1="{y1:g}" y2="{y2:g}">'
                f"<title>{name} at {time:.2f} s</title></line>"
            )
    parts.append(f'<line class="playhead" x1="0" x2="0" y1="0" y2="{WAVE_HEIGHT:g}"/>')
    return (
        f'<svg class="wave" viewBox="0 0 {WAVE_WIDTH:g} {WAVE_HEIGHT:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
