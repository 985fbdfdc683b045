"""From prompt groups to clips: the one loop that training, evaluation, sampling and checks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from omninft.models.protocol import AdapterName, JointPolicy
from omninft.rollout.sampler import RolloutSampler, batches
from omninft.types import Clip, Geometry, PromptGroup, Rollout

DECODE_CLIPS = 16  # decoded at a time


def decode_clips(
    policy: JointPolicy, rollout: Rollout, geometry: Geometry, batch_size: int = DECODE_CLIPS
) -> list[Clip]:
    """The clips of a rollout, in its order: uint8 frames and float32 sound."""
    prompts = [g.prompt for g in rollout.groups for _ in g.samples]
    samples = [s for g in rollout.groups for s in g.samples]
    clips: list[Clip] = []
    for start in range(0, len(rollout), batch_size):
        video, waveforms = policy.decode(rollout.latents[start : start + batch_size], geometry)
        for i, (frames, wave) in enumerate(zip(video, waveforms, strict=True), start):
            clips.append(Clip(frames, geometry.frame_rate, wave, geometry.sample_rate, prompts[i], samples[i]))
    return clips


def roll_out(
    sampler: RolloutSampler,
    groups: Sequence[PromptGroup],
    seed: int,
    iteration: int,
    adapter: AdapterName,
    *,
    rank: int = 0,
    world: int = 1,
    stage: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
) -> Iterator[tuple[Rollout, list[Clip]]]:
    """This process's clips, batch by batch, as soon as each is sampled and decoded; none is kept here.

    Args:
        seed, iteration: key the noise; an `Occasion` stands for the iteration where nothing is trained.
        stage: entered around "sampling" and "decode", for clocks and displays.
    """
    for batch in batches(groups, sampler.sampling.batch_size, rank, world):
        with stage("sampling"):
            rollout = sampler.sample(batch, seed, iteration, adapter)
        with stage("decode"):
            clips = decode_clips(sampler.policy, rollout, sampler.geometry)
        yield rollout, clips
