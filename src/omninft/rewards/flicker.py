"""Temporal steadiness, by the formula of VBench's temporal_flickering: (255 - mean difference) / 255.

A still picture scores 1: weigh it against a reward of motion.
"""

from __future__ import annotations

from omninft.distributed import available_cores
from omninft.rewards.formulas import score_table
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers.flicker import frame_differences
from omninft.scorers.weights import JudgingModel
from omninft.types import Clip, ScoreTable


def steadiness(clip: Clip) -> float:
    """1 where consecutive frames are equal, 0 where every pixel jumps between black and white."""
    return float(1 - frame_differences(clip).mean() / 255)


class FlickerReward:
    """`workers` is the number of clips measured at once (default: the cores of this process)."""

    name = "flicker"
    components: tuple[ComponentSpec, ...] = (
        ComponentSpec("flicker", "video", "consecutive frames alike (VBench temporal_flickering)"),
    )
    inputs: tuple[Input, ...] = ("video",)
    licence = "this package's"
    model: JudgingModel | None = None

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or available_cores()

    def score(self, clips: list[Clip]) -> ScoreTable:
        """[B, 1] in 0..1; a clip with one frame is missing."""
        return score_table(self.components, (steadiness,), clips, self.workers)
