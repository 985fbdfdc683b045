"""How old moves, and whole updates: signs, micro-batches, validity, steps."""

from __future__ import annotations

import pytest
import torch

from omninft.config import OptimiserConfig, SamplingConfig
from omninft.distributed import Processes
from omninft.learning.update import PolicyUpdate, TrainingBatch, old_decay
from omninft.objectives.negative_aware import NegativeAware, NegativeAwareOptions
from omninft.objectives.protocol import ObjectiveContext
from omninft.rollout.sampler import RolloutSampler
from omninft.types import BranchAdvantages, OmniNFTError, Prompt, PromptGroup, TokenWeights
from tests.random_models import make_policy

SCHEDULE = torch.linspace(1, 0, 21)


@pytest.mark.parametrize(
    ("schedule", "step", "decay"),
    [(0, 0, 0), (0, 999, 0), (1, 0, 0), (1, 100, 0.1), (1, 900, 0.5), (2, 75, 0), (2, 95, 0.15), (2, 1000, 0.999)],
)
def test_old_decay(schedule: int, step: int, decay: float) -> None:
    assert old_decay(schedule, step) == pytest.approx(decay)


class Setting:
    """A small policy, four sampled clips, and the advantages given to them."""

    def __init__(self, micro_batch: int = 4, step_per: str = "sigma", **objective: object) -> None:
        self.policy = make_policy()
        sampler = RolloutSampler(self.policy, SamplingConfig(num_steps=2))
        prompts = [Prompt(str(i), "v", "a", f"a red ball bounces {w}") for i, w in enumerate(("once", "twice"))]
        self.rollout = sampler.sample(tuple(PromptGroup(p, (0, 1)) for p in prompts), 0, 0, "old")
        options = NegativeAwareOptions(sigmas={"choice": "list", "values": (1.0, 0.5)}, **objective)  # type: ignore[arg-type]
        self.update = PolicyUpdate(
            self.policy,
            sampler.geometry,
            NegativeAware(options, ObjectiveContext(sampler.geometry, seed=0)),
            OptimiserConfig(learning_rate=1e-2, clip_norm=1e9, micro_batch=micro_batch, step_per=step_per),  # type: ignore[arg-type]
            SCHEDULE,
            Processes(),
        )

    def run(self, video: list[float], audio: list[float], valid: list[bool] | None = None) -> dict[str, float]:
        ok = torch.tensor(valid or [True] * 4)
        advantages = BranchAdvantages(torch.tensor(video), torch.tensor(audio), ok, ok)
        count = int(ok.sum())
        return self.update.run(TrainingBatch(self.rollout, advantages, TokenWeights(), (count, count)), 0)

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.policy.adapters.parameters()])


UP, DOWN = [5.0, -5.0, 2.0, -1.0], [-5.0, 5.0, -2.0, 1.0]


def test_opposite_advantages_move_opposite_ways() -> None:
    # One step from equal policies: the gradient of every clip is (2 r - 1) times that of its positive term.
    moved = []
    for sign in (UP, DOWN):
        setting = Setting(step_per="iteration", reference_weight=0.0)
        b = [p for n, p in setting.policy.adapters.named_parameters() if "lora_B" in n]
        metrics = setting.run(sign, sign)
        moved.append(torch.cat([p.detach().flatten() for p in b]))
        assert metrics["old_deviation_sample/video"] > 0
    # Adam normalises the size of a first step; its sign is the gradient's.
    agree = (moved[0].sign() == -moved[1].sign()).float().mean()
    assert agree > 0.99


def test_each_loss_has_its_own_gradient_measured() -> None:
    setting = Setting(step_per="iteration", reference_weight=0.0)
    metrics = setting.run(UP, [0.0] * 4)
    probed = {
        k.removeprefix("branch_gradient_sample/"): v
        for k, v in metrics.items()
        if k.startswith("branch_gradient_sample/")
    }
    assert set(probed) == {f"{b}_loss_in_{s}_stream" for b in ("video", "audio") for s in ("video", "audio")}
    # Equal policies and advantages of 0: the audio loss has no gradient anywhere.
    assert probed["audio_loss_in_audio_stream"] < 1e-6
    assert probed["video_loss_in_video_stream"] > 1e-4
    assert probed["video_loss_in_audio_stream"] > 0


