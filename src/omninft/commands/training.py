"""Commands that train and build models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from omninft.commands.terminal import (
    NotedProgress,
    Overrides,
    RecipeArgument,
    chosen_config,
    console,
    print_findings,
)
from omninft.types import OmniNFTError


def train(
    recipe: RecipeArgument = "omninft",
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with from its last checkpoint.")] = None,
) -> None:
    """Post-train a model: sample, score, learn, and compare base against trained on held-out prompts."""
    from omninft.runs.display import ConsoleDisplay
    from omninft.train import train as run_training

    config = chosen_config(recipe, overrides, resume)
    result = run_training(config, resume=resume, display=ConsoleDisplay(console))
    if result.table is not None:
        result.table.render(console)
    if not result.finished:
        console.print(
            f"stopped after iteration {result.iterations}; go on with\n  omninft train --resume {result.folder}",
            highlight=False,
        )
        # What shells report of a process that the signal ended.
        raise typer.Exit(128 + (result.stopped_by or 0))
    for label, place in (
        ("report", result.page),
        ("clips", result.samples),
        ("LoRA", result.export),
    ):
        console.print(f"{label:7} {place}", highlight=False)


def check(
    recipe: RecipeArgument = "omninft",
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option(help="Leave out the trial that estimates time and memory.")] = False,
) -> None:
    """Validate a recipe with its prompts, model, rewards and disk, and say what the run will cost."""
    from omninft.runs.check import check_run

    if not print_findings(check_run(chosen_config(recipe, overrides), trial=not quick)):
        raise typer.Exit(1)


def report(
    folder: Annotated[Path | None, typer.Argument(help="Run folder; default: the newest under runs/.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep it up to date until the run is over, or Ctrl-C.")
    ] = False,
) -> None:
    """Write report.html of a run: curves, health, and base against trained side by side, with sound."""
    from omninft.gallery.live import watch_report
    from omninft.gallery.report import progress, write_report
    from omninft.gallery.run_folder import read_run_folder
    from omninft.runs.lock import is_locked

    if folder is None:
        runs = sorted(Path("runs").glob("*/config.yaml"), key=lambda p: p.stat().st_mtime)
        if not runs:
            raise OmniNFTError("no run under runs/; give a run folder, or make one by `omninft train`")
        folder = runs[-1].parent

    def say(page: Path) -> None:
        console.print(f"report {page}: {progress(read_run_folder(folder), is_locked(folder))}", highlight=False)

    if watch:
        say(watch_report(folder, lambda: is_locked(folder), say))
    else:
        say(write_report(folder, running=is_locked(folder)))


def pretrain(
    size: Annotated[str, typer.Option(help="tiny (shipped) or deep (16 blocks, for studies).")] = "tiny",
    output: Annotated[Path, typer.Option("--output", "-o", help="Pipeline folder to write.")] = Path("tiny-model"),
    work: Annotated[Path, typer.Option(help="Intermediate results; an interrupted run goes on from there.")] = Path(
        "work/pretrain"
    ),
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    device: Annotated[str, typer.Option(help="For the transformer: cpu or cuda.")] = "cpu",
) -> None:
    """Rebuild the bundled model from its procedural world alone: autoencoders, vocoder, transformer."""
    import torch

    from omninft.distributed import available_cores
    from omninft.pretrain.card import write_card
    from omninft.pretrain.run import pretrain as rebuild

    torch.set_num_threads(available_cores())
    with NotedProgress(console) as progress:
        tasks: dict[str, Any] = {}

        def show(stage: str, step: int, total: int, metrics: dict[str, float]) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            listed = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            progress.update(tasks[stage], completed=step, total=total, note=listed)

        folder = rebuild(size, work, output, seed, device, show)
        write_card(folder, size, lambda done, total: show("measuring", done, total, {}))
    console.print(f"pipeline in {folder}", highlight=False)
