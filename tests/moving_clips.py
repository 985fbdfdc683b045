"""Clips made by arithmetic: soft blobs that wander over a texture, and bursts of noise."""

from __future__ import annotations

import numpy as np

from omninft.types import Clip, Prompt


def moving_clip(
    seed: int = 0,
    frames: int = 25,
    height: int = 48,
    width: int = 64,
    frame_rate: float = 24.0,
    sample_rate: int = 16_000,
    channels: int = 2,
    prompt_v: str = "a red ball rolls",
    prompt_a: str = "a dog barks",
) -> Clip:
    """`seed` sets colours, ways, and times of the bursts; sound as long as the picture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / height
    texture = rng.uniform(60, 120, (height // 4 + 1, width // 4 + 1, 3)).repeat(4, 0).repeat(4, 1)[:height, :width]
    start, speed = rng.uniform(0.2, 0.8, 2), rng.uniform(-0.3, 0.3, 2)
    colour = rng.uniform(-60, 130, 3)
    video = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        cy, cx = (start + speed * t / frame_rate) % 1
        blob = np.exp(-((y - cy) ** 2 + (x - cx * width / height) ** 2) / 0.01)
        video[t] = np.clip(texture + blob[..., None] * colour, 0, 255)
    samples = round(frames / frame_rate * sample_rate)
    envelope = sum(
        np.exp(-(((np.arange(samples) / sample_rate - at) / 0.05) ** 2))
        for at in rng.uniform(0, frames / frame_rate, 3)
    )
    sound = np.clip(rng.normal(0, 0.2, (channels, samples)) * envelope, -1, 1).astype(np.float32)
    prompt = Prompt(f"p{seed}", prompt_v, prompt_a, f"{prompt_v} {prompt_a}")
    return Clip(video, frame_rate, sound, sample_rate, prompt, sample=seed)


def with_sound(clip: Clip, waveform: np.ndarray, sample_rate: int | None = None) -> Clip:
    """The picture and prompt of `clip` with another sound, [channels, N] or [N]."""
    return Clip(
        clip.video,
        clip.frame_rate,
        np.atleast_2d(waveform).astype(np.float32),
        sample_rate or clip.sample_rate,
        clip.prompt,
        clip.sample,
    )