def test_zero_advantages_leave_equal_policies_where_they_are() -> None:
    setting = Setting(step_per="iteration", reference_weight=0.0)
    metrics = setting.run([0.0] * 4, [0.0] * 4)
    assert metrics["gradient_norm/video"] < 1e-6
    assert metrics["gradient_norm/audio"] < 1e-6


def test_micro_batches_add_up_to_the_whole() -> None:
    whole, parts = Setting(micro_batch=4), Setting(micro_batch=2)
    a, b = whole.run(UP, DOWN), parts.run(UP, DOWN)
    for key in ("loss/video", "loss/audio", "gradient_norm/video", "gradient_norm/audio"):
        assert b[key] == pytest.approx(a[key], rel=1e-3)
    torch.testing.assert_close(whole.weights(), parts.weights(), atol=2e-3, rtol=1e-2)


def test_an_invalid_clip_teaches_nothing() -> None:
    with_it, without = Setting(), Setting()
    a = with_it.run([5.0, -5.0, 3.0, 4.0], UP, valid=[True, True, True, False])
    b = without.run([5.0, -5.0, 3.0, -4.0], [*UP[:3], 5.0], valid=[True, True, True, False])
    assert a["loss/video"] == b["loss/video"]
    assert torch.equal(with_it.weights(), without.weights())


def test_optimiser_steps_are_counted() -> None:
    per_sigma, per_iteration = Setting(step_per="sigma"), Setting(step_per="iteration")
    per_sigma.run(UP, UP)
    per_iteration.run(UP, UP)
    assert (per_sigma.update.optimiser_step, per_iteration.update.optimiser_step) == (2, 1)


def test_frozen_adapters_are_an_error_and_not_a_silent_nothing() -> None:
    setting = Setting()
    first = setting.update.named[0]
    first[1].requires_grad_(False)
    with pytest.raises(OmniNFTError, match=r"got no gradient; the current adapter was not active"):
        setting.run(UP, UP)


def gradients_before_clipping(video_weight: float, audio_weight: float) -> dict[str, float]:
    setting = Setting(step_per="iteration", reference_weight=0.0, video_weight=video_weight, audio_weight=audio_weight)
    return setting.run(UP, DOWN)


def test_the_trained_loss_is_the_mean_of_the_branches_not_their_sum() -> None:
    # The clip norm sees the size: weights of 1 and 1 are those of 3 and 3, and a branch alone has its own gradient.
    both, thrice = gradients_before_clipping(1.0, 1.0), gradients_before_clipping(3.0, 3.0)
    video, audio = gradients_before_clipping(1.0, 0.0), gradients_before_clipping(0.0, 1.0)
    for stream in ("video", "audio"):
        key = f"gradient_norm/{stream}"
        assert thrice[key] == pytest.approx(both[key], rel=1e-5)
        # |g_v + g_a| / 2 lies between | |g_v| - |g_a| | / 2 and (|g_v| + |g_a|) / 2.
        assert abs(video[key] - audio[key]) / 2 - 1e-6 <= both[key] <= (video[key] + audio[key]) / 2 + 1e-6


def test_unequal_branch_weights_are_shares() -> None:
    mostly_video, video = gradients_before_clipping(4.0, 1e-9), gradients_before_clipping(1.0, 0.0)
    for stream in ("video", "audio"):
        assert mostly_video[f"gradient_norm/{stream}"] == pytest.approx(video[f"gradient_norm/{stream}"], rel=1e-4)


def test_an_error_after_a_step_says_that_it_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(step_per="sigma")
    real = setting.policy.velocity

    def spoiled(latents, sigma, *args, **kwargs):  # type: ignore[no-untyped-def]
        made = real(latents, sigma, *args, **kwargs)
        if float(sigma[0]) == 0.5 and torch.is_grad_enabled():
            made.video.mul_(float("nan"))
        return made

    monkeypatch.setattr(setting.policy, "velocity", spoiled)
    before = setting.weights()
    with pytest.raises(OmniNFTError, match=r"sigma 0\.5: the video loss is nan .*; 1 optimiser step of this iteration"):
        setting.run(UP, UP)
    assert not torch.equal(setting.weights(), before)
