"""A leaderboard as Markdown, as CSV and on a terminal."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from omninft.evaluation.leaderboard import (
    AS_PUBLISHED,
    Leaderboard,
    Row,
    Section,
    heading,
    interval,
    lacking,
    number,
    percent,
)
from omninft.evaluation.paired import VERDICTS_EXPLAINED
from omninft.evaluation.results import Metric

MARKS = {0: "", 1: "★", 2: "☆"}  # beside bold and underlined, for readers who see neither
RANK_WORDS = {0: "", 1: "best", 2: "second best"}
_PAD = 2  # between columns of the terminal, the rule's own character included
_MAX_NAME = 32  # longer names are folded
_VERDICT_STYLES = {"better": "green", "worse": "red", "no difference": "dim", "unclear": "dim"}


def legend(section: Section) -> list[str]:
    """How to read the section, a sentence each: marks, intervals, differences."""
    lines = []
    if any(section.rank(r, m) for r in section.rows for m in section.metrics):
        lines.append(
            f"{MARKS[1]} best and {MARKS[2]} second best of this table; values that read alike share a mark. "
            "Arrows point to better."
        )
    if any(interval(r, m) for r in section.rows for m in section.metrics):
        lines.append("Brackets: 95 % interval by a bootstrap over prompts.")
    if section.base is not None and section.compared:
        found = [section.difference(r, m) for r in section.compared for m in section.metrics]
        text = f"Differences are from {section.base.name}: absolute, and relative to its absolute value."
        if any(d is not None and math.isfinite(d.low) for d in found):
            text += (
                " Brackets: 95 % interval of the difference over the same clips; without brackets the word tells only "
                f"the direction. {VERDICTS_EXPLAINED}"
            )
        else:
            text += " Better and worse tell only the direction: there is no interval of these differences."
        lines.append(text)
    return lines


def to_markdown(board: Leaderboard) -> str:
    """GitHub tables: one section a heading, differences in a table below."""
    return "\n".join(line for section in board.sections for line in _markdown_section(section))


def to_csv(board: Leaderboard) -> str:
    """One line per row and metric, unrounded; `rank` counts within the section (equal protocol) only."""
    out = io.StringIO()
    columns = (
        "section source protocol group model size metric unit direction value low high count missing rank "
        "base difference difference_low difference_high relative verdict"
    )
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns.split())
    for section in board.sections:
        for row in section.rows:
            for metric in section.metrics:
                writer.writerow(_csv_cells(section, row, metric))
    return out.getvalue()


def render(board: Leaderboard, console: Console) -> None:
    """Print the board; what is wider than the console is continued in further tables of the same rows."""
    for section in board.sections:
        console.print(Text.assemble((section.title, "bold"), f" (protocol: {section.protocol})"), "")
        for metrics in _chunks(section, section.rows, console.width):
            console.print(_value_table(section, metrics), "")
        if section.base is not None and section.compared:
            console.print(Text(f"Differences from {section.base.name}", style="bold"), "")
            for metrics in _chunks(section, section.compared, console.width):
                console.print(_difference_table(section, metrics), "")
        for line in [*legend(section), *section.notes]:
            console.print(Text(line, style="dim"))
        console.print()


def _markdown_section(section: Section) -> list[str]:
    published = section.protocol == AS_PUBLISHED
    first = ["Group", "Model", "Size", "Source"] if published else ["System", "Clips", "Source"]
    lines = [f"## {_escape(section.title)}", "", f"Protocol: {section.protocol}", ""]
    lines += _markdown_head(first, section.metrics)
    for row in section.rows:
        known = [row.group, row.name, row.size] if published else [row.name, str(row.clips)]
        cells = [*map(_escape, [*known, row.source]), *(_markdown_value(section, row, m) for m in section.metrics)]
        lines.append(f"| {' | '.join(cells)} |")
    if section.base is not None and section.compared:
        lines += ["", f"### Differences from {_escape(section.base.name)}", ""]
        lines += _markdown_head(["Model" if published else "System"], section.metrics)
        for row in section.compared:
            cells = [_escape(row.name), *(" ".join(_difference_parts(section, row, m)) for m in section.metrics)]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for line in [*legend(section), *section.notes]:
        lines += [_escape(line), ""]
    return lines


def _markdown_head(first: Sequence[str], metrics: Sequence[Metric]) -> list[str]:
    cells = [*first, *(_escape(heading(m)) for m in metrics)]
    return [f"| {' | '.join(cells)} |", f"|{'---|' * len(first)}{'--:|' * len(metrics)}"]


def _markdown_value(section: Section, row: Row, metric: Metric) -> str:
    text, rank = number(section.value(row, metric), metric.decimals), section.rank(row, metric)
    text = f"**{text}**" if rank == 1 else f"<ins>{text}</ins>" if rank == 2 else text
    return " ".join(part for part in (text, MARKS[rank], interval(row, metric), lacking(row, metric)) if part)


def _escape(text: str) -> str:
    """Text that Markdown takes literally, also inside a table."""
    text = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", " ".join(text.split()))
    return re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")


def _difference_parts(section: Section, row: Row, metric: Metric) -> list[str]:
    """Absolute, (relative), [interval], verdict: those that are known."""
    found = section.difference(row, metric)
    if found is None:
        return [number(None, 0)]
    parts = [number(found.absolute, metric.decimals, signed=True)]
    if text := percent(found):
        parts.append(f"({text})")
    if math.isfinite(found.low):
        ends = (number(v, metric.decimals, signed=True) for v in (found.low, found.high))
        parts.append(f"[{', '.join(ends)}]")
    return [*parts, found.verdict]


def _csv_cells(section: Section, row: Row, metric: Metric) -> list[str]:
    value = row.values.get(metric.name)
    known = (value.value, value.low, value.high) if value is not None else (None, None, None)
    counts = (value.count, value.missing) if value is not None and row.result is not None else ("", "")
    cells = [section.title, row.source, section.protocol, row.group, row.name, row.size, metric.label, metric.unit]
    cells += ["higher" if metric.higher_is_better else "lower", *map(_plain, known), *map(str, counts)]
    cells += [str(section.rank(row, metric) or ""), section.base.name if section.base is not None else ""]
    found = section.difference(row, metric) if row in section.compared else None
    if found is None:
        return [*cells, "", "", "", "", ""]
    return [*cells, *map(_plain, (found.absolute, found.low, found.high, found.relative)), found.verdict]


def _plain(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else repr(float(value))


def _chunks(section: Section, rows: Sequence[Row], width: int) -> list[list[Metric]]:
    """Metrics in runs that fit the console beside the names."""
    compared = rows is section.compared
    left = _name_width(rows) + _PAD
    if any(r.size for r in rows) and not compared:
        left += max(len("size"), *(len(r.size) for r in rows)) + _PAD
    chunks: list[list[Metric]] = []
    room = 0
    for metric in section.metrics:
        texts = [_lines_of(section, row, metric, compared) for row in rows]
        need = max([len(heading(metric)), *(len(line) for lines in texts for line in lines)]) + _PAD
        if not chunks or need > room:
            chunks.append([])
            room = width - left
        chunks[-1].append(metric)
        room -= need
    return chunks


def _lines_of(section: Section, row: Row, metric: Metric, compared: bool) -> list[str]:
    if compared:
        return _difference_parts(section, row, metric)
    value = f"{number(section.value(row, metric), metric.decimals)} {MARKS[section.rank(row, metric)] or ' '}"
    return [value, *(f"{text}  " for text in (interval(row, metric), lacking(row, metric)) if text)]


def _value_table(section: Section, metrics: Sequence[Metric]) -> Table:
    sizes = any(r.size for r in section.rows)
    table = _table(section.rows, metrics, sizes)
    group = ""
    for row in section.rows:
        if row.group != group:
            group = row.group
            table.add_section()
            table.add_row(Text(group, style="dim"))
        cells = []
        for metric in metrics:
            style = {0: "", 1: "bold", 2: "underline"}[section.rank(row, metric)]
            value, *rest = _lines_of(section, row, metric, compared=False)
            text = Text(value[:-2], style=style)
            cells.append(Text.assemble(text, value[-2:], *((f"\n{line}", "dim") for line in rest)))
        table.add_row(Text(row.name), *([Text(row.size)] if sizes else []), *cells)
    return table


def _difference_table(section: Section, metrics: Sequence[Metric]) -> Table:
    table = _table(section.compared, metrics, sizes=False)
    for row in section.compared:
        cells = []
        for metric in metrics:
            found = section.difference(row, metric)
            style = _VERDICT_STYLES[found.verdict] if found is not None else ""
            cells.append(Text("\n".join(_difference_parts(section, row, metric)), style=style))
        table.add_row(Text(row.name), *cells)
    return table


def _name_width(rows: Sequence[Row]) -> int:
    return min(max(len(r.name) for r in rows), _MAX_NAME)


def _table(rows: Sequence[Row], metrics: Sequence[Metric], sizes: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, _PAD - 1, 0, 0))
    table.add_column("", overflow="fold", width=_name_width(rows))
    if sizes:
        table.add_column("size", no_wrap=True)
    for metric in metrics:
        table.add_column(heading(metric), justify="right", no_wrap=True)
    return table
