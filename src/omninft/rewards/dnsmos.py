"""DNSMOS as a reward of how clean the speech of a clip sounds, in MOS. No prompt is read.

It judges speech: for prompts that ask for other sounds it is no measure of quality.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omninft.rewards.model_reward import ModelReward
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers import dnsmos
from omninft.scorers.views import mono
from omninft.types import Clip, OmniNFTError

_SPECS = {
    "ovrl": ComponentSpec("dnsmos", "audio", "DNSMOS P.835 overall: clean speech", range=(1.0, 5.0), unit="MOS"),
    "sig": ComponentSpec("dnsmos_sig", "audio", "DNSMOS P.835 speech undistorted", range=(1.0, 5.0), unit="MOS"),
    "bak": ComponentSpec("dnsmos_bak", "audio", "DNSMOS P.835 background quiet", range=(1.0, 5.0), unit="MOS"),
    "p808": ComponentSpec("dnsmos_p808", "audio", "DNSMOS P.808 overall", range=(1.0, 5.0), unit="MOS"),
}


class DNSMOSReward(ModelReward[np.ndarray]):
    """`ratings` chooses among ovrl (component "dnsmos"), sig, bak and p808, a component each.

    The model runs on the CPU, `workers` clips at once.
    """

    name = "dnsmos"
    components: tuple[ComponentSpec, ...] = (_SPECS["ovrl"],)
    inputs: tuple[Input, ...] = ("audio",)
    model = dnsmos.CARD

    def __init__(
        self, ratings: Sequence[str] = ("ovrl",), workers: int | None = None, scorer: dnsmos.DNSMOS | None = None
    ) -> None:
        super().__init__(device="cpu", workers=workers, scorer=scorer)
        unknown = [name for name in ratings if name not in _SPECS]
        if unknown or not ratings or isinstance(ratings, str) or len(set(ratings)) < len(ratings):
            raise OmniNFTError(
                f"reward 'dnsmos': ratings is {ratings!r}, expected a list of different ones of: {', '.join(_SPECS)}"
            )
        self.ratings = tuple(ratings)
        self.components = tuple(_SPECS[name] for name in self.ratings)

    def missing(self) -> str | None:
        return None if self._scorer is not None else dnsmos.missing()

    def load(self) -> dnsmos.DNSMOS:
        return dnsmos.DNSMOS(self.ratings)

    def prepare(self, clip: Clip) -> np.ndarray:
        """The ratings [K]: a batch of windows takes as long as its windows one by one, so that threads serve better."""
        return np.asarray(self.scorer(mono(clip, dnsmos.RATE)))

    def judge(self, prepared: list[np.ndarray]) -> np.ndarray:
        return np.stack(prepared)
