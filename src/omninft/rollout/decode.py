"""Rollout to clips: the autoencoders run on sub-batches, the result is uint8 frames and float32 sound."""

from __future__ import annotations

from typing import Any

from omninft.types import Clip, Geometry, Rollout


def decode_clips(policy: Any, rollout: Rollout, geometry: Geometry, batch_size: int = 16) -> list[Clip]:
    """The clips of a rollout, in its order."""
    prompts = [g.prompt for g in rollout.groups for _ in g.samples]
    samples = [s for g in rollout.groups for s in g.samples]
    clips: list[Clip] = []
    for start in range(0, len(rollout), batch_size):
        video, waveforms = policy.decode(rollout.latents[start : start + batch_size], geometry)
        for i, (frames, wave) in enumerate(zip(video, waveforms, strict=True), start):
            clips.append(Clip(frames, geometry.frame_rate, wave, geometry.sample_rate, prompts[i], samples[i]))
    return clips
