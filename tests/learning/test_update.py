"""How old moves, and whole updates: signs, micro-batches, validity, steps."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from omninft.checkpoint.store import flatten_optimizer, restore_optimizer
from omninft.config import OptimiserConfig, SamplingConfig
from omninft.distributed import Processes
from omninft.learning.update import PolicyUpdate, TrainingBatch, make_optimiser, old_decay
from omninft.noise import Purpose, keyed_normal
from omninft.objectives.negative_aware import NegativeAware, NegativeAwareOptions, policy_loss
from omninft.objectives.protocol import ObjectiveContext
from omninft.rollout.sampler import RolloutSampler
from omninft.types import BranchAdvantages, Conditioning, OmniNFTError, Prompt, PromptGroup, TokenWeights
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


def spied_velocities(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every forward of the update was asked for."""
    seen: list[dict[str, Any]] = []
    real = setting.policy.velocity

    def spy(latents, sigma, context, geometry, adapter, conditioning=None, **kwargs):  # type: ignore[no-untyped-def]
        active = setting.policy.adapters.active
        made = real(latents, sigma, context, geometry, adapter, conditioning, **kwargs)
        seen.append(
            {
                "adapter": adapter, "sigma": float(sigma[0]), "gradient": torch.is_grad_enabled(),
                "active": active, "video": latents.video.clone(), "audio": latents.audio.clone(), "given": conditioning,
                "context": context.video.clone(), "made": made,
            }
        )  # fmt: skip
        return made

    monkeypatch.setattr(setting.policy, "velocity", spy)
    return seen


def test_old_and_reference_predict_without_a_graph_and_current_inside_its_adapter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting = Setting(micro_batch=2, step_per="iteration", reference_weight=0.1)
    seen = spied_velocities(setting, monkeypatch)
    setting.run(UP, DOWN)
    calls = [(s["adapter"], s["gradient"], s["sigma"], len(s["video"])) for s in seen]
    one = [("old", False), ("reference", False), ("current", True)]
    expected = [(a, g, sigma, 2) for sigma in (1.0, 0.5) for _ in range(2) for a, g in one]
    assert calls == [*expected, ("current", False, 0.5, 2)]  # and how far current has moved
    assert all(s["active"] == "current" for s in seen if s["gradient"])
    for start in range(0, 12, 3):  # the three see the same noisy latents and texts
        for key in ("video", "audio", "context"):
            assert torch.equal(seen[start][key], seen[start + 1][key])
            assert torch.equal(seen[start][key], seen[start + 2][key])
    # Micro-batches are the rollout's clips, in order, with their own texts.
    texts = setting.rollout.context.video
    assert torch.equal(seen[0]["context"], texts[:2])
    assert torch.equal(seen[3]["context"], texts[2:])
    # Noise of its own in every round and stream; at sigma 1 the input is the noise alone.
    noise = keyed_normal(setting.rollout.clip_keys, tuple(seen[0]["video"].shape[1:]), 0, 0, Purpose.TRAIN_VIDEO, 0)
    torch.testing.assert_close(seen[0]["video"], noise[:2])
    sound = keyed_normal(setting.rollout.clip_keys, tuple(seen[0]["audio"].shape[1:]), 0, 0, Purpose.TRAIN_AUDIO, 1)
    torch.testing.assert_close(seen[9]["audio"], 0.5 * sound[2:] + 0.5 * setting.rollout.latents.audio[2:])


def test_a_reference_of_no_weight_is_not_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(reference_weight=0.0)
    seen = spied_velocities(setting, monkeypatch)
    setting.run(UP, DOWN)
    assert "reference" not in {s["adapter"] for s in seen}


def test_the_reference_is_predicted_in_its_share_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(reference_weight=0.1, reference_share=0.5)
    seen = spied_velocities(setting, monkeypatch)
    metrics = setting.run(UP, DOWN)
    assert len([s for s in seen if s["adapter"] == "reference"]) == 1  # of two
    assert metrics["reference/video"] >= 0


