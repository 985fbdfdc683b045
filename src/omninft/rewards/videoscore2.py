"""VideoScore2 as a reward: the mean of its three verdicts on a clip, given prompt_v."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from omninft.hub import Need
from omninft.rewards.model_reward import ModelReward, prompt_text
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers.prompt_template import template_need
from omninft.scorers.qwen2_vl import Example
from omninft.scorers.videoscore2 import (
    DIMENSIONS,
    MODEL,
    READINGS,
    TEMPLATE,
    Reading,
    VideoScore2,
    load_videoscore2,
    missing,
)
from omninft.types import Clip, OmniNFTError, ScoreTable


class VideoScore2Reward(ModelReward[Example]):
    """(visual quality + text alignment + physical consistency) / 3, from 1 to 5; missing when any of them is.

    `reading` is how a verdict is read: "expected" over the five digits, or as the official code does "soft" (the
    likeliest digit times its share, below 1 at times) or "hard" (the digit). bfloat16.
    """

    name = "videoscore2"
    inputs: tuple[Input, ...] = ("video", "prompt_v")
    model = MODEL
    default_budget = 32768  # tokens of a batch; a 5 s clip has some 3,000 and an answer up to 1,024

    def __init__(
        self,
        path: str | Path | None = None,
        template: str | Path | None = None,
        reading: Reading = "expected",
        dtype: str = "bfloat16",
        **options: Any,
    ) -> None:
        super().__init__(path, dtype=dtype, **options)
        if reading not in READINGS:
            raise OmniNFTError(f"reward 'videoscore2': reading is {reading!r}, expected one of: {', '.join(READINGS)}")
        self.template, self.reading = template, reading
        lowest = 0.2 if reading == "soft" else 1.0  # a share among five is 0.2 or more where it is the largest
        self.components = (
            ComponentSpec("videoscore2", "video", "mean verdict on quality, text, physics", 1.0, (lowest, 5.0)),
        )

    def missing(self) -> str | None:
        return None if self._scorer is not None else missing(self.path, self.template)

    @property
    def needs(self) -> tuple[Need, ...]:
        weights = MODEL.need(self.path, ("model*.safetensors*",))
        return weights, template_need(TEMPLATE, self.path, self.template)

    def load(self) -> VideoScore2:
        return load_videoscore2(self.path, self.template, self.device, self.dtype)

    def prepare(self, clip: Clip) -> Example:
        return self.scorer.prepare(clip, prompt_text(clip, "prompt_v"))

    def score(self, clips: list[Clip]) -> ScoreTable:
        table = super().score(clips)
        silent = [(int(b), 0) for b in np.flatnonzero(~table.valid[:, 0]) if (int(b), 0) not in table.reasons]
        why = f"the model's answer lacks a digit from 1 to 5 for one of: {', '.join(DIMENSIONS)}"
        return replace(table, reasons=table.reasons | dict.fromkeys(silent, why))

    def judge(self, prepared: list[Example]) -> np.ndarray:
        return self.scorer.judge(prepared, self.budget, self.reading).mean(axis=1, keepdims=True)
