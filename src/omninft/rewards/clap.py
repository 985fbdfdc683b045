"""CLAP as a reward: does the sound fit prompt_a? clip((cosine + 1) / 2, 0, 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from omninft.rewards.model_reward import ModelReward, prompt_text
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers import clap
from omninft.scorers.views import mono
from omninft.types import Clip, OmniNFTError


@dataclass(frozen=True)
class Prepared:
    spectrograms: np.ndarray  # [W, 1001, 64]
    shares: np.ndarray  # [W]
    text: str


class CLAPReward(ModelReward[Prepared]):
    """`pad_mode` fills windows under 10 s ("zero" | "repeatpad"), `long` treats sounds above ("mean" | "first").

    `budget` counts windows.
    """

    name = "clap"
    components = (ComponentSpec("clap", "audio", "CLAP: sound fits prompt_a, (cosine + 1) / 2"),)
    inputs: tuple[Input, ...] = ("audio", "prompt_a")
    model = clap.CARD

    def __init__(self, pad_mode: clap.PadMode = "zero", long: clap.Long = "mean", **common: Any) -> None:
        super().__init__(**common)
        for option, found, expected in (("pad_mode", pad_mode, clap.PAD_MODES), ("long", long, clap.LONG)):
            if found not in expected:
                raise OmniNFTError(f"reward 'clap': {option} is {found!r}, expected one of: {', '.join(expected)}")
        self.pad_mode, self.long = pad_mode, long

    def load(self) -> clap.CLAPScorer:
        return clap.load_clap(self.path, self.device, self.dtype)

    def prepare(self, clip: Clip) -> Prepared:
        text = prompt_text(clip, "prompt_a")
        windows, shares = clap.windows(mono(clip, clap.RATE), self.pad_mode, self.long)
        return Prepared(np.stack([clap.log_mel(window) for window in windows]), shares, text)

    def judge(self, prepared: list[Prepared]) -> np.ndarray:
        cosines = self.scorer(
            [p.spectrograms for p in prepared], [p.shares for p in prepared], [p.text for p in prepared], self.budget
        )
        return np.asarray(np.clip((cosines + 1) / 2, 0, 1)[:, None])
