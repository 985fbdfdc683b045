"""Runs rewards on clips so that one bad clip, or one bad reward, costs no other score.

A score that could not be had is missing, with the reason; it is never 0.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from omninft.rewards.registry import Reward
from omninft.types import Clip, Component, OmniNFTError, ScoreTable

_LOG = logging.getLogger(__name__)
_REASONS_SHOWN = 5


class RewardRunner:
    """Scores clips by several rewards; in the background, one batch after another, where asked to.

    `max_missing_share` (0..1) is the share of missing scores of one component that `check_missing` still accepts.
    """

    def __init__(self, rewards: Sequence[Reward], max_missing_share: float = 0.5) -> None:
        if not 0 <= max_missing_share <= 1:
            raise OmniNFTError(f"max_missing_share must lie in 0..1, found {max_missing_share}")
        self.rewards = tuple(rewards)
        self.max_missing_share = max_missing_share
        # Tables that cannot be joined are an error now, not after the first clips were sampled.
        self.components = ScoreTable.join([_empty(reward) for reward in self.rewards]).components if rewards else ()
        self._pool: ThreadPoolExecutor | None = None

    def score(self, clips: list[Clip]) -> ScoreTable:
        """[len(clips), components of all rewards]. Raises nothing that a reward raised, but KeyboardInterrupt."""
        if not self.rewards:
            return ScoreTable((), np.empty((len(clips), 0)))
        return ScoreTable.join([_score(reward, list(clips)) for reward in self.rewards])

    def submit(self, clips: list[Clip]) -> Future[ScoreTable]:
        """`score` on the one background thread: batches are scored in the order in which they were submitted."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")
        return self._pool.submit(self.score, list(clips))

    def check_missing(self, table: ScoreTable) -> None:
        """Raises OmniNFTError when a component is missing on more than `max_missing_share` of the clips."""
        total = len(table.values)
        problems = []
        for k, component in enumerate(table.components):
            missing = int((~table.valid[:, k]).sum())
            if missing <= self.max_missing_share * total:
                continue
            reasons = Counter(why for (_, column), why in table.reasons.items() if column == k)
            listed = "; ".join(f"{count} x {why}" for why, count in reasons.most_common(_REASONS_SHOWN))
            more = len(reasons) - _REASONS_SHOWN
            listed += f"; and {more} more reasons" if more > 0 else ""
            problems.append(f"{component.name} on {missing} of {total} clips ({listed})")
        if problems:
            raise OmniNFTError(
                f"scores are missing on more than {self.max_missing_share:.0%} of the clips: {'; '.join(problems)}"
            )

    def close(self) -> None:
        """Drop what was submitted and not begun, wait for what was, end the background thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def missing_counts(table: ScoreTable) -> dict[str, int]:
    """Missing scores per component."""
    counts = (~table.valid).sum(axis=0)
    return {component.name: int(count) for component, count in zip(table.components, counts, strict=True)}


def _components(reward: Reward) -> tuple[Component, ...]:
    return tuple(spec.component for spec in reward.components)


def _empty(reward: Reward) -> ScoreTable:
    return ScoreTable(_components(reward), np.empty((0, len(reward.components))))


def _score(reward: Reward, clips: list[Clip]) -> ScoreTable:
    """Scores of one reward; where it raises, both halves again, down to the one clip that made it raise."""
    if not clips:
        return _empty(reward)
    components = _components(reward)
    try:
        table = reward.score(clips)
        shape = (len(clips), len(components))
        if table.values.shape != shape:
            raise ValueError(f"returned scores of shape {list(table.values.shape)}, expected {list(shape)}")
    except Exception as error:  # noqa: BLE001 - a reward is foreign code
        if len(clips) > 1:
            middle = len(clips) // 2
            return ScoreTable.cat([_score(reward, clips[:middle]), _score(reward, clips[middle:])])
        clip = clips[0]
        _LOG.warning("reward %s failed on %s sample %d", reward.name, clip.prompt.id, clip.sample, exc_info=True)
        why = f"{type(error).__name__}: {error}"
        missing = np.full((1, len(components)), np.nan)
        return ScoreTable(components, missing, {(0, k): why for k in range(len(components))})
    values = np.asarray(table.values, dtype=np.float64)
    reasons = {
        (int(b), int(k)): table.reasons.get((int(b), int(k)), f"{reward.name} returned {values[b, k]}")
        for b, k in np.argwhere(~np.isfinite(values))
    }
    return ScoreTable(components, np.where(np.isfinite(values), values, np.nan), reasons)
