"""Guidance arithmetic, Euler steps, and how clips are dealt out."""

from __future__ import annotations

import pytest
import torch

from omninft.config import GuidanceConfig, SamplingConfig
from omninft.models.recording import V2ARecorder
from omninft.noise import Purpose, keyed_normal
from omninft.rollout.sampler import RolloutSampler, batches, collection_steps, guide
from omninft.types import Needs, Prompt, PromptGroup, Recording
from tests.random_models import groups as random_groups
from tests.random_models import make_policy


def groups(count: int, size: int) -> list[PromptGroup]:
    return [PromptGroup(Prompt(f"p{i}", "v", "a", "av"), tuple(range(size))) for i in range(count)]


def keys(parts: tuple[PromptGroup, ...]) -> list[tuple[str, int]]:
    return [(g.prompt.id, s) for g in parts for s in g.samples]


def test_guidance_pushes_away_from_the_weaker_prediction() -> None:
    clean = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]])
    weaker = torch.tensor([[[0.0, 2.0], [4.0, 1.0]]])
    guided = guide(clean, [(weaker, 2.0)], GuidanceConfig())
    assert torch.equal(guided, torch.tensor([[[3.0, 2.0], [1.0, 13.0]]]))


def test_rescaling_by_one_restores_the_deviation_of_the_prediction() -> None:
    torch.manual_seed(0)
    clean, weaker = torch.randn(3, 7, 4), torch.randn(3, 7, 4)
    guided = guide(clean, [(weaker, 3.0)], GuidanceConfig(rescale=1.0))
    torch.testing.assert_close(guided.std(dim=(1, 2)), clean.std(dim=(1, 2)))
    half = guide(clean, [(weaker, 3.0)], GuidanceConfig(rescale=0.5))
    plain = guide(clean, [(weaker, 3.0)], GuidanceConfig())
    torch.testing.assert_close(half, 0.5 * guided + 0.5 * plain)


def test_batches_keep_the_order_and_cut_groups() -> None:
    made = list(batches(groups(3, 4), 5))
    assert [len(keys(b)) for b in made] == [5, 5, 2]
    assert [k for b in made for k in keys(b)] == [(f"p{i}", s) for i in range(3) for s in range(4)]
    assert made[0][1].samples == (0,)


@pytest.mark.parametrize(("count", "size", "world"), [(3, 3, 2), (1, 2, 4), (5, 2, 3)])
def test_clips_that_do_not_divide_are_shared_all_the_same(count: int, size: int, world: int) -> None:
    whole = [k for b in batches(groups(count, size), 4) for k in keys(b)]
    parts = [[k for b in batches(groups(count, size), 4, rank, world) for k in keys(b)] for rank in range(world)]
    assert [k for part in parts for k in part] == whole
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_processes_share_the_clips_without_gap_or_overlap() -> None:
    whole = [k for b in batches(groups(4, 4), 8) for k in keys(b)]
    parts = [[k for b in batches(groups(4, 4), 8, rank, 2) for k in keys(b)] for rank in range(2)]
    assert parts[0] + parts[1] == whole
    assert len(parts[0]) == 8


