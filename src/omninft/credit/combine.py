"""Credit from group advantages: OmniNFT's three levels, and the baselines that add up.

    omninft   every reward's advantage to the branch it judges, gradient surgery, region weights (arXiv:2605.12480)
    gdpo      the sum of all advantages to both branches
    global    the advantage of the summed raw rewards to both (DiffusionNFT, GRPO)

Surgery and regions are options of each, so that every step from one to the other is one key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from omninft.config import Block, Factor, Frozen, Share, Warmup
from omninft.credit.advantages import (
    advantages_of_one,
    combine_advantages,
    conflict_share,
    global_advantages,
    reward_advantages,
    shuffle_within_groups,
    zero_variance_groups,
)
from omninft.credit.protocol import CreditContext, CreditOptions, SurgeryPlan
from omninft.credit.regions import region_weights, warmup_length, warmup_scale
from omninft.credit.surgery import DEFAULT_FRACTIONS, SurgeryRange, surgery_schedule
from omninft.types import (
    BranchAdvantages,
    GradientScales,
    Needs,
    PromptGroup,
    Recording,
    RewardAdvantages,
    RewardGradients,
    Rollout,
    ScoreTable,
    TokenWeights,
)

Depth = Block | Share  # the number of a block, or a share of all


class SurgeryRangeOptions(Frozen):
    """Blocks from `start` to `stop` (exclusive), numbers or shares of the depth, and their gradient scale."""

    start: Depth
    """First block; a float is a share of the depth."""
    stop: Depth
    """First block after the range; a float is a share of the depth."""
    scale: Factor
    """Factor of the gradient."""


class SurgeryOptions(Frozen):
    """Layer-wise gradient surgery on what the video loss sends into the audio stream."""

    enabled: bool = True
    """Scale the gradients that cross between the streams."""
    schedule: tuple[SurgeryRangeOptions, ...] | None = None
    """Factors of A2V by blocks; null: the reference schedule as shares of the depth."""
    audio_schedule: tuple[SurgeryRangeOptions, ...] | None = None
    """Factors of V2A, off in the paper."""
    target: Literal["input", "projection"] = "input"
    """What is scaled: the gradient of the crossing attention's input, or of its projections."""
    scope: Literal["all", "video_loss_only"] = "all"
    """Of both losses, or of the video loss alone (two backwards)."""

    def scales(self, num_blocks: int) -> GradientScales:
        """Factors per block. Raises OmniNFTError: ranges that do not fit the depth."""
        video = DEFAULT_FRACTIONS if self.schedule is None else _ranges(self.schedule)
        audio = () if self.audio_schedule is None else _ranges(self.audio_schedule)
        made = (surgery_schedule(num_blocks, ranges) for ranges in (video, audio))
        return GradientScales(*(tuple(schedule) for schedule in made))


def _ranges(options: Sequence[SurgeryRangeOptions]) -> tuple[SurgeryRange, ...]:
    return tuple(SurgeryRange(r.start, r.stop, r.scale) for r in options)


class RegionsOptions(Frozen):
    """Region-wise weights of the video loss from V2A attention."""

    enabled: bool = True
    """Weigh the regions that sound in the video loss."""
    method: Literal["minmax", "zscore_sigmoid", "top_share"] = "minmax"
    """How weights come from attention sums."""
    strength: Factor = 1.5
    """How much more regions weigh: lambda of minmax, w_max of the other two."""
    warmup: Warmup = 0.1
    """Share of the run over which the strength rises; above 1: iterations."""
    window: tuple[Share, Share] = (0.5, 0.9)
    """Shares of the denoising steps whose attention counts, from and to."""
    first_block: Depth = 0
    """Blocks from here on; a float is a share of the depth."""
    rope: bool = True
    """Attention maps with rotary positions."""
    value_weighted: bool = False
    """Weigh attention by the norm of the values."""

    @model_validator(mode="after")
    def _window_is_ordered(self) -> RegionsOptions:
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window must rise, found {list(self.window)}, expected something like [0.5, 0.9]")
        return self

    @property
    def recording(self) -> Recording:
        return Recording("v2a_columns", self.window, self.first_block, self.rope, self.value_weighted)

    def scale(self, iteration: int, iterations: int) -> float:
        """Warm-up factor in [0, 1]. A warm-up of at most 1 is a share of the run, so that short runs get there too."""
        return warmup_scale(iteration, warmup_length(self.warmup, iterations))


class AdvantageCreditOptions(CreditOptions):
    """What all credits over group advantages have: their scale and the placebo."""

    std: Literal["global", "group"] = "global"
    """What scores are divided by: the deviation of all clips, or of the group."""
    shuffle: bool = False
    """Placebo control: advantages permuted inside their group."""


class GroupCreditOptions(AdvantageCreditOptions):
    """Group advantages with OmniNFT's surgery and regions."""

    surgery: SurgeryOptions = SurgeryOptions()
    """Gradient surgery."""
    regions: RegionsOptions = RegionsOptions()
    """Region weights."""


