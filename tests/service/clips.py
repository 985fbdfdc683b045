"""Small clips, and a reward that needs no model: it reads its scores from the sample number and the pixels."""

from __future__ import annotations

import os
import time

import numpy as np

from omninft.types import Clip, Prompt


def clip(sample: int = 0, text: str = "a red ball", frames: int = 3, size: int = 8) -> Clip:
    generator = np.random.default_rng(sample)
    video = generator.integers(0, 256, (frames, size, size, 3), np.uint8)
    waveform = generator.uniform(-1, 1, (2, 1600)).astype(np.float32)
    return Clip(video, 24.0, waveform, 16_000, Prompt(f"p{sample}", text, "a thud", f"{text} a thud", "balls"), sample)


def expected(clip: Clip) -> float:
    """What `pixels` gives: no two clips of these tests have the same."""
    return clip.sample + float(clip.video[0, 0, 0, 0]) / 1000


def pixels(clips: list[Clip]) -> list[float | None]:
    """Sample number and first pixel; a clip whose prompt says so is slow, unscored, or breaks the reward."""
    scores: list[float | None] = []
    for one in clips:
        command = one.prompt.prompt_v.split()
        if command[0] == "sleep":
            time.sleep(float(command[1]))
        if command[0] == "break":
            raise RuntimeError("broken by the prompt")
        if command[0] == "exit":
            os._exit(3)
        scores.append(None if command[0] == "unscored" else expected(one))
    return scores


pixels.route = "video"  # type: ignore[attr-defined]
