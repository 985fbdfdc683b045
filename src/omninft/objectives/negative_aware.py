"""The negative-aware objective: pull towards good samples, push away from bad ones, with no sampler in the loss.

DiffusionNFT (arXiv:2509.16117), in the space of clean-latent predictions as OmniNFT (arXiv:2605.12480) uses it, one
modality at a time. With x_sigma = (1 - sigma) x0 + sigma eps and v = eps - x0 a policy predicts
x0_hat = x_sigma - sigma v. The old policy's prediction, mirrored about or mixed with the current one's, gives the two
terms; the advantage shares the weight between them.

When the current policy equals the old one the loss has the same value whatever the advantages, and its gradient is
(2r - 1) times that of the positive term. The loss curve therefore says nothing about learning.

Predictions and losses are float32 and the adaptive weights are reduced in float64, whatever the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omninft.config import Factor, Frozen, Positive, PositiveFactor
from omninft.noise import Purpose, keyed_normal, noise_seed
from omninft.objectives.protocol import BranchLoss, LossWeights, ObjectiveContext, ObjectiveOptions, Predict, Round
from omninft.types import Latents, Needs, Rollout

ReferenceSpace = Literal["x0", "velocity"]

# A prediction closer to its target than this (mean absolute error) is not weighted up any further.
MIN_ERROR = 1e-5


class SigmasOptions(Frozen):
    """Which of the sampling sigmas the loss is taken at."""

    choice: Literal["first_fraction", "spread", "list"] = "first_fraction"
    """Which noise levels are trained on."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Of first_fraction: share of the schedule, its noisiest part."""
    count: Positive = 4
    """Of spread: how many, evenly spaced over the sampling schedule."""
    values: tuple[float, ...] = ()
    """Of list: the noise levels, 0..1."""

    @model_validator(mode="after")
    def _list_has_values(self) -> SigmasOptions:
        if self.choice == "list" and (not self.values or any(not 0 < s <= 1 for s in self.values)):
            raise ValueError(f"choice: list needs values in (0, 1], found {list(self.values)}")
        return self


def training_sigmas(choice: SigmasOptions, schedule: Tensor) -> list[float]:
    """The noise levels to train on, from the sampling schedule [steps + 1] (last entry 0).

    `first_fraction` takes the noisiest int(fraction * steps), as the reference code does; `spread` takes `count` evenly
    spaced ones, the noisiest among them; `list` takes its values.
    """
    levels: list[float] = schedule[:-1].tolist()
    if choice.choice == "list":
        return list(choice.values)
    if choice.choice == "first_fraction":
        return levels[: max(1, int(len(levels) * choice.fraction))]
    count = min(choice.count, len(levels))
    return [levels[round(i * len(levels) / count)] for i in range(count)]


class NegativeAwareOptions(ObjectiveOptions):
    """Settings of the objective."""

    kind: Literal["negative_aware"] = "negative_aware"
    """DiffusionNFT's loss."""
    beta: PositiveFactor = 1.0
    """How far the implicit policies lie from the old one."""
    advantage_clip: PositiveFactor = 5.0
    """The advantage at which a sample is all positive or negative."""
    detach_weight: bool = True
    """DiffusionNFT detaches the adaptive weights. OmniNFT's reference code does not: equal losses, other gradients."""
    reference_weight: Factor = 1e-4
    """Weight of the pull to the model without adapter."""
    reference_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the rounds that take the term, drawn anew in each iteration; they weigh so much more: the mean stays."""
    reference_space: ReferenceSpace = "x0"
    """What is pulled: x0 as OmniNFT's reference code, velocity as DiffusionNFT."""
    sigmas: SigmasOptions = SigmasOptions()
    """The noise levels of an iteration."""

    def build(self, context: ObjectiveContext) -> NegativeAware:
        return NegativeAware(self, context)


