"""The command line. Every command works on the bundled model with no argument but the obvious one."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from omninft.types import Finding, OmniNFTError

app = typer.Typer(
    name="omninft",
    help="Post-train joint audio-video diffusion models with online reinforcement learning (OmniNFT).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# Files and pipes have no width of their own; lines that wrap at 80 columns are hard to search.
console = Console(width=None if sys.stdout.isatty() else 200)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Changes to the recipe by dotted keys, e.g. optimiser.learning_rate=1e-4"
    ),
]
RecipeArgument = Annotated[str, typer.Argument(help="A shipped recipe's name (see below) or a YAML file.")]


@app.command(
    epilog="Recipes: omninft, gdpo, diffusion_nft, placebo, paper, commercial. Ctrl-C saves; --resume goes on."
)
def train(
    recipe: RecipeArgument = "omninft",
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with from its last checkpoint.")] = None,
) -> None:
    """Post-train a model: sample, score, learn, and compare base against trained on held-out prompts."""
    from omninft.config import load_config
    from omninft.display import ConsoleDisplay
    from omninft.run import read_run_config
    from omninft.train import train as run_training

    if resume is not None:
        # Typer reads the first key=value as the recipe when a run is resumed.
        changes = [*([recipe] if "=" in recipe else []), *(overrides or [])]
        config = read_run_config(resume, changes)
    elif "=" in recipe:
        config = load_config("omninft", [recipe, *(overrides or [])])
    else:
        config = load_config(recipe, overrides)
    result = run_training(config, resume=resume, display=ConsoleDisplay(console))
    if result.table is not None:
        result.table.render(console)
    if not result.finished:
        console.print(
            f"stopped after iteration {result.iterations}; go on with\n  omninft train --resume {result.folder}",
            highlight=False,
        )
        return
    for label, place in (
        ("report", result.folder / "report.html"),
        ("clips", result.folder / "samples"),
        ("LoRA", result.folder / "export"),
    ):
        console.print(f"{label:7} {place}", highlight=False)


@app.command()
def sample(
    prompts: Annotated[
        str, typer.Argument(help="A prompt, or a JSONL, CSV or TXT file, or world:test.")
    ] = "world:test",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the mp4 files.")] = Path("samples"),
    model: Annotated[str, typer.Option(help='"tiny", a pipeline folder, or a hub id.')] = "tiny",
    lora: Annotated[Path | None, typer.Option(help="A LoRA folder or file that omninft exported.")] = None,
    count: Annotated[int, typer.Option(help="Clips per prompt.", min=1)] = 1,
    limit: Annotated[int, typer.Option(help="Take at most this many prompts (0: all).", min=0)] = 8,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Keys the noise.")] = 0,
    video_guidance: Annotated[float, typer.Option(help="Text guidance of the video; 1 is off.")] = 1.0,
    audio_guidance: Annotated[float, typer.Option(help="Text guidance of the sound; 1 is off.")] = 1.0,
) -> None:
    """Make clips (mp4 with sound) from prompts, with the base model or with a LoRA on it."""
    from omninft.sampling import sample_clips

    with NotedProgress(console) as progress:
        task = progress.add_task("sampling", total=None)
        written = sample_clips(
            prompts,
            output,
            model=model,
            lora=lora,
            count=count,
            limit=limit,
            steps=steps,
            seed=seed,
            guidance=(video_guidance, audio_guidance),
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(f"{len(written)} clips in {output}", highlight=False)


RewardNames = Annotated[
    list[str] | None, typer.Option("--reward", "-r", help="Reward name or package.module:function; repeatable.")
]
Preset = Annotated[str | None, typer.Option(help="A set of rewards: paper, commercial or offline.")]
RewardOptions = Annotated[
    list[str] | None,
    typer.Option("--option", "-O", help="reward.key=value, e.g. clap.device=cuda or desync.seconds=8; repeatable."),
]


@app.command()
def score(
    folder: Annotated[Path, typer.Argument(help="A folder of clips (mp4, webm, mov, mkv), or one file.")],
    reward: RewardNames = None,
    preset: Preset = None,
    option: RewardOptions = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompt file; clips are named <prompt id>-<number>. Default: scores.json beside the clips."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a .csv, .json or .parquet table; goes on if stopped.")
    ] = None,
) -> None:
    """Score existing clips with rewards; what cannot be scored is listed with its reason, never as 0."""
    from omninft.rewards.presets import chosen_rewards
    from omninft.scoring import score_files

    chosen = chosen_rewards(reward or (() if preset else ("world",)), preset, option or ())
    with NotedProgress(console) as progress:
        task = progress.add_task("scoring", total=None)
        result = score_files(
            folder,
            chosen,
            prompts,
            output,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    table = Table("clip", *result.names, box=None)
    for row in result.rows[:40]:
        table.add_row(row.file, *(f"{v:.3f}" if v is not None else "missing" for v in row.scores.values()))
    if len(result.rows) > 40:
        table.add_row(f"... {len(result.rows) - 40} more", *("" for _ in result.names))
    table.add_section()
    table.add_row("mean", *(f"{v:.3f}" if v is not None else "-" for v in result.means().values()), style="bold")
    console.print(table)
    for row in result.rows:
        # A file that cannot be read has one reason, however many rewards wanted it.
        for reason in dict.fromkeys(row.reasons.values()):
            lacking = ", ".join(n for n, why in row.reasons.items() if why == reason)
            console.print(f"[yellow]missing[/yellow] {row.file} {lacking}: {escape(reason)}", highlight=False)
    if output is not None:
        console.print(f"table in {output}", highlight=False)


@app.command()
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

    from omninft.distributed.processes import available_cores
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


@app.command()
def check(
    recipe: RecipeArgument = "omninft",
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option(help="Leave out the trial that estimates time and memory.")] = False,
) -> None:
    """Validate a recipe with its prompts, model, rewards and disk, and say what the run will cost."""
    from omninft.checkup import check_run
    from omninft.config import load_config

    if not _print_findings(check_run(load_config(recipe, overrides), trial=not quick)):
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path | None, typer.Argument(help="Run folder; default: the newest under runs/.")] = None,
) -> None:
    """Write report.html of a run: curves, health, and base against trained side by side, with sound."""
    from omninft.gallery.report import write_report

    if folder is None:
        runs = sorted(Path("runs").glob("*/config.yaml"), key=lambda p: p.stat().st_mtime)
        if not runs:
            raise OmniNFTError("no run under runs/; give a run folder, or make one by `omninft train`")
        folder = runs[-1].parent
    console.print(f"report {write_report(folder)}", highlight=False)


rewards_app = typer.Typer(help="List the rewards, or check one against official scores.", invoke_without_command=True)
app.add_typer(rewards_app, name="rewards")


@rewards_app.callback()
def rewards(context: typer.Context, preset: Preset = None, option: RewardOptions = None) -> None:
    """List the rewards: what each judges, route, range, inputs, model, size, licence, and whether it is ready."""
    if context.invoked_subcommand is None:
        from omninft.display import print_rewards
        from omninft.rewards.presets import PRESETS, chosen_rewards
        from omninft.rewards.registry import reward_names

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
        if not _print_findings(verify(config, read_reference_clips(clips or Path(folder)), official)):
            raise typer.Exit(1)


@rewards_app.command("reference-clips")
def rewards_reference_clips(folder: Annotated[Path, typer.Argument(help="Where to put them.")]) -> None:
    """Write the reference clips (mp4 + wav + prompts) for a model's own code to score."""
    from omninft.rewards.verification import write_reference_clips

    console.print(f"{len(write_reference_clips(folder))} clips in {folder}", highlight=False)


def _print_findings(findings: Iterable[Finding]) -> bool:
    """A line each, as they come; whether all are well."""
    ok = True
    for finding in findings:
        mark = "[green]ok[/green]  " if finding.ok else "[red]error[/red]"
        console.print(f"{mark} {finding.subject}: {escape(finding.text)}", highlight=False)
        ok &= finding.ok
    return ok


@app.command()
def serve(
    reward: Annotated[
        list[str] | None, typer.Option("--reward", "-r", help="Reward name or package.module:function; repeatable.")
    ] = None,
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
    from omninft.config import RewardConfig, load_config
    from omninft.rewards.registry import build_reward
    from omninft.service.messages import Limits
    from omninft.service.server import RewardService
    from omninft.service.token import read_token

    if recipe and reward:
        raise OmniNFTError("--recipe serves the recipe's rewards: give it, or --reward, not both")
    configs = load_config(recipe).rewards if recipe else [RewardConfig(name=name) for name in reward or ["world"]]
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
