"""AV-Align as a reward: peaks of optical flow and onsets of sound coincide (see the scorer)."""

from __future__ import annotations

from omninft.distributed import available_cores
from omninft.rewards.formulas import score_table
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers.av_align import av_align
from omninft.scorers.flow import checked_shrink
from omninft.scorers.weights import JudgingModel
from omninft.types import Clip, OmniNFTError, ScoreTable


class AVAlignReward:
    """`shrink` divides the sides of frames before their flow is computed, a whole number (default 1: full size).

    `enlarge` enlarges frames under 64 pixels first, which published code does not. `workers` is the number of clips
    measured at once (default: the cores of this process).
    """

    name = "av_align"
    components: tuple[ComponentSpec, ...] = (
        # As published, several onsets may match one peak of motion, so that a score can exceed 1.
        ComponentSpec(
            "av_align", "joint", "AV-Align: peaks of optical flow and of sound coincide", range=(0.0, float("inf"))
        ),
    )
    inputs: tuple[Input, ...] = ("video", "audio")
    licence = "this package's"
    model: JudgingModel | None = None

    def __init__(self, shrink: int = 1, enlarge: bool = False, workers: int | None = None) -> None:
        self.shrink = checked_shrink(shrink, self.name)
        if not isinstance(enlarge, bool):
            raise OmniNFTError(f"reward {self.name!r}: enlarge is {enlarge!r}, expected true or false")
        self.enlarge = enlarge
        self.workers = workers or available_cores()

    def score(self, clips: list[Clip]) -> ScoreTable:
        """[B, 1]; a clip without sound or with one frame is missing. Without any peak the published score is 0."""

        def formula(clip: Clip) -> float:
            return av_align(clip, self.shrink, self.enlarge)

        return score_table(self.components, (formula,), clips, self.workers)
