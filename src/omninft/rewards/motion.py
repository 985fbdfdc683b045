"""Amount of motion: a continuous stand-in for VBench's dynamic_degree, which counts moving pairs by RAFT's flow.

Here the flow is Farneback's, between consecutive frames (it follows only short ways, so frames are not thinned out to
8 Hz). As in VBench the 5 % of the pixels that move most speak for a pair. The unit makes sizes and frame rates
comparable; VBench's threshold, 6 / 256 of the shorter side per pair at 8 Hz, is 0.1875 of it. Noise and cuts are
motion to any flow: weigh it against a reward of steadiness or quality.
"""

from __future__ import annotations

from omninft.distributed import available_cores
from omninft.rewards.formulas import score_table
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers.flow import checked_shrink, flow_facts
from omninft.scorers.weights import JudgingModel
from omninft.types import Clip, ScoreTable


def motion(clip: Clip, shrink: int = 1) -> float:
    """Mean speed of the fastest 5 % of the pixels, shorter frame sides per second."""
    facts = flow_facts(clip, shrink, enlarge=True)
    return float(facts.top.mean() * clip.frame_rate / facts.short_side)


class MotionReward:
    """`shrink` divides the sides of frames before their flow is computed, a whole number (default 1: full size).

    `workers` is the number of clips measured at once (default: the cores of this process).
    """

    name = "motion"
    components: tuple[ComponentSpec, ...] = (
        ComponentSpec(
            "motion",
            "video",
            "speed of the fastest 5 % of the pixels by optical flow",
            range=(0.0, float("inf")),
            unit="frame sides/s",
        ),
    )
    inputs: tuple[Input, ...] = ("video",)
    licence = "this package's"
    model: JudgingModel | None = None

    def __init__(self, shrink: int = 1, workers: int | None = None) -> None:
        self.shrink = checked_shrink(shrink, self.name)
        self.workers = workers or available_cores()

    def score(self, clips: list[Clip]) -> ScoreTable:
        """[B, 1], about 0 for a still picture; a clip with one frame is missing."""
        return score_table(self.components, (lambda clip: motion(clip, self.shrink),), clips, self.workers)
