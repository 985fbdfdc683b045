"""The command line. Every command works on the bundled model with no argument but the obvious one."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from omninft import __version__
from omninft.commands import clips, demo, export, judging, recipes, tables, training, vbench
from omninft.commands import fetch as fetching
from omninft.recipes import recipe_names
from omninft.types import OmniNFTError

app = typer.Typer(
    name="omninft",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"omninft {__version__}")
        raise typer.Exit


@app.callback()
def omninft(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Post-train joint audio-video diffusion models with online reinforcement learning (OmniNFT)."""


RECIPES = f"Recipes: {', '.join(recipe_names())}. Parts go together, as ltx2.3+24gb (`omninft config recipes`)."

app.command(epilog=f"{RECIPES} Ctrl-C saves; --resume goes on.")(training.train)
app.command(epilog=RECIPES)(training.check)
app.command(epilog=RECIPES)(fetching.fetch)
app.command()(training.report)
app.command()(clips.sample)
app.command()(clips.score)
app.command()(clips.evaluate)
app.command()(clips.compare)
app.command()(demo.demo)
app.add_typer(recipes.config_app, name="config")
app.command()(tables.leaderboard)
app.command()(tables.figures)
app.add_typer(judging.rewards_app, name="rewards")
app.command()(judging.serve)
app.add_typer(vbench.vbench_app, name="vbench")
app.command()(training.pretrain)
app.command()(export.export)


def main(run: Callable[[], Any] = app) -> None:
    """Entry point: errors a user can act on are one clear line and exit code 1, not a traceback."""
    # Third-party chatter about optional accelerators helps nobody here.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*torchvision.*")
    for name in ("transformers", "diffusers", "peft", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        run()
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped at once; a run goes on from its last checkpoint with --resume")
        sys.exit(130)
    except Exception as error:
        message = _told(error)
        if message is None:
            raise
        Console(stderr=True, soft_wrap=True).print("[red]error:[/red]", escape(message), highlight=False)
        sys.exit(1)


def _told(error: Exception) -> str | None:
    """What a person can do something about, on a line; None for faults of the program, which keep their traceback."""
    if isinstance(error, OmniNFTError):
        return str(error)
    # torch is not imported for the sake of its exception; its allocator for the CPU raises a plain RuntimeError.
    names = {kind.__name__ for kind in type(error).__mro__}
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if names & {"MemoryError", "OutOfMemoryError"} or on_cpu:
        first = " ".join(str(error).split())[:200]
        return (
            f"out of memory{f' ({first})' if first else ''}: lower sampling.batch_size, optimiser.micro_batch, "
            "evaluation.sampling.batch_size or the size of clips, or set model.gradient_checkpointing"
        )
    if isinstance(error, OSError):
        # What a library raises in words of its own says where by itself.
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or ' '.join(str(error).split()) or type(error).__name__}"
    if isinstance(error, UnicodeDecodeError):
        return f"found {error.object[error.start : error.end]!r} in a file, expected UTF-8 text ({error.reason})"
    return None


if __name__ == "__main__":
    main()
