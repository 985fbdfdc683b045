"""What an objective is: which noise levels an iteration trains at, and the loss of both branches there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from pydantic import model_validator
from torch import Tensor

from omninft.config import Factor, MethodOptions, SamplingConfig
from omninft.models.protocol import AdapterName
from omninft.types import BranchAdvantages, Geometry, Latents, Needs, Rollout, TokenWeights, _Batch


@dataclass(frozen=True)
class Round:
    """One pass over the iteration's clips at one noise level."""

    number: int  # from 0, keys the noise
    sigma: float
    step: int | None = None  # of the sampling schedule, where the round is one


@dataclass(frozen=True)
class LossWeights(_Batch):
    """What the clips of a micro-batch count for."""

    advantages: BranchAdvantages  # [B]
    tokens: TokenWeights
    num_valid: tuple[float, float]  # what the sums over video and audio clips are divided by

    def __getitem__(self, rows: Any) -> LossWeights:
        return LossWeights(self.advantages[rows], self.tokens[rows], self.num_valid)


@dataclass(frozen=True)
class BranchLoss:
    """Loss of one branch over a micro-batch."""

    loss: Tensor  # scalar float32, to be back-propagated
    valid: Tensor  # [B] bool, the clips that are in it
    parts: Mapping[str, Tensor] = field(default_factory=dict)  # [B] float32 detached, means of which are logged


class Prepared(Protocol):
    """A micro-batch made ready for the forward of `current`; objectives keep in it what their loss needs."""

    @property
    def noisy(self) -> Latents:
        """What the model is fed."""
        ...

    @property
    def sigma(self) -> Tensor:
        """[B] float32."""
        ...

    @property
    def old(self) -> Latents | None:
        """Velocities that the old policy predicts there, where they were needed."""
        ...


class Predict(Protocol):
    """Velocities of the micro-batch's clips under an adapter, with their texts and given frames."""

    def __call__(self, adapter: AdapterName, noisy: Latents, sigma: Tensor) -> Latents: ...


@dataclass(frozen=True)
class ObjectiveContext:
    """The run that is trained."""

    geometry: Geometry
    seed: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # of its rollouts


class Objective(Protocol):
    """A loss of both branches: noise and formulas. The update knows micro-batches, backwards, checks and steps."""

    @property
    def options(self) -> ObjectiveOptions: ...

    @property
    def needs(self) -> Needs: ...

    def rounds(self, schedule: Tensor) -> tuple[Round, ...]:
        """The passes of an iteration, from the sampling schedule [S + 1] (last entry 0)."""
        ...

    def prepare(self, rollout: Rollout, round_: Round, iteration: int, predict: Predict) -> Prepared:
        """Noise and constant predictions of a micro-batch; called without gradients."""
        ...

    def loss(self, current: Latents, prepared: Any, weights: LossWeights) -> tuple[BranchLoss, BranchLoss]:
        """Video and audio loss from the velocities that `current` predicts at `prepared.noisy`."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold: tensors and JSON values."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """What `state` gave."""
        ...


class ObjectiveOptions(MethodOptions):
    """Options that every objective has; `build` makes it."""

    video_weight: Factor = 1.0
    """Weight of the video branch: the trained loss is the weighted mean of the two."""
    audio_weight: Factor = 1.0
    """Weight of the audio branch."""

    @model_validator(mode="after")
    def _one_branch_at_least(self) -> Self:
        if self.video_weight + self.audio_weight == 0:
            raise ValueError("video_weight and audio_weight are both 0: nothing would be trained")
        return self

    @property
    def branch_shares(self) -> tuple[float, float]:
        """What the video and the audio loss count for in the trained one: they add up to 1, so that it is a mean."""
        total = self.video_weight + self.audio_weight
        return self.video_weight / total, self.audio_weight / total

    def build(self, context: ObjectiveContext) -> Objective:
        """Raises OmniNFTError: options that do not fit the run."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its objective is built")
