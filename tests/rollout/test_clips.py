"""The one loop from groups to clips."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from omninft.config import SamplingConfig
from omninft.rollout.clips import decode_clips, roll_out
from omninft.rollout.sampler import RolloutSampler
from omninft.types import PromptGroup
from tests.random_models import groups, make_policy

GROUPS = tuple(PromptGroup(g.prompt, (0, 3, 5)) for g in groups())
KEYS = [("0", 0), ("0", 3), ("0", 5), ("1", 0), ("1", 3), ("1", 5)]


def test_batches_come_sampled_and_decoded_in_order_with_their_stages() -> None:
    policy = make_policy()
    sampler = RolloutSampler(policy, SamplingConfig(num_steps=2, batch_size=4))
    stages: list[str] = []

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        stages.append(name)
        yield

    made = list(roll_out(sampler, GROUPS, 3, 7, "reference", stage=stage))
    assert [len(clips) for _, clips in made] == [4, 2]
    assert stages == ["sampling", "decode"] * 2
    assert [(c.prompt.id, c.sample) for _, clips in made for c in clips] == KEYS
    assert [key for rollout, _ in made for key in rollout.clip_keys] == KEYS
    direct = sampler.sample(GROUPS, 3, 7, "reference")
    frames, waveforms = policy.decode(direct.latents, sampler.geometry)
    for clip, picture, sound in zip((c for _, clips in made for c in clips), frames, waveforms, strict=True):
        assert np.abs(clip.video.astype(int) - picture.astype(int)).max() <= 1
        np.testing.assert_allclose(clip.waveform, sound, atol=1e-4)
        assert (clip.frame_rate, clip.sample_rate) == (sampler.geometry.frame_rate, sampler.geometry.sample_rate)


def test_processes_make_their_own_shares() -> None:
    sampler = RolloutSampler(make_policy(), SamplingConfig(num_steps=1, batch_size=8))
    shares = [
        [(c.prompt.id, c.sample) for _, clips in roll_out(sampler, GROUPS, 0, 0, "old", rank=r, world=4) for c in clips]
        for r in range(4)
    ]
    assert [key for share in shares for key in share] == KEYS
    assert sorted(map(len, shares)) == [1, 1, 2, 2]


def test_sub_batches_of_the_decoder_change_nothing() -> None:
    policy = make_policy()
    sampler = RolloutSampler(policy, SamplingConfig(num_steps=1))
    rollout = sampler.sample(GROUPS, 0, 0, "old")
    whole, parts = (decode_clips(policy, rollout, sampler.geometry, size) for size in (16, 4))
    for a, b in zip(whole, parts, strict=True):
        assert (a.prompt.id, a.sample) == (b.prompt.id, b.sample)
        assert np.abs(a.video.astype(int) - b.video.astype(int)).max() <= 1
