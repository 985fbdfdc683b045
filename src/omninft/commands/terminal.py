"""What commands print with, and the options that several of them take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from omninft.types import Finding

# Files and pipes have no width of their own; lines that wrap at 80 columns are hard to search.
console = Console(width=None if sys.stdout.isatty() else 200)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Changes to the recipe by dotted keys, e.g. optimiser.learning_rate=1e-4"
    ),
]
RecipeArgument = Annotated[str, typer.Argument(help="A shipped recipe's name (see below) or a YAML file.")]
RewardNames = Annotated[
    list[str] | None, typer.Option("--reward", "-r", help="Reward name or package.module:function; repeatable.")
]
Preset = Annotated[str | None, typer.Option(help="A set of rewards: paper, commercial or offline.")]
RewardOptions = Annotated[
    list[str] | None,
    typer.Option("--option", "-O", help="reward.key=value, e.g. clap.device=cuda or desync.seconds=8; repeatable."),
]


class NotedProgress(Progress):
    """A bar whose tasks may carry a note."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
        )

    def add_task(self, description: str, *args: Any, **fields: Any) -> Any:
        fields.setdefault("note", "")
        return super().add_task(description, *args, **fields)


def stage_bars(progress: Progress) -> Callable[[str, int, int], None]:
    """A bar for every stage that reports."""
    tasks: dict[str, Any] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = progress.add_task(stage, total=total)
        progress.update(tasks[stage], completed=done, total=total)

    return show


def print_findings(findings: Iterable[Finding]) -> bool:
    """A line each, as they come; whether all are well."""
    ok = True
    for finding in findings:
        mark = "[green]ok[/green]  " if finding.ok else "[red]error[/red]"
        console.print(f"{mark} {finding.subject}: {escape(finding.text)}", highlight=False)
        ok &= finding.ok
    return ok
