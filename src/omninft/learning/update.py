"""One iteration's training: micro-batches, backwards, checks, steps.

What is learnt is the objective's matter and who learns it the credit's; here, old and reference predict first, without
a graph; then current goes forward *and* backward inside its own adapter context. Losses are divided by the number of
valid clips of the whole iteration, so that micro-batches, processes and, with one step an iteration, sigmas add up to
the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omninft.config import OptimiserConfig
from omninft.distributed import Processes
from omninft.learning.probes import RewardProbe, deviation, gradients_of, norms_by_stream
from omninft.models.protocol import AdapterName, JointPolicy
from omninft.objectives.protocol import BranchLoss, LossWeights, Objective, Prepared, Round
from omninft.types import (
    MODALITIES,
    BranchAdvantages,
    Geometry,
    Latents,
    OmniNFTError,
    RewardGradients,
    Rollout,
    TokenWeights,
)

PROBE_EVERY = 10  # iterations between measurements of each loss's own gradient; costs two backwards of one micro-batch


@dataclass(frozen=True)
class TrainingBatch:
    """All local clips of an iteration, with the credit each is given."""

    rollout: Rollout
    advantages: BranchAdvantages  # [B]
    tokens: TokenWeights
    num_valid: tuple[int, int]  # valid clips of the whole iteration, video and audio


class PolicyUpdate:
    """Optimiser of the current policy under an objective.

    Args:
        policy: its trainables are trained.
        geometry: of the clips.
        objective: says at which noise levels, and what the loss is.
        optimiser: AdamW's settings, micro-batches, and how often it steps.
        schedule: [S + 1] float32, the sampling sigmas.
        surgery: active during backwards, or None.
        video_loss_only: surgery acts on the video loss alone, at the price of a second backward.
    """

    def __init__(
        self,
        policy: JointPolicy,
        geometry: Geometry,
        objective: Objective,
        optimiser: OptimiserConfig,
        schedule: Tensor,
        processes: Processes,
        surgery: AbstractContextManager[object] | None = None,
        video_loss_only: bool = False,
    ) -> None:
        self.policy, self.geometry, self.objective, self.settings = policy, geometry, objective, optimiser
        self.rounds: tuple[Round, ...] = objective.rounds(schedule)
        self.processes, self.surgery, self.video_loss_only = processes, surgery, video_loss_only
        self.named = policy.trainables.named_parameters()
        self.parameters = [p for _, p in self.named]
        self.optimiser = make_optimiser(self.parameters, optimiser)
        self.optimiser_step = 0
        self._probes: dict[str, float] = {}
        self._steps_taken = 0  # in the iteration at hand

    def run(self, batch: TrainingBatch, iteration: int) -> dict[str, float]:
        """All optimiser steps of an iteration; returns what is logged (means over sigmas, clips and processes).

        Raises:
            OmniNFTError: a loss or gradient is not finite, or a parameter got no gradient; it says whether optimiser
                steps of this iteration had been taken.
        """
        sums: dict[str, Tensor] = {}  # float64, on the device until the end: reading one would wait for it
        norms: list[dict[str, float]] = []
        per_sigma = self.settings.step_per == "sigma"
        shares = 1 if per_sigma else len(self.rounds)
        counts = (batch.num_valid[0] * shares, batch.num_valid[1] * shares)
        weights = LossWeights(batch.advantages, batch.tokens, counts)
        # In host memory: no second copy of what is trained on the device, for numbers that are only logged.
        before = [p.detach().to("cpu", copy=True) for p in self.parameters]
        self._steps_taken = 0
        last: tuple[Rollout, Prepared] | None = None
        for round_ in self.rounds:
            for rows in self._micro_batches(len(batch.rollout)):
                rollout = batch.rollout[rows]
                probing = iteration % PROBE_EVERY == 0 and round_.number == 0 and rows.start == 0
                video, audio, prepared = self._accumulate(rollout, weights[rows], round_, iteration, probing)
                last = rollout, prepared
                for name, branch in zip(MODALITIES, (video, audio), strict=True):
                    for key, value in branch.parts.items():
                        added = torch.where(branch.valid, value, 0.0).sum(dtype=torch.float64)
                        sums[f"{key}/{name}"] = sums.get(f"{key}/{name}", 0.0) + added
            if per_sigma or round_ is self.rounds[-1]:
                norms.append(self._step(iteration))
                self._steps_taken += 1
        valid = dict(zip(MODALITIES, batch.num_valid, strict=True))
        totals = torch.stack(list(sums.values())).cpu()
        self.processes.sum_([totals])
        metrics = {
            key: float(total) / max(1, valid[key.split("/")[1]] * len(self.rounds))  # type: ignore[index]
            for key, total in zip(sums, totals, strict=True)
        }
        metrics |= {key: sum(n[key] for n in norms) / len(norms) for key in norms[0]}
        metrics |= self._update_norms(before) | self._probes
        self._probes = {}
        if last is not None:
            metrics |= self._deviation(*last)
        return metrics

    def reward_gradients(
        self, clips: Rollout, tokens: TokenWeights, alone: Sequence[BranchAdvantages], iteration: int
    ) -> RewardGradients:
        """Inner products of each reward's own gradient over all clips at the first sigma; nothing is updated.

        Args:
            clips: of this process.
            tokens: their weights.
            alone: [K] what they would teach the branches if each reward were the only one.
            iteration: keys the noise, which is that of `run`.
        """
        probe = RewardProbe(len(alone), self.objective.options.branch_shares)
        everyone = len(clips) * self.processes.world
        for rows in self._micro_batches(len(clips)):
            rollout = clips[rows]
            prepared = self._prepare(rollout, self.rounds[0], iteration)
            with self.policy.trainables.using("current"):
                current = self._predict(rollout, "current", prepared.noisy, prepared.sigma)
                for k, advantages in enumerate(alone):
                    weights = LossWeights(advantages, tokens, (everyone, everyone))[rows]
                    losses = self.objective.loss(current, prepared, weights)
                    for branch, loss in enumerate(losses):
                        with self._surgery_on(MODALITIES[branch]):
                            probe.add(k, branch, gradients_of(loss.loss, self.parameters))
        return probe.result(self.processes)

    def _micro_batches(self, num_clips: int) -> Iterator[slice]:
        size = self.settings.micro_batch
        for start in range(0, num_clips, size):
            yield slice(start, min(start + size, num_clips))

    def _predict(self, rollout: Rollout, adapter: AdapterName, noisy: Latents, sigma: Tensor) -> Latents:
        return self.policy.velocity(noisy, sigma, rollout.context, self.geometry, adapter, rollout.conditioning)

    @torch.no_grad()
    def _prepare(self, rollout: Rollout, round_: Round, iteration: int) -> Prepared:
        def predict(adapter: AdapterName, noisy: Latents, sigma: Tensor) -> Latents:
            return self._predict(rollout, adapter, noisy, sigma)

        return self.objective.prepare(rollout, round_, iteration, predict)

    def _accumulate(
        self, rollout: Rollout, weights: LossWeights, round_: Round, iteration: int, probing: bool
    ) -> tuple[BranchLoss, BranchLoss, Prepared]:
        """Forward and backward of one micro-batch at one sigma; gradients add up in the parameters."""
        prepared = self._prepare(rollout, round_, iteration)
        # The adapter stays in force through the backward: checkpointing computes forwards again in it.
        with self.policy.trainables.using("current"):
            current = self._predict(rollout, "current", prepared.noisy, prepared.sigma)
            video, audio = self.objective.loss(current, prepared, weights)
            self._require_finite_losses(video, audio, round_, rollout.clip_keys, iteration)
            if probing:
                self._probes = self._probe(video.loss, audio.loss)
            w_video, w_audio = self.objective.options.branch_shares
            self._backward(w_video * video.loss, w_audio * audio.loss)
        return video, audio, prepared

    def _surgery_on(self, branch: str) -> AbstractContextManager[object]:
        """The surgery, where it acts on this branch's loss."""
        acts = branch == "video" or not self.video_loss_only
        return self.surgery if self.surgery is not None and acts else nullcontext()

    def _backward(self, video_loss: Tensor, audio_loss: Tensor) -> None:
        if self.surgery is not None and self.video_loss_only:
            with self.surgery:
                video_loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            audio_loss.backward()  # type: ignore[no-untyped-call]
            return
        with self.surgery or nullcontext():
            (video_loss + audio_loss).backward()

    def _probe(self, video_loss: Tensor, audio_loss: Tensor) -> dict[str, float]:
        """Gradient norm of each branch's loss alone in each stream, on the first micro-batch of every process."""
        # A parameter that was frozen by mistake is named by `_step`, not here.
        trained = [(name, p) for name, p in self.named if p.requires_grad]
        names = [name for name, _ in trained]
        found: dict[str, float] = {}
        for branch, loss in zip(MODALITIES, (video_loss, audio_loss), strict=True):
            with self._surgery_on(branch):
                gradients = gradients_of(loss, [p for _, p in trained])
            self.processes.sum_(gradients)  # vectors, before the norm
            for stream, norm in norms_by_stream(gradients, names, self.policy.stream_of).items():
                found[f"branch_gradient_sample/{branch}_loss_in_{stream}_stream"] = norm
        return found

    def _require_finite_losses(
        self, video: BranchLoss, audio: BranchLoss, round_: Round, keys: list[tuple[str, int]], iteration: int
    ) -> None:
        for name, branch in zip(MODALITIES, (video, audio), strict=True):
            if not torch.isfinite(branch.loss):
                per_clip = torch.stack([*branch.parts.values()]).sum(dim=0)
                culprits = [f"{p}#{s}" for (p, s), ok in zip(keys, torch.isfinite(per_clip), strict=True) if not ok]
                raise OmniNFTError(
                    f"iteration {iteration}, sigma {round_.sigma:.4g}: the {name} loss is "
                    f"{float(branch.loss.detach())} (clips {', '.join(culprits) or 'unknown'}); {self._damage()}"
                )

    def _damage(self) -> str:
        """How far the iteration has got, for errors that stop it."""
        if not self._steps_taken:
            return "nothing was updated, the last checkpoint is intact"
        steps = "optimiser step" if self._steps_taken == 1 else "optimiser steps"
        return f"{self._steps_taken} {steps} of this iteration had been taken, the last checkpoint is intact"

    def _step(self, iteration: int) -> dict[str, float]:
        """Check, clip and apply the gradients; norms before clipping, in all and per stream."""
        gradients = []
        for name, parameter in self.named:
            if parameter.grad is None:
                raise OmniNFTError(
                    f"iteration {iteration}: {name} got no gradient; the current adapter was not active in the "
                    "forward or the backward, or its module takes no part in the model"
                )
            gradients.append(parameter.grad)
        self.processes.sum_(gradients)
        norms = torch.stack(torch._foreach_norm(gradients))
        squares: dict[str, float] = {}
        for (name, _), norm in zip(self.named, norms.tolist(), strict=True):  # one wait for the device
            if not math.isfinite(norm):
                raise OmniNFTError(
                    f"iteration {iteration}: the gradient of {name} is not finite ({norm}); {self._damage()}"
                )
            stream = self.policy.stream_of(name)
            squares[stream] = squares.get(stream, 0.0) + norm**2
        metrics = {f"gradient_norm/{stream}": value**0.5 for stream, value in squares.items()}
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip_norm, norms.norm())
        rate = self.settings.learning_rate * min(1.0, (self.optimiser_step + 1) / max(1, self.settings.warmup_steps))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.optimiser_step += 1
        return metrics | {"learning_rate": rate}

    def _update_norms(self, before: list[Tensor]) -> dict[str, float]:
        moved = (p.detach() - start.to(p.device) for p, start in zip(self.parameters, before, strict=True))
        norms = norms_by_stream(moved, [name for name, _ in self.named], self.policy.stream_of)
        return {f"update_norm/{stream}": norm for stream, norm in norms.items()}

    @torch.no_grad()
    def _deviation(self, rollout: Rollout, prepared: Prepared) -> dict[str, float]:
        """mean |x0_cur - x0_old| on the last micro-batch of every process, after the step and before old is moved."""
        current = self._predict(rollout, "current", prepared.noisy, prepared.sigma)
        old = prepared.old or self._predict(rollout, "old", prepared.noisy, prepared.sigma)
        free = None if rollout.conditioning is None else ~rollout.conditioning.mask
        sums = torch.tensor([*deviation(current, old, prepared.sigma, free), len(rollout)], dtype=torch.float64)
        self.processes.sum_([sums])
        *totals, clips = sums.tolist()
        return {f"old_deviation_sample/{b}": total / clips for b, total in zip(MODALITIES, totals, strict=True)}


def make_optimiser(parameters: list[nn.Parameter], settings: OptimiserConfig) -> torch.optim.Optimizer:
    """AdamW; `adamw8bit` keeps its moments in 8 bits, but for tensors below 4096 elements.

    Raises:
        OmniNFTError: bitsandbytes is missing or does not import.
    """
    options: dict[str, Any] = dict(
        lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay
    )
    if settings.kind == "adamw":
        return torch.optim.AdamW(parameters, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise OmniNFTError(
            f"optimiser.kind: adamw8bit needs bitsandbytes ({error}); pip install 'omninft[quantised]'"
        ) from error
    made: torch.optim.Optimizer = AdamW8bit(parameters, **options)
    return made


def old_decay(schedule: int, step: int) -> float:
    """Share of the old policy that is kept after optimiser-iteration `step` (from 0).

    Schedules of the reference code: 0 keeps nothing, 1 is min(0.001 step, 0.5), 2 stays 0 for 75 and then rises by
    0.0075 a step up to 0.999.
    """
    if schedule == 0:
        return 0.0
    if schedule == 1:
        return min(0.001 * step, 0.5)
    return min(max(0.0, 0.0075 * (step - 75)), 0.999)
