"""Flow-GRPO: a policy gradient on the steps of a stochastic sampler, with clipped likelihood ratios.

Flow-GRPO (arXiv:2505.05470) for two streams at once. The sampler draws every step but the last from a normal
distribution (`rollout/solvers.py`), so a clip's way from noise has a likelihood. For a trained step of a branch

    log r = log p_current(x' | x) - log p_rollout(x' | x)                        means over tokens and channels
    loss  = -min(r A, clip(r, 1 - e, 1 + e) A) + w_ref mean((mean_current - mean_reference)^2) / (2 std^2)

with x, x' the states before and after it, as the rollout kept them. The branches share the states, since the model
reads both streams to predict either, and nothing else: each has its own ratio, advantage and valid clips. While
current equals the rollout's policy, r = 1 and the gradient is -A times that of log p.

Log-probabilities are means: a ratio lies near 1 and a clip range is small. The rollout's policy must be the one whose
ratio is taken, so its predictions must be the model's own: guidance is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from omninft.config import Factor, Frozen, PositiveFactor, SamplingConfig
from omninft.objectives.protocol import BranchLoss, LossWeights, ObjectiveContext, ObjectiveOptions, Predict, Round
from omninft.rollout.solvers import sde_step, step_log_prob
from omninft.types import Latents, Needs, OmniNFTError, Rollout


class StepsOptions(Frozen):
    """Which of the sampling steps the loss is taken at. The last step is not drawn and never among them."""

    choice: Literal["first_fraction", "spread"] = "first_fraction"
    """Which steps are trained on."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of all steps."""


