"""MARBLE: reward weights that the rewards' own gradients settle among themselves.

MARBLE (Zhao et al. 2026, arXiv:2605.06507), multiple-gradient descent for DiffusionNFT: each reward keeps its own
advantages and has its own gradient g_k; the update follows the shortest vector among the convex combinations of the
*normalised* gradients (their min-norm point), which has the same non-negative inner product with all that take part.

    gamma* = argmin over the simplex of | sum_k gamma_k g_k / |g_k| |^2
    weights c_k = C sign(w_k) share_k,    share_k = (gamma_k / |g_k|) / sum_j gamma_j / |g_j|,    C = sum_k |w_k|

The loss is affine in the advantage, so sum_k c_k A_k in the one backward of the update stands for the sum of the
gradients (exactly where |A| stays below `advantage_clip`; see `docs/methods/marble.md`), and the shares, smoothed, may
be used for several iterations until the next probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from omninft.config import Positive
from omninft.credit.advantages import combine_advantages
from omninft.credit.combine import GroupCredit, GroupCreditOptions
from omninft.credit.protocol import CreditContext
from omninft.types import MODALITIES, BranchAdvantages, Component, RewardAdvantages, RewardGradients

# A gradient this much shorter than the longest is the float32 rounding of none, and has no direction.
ZERO_RTOL = 1e-6
# Makes the solution unique: among weights that are equally good the most even ones.
RIDGE = 1e-12
# Below RIDGE, so that ties are settled, and above the rounding of inner products of unit vectors.
TOLERANCE = 1e-14


def min_norm_weights(gram: Tensor) -> Tensor:
    """Weights gamma on the simplex for which | sum_k gamma_k g_k / |g_k| | is least (MARBLE; MGDA's min-norm point).

    An active-set method: the least norm over the affine hull of the active gradients is a linear system; on the way
    to it, those that would get a negative weight leave; of those outside, the one that shortens the most comes in.

    Args:
        gram: [K, K] inner products of the gradients, K >= 1.

    Returns:
        [K] float64 >= 0, adding up to 1. 0 for a reward without gradient; if none has one, 1 / K each. Of equally good
        weights the most even.

    Raises:
        ValueError: `gram` is not square, empty, or not finite.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram) or not bool(torch.isfinite(gram).all()):
        raise ValueError(f"gram must be finite and [K, K] with K >= 1, found {tuple(gram.shape)}")
    gram = gram.detach().double().cpu()
    there = _there(gram)
    count = int(there.sum())
    if not count:
        return torch.full_like(gram[0], 1 / len(gram))
    cosines = _cosines(gram, there) + RIDGE * torch.eye(count, dtype=torch.float64)
    gamma = torch.zeros_like(gram[0])
    gamma[there] = _least_norm(cosines)
    return gamma


