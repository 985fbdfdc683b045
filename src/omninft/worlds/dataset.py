"""Batches of the bounce world for pretraining, honest and out of time.

Web video is not cleanly dubbed: part of its sound is early, late, or has an event too many or too few. `Defects` puts
such faults into a share of the clips, sound only; captions and pictures stay right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from omninft.types import Clip, OmniNFTError, Prompt
from omninft.worlds import bounce, wording


@dataclass(frozen=True)
class Defects:
    """Shares of clips (0..1) with a fault of each kind; a clip has at most one."""

    out_of_time: float = 0.0  # every sound of the clip shifted by one offset
    max_shift: float = 0.25  # s
    min_shift: float = 0.06  # s
    miscounted: float = 0.0  # one sound dropped, or one added where there is room

    def __post_init__(self) -> None:
        if not 0 <= self.out_of_time + self.miscounted <= 1:
            raise OmniNFTError(
                f"shares of faulty clips must add up to 0..1, found {self.out_of_time} + {self.miscounted}"
            )


def spoil(scene: bounce.Scene, rng: np.random.Generator, defects: Defects) -> bounce.Scene:
    """The scene with, perhaps, its sound put out of time or miscounted."""
    draw = rng.random()
    if draw < defects.out_of_time:
        shift = rng.uniform(defects.min_shift, defects.max_shift) * (1 if rng.random() < 0.5 else -1)
        times = tuple(min(max(t + shift, 0.0), 1.9) for t in scene.event_times)
        return replace(scene, sound_times=times)
    if draw < defects.out_of_time + defects.miscounted:
        times = scene.event_times
        if len(times) > 1 and rng.random() < 0.5:
            dropped = int(rng.integers(len(times)))
            return replace(scene, sound_times=times[:dropped] + times[dropped + 1 :])
        for _ in range(20):
            extra = float(rng.uniform(0.1, 1.85))
            if min(abs(extra - t) for t in times) > 0.4:
                return replace(scene, sound_times=tuple(sorted((*times, extra))))
    return scene


@dataclass(frozen=True)
class WorldBatch:
    """N clips with their truth."""

    scenes: tuple[bounce.Scene, ...]
    video: np.ndarray  # [N, T, H, W, 3] uint8
    waveforms: np.ndarray  # [N, samples] float32
    captions: tuple[str, ...]  # prompt_av, one of the wordings


def world_batch(count: int, seed: int, defects: Defects | None = None) -> WorldBatch:
    """`count` clips drawn from all attribute combinations; the same seed gives the same clips."""
    rng = np.random.default_rng(seed)
    attributes = bounce.all_attributes()
    scenes, captions = [], []
    for _ in range(count):
        chosen = attributes[int(rng.integers(len(attributes)))]
        scene = bounce.sample_scene(rng, chosen)
        scenes.append(spoil(scene, rng, defects) if defects else scene)
        texts = wording.wordings(chosen)
        captions.append(texts[int(rng.integers(len(texts)))][2])
    video = np.stack([bounce.render_video(s) for s in scenes])
    waveforms = np.stack([bounce.render_audio(s) for s in scenes])
    return WorldBatch(tuple(scenes), video, waveforms, tuple(captions))


def world_clips(truth: WorldBatch, video: np.ndarray, waveforms: np.ndarray) -> list[Clip]:
    """Clips of a world batch, with prompts that ask for what they show."""
    clips = []
    for i, scene in enumerate(truth.scenes):
        v, a, av = wording.wordings(scene.attributes)[0]
        prompt = Prompt(str(i), v, a, av)
        clips.append(Clip(video[i], bounce.FRAME_RATE, waveforms[i], bounce.SAMPLE_RATE, prompt))
    return clips