class CombineOptions(GroupCreditOptions):
    """Options of omninft, gdpo and global."""

    kind: Literal["omninft", "gdpo", "global"] = "omninft"
    """omninft: by route; gdpo: all to both branches; global: one sum to both."""
    final_batch_norm: bool = False
    """Normalise the summed advantages over the batch."""

    def build(self, context: CreditContext) -> CombinedCredit:
        return CombinedCredit(self, context)


class AdvantageCredit:
    """Group advantages and nothing else: equal tokens, no surgery, no probes."""

    routed = True

    def __init__(self, options: AdvantageCreditOptions, context: CreditContext) -> None:
        self.options, self.context = options, context
        self._metrics: dict[str, float] = {}

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def surgery(self) -> SurgeryPlan | None:
        return None

    def per_reward(self, table: ScoreTable, index: Tensor) -> RewardAdvantages:
        """Advantages before the placebo's shuffle."""
        return reward_advantages(table, index, self.options.std)

    def assign(self, table: ScoreTable, groups: Sequence[PromptGroup], iteration: int) -> RewardAdvantages:
        """Each reward's own advantages; the placebo's are shuffled inside their groups."""
        index = torch.tensor([i for i, g in enumerate(groups) for _ in g.samples])
        advantages = self.per_reward(table, index)
        # What the log says is of the advantages as they are, not as a placebo deals them out.
        plain = self.combine(advantages, None, iteration)
        self._metrics = {
            "advantage/conflict_share": conflict_share(plain),
            "advantage/zero_variance_groups": float(zero_variance_groups(table, index)),
            "advantage/mean_abs_video": float(plain.video.abs().mean()),
            "advantage/mean_abs_audio": float(plain.audio.abs().mean()),
        }
        if not self.options.shuffle:
            return advantages
        return shuffle_within_groups(advantages, index, self.context.seed * 1_000_003 + iteration)

    def probes(self, iteration: int) -> bool:
        """Never."""
        return False

    def alone(self, advantages: RewardAdvantages, k: int) -> BranchAdvantages:
        """Of reward k alone."""
        return advantages_of_one(advantages, k, self.routed)

    def combine(
        self, advantages: RewardAdvantages, gradients: RewardGradients | None, iteration: int
    ) -> BranchAdvantages:
        """Weighted sums per branch."""
        return combine_advantages(advantages, self.routed)

    def weigh(self, rollout: Rollout, iteration: int) -> TokenWeights:
        """All tokens alike."""
        return TokenWeights()

    def gradient_scales(self, rollout: Rollout) -> GradientScales | None:
        """None: gradients cross as they are."""
        return None

    def metrics(self) -> Mapping[str, float]:
        """Conflict between the branches, sizes, and groups that teach nothing."""
        return self._metrics

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Nothing is carried from one iteration to the next."""
        return {}, {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Nothing to restore."""


class GroupCredit(AdvantageCredit):
    """Group advantages, region weights from attention, a fixed surgery schedule."""

    options: GroupCreditOptions

    def __init__(self, options: GroupCreditOptions, context: CreditContext) -> None:
        super().__init__(options, context)
        self._scales = options.surgery.scales(context.num_blocks) if options.surgery.enabled else None

    @property
    def needs(self) -> Needs:
        regions = self.options.regions
        return Needs(recordings=(regions.recording,) if regions.enabled else ())

    @property
    def surgery(self) -> SurgeryPlan | None:
        surgery = self.options.surgery
        return SurgeryPlan(surgery.target, surgery.scope == "video_loss_only") if surgery.enabled else None

    def weigh(self, rollout: Rollout, iteration: int) -> TokenWeights:
        """Region weights of the video tokens; None where the technique is off."""
        regions = self.options.regions
        if not regions.enabled:
            return TokenWeights()
        omega = region_weights(
            rollout.recorded["v2a_columns"],
            self.context.latent_frames,
            regions.method,
            strength=regions.strength,
            scale=regions.scale(iteration, self.context.iterations),
            given=None if rollout.conditioning is None else rollout.conditioning.mask,
        )
        return TokenWeights(video=omega)

    def gradient_scales(self, rollout: Rollout) -> GradientScales | None:
        """The schedule, the same in every iteration."""
        return self._scales


class CombinedCredit(GroupCredit):
    """omninft, gdpo and global: see `CombineOptions`."""

    options: CombineOptions

    def __init__(self, options: CombineOptions, context: CreditContext) -> None:
        super().__init__(options, context)
        self.routed = options.kind == "omninft"

    def per_reward(self, table: ScoreTable, index: Tensor) -> RewardAdvantages:
        assign = global_advantages if self.options.kind == "global" else reward_advantages
        return assign(table, index, self.options.std)

    def combine(
        self, advantages: RewardAdvantages, gradients: RewardGradients | None, iteration: int
    ) -> BranchAdvantages:
        return combine_advantages(advantages, self.routed, self.options.final_batch_norm)
