"""Figures for a paper, drawn with matplotlib: pure functions of data to a figure, and how it is written.

Every figure is one or two text columns wide, on white, in colours that the colour-blind tell apart, with DejaVu Sans,
which matplotlib carries, so that the same data give the same files everywhere.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from omninft.evaluation.paired import Estimate
from omninft.files import replacing
from omninft.gallery.figures import MINUS, nice_ticks
from omninft.types import OmniNFTError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN_WIDTH, PAGE_WIDTH = 3.35, 6.9  # inches: one and two columns of a paper
DPI = 300
INK, MUTED, FAINT, LINE = "#1b1d1f", "#5a6067", "#8c939a", "#d9dcdf"
# Okabe and Ito's colours, of which the first two carry better and worse.
BETTER, WORSE = "#0072B2", "#D55E00"
PALETTE = (BETTER, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
STYLE: Any = {  # for rcParams, whose type lists every key
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7.0,
    "axes.titlesize": 7.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 7.0,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": DPI,
    "text.parse_math": False,  # a $ in a name is a $
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "omninft",  # ids that do not change from run to run
}


@dataclass(frozen=True)
class Dot:
    """One metric of base and trained; `change` and `base_low`, `base_high` are normalised, positive is better."""

    label: str  # with unit and arrow
    change: Estimate  # of trained from base; ends are NaN where there is no interval
    base: str  # values as text
    trained: str
    base_low: float = math.nan  # interval of the base around 0, where the two were not compared in pairs
    base_high: float = math.nan
    group: str = ""

    @property
    def tone(self) -> Literal["better", "worse", "same"]:
        """By the interval where there is one (unpaired: where the two do not overlap), else by sign."""
        low, high = (self.change.low, self.change.high) if math.isfinite(self.change.low) else (self.change.mean,) * 2
        floor, ceiling = (self.base_low, self.base_high) if math.isfinite(self.base_low) else (0.0, 0.0)
        return "better" if low > ceiling else "worse" if high < floor else "same"


@dataclass(frozen=True)
class Curve:
    """A measure over iterations; ends are NaN where there is no interval."""

    name: str  # curves of one name share a legend entry
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    kind: Literal["band", "bars", "thin"]  # seeds' extremes; intervals at points; a line in the background
    color: str


@dataclass(frozen=True)
class CurvePanel:
    title: str
    y_label: str  # unit and direction
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class BarPanel:
    """One metric of several systems; NaN draws no bar, or no whisker."""

    title: str  # with unit and arrow
    values: tuple[Estimate, ...]
    texts: tuple[str, ...]
    best: frozenset[int]  # which bars are the best


def require_matplotlib() -> None:
    """Raises OmniNFTError where it is not installed."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise OmniNFTError("figures need matplotlib: pip install 'omninft[figures]'") from error


