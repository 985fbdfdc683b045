"""Clips of VBench's prompts from a model, five (or more) a prompt, kept as they come so that a stopped call goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from omninft.evaluation.sampling import sample_clips
from omninft.evaluation.settings import SamplingChoice, model_sampling
from omninft.files import read_json, write_text
from omninft.types import OmniNFTError


def generate_clips(
    prompts: Sequence[str],
    folder: Path,
    *,
    model: str,
    lora: Path | None = None,
    samples: int = 5,
    steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Path]]:
    """Clips per prompt, in the order of their samples. Prompts whose clips are all in `folder` are not made again.

    Noise is keyed by seed, prompt and sample: what a stopped call made is what a whole one would have made. VBench has
    no words for sound: the prompt serves for it too. Steps and guidance are the model's own where nothing is said.

    Raises:
        OmniNFTError: `folder` holds clips of other settings; a model or LoRA that cannot be read.
    """
    settings = {
        "model": model,
        "lora": str(lora) if lora else None,
        "steps": steps or model_sampling(model).num_steps,
        "seed": seed,
    }
    record = folder / "settings.json"
    if record.exists() and read_json(record) != settings:
        raise OmniNFTError(f"{folder} holds clips of other settings ({record.name}); remove it, or export elsewhere")
    write_text(record, json.dumps(settings))
    clips = {prompt: [folder / f"{prompt_id(prompt)}-{n}.mp4" for n in range(samples)] for prompt in prompts}
    lacking = [prompt for prompt, files in clips.items() if not all(file.is_file() for file in files)]
    if lacking:
        rows = folder / "prompts.jsonl"
        lines = (
            json.dumps({"id": prompt_id(p), "prompt_v": p, "prompt_a": p, "prompt_av": p}, ensure_ascii=False) + "\n"
            for p in lacking
        )
        write_text(rows, "".join(lines))
        sample_clips(
            str(rows),
            folder,
            model=model,
            lora=lora,
            count=samples,
            limit=0,
            seed=seed,
            choice=SamplingChoice(steps=steps),
            progress=progress,
        )
    return clips


def prompt_id(prompt: str) -> str:
    """A name for files and noise that depends on the prompt alone."""
    return "vbench-" + hashlib.sha256(prompt.encode()).hexdigest()[:12]
