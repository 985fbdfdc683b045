"""ARR: responses the long way, token weights and layer scales against numpy, reward weights, processes, runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omninft.config import SamplingConfig
from omninft.credit.marble import balance
from omninft.credit.protocol import CreditContext
from omninft.credit.responses import (
    ResponseCredit,
    ResponseOptions,
    block_sums,
    detach_scales,
    response_weights,
)
from omninft.credit.surgery import GradientSurgery
from omninft.distributed import Processes
from omninft.rollout.sampler import RolloutSampler, collection_steps
from omninft.types import (
    BranchAdvantages,
    Component,
    Conditioning,
    Latents,
    Needs,
    OmniNFTError,
    Recording,
    RewardGradients,
    Rollout,
    TextContext,
)
from tests.credit.method_runs import (
    TwoProcesses,
    advantages_of,
    branch_gradients,
    check_three_are_two_and_one,
    moved_setting,
    small_tree,
    tiny_tree,
)
from tests.random_models import groups, make_policy
from tests.test_train import model  # noqa: F401

COMPONENTS = (
    Component("picture", "video", 1.0),
    Component("noise", "audio", -0.5),
    Component("sync", "joint", 2.0),
    Component("watched", "joint", 0.0),
)
BLOCKS, FRAMES, PER_FRAME, AUDIO = 3, 4, 6, 10


def random_responses(tokens: int, clips: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(clips, BLOCKS, tokens, generator=torch.Generator().manual_seed(seed)) ** 3 * 5


def rollout_of(a2v: torch.Tensor, v2a: torch.Tensor, given: torch.Tensor | None = None) -> Rollout:
    clips = len(a2v)
    latents = Latents(torch.zeros(clips, a2v.shape[2], 2), torch.zeros(clips, v2a.shape[2], 2))
    empty = torch.zeros(clips, 1, 1)
    conditioning = None if given is None else Conditioning(latents.video, given)
    recorded = {"a2v_responses": a2v, "v2a_responses": v2a}
    return Rollout((), latents, TextContext(empty, empty, empty[..., 0]), conditioning, recorded)


def credit_with(processes: Processes | None = None, iterations: int = 10, **options: Any) -> ResponseCredit:
    context = CreditContext(BLOCKS, FRAMES, iterations, seed=0, processes=processes or Processes())
    return ResponseCredit(ResponseOptions.model_validate(options), context)


def expected_weights(values: np.ndarray, largest: float, clip: tuple[float, float]) -> np.ndarray:
    """The definition for the tokens of one part."""
    low, high = np.quantile(values, clip[0]), np.quantile(values, clip[1])
    return 1 + (largest - 1) * (np.clip(values, low, high) - low) / (high - low)


class TestTokens:
    @pytest.mark.parametrize("clip", [(0.05, 0.95), (0.0, 1.0), (0.2, 0.7)])
    @pytest.mark.parametrize("largest", [2.0, 3.5])
    def test_video_by_frame_and_audio_over_the_clip(self, clip: tuple[float, float], largest: float) -> None:
        responses = random_responses(FRAMES * PER_FRAME)
        mean = responses.double().numpy().mean(axis=1)
        by_frame = response_weights(responses, FRAMES, largest, clip)
        over_clip = response_weights(responses, 1, largest, clip)
        assert by_frame.dtype == torch.float32
        for b in range(len(mean)):
            frames = mean[b].reshape(FRAMES, PER_FRAME)
            expected = np.concatenate([expected_weights(f, largest, clip) for f in frames])
            np.testing.assert_allclose(by_frame[b], expected, rtol=1e-6)
            np.testing.assert_allclose(over_clip[b], expected_weights(mean[b], largest, clip), rtol=1e-6)

    def test_given_tokens_count_in_nothing(self) -> None:
        responses = random_responses(FRAMES * PER_FRAME)
        given = torch.zeros(3, FRAMES * PER_FRAME, dtype=torch.bool)
        given[0, :PER_FRAME] = True  # the whole first frame
        given[1, [0, 3, 9]] = True
        responses.permute(0, 2, 1)[given] = torch.tensor([float("nan"), 1e9, -1e9])
        made = response_weights(responses, FRAMES, 2.0, (0.05, 0.95), given)
        assert bool((made[given] == 0).all())
        for b in range(3):
            for frame in range(FRAMES):
                rows = [i for i in range(frame * PER_FRAME, (frame + 1) * PER_FRAME) if not given[b, i]]
                if rows:
                    values = responses[b][:, rows].double().numpy().mean(axis=0)
                    np.testing.assert_allclose(made[b, rows], expected_weights(values, 2.0, (0.05, 0.95)), rtol=1e-6)

    def test_even_responses_weigh_alike(self) -> None:
        assert response_weights(torch.full((2, 3, 8), 1e7), 2, 2.0, (0.05, 0.95)).tolist() == [[1.0] * 8] * 2

    def test_refuses_what_is_not_finite_or_does_not_fit(self) -> None:
        responses = random_responses(8)
        with pytest.raises(ValueError, match="a multiple of 3"):
            response_weights(responses, 3, 2.0, (0.05, 0.95))
        responses[0, 1, 2] = float("nan")
        with pytest.raises(OmniNFTError, match="not finite"):
            response_weights(responses, 2, 2.0, (0.05, 0.95))
        with pytest.raises(OmniNFTError, match="not finite"):
            block_sums(responses)

    def test_the_credit_weighs_both_streams(self) -> None:
        a2v, v2a = random_responses(FRAMES * PER_FRAME), random_responses(AUDIO, seed=1)
        given = torch.zeros(3, FRAMES * PER_FRAME, dtype=torch.bool)
        given[:, :PER_FRAME] = True
        credit = credit_with()
        made = credit.weigh(rollout_of(a2v, v2a, given), 0)
        assert made.video is not None
        assert made.audio is not None
        torch.testing.assert_close(made.video, response_weights(a2v, FRAMES, 2.0, (0.05, 0.95), given))
        torch.testing.assert_close(made.audio, response_weights(v2a, 1, 2.0, (0.05, 0.95)))
        free = made.video[made.video > 0].mean()
        assert credit.metrics()["arr/token_weight/video"] == pytest.approx(float(free))
        off = credit_with(tokens={"enabled": False}).weigh(rollout_of(a2v, v2a), 0)
        assert off.video is None
        assert off.audio is None


class TestLayers:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_scales_against_the_formula(self, temperature: float) -> None:
        means = np.array([0.3, 2.0, 0.9, 1.4, 0.3, 5.0])
        delta = (means - 0.3) / 4.7
        expected = 1 - (1 - delta) ** (1 / temperature)
        made = detach_scales(torch.tensor(means), temperature)
        np.testing.assert_allclose(made, expected, atol=1e-12)
        assert made[0] == 0
        assert made[5] == 1

    def test_a_higher_temperature_cuts_more(self) -> None:
        means = torch.tensor([0.0, 0.5, 1.0])
        scales = [detach_scales(means, t)[1] for t in (0.5, 1.0, 2.0)]
        assert scales[0] > scales[1] > scales[2]

    def test_even_blocks_are_left_alone(self) -> None:
        assert detach_scales(torch.full((4,), 0.7, dtype=torch.float64), 1.0) == (1.0,) * 4
        assert detach_scales(torch.tensor([2.0]), 1.0) == (1.0,)

    def test_means_leave_given_tokens_out_in_both_directions(self) -> None:
        a2v, v2a = random_responses(FRAMES * PER_FRAME), random_responses(AUDIO, seed=1)
        given = torch.rand(3, FRAMES * PER_FRAME, generator=torch.Generator().manual_seed(2)) < 0.3
        made = credit_with().gradient_scales(rollout_of(a2v, v2a, given))
        assert made is not None
        kept = (~given).numpy()
        video = np.array([a2v[:, block].double().numpy()[kept].mean() for block in range(BLOCKS)])
        audio = v2a.double().numpy().mean(axis=(0, 2))
        for scales, means in ((made.a2v, video), (made.v2a, audio)):
            delta = (means - means.min()) / (means.max() - means.min())
            np.testing.assert_allclose(scales, delta, atol=1e-12)

    def test_two_processes_have_the_scales_of_all_clips(self) -> None:
        a2v, v2a = random_responses(FRAMES * PER_FRAME, clips=4), random_responses(AUDIO, clips=4, seed=1)
        given = torch.zeros(4, FRAMES * PER_FRAME, dtype=torch.bool)
        given[0, :PER_FRAME] = True  # so that the processes have different numbers of tokens
        whole = credit_with().gradient_scales(rollout_of(a2v, v2a, given))
        assert whole is not None
        shares = [(a2v[rows], v2a[rows], given[rows]) for rows in (slice(0, 2), slice(2, 4))]
        sums = [[block_sums(a, g), block_sums(v)] for a, v, g in shares]
        made = [credit_with(TwoProcesses(sums[1 - rank])).gradient_scales(rollout_of(*shares[rank])) for rank in (0, 1)]
        assert made[0] == made[1]
        assert made[0] is not None
        np.testing.assert_allclose(made[0].a2v, whole.a2v, atol=1e-12)
        np.testing.assert_allclose(made[0].v2a, whole.v2a, atol=1e-12)

    def test_scales_reach_keys_and_values_of_both_directions(self) -> None:
        setting = moved_setting()
        update = setting.update
        plain = [g.clone() for g in projections_gradients(setting)]
        plan = credit_with().surgery
        assert plan is not None
        assert (plan.target, plan.video_loss_only) == ("projection", False)
        ones = (1.0,) * len(setting.policy.blocks)
        surgery = GradientSurgery(setting.policy.sites, ones, ones, plan.target)
        last = len(ones) - 1
        # The last block's own keys and values see the loss through that block alone: their gradient scales as such.
        a2v, v2a = (1.0,) * last + (0.25,), (1.0,) * last + (0.5,)
        surgery.set_schedules(a2v, v2a)
        update.surgery = surgery
        with surgery:
            scaled = projections_gradients(setting)
        for before, after, factor in zip(plain, scaled, (0.25, 0.25, 0.5, 0.5), strict=True):
            assert float(before.norm()) > 0
            torch.testing.assert_close(after, factor * before, atol=1e-7, rtol=1e-4)
        surgery.check_fired()


def projections_gradients(setting: Any) -> list[torch.Tensor]:
    """Of to_k and to_v of A2V and of V2A in the last block, of the summed loss."""
    last = len(setting.policy.blocks) - 1
    names = [f"{a}.{p}" for a in ("audio_to_video_attn", "video_to_audio_attn") for p in ("to_k", "to_v")]
    ones = torch.ones(4, dtype=torch.bool)
    both = branch_gradients(setting, BranchAdvantages(torch.ones(4), -torch.ones(4), ones, ones))
    total, found, offset = both[0] + both[1], dict[str, list[torch.Tensor]](), 0
    for name, p in setting.update.named:
        part = total[offset : offset + p.numel()]
        offset += p.numel()
        for wanted in names:
            if f".{last}.{wanted}." in f".{name}.":
                found.setdefault(wanted, []).append(part)
    return [torch.cat(found[name]) for name in names]


class TestRecording:
    def test_responses_equal_those_computed_with_hooks_of_their_own(self) -> None:
        policy = make_policy()
        steps = 4
        outputs: dict[tuple[str, int], list[torch.Tensor]] = {}
        handles = [
            site.find(site.attention).register_forward_hook(keep_in(outputs, (site.direction, site.block)))
            for site in policy.sites
        ]
        plain = RolloutSampler(policy, SamplingConfig(num_steps=steps)).sample(groups(), 0, 0, "reference")
        for handle in handles:
            handle.remove()
        needs = credit_with(window=(0.5, 1.0)).needs
        assert needs == Needs(recordings=(Recording("responses", (0.5, 1.0)),))
        rollout = RolloutSampler(policy, SamplingConfig(num_steps=steps), needs).sample(groups(), 0, 0, "reference")
        assert torch.equal(plain.latents.video, rollout.latents.video)
        window = list(collection_steps(steps, (0.5, 1.0)))
        assert window == [2, 3]
        for direction, tokens in (("a2v", plain.latents.video.shape[1]), ("v2a", plain.latents.audio.shape[1])):
            found = rollout.recorded[f"{direction}_responses"]
            assert found.shape == (2, len(policy.blocks), tokens)
            for block in range(len(policy.blocks)):
                norms = [np.sqrt((outputs[direction, block][s].double().numpy() ** 2).sum(axis=-1)) for s in window]
                np.testing.assert_allclose(found[:, block], np.mean(norms, axis=0), rtol=1e-5)

    def test_only_what_is_used_is_recorded(self) -> None:
        off = credit_with(tokens={"enabled": False}, layers={"enabled": False})
        assert off.needs == Needs()
        assert off.surgery is None
        assert off.gradient_scales(rollout_of(random_responses(8), random_responses(8))) is None


def keep_in(outputs: dict[tuple[str, int], list[torch.Tensor]], key: tuple[str, int]) -> Any:
    def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        outputs.setdefault(key, []).append(output.detach())

    return hook


def gradients_of(seed: int) -> RewardGradients:
    made = []
    for branch in range(2):
        generator = torch.Generator().manual_seed(10 * seed + branch)
        vectors = torch.randn(4, 6, generator=generator, dtype=torch.float64) * torch.tensor(
            [[1.0], [4.0], [0.3], [1.0]]
        )
        made.append(vectors @ vectors.T)
    return RewardGradients(made[0], made[1], made[0] + made[1])


class TestRewards:
    def test_weights_mix_the_prior_with_each_branchs_own_balance(self) -> None:
        advantages, gradients, kappa = advantages_of(COMPONENTS), gradients_of(0), 0.3
        credit = credit_with(rewards={"kappa": kappa, "warmup": 0})
        made = credit.combine(advantages, gradients, 0)
        prior = torch.tensor([c.weight for c in COMPONENTS], dtype=torch.float64)
        for branch, gram, heard, values in (
            ("video", gradients.video, [True, False, True, False], made.video),
            ("audio", gradients.audio, [False, True, True, False], made.audio),
        ):
            mask = torch.tensor(heard)
            own = torch.where(mask, prior, 0.0)
            shares = balance(gram, mask).shares  # type: ignore[union-attr]
            weights = (1 - kappa) * own + kappa * own.abs().sum() * shares * own.sign()
            assert float(weights.abs().sum()) == pytest.approx(float(own.abs().sum()))
            torch.testing.assert_close(values, (advantages.values @ weights).float())
            logged = {k.rsplit("/", 1)[1]: v for k, v in credit.metrics().items() if f"weight/{branch}/" in k}
            assert logged == pytest.approx(
                {c.name: float(w) for c, w, h in zip(COMPONENTS, weights, heard, strict=True) if h}
            )

    def test_the_prior_holds_until_the_warm_up_is_over(self) -> None:
        credit = credit_with(iterations=40, rewards={"warmup": 0.1, "probe_every": 3})
        assert [i for i in range(12) if credit.probes(i)] == [4, 7, 10]
        counted = credit_with(iterations=40, rewards={"warmup": 2.0})
        assert [i for i in range(6) if counted.probes(i)] == [2, 3, 4, 5]
        assert not any(credit_with(rewards=off).probes(9) for off in ({"enabled": False}, {"kappa": 0.0}))
        advantages = advantages_of(COMPONENTS)
        before = credit.combine(advantages, None, 0)
        torch.testing.assert_close(before.video, (advantages.values[:, 0] + 2 * advantages.values[:, 2]).float())

    def test_gamma_is_smoothed_and_a_checkpoint_keeps_it(self) -> None:
        advantages = advantages_of(COMPONENTS)
        credit = credit_with(rewards={"smoothing": 0.8, "warmup": 0})
        credit.combine(advantages, gradients_of(0), 0)
        first = credit.gamma["video"].clone()
        tensors, values = credit.state()
        again = credit_with(rewards={"smoothing": 0.8, "warmup": 0})
        again.load_state({k: t.clone() for k, t in tensors.items()}, values)
        made = [c.combine(advantages, gradients_of(1), 1) for c in (credit, again)]
        assert torch.equal(made[0].video, made[1].video)
        assert torch.equal(made[0].audio, made[1].audio)
        now = balance(gradients_of(1).video, torch.tensor([True, False, True, False])).shares  # type: ignore[union-attr]
        torch.testing.assert_close(credit.gamma["video"], 0.8 * first + 0.2 * now)

    def test_unrouted_branches_hear_everything(self) -> None:
        advantages = advantages_of(COMPONENTS)
        credit = credit_with(routed=False, rewards={"warmup": 0, "kappa": 1.0})
        credit.combine(advantages, gradients_of(0), 0)
        for branch in ("video", "audio"):
            weights = [abs(credit.metrics()[f"arr/weight/{branch}/{c.name}"]) for c in COMPONENTS[:3]]
            assert sum(weights) == pytest.approx(3.5)


@pytest.mark.parametrize(
    "options", [{"window": (0.9, 0.5)}, {"tokens": {"clip": (0.5, 0.5)}}, {"layers": {"temperature": 0}}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must rise|greater than 0"):
        ResponseOptions.model_validate(options)


class TestRuns:
    def test_on_a_small_random_model(self, model: Path, tmp_path: Path) -> None:  # noqa: F811
        credit = {"kind": "arr", "rewards": {"warmup": 0, "smoothing": 0.5}}
        rows = check_three_are_two_and_one(small_tree(model, credit), tmp_path)
        for row in rows:
            # Three blocks: one lets nothing cross, one everything.
            assert 1 / 3 <= row["arr/gradient_scale/a2v"] <= 2 / 3
            assert 1 < row["arr/token_weight/video"] < 2
            assert 1 < row["arr/token_weight/audio"] < 2
            # One reward a branch: the balance is the prior.
            assert row["arr/weight/video/brightness"] == pytest.approx(1.0)

    def test_on_the_bundled_model_after_a_warm_up(self, tmp_path: Path) -> None:
        rows = check_three_are_two_and_one(tiny_tree({"kind": "arr", "rewards": {"warmup": 2.0}}), tmp_path)
        assert ["time/reward gradients" in row for row in rows] == [False, False, True]
        assert [rows[i]["arr/weight/video/redness"] for i in (0, 1)] == [1.5, 1.5]
        last = rows[2]
        assert last["arr/weight/video/redness"] != 1.5
        assert last["arr/weight/video/redness"] + last["arr/weight/video/together"] == pytest.approx(2.5)
        assert last["arr/weight/audio/loudness"] + last["arr/weight/audio/together"] == pytest.approx(1.5)
