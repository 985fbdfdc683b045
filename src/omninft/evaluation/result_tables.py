"""The result of an evaluation as Markdown, as CSV and on a terminal."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from omninft.evaluation.results import EvaluationResult, Metric, MetricResult
from omninft.files import write_text

MARKDOWN_FILE, CSV_FILE = "table.md", "table.csv"
ABSENT = "\u2013"


def write_tables(result: EvaluationResult, folder: Path) -> None:
    """table.md and table.csv, each whole or not at all."""
    for name, text in ((MARKDOWN_FILE, to_markdown(result)), (CSV_FILE, to_csv(result))):
        write_text(folder / name, text)


def to_markdown(result: EvaluationResult) -> str:
    """Overall with intervals, the means of each category, and how the numbers were made."""
    protocol = result.protocol
    title = f"# {_escape(result.system)} on {protocol.benchmark}"
    lines = [title, "", f"Protocol {protocol.digest}, {len(result.clips)} clips.", ""]
    lines += ["| Metric | Value | 95 % interval | Clips | Missing | What it is |", "|---|--:|---|--:|--:|---|"]
    for metric in result.metrics:
        found = result.overall[metric.name]
        cells = [_heading(metric), _value(metric, found), _interval(metric, found), str(found.count)]
        lines.append(f"| {' | '.join([*cells, str(found.missing), _escape(_hint(metric))])} |")
    if result.categories:
        shown = [m for m in result.metrics if any(m.name in row for row in result.categories.values())]
        lines += ["", "## By category", ""]
        lines += [f"| Category | Clips | {' | '.join(_heading(m) for m in shown)} |", f"|---|--:|{'--:|' * len(shown)}"]
        for category, row in result.categories.items():
            values = [_value(m, row[m.name]) for m in shown]
            total = max((r.count + r.missing for r in row.values()), default=0)
            lines.append(f"| {_escape(category)} | {total} | {' | '.join(values)} |")
    lines += ["", "## How it was made", "", *(f"- {_escape(line)}" for line in settings(result))]
    if result.notes:
        lines += ["", "## Notes", "", *(f"- {_escape(note)}" for note in result.notes)]
    return "\n".join(lines) + "\n"


def to_csv(result: EvaluationResult) -> str:
    """One line per scope (overall, or a category) and metric, unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = "system benchmark protocol scope metric label unit higher_is_better value low high count missing"
    writer.writerow(columns.split())
    for scope, row in {"overall": result.overall, **result.categories}.items():
        for metric in result.metrics:
            if metric.name not in row:
                continue
            found = row[metric.name]
            start = [result.system, result.protocol.benchmark, result.protocol.digest, scope]
            about = [metric.name, metric.label, metric.unit, str(metric.higher_is_better).lower()]
            numbers = ["" if x is None else x for x in (found.value, found.low, found.high)]
            writer.writerow([*start, *about, *numbers, found.count, found.missing])
    return out.getvalue()


def render(result: EvaluationResult, console: Console) -> None:
    """The overall table, how it was made, and what a reader must know."""
    protocol = result.protocol
    title = f"{result.system} on {protocol.benchmark} (protocol {protocol.digest}), {len(result.clips)} clips"
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None)
    table.add_column("Metric", no_wrap=True)
    table.add_column("Value", justify="right", no_wrap=True)
    table.add_column("95 % interval", no_wrap=True)
    table.add_column("Clips", justify="right")
    table.add_column("Missing", justify="right")
    table.add_column("What it is", style="dim", overflow="fold")
    for metric in result.metrics:
        found = result.overall[metric.name]
        cells = [_heading(metric), _value(metric, found), _interval(metric, found), str(found.count)]
        table.add_row(*map(Text, [*cells, str(found.missing) if found.missing else "", _hint(metric)]))
    console.print(table)
    for line in settings(result):
        console.print(Text(line, style="dim"))
    for note in result.notes:
        console.print(Text.assemble(("note ", "yellow"), note))


def settings(result: EvaluationResult) -> list[str]:
    """Everything that made the numbers, a line each: generation, protocol, judging models."""
    lines = [f"{name}: {_plain(value)}" for name, value in result.generation.items()]
    lines += [f"{name}: {_plain(value)}" for name, value in result.protocol.settings.items()]
    lines += [f"{result.protocol.benchmark} version {result.protocol.version}"]
    return lines + [f"{judge}: {about}" for judge, about in result.weights.items()]


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(v)}" for name, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)


def _heading(metric: Metric) -> str:
    return f"{metric.label} {'↑' if metric.higher_is_better else '↓'}"


def _hint(metric: Metric) -> str:
    return f"{metric.description}, {metric.unit}" if metric.unit else metric.description


def _value(metric: Metric, found: MetricResult) -> str:
    return ABSENT if found.value is None else f"{found.value:.{metric.decimals}f}"


def _interval(metric: Metric, found: MetricResult) -> str:
    if found.low is None or found.high is None:
        return ""
    return f"{found.low:.{metric.decimals}f} .. {found.high:.{metric.decimals}f}"


def _escape(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
