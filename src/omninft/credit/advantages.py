"""From scores to what each branch learns from: group advantages and modality-wise routing.

OmniNFT (Zhang et al. 2026, arXiv:2605.12480), technique 1. A reward judges the picture, the sound or both, so its
advantage goes to the branch it judges; adding everything up and giving the sum to both lets a clip's good picture
reinforce its bad sound. The baselines that do add up are here too: GDPO and one global reward.

Everything is computed in float64 and handed on as the float32 of `BranchAdvantages`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from omninft.types import (
    MODALITIES,
    ROUTES,
    BranchAdvantages,
    Component,
    Modality,
    OmniNFTError,
    RewardAdvantages,
    Route,
    ScoreTable,
)

AdvantageMethod = Literal["omninft", "gdpo", "global"]
StdScope = Literal["global", "group"]

STD_EPS = 1e-4
# Keeps (seed, group) pairs apart: no two of them share a generator while there are fewer groups than this.
SEED_STRIDE = 1_000_003

HEARD: dict[Modality, tuple[Route, ...]] = {"video": ("video", "joint"), "audio": ("audio", "joint")}


def group_advantages(values: Tensor, group_index: Tensor, std: StdScope = "global", eps: float = STD_EPS) -> Tensor:
    """Advantage of every clip over the mean of its own prompt group.

    A = (R - mean of the group) / (std + eps), over finite scores only (OmniNFT, the group-relative advantage of its
    section on routing; GRPO's with `std="group"`).

    Args:
        values: [B] scores R of one reward, any unit, NaN (or infinite) where missing.
        group_index: [B] int64, equal for the clips of one prompt; the numbers themselves do not matter.
        std: population standard deviation (ddof 0) of the raw R over all valid clips of the iteration ("global"), or
            over those of the group.
        eps: added to the standard deviation.

    Returns:
        [B] float64. 0 where the score is missing, and in a group with fewer than two valid scores or equal ones.

    Raises:
        ValueError: the shapes differ or are not [B], or `std` is unknown.
    """
    if values.ndim != 1 or values.shape != group_index.shape:
        raise ValueError(f"values {tuple(values.shape)} and group_index {tuple(group_index.shape)} must both be [B]")
    if std not in get_args(StdScope):
        raise ValueError(f"std is {std!r}, expected one of {get_args(StdScope)}")
    values = values.double()
    valid = torch.isfinite(values)
    advantages = torch.zeros_like(values)
    for group in group_index.unique():
        member = valid & (group_index == group)
        scores = values[member]
        # Equal scores are tested for, not subtracted: their mean can be off by a rounding, and a sign would follow.
        if len(scores) < 2 or scores.max() == scores.min():
            continue
        spread = (values[valid] if std == "global" else scores).std(correction=0)
        advantages[member] = (scores - scores.mean()) / (spread + eps)
    return advantages


def reward_advantages(table: ScoreTable, group_index: Tensor, std: StdScope = "global") -> RewardAdvantages:
    """Each reward's own group advantages.

    Args:
        table: scores of B clips in K components, of the whole iteration and all processes.
        group_index: [B] int64 prompt group of each clip; its device is that of the result.
        std: scope of the standard deviation, as in `group_advantages`.

    Raises:
        OmniNFTError: a component without a known route.
        ValueError: table and group_index disagree on B.
    """
    scores = _scores(table, group_index)
    columns = [group_advantages(scores[:, k], group_index, std) for k in range(scores.shape[1])]
    values = torch.stack(columns, dim=1) if columns else scores
    return RewardAdvantages(values, torch.isfinite(scores), table.components)


def global_advantages(table: ScoreTable, group_index: Tensor, std: StdScope = "global") -> RewardAdvantages:
    """The advantage of the weighted sum of the raw rewards, as one reward of route `joint` (DiffusionNFT, GRPO).

    A clip must have every score that has a weight: a sum over fewer rewards is on another scale, so it is missing.
    Arguments and errors as in `reward_advantages`.
    """
    scores = _scores(table, group_index)
    judging = [k for k, c in enumerate(table.components) if c.weight != 0]
    weights = scores.new_tensor([table.components[k].weight for k in judging])
    valid = torch.isfinite(scores[:, judging]).all(dim=1)
    if not judging:
        valid = torch.zeros_like(valid)
    total = torch.where(valid, (scores[:, judging] * weights).sum(dim=1), torch.nan)
    values = group_advantages(total, group_index, std)
    return RewardAdvantages(values[:, None], valid[:, None], (Component("sum", "joint"),))


def combine_advantages(
    advantages: RewardAdvantages,
    routed: bool = True,
    final_batch_norm: bool = False,
    weights: Mapping[Modality, Sequence[float]] | None = None,
) -> BranchAdvantages:
    """What the video and the audio branch learn from: sums of w_k A_k.

    A clip is valid for a branch if any reward that judges the branch scored it. A reward of weight 0 is only watched:
    it judges nothing, and its failures cost no clip. A routed advantage is handed on as it is whatever it adds up to;
    group-relative advantages add up to zero by construction, so a zero sum says nothing about the routing.

    Args:
        advantages: of B clips and K rewards.
        routed: a branch hears the rewards routed to it and the joint ones (OmniNFT, technique 1); else both hear all
            (GDPO).
        final_batch_norm: normalise each branch's result over its valid clips to mean 0 and population standard
            deviation 1 (GDPO's last step; off in OmniNFT's comparison).
        weights: [K] per branch, instead of the components' own.

    Returns:
        Advantages [B] float32, 0 where not valid, and the masks.
    """
    made: dict[Modality, tuple[Tensor, Tensor]] = {}
    for branch in MODALITIES:
        heard = HEARD[branch] if routed else ROUTES
        judging = [k for k, c in enumerate(advantages.components) if c.route in heard and c.weight != 0]
        total = advantages.values.new_zeros(len(advantages))
        for k in judging:
            weight = advantages.components[k].weight if weights is None else weights[branch][k]
            total += weight * advantages.values[:, k]
        valid = advantages.valid[:, judging].any(dim=1)
        if final_batch_norm:
            total = _normalised_over(total, valid)
        made[branch] = (total.float(), valid)
    (video, video_valid), (audio, audio_valid) = made["video"], made["audio"]
    return BranchAdvantages(video=video, audio=audio, video_valid=video_valid, audio_valid=audio_valid)


def route_advantages(
    table: ScoreTable,
    group_index: Tensor,
    method: AdvantageMethod,
    std: StdScope = "global",
    final_batch_norm: bool = False,
) -> BranchAdvantages:
    """From a table of scores to what each branch learns from, in one call.

    * omninft: A_video = sum of w_k A_k over rewards routed `video` or `joint`, A_audio likewise (OmniNFT, technique 1).
    * gdpo: the sum of w_k A_k over all rewards, to both branches (GDPO; "vanilla" in OmniNFT's ablation).
    * global: the advantage of the weighted sum of the raw rewards, to both (DiffusionNFT, GRPO).

    Arguments as in `reward_advantages` and `combine_advantages`.

    Raises:
        OmniNFTError: a component without a known route.
        ValueError: `method` is unknown, or table and group_index disagree on B.
    """
    if method not in get_args(AdvantageMethod):
        raise ValueError(f"method is {method!r}, expected one of {get_args(AdvantageMethod)}")
    assign = global_advantages if method == "global" else reward_advantages
    return combine_advantages(assign(table, group_index, std), method == "omninft", final_batch_norm)


def _scores(table: ScoreTable, group_index: Tensor) -> Tensor:
    """[B, K] float64 on the device of the index."""
    if len(table.values) != len(group_index):
        raise ValueError(f"{len(table.values)} clips in the table, {len(group_index)} in group_index")
    for component in table.components:
        if component.route not in ROUTES:
            raise OmniNFTError(
                f"reward component {component.name!r} has route {component.route!r}, "
                f"expected one of {', '.join(ROUTES)}"
            )
    return torch.as_tensor(table.values, dtype=torch.float64, device=group_index.device)


def advantages_of_one(advantages: RewardAdvantages, k: int, routed: bool = True) -> BranchAdvantages:
    """What the branches would learn from reward k alone, at weight 1 in the direction that its own weight has.

    With `routed`, a branch that does not hear the reward gets zeros and no valid clip.
    """
    component = advantages.components[k]
    values, valid = advantages.values[:, k].float(), advantages.valid[:, k]
    if component.weight < 0:
        values = -values
    made: dict[Modality, tuple[Tensor, Tensor]] = {}
    for branch in MODALITIES:
        hears = not routed or component.route in HEARD[branch]
        made[branch] = (values, valid) if hears else (torch.zeros_like(values), torch.zeros_like(valid))
    (video, video_valid), (audio, audio_valid) = made["video"], made["audio"]
    return BranchAdvantages(video=video, audio=audio, video_valid=video_valid, audio_valid=audio_valid)


def _normalised_over(advantage: Tensor, valid: Tensor) -> Tensor:
    """(A - mean) / (population std + 1e-4) over the valid clips, 0 elsewhere. [B] float64."""
    if not bool(valid.any()):
        return torch.zeros_like(advantage)
    kept = advantage[valid]
    return torch.where(valid, (advantage - kept.mean()) / (kept.std(correction=0) + STD_EPS), 0.0)


def advantage_to_weight(advantage: Tensor, clip: float = 5.0) -> Tensor:
    """Share r of the positive term of the negative-aware loss (DiffusionNFT, arXiv:2509.16117, its optimality r).

    r = clamp(clamp(A, -a, a) / a / 2 + 1/2, 0, 1): 0 pushes away from the clip, 1/2 is neutral, 1 pulls to it.

    Args:
        advantage: any shape, floating.
        clip: a > 0, the advantage at which r saturates.

    Returns:
        r in [0, 1], same shape and dtype.

    Raises:
        ValueError: clip is not positive.
    """
    if not clip > 0:
        raise ValueError(f"clip must be positive, found {clip}")
    return (advantage.clamp(-clip, clip) / clip / 2 + 0.5).clamp(0, 1)


def shuffle_within_groups(advantages: RewardAdvantages, group_index: Tensor, seed: int) -> RewardAdvantages:
    """The placebo: the same advantages, handed to the wrong clips of the same prompt.

    Training on it has the update sizes of the real run and none of its information. A clip's advantages and masks of
    all rewards move together, so that the conflict between the branches stays what it was.

    Args:
        advantages: [B, K].
        group_index: [B] int64. A group's permutation depends on seed, group number and group size alone, not on which
            other groups the batch holds.
        seed: any int; the caller folds the iteration into it.

    Returns:
        The advantages, permuted inside each group.
    """
    order = torch.arange(len(group_index), device=group_index.device)
    for group in group_index.unique().tolist():
        member = (group_index == group).nonzero().flatten()
        generator = torch.Generator().manual_seed((seed * SEED_STRIDE + group) % 2**63)
        order[member] = member[torch.randperm(len(member), generator=generator).to(member.device)]
    return advantages[order]


def conflict_share(advantages: BranchAdvantages) -> float:
    """Share of clips whose video and audio advantages have opposite signs (OmniNFT, diagnosis 1: about one half).

    Over the clips valid in both branches; an advantage of 0 agrees with anything. NaN if there is no such clip.
    """
    both = advantages.video_valid & advantages.audio_valid
    if not bool(both.any()):
        return float("nan")
    opposite = advantages.video.sign() * advantages.audio.sign() < 0
    return opposite[both].double().mean().item()


def zero_variance_groups(table: ScoreTable, group_index: Tensor) -> int:
    """Number of prompt groups that teach nothing: no reward of non-zero weight tells two of their clips apart.

    A reward does so when it has at least two valid scores in the group that differ. group_index: [B] int64.
    """
    scores = torch.as_tensor(table.values, dtype=torch.float64, device=group_index.device)
    judging = [k for k, c in enumerate(table.components) if c.weight != 0]
    flat = 0
    for group in group_index.unique():
        columns = [scores[group_index == group, k] for k in judging]
        distinct = [column[torch.isfinite(column)].unique().numel() for column in columns]
        flat += all(count < 2 for count in distinct)
    return flat
