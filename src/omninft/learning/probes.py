"""What an update measures beside its losses: gradients of one branch or one reward alone, and how far it moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from omninft.distributed import Processes
from omninft.types import MODALITIES, Latents, Modality, RewardGradients

Gradients = list[Tensor]  # one for each trained parameter, in their order


def gradients_of(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Gradients:
    """Gradients of a loss whose graph stays; zeros where it does not reach. Nothing is added to `.grad`."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def norms_by_stream(
    gradients: Iterable[Tensor], names: Iterable[str], stream_of: Callable[[str], Modality]
) -> dict[Modality, float]:
    """Norm of the gradients in each stream's modules."""
    squares = dict.fromkeys(MODALITIES, 0.0)
    each = torch.stack([gradient.square().sum() for gradient in gradients])
    for name, square in zip(names, each.tolist(), strict=True):  # one wait for the device
        squares[stream_of(name)] += square
    return {stream: square**0.5 for stream, square in squares.items()}


def gram(vectors: Sequence[Gradients | None]) -> Tensor:
    """Inner products [K, K] float64 of gradients; None stands for zeros."""
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for k, a in enumerate(vectors):
        for m, b in enumerate(vectors[: k + 1]):
            if a is not None and b is not None:
                pairs = (torch.dot(x.flatten().double(), y.flatten().double()) for x, y in zip(a, b, strict=True))
                products[k, m] = products[m, k] = float(sum(pairs))
    return products


class RewardProbe:
    """Sums of each reward's own gradient of the video and of the audio loss, over micro-batches and processes."""

    def __init__(self, num_rewards: int, branch_shares: tuple[float, float]) -> None:
        self.branch_shares = branch_shares  # of the video and the audio loss in the trained one
        self._sums: list[list[Gradients | None]] = [[None, None] for _ in range(num_rewards)]

    def add(self, k: int, branch: int, gradients: Gradients) -> None:
        """More of reward k's gradient of the video (0) or the audio (1) loss."""
        before = self._sums[k][branch]
        if before is None:
            self._sums[k][branch] = [g.detach().clone() for g in gradients]
        else:
            torch._foreach_add_(before, gradients)

    def result(self, processes: Processes) -> RewardGradients:
        """Inner products of what was added in all processes; each must have added the same pairs."""
        processes.sum_([g for one in self._sums for gradients in one if gradients is not None for g in gradients])
        video, audio = ([one[branch] for one in self._sums] for branch in (0, 1))
        w_video, w_audio = self.branch_shares
        both: list[Gradients | None] = []
        for v, a in zip(video, audio, strict=True):
            parts = [[w * x for x in g] for g, w in ((v, w_video), (a, w_audio)) if g is not None]
            both.append([sum(pair) for pair in zip(*parts, strict=True)] if parts else None)  # type: ignore[misc]
        return RewardGradients(gram(video), gram(audio), gram(both))


def deviation(current: Latents, old: Latents, sigma: Tensor, free: Tensor | None) -> tuple[float, float]:
    """Sums over clips of mean |x0_cur - x0_old| = sigma |v_cur - v_old|, video and audio.

    Args:
        current, old: velocities at the same noisy latents.
        sigma: [B].
        free: [B, Tv] bool, video tokens that count; None: all.
    """
    video, audio = (
        (c.float() - o.float()).abs().mean(dim=2) * sigma[:, None]
        for c, o in ((current.video, old.video), (current.audio, old.audio))
    )
    if free is not None:
        clips = torch.where(free, video, 0.0).sum(dim=1) / free.sum(dim=1).clamp(min=1)
    else:
        clips = video.mean(dim=1)
    return float(clips.sum()), float(audio.mean(dim=1).sum())
