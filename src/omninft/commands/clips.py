"""Commands that make clips, score them and show them side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from omninft.commands.terminal import (
    AudioGuidance,
    Preset,
    RewardNames,
    RewardOptions,
    Steps,
    VideoGuidance,
    console,
)
from omninft.types import OmniNFTError


def sample(
    prompts: Annotated[
        str, typer.Argument(help="A prompt, or a JSONL, CSV or TXT file, or world:test.")
    ] = "world:test",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the mp4 files.")] = Path("samples"),
    model: Annotated[str, typer.Option(help='"tiny", a pipeline folder, or a hub id.')] = "tiny",
    lora: Annotated[Path | None, typer.Option(help="A LoRA folder or file that omninft exported.")] = None,
    strength: Annotated[float, typer.Option(help="Multiplies what the LoRA adds; 0 is the base.")] = 1.0,
    count: Annotated[int, typer.Option(help="Clips per prompt.", min=1)] = 1,
    limit: Annotated[int, typer.Option(help="Take at most this many prompts (0: all).", min=0)] = 8,
    seed: Annotated[int, typer.Option(help="Keys the noise.")] = 0,
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Pixels, as 768x512; default: the model's own.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="8k + 1 for LTX-2; default: the model's own.", min=1)] = None,
    rate: Annotated[float | None, typer.Option(help="Frames per second; default: the model's own.")] = None,
    steps: Steps = None,
    video_guidance: VideoGuidance = None,
    audio_guidance: AudioGuidance = None,
    stg: Annotated[
        float | None, typer.Option(help="Spatio-temporal guidance, 0 is off; default: 0 for tiny, 1 for LTX-2.")
    ] = None,
    stg_blocks: Annotated[
        str | None, typer.Option(metavar="N,N", help="Blocks that --stg perturbs; default: 29 for LTX-2.")
    ] = None,
    modality: Annotated[
        float | None, typer.Option(help="Modality guidance, 1 is off; default: 1 for tiny, 3 for LTX-2.")
    ] = None,
    rescale: Annotated[
        float | None, typer.Option(help="Rescaling after guidance, 0 to 1; default: 0 for tiny, 0.7 for LTX-2.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="A prompt that text guidance leads away from.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the clips of the folder, whatever made them.")
    ] = False,
) -> None:
    """Make clips (mp4 with sound) from prompts, with the base model or with a LoRA on it; goes on where it stopped."""
    from omninft import api
    from omninft.evaluation.settings import clip_size

    clips = api.sample(
        prompts,
        output,
        model=model,
        lora=lora,
        strength=strength,
        count=count,
        limit=limit,
        seed=seed,
        size=clip_size(size),
        frames=frames,
        rate=rate,
        steps=steps,
        video_guidance=video_guidance,
        audio_guidance=audio_guidance,
        stg=stg,
        stg_blocks=_blocks(stg_blocks),
        modality=modality,
        rescale=rescale,
        negative=negative,
        force=force,
        progress=True,
    )
    there = sum(not clip.made for clip in clips)
    kept = f", {there} of them there already" if there else ""
    console.print(f"{len(clips)} clips in {output}{kept}", highlight=False)


def _blocks(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    numbers = text.replace(",", " ").split()
    if not numbers or not all(n.isdecimal() for n in numbers):
        raise OmniNFTError(f"--stg-blocks: found {text!r}, expected numbers of blocks, e.g. 29 or 14,29")
    return tuple(int(n) for n in numbers)


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
    from omninft import api

    result = api.score(
        folder, reward or (), preset=preset, options=option or (), prompts=prompts, output=output, progress=True
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
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Keys the noise.")] = 0,
    video_guidance: VideoGuidance = None,
    audio_guidance: AudioGuidance = None,
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
    from omninft import api
    from omninft.evaluation.result_tables import render

    folder, result = api.evaluate(
        clips,
        benchmark,
        prompts=prompts,
        model=model,
        lora=lora,
        name=name,
        metrics=(metrics or "").replace(",", " ").split(),
        compat=(compat or "").replace(",", " ").split(),
        steps=steps,
        seed=seed,
        video_guidance=video_guidance,
        audio_guidance=audio_guidance,
        limit=limit,
        shard=shard,
        device=device,
        options=option or (),
        real=real,
        features=features,
        networks={"video": i3d, "audio": audioclip},
        strict=strict,
        output=output,
        progress=True,
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
    from omninft import api

    made = api.compare(systems, output, single_file=single_file, seed=seed, progress=True)
    for note in made.notes:
        console.print(note, highlight=False, markup=False)
    console.print(f"{made.num_clips} clips of {made.num_prompts} prompts; open {made.page}", highlight=False)
