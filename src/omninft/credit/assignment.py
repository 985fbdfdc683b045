"""Scores and recorded attention of an iteration to what the update learns from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omninft.config import AdvantageConfig, RegionsConfig, SurgeryConfig, SurgeryRangeConfig
from omninft.credit.advantages import (
    conflict_share,
    route_advantages,
    shuffle_within_groups,
    zero_variance_groups,
)
from omninft.credit.regions import region_weights, warmup_scale
from omninft.credit.surgery import DEFAULT_FRACTIONS, SurgeryRange, surgery_schedule
from omninft.types import BranchAdvantages, PromptGroup, Rollout, ScoreTable


@dataclass(frozen=True)
class Credit:
    """Advantages of every clip of the iteration, and figures for the log."""

    advantages: BranchAdvantages
    metrics: dict[str, float]

    @property
    def num_valid(self) -> tuple[int, int]:
        """Clips that count for the video and for the audio branch."""
        return int(self.advantages.video_valid.sum()), int(self.advantages.audio_valid.sum())


def assign_credit(
    table: ScoreTable, groups: list[PromptGroup], config: AdvantageConfig, seed: int, iteration: int
) -> Credit:
    """Advantages of the whole iteration's clips (all processes), in the order of the groups."""
    index = torch.tensor([i for i, g in enumerate(groups) for _ in g.samples])
    advantages = route_advantages(table, index, config.method, config.std, config.final_batch_norm)
    metrics = {
        "advantage/conflict_share": conflict_share(advantages),
        "advantage/zero_variance_groups": float(zero_variance_groups(table, index)),
        "advantage/mean_abs_video": float(advantages.video.abs().mean()),
        "advantage/mean_abs_audio": float(advantages.audio.abs().mean()),
    }
    if config.shuffle:
        advantages = shuffle_within_groups(advantages, index, seed * 1_000_003 + iteration)
    return Credit(advantages, metrics)


def weigh_regions(
    rollout: Rollout, config: RegionsConfig, latent_frames: int, iteration: int, iterations: int
) -> Tensor | None:
    """Region weights omega [B, Tv] of a rollout's clips; None when the technique is off."""
    if not config.enabled or rollout.attention is None:
        return None
    # A warm-up of at most 1 is a share of the run, so that short runs reach full strength too.
    warmup = round(config.warmup * iterations) if config.warmup <= 1 else round(config.warmup)
    return region_weights(
        rollout.attention,
        latent_frames,
        config.method,
        strength=config.strength,
        scale=warmup_scale(iteration, warmup),
        given=None if rollout.conditioning is None else rollout.conditioning.mask,
    )


def surgery_schedules(config: SurgeryConfig, num_blocks: int) -> tuple[list[float], list[float] | None]:
    """Gradient scales per block: audio into video (A2V), and video into audio (V2A) if asked for."""

    def ranges(spec: tuple[SurgeryRangeConfig, ...]) -> list[SurgeryRange]:
        return [SurgeryRange(r.start, r.stop, r.scale) for r in spec]

    video = ranges(config.schedule) if config.schedule is not None else DEFAULT_FRACTIONS
    audio = None if config.audio_schedule is None else surgery_schedule(num_blocks, ranges(config.audio_schedule))
    return surgery_schedule(num_blocks, video), audio
