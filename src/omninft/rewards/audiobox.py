"""AudioBox Aesthetics as a reward: (CE + CU + PQ - PC) / 40, as OmniNFT combines the axes. No prompt is read."""

from __future__ import annotations

from typing import Any

import numpy as np

from omninft.rewards.model_reward import ModelReward
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers import audiobox
from omninft.scorers.views import mono
from omninft.types import Clip, OmniNFTError

_SIGNS = {"CE": 1, "CU": 1, "PC": -1, "PQ": 1}
_MEANINGS = {"CE": "enjoyment", "CU": "usefulness", "PC": "complexity", "PQ": "production quality"}
# Axes are about 1 to 10.
COMBINED = (
    ComponentSpec(
        "audiobox", "audio", "AudioBox (CE + CU + PQ - PC) / 40: sound quality", weight=0.5, range=(-7 / 40, 29 / 40)
    ),
)
SEPARATE = tuple(
    ComponentSpec(
        f"audiobox_{axis.lower()}",
        "audio",
        f"AudioBox {axis}, {_MEANINGS[axis]} of the sound",
        weight=0.125,
        range=(1.0, 10.0),
        higher_is_better=_SIGNS[axis] > 0,
        unit="rating",
    )
    for axis in audiobox.AXES
)


class AudioBoxReward(ModelReward[np.ndarray]):
    """`separate` gives the four axes, each its own component; `budget` counts windows of 10 s."""

    name = "audiobox"
    components: tuple[ComponentSpec, ...] = COMBINED
    inputs: tuple[Input, ...] = ("audio",)
    model = audiobox.CARD
    default_budget = 8

    def __init__(self, separate: bool = False, **common: Any) -> None:
        super().__init__(**common)
        if not isinstance(separate, bool):
            raise OmniNFTError(f"reward {self.name!r}: separate is {separate!r}, expected true or false")
        self.separate = separate
        if separate:
            self.components = SEPARATE

    def load(self) -> audiobox.AudioBoxScorer:
        return audiobox.load_audiobox(self.path, self.device, self.dtype)

    def prepare(self, clip: Clip) -> np.ndarray:
        """[N] mono sound at 16 kHz."""
        return mono(clip, audiobox.RATE)

    def judge(self, prepared: list[np.ndarray]) -> np.ndarray:
        ratings = self.scorer(prepared, self.budget)
        if self.separate:
            return np.asarray(ratings)
        signs = np.array([_SIGNS[axis] for axis in audiobox.AXES])
        return np.asarray((ratings @ signs / 40)[:, None])
