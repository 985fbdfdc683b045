"""Run folders as training leaves them, with small clips."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import yaml

from omninft.clips.media import write_clip
from omninft.evaluation.paired import Measure, compare_paired
from omninft.runs.metrics import MetricsLog
from omninft.types import Clip, Prompt

MEASURES = [
    Measure("quality", "trained", "video"),
    Measure("sync", "trained", "joint"),
    Measure("onset_error", "held_out", "joint", higher_is_better=False, unit="ms"),
    Measure("sharpness", "held_out", "video"),
]
PROMPTS = [
    Prompt("ball 1#2", "a red ball bounces", "a low tone", "a red ball bounces, a low tone"),
    Prompt("evil", "", "", '</script><script>alert(1)</script><b>&"'),
    Prompt("lamp", "a lamp flashes", "a buzz", "An old lamp flickers in the dark while somewhere a fuse buzzes."),
]


def tiny_clip(prompt: Prompt, brightness: int) -> Clip:
    video = np.full((6, 16, 16, 3), brightness, np.uint8)
    sound = 0.5 * np.sin(np.arange(8000) / 10).astype(np.float32)[None]
    return Clip(video, 12.0, sound, 16000, prompt)


def write_samples(run: Path, name: str, scores: list[dict[str, float | None]]) -> None:
    folder = run / "samples" / name
    clips = []
    for prompt, values in zip(PROMPTS, scores, strict=True):
        file = f"{prompt.id}-0.mp4"
        write_clip(folder / file, tiny_clip(prompt, 80), upscale=2)
        texts = {"prompt_v": prompt.prompt_v, "prompt_a": prompt.prompt_a, "prompt_av": prompt.prompt_av}
        entry = {"file": file, "prompt_id": prompt.id, "sample": 0, "scores": values, **texts}
        if prompt.id == "lamp":
            entry["events"] = {"video": [0.25], "audio": [0.26, 9.0]}
            entry["reasons"] = {"sync": "no onset was found"}
        clips.append(entry)
    (folder / "scores.json").write_text(json.dumps({"clips": clips}), encoding="utf-8")


def write_metrics(run: Path, iterations: int) -> None:
    with MetricsLog(run) as log:
        for i in range(iterations + 1):
            if i % 2 == 0:
                sync = {"mean": 0.4 + 0.05 * i, "low": 0.35 + 0.05 * i, "high": 0.45 + 0.05 * i, "n": 3}
                log.evaluation("dev", i, {"sync": sync, "onset_error": {"mean": 100 - i, "low": 90, "high": 110}})
            if i == iterations:
                break
            log.iteration(
                i,
                {
                    "optimiser_step": 4 * i,
                    "seconds": 10.0,
                    "elapsed": 12.5 * (i + 1),
                    "reward/sync": 0.4,
                    "reward/quality": 0.5,
                    "missing/sync": int(i == 1),
                    "missing/quality": 0,
                    "advantage/conflict_share": 0.25,
                    "gradient_norm/video": 0.9,
                    "gradient_norm/audio": 0.3,
                    "time/sampling": 2.0,
                    "time/update": 6.0,
                    "strange/new_number": 1.5,
                },
            )
        log.event(1, "warning", "sync: 1 of 32 scores missing <why>")


def finished_run(run: Path) -> Path:
    """With a final table, clips of base and trained, and a LoRA file."""
    write_samples(
        run,
        "test-base",
        [
            {"sync": 0.4, "onset_error": 120.0, "quality": 0.5},
            {"sync": 0.5, "onset_error": 90.0, "quality": 0.5},
            {"sync": None, "onset_error": 150.0, "quality": 0.5},
        ],
    )
    write_samples(
        run,
        "test-trained",
        [
            {"sync": 0.7, "onset_error": 40.0, "quality": 0.5},
            {"sync": 0.45, "onset_error": 95.0, "quality": 0.5},
            {"sync": 0.9, "onset_error": 10.0, "quality": 0.501},
        ],
    )
    write_metrics(run, 4)
    config = {"recipe": "bounce", "seed": 3, "model": {"path": "Lightricks/LTX-2"}, "run": {"iterations": 4}}
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    noise = np.random.default_rng(0).normal(0, 0.05, (40, 4))
    base = noise + np.array([0.5, 0.4, 1.2, 0.8])
    # quality and sync rise, the onset error falls (better), sharpness falls (worse).
    trained = base + noise[::-1] + np.array([0.1, 0.2, -0.8, -0.1])
    base[0, 1] = math.nan
    table = compare_paired(MEASURES, base, trained, [f"p{i}" for i in range(40)], settings={"steps": 16})
    (run / "evaluation.json").write_text(table.to_json(), encoding="utf-8")
    (run / "export").mkdir()
    (run / "export" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    return run
