"""The leaderboard as one self-contained HTML page: nothing to load, light and dark, readable by a screen reader."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources

import jinja2
import yaml
from markupsafe import Markup

from omninft.evaluation.leaderboard import (
    AS_PUBLISHED,
    Leaderboard,
    Row,
    Section,
    interval,
    lacking,
    number,
    percent,
)
from omninft.evaluation.leaderboard_text import MARKS, RANK_WORDS, legend
from omninft.evaluation.results import Metric

_TONES = {"better": "is-better", "worse": "is-worse", "no difference": "is-same", "unclear": "is-same"}


@dataclass(frozen=True)
class Cell:
    """One value or difference, as text."""

    text: str
    rank: int = 0
    mark: str = ""
    rank_word: str = ""
    small: tuple[str, ...] = ()  # further lines
    word: str = ""  # the verdict
    tone: str = ""


@dataclass(frozen=True)
class Line:
    """One row of a table."""

    row: Row
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Part:
    """A section as the template shows it."""

    section: Section
    published: bool
    groups: tuple[tuple[str, tuple[Line, ...]], ...]
    differences: tuple[Line, ...]
    legend: tuple[str, ...]
    settings: str  # of the protocol, as YAML


def leaderboard_page(board: Leaderboard) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("omninft.gallery", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = resources.files("omninft.gallery").joinpath("templates", "report.css").read_text(encoding="utf-8")
    template = environment.get_template("leaderboard.html.j2")
    return template.render(parts=[_part(section) for section in board.sections], css=Markup(css))


def _part(section: Section) -> Part:
    groups: dict[str, list[Line]] = {}
    for row in section.rows:
        line = Line(row, tuple(_value(section, row, m) for m in section.metrics))
        groups.setdefault(row.group, []).append(line)
    compared = section.compared if section.base is not None else ()
    differences = tuple(Line(row, tuple(_difference(section, row, m) for m in section.metrics)) for row in compared)
    result = section.rows[0].result
    settings = "" if result is None else yaml.safe_dump(result.protocol.settings, sort_keys=False, allow_unicode=True)
    return Part(
        section,
        section.protocol == AS_PUBLISHED,
        tuple((name, tuple(lines)) for name, lines in groups.items()),
        differences,
        tuple(legend(section)),
        settings,
    )


def _value(section: Section, row: Row, metric: Metric) -> Cell:
    rank = section.rank(row, metric)
    return Cell(
        number(section.value(row, metric), metric.decimals),
        rank,
        MARKS[rank],
        RANK_WORDS[rank],
        tuple(text for text in (interval(row, metric), lacking(row, metric)) if text),
    )


def _difference(section: Section, row: Row, metric: Metric) -> Cell:
    found = section.difference(row, metric)
    if found is None:
        return Cell(number(None, 0))
    ends = ""
    if math.isfinite(found.low):
        ends = f"[{', '.join(number(v, metric.decimals, signed=True) for v in (found.low, found.high))}]"
    return Cell(
        number(found.absolute, metric.decimals, signed=True),
        small=tuple(text for text in (percent(found), ends) if text),
        word=found.verdict,
        tone=_TONES[found.verdict],
    )
