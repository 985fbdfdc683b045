"""Clips for a benchmark from a model: what is missing in the folder is made, as JavisBench lays it out.

`sample_0000.mp4` and `sample_0000.wav` per prompt, and a scores.json that says which prompt each was made for. A folder
holds clips of one model with one setting: generation.json says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from omninft.clips.first_frame import read_first_frame
from omninft.clips.listing import ListedClip, write_listing
from omninft.clips.media import write_clip, write_wav
from omninft.config import SamplingConfig
from omninft.evaluation.clip_folder import sample_name
from omninft.evaluation.held_out import SHOWN_SIDE
from omninft.evaluation.sampling import load_policy
from omninft.evaluation.settings import SamplingChoice, check_settings, describe, is_small
from omninft.noise import Occasion
from omninft.prompts.prompt_file import PromptRow
from omninft.rollout.clips import roll_out
from omninft.rollout.sampler import RolloutSampler
from omninft.scorers.views import fit_length
from omninft.types import Clip, PromptGroup


@dataclass(frozen=True)
class Generation:
    """What clips are made by. None: the model's own, or LTX-2's published evaluation settings."""

    model: str = "tiny"
    lora: Path | None = None
    seed: int = 0
    steps: int | None = None
    video_guidance: float | None = None  # text guidance; 1 is off
    audio_guidance: float | None = None
    seconds: float | None = None  # clips are cut to this
    frame_rate: float | None = None  # Hz
    audio_rate: int | None = None  # Hz, of the WAV

    @property
    def is_small(self) -> bool:
        """Whether the model names its own clip size, which is then kept."""
        return is_small(self.model)

    def sampling(self) -> SamplingConfig:
        """Steps, guidance and size. A clip of 8 k + 1 frames at least as long as `seconds` is asked for."""
        choice = SamplingChoice(
            steps=self.steps, video_guidance=self.video_guidance, audio_guidance=self.audio_guidance
        )
        if self.seconds is not None and self.frame_rate is not None and not self.is_small:
            frames = round(self.seconds * self.frame_rate)
            choice = replace(choice, frames=-(-(frames - 1) // 8) * 8 + 1, rate=self.frame_rate)
        return choice.of(self.model)

    def describe(self) -> dict[str, Any]:
        """What is stored and printed; equal for equal clips. Raises OmniNFTError when model or LoRA are not there."""
        told = describe(self.model, self.lora, self.seed, self.sampling())
        return told | {"seconds": self.seconds if not self.is_small else None}


def generate_missing(
    rows: Sequence[PromptRow],
    folder: Path,
    generation: Generation,
    progress: Callable[[int, int], None] = lambda done, total: None,
    share: Callable[[Sequence[Any]], list[Any]] = list,
) -> None:
    """Make the clips of this process's `share` of the rows that `folder` lacks; the model is loaded only for that.

    A clip is there once its mp4 is, which is written last: whatever ends the work, the same call goes on.

    Raises:
        OmniNFTError: the folder holds clips of other settings; a model or LoRA that cannot be read.
    """
    check_settings(folder, generation.describe())
    mine = share(rows)
    todo = [row for row in mine if not (folder / f"{sample_name(row.index)}.mp4").is_file()]
    write_listing(folder, [ListedClip(f"{sample_name(row.index)}.mp4", row.prompt, row.repeat) for row in rows])
    progress(len(mine) - len(todo), len(mine))
    if not todo:
        return
    policy, adapter = load_policy(generation.model, generation.lora)
    sampling = generation.sampling()
    sampler = RolloutSampler(policy, sampling, read_frame=read_first_frame)
    groups = [PromptGroup(row.prompt, (row.repeat,)) for row in todo]
    done = 0
    for _, clips in roll_out(sampler, groups, generation.seed, Occasion.BENCHMARK, adapter):
        for clip in clips:
            _write(folder / sample_name(todo[done].index), clip, generation)
            done += 1
        progress(len(mine) - len(todo) + done, len(mine))


def _write(stem: Path, clip: Clip, generation: Generation) -> None:
    """The WAV, then the mp4."""
    if generation.seconds is not None and not generation.is_small:
        clip = trimmed(clip, generation.seconds)
    wave, rate = clip.waveform, clip.sample_rate
    if generation.audio_rate is not None and rate != generation.audio_rate:
        made = np.asarray(soxr.resample(wave.T, rate, generation.audio_rate), dtype=np.float32).T
        wave = fit_length(made, round(wave.shape[1] / rate * generation.audio_rate))
        rate = generation.audio_rate
    write_wav(stem.with_suffix(".wav"), wave, rate)
    write_clip(stem.with_suffix(".mp4"), clip, upscale=max(1, SHOWN_SIDE // max(clip.video.shape[1:3])))


def trimmed(clip: Clip, seconds: float) -> Clip:
    """The first `seconds`: at most as many frames, exactly as many samples (zeros where there are fewer)."""
    frames, samples = round(seconds * clip.frame_rate), round(seconds * clip.sample_rate)
    return replace(clip, video=clip.video[:frames], waveform=fit_length(clip.waveform, samples), views={})
