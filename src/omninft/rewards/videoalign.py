"""VideoAlign as a reward: how good the picture is and how well it follows prompt_v."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from omninft.hub import Need
from omninft.rewards.model_reward import ModelReward, prompt_text
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers.prompt_template import template_need
from omninft.scorers.qwen2_vl import Example, Positions
from omninft.scorers.videoalign import BASE, MODEL, TEMPLATE, VideoAlign, load_videoalign, missing
from omninft.types import Clip, OmniNFTError

_ANY = (-np.inf, np.inf)
PARTS: dict[str, tuple[ComponentSpec, ...]] = {
    "overall": (ComponentSpec("videoalign", "video", "mean of visual quality and text alignment", 1.0, _ANY),),
    "separate": (
        ComponentSpec("vq", "video", "VideoAlign's visual quality, normalised", 1 / 3, _ANY),
        ComponentSpec("mq", "video", "VideoAlign's motion quality, normalised", 1 / 3, _ANY),
        ComponentSpec("ta", "video", "VideoAlign's text alignment, normalised", 1 / 3, _ANY),
    ),
}


def overall(normalised: np.ndarray) -> np.ndarray:
    """(VQ + TA) / 2 of normalised VQ, MQ, TA [n, 3]; motion quality does not count, nothing is clipped."""
    return (normalised[:, 0] + normalised[:, 2]) / 2


class VideoAlignReward(ModelReward[Example]):
    """`parts="overall"` is OmniNFT's reward; "separate" gives vq, mq and ta instead.

    `fps` is the rate at which the clip is looked at: 24, with which OmniNFT trains, sees all motion at about 13 times
    the cost of the checkpoint's own 2 (None), the rate of its training and of JavisBench. `rounded` rounds resized
    frames to whole numbers, as torchvision leaves uint8 ones. `base`, `template` and `positions` as for
    load_videoalign. bfloat16, the head in float32.
    """

    name = "videoalign"
    components = PARTS["overall"]
    inputs: tuple[Input, ...] = ("video", "prompt_v")
    model = MODEL
    wave = 4  # a 5 s clip at 24 fps is 280 MB of resized frames
    default_budget = 16384  # tokens of a forward pass; a 5 s clip at 24 fps has 15,000

    def __init__(
        self,
        path: str | Path | None = None,
        base: str | Path | None = None,
        template: str | Path | None = None,
        parts: Literal["overall", "separate"] = "overall",
        fps: float | None = 24.0,
        rounded: bool = False,
        positions: Positions = "sequential",
        dtype: str = "bfloat16",
        **options: Any,
    ) -> None:
        super().__init__(path, dtype=dtype, **options)
        if parts not in PARTS:
            raise OmniNFTError(f"reward 'videoalign': parts is {parts!r}, expected one of: {', '.join(PARTS)}")
        if fps is not None and not fps > 0:
            raise OmniNFTError(f"reward 'videoalign': fps is {fps!r}, expected frames a second above 0, or None")
        if positions not in ("sequential", "mrope"):
            raise OmniNFTError(f"reward 'videoalign': positions is {positions!r}, expected 'sequential' or 'mrope'")
        self.base, self.template, self.positions = base, template, positions
        self.parts, self.fps, self.rounded = parts, fps, rounded
        self.components = PARTS[parts]

    def missing(self) -> str | None:
        return None if self._scorer is not None else missing(self.path, self.base, self.template)

    @property
    def needs(self) -> tuple[Need, ...]:
        return MODEL.need(self.path), BASE.need(self.base), template_need(TEMPLATE, self.path, self.template)

    def load(self) -> VideoAlign:
        return load_videoalign(self.path, self.base, self.template, self.device, self.dtype, self.positions)

    def prepare(self, clip: Clip) -> Example:
        return self.scorer.prepare(clip, prompt_text(clip, "prompt_v"), self.fps, self.rounded)

    def judge(self, prepared: list[Example]) -> np.ndarray:
        scores = self.scorer.normalised(self.scorer.judge(prepared, self.budget))
        return overall(scores)[:, None] if self.parts == "overall" else scores
