"""Rewards that are formulas of one clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from omninft.clips.workers import in_workers
from omninft.rewards.registry import ComponentSpec
from omninft.types import Clip, OmniNFTError, ScoreTable

Formula = Callable[[Clip], float]


def score_table(
    components: Sequence[ComponentSpec], formulas: Sequence[Formula], clips: Sequence[Clip], workers: int = 1
) -> ScoreTable:
    """One formula per component; an OmniNFTError of a formula makes that score missing, with its message.

    `workers` clips are measured at once, by threads.
    """
    values = np.full((len(clips), len(components)), np.nan)
    reasons: dict[tuple[int, int], str] = {}
    for k, formula in enumerate(formulas):
        for b, outcome in enumerate(in_workers(formula, clips, workers)):
            if isinstance(outcome, OmniNFTError):
                reasons[b, k] = str(outcome)
            else:
                values[b, k] = outcome
    return ScoreTable(tuple(spec.component for spec in components), values, reasons)
