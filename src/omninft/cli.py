"""The command line. Every command works on the bundled model with no argument but the obvious one."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from omninft.commands import clips, export, judging, tables, training, vbench
from omninft.types import OmniNFTError

app = typer.Typer(
    name="omninft",
    help="Post-train joint audio-video diffusion models with online reinforcement learning (OmniNFT).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.command(
    epilog="Recipes: omninft, gdpo, diffusion_nft, flow_grpo, placebo, paper, commercial. "
    "Ctrl-C saves; --resume goes on."
)(training.train)
app.command()(training.check)
app.command()(training.report)
app.command()(clips.sample)
app.command()(clips.score)
app.command()(clips.evaluate)
app.command()(clips.compare)
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
    except OmniNFTError as error:
        Console(stderr=True, soft_wrap=True).print("[red]error:[/red]", escape(str(error)), highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
