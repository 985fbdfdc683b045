"""`omninft evaluate`: a model or a folder of clips, a benchmark, a result."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from omninft.clips.listing import LISTING
from omninft.distributed import default_device
from omninft.evaluation.benchmark import CLIPS, Shard, parse_shard, run_benchmark
from omninft.evaluation.catalogue import Choice, build_benchmark, described
from omninft.evaluation.clip_folder import find_clips, unclaimed
from omninft.evaluation.generation import Generation, generate_missing
from omninft.evaluation.prompt_table import rows_beside
from omninft.evaluation.results import EvaluationResult
from omninft.evaluation.settings import read_settings
from omninft.prompts.prompt_file import PROMPT_ENDINGS, PromptRow
from omninft.prompts.sampler import spread
from omninft.prompts.sources import open_rows
from omninft.types import OmniNFTError

SPARE_NAMED = 3  # clips named in a note

Progress = Callable[[str, int, int], None]


class Evaluated(NamedTuple):
    """Where the result is, and the result; None while other shards are not done."""

    folder: Path
    result: EvaluationResult | None


def evaluate(
    clips: Path | None = None,
    choice: Choice | None = None,
    *,
    prompts: str | None = None,
    model: str = "tiny",
    lora: Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: tuple[float | None, float | None] = (None, None),
    limit: int | None = None,
    name: str | None = None,
    output: Path | None = None,
    shard: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Evaluated:
    """Evaluate the clips of a folder, or those of a model, which are made first under `output`/clips.

    Without `prompts` the benchmark's own are taken for a model, and for clips a prompts.csv (.jsonl, .txt) or
    scores.json in their folder. `limit` takes that many prompts, evenly spaced (0: all).

    Raises:
        OmniNFTError: whatever is missing or wrong, in a sentence.
    """
    choice = choice or Choice()
    part = _shard(shard)
    label = name or _label(clips, model, lora)
    output = output or Path("evaluations") / label.replace("/", "--")
    rows = _rows(clips, choice, prompts, limit)
    generation = None if clips is not None else _generation(choice, model, lora, seed, steps, guidance)
    benchmark = build_benchmark(choice)
    if torch.cuda.is_available():
        torch.cuda.set_device(default_device())  # where "cuda" is, for the model
    if clips is None:
        assert generation is not None
        clips = output / CLIPS
        generate_missing(rows, clips, generation, lambda done, total: progress("sampling", done, total), part.share)
    made = read_settings(clips)
    made |= {"clips": str(clips)} if clips != output / CLIPS else {}
    found = find_clips(clips, rows)
    if generation is None and not limit and (spare := unclaimed(clips, found)):
        listed = ", ".join(path.name for path in spare[:SPARE_NAMED]) + (", ..." if len(spare) > SPARE_NAMED else "")
        note = f"{len(spare)} clips of the folder belong to no prompt and were left out: {listed}"
        benchmark = replace(benchmark, notes=(*benchmark.notes, note))
    try:
        result = run_benchmark(
            benchmark,
            found,
            output,
            system=label,
            generation=made,
            shard=part,
            progress=lambda done, total: progress("scoring", done, total),
        )
    except OSError as error:
        raise OmniNFTError(f"{output}: cannot be written ({error})") from error
    return Evaluated(output, result)


def _shard(text: str | None) -> Shard:
    """As given, or torchrun's."""
    if text is not None:
        return parse_shard(text)
    return Shard(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def _label(clips: Path | None, model: str, lora: Path | None) -> str:
    if clips is not None:
        folder = clips.resolve()
        return folder.parent.name if folder.name == CLIPS else folder.name
    base = Path(model).name if Path(model).exists() else model
    return f"{base}+{lora.stem}" if lora is not None else base


def _rows(clips: Path | None, choice: Choice, prompts: str | None, limit: int | None) -> list[PromptRow]:
    if clips is not None and not clips.is_dir():
        raise OmniNFTError(f"{clips}: no such folder of clips")
    about = described(choice.benchmark)
    beside = [clips / f"prompts{ending}" for ending in PROMPT_ENDINGS] if clips is not None else []
    source = prompts or next((str(path) for path in beside if path.is_file()), None)
    if source is not None:
        rows = open_rows(source)
    elif clips is not None and (clips / LISTING).is_file():
        rows = rows_beside(clips)
    elif clips is None and about.prompts is not None:
        rows = open_rows(about.prompts)
        limit = about.limit if limit is None else limit
    elif about.fetch_prompts:
        raise OmniNFTError(f"{about.name} needs its prompts: --prompts FILE; fetch them by: {about.fetch_prompts}")
    elif clips is None:
        raise OmniNFTError(f"{about.name} has no prompts of its own: give --prompts FILE")
    else:
        rows = rows_beside(clips)  # which says what is not there
    return [rows[i] for i in spread(limit or len(rows), len(rows))]


def _generation(
    choice: Choice,
    model: str,
    lora: Path | None,
    seed: int,
    steps: int | None,
    guidance: tuple[float | None, float | None],
) -> Generation:
    form = described(choice.benchmark).form
    size: dict[str, Any] = vars(form) if form is not None else {}
    return Generation(model, lora, seed, steps, guidance[0], guidance[1], **size)
