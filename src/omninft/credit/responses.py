"""Adaptive Reward Routing (ARR, 2026): tokens, blocks and rewards weighed by what the streams do to each other.

The response of a token is the norm of what the other stream's attention writes to it, before the gate: |o_a2v,i| of a
video token, |o_v2a,i| of an audio token, in the rollout of the old policy. Every iteration anew, it says

* which tokens weigh more, in both losses:       1 + (lambda_max - 1) Norm(mean over blocks and steps),
* how much gradient crosses at a block:          1 - alpha_l,  alpha_l = (1 - delta_l)^(1 / tau),
                                                 delta_l = min-max over blocks of the mean response,

and, after a warm-up, the reward weights of a branch m are (1 - kappa) prior + kappa C_m gamma_m, with gamma_m of MARBLE
from the gradients of that branch's loss, smoothed, and C_m the sum of the branch's absolute prior weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omninft.config import Frozen, Positive, PositiveFactor, Share, Warmup
from omninft.credit.advantages import HEARD, combine_advantages
from omninft.credit.combine import AdvantageCredit, AdvantageCreditOptions
from omninft.credit.marble import balance, reward_weights, smoothed, teaches
from omninft.credit.protocol import CreditContext, SurgeryPlan
from omninft.credit.regions import extent, minmax, warmup_length
from omninft.types import (
    MODALITIES,
    ROUTES,
    BranchAdvantages,
    Component,
    GradientScales,
    Modality,
    Needs,
    OmniNFTError,
    Recording,
    RewardAdvantages,
    RewardGradients,
    Rollout,
    TokenWeights,
)


def response_weights(
    responses: Tensor, frames: int, largest: float, clip: tuple[float, float], given: Tensor | None = None
) -> Tensor:
    """Token weights 1 + (lambda_max - 1) Norm(d), d the mean response over blocks (ARR, token level).

    Norm clips d at two quantiles and takes its position between them, in [0, 1]; where d is even it is 0.

    Args:
        responses: [B, blocks, T] >= 0, tokens frame-major.
        frames: parts that the tokens are normalised in, each by itself: latent frames of video; 1 of audio.
        largest: lambda_max >= 1.
        clip: quantiles 0 <= low < high <= 1.
        given: [B, T] bool, tokens that are conditioned on. They count in no statistic and get weight 0.

    Returns:
        [B, T] float32 in [1, lambda_max], 0 where given.

    Raises:
        ValueError: shapes that do not fit.
        OmniNFTError: a response that is not finite on a token that is not given.
    """
    if responses.ndim != 3 or frames < 1 or responses.shape[2] % frames:
        raise ValueError(f"responses {tuple(responses.shape)} must be [B, blocks, T], T a multiple of {frames}")
    mean = responses.double().mean(dim=1)
    free = torch.ones_like(mean, dtype=torch.bool) if given is None else ~given
    _require_finite(mean, free)
    values = torch.where(free, mean, 0.0).unflatten(1, (frames, -1))
    kept = free.unflatten(1, (frames, -1))
    known = values.masked_fill(~kept, torch.nan)
    low, high = (known.nanquantile(q, dim=-1, keepdim=True) for q in clip)
    # A part whose tokens are all given has no quantiles, and no weights to get.
    clipped = torch.where(kept, torch.minimum(torch.maximum(values, low), high), 0.0)
    gain = (largest - 1) * minmax(clipped, kept).flatten(1)
    return torch.where(free, 1 + gain, 0.0).float()


def block_sums(responses: Tensor, given: Tensor | None = None) -> Tensor:
    """Sum of the responses [B, blocks, T] over clips and tokens that are not given, and last their number.

    Returns [blocks + 1] float64. Sums of several processes add up; the first over the last is the mean.
    """
    free = torch.ones_like(responses[:, 0], dtype=torch.bool) if given is None else ~given
    _require_finite(responses.mean(dim=1), free)
    kept = torch.where(free[:, None], responses.double(), 0.0)
    return torch.cat([kept.sum(dim=(0, 2)), free.sum()[None].double()])


def detach_scales(means: Tensor, temperature: float) -> tuple[float, ...]:
    """Gradient scale of every block, 1 - (1 - delta)^(1 / tau), delta the min-max over blocks (ARR, layer level).

    Args:
        means: [blocks] mean response. The block with the least lets nothing cross, the one with the most everything.
        temperature: tau > 0; above 1 cuts more, below 1 less.

    Returns:
        Factors in [0, 1]; 1 everywhere if the blocks are even, which says nothing about any of them.
    """
    everything = torch.ones_like(means, dtype=torch.bool)
    if bool(extent(means, everything)[2]):
        return (1.0,) * len(means)
    detached = (1 - minmax(means, everything)) ** (1 / temperature)
    return tuple((1 - detached).tolist())


def _require_finite(values: Tensor, free: Tensor) -> None:
    if not bool(torch.isfinite(values[free]).all()):
        raise OmniNFTError("the cross-modal responses of the rollout hold values that are not finite")


class TokenOptions(Frozen):
    """Weights of tokens, in both losses."""

    enabled: bool = True
    """Weigh tokens by their responses."""
    largest: Annotated[float, Field(ge=1, le=1e6)] = 2.0
    """Largest weight of a token, lambda_max."""
    clip: tuple[Share, Share] = (0.05, 0.95)
    """Quantiles at which responses are cut."""

    @model_validator(mode="after")
    def _clip_is_ordered(self) -> TokenOptions:
        if self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip must rise, found {list(self.clip)}, expected something like [0.05, 0.95]")
        return self


class LayerOptions(Frozen):
    """How much gradient crosses at a block, both ways."""

    enabled: bool = True
    """Scale gradients by block."""
    temperature: PositiveFactor = 1.0
    """Of the softmax over blocks, tau."""


class RewardOptions(Frozen):
    """Reward weights of each branch."""

    enabled: bool = True
    """Weigh rewards by their gradients."""
    warmup: Warmup = 0.1
    """Share of the run with the recipe's weights; above 1: iterations."""
    kappa: Share = 0.5
    """How far from the recipe's weights to the balanced ones."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """What is kept of gamma at a probe, rho."""
    probe_every: Positive = 1
    """Iterations between measurements of the gradients."""


class ResponseOptions(AdvantageCreditOptions):
    """Options of ARR."""

    kind: Literal["arr"] = "arr"
    """ARR."""
    routed: bool = True
    """A branch hears the rewards that judge it; False: every reward to both."""
    window: tuple[Share, Share] = (0.5, 0.9)
    """Shares of the denoising steps in which responses are recorded, from and to."""
    tokens: TokenOptions = TokenOptions()
    """Token weights."""
    layers: LayerOptions = LayerOptions()
    """Gradient scales of blocks."""
    rewards: RewardOptions = RewardOptions()
    """Weights of the rewards."""

    @model_validator(mode="after")
    def _window_is_ordered(self) -> ResponseOptions:
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window must rise, found {list(self.window)}, expected something like [0.5, 0.9]")
        return self

    def build(self, context: CreditContext) -> ResponseCredit:
        return ResponseCredit(self, context)


class ResponseCredit(AdvantageCredit):
    """Tokens, blocks and rewards weighed anew in every iteration: see the module's text."""

    options: ResponseOptions

    def __init__(self, options: ResponseOptions, context: CreditContext) -> None:
        super().__init__(options, context)
        self.routed = options.routed
        self.gamma: dict[Modality, Tensor] = {}  # [K] float64 each, once there was a probe

    @property
    def needs(self) -> Needs:
        wanted = self.options.tokens.enabled or self.options.layers.enabled
        return Needs(recordings=(Recording("responses", self.options.window),) if wanted else ())

    @property
    def surgery(self) -> SurgeryPlan | None:
        return SurgeryPlan("projection") if self.options.layers.enabled else None

    def probes(self, iteration: int) -> bool:
        """Every `probe_every` iterations after the warm-up."""
        rewards = self.options.rewards
        since = iteration - warmup_length(rewards.warmup, self.context.iterations)
        return rewards.enabled and rewards.kappa > 0 and since >= 0 and since % rewards.probe_every == 0

    def combine(
        self, advantages: RewardAdvantages, gradients: RewardGradients | None, iteration: int
    ) -> BranchAdvantages:
        """Sums by the branches' own weights, which `gradients` renew."""
        weights = {}
        for branch in MODALITIES:
            heard = self._heard(advantages, branch)
            if gradients is not None:
                gram = gradients.video if branch == "video" else gradients.audio
                found = balance(gram, heard & teaches(advantages))
                if found is not None:
                    before = self.gamma.get(branch)
                    self.gamma[branch] = smoothed(before, found.shares, self.options.rewards.smoothing)
                    self._metrics[f"arr/min_norm/{branch}"] = found.min_norm
            weights[branch] = self._weights(advantages.components, heard, branch)
            for component, weight, counts in zip(advantages.components, weights[branch], heard, strict=True):
                if counts:
                    self._metrics[f"arr/weight/{branch}/{component.name}"] = weight
        return combine_advantages(advantages, self.routed, weights=weights)

    def _heard(self, advantages: RewardAdvantages, branch: Modality) -> Tensor:
        """[K] bool."""
        heard = HEARD[branch] if self.routed else ROUTES
        return torch.tensor([c.route in heard and c.weight != 0 for c in advantages.components])

    def _weights(self, components: tuple[Component, ...], heard: Tensor, branch: Modality) -> list[float]:
        """(1 - kappa) prior + kappa C gamma; the prior before the first probe."""
        prior = [c.weight if counts else 0.0 for c, counts in zip(components, heard, strict=True)]
        if branch not in self.gamma:
            return prior
        kappa, balanced = self.options.rewards.kappa, reward_weights(self.gamma[branch], prior)
        return [(1 - kappa) * p + kappa * b for p, b in zip(prior, balanced, strict=True)]

    def weigh(self, rollout: Rollout, iteration: int) -> TokenWeights:
        """Weights of both streams' tokens from their responses; video frame by frame, audio over the clip."""
        tokens = self.options.tokens
        if not tokens.enabled:
            return TokenWeights()
        frames, recorded = self.context.latent_frames, rollout.recorded
        weights = TokenWeights(
            response_weights(recorded["a2v_responses"], frames, tokens.largest, tokens.clip, _given(rollout)),
            response_weights(recorded["v2a_responses"], 1, tokens.largest, tokens.clip),
        )
        for branch, made in zip(MODALITIES, (weights.video, weights.audio), strict=True):
            if made is not None:
                self._metrics[f"arr/token_weight/{branch}"] = float(made[made > 0].mean())
        return weights

    def gradient_scales(self, rollout: Rollout) -> GradientScales | None:
        """Factors from the mean responses over the clips of all processes; None without surgery."""
        if not self.options.layers.enabled:
            return None
        sums = (
            block_sums(rollout.recorded["a2v_responses"], _given(rollout)),
            block_sums(rollout.recorded["v2a_responses"]),
        )
        self.context.processes.sum_(sums)
        made = [detach_scales(s[:-1] / s[-1], self.options.layers.temperature) for s in sums]
        for direction, scales in zip(("a2v", "v2a"), made, strict=True):
            self._metrics[f"arr/gradient_scale/{direction}"] = sum(scales) / len(scales)
        return GradientScales(*made)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Gamma of both branches."""
        return {f"gamma_{branch}": gamma for branch, gamma in self.gamma.items()}, {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """As before the checkpoint."""
        found: dict[Modality, Tensor | None] = {branch: tensors.get(f"gamma_{branch}") for branch in MODALITIES}
        self.gamma = {branch: gamma.clone() for branch, gamma in found.items() if gamma is not None}


def _given(rollout: Rollout) -> Tensor | None:
    return None if rollout.conditioning is None else rollout.conditioning.mask
