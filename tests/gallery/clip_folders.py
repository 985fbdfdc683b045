"""Folders of small clips, as inputs of a comparison."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from omninft.clips.media import write_clip
from omninft.evaluation.results import ClipScores, EvaluationResult, Metric, Protocol
from omninft.types import Clip, Prompt

METRICS = (
    Metric("vq", "VQ", "visual quality"),
    Metric("av_ib", "AV-IB", "agreement of picture and sound"),
    Metric("desync", "DeSync", "offset", higher_is_better=False, unit="s"),
)


def beeping_clip(
    seconds: float = 1.0, beep: float = 0.5, rate: float = 12.0, size: int = 32, brightness: int = 80
) -> Clip:
    """A bar moves to the right; a beep of 60 ms at `beep` seconds. Sound at 16 kHz, mono."""
    frames = np.full((round(seconds * rate), size, size, 3), brightness, np.uint8)
    for i, frame in enumerate(frames):
        frame[:, i * (size - 2) // len(frames) :][:, :3] = 255
    time = np.arange(round(seconds * 16000)) / 16000
    sound = np.where((time >= beep) & (time < beep + 0.06), 0.7 * np.sin(2 * np.pi * 880 * time), 0.0)
    return Clip(frames, rate, sound.astype(np.float32)[None], 16000, Prompt("clip", "", "", ""))


def evaluation_folder(folder: Path, system: str, scores: dict[str, list[float | None]], clip: Clip) -> Path:
    """As `omninft evaluate` leaves it: `scores` are per metric and prompt; prompts are p000, p001, ..."""
    count = len(next(iter(scores.values())))
    write_clip(folder / "clips" / "sample_0000.mp4", clip)
    data = (folder / "clips" / "sample_0000.mp4").read_bytes()
    clips = []
    for i in range(count):
        file = f"sample_{i:04d}.mp4"
        (folder / "clips" / file).write_bytes(data)
        values = {name: column[i] for name, column in scores.items()}
        reasons = {name: "nothing was heard" for name, value in values.items() if value is None}
        thing = ["dog", "waterfall", "guitar"][i % 3]
        categories = (thing, "indoors" if i % 2 else "outdoors")
        clips.append(ClipScores(i, file, f"p{i:03d}", f"a {thing}, take {i}", categories, values, reasons))
    metrics = tuple(m for m in METRICS if m.name in scores)
    EvaluationResult(system, Protocol("javisbench", "1"), metrics, {}, {}, tuple(clips)).save(folder)
    return folder


def scored_folder(folder: Path, clip: Clip, prompts: list[Prompt], scores: list[dict[str, float]]) -> Path:
    """As `omninft sample` and a run's evaluation leave it: <prompt id>-0.mp4 and scores.json with events."""
    entries = []
    for prompt, values in zip(prompts, scores, strict=True):
        write_clip(folder / f"{prompt.id}-0.mp4", clip)
        texts = {"prompt_v": prompt.prompt_v, "prompt_a": prompt.prompt_a, "prompt_av": prompt.prompt_av}
        events = {"video": [0.25], "audio": [0.5]}
        file = f"{prompt.id}-0.mp4"
        entries.append({"file": file, "prompt_id": prompt.id, **texts, "sample": 0, "scores": values, "events": events})
    (folder / "scores.json").write_text(json.dumps({"clips": entries}), encoding="utf-8")
    return folder