def training_steps(choice: StepsOptions, num_steps: int) -> list[int]:
    """Numbers of the trained steps, rising, of 0 .. num_steps - 2.

    max(1, int(fraction * num_steps)) of them, but at most all: `first_fraction` takes the noisiest, `spread` evenly
    spaced ones, the noisiest among them.

    Raises:
        OmniNFTError: fewer than two steps, of which none is drawn.
    """
    drawn = num_steps - 1
    if drawn < 1:
        raise OmniNFTError(
            f"flow_grpo trains on the steps that are drawn, all but the last: sampling.num_steps is {num_steps}, "
            "expected 2 or more"
        )
    count = min(max(1, int(choice.fraction * num_steps)), drawn)
    if choice.choice == "first_fraction":
        return list(range(count))
    return [i * drawn // count for i in range(count)]


class FlowGRPOOptions(ObjectiveOptions):
    """Settings of the objective."""

    kind: Literal["flow_grpo"] = "flow_grpo"
    """Flow-GRPO's loss."""
    noise_level: Annotated[float, Field(gt=0, le=1000)] = 0.7
    """How much each step of the sampler draws, a."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """Of a ratio of mean densities, e."""
    advantage_clip: PositiveFactor = 5.0
    """Largest absolute advantage."""
    reference_weight: Factor = 0.0
    """Weight of the divergence from the model without adapter."""
    steps: StepsOptions = StepsOptions()
    """The trained steps."""

    def build(self, context: ObjectiveContext) -> FlowGRPO:
        """Raises OmniNFTError: the rollouts are guided."""
        return FlowGRPO(self, context)


DEFAULT_OPTIONS = FlowGRPOOptions()


def ratio_loss(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - e, 1 + e) A) of each clip (PPO, arXiv:1707.06347, equation 7).

    Args:
        log_ratio: [B] log r.
        advantage: [B].
        clip_range: e.

    Returns:
        The loss [B] float32, and where the clipped term took its place [B] bool: there the gradient is 0.
    """
    ratio, weight = log_ratio.float().exp(), advantage.float()
    plain, clipped = ratio * weight, ratio.clamp(1 - clip_range, 1 + clip_range) * weight
    return -torch.minimum(plain, clipped), clipped < plain


def token_mean(per_token: Tensor, weights: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Weighted mean over the tokens that count; 0 where none does.

    Args:
        per_token: [B, T].
        weights: [B, T] >= 0, ones by default.
        mask: [B, T] bool, True where a token counts.

    Returns:
        [B] float32.
    """
    weight = torch.ones_like(per_token) if weights is None else weights.float()
    if mask is not None:
        weight, per_token = weight * mask, torch.where(mask, per_token, 0.0)
    total = weight.sum(dim=1)
    return (weight * per_token).sum(dim=1) / torch.where(total > 0, total, 1.0)


def branch_loss(
    *,
    mean: Tensor,
    std: Tensor,
    after: Tensor,
    rollout_log_prob: Tensor,
    reference_mean: Tensor | None,
    advantage: Tensor,
    valid: Tensor,
    num_valid: float,
    token_weights: Tensor | None = None,
    token_mask: Tensor | None = None,
    options: FlowGRPOOptions = DEFAULT_OPTIONS,
) -> BranchLoss:
    """Loss of one modality's micro-batch at one step: sum over valid clips of their losses / num_valid.

    Token weights multiply the tokens' shares in log r, normalised by their sum: what weighs more decides the ratio,
    and equal weights change nothing. The reference term has none.

    Args:
        mean: [B, T, C] of the step under the current policy.
        std: [B, 1, 1] of the step.
        after: [B, T, C] the state it led to; a constant here.
        rollout_log_prob: [B, T] of the policy that drew it; a constant here.
        reference_mean: [B, T, C]; may be None if options.reference_weight is 0, which saves its forward pass.
        advantage: [B].
        valid: [B] bool; the others leave the loss (their gradient is zero) and must not be in `num_valid`.
        num_valid: number of valid clips of the whole batch, times the number of steps it is trained on.
        token_weights: [B, T] >= 0.
        token_mask: [B, T] bool, True where a token counts (False: it was given).

    Raises:
        ValueError: shapes that do not fit, valid clips but num_valid <= 0, or a missing reference.
    """
    if num_valid <= 0 and bool(valid.any()):
        raise ValueError(f"num_valid is {num_valid} although the micro-batch has valid clips")
    if mean.shape != after.shape or rollout_log_prob.shape != mean.shape[:2] or advantage.shape != valid.shape:
        raise ValueError(
            f"expected mean and after [B, T, C], log-probabilities [B, T], advantage and valid [B], found "
            f"{tuple(mean.shape)}, {tuple(after.shape)}, {tuple(rollout_log_prob.shape)}, {tuple(advantage.shape)} and "
            f"{tuple(valid.shape)}"
        )
    change = step_log_prob(after.detach(), mean, std) - rollout_log_prob.detach()
    log_ratio = token_mean(change, token_weights, token_mask)
    clip = options.advantage_clip
    # An advantage that is not valid may be anything, and would spoil the gradient through the choice below.
    policy, clipped = ratio_loss(log_ratio, torch.where(valid, advantage, 0.0).clamp(-clip, clip), options.clip_range)
    parts = {"loss": policy.detach(), "ratio": log_ratio.detach().exp(), "clipped": clipped.float()}
    per_clip = policy
    if options.reference_weight:
        if reference_mean is None:
            raise ValueError("reference_mean is missing although the reference term has a weight")
        distance = ((mean - reference_mean.detach()) / std).square().mean(dim=2) / 2
        reference = token_mean(distance, None, token_mask)
        per_clip = policy + options.reference_weight * reference
        parts["reference"] = reference.detach()
    # An all-invalid batch still gives a loss with a graph, of value and gradient 0: distributed processes stay in step.
    loss = torch.where(valid, per_clip, 0.0).sum() / (num_valid if num_valid > 0 else 1)
    return BranchLoss(loss, valid, parts)


@dataclass(frozen=True)
class PreparedStep:
    """One step of the rollout's way, and what the reference makes of it."""

    noisy: Latents  # states before it
    sigma: Tensor  # [B]
    old: Latents | None
    after: Latents  # states after it
    after_sigma: Tensor  # [B]
    video_log_prob: Tensor  # [B, Tv] under the policy that drew it
    audio_log_prob: Tensor  # [B, Ta]
    token_mask: Tensor | None  # [B, Tv] bool, True where a video token counts
    reference: Latents | None  # velocities


class FlowGRPO:
    """The objective of Flow-GRPO: see the functions above."""

    def __init__(self, options: FlowGRPOOptions, context: ObjectiveContext) -> None:
        require_unguided(context.sampling)
        self.options = options
        self.needs = Needs(solver="sde", noise_level=options.noise_level, trajectory=True)

    def rounds(self, schedule: Tensor) -> tuple[Round, ...]:
        """One at each trained step. Raises OmniNFTError: a schedule of one step."""
        steps = training_steps(self.options.steps, len(schedule) - 1)
        return tuple(Round(n, float(schedule[step]), step) for n, step in enumerate(steps))

    def prepare(self, rollout: Rollout, round_: Round, iteration: int, predict: Predict) -> PreparedStep:
        """The states around the step, from the rollout.

        Raises:
            OmniNFTError: the rollout kept no trajectory, or did not draw this step.
        """
        way, step = rollout.trajectory, round_.step
        if way is None or step is None:
            raise OmniNFTError(
                "flow_grpo learns from the states that the sampler went through, and this rollout kept none; sample "
                'it with the objective\'s needs: Needs(solver="sde", noise_level=..., trajectory=True)'
            )
        if not bool(torch.isfinite(way.video_log_prob[:, step]).all()):
            raise OmniNFTError(
                f"step {step} of this rollout has no finite likelihood to learn from: it was not drawn, or the model's "
                "predictions are not finite"
            )
        noisy, sigma = Latents(way.video[:, step], way.audio[:, step]), way.sigmas[:, step]
        given = rollout.conditioning
        return PreparedStep(
            noisy=noisy,
            sigma=sigma,
            old=None,
            after=Latents(way.video[:, step + 1], way.audio[:, step + 1]),
            after_sigma=way.sigmas[:, step + 1],
            video_log_prob=way.video_log_prob[:, step],
            audio_log_prob=way.audio_log_prob[:, step],
            token_mask=None if given is None else ~given.mask,
            reference=predict("reference", noisy, sigma) if self.options.reference_weight else None,
        )

    def loss(self, current: Latents, prepared: PreparedStep, weights: LossWeights) -> tuple[BranchLoss, BranchLoss]:
        """`branch_loss` of both branches."""
        p, a = prepared, weights.advantages
        (video_mean, std), (audio_mean, _) = self._steps(current, p)
        reference = None if p.reference is None else self._steps(p.reference, p)
        video = branch_loss(
            mean=video_mean,
            std=std,
            after=p.after.video,
            rollout_log_prob=p.video_log_prob,
            reference_mean=None if reference is None else reference[0][0],
            advantage=a.video,
            valid=a.video_valid,
            num_valid=weights.num_valid[0],
            token_weights=weights.tokens.video,
            token_mask=p.token_mask,
            options=self.options,
        )
        audio = branch_loss(
            mean=audio_mean,
            std=std,
            after=p.after.audio,
            rollout_log_prob=p.audio_log_prob,
            reference_mean=None if reference is None else reference[1][0],
            advantage=a.audio,
            valid=a.audio_valid,
            num_valid=weights.num_valid[1],
            token_weights=weights.tokens.audio,
            options=self.options,
        )
        return video, audio

    def _steps(self, velocity: Latents, p: PreparedStep) -> list[tuple[Tensor, Tensor]]:
        """Mean and std of the step in both streams, by way of x0 as in the sampler."""
        sigma, after = p.sigma[:, None, None], p.after_sigma[:, None, None]
        pairs = (p.noisy.video, velocity.video), (p.noisy.audio, velocity.audio)
        return [sde_step(x, x - sigma * v, sigma, after, self.options.noise_level) for x, v in pairs]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Nothing is carried from one iteration to the next."""
        return {}, {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Nothing to restore."""


def require_unguided(sampling: SamplingConfig) -> None:
    """Refuse guided rollouts: what draws their steps is not the policy whose ratio is taken.

    Raises:
        OmniNFTError: with the keys, what was found and what was expected.
    """
    off = {"text": 1.0, "stg": 0.0, "modality": 1.0}
    found = [
        f"sampling.{stream}_guidance.{name} is {value:g}, expected {neutral:g}"
        for stream in ("video", "audio")
        for name, neutral in off.items()
        if (value := getattr(getattr(sampling, f"{stream}_guidance"), name)) != neutral
    ]
    if found:
        raise OmniNFTError(
            "flow_grpo takes likelihood ratios of the model's own steps, so its rollouts must be unguided: "
            + "; ".join(found)
        )
