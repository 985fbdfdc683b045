"""`omninft fetch`: the files that a run loads, listed with size and licence, and brought onto this machine."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from omninft.commands.terminal import Overrides, RecipeArgument, chosen_config, console
from omninft.types import OmniNFTError

if TYPE_CHECKING:
    from omninft.config import Config
    from omninft.hub import Need, RemoteFile


def fetch(
    recipe: RecipeArgument = "omninft",
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before downloading.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="List the files and download nothing.")] = False,
) -> None:
    """Download what a recipe loads, model and judges; what was broken off goes on where it stopped."""
    from omninft.hub import OfflineError, ask_hub, require_space, size_text

    config = chosen_config(recipe, overrides)
    needs = _needs(config)
    words = [*([recipe] if recipe != "omninft" else []), *(overrides or [])]
    following = shlex.join(["omninft", "check", *words])
    if not needs:
        console.print(f"{config.recipe} loads nothing but the package; next: {following}", highlight=False)
        return
    files: list[RemoteFile] = []
    gated: dict[str, bool] = {}
    try:
        files, gated = ask_hub(needs)
    except OfflineError as error:
        if not list_only:
            raise
        console.print(f"{error}: sizes are about those published", highlight=False)
    _print(needs, files, gated)
    if not any(need.missing for need in needs):
        console.print(f"all of it is here; next: {following}", highlight=False)
        return
    total = sum(file.size for file in files) or sum(need.about for need in needs if need.missing)
    console.print(f"{size_text(total)} to fetch", highlight=False)
    if list_only:
        return
    require_space(files)
    if not yes and not typer.confirm(f"Fetch {len(files)} files?", default=False):
        raise OmniNFTError("nothing was fetched")
    _fetch(files)
    # The index, which is here now, may name more than every LTX-2 has.
    if any(need.missing for need in _needs(config)):
        _fetch(ask_hub(_needs(config))[0])
    console.print(f"all of it is here; next: {following}", highlight=False)


def _fetch(files: Sequence[RemoteFile]) -> None:
    from omninft import hub

    try:
        for number, file in enumerate(files, 1):
            console.print(f"{number} of {len(files)}: {file.label} ({hub.size_text(file.size)})", highlight=False)
            hub.fetch(file)
    except KeyboardInterrupt as error:
        console.print("stopped; the same command goes on from there", highlight=False)
        raise typer.Exit(130) from error


def _needs(config: Config) -> list[Need]:
    from omninft.models.files import model_needs
    from omninft.rewards.registry import build_reward

    judges = [need for reward in (*config.rewards, *config.held_out) for need in build_reward(reward).needs]
    return [*model_needs(config.model), *judges]


def _print(needs: Sequence[Need], files: Sequence[RemoteFile], gated: dict[str, bool]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from omninft.hub import size_text

    table = Table("what", "from", "size", "licence", "state", box=None, padding=(0, 2, 0, 0))
    closed: list[str] = []
    for need in needs:
        own = [file for file in files if file.need is need]
        size = size_text(sum(file.size for file in own)) if own and need.repo else f"about {size_text(need.about)}"
        state = "to fetch" if need.missing else "here"
        if need.missing and need.repo is not None and gated.get(need.repo, need.gated):
            state = "gated"
            closed += [need.repo] if need.repo not in closed else []
        table.add_row(*map(escape, (need.name, need.repo or need.url or "", size, need.licence, state)))
    console.print(table)
    for repo in closed:
        console.print(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then run `hf auth login`",
            highlight=False,
        )
    for place in dict.fromkeys(need.place for need in needs):
        console.print(f"in {place}: {', '.join(need.name for need in needs if need.place == place)}", highlight=False)
