"""A prompt suite of VBench's form, small, and clips under its names."""

from __future__ import annotations

import json
from pathlib import Path

from omninft.clips.media import write_clip
from tests.moving_clips import moving_clip

ENTRIES = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "a person swimming in ocean",
        "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"],
    },
    {
        "prompt_en": "alley",
        "dimension": ["scene", "background_consistency"],
        "auxiliary_info": {"scene": {"scene": {"scene": "alley"}}},
    },
    # One text, two entries.
    {
        "prompt_en": "The bund, oil painting",
        "dimension": ["appearance_style"],
        "auxiliary_info": {"appearance_style": {"appearance_style": "oil painting"}},
    },
    {
        "prompt_en": "The bund, oil painting",
        "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"],
    },
    {"prompt_en": "rock-carved façades.", "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"]},
]
PROMPTS = list(dict.fromkeys(entry["prompt_en"] for entry in ENTRIES))


def write_suite(folder: Path) -> Path:
    path = folder / "VBench_full_info.json"
    path.write_text(json.dumps(ENTRIES, ensure_ascii=False), encoding="utf-8")
    return path


def write_clips(folder: Path, names: list[str], frames: int = 5, height: int = 48) -> None:
    for seed, name in enumerate(names):
        write_clip(folder / name, moving_clip(seed, frames, height, 64))
