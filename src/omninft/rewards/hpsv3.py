"""HPSv3 as a reward: human preference for the frames of a clip, given prompt_v."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from omninft.hub import Need
from omninft.rewards.model_reward import ModelReward, prompt_text
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers.hpsv3 import BASE, MODEL, TEMPLATE, HPSv3, load_hpsv3, missing
from omninft.scorers.prompt_template import template_need
from omninft.scorers.qwen2_vl import Example, Positions
from omninft.scorers.views import uniform_indices
from omninft.types import Clip, OmniNFTError

FRAMES = 5
HIGHEST = 15.0  # of a frame's score
SHARE = 0.3  # of the frames, the best, that make the clip's score


def clip_score(frame_scores: np.ndarray) -> float:
    """Mean of the best max(1, ceil(0.3 n)) of n frame scores, each cut off at 15; 2 of 5."""
    best = max(1, math.ceil(SHARE * len(frame_scores)))
    return float(np.sort(np.minimum(frame_scores, HIGHEST))[-best:].mean())


class HPSv3Reward(ModelReward[list[Example]]):
    """Five frames from the first to the last. `jpeg_quality=75` passes them through JPEG as the official server does.

    `base`, `template` and `positions` as for load_hpsv3. bfloat16, the head in float32.
    """

    name = "hpsv3"
    components = (ComponentSpec("hpsv3", "video", "human preference of the best frames", 1.5, (-np.inf, HIGHEST)),)
    inputs: tuple[Input, ...] = ("video", "prompt_v")
    model = MODEL
    default_budget = 16384  # tokens of a forward pass; a frame has 231 to 280 and some 500 of text

    def __init__(
        self,
        path: str | Path | None = None,
        base: str | Path | None = None,
        template: str | Path | None = None,
        jpeg_quality: int | None = None,
        positions: Positions = "sequential",
        dtype: str = "bfloat16",
        **options: Any,
    ) -> None:
        super().__init__(path, dtype=dtype, **options)
        if jpeg_quality is not None and not 1 <= jpeg_quality <= 100:
            raise OmniNFTError(f"reward 'hpsv3': jpeg_quality is {jpeg_quality!r}, expected 1 to 100, or None")
        if positions not in ("sequential", "mrope"):
            raise OmniNFTError(f"reward 'hpsv3': positions is {positions!r}, expected 'sequential' or 'mrope'")
        self.base, self.template, self.positions = base, template, positions
        self.jpeg_quality = jpeg_quality

    def missing(self) -> str | None:
        return None if self._scorer is not None else missing(self.path, self.base, self.template)

    @property
    def needs(self) -> tuple[Need, ...]:
        return MODEL.need(self.path), BASE.need(self.base), template_need(TEMPLATE, self.path, self.template)

    def load(self) -> HPSv3:
        return load_hpsv3(self.path, self.base, self.template, self.device, self.dtype, self.positions)

    def prepare(self, clip: Clip) -> list[Example]:
        text = prompt_text(clip, "prompt_v")
        frames = clip.video[uniform_indices(len(clip.video), FRAMES)]
        return [self.scorer.prepare(frame, text, self.jpeg_quality) for frame in frames]

    def judge(self, prepared: list[list[Example]]) -> np.ndarray:
        """The frames of all clips share the forward passes."""
        frame_scores = self.scorer.judge([example for clip in prepared for example in clip], self.budget)
        return np.array([[clip_score(scores)] for scores in frame_scores.reshape(len(prepared), FRAMES)])
