"""CLIP as a reward: do the frames fit prompt_v? The mean cosine over 48 frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from omninft.rewards.model_reward import ModelReward, prompt_text
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers import clip as scorer
from omninft.types import Clip, OmniNFTError


@dataclass(frozen=True)
class Prepared:
    pixels: np.ndarray  # [F, 3, 224, 224] uint8
    counts: np.ndarray  # [F]
    text: str


class CLIPReward(ModelReward[Prepared]):
    """`bgr` hands the frames over with red and blue exchanged, as JavisBench's code does. `budget` counts frames."""

    name = "clip"
    components = (ComponentSpec("clip", "video", "CLIP: frames fit prompt_v, mean cosine", range=(-1.0, 1.0)),)
    inputs: tuple[Input, ...] = ("video", "prompt_v")
    model = scorer.CARD
    default_budget = 96

    def __init__(self, bgr: bool = False, **common: Any) -> None:
        super().__init__(**common)
        if not isinstance(bgr, bool):
            raise OmniNFTError(f"reward 'clip': bgr is {bgr!r}, expected true or false")
        self.bgr = bgr

    def load(self) -> scorer.CLIPScorer:
        return scorer.load_clip(self.path, self.device, self.dtype)

    def prepare(self, clip: Clip) -> Prepared:
        text = prompt_text(clip, "prompt_v")
        pixels, counts = scorer.frames(clip)
        return Prepared(pixels[:, [2, 1, 0]] if self.bgr else pixels, counts, text)

    def judge(self, prepared: list[Prepared]) -> np.ndarray:
        cosines = self.scorer(
            [p.pixels for p in prepared], [p.counts for p in prepared], [p.text for p in prepared], self.budget
        )
        return np.asarray(cosines[:, None])