def test_losses_are_those_of_the_policies_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(step_per="iteration", reference_weight=0.5)
    torch.manual_seed(2)
    for name in ("current", "old"):
        for key, tensor in setting.policy.adapters.state(name).items():  # type: ignore[arg-type]
            if key.endswith("lora_B"):
                tensor.normal_(0, 0.2)
    setting.policy.adapters._forget_merged()
    seen = spied_velocities(setting, monkeypatch)
    omega = torch.rand(4, setting.rollout.latents.video.shape[1]) + 0.5
    sound = torch.rand(4, setting.rollout.latents.audio.shape[1]) + 0.5
    advantages = BranchAdvantages(
        torch.tensor(UP), torch.tensor(DOWN), torch.tensor([True, True, True, False]), torch.ones(4, dtype=torch.bool)
    )
    batch = TrainingBatch(setting.rollout, advantages, TokenWeights(omega, sound), (3, 4))
    metrics = setting.update.run(batch, 0)
    for branch, advantage, weights in (("video", advantages.video, omega), ("audio", advantages.audio, sound)):
        valid = getattr(advantages, f"{branch}_valid")
        losses, pulls = [], []
        for old, reference, current in (seen[0:3], seen[3:6]):
            sigma, noisy = old["sigma"], old[branch]
            x0 = {n: noisy - sigma * getattr(s["made"], branch).detach()
                  for n, s in (("old", old), ("reference", reference), ("current", current))}  # fmt: skip
            clean = getattr(setting.rollout.latents, branch)
            options = setting.update.objective.options
            losses.append(policy_loss(x0["current"], x0["old"], clean, advantage, weights, options=options)[valid])  # type: ignore[arg-type]
            pulls.append((x0["current"] - x0["reference"]).square().mean(dim=(1, 2))[valid])
        assert metrics[f"loss/{branch}"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
        assert metrics[f"reference/{branch}"] == pytest.approx(float(torch.cat(pulls).mean()), rel=1e-4)


def test_given_tokens_keep_sigma_0_and_leave_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(step_per="iteration", reference_weight=0.1)
    mask = torch.zeros(setting.rollout.latents.video.shape[:2], dtype=torch.bool)
    mask[:, : setting.rollout.latents.video.shape[1] // 2] = True
    given = Conditioning(setting.rollout.latents.video.clone(), mask)
    setting.rollout = replace(setting.rollout, conditioning=given)
    seen = spied_velocities(setting, monkeypatch)
    first = setting.run(UP, DOWN)
    for s in seen:
        assert s["given"] is not None
        assert torch.equal(s["video"][mask], setting.rollout.latents.video[mask])  # clean, whatever the sigma
        assert not torch.equal(s["video"][~mask], setting.rollout.latents.video[~mask])
    # What stands in the given tokens of the target changes nothing.
    other = Setting(step_per="iteration", reference_weight=0.1)
    junk = torch.where(mask[..., None], 1e3, other.rollout.latents.video)
    latents = replace(other.rollout.latents, video=junk)
    other.rollout = replace(other.rollout, latents=latents, conditioning=given)
    second = other.run(UP, DOWN)
    assert second["loss/video"] == pytest.approx(first["loss/video"], rel=1e-5)


def test_learning_rate_warms_up_by_optimiser_steps_and_clipping_bounds_the_gradient() -> None:
    setting = Setting(step_per="sigma")
    setting.update.settings = setting.update.settings.model_copy(update={"warmup_steps": 8, "clip_norm": 1e-3})
    norms: list[float] = []
    real = setting.update.optimiser.step

    def step() -> None:
        norms.append(sum(float(p.grad.square().sum()) for p in setting.update.parameters if p.grad is not None) ** 0.5)
        rates.append(setting.update.optimiser.param_groups[0]["lr"])
        real()

    rates: list[float] = []
    setting.update.optimiser.step = step  # type: ignore[method-assign, assignment]
    for iteration in range(2):
        setting.update.run(
            TrainingBatch(
                setting.rollout,
                BranchAdvantages(torch.tensor(UP), torch.tensor(UP), torch.ones(4) > 0, torch.ones(4) > 0),
                TokenWeights(),
                (4, 4),
            ),
            iteration,
        )
    assert rates == pytest.approx([1e-2 * n / 8 for n in (1, 2, 3, 4)])
    assert norms == pytest.approx([1e-3] * 4, rel=1e-3)


@pytest.mark.parametrize("video_loss_only", [False, True])
def test_surgery_is_on_in_the_backward_of_its_scope(video_loss_only: bool) -> None:
    setting = Setting(step_per="iteration", reference_weight=0.0)
    active: list[str] = []

    class Watch:
        on = False

        def __enter__(self) -> None:
            self.on = True

        def __exit__(self, *exception: object) -> None:
            self.on = False

    watch = Watch()
    setting.update.surgery, setting.update.video_loss_only = watch, video_loss_only  # type: ignore[assignment]
    real = setting.update.objective.loss

    def loss(current: Any, prepared: Any, weights: Any) -> Any:
        video, audio = real(current, prepared, weights)
        for name, branch in (("video", video), ("audio", audio)):
            branch.loss.register_hook(lambda g, name=name: active.append(f"{name} {watch.on}"))
        return video, audio

    setting.update.objective.loss = loss  # type: ignore[method-assign]
    setting.update._probe = lambda video, audio: {}  # type: ignore[method-assign]
    setting.run(UP, DOWN)
    assert set(active) == {"video True", f"audio {not video_loss_only}"}


class Twins(Processes):
    """One of two processes that have the same clips and do the same."""

    def __init__(self) -> None:
        super().__init__()
        self.world = 2

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)


def test_two_processes_of_the_same_clips_measure_and_learn_what_one_does() -> None:
    # Twice the clips in all, and every sum over processes twice as large.
    made, weights = [], []
    for processes in (Processes(), Twins()):
        setting = Setting(step_per="iteration", reference_weight=0.1)
        setting.update.processes = processes
        ok, count = torch.ones(4, dtype=torch.bool), 4 * processes.world
        advantages = BranchAdvantages(torch.tensor(UP), torch.tensor(DOWN), ok, ok)
        batch = TrainingBatch(setting.rollout, advantages, TokenWeights(), (count, count))
        made.append(setting.update.run(batch, 0))
        weights.append(setting.weights())
        probed = setting.update.reward_gradients(setting.rollout, TokenWeights(), [advantages], 0)
        made[-1] |= {"video": probed.video.item(), "audio": probed.audio.item(), "both": probed.both.item()}
    assert made[1] == pytest.approx(made[0], rel=1e-5)
    assert all(made[0][f"{key}/video"] > 0 for key in ("loss", "gradient_norm", "old_deviation_sample"))
    torch.testing.assert_close(*weights)


def test_the_optimiser_has_the_settings_of_the_config() -> None:
    setting = Setting()
    options = OptimiserConfig(learning_rate=0.01, betas=(0.7, 0.8), epsilon=0.5, weight_decay=0.3, clip_norm=1e9)
    update = PolicyUpdate(
        setting.policy, setting.update.geometry, setting.update.objective, options, SCHEDULE, Processes()
    )
    # Two AdamW steps of gradients 1 and -2, written out: Loshchilov and Hutter, algorithm 2.
    first, second = 1.0, -2.0
    expected = [p.detach().clone() for p in update.parameters]
    mean = square = 0.0
    for t, gradient in enumerate((first, second), 1):
        mean, square = 0.7 * mean + 0.3 * gradient, 0.8 * square + 0.2 * gradient**2
        step = mean / (1 - 0.7**t) / ((square / (1 - 0.8**t)) ** 0.5 + 0.5)
        expected = [p * (1 - 0.01 * 0.3) - 0.01 * step for p in expected]
        for p in update.parameters:
            p.grad = torch.full_like(p, gradient)
        update._step(0)
    for made, wanted in zip(update.parameters, expected, strict=True):
        torch.testing.assert_close(made.detach(), wanted)


def test_rewards_own_gradients_are_those_of_an_update_by_them_alone() -> None:
    # Of each clip its own credit, whatever the micro-batch, at the first sigma and with the branches' shares.
    setting = Setting(micro_batch=1, step_per="iteration", reference_weight=0.0, video_weight=3.0)
    ok = torch.ones(4, dtype=torch.bool)
    advantages = BranchAdvantages(torch.tensor(UP), torch.tensor([5.0, 1.0, 1.0, -5.0]), ok, ok)
    tokens = TokenWeights(torch.rand(4, setting.rollout.latents.video.shape[1]) + 0.1)
    found = setting.update.reward_gradients(setting.rollout, tokens, [advantages], 1)
    setting.update.rounds = setting.update.rounds[:1]
    metrics = setting.update.run(TrainingBatch(setting.rollout, advantages, tokens, (4, 4)), 1)
    squared = metrics["gradient_norm/video"] ** 2 + metrics["gradient_norm/audio"] ** 2
    assert found.both.item() == pytest.approx(squared, rel=1e-4)


def test_how_far_current_moved_is_measured_on_free_tokens_in_both_streams() -> None:
    setting = Setting(step_per="iteration", reference_weight=0.0)
    mask = torch.zeros(setting.rollout.latents.video.shape[:2], dtype=torch.bool)
    mask[:, : mask.shape[1] // 2] = True
    mask[1:] = False
    setting.rollout = replace(setting.rollout, conditioning=Conditioning(setting.rollout.latents.video.clone(), mask))
    metrics = setting.run(UP, DOWN)
    update, free = setting.update, ~mask
    prepared = update._prepare(setting.rollout, update.rounds[-1], 0)
    with torch.no_grad():
        current, old = (
            update._predict(setting.rollout, name, prepared.noisy, prepared.sigma)  # type: ignore[arg-type]
            for name in ("current", "old")
        )
    video = 0.5 * (current.video - old.video).abs().mean(dim=2)
    per_clip = [float(video[i][free[i]].mean()) for i in range(4)]
    assert metrics["old_deviation_sample/video"] == pytest.approx(sum(per_clip) / 4, rel=1e-4)
    audio = float(0.5 * (current.audio - old.audio).abs().mean())
    assert metrics["old_deviation_sample/audio"] == pytest.approx(audio, rel=1e-4)
    assert metrics["old_deviation_sample/audio"] > 1e-4

    class Idle(Processes):
        """Beside one that has four clips and has not moved."""

        def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
            tensors[0][2] += 4

    update.processes = Idle()
    halved = update._deviation(setting.rollout, prepared)
    assert halved["old_deviation_sample/video"] == pytest.approx(sum(per_clip) / 8, rel=1e-4)
    assert halved["old_deviation_sample/audio"] == pytest.approx(audio / 2, rel=1e-4)


@pytest.mark.parametrize("video_loss_only", [False, True])
def test_probes_are_under_the_surgery_of_the_update(video_loss_only: bool) -> None:
    update = Setting().update
    update.surgery, update.video_loss_only = nullcontext(), video_loss_only
    assert update._surgery_on("video") is update.surgery
    assert (update._surgery_on("audio") is update.surgery) == (not video_loss_only)


def test_8_bit_moments_go_on_exactly_where_they_were_saved() -> None:
    pytest.importorskip("bitsandbytes")

    def fresh() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(128, 64)), torch.nn.Parameter(torch.randn(8, 8))]
        return parameters, make_optimiser(parameters, OptimiserConfig(kind="adamw8bit", learning_rate=1e-2))

    def step(number: int, parameters: list[torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimiser.step()

    parameters, optimiser = fresh()
    step(0, parameters, optimiser)
    tensors, values = flatten_optimizer(optimiser)
    assert {tuple(t.shape) for t in tensors.values() if t.dtype == torch.uint8} == {(128, 64)}  # the small one stays
    tensors, values = {k: t.clone() for k, t in tensors.items()}, json.loads(json.dumps(values))
    weights = [p.detach().clone() for p in parameters]
    step(1, parameters, optimiser)
    again, resumed = fresh()
    for parameter, weight in zip(again, weights, strict=True):
        parameter.data.copy_(weight)
    restore_optimizer(resumed, tensors, values)
    step(1, again, resumed)
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))


def test_8_bit_moments_without_their_package_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(OmniNFTError, match=r"adamw8bit needs bitsandbytes .*omninft\[quantised\]"):
        make_optimiser([torch.nn.Parameter(torch.zeros(1))], OptimiserConfig(kind="adamw8bit"))
