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
from omninft.commands import clips, demo, judging, recipes, tables, training, vbench
from omninft.config import recipe_names
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


RECIPES = f"Recipes: {', '.join(recipe_names())}."

app.command(epilog=f"{RECIPES} Ctrl-C saves; --resume goes on.")(training.train)
app.command(epilog=RECIPES)(training.check)
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
    except OmniNFTError as error:
        Console(stderr=True, soft_wrap=True).print("[red]error:[/red]", escape(str(error)), highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
