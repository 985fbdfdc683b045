"""Region-wise loss reweighting: the video tokens that make sound weigh more in the video loss.

OmniNFT (Zhang et al. 2026, arXiv:2605.12480), technique 3. The old policy's video-to-audio attention (audio queries,
video keys) during the rollout says how much each video token is listened to; its column sums become token weights.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from omninft.types import OmniNFTError

RegionMethod = Literal["minmax", "zscore_sigmoid", "top_share"]

# A spread below this share of the largest score is float32 rounding of an even map, and must not be stretched to a
# full range of weights.
FLAT_RTOL = 1e-6


def region_weights(
    scores: Tensor,
    frames: int,
    method: RegionMethod = "minmax",
    *,
    strength: float = 1.5,
    share: float = 0.4,
    scale: float = 1.0,
    given: Tensor | None = None,
) -> Tensor:
    """Weights omega of the video tokens, from attention column sums s.

    * minmax: omega = 1 + lambda (s - min) / (max - min) over the clip (OmniNFT's paper), lambda = `strength`.
    * zscore_sigmoid: omega = 1 + c sigmoid(c z), z over the frame with unbiased standard deviation, c = w_max - 1,
      w_max = `strength` (OmniNFT's reference code). An even frame of an uneven clip has z = 0.
    * top_share: omega = w_max for the `share` of tokens with the highest s, else 1. Scores that tie at the boundary
      stay below it, unless they are the highest. Clipping s at its 99th percentile first, as the source does, is
      left out: it keeps the order and touches only tokens that are in the top share anyway (share >= 0.01).

    The warm-up `scale` multiplies lambda or c, wherever it stands. A clip whose scores are even gets ones.

    Args:
        scores: [B, Tv] column sums, >= 0, tokens frame-major.
        frames: latent frames; divides Tv.
        method: see above.
        strength: lambda >= 0, or w_max >= 1.
        share: of the tokens, in (0, 1).
        scale: in [0, 1], see `warmup_scale`.
        given: [B, Tv] bool, tokens that are conditioned on. They count in no statistic and get omega 0.

    Returns:
        omega [B, Tv] float32, in [1, 1 + lambda] or [1, w_max], 0 where given.

    Raises:
        ValueError: an argument out of its range.
        OmniNFTError: a score that is not finite on a token that is not given.
    """
    _check_arguments(scores, frames, method, strength, share, scale)
    free = torch.ones_like(scores, dtype=torch.bool) if given is None else ~given
    if not bool(torch.isfinite(scores[free]).all()):
        raise OmniNFTError("the attention column sums of the rollout hold values that are not finite")
    values = torch.where(free, scores.double(), 0.0)
    if method == "minmax":
        gain = strength * scale * minmax(values, free)
    elif method == "zscore_sigmoid":
        sharpness = (strength - 1) * scale
        gain = sharpness * torch.sigmoid(sharpness * _frame_zscore(values, free, frames))
    else:
        gain = (strength - 1) * scale * _in_top_share(values, free, share)
    flat = extent(values, free)[2]
    return torch.where(free, torch.where(flat, 1.0, 1 + gain), 0.0).float()


def _check_arguments(scores: Tensor, frames: int, method: str, strength: float, share: float, scale: float) -> None:
    if method not in get_args(RegionMethod):
        raise ValueError(f"method is {method!r}, expected one of {get_args(RegionMethod)}")
    if scores.ndim != 2 or frames < 1 or scores.shape[1] % frames:
        raise ValueError(f"scores {tuple(scores.shape)} must be [B, Tv] with Tv a multiple of frames = {frames}")
    least = 0.0 if method == "minmax" else 1.0
    if not strength >= least:
        raise ValueError(f"strength of {method} must be at least {least}, found {strength}")
    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1), found {share}")
    if not 0 <= scale <= 1:
        raise ValueError(f"scale must lie in [0, 1], found {scale}")


def extent(values: Tensor, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest and highest free value along the last dimension, and whether they are the same. [..., 1] each."""
    low = values.masked_fill(~free, torch.inf).amin(dim=-1, keepdim=True)
    high = values.masked_fill(~free, -torch.inf).amax(dim=-1, keepdim=True)
    return low, high, high - low <= FLAT_RTOL * torch.maximum(low.abs(), high.abs())


def minmax(values: Tensor, free: Tensor) -> Tensor:
    """Position in [0, 1] between the lowest and highest free value along the last dimension; 0 where all are even."""
    low, high, flat = extent(values, free)
    return torch.where(flat, 0.0, (values - low) / torch.where(flat, 1.0, high - low))


def _frame_zscore(values: Tensor, free: Tensor, frames: int) -> Tensor:
    """(s - mean) / unbiased std over the free tokens of each frame; 0 in an even frame. [B, Tv]."""
    by_frame, kept = values.unflatten(1, (frames, -1)), free.unflatten(1, (frames, -1))
    count = kept.sum(dim=-1, keepdim=True)
    deviation = torch.where(kept, by_frame - by_frame.sum(dim=-1, keepdim=True) / count.clamp(min=1), 0.0)
    std = (deviation.square().sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    flat = extent(by_frame, kept)[2]
    return torch.where(flat, 0.0, deviation / torch.where(flat, 1.0, std)).flatten(1)


def _in_top_share(values: Tensor, free: Tensor, share: float) -> Tensor:
    """Which tokens are among the `share` of the clip's free tokens with the highest value. [B, Tv] bool."""
    boundary = values.masked_fill(~free, torch.nan).nanquantile(1 - share, dim=1, keepdim=True)
    high = extent(values, free)[1]
    # Without the second case, a map whose highest value is shared by more tokens than `share` would have no top.
    return torch.where(boundary < high, values > boundary, values >= boundary)


def warmup_length(warmup: float, iterations: int) -> int:
    """Iterations of a warm-up: up to 1 it is a share of the run, so that short runs get there too."""
    return round(warmup * iterations) if warmup <= 1 else round(warmup)


def warmup_scale(iteration: int, warmup_iterations: int) -> float:
    """min(iteration / warmup_iterations, 1), in [0, 1]; 1 without a warm-up (0). Iterations count from 0."""
    if iteration < 0 or warmup_iterations < 0:
        raise ValueError(f"iterations must not be negative, found {iteration} and {warmup_iterations}")
    return 1.0 if warmup_iterations == 0 else min(iteration / warmup_iterations, 1.0)
