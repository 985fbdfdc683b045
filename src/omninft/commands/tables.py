"""Commands that turn results into tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omninft.commands.terminal import (
    console,
)
from omninft.files import write_text
from omninft.types import OmniNFTError


def leaderboard(
    results: Annotated[
        list[Path] | None, typer.Argument(metavar="[RESULT]...", help="result.json files, or their folders.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="System that differences are from. Default: LTX-2.")] = None,
    form: Annotated[str | None, typer.Option("--format", help="md, csv or html; default: by the ending of -o.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write. Default: the terminal.")] = None,
) -> None:
    """Show the published JavisBench table and own results; only rows of one protocol are ranked together."""
    from omninft.evaluation.leaderboard import build_leaderboard, read_results
    from omninft.evaluation.leaderboard_text import render, to_csv, to_markdown
    from omninft.gallery.leaderboard_page import leaderboard_page

    formats = {"md": to_markdown, "csv": to_csv, "html": leaderboard_page}
    chosen = form or (output.suffix.lstrip(".").lower() if output is not None else None)
    if chosen is not None and chosen not in formats:
        raise OmniNFTError(f"unknown format {chosen!r}; expected --format {', '.join(formats)}, or -o with that ending")
    board = build_leaderboard(read_results(results or []), base)
    if chosen is None:
        render(board, console)
    elif output is None:
        typer.echo(formats[chosen](board), nl=False)
    else:
        write_text(output, formats[chosen](board))
        console.print(f"leaderboard in {output}", highlight=False)


def figures(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN_OR_RESULT]...", help="Run folders or results. Default: what is published."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder: PNG, SVG, captions.md.")] = Path("figures"),
    base: Annotated[str | None, typer.Option(help="System that results are compared with. Default: the first.")] = None,
) -> None:
    """Draw figures for a paper: base against trained (dots and radar), reward curves, ablation bars."""
    from omninft.gallery.paper_figures import write_figures

    for path in write_figures(sources or [], output, base):
        console.print(str(path), highlight=False)