def _there(gram: Tensor) -> Tensor:
    """[K] bool, which gradients are not zero."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    return norms > ZERO_RTOL * norms.max()


def _cosines(gram: Tensor, there: Tensor) -> Tensor:
    """Inner products of the normalised gradients that are there."""
    kept = gram[there][:, there]
    norms = kept.diagonal().sqrt()
    return kept / norms[:, None] / norms[None]


def _least_norm(products: Tensor) -> Tensor:
    """The point of the simplex that minimises x^T products x; products [K, K] positive definite."""
    size = len(products)
    point = torch.full((size,), 1 / size, dtype=torch.float64)
    active = torch.ones(size, dtype=torch.bool)
    best, value = point, torch.inf
    while True:
        point, active = _to_the_affine_least(products, point, active)
        slopes = products @ point
        now = float(point @ slopes)
        if now >= value:  # rounding: nothing is gained any more
            return best
        best, value = point, now
        entering = int(slopes.masked_fill(active, torch.inf).argmin())
        if bool(active.all()) or slopes[entering] >= now - TOLERANCE:
            return best / best.sum()
        active = active.clone()
        active[entering] = True


def _to_the_affine_least(products: Tensor, point: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """From a point of the simplex to the least one over the active face, dropping what would become negative."""
    while True:
        rows = active.nonzero().flatten()
        solved = torch.linalg.solve(products[rows][:, rows], torch.ones(len(rows), dtype=torch.float64))
        target = torch.zeros_like(point)
        target[rows] = solved / solved.sum()
        if bool((target[rows] > 0).all()):
            return target, active
        step = point - target
        falling = active & (target <= 0)
        ratios = torch.where(falling, point / torch.where(step > 0, step, 1.0), torch.inf)
        point = point - float(ratios.min()) * step
        active = active & (ratios > ratios.min())
        point = torch.where(active, point, 0.0)


@dataclass(frozen=True)
class Balance:
    """What a probe says about the rewards of one loss."""

    gamma: Tensor  # [K] float64, weights of the normalised gradients
    shares: Tensor  # [K] float64, weights of the rewards, which add up to 1
    min_norm: float  # of the combined normalised gradients, in [0, 1]; 0: no direction helps all rewards


def balance(gram: Tensor, heard: Tensor) -> Balance | None:
    """The min-norm point as shares of the reward weights, gamma_k / |g_k| over their sum.

    Args:
        gram: [K, K] inner products of the rewards' gradients.
        heard: [K] bool; the others get 0, whatever their gradient.

    Returns:
        None if no reward that is heard has a gradient: there is nothing to balance.
    """
    gram = gram.detach().double().cpu()
    heard = heard.cpu()
    gram = torch.where(heard[:, None] & heard[None], gram, 0.0)
    there = _there(gram)
    if not bool(there.any()):
        return None
    gamma = min_norm_weights(gram)
    scaled = torch.where(there, gamma / gram.diagonal().clamp(min=0).sqrt(), 0.0)
    squared = float(gamma[there] @ _cosines(gram, there) @ gamma[there])
    return Balance(gamma, scaled / scaled.sum(), max(0.0, squared) ** 0.5)


def smoothed(before: Tensor | None, now: Tensor, rho: float) -> Tensor:
    """rho before + (1 - rho) now; the first is taken as it is."""
    return now if before is None else rho * before + (1 - rho) * now


def reward_weights(shares: Tensor, prior: Sequence[float]) -> list[float]:
    """Weights with the prior's signs whose absolute values add up to the prior's, dealt out by `shares` [K]."""
    total = sum(abs(w) for w in prior)
    return [total * float(s) * ((w > 0) - (w < 0)) for s, w in zip(shares, prior, strict=True)]


def teaches(advantages: RewardAdvantages) -> Tensor:
    """[K] bool: rewards that have a weight and tell any two clips apart.

    Away from the old policy a reward without advantages still has a gradient, the pull back to old; it must not take
    part in the balance.
    """
    weighed = torch.tensor([c.weight != 0 for c in advantages.components])
    return weighed & (advantages.values != 0).any(dim=0).cpu()


class MarbleOptions(GroupCreditOptions):
    """Options of MARBLE."""

    kind: Literal["marble"] = "marble"
    """MARBLE."""
    probe_every: Positive = 1
    """Iterations between measurements of the gradients; 1 is the exact mode."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """What is kept of the shares at a probe, rho."""
    routed: bool = False
    """False: every reward to both branches, as published; True: by its route."""

    def build(self, context: CreditContext) -> MarbleCredit:
        return MarbleCredit(self, context)


class MarbleCredit(GroupCredit):
    """One set of reward weights, from the gradients of the whole loss: see the module's text."""

    options: MarbleOptions

    def __init__(self, options: MarbleOptions, context: CreditContext) -> None:
        super().__init__(options, context)
        self.routed = options.routed
        self.shares: Tensor | None = None  # [K] float64; None before the first probe

    def probes(self, iteration: int) -> bool:
        """Every `probe_every` iterations."""
        return iteration % self.options.probe_every == 0

    def combine(
        self, advantages: RewardAdvantages, gradients: RewardGradients | None, iteration: int
    ) -> BranchAdvantages:
        """Sums weighted by the shares, which `gradients` renew; by the recipe's own weights before the first probe."""
        if gradients is not None:
            found = balance(gradients.both, teaches(advantages))
            if found is not None:
                self.shares = smoothed(self.shares, found.shares, self.options.smoothing)
                self._metrics["marble/min_norm"] = found.min_norm
        weights = self._weights(advantages.components)
        named = zip(advantages.components, weights, strict=True)
        self._metrics |= {f"marble/weight/{component.name}": weight for component, weight in named}
        return combine_advantages(advantages, self.routed, weights=dict.fromkeys(MODALITIES, weights))

    def _weights(self, components: Sequence[Component]) -> list[float]:
        prior = [component.weight for component in components]
        return prior if self.shares is None else reward_weights(self.shares, prior)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The shares."""
        return {} if self.shares is None else {"shares": self.shares}, {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """As before the checkpoint."""
        self.shares = tensors["shares"].clone() if "shares" in tensors else None
