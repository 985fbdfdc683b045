"""DeSync: how well the sound is in step with the picture, by Synchformer.

With d the mean over the blocks of a clip of the absolute offset in seconds (0 .. 2), the score is 1 / (1 + d).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from omninft.rewards.model_reward import ModelReward
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers.synchformer import SYNCHFORMER, DeSyncScorer, load_synchformer
from omninft.scorers.synchformer_inputs import SyncInputs, check_seconds, sync_inputs
from omninft.scorers.weights import JudgingModel
from omninft.types import Clip


class DeSyncReward(ModelReward[SyncInputs]):
    """`seconds` is how much of a clip is judged, padded with black and silence where it is shorter.

    "clip" (default) judges the clip's own length. 8.0 is what OmniNFT's code does: of a 5 s clip half the score then
    comes from a block that is mostly padding. 4.0 is JavisBench's.
    """

    name = "desync"
    components: tuple[ComponentSpec, ...] = (
        ComponentSpec("desync", "joint", "1 / (1 + mean absolute offset of sound and picture in s)", 1.0, (1 / 3, 1.0)),
    )
    inputs: tuple[Input, ...] = ("video", "audio")
    model: JudgingModel | None = SYNCHFORMER
    default_budget = 14  # segments of 16 frames in a forward pass

    def __init__(self, seconds: float | str = "clip", **options: Any) -> None:
        super().__init__(**options)
        self.seconds = check_seconds(seconds)

    def load(self) -> DeSyncScorer:
        return load_synchformer(self.path, self.device, self.dtype)

    def prepare(self, clip: Clip) -> SyncInputs:
        return sync_inputs(clip, self.seconds)

    def judge(self, prepared: list[SyncInputs]) -> np.ndarray:
        """[B, 1]"""
        return (1 / (1 + self.scorer.desync(prepared, self.budget)))[:, None]
