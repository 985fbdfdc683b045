"""What a method of credit is: who learns from which score, and how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from omninft.config import MethodOptions
from omninft.distributed import Processes
from omninft.types import (
    BranchAdvantages,
    GradientScales,
    Needs,
    PromptGroup,
    RewardAdvantages,
    RewardGradients,
    Rollout,
    ScoreTable,
    TokenWeights,
)


@dataclass(frozen=True)
class CreditContext:
    """The run that credit is assigned in."""

    num_blocks: int
    latent_frames: int
    iterations: int  # of the whole run: warm-ups may be shares of it
    seed: int
    processes: Processes


class Credit(Protocol):
    """Credit of an iteration's clips. `assign` and `combine` see the clips of all processes, the others this one's."""

    @property
    def needs(self) -> Needs: ...

    @property
    def surgery(self) -> SurgeryPlan | None:
        """How gradients are scaled where the streams cross; None: not at all."""
        ...

    def assign(self, table: ScoreTable, groups: Sequence[PromptGroup], iteration: int) -> RewardAdvantages:
        """Each reward's own advantages, clips in the order of the groups."""
        ...

    def probes(self, iteration: int) -> bool:
        """Whether each reward's own gradient is to be measured in this iteration, before credit is combined."""
        ...

    def alone(self, advantages: RewardAdvantages, k: int) -> BranchAdvantages:
        """What the branches would learn from reward k alone, where `probes` asks for its gradient."""
        ...

    def combine(
        self, advantages: RewardAdvantages, gradients: RewardGradients | None, iteration: int
    ) -> BranchAdvantages:
        """What each branch learns from. `gradients` are there where `probes` asks for them."""
        ...

    def weigh(self, rollout: Rollout, iteration: int) -> TokenWeights:
        """Weights of the tokens in both losses."""
        ...

    def gradient_scales(self, rollout: Rollout) -> GradientScales | None:
        """Factors of this iteration where `surgery` plans some; None without surgery."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Figures of the last `combine`, `weigh` and `gradient_scales` for the log, by name."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold: tensors and JSON values."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """What `state` gave."""
        ...


@dataclass(frozen=True)
class SurgeryPlan:
    """Where and when gradient scales act."""

    target: Literal["input", "projection"] = "input"
    video_loss_only: bool = False  # two backwards: the audio loss's gradient is left alone


class CreditOptions(MethodOptions):
    """Options of a credit; `build` makes it."""

    def build(self, context: CreditContext) -> Credit:
        """Raises OmniNFTError: options that do not fit the model."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its credit is built")
