"""Commands about rewards: what there is, whether it is right, and serving it to other machines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from omninft.commands.terminal import (
    Preset,
    RewardNames,
    RewardOptions,
    console,
    print_findings,
)
from omninft.types import OmniNFTError

rewards_app = typer.Typer(help="List the rewards, or check one against official scores.", invoke_without_command=True)


@rewards_app.callback()
def rewards(context: typer.Context, preset: Preset = None, option: RewardOptions = None) -> None:
    """List the rewards: what each judges, route, range, inputs, model, size, licence, and whether it is ready."""
    if context.invoked_subcommand is None:
        from omninft.rewards.presets import PRESETS, chosen_rewards
        from omninft.rewards.registry import reward_names
        from omninft.runs.display import print_rewards

        names = () if preset else tuple(reward_names())
        print_rewards(chosen_rewards(names, preset, option or ()), console)
        for name, members in PRESETS.items():
            console.print(f"[dim]preset {name}: {', '.join(members)}[/dim]", highlight=False)


@rewards_app.command("verify")
def rewards_verify(
    name: Annotated[str, typer.Argument(help="A reward of the list.")],
    option: RewardOptions = None,
    clips: Annotated[Path | None, typer.Option(help="Folder of reference clips; default: made anew.")] = None,
    official: Annotated[Path | None, typer.Option(help="JSON file of official scores on the reference clips.")] = None,
) -> None:
    """Check a reward's files, checksums, loading and invariances, and compare it with official scores."""
    import tempfile

    from omninft.rewards.presets import chosen_rewards
    from omninft.rewards.verification import read_reference_clips, verify, write_reference_clips

    (config,) = chosen_rewards([name], None, option or ())
    with tempfile.TemporaryDirectory() as folder:
        if clips is None:
            write_reference_clips(Path(folder))
        if not print_findings(verify(config, read_reference_clips(clips or Path(folder)), official)):
            raise typer.Exit(1)


@rewards_app.command("reference-clips")
def rewards_reference_clips(folder: Annotated[Path, typer.Argument(help="Where to put them.")]) -> None:
    """Write the reference clips (mp4 + wav + prompts) for a model's own code to score."""
    from omninft.rewards.verification import write_reference_clips

    console.print(f"{len(write_reference_clips(folder))} clips in {folder}", highlight=False)


def serve(
    reward: RewardNames = None,
    preset: Preset = None,
    option: RewardOptions = None,
    recipe: Annotated[str | None, typer.Option(help="Serve a recipe's rewards, with their options, instead.")] = None,
    host: Annotated[str, typer.Option(help="Address to serve on; one that others can reach needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8765,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that clients must send. Default: $OMNINFT_TOKEN.")
    ] = None,
    max_clips: Annotated[int, typer.Option(help="Clips of one request.", min=1)] = 32,
    max_mb: Annotated[float, typer.Option(help="MiB of one request, and of its clips decoded.", min=0.1)] = 1024,
    queue: Annotated[int, typer.Option(help="Clips that may wait or be scored at a time.", min=1)] = 128,
    timeout: Annotated[float, typer.Option(help="Seconds until a request is answered 'not scored in time'.")] = 600.0,
    grace: Annotated[float, typer.Option(help="Seconds to finish what is queued after SIGTERM.", min=0)] = 30.0,
) -> None:
    """Serve rewards over HTTP to other environments and machines; recipes use them as the reward "remote"."""
    from omninft.config import load_config
    from omninft.rewards.presets import chosen_rewards
    from omninft.rewards.registry import build_reward
    from omninft.service.messages import Limits
    from omninft.service.server import RewardService
    from omninft.service.token import read_token

    if recipe and (reward or preset or option):
        raise OmniNFTError("--recipe serves the recipe's rewards with its options: give it, or --reward and the like")
    named = reward or (() if preset else ("world",))
    configs = load_config(recipe).rewards if recipe else chosen_rewards(named, preset, option or ())
    built = [build_reward(config) for config in configs]
    token = read_token(token_file)
    limits = Limits(clips=max_clips, bytes=int(max_mb * 2**20))
    service = RewardService(built, host, port, token, limits, queue, timeout, grace)
    table = Table("reward", "components", "licence", "state", box=None)
    for one in built:
        names = ", ".join(component.name for component in one.components)
        table.add_row(*map(escape, (one.name, names, one.licence, one.missing() or "ready")))
    console.print(table)
    console.print(f"serving on {service.url} ({'with' if token else 'without'} a token); Ctrl-C stops", highlight=False)
    sys.stdout.flush()
    service.run()
