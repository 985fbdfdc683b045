"""One iteration's training: noise the clean latents, predict with old, reference and current, step.

Old and reference predict first, without a graph; then current goes forward *and* backward inside its own adapter
context. Losses are divided by the number of valid clips of the whole iteration, so that micro-batches, processes and,
with one step an iteration, sigmas add up to the mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omninft.config import ObjectiveConfig, OptimiserConfig, SigmasConfig
from omninft.noise import keyed_normal
from omninft.objectives.negative_aware import (
    BranchLoss,
    NegativeAwareOptions,
    add_noise,
    branch_loss,
    old_deviation,
    predict_x0,
)
from omninft.types import BranchAdvantages, Geometry, Latents, OmniNFTError, Rollout

PROBE_EVERY = 10  # iterations between measurements of each loss's own gradient; costs two backwards of one micro-batch
# The stream whose residual a module writes: audio_to_video_attn writes into the video stream.
_AUDIO_MODULES = ("audio_attn1", "audio_attn2", "video_to_audio_attn", "audio_ff")


def stream_of(parameter: str) -> str:
    """ "video" or "audio": which stream the module that owns this parameter writes to."""
    return "audio" if any(f".{m}." in parameter for m in _AUDIO_MODULES) else "video"


def training_sigmas(choice: SigmasConfig, schedule: Tensor) -> list[float]:
    """The noise levels to train on, from the sampling schedule [steps + 1] (last entry 0).

    `first_fraction` takes the noisiest int(fraction * steps), as the reference code does; `spread` takes `count` evenly
    spaced ones, the noisiest among them; `list` takes its values.
    """
    levels = schedule[:-1].tolist()
    if choice.choice == "list":
        return list(choice.values)
    if choice.choice == "first_fraction":
        return levels[: max(1, int(len(levels) * choice.fraction))]
    count = min(choice.count, len(levels))
    return [levels[round(i * len(levels) / count)] for i in range(count)]


@dataclass(frozen=True)
class TrainingBatch:
    """All local clips of an iteration, with the credit each is given."""

    rollout: Rollout
    advantages: BranchAdvantages
    omega: Tensor | None  # [B, Tv], region weights
    num_valid: tuple[int, int]  # valid clips of the whole iteration, video and audio


class PolicyUpdate:
    """Optimiser and objective of the current policy.

    Args:
        policy: see `omninft.models.ltx2.LTX2Policy`.
        surgery: active during backwards (a context manager), or None.
        video_loss_only: surgery acts on the video loss alone, at the price of a second backward.
    """

    def __init__(
        self,
        policy: Any,
        geometry: Geometry,
        objective: ObjectiveConfig,
        optimiser: OptimiserConfig,
        sigmas: list[float],
        seed: int,
        processes: Any,
        surgery: AbstractContextManager[Any] | None = None,
        video_loss_only: bool = False,
    ) -> None:
        self.policy, self.geometry, self.objective, self.settings = policy, geometry, objective, optimiser
        self.sigmas, self.seed, self.processes = sigmas, seed, processes
        self.surgery, self.video_loss_only = surgery, video_loss_only
        self.options = NegativeAwareOptions(
            objective.beta,
            objective.advantage_clip,
            objective.detach_weight,
            objective.reference_weight,
            objective.reference_space,
        )
        self.named = policy.adapters.named_parameters()
        self.parameters = [p for _, p in self.named]
        self.optimiser = torch.optim.AdamW(
            self.parameters,
            lr=optimiser.learning_rate,
            betas=optimiser.betas,
            eps=optimiser.epsilon,
            weight_decay=optimiser.weight_decay,
        )
        self.optimiser_step = 0
        self._probes: dict[str, float] = {}

    def run(self, batch: TrainingBatch, iteration: int) -> dict[str, float]:
        """All optimiser steps of an iteration; returns what is logged (means over sigmas, clips and processes).

        Raises:
            OmniNFTError: a loss or gradient is not finite, or a parameter got no gradient; nothing was updated.
        """
        sums: dict[str, float] = {}
        norms: list[dict[str, float]] = []
        per_sigma = self.objective.step_per == "sigma"
        shares = 1 if per_sigma else len(self.sigmas)
        before = [p.detach().clone() for p in self.parameters]
        last: tuple[Any, ...] = ()
        for number, sigma in enumerate(self.sigmas):
            for rows in self._micro_batches(len(batch.rollout)):
                video, audio, last = self._accumulate(batch, rows, number, sigma, iteration, shares)
                for name, branch in (("video", video), ("audio", audio)):
                    for key, value in (("loss", branch.policy), ("reference", branch.reference)):
                        sums[f"{key}/{name}"] = sums.get(f"{key}/{name}", 0.0) + float(value[branch.valid].sum())
            if per_sigma or number == len(self.sigmas) - 1:
                norms.append(self._step(iteration))
        counts = {"video": batch.num_valid[0], "audio": batch.num_valid[1]}
        totals = torch.tensor(list(sums.values()), dtype=torch.float64)
        self.processes.sum_([totals])
        metrics = {
            key: float(total) / max(1, counts[key.split("/")[1]] * len(self.sigmas))
            for key, total in zip(sums, totals, strict=True)
        }
        metrics |= {key: sum(n[key] for n in norms) / len(norms) for key in norms[0]}
        metrics |= self._update_norms(before) | self._probes
        self._probes = {}
        metrics |= self._deviation(last)
        return metrics

    def _micro_batches(self, num_clips: int) -> Iterator[slice]:
        size = self.objective.micro_batch
        for start in range(0, num_clips, size):
            yield slice(start, min(start + size, num_clips))

    def _accumulate(
        self, batch: TrainingBatch, rows: slice, number: int, sigma: float, iteration: int, shares: int
    ) -> tuple[BranchLoss, BranchLoss, tuple[Any, ...]]:
        """Forward and backward of one micro-batch at one sigma; gradients add up in the parameters."""
        rollout, g = batch.rollout, self.geometry
        clean, context = rollout.latents[rows], rollout.context[rows]
        given = rollout.conditioning[rows] if rollout.conditioning is not None else None
        keys = rollout.clip_keys[rows]
        noise = Latents(
            keyed_normal(keys, (g.video_tokens, g.video_channels), self.seed, iteration, f"train_video_{number}"),
            keyed_normal(keys, (g.audio_tokens, g.audio_channels), self.seed, iteration, f"train_audio_{number}"),
        ).to(clean.video.device)
        level = torch.full((len(keys),), sigma, device=clean.video.device)
        video_level = level if given is None else level[:, None] * ~given.mask
        noisy = Latents(add_noise(clean.video, noise.video, video_level), add_noise(clean.audio, noise.audio, level))

        def predict(adapter: str) -> Latents:
            v = self.policy.velocity(noisy, level, context, g, adapter, given)
            return Latents(predict_x0(noisy.video, v.video, video_level), predict_x0(noisy.audio, v.audio, level))

        with torch.no_grad():
            old = predict("old")
            reference = predict("reference") if self.options.reference_weight else None
        # The adapter stays in force through the backward: checkpointing computes forwards again in it.
        with self.policy.adapters.using("current"):
            current = predict("current")
            video = branch_loss(
                current_x0=current.video,
                old_x0=old.video,
                clean_x0=clean.video,
                reference_x0=None if reference is None else reference.video,
                sigma=video_level,
                advantage=batch.advantages.video[rows],
                valid=batch.advantages.video_valid[rows],
                num_valid=batch.num_valid[0] * shares,
                omega=None if batch.omega is None else batch.omega[rows],
                token_mask=None if given is None else ~given.mask,
                options=self.options,
            )
            audio = branch_loss(
                current_x0=current.audio,
                old_x0=old.audio,
                clean_x0=clean.audio,
                reference_x0=None if reference is None else reference.audio,
                sigma=level,
                advantage=batch.advantages.audio[rows],
                valid=batch.advantages.audio_valid[rows],
                num_valid=batch.num_valid[1] * shares,
                options=self.options,
            )
            self._require_finite_losses(video, audio, sigma, keys, iteration)
            if iteration % PROBE_EVERY == 0 and number == 0 and rows.start == 0:
                self._probes = self._probe(video.loss, audio.loss)
            self._backward(self.objective.video_weight * video.loss, self.objective.audio_weight * audio.loss)
        return video, audio, (noisy, level, video_level, context, given, old)

    def _backward(self, video_loss: Tensor, audio_loss: Tensor) -> None:
        if self.surgery is not None and self.video_loss_only:
            with self.surgery:
                video_loss.backward(retain_graph=True)
            audio_loss.backward()
            return
        with self.surgery or nullcontext():
            (video_loss + audio_loss).backward()

    def _probe(self, video_loss: Tensor, audio_loss: Tensor) -> dict[str, float]:
        """Gradient norm of each branch's loss alone in each stream, on this process's first micro-batch."""
        norms: dict[str, float] = {}
        # A parameter that was frozen by mistake is named by `_step`, not here.
        trained = [(name, p) for name, p in self.named if p.requires_grad]
        for branch, loss in (("video", video_loss), ("audio", audio_loss)):
            with (self.surgery if branch == "video" or not self.video_loss_only else None) or nullcontext():
                gradients = torch.autograd.grad(loss, [p for _, p in trained], retain_graph=True, allow_unused=True)
            squares = {"video": 0.0, "audio": 0.0}
            for (name, _), gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    squares[stream_of(name)] += float(gradient.square().sum())
            for stream, square in squares.items():
                norms[f"branch_gradient/{branch}_loss_in_{stream}_stream"] = square**0.5
        return norms

    def _require_finite_losses(
        self, video: BranchLoss, audio: BranchLoss, sigma: float, keys: list[tuple[str, int]], iteration: int
    ) -> None:
        for name, branch in (("video", video), ("audio", audio)):
            if not torch.isfinite(branch.loss):
                per_clip = branch.policy + branch.reference
                culprits = [f"{p}#{s}" for (p, s), ok in zip(keys, torch.isfinite(per_clip), strict=True) if not ok]
                raise OmniNFTError(
                    f"iteration {iteration}, sigma {sigma:.4g}: the {name} loss is {float(branch.loss.detach())} "
                    f"(clips {', '.join(culprits[:3]) or 'none alone'}); nothing was updated, "
                    "the last checkpoint is intact. A lower learning rate or float32 usually helps"
                )

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
        norms = torch._foreach_norm(gradients)
        squares: dict[str, Tensor] = {}
        for (name, _), norm in zip(self.named, norms, strict=True):
            if not torch.isfinite(norm):
                raise OmniNFTError(
                    f"iteration {iteration}: the gradient of {name} is not finite ({float(norm)}); "
                    "nothing was updated, the last checkpoint is intact"
                )
            stream = stream_of(name)
            squares[stream] = squares.get(stream, torch.zeros_like(norm)) + norm.square()
        metrics = {f"gradient_norm/{stream}": float(value.sqrt()) for stream, value in squares.items()}
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        rate = self.settings.learning_rate * min(1.0, (self.optimiser_step + 1) / max(1, self.settings.warmup_steps))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.optimiser_step += 1
        return metrics | {"learning_rate": rate}

    def _update_norms(self, before: list[Tensor]) -> dict[str, float]:
        squares = {"video": 0.0, "audio": 0.0}
        for (name, parameter), start in zip(self.named, before, strict=True):
            squares[stream_of(name)] += float((parameter.detach() - start).square().sum())
        return {f"update_norm/{stream}": value**0.5 for stream, value in squares.items()}

    @torch.no_grad()
    def _deviation(self, last: tuple[Any, ...]) -> dict[str, float]:
        """mean |x0_cur - x0_old| on the last micro-batch, after the step and before old is moved."""
        noisy, level, video_level, context, given, old = last
        v = self.policy.velocity(noisy, level, context, self.geometry, "current", given)
        video = predict_x0(noisy.video, v.video, video_level)
        audio = predict_x0(noisy.audio, v.audio, level)
        mask = None if given is None else ~given.mask
        return {
            "old_deviation/video": float(old_deviation(video, old.video, mask).mean()),
            "old_deviation/audio": float(old_deviation(audio, old.audio).mean()),
        }


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
