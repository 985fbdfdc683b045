"""What commands print with, and the options that several of them take."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from omninft.types import Finding

if TYPE_CHECKING:
    from omninft.config import Config

# Files and pipes have no width of their own; lines that wrap at 80 columns are hard to search.
console = Console(width=None if sys.stdout.isatty() else 200)


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """Names of recipes, also of the last one of several joined by +, YAML files and keys: what may stand there."""
    from omninft.recipes import recipe_names

    named, plus, last = incomplete.rpartition("+")
    files = sorted(map(str, Path().glob("*.yaml")))
    found = [f"{named}{plus}{name}" for name in _starting((*recipe_names(), *files), last)]
    return found if plus else [*found, *complete_key(incomplete)]


def complete_key(incomplete: str) -> list[str]:
    """Keys of the config with an equals sign."""
    from omninft.commands.keys import config_keys

    return _starting((f"{key.name}=" for key in config_keys() if "[]" not in key.name), incomplete)


def complete_reward(incomplete: str) -> list[str]:
    """Names of rewards."""
    from omninft.rewards.registry import reward_names

    return _starting(reward_names(), incomplete)


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes to the recipe, e.g. optimiser.learning_rate=1e-4; `omninft config keys` lists the keys.",
        autocompletion=complete_key,
    ),
]
RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="A shipped recipe's name (see below), a YAML file, or several joined by +.", autocompletion=complete_recipe
    ),
]
RewardNames = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        "-r",
        help="Reward name or package.module:function; repeatable.",
        autocompletion=complete_reward,
    ),
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; default: 16 for tiny, 40 for LTX-2.", min=1)]
VideoGuidance = Annotated[
    float | None, typer.Option(help="Text guidance of the video, 1 is off; default: 1 for tiny, 3 for LTX-2.")
]
AudioGuidance = Annotated[
    float | None, typer.Option(help="Text guidance of the sound, 1 is off; default: 1 for tiny, 7 for LTX-2.")
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


def print_findings(findings: Iterable[Finding]) -> bool:
    """A line each, as they come; whether all are well."""
    ok = True
    for finding in findings:
        mark = "[green]ok[/green]  " if finding.ok else "[red]error[/red]"
        mark = "[yellow]warning[/yellow]" if finding.ok and finding.doubtful else mark
        console.print(f"{mark} {finding.subject}: {escape(finding.text)}", highlight=False)
        ok &= finding.ok
    return ok


_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def chosen_config(recipe: str, overrides: Sequence[str] | None, resume: Path | None = None) -> Config:
    """The config that a command line means: RECIPE KEY=VALUE ..., or KEY=VALUE ... alone for the recipe omninft.

    With `resume` it is that of the run, and the recipe does not count.

    Raises:
        OmniNFTError: what `load_config` and `read_run_config` refuse.
    """
    from omninft.config import load_config

    changes = list(overrides or [])
    if _OVERRIDE.match(recipe):
        # Typer reads the first argument as the recipe, whatever it is.
        recipe, changes = "omninft", [recipe, *changes]
    if resume is not None:
        from omninft.runs.folder import read_run_config

        return read_run_config(resume, changes)
    return load_config(recipe, changes)