def test_collection_steps() -> None:
    assert collection_steps(20) == range(10, 19)
    assert collection_steps(40) == range(20, 37)
    for n in range(2, 200):
        steps = collection_steps(n)
        assert steps.start == n // 2
        assert steps.stop == min(9 * n // 10 + 1, n)
        assert steps.stop <= n
    assert collection_steps(1) == range(1)
    assert collection_steps(4, (1.0, 1.0)) == range(3, 4)
    for arguments in [(0,), (10, (0.9, 0.5)), (10, (-0.1, 0.5)), (10, (0.5, 1.1))]:
        with pytest.raises(ValueError, match="expected num_steps"):
            collection_steps(*arguments)


class Watch:
    """A recorder that keeps nothing."""

    recording = False

    def collect(self) -> dict[str, torch.Tensor]:
        return {}

    def close(self) -> None:
        """Nothing to take off."""


def test_recorders_see_conditional_passes_of_their_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    guidance = GuidanceConfig(text=2.0, stg=0.5, modality=1.5)
    sampling = SamplingConfig(
        num_steps=3, video_guidance=guidance, audio_guidance=guidance, stg_blocks=(1,), negative_prompt="noise"
    )
    watch = Watch()
    sampler = RolloutSampler(policy, sampling, recorders=[(watch, (1,))])  # type: ignore[list-item]
    prompts = [g.prompt.prompt_av for g in random_groups()]
    texts = {"positive": policy.encode(prompts).video, "negative": policy.encode(["noise"] * 2).video}
    seen: list[tuple[str, str, bool]] = []
    real = policy.velocity

    def spy(latents, sigma, context, geometry, adapter, conditioning=None, mode="joint", stg=()):  # type: ignore[no-untyped-def]
        (text,) = [name for name, t in texts.items() if torch.equal(t, context.video)]
        seen.append((text, mode, watch.recording))
        return real(latents, sigma, context, geometry, adapter, conditioning, mode, stg)

    monkeypatch.setattr(policy, "velocity", spy)
    sampler.sample(random_groups(), 0, 0, "old")
    passes = [("positive", "joint"), ("negative", "joint"), ("positive", "stg"), ("positive", "isolated")]
    assert seen == [(*p, p == passes[0] and step == 1) for step in range(3) for p in passes]


def test_recordings_are_made_as_asked() -> None:
    policy = make_policy()
    recording = Recording("v2a_columns", (0.25, 0.5), 0.5, rope=False, value_weighted=True)
    sampling = SamplingConfig(num_steps=4)
    asked = RolloutSampler(policy, sampling, Needs((recording,))).sample(random_groups(), 0, 0, "old")
    by_hand = V2ARecorder(policy.blocks, None, len(policy.blocks) // 2, rope=False, value_weighted=True)
    wanted = RolloutSampler(policy, sampling, recorders=[(by_hand, (1, 2))]).sample(random_groups(), 0, 0, "old")
    assert torch.equal(asked.recorded["v2a_columns"], wanted.recorded["v2a_columns"])


def test_noise_is_keyed_by_clip_stream_step_and_iteration() -> None:
    sampler = RolloutSampler(make_policy(), SamplingConfig(num_steps=3))
    names, g = [("rain", 0), ("bell", 2)], sampler.geometry
    video, audio = (g.video_tokens, g.video_channels), (g.audio_tokens, g.audio_channels)
    start, step = sampler.initial_noise(names, 3, 5), sampler.step_noise(names, 3, 5, 2)
    assert torch.equal(start.video, keyed_normal(names, video, 3, 5, Purpose.SAMPLE_VIDEO))
    assert torch.equal(start.audio, keyed_normal(names, audio, 3, 5, Purpose.SAMPLE_AUDIO))
    assert torch.equal(step.video, keyed_normal(names, video, 3, 5, Purpose.SDE_VIDEO, 2))
    assert torch.equal(step.audio, keyed_normal(names, audio, 3, 5, Purpose.SDE_AUDIO, 2))


def test_each_clip_keeps_its_own_given_frame() -> None:
    policy = make_policy()
    shades = {"dark": 20, "light": 230}
    sampler = RolloutSampler(
        policy,
        SamplingConfig(num_steps=2),
        read_frame=lambda path, h, w: torch.full((h, w, 3), shades[path], dtype=torch.uint8),
    )
    prompts = [Prompt(str(i), "v", "a", "av", None, path) for i, path in enumerate(("dark", None, "light"))]
    rollout = sampler.sample(tuple(PromptGroup(p, (0,)) for p in prompts), 0, 0, "old")
    assert rollout.conditioning is not None
    frames = torch.stack([torch.full((32, 32, 3), s, dtype=torch.uint8) for s in (20, 0, 230)])
    expected = policy.encode_first_frame(frames, sampler.geometry)
    for i, kept in enumerate((True, False, True)):
        mask = expected.mask[i]
        assert rollout.conditioning.mask[i].tolist() == (mask & kept).tolist()
        made, wanted = rollout.latents.video[i][mask], expected.video[i][mask]
        assert torch.equal(made, wanted) == kept
    assert not torch.equal(rollout.latents.video[0][mask], rollout.latents.video[2][mask])


def test_the_schedule_is_shifted_as_the_config_says() -> None:
    policy = make_policy()
    sampling = SamplingConfig(num_steps=4, shift_tokens=4096)
    sampler = RolloutSampler(policy, sampling)
    assert torch.equal(sampler.sigmas, policy.sigmas(4, sampler.geometry, 4096))