@contextmanager
def styled() -> Iterator[None]:
    """Drawing and saving inside it follow STYLE, whatever the user's own settings are."""
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def save_figure(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write stem.png and stem.svg; equal figures give equal bytes. Call inside `styled`."""
    written = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        path = stem.with_name(f"{stem.name}.{kind}")
        with replacing(path) as temporary:
            figure.savefig(temporary, format=kind, metadata=metadata)
        written.append(path)
    return written[0], written[1]


def dot_figure(dots: Sequence[Dot], x_label: str) -> Figure:
    """A row per metric: base at 0, trained as a dot with its interval, right is better; values in the margin."""
    rows = _grouped([dot.group for dot in dots])
    height = 0.62 + 0.165 * len(rows)
    figure, axes = _new(COLUMN_WIDTH, height)
    labels, ticks = [], []
    for y, (heading, index) in enumerate(rows):
        if heading:
            axes.annotate(heading, (0, y), (-3, 0), ("axes fraction", "data"), "offset points", **_LABEL, weight="bold")
            continue
        dot = dots[index]
        _draw_dot(axes, dot, y)
        ticks.append(y)
        labels.append(dot.label)
        text = f"{dot.base} → {dot.trained}"
        axes.annotate(
            text, (1, y), (4, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=6, color=MUTED
        )
    axes.axvline(0, color=FAINT, linewidth=0.8, zorder=1)
    axes.set_yticks(ticks, labels, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.xaxis.grid(True)
    axes.set_axisbelow(True)
    axes.margins(x=0.08)
    axes.set_xlabel(x_label)
    return figure


def radar_figure(dots: Sequence[Dot], names: tuple[str, str], unit: str) -> Figure:
    """The changes of `dot_figure` around a circle: the base is the ring at 0, outside it is better.

    Raises ValueError for fewer than three dots, which make no polygon.
    """
    if len(dots) < 3:
        raise ValueError(f"a radar chart needs three metrics at least, found {len(dots)}")
    figure, axes = _new(COLUMN_WIDTH, 3.1, projection="polar")
    angles = np.arange(len(dots)) / len(dots) * 2 * np.pi
    closed = np.append(angles, 2 * np.pi)
    values = np.array([dot.change.mean for dot in dots])
    ends = [v for d in dots for v in (d.change.mean, d.change.low, d.change.high) if math.isfinite(v)]
    low, high = min([*ends, 0.0]), max([*ends, 0.0])
    polar: Any = axes  # PolarAxes has methods that Axes lacks
    polar.set_theta_zero_location("N")
    polar.set_theta_direction(-1)
    # The centre lies a quarter below the worst, so that a loss is still an area.
    polar.set_ylim(low - (0.25 * (high - low) or 1.0), high + 0.06 * (high - low))
    around = np.linspace(0, 2 * np.pi, 361)
    polar.plot(around, np.zeros_like(around), color=MUTED, linewidth=1.0, linestyle=(0, (3, 2)), label=names[0])
    for dot, angle in zip(dots, angles, strict=True):
        if math.isfinite(dot.change.low):
            polar.plot([angle, angle], [dot.change.low, dot.change.high], color=BETTER, linewidth=0.8, alpha=0.6)
    polar.plot(closed, np.append(values, values[0]), color=BETTER, marker="o", markersize=3, label=names[1])
    polar.fill(closed, np.append(values, values[0]), color=BETTER, alpha=0.1, linewidth=0)
    polar.set_xticks(angles, [dot.label for dot in dots], color=INK)
    for label, angle in zip(polar.get_xticklabels(), angles, strict=True):
        side = math.sin(angle)
        label.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
    polar.tick_params(axis="x", pad=1)
    _label_rings(polar, angles, values, unit)
    polar.grid(True)
    polar.spines["polar"].set_visible(False)
    polar.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def curves_figure(panels: Sequence[CurvePanel], columns: int = 3) -> Figure:
    """Small charts over iterations, each with its own y axis; one legend for all."""
    columns = min(columns, len(panels))
    lines = math.ceil(len(panels) / columns)
    width = PAGE_WIDTH if columns > 1 else COLUMN_WIDTH
    figure, grid = _grid(width, 0.45 + 1.42 * lines, lines, columns, len(panels))
    for i, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        for curve in panel.curves:
            _draw_curve(axes, curve)
        axes.set_title(panel.title)
        axes.set_ylabel(panel.y_label)
        axes.yaxis.grid(True)
        axes.set_axisbelow(True)
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=6, integer=True)
        if i + columns >= len(panels):
            axes.set_xlabel("iterations done")
    entries: dict[str, Any] = {}
    for axes in grid:
        handles, names = axes.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    figure.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=min(len(entries), 4))
    return figure


def bars_figure(panels: Sequence[BarPanel], names: Sequence[str], columns: int = 3) -> Figure:
    """A chart per metric with a bar per system from 0 and its value; the first system is grey, the best bold."""
    columns = min(columns, len(panels))
    lines = math.ceil(len(panels) / columns)
    width = PAGE_WIDTH if columns > 1 else COLUMN_WIDTH
    figure, grid = _grid(width, lines * (0.42 + 0.17 * len(names)), lines, columns, len(panels))
    for i, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        _draw_bars(axes, panel)
        axes.set_title(panel.title)
        axes.set_yticks(range(len(names)), names if i % columns == 0 else [""] * len(names), color=INK)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
    return figure


_LABEL: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 6.5, "color": INK}


def _new(width: float, height: float, **options: Any) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot(**options)


def _grid(width: float, height: float, lines: int, columns: int, count: int) -> tuple[Figure, list[Axes]]:
    """The first `count` places of a grid, row by row; the rest stay empty."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def _label_rings(polar: Any, angles: np.ndarray, values: np.ndarray, unit: str) -> None:
    """A few rings, named between the two spokes where the polygon leaves most room."""
    low, high = polar.get_ylim()
    reach = np.maximum(values, np.roll(values, -1))
    wedge = int(reach.argmin())
    ticks = [t for t in nice_ticks(low, high, count=6) if low < t < high]
    # The ring at 0 is in the legend; names inside the polygon would cover its points.
    labels = [f"{t:+g}{unit}".replace("-", MINUS) if t and t > reach[wedge] else "" for t in ticks]
    polar.set_yticks(ticks, labels, color=MUTED, fontsize=5.5, va="center", ha="center")
    polar.set_rlabel_position(math.degrees(angles[wedge] + np.pi / len(angles)))
    for label in polar.get_yticklabels():
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4})