DEFAULT_OPTIONS = NegativeAwareOptions()


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma eps. clean, noise [B, T, C]; sigma in [0, 1], [B] or [B, T]. float32."""
    level = _per_token(sigma, clean)
    return (1 - level) * clean.float() + level * noise.float()


def predict_x0(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """x0_hat = x_sigma - sigma v. noisy, velocity [B, T, C]; sigma in [0, 1], [B] or [B, T]. float32."""
    return noisy.float() - _per_token(sigma, noisy) * velocity.float()


def _per_token(sigma: Tensor, latents: Tensor) -> Tensor:
    """sigma [B] or [B, T] as [B, 1, 1] or [B, T, 1] float32."""
    if latents.ndim != 3 or sigma.shape not in (latents.shape[:1], latents.shape[:2]):
        raise ValueError(f"sigma {tuple(sigma.shape)} does not fit latents {tuple(latents.shape)}: [B] or [B, T]")
    return sigma.float().reshape(len(latents), -1, 1)


def policy_loss(
    current_x0: Tensor,
    old_x0: Tensor,
    clean_x0: Tensor,
    advantage: Tensor,
    omega: Tensor | None = None,
    token_mask: Tensor | None = None,
    options: NegativeAwareOptions = DEFAULT_OPTIONS,
) -> Tensor:
    """Negative-aware loss of each clip (DiffusionNFT, its training objective; OmniNFT, with region weights).

        x+ = beta cur + (1 - beta) old            x- = (1 + beta) old - beta cur
        w+- = max(mean over (T, C) of |x+- - x0|, 1e-5)
        r = clamp(clamp(A, -a, a) / a / 2 + 1/2, 0, 1)
        l_i = r mean_C (x+ - x0)^2 / w+  +  (1 - r) mean_C (x- - x0)^2 / w-
        loss = a / beta * sum_i omega_i l_i / sum_i omega_i

    Args:
        current_x0: [B, T, C] prediction of the policy that is trained.
        old_x0: [B, T, C] prediction of the policy that sampled; a constant here.
        clean_x0: [B, T, C] the sampled latents; a constant here.
        advantage: [B].
        omega: [B, T] >= 0 region weights, ones by default.
        token_mask: [B, T] bool, True where a token counts (False: it was given). Masked tokens leave the loss and the
            means of w+-.
        options: beta, advantage_clip and detach_weight are read.

    Returns:
        [B] float32. 0 for a clip in which no token counts.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_shapes(current_x0, old_x0, clean_x0, advantage, omega, token_mask)
    current, old, clean = current_x0.float(), old_x0.detach().float(), clean_x0.detach().float()
    beta, clip = options.beta, options.advantage_clip
    positive = _weighted_error(beta * current + (1 - beta) * old - clean, token_mask, options.detach_weight)
    negative = _weighted_error((1 + beta) * old - beta * current - clean, token_mask, options.detach_weight)
    share = (advantage.float().clamp(-clip, clip) / clip / 2 + 0.5).clamp(0, 1)[:, None]
    weight = torch.ones_like(positive) if omega is None else omega.float()
    if token_mask is not None:
        weight = weight * token_mask
    total = weight.sum(dim=1)
    loss = (weight * (share * positive + (1 - share) * negative)).sum(dim=1)
    return clip / beta * loss / torch.where(total > 0, total, 1.0)


def _check_shapes(
    current: Tensor, old: Tensor, clean: Tensor, advantage: Tensor, omega: Tensor | None, mask: Tensor | None
) -> None:
    # Broadcasting would turn most mistakes into a loss that looks right.
    shape = current.shape
    if current.ndim != 3 or old.shape != shape or clean.shape != shape or advantage.shape != shape[:1]:
        raise ValueError(
            f"expected three [B, T, C] and advantage [B], found current {tuple(shape)}, old {tuple(old.shape)}, "
            f"clean {tuple(clean.shape)}, advantage {tuple(advantage.shape)}"
        )
    for name, weights in (("omega", omega), ("token_mask", mask)):
        if weights is not None and weights.shape != shape[:2]:
            raise ValueError(f"{name} {tuple(weights.shape)} must be [B, T] = {tuple(shape[:2])}")


def _weighted_error(error: Tensor, token_mask: Tensor | None, detach: bool) -> Tensor:
    """mean_C error^2 / w per token, w the clip's mean |error| in float64. error [B, T, C] -> [B, T] float32."""
    weight = _clip_mean(error.abs().mean(dim=2, dtype=torch.float64), token_mask).clamp(min=MIN_ERROR)
    if detach:
        weight = weight.detach()
    return error.square().mean(dim=2) / weight.float()[:, None]


