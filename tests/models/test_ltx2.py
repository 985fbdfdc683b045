"""The policy against the diffusers pipeline itself, on random models and under guidance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2ImageToVideoPipeline
from diffusers.pipelines.ltx2.utils import apply_image_conditioning_crf

from omninft.config import GuidanceConfig, SamplingConfig
from omninft.models.loading import read_clip_defaults
from omninft.models.ltx2 import stream_of
from omninft.rollout.sampler import RolloutSampler
from omninft.types import Conditioning, Latents, OmniNFTError, PromptGroup
from tests.random_models import PROMPTS, groups, make_policy, through_pipeline

PLAIN = SamplingConfig(num_steps=3)
GUIDED = SamplingConfig(
    num_steps=3,
    video_guidance=GuidanceConfig(text=2.0, stg=0.7, modality=1.5, rescale=0.6),
    audio_guidance=GuidanceConfig(text=3.0, stg=0.4, modality=1.2, rescale=0.3),
    stg_blocks=(1,),
)


@pytest.mark.parametrize("version", ["ltx-2", "ltx-2.3", "ltx-2.5"])
@pytest.mark.parametrize("sampling", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_samples_what_the_pipeline_samples(version: str, sampling: SamplingConfig) -> None:
    policy = make_policy(version)
    sampler = RolloutSampler(policy, sampling)
    rollout = sampler.sample(groups(), seed=3, iteration=5, adapter="reference")
    noise = sampler.initial_noise(rollout.clip_keys, 3, 5)
    frames, waveform = policy.decode(rollout.latents, sampler.geometry)
    expected_frames, expected_waveform = through_pipeline(policy.pipeline, noise, sampling)
    # uint8 rounds by half a level; the rest is float noise.
    assert np.abs(frames - expected_frames).max() < 0.51
    assert np.abs(waveform - expected_waveform).max() < 1e-4
    assert frames.std() > 1


def test_guidance_changes_the_clips() -> None:
    policy = make_policy()
    plain = RolloutSampler(policy, PLAIN).sample(groups(), 3, 5, "reference")
    guided = RolloutSampler(policy, GUIDED).sample(groups(), 3, 5, "reference")
    assert (plain.latents.video - guided.latents.video).abs().max() > 0.01
    assert (plain.latents.audio - guided.latents.audio).abs().max() > 0.01


def test_the_batch_a_clip_is_sampled_in_does_not_matter() -> None:
    policy = make_policy()
    sampler = RolloutSampler(policy, PLAIN)
    both = sampler.sample(groups(), 0, 0, "reference")
    alone = sampler.sample(groups()[1:], 0, 0, "reference")
    torch.testing.assert_close(both.latents.video[1:], alone.latents.video, atol=1e-5, rtol=1e-5)


def gradient_frame(path: str, height: int, width: int) -> torch.Tensor:
    """A picture whose colours depend on its path."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x * 7 % 256, y * 5 % 256, (x + y) * len(path) % 256], dim=-1).to(torch.uint8)


def with_frames(*paths: str | None) -> tuple[PromptGroup, ...]:
    return tuple(
        PromptGroup(replace(group.prompt, first_frame_path=path), group.samples)
        for group, path in zip(groups(), paths, strict=True)
    )