def _grouped(groups: Sequence[str]) -> list[tuple[str, int]]:
    """Rows to draw: (heading, -1) before the first of every named group, then ("", index)."""
    rows: list[tuple[str, int]] = []
    last = ""
    for index, group in enumerate(groups):
        if group and group != last:
            rows.append((group, -1))
        last = group
        rows.append(("", index))
    return rows


def _draw_dot(axes: Axes, dot: Dot, y: float) -> None:
    color = {"better": BETTER, "worse": WORSE, "same": FAINT}[dot.tone]
    if math.isfinite(dot.base_low):
        axes.hlines(y, dot.base_low, dot.base_high, color=LINE, linewidth=4, zorder=2)
    if math.isfinite(dot.change.low):
        axes.plot(
            [dot.change.low, dot.change.high], [y, y], color=color, linewidth=1.6, solid_capstyle="butt", zorder=3
        )
    else:
        axes.plot([0, dot.change.mean], [y, y], color=color, linewidth=0.8, zorder=2)
    axes.plot([0], [y], "o", markersize=3, color=FAINT, markerfacecolor="white", markeredgewidth=0.8, zorder=4)
    filled = "white" if dot.tone == "same" else color
    axes.plot([dot.change.mean], [y], "o", markersize=4.2, color=color, markerfacecolor=filled, zorder=5)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    x, mean = np.asarray(curve.x, float), np.asarray(curve.mean, float)
    low, high = np.asarray(curve.low, float), np.asarray(curve.high, float)
    lift = 0.0 if curve.color == FAINT else 0.5  # grey stays behind
    if curve.kind == "thin":
        axes.plot(x, mean, color=curve.color, linewidth=0.7, alpha=0.45, label=curve.name, zorder=2 + lift)
        return
    if curve.kind == "band":
        axes.fill_between(x, low, high, color=curve.color, alpha=0.2, linewidth=0, zorder=2 + lift)
    else:
        axes.vlines(x, low, high, color=curve.color, linewidth=0.9, alpha=0.8, zorder=3 + lift)
    axes.plot(x, mean, color=curve.color, marker="o", label=curve.name, zorder=4 + lift)


def _draw_bars(axes: Axes, panel: BarPanel) -> None:
    ends = [0.0]
    for y, (value, text) in enumerate(zip(panel.values, panel.texts, strict=True)):
        end = 0.0
        if math.isfinite(value.mean):
            color = FAINT if y == 0 else BETTER
            axes.barh(y, value.mean, height=0.62, color=color, alpha=1.0 if y in panel.best or y == 0 else 0.55)
            end = value.mean
        if math.isfinite(value.low):
            axes.plot([value.low, value.high], [y, y], color=INK, linewidth=0.8)
            end = value.high if value.mean >= 0 else value.low
            ends += [value.low, value.high]
        ends.append(end)
        side = -1 if end < 0 else 1
        weight = "bold" if y in panel.best else "normal"
        place: dict[str, Any] = {
            "va": "center",
            "ha": "left" if side > 0 else "right",
            "fontsize": 6,
            "color": INK,
            "weight": weight,
        }
        axes.annotate(text, (end, y), (3 * side, 0), "data", "offset points", **place)
    axes.axvline(0, color=FAINT, linewidth=0.6)
    low, high = min(ends), max(ends)
    room = 0.28 * (high - low or 1.0)  # for the numbers
    axes.set_xlim(low - (room if low < 0 else 0), high + (room if high > 0 else 0))
