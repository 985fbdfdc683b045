"""Column sums that the recorder collects, against maps computed the long way."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers.models.transformers.transformer_ltx2 import apply_split_rotary_emb

from omninft.config import SamplingConfig
from omninft.models.ltx2 import LTX2Policy
from omninft.models.recording import V2ARecorder, attention_column_sums
from omninft.rollout.sampler import RolloutSampler
from omninft.types import OmniNFTError
from tests.random_models import groups, make_policy


def sums(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
    return attention_column_sums(query, key, value=value)


def full_maps(policy: LTX2Policy, sampler: RolloutSampler, rope: bool) -> list[torch.Tensor]:
    """Every V2A map [B, H, Ta, Tv] of a sampling run, block after block within each step."""
    maps: list[torch.Tensor] = []

    def keep(attention: torch.nn.Module, args: tuple, kwargs: dict) -> None:  # type: ignore[type-arg]
        q = attention.norm_q(attention.to_q(args[0]))
        k = attention.norm_k(attention.to_k(kwargs["encoder_hidden_states"]))
        if rope:
            q = apply_split_rotary_emb(q, kwargs["query_rotary_emb"])
            k = apply_split_rotary_emb(k, kwargs["key_rotary_emb"])
        q, k = (t.unflatten(2, (attention.heads, -1)).transpose(1, 2).double() for t in (q, k))
        maps.append((q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1))

    handles = [b.video_to_audio_attn.register_forward_pre_hook(keep, with_kwargs=True) for b in policy.blocks]
    sampler.sample(groups(), 0, 0, "reference")
    for handle in handles:
        handle.remove()
    return maps


@pytest.mark.parametrize("rope", [True, False])
def test_equals_the_maps_of_the_recorded_steps(rope: bool) -> None:
    policy = make_policy()
    sampling = SamplingConfig(num_steps=4)
    maps = full_maps(policy, RolloutSampler(policy, sampling), rope)
    recorder = V2ARecorder(policy.blocks, sums, rope=rope)
    rollout = RolloutSampler(policy, sampling, recorders=[(recorder, (1, 2))]).sample(groups(), 0, 0, "reference")
    blocks = len(policy.blocks)
    chosen = maps[1 * blocks : 3 * blocks]
    expected = torch.stack([m.mean(1).sum(1) for m in chosen]).mean(0)
    attention = rollout.recorded["v2a_columns"]
    torch.testing.assert_close(attention.double(), expected, atol=1e-5, rtol=1e-4)
    # Each map's rows sum to one, so the sums add up to the number of audio queries.
    audio_tokens = maps[0].shape[2]
    torch.testing.assert_close(attention.sum(1), torch.full((2,), float(audio_tokens)), atol=1e-3, rtol=1e-4)


def test_rotary_positions_matter() -> None:
    policy = make_policy()
    sampler = RolloutSampler(policy, SamplingConfig(num_steps=2))
    with_rope, without = (full_maps(policy, sampler, rope)[0] for rope in (True, False))
    assert (with_rope - without).abs().max() > 1e-4


def test_leaves_the_clips_as_they_are_and_later_blocks_only() -> None:
    policy = make_policy()
    sampling = SamplingConfig(num_steps=2)
    plain = RolloutSampler(policy, sampling).sample(groups(), 0, 0, "reference")
    recorder = V2ARecorder(policy.blocks, partial(sums), first_block=1)
    recorded = RolloutSampler(policy, sampling, recorders=[(recorder, (0, 1))]).sample(groups(), 0, 0, "reference")
    assert torch.equal(plain.latents.video, recorded.latents.video)
    recorder.recording = True
    RolloutSampler(policy, sampling).sample(groups(), 0, 0, "reference")
    assert set(recorder.take()) == {1}


def test_says_so_when_nothing_was_recorded() -> None:
    policy = make_policy()
    recorder = V2ARecorder(policy.blocks, sums)
    recorder.close()
    sampler = RolloutSampler(policy, SamplingConfig(num_steps=2), recorders=[(recorder, (0,))])
    with pytest.raises(OmniNFTError, match="are the hooks bound"):
        sampler.sample(groups(), 0, 0, "reference")