def _clip_mean(per_token: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean over the tokens that count; 0 where none does. [B, T] -> [B]."""
    if token_mask is None:
        return per_token.mean(dim=1)
    kept = torch.where(token_mask, per_token, 0.0).sum(dim=1)
    return kept / token_mask.sum(dim=1).clamp(min=1)


def reference_loss(
    current_x0: Tensor,
    reference_x0: Tensor,
    sigma: Tensor,
    space: ReferenceSpace = "x0",
    token_mask: Tensor | None = None,
) -> Tensor:
    """Squared distance to the model without adapter, per clip.

    mean (x0_cur - x0_ref)^2 over tokens and channels (OmniNFT's reference code), or of the velocities
    (DiffusionNFT), which at one x_sigma differ by (x0_ref - x0_cur) / sigma. A token at sigma 0 has no velocity to
    compare and adds 0 in that space.

    Args:
        current_x0, reference_x0: [B, T, C] predictions of clean latents, also for `velocity`.
        sigma: [B] or [B, T] in [0, 1].
        space: see above.
        token_mask: [B, T] bool, True where a token counts.

    Returns:
        [B] float32.

    Raises:
        ValueError: shapes that do not fit, or an unknown space.
    """
    if space not in get_args(ReferenceSpace):
        raise ValueError(f"space is {space!r}, expected one of {get_args(ReferenceSpace)}")
    if current_x0.shape != reference_x0.shape:
        raise ValueError(f"current {tuple(current_x0.shape)} and reference {tuple(reference_x0.shape)} differ")
    level = _per_token(sigma, current_x0)
    difference = current_x0.float() - reference_x0.detach().float()
    if space == "velocity":
        difference = difference / level.masked_fill(level == 0, torch.inf)
    return _clip_mean(difference.square().mean(dim=2), token_mask)


def branch_loss(
    *,
    current_x0: Tensor,
    old_x0: Tensor,
    clean_x0: Tensor,
    reference_x0: Tensor | None,
    sigma: Tensor,
    advantage: Tensor,
    valid: Tensor,
    num_valid: float,
    omega: Tensor | None = None,
    token_mask: Tensor | None = None,
    options: NegativeAwareOptions = DEFAULT_OPTIONS,
    reference_scale: float = 1.0,
) -> BranchLoss:
    """Loss of one modality's micro-batch: sum over valid clips of (policy + reference_weight * reference) / num_valid.

    The denominator is the caller's, so that micro-batches, sigmas and processes add up to exactly the mean over the
    whole batch; the caller also weighs the two modalities (OmniNFT: equally). Tensors as in `policy_loss` and
    `reference_loss`; all by keyword, since nothing would show a swap of old and current.

    Args:
        reference_x0: [B, T, C]; may be None if options.reference_weight or reference_scale is 0, which saves its
            forward pass.
        valid: [B] bool; the others leave the loss (their gradient is zero) and must not be in `num_valid`.
        num_valid: number of valid clips of the whole batch, times the number of sigmas it is trained on.
        reference_scale: on the reference term, 0 where the round is without it, 1 / share where it stands for others.

    Raises:
        ValueError: shapes that do not fit, valid clips but num_valid <= 0, or a missing reference.
    """
    if num_valid <= 0 and bool(valid.any()):
        raise ValueError(f"num_valid is {num_valid} although the micro-batch has valid clips")
    if valid.shape != advantage.shape:
        raise ValueError(f"valid {tuple(valid.shape)} and advantage {tuple(advantage.shape)} must both be [B]")
    policy = policy_loss(current_x0, old_x0, clean_x0, advantage, omega, token_mask, options)
    if reference_x0 is not None:
        reference = reference_loss(current_x0, reference_x0, sigma, options.reference_space, token_mask)
        reference = reference_scale * reference
    elif options.reference_weight * reference_scale == 0:
        reference = torch.zeros_like(policy)
    else:
        raise ValueError("reference_x0 is missing although the reference term has a weight")
    per_clip = policy + options.reference_weight * reference
    # An all-invalid batch still gives a loss with a graph, of value and gradient 0: distributed processes stay in step.
    loss = torch.where(valid, per_clip, 0.0).sum() / (num_valid if num_valid > 0 else 1)
    return BranchLoss(loss, valid, {"loss": policy.detach(), "reference": reference.detach()})


@dataclass(frozen=True)
class PreparedNoise:
    """Clean latents under noise, and what old and reference make of them."""

    noisy: Latents
    sigma: Tensor  # [B]
    old: Latents  # velocities
    clean: Latents
    video_sigma: Tensor  # [B], or [B, Tv] where tokens are given
    token_mask: Tensor | None  # [B, Tv] bool, True where a video token counts
    old_x0: Latents
    reference_x0: Latents | None
    reference_scale: float


class NegativeAware:
    """The objective of DiffusionNFT and OmniNFT: see the functions above."""

    needs = Needs()

    def __init__(self, options: NegativeAwareOptions, context: ObjectiveContext) -> None:
        self.options, self.geometry, self.seed = options, context.geometry, context.seed
        self._num_rounds = 1

    def rounds(self, schedule: Tensor) -> tuple[Round, ...]:
        """One at each chosen sigma."""
        made = tuple(Round(n, sigma) for n, sigma in enumerate(training_sigmas(self.options.sigmas, schedule)))
        self._num_rounds = len(made)
        return made

    def reference_scale(self, round_: Round, iteration: int) -> float:
        """What the reference term of a round counts for: 0, or what makes its expectation 1. The same on every rank."""
        if self.options.reference_share == 1:
            return 1.0
        total = self._num_rounds
        taken = max(1, round(self.options.reference_share * total))
        generator = torch.Generator().manual_seed(noise_seed(self.seed, iteration, "", 0, Purpose.REFERENCE_ROUNDS))
        drawn = torch.randperm(total, generator=generator)[:taken].tolist()
        return total / taken if round_.number in drawn else 0.0

    def prepare(self, rollout: Rollout, round_: Round, iteration: int, predict: Predict) -> PreparedNoise:
        """Noise keyed by clip and round on the clean latents; given tokens stay clean, at sigma 0."""
        g, clean, given = self.geometry, rollout.latents, rollout.conditioning
        sizes = (g.video_tokens, g.video_channels), (g.audio_tokens, g.audio_channels)
        keyed = [
            keyed_normal(rollout.clip_keys, size, self.seed, iteration, purpose, round_.number)
            for size, purpose in zip(sizes, (Purpose.TRAIN_VIDEO, Purpose.TRAIN_AUDIO), strict=True)
        ]
        noise = Latents(*keyed).to(clean.video.device)
        level = torch.full((len(rollout),), round_.sigma, device=clean.video.device)
        video_level = level if given is None else level[:, None] * ~given.mask
        noisy = Latents(add_noise(clean.video, noise.video, video_level), add_noise(clean.audio, noise.audio, level))
        old = predict("old", noisy, level)
        scale = self.reference_scale(round_, iteration) if self.options.reference_weight else 0.0
        reference = predict("reference", noisy, level) if scale else None
        return PreparedNoise(
            noisy=noisy,
            sigma=level,
            old=old,
            clean=clean,
            video_sigma=video_level,
            token_mask=None if given is None else ~given.mask,
            old_x0=clean_predictions(noisy, old, video_level, level),
            reference_x0=None if reference is None else clean_predictions(noisy, reference, video_level, level),
            reference_scale=scale,
        )

    def loss(self, current: Latents, prepared: PreparedNoise, weights: LossWeights) -> tuple[BranchLoss, BranchLoss]:
        """`branch_loss` of both branches."""
        p, a = prepared, weights.advantages
        x0 = clean_predictions(p.noisy, current, p.video_sigma, p.sigma)
        video = branch_loss(
            current_x0=x0.video,
            old_x0=p.old_x0.video,
            clean_x0=p.clean.video,
            reference_x0=None if p.reference_x0 is None else p.reference_x0.video,
            sigma=p.video_sigma,
            advantage=a.video,
            valid=a.video_valid,
            num_valid=weights.num_valid[0],
            omega=weights.tokens.video,
            token_mask=p.token_mask,
            options=self.options,
            reference_scale=p.reference_scale,
        )
        audio = branch_loss(
            current_x0=x0.audio,
            old_x0=p.old_x0.audio,
            clean_x0=p.clean.audio,
            reference_x0=None if p.reference_x0 is None else p.reference_x0.audio,
            sigma=p.sigma,
            advantage=a.audio,
            valid=a.audio_valid,
            num_valid=weights.num_valid[1],
            omega=weights.tokens.audio,
            options=self.options,
            reference_scale=p.reference_scale,
        )
        return video, audio

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Nothing is carried from one iteration to the next."""
        return {}, {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Nothing to restore."""


def clean_predictions(noisy: Latents, velocity: Latents, video_sigma: Tensor, sigma: Tensor) -> Latents:
    """x0_hat of both streams."""
    return Latents(predict_x0(noisy.video, velocity.video, video_sigma), predict_x0(noisy.audio, velocity.audio, sigma))
