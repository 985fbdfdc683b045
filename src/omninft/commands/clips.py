"""Commands that make clips, score them and show them side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from omninft.commands.terminal import (
    NotedProgress,
    Preset,
    RewardNames,
    RewardOptions,
    console,
    stage_bars,
)


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
    from omninft.evaluation.sampling import sample_clips

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
    from omninft.evaluation.scoring import score_files
    from omninft.rewards.presets import chosen_rewards

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
    for why, files in result.without_prompts().items():
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        listed = escape(", ".join(files[:5]))
        console.print(f"[yellow]no prompt[/yellow] for {listed}{more}: {escape(why)}", highlight=False)
    for row in result.rows:
        # A file that cannot be read has one reason, however many rewards wanted it.
        for reason in dict.fromkeys(row.reasons.values()):
            lacking = ", ".join(n for n, why in row.reasons.items() if why == reason)
            console.print(f"[yellow]missing[/yellow] {row.file} {lacking}: {escape(reason)}", highlight=False)
    if output is not None:
        console.print(f"table in {output}", highlight=False)


def evaluate(
    clips: Annotated[
        Path | None, typer.Argument(help="A folder of clips of any system; default: clips of --model are made first.")
    ] = None,
    benchmark: Annotated[
        str, typer.Option(help="world (the bundled model's), javisbench or another there is.")
    ] = "world",
    prompts: Annotated[
        str | None, typer.Option(help="CSV, JSONL or TXT file, or world:test; row 0 is sample_0000.mp4.")
    ] = None,
    model: Annotated[str, typer.Option(help='"tiny", a pipeline folder, or a hub id.')] = "tiny",
    lora: Annotated[Path | None, typer.Option(help="A LoRA folder or file that omninft exported.")] = None,
    name: Annotated[str | None, typer.Option(help="What the system is called in tables.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Some of the metrics, as vq,desync; or all.")] = None,
    compat: Annotated[
        str | None, typer.Option(help="Quirks of the official code, as bgr_clip,aq_no_resample; javisbench is all.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; default: 16 for tiny, 40 for LTX-2.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Keys the noise.")] = 0,
    video_guidance: Annotated[float | None, typer.Option(help="Text guidance of the video; 1 is off.")] = None,
    audio_guidance: Annotated[float | None, typer.Option(help="Text guidance of the sound; 1 is off.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="At most so many prompts, evenly spaced (0: all). Default: 64 of the world's.", min=0),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="RANK/COUNT, as 0/4: one of several processes. Default: as torchrun says.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Of judging models; default: cuda where there is one.")] = None,
    option: RewardOptions = None,
    real: Annotated[Path | None, typer.Option(help="Features of real clips, for FVD, KVD and FAD.")] = None,
    features: Annotated[Path | None, typer.Option(help="Features of the clips themselves, computed elsewhere.")] = None,
    i3d: Annotated[Path | None, typer.Option(help="I3D as TorchScript, for FVD and KVD.")] = None,
    audioclip: Annotated[Path | None, typer.Option(help="AudioCLIP's sound tower as TorchScript, for FAD.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A metric that cannot be computed is an error.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the result; default: evaluations/NAME.")
    ] = None,
) -> None:
    """Measure a model, or clips of any system, on a benchmark; goes on where it was stopped."""
    from omninft.evaluation.catalogue import Choice
    from omninft.evaluation.result_tables import render
    from omninft.evaluation.run import evaluate as run_evaluation

    choice = Choice(
        benchmark=benchmark,
        metrics=tuple((metrics or "").replace(",", " ").split()),
        compat=tuple((compat or "").replace(",", " ").split()),
        options=tuple(option or ()),
        device=device,
        strict=strict,
        real=real,
        features=features,
        networks={"video": i3d, "audio": audioclip},
    )
    with NotedProgress(console) as progress:
        folder, result = run_evaluation(
            clips,
            choice,
            prompts=prompts,
            model=model,
            lora=lora,
            seed=seed,
            steps=steps,
            guidance=(video_guidance, audio_guidance),
            limit=limit,
            name=name,
            output=output,
            shard=shard,
            progress=stage_bars(progress),
        )
    if result is None:
        console.print(f"this shard is done; the last one to finish writes the result to {folder}", highlight=False)
        return
    render(result, console)
    console.print(f"result {folder}/result.json, table.md, table.csv", highlight=False)


def compare(
    systems: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]FOLDER...",
            help="An evaluation, clips with scores.json, a run (its base and trained clips), or just clips.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page.")] = Path("comparison"),
    single_file: Annotated[bool, typer.Option("--single-file", help="Put the clips into index.html.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Fixes the shuffle of the blind test; default: every rater draws one.", min=0)
    ] = None,
) -> None:
    """Make a page that plays the clips of several systems side by side, with scores and a blind test."""
    from omninft.gallery.compare import write_comparison

    with NotedProgress(console) as progress:
        task = progress.add_task("comparing", total=None)
        made = write_comparison(
            systems,
            output,
            single_file=single_file,
            seed=seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    for note in made.notes:
        console.print(note, highlight=False, markup=False)
    console.print(f"{made.num_clips} clips of {made.num_prompts} prompts; open {made.page}", highlight=False)