@pytest.mark.parametrize("sampling", [PLAIN, GUIDED], ids=["plain", "guided and rescaled"])
def test_given_first_frames_give_what_the_image_to_video_pipeline_gives(sampling: SamplingConfig) -> None:
    policy = make_policy()
    sampler = RolloutSampler(policy, sampling, read_frame=gradient_frame)
    rollout = sampler.sample(with_frames("a", "bb"), seed=3, iteration=5, adapter="reference")
    given = rollout.conditioning
    assert given is not None
    noise = sampler.initial_noise(rollout.clip_keys, 3, 5)
    start = Latents(torch.where(given.mask[..., None], given.video, noise.video), noise.audio)
    pipe = LTX2ImageToVideoPipeline(**policy.pipeline.components)
    pipe.set_progress_bar_config(disable=True)
    # It takes latents unpacked and not normalised, adds `noise_scale` of noise, and finds the given frame in them.
    g, vae = sampler.geometry, pipe.vae
    unpacked = pipe._unpack_latents(start.video, g.latent_frames, g.latent_height, g.latent_width)
    raw = pipe._denormalize_latents(unpacked, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    expected_frames, expected_waveform = through_pipeline(pipe, start, sampling, latents=raw, noise_scale=0.0)
    frames, waveform = policy.decode(rollout.latents, sampler.geometry)
    assert np.abs(frames - expected_frames).max() < 0.51
    assert np.abs(waveform - expected_waveform).max() < 1e-4


def test_a_blank_frame_is_not_a_given_one() -> None:
    policy = make_policy()
    sampler = RolloutSampler(policy, PLAIN, read_frame=gradient_frame)
    mixed = sampler.sample(with_frames("a", None), 0, 0, "reference")
    plain = sampler.sample(groups()[1:], 0, 0, "reference")
    assert mixed.conditioning is not None
    per_frame = sampler.geometry.latent_height * sampler.geometry.latent_width
    assert mixed.conditioning.mask.sum(dim=1).tolist() == [per_frame, 0]
    torch.testing.assert_close(mixed.latents.video[1:], plain.latents.video, atol=1e-5, rtol=1e-5)


def test_a_given_first_frame_keeps_sigma_0() -> None:
    policy = make_policy()
    sampler = RolloutSampler(policy, PLAIN)
    g = sampler.geometry
    frame = torch.full((2, 32, 32, 3), 180, dtype=torch.uint8)
    given = policy.encode_first_frame(frame, g)
    assert given.mask.sum(1).tolist() == [16, 16]  # 4 x 4 tokens of latent frame 0
    assert given.mask[:, :16].all()
    noise = sampler.initial_noise([("a", 0), ("b", 0)], 0, 0)
    context = policy.encode(PROMPTS)
    sigma = torch.full((2,), 0.9)
    velocity = policy.velocity(noise, sigma, context, g, "reference", given)
    # What stands at the given places of the noisy input is not read: the clean tokens are.
    other = noise.video.clone()
    other[given.mask] = 7.0
    again = policy.velocity(Latents(other, noise.audio), sigma, context, g, "reference", given)
    assert torch.equal(velocity.video, again.video)
    # Nor is the answer that of a model which is told one sigma for all.
    mixed = torch.where(given.mask[..., None], given.video, noise.video)
    plain = policy.velocity(Latents(mixed, noise.audio), sigma, context, g, "reference")
    assert (velocity.video - plain.video).abs().max() > 1e-4
    nothing = Conditioning(given.video, torch.zeros_like(given.mask))
    unconditioned = policy.velocity(noise, sigma, context, g, "reference", nothing)
    torch.testing.assert_close(
        unconditioned.video, policy.velocity(noise, sigma, context, g, "reference").video, atol=1e-5, rtol=1e-4
    )


class TestGeometry:
    def test_sizes(self) -> None:
        g = make_policy().geometry(SamplingConfig())
        assert (g.latent_frames, g.latent_height, g.latent_width, g.video_tokens) == (3, 4, 4, 48)
        assert g.audio_tokens == round(9 / 12 * 25)
        assert g.sample_rate == 16_000

    def test_frames_the_autoencoder_cannot_take(self) -> None:
        with pytest.raises(OmniNFTError, match=r"num_frames: found 12, expected 4k \+ 1 frames, e.g. 9 or 13"):
            make_policy().geometry(SamplingConfig(num_frames=12))

    def test_height_the_pipeline_cannot_take(self) -> None:
        with pytest.raises(OmniNFTError, match=r"sampling\.height: found 48 pixels, expected a multiple of 32"):
            make_policy().geometry(SamplingConfig(height=48))

    def test_guidance_blocks_that_do_not_exist(self) -> None:
        sampling = SamplingConfig(video_guidance=GuidanceConfig(stg=1.0), stg_blocks=(2,))
        with pytest.raises(OmniNFTError, match="expected blocks 0 to 1"):
            make_policy().check_sampling(sampling)


def test_the_same_prompt_has_the_same_context_in_any_company() -> None:
    one, two = make_policy(), make_policy()
    alone = one.encode(PROMPTS[1:])
    together = two.encode(PROMPTS)
    assert torch.equal(alone.video[0], together.video[1])
    assert torch.equal(alone.audio[0], together.audio[1])


def test_streams_are_told_apart_by_what_a_module_writes() -> None:
    assert stream_of("transformer_blocks.0.audio_to_video_attn.to_k.lora_A.current.weight") == "video"
    assert stream_of("transformer_blocks.0.video_to_audio_attn.to_k.lora_A.current.weight") == "audio"
    assert stream_of("transformer_blocks.3.audio_ff.net.2.lora_B.current.weight") == "audio"
    assert stream_of("transformer_blocks.3.ff.net.2.lora_B.current.weight") == "video"


def test_given_frames_are_compressed_as_the_model_was_trained() -> None:
    frames = torch.stack([gradient_frame("a" * n, 64, 64) for n in (3, 11)])
    geometry = make_policy().geometry(SamplingConfig(height=64, width=64))

    def given(version: str, crf: int | None) -> torch.Tensor:
        policy = make_policy(version)
        policy.config = policy.config.model_copy(update={"first_frame_crf": crf})
        return policy.encode_first_frame(frames, geometry).video

    default, raw, at_33, at_18 = (given("ltx-2", crf) for crf in (None, 0, 33, 18))
    assert torch.equal(default, at_33)
    assert len({float(t.double().sum()) for t in (raw, at_33, at_18)}) == 3
    # What diffusers' own pipeline does with a picture.
    compressed = torch.from_numpy(np.stack([apply_image_conditioning_crf(f.numpy(), 33) for f in frames]))
    policy = make_policy()
    policy.config = policy.config.model_copy(update={"first_frame_crf": 0})
    assert torch.equal(policy.encode_first_frame(compressed, geometry).video, at_33)


def test_the_version_and_the_bundled_model_say_their_compression() -> None:
    assert make_policy().first_frame_crf == 33
    assert make_policy("ltx-2.5").first_frame_crf == 18
    assert read_clip_defaults("tiny").first_frame_crf == 0  # never saw compressed clips


def test_the_schedule_is_shifted_for_as_many_tokens_as_told() -> None:
    policy = make_policy()
    # The published scheduler of LTX-2's full weights.
    policy.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    published = [1.0, 0.9915, 0.9821, 0.9718, 0.9605, 0.9478, 0.9337, 0.9178]
    for size in ({}, {"height": 64, "width": 64}):
        sampling = SamplingConfig(num_steps=20, shift_tokens=4096, **size)
        np.testing.assert_allclose(RolloutSampler(policy, sampling).sigmas[:8], published, atol=6e-5)
    own = RolloutSampler(policy, SamplingConfig(num_steps=20)).sigmas
    assert abs(float(own[1]) - published[1]) > 0.01


def test_text_contexts_on_the_device_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    one = policy.encode(PROMPTS[:1])
    size = one.video.nbytes + one.audio.nbytes + one.mask.nbytes
    monkeypatch.setattr("omninft.models.ltx2.TEXT_BYTES", 2 * size + 1)
    calls: list[str] = []
    real = policy._encode_one
    monkeypatch.setattr(policy, "_encode_one", lambda p: (calls.append(p), real(p))[1])
    words = ["a red ball", "a blue ball", "a red lamp"]
    together = policy.encode([*words, words[0]])  # more at once than are kept
    assert len(policy._text) == 2
    assert calls == words
    policy.encode(words[1:])  # kept
    assert calls == words
    again = policy.encode(words[:1])
    assert calls == [*words, words[0]]
    for row in (0, 3):
        assert torch.equal(together.video[row], again.video[0])


def test_a_text_mask_of_ones_is_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    g = policy.geometry(SamplingConfig())
    torch.manual_seed(0)
    noisy = Latents(torch.randn(2, g.video_tokens, 16), torch.randn(2, g.audio_tokens, 16))
    seen = []
    real = policy.transformer.forward

    def spy(**inputs: Any) -> Any:
        seen.append((inputs["encoder_attention_mask"], inputs["audio_encoder_attention_mask"]))
        return real(**inputs)

    monkeypatch.setattr(policy.transformer, "forward", spy)
    whole = policy.encode(PROMPTS)
    assert bool((whole.mask == 1).all())
    assert not whole.mask.is_floating_point()
    short = replace(whole, mask=whole.mask.clone())
    short.mask[0, :10] = 0
    made = [policy.velocity(noisy, torch.tensor([0.5, 0.8]), c, g, "current") for c in (whole, short, whole)]
    assert seen == [(None, None), (short.mask, short.mask), (None, None)]
    assert torch.equal(made[0].video, made[2].video)
    assert not torch.allclose(made[0].video[0], made[1].video[0], atol=1e-4)
    torch.testing.assert_close(made[0].video[1], made[1].video[1])  # the other clip's text is whole
