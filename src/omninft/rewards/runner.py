"""Runs rewards on clips so that one bad clip, or one bad reward, costs no other score.

A score that could not be had is missing, with the reason; it is never 0. Rewards of different devices run side by
side, those of one device in turn; one with a time limit is left behind when it is over.
"""

from __future__ import annotations

import logging
import threading
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

    `max_missing_share` (0..1) is the share of missing scores of one component that `check_missing` still accepts. A
    reward may have a `device` ("cpu" otherwise): rewards of one device share a lane, lanes run at the same time. It may
    have a `time_limit` in seconds for one batch: past it, the batch is missing in its components, and so is every
    later one until the reward comes back. A thread cannot be stopped from outside, so a reward that hangs for good
    costs its thread, and nothing else.
    """

    def __init__(self, rewards: Sequence[Reward], max_missing_share: float = 0.5) -> None:
        if not 0 <= max_missing_share <= 1:
            raise OmniNFTError(f"max_missing_share must lie in 0..1, found {max_missing_share}")
        self.rewards = tuple(rewards)
        self.max_missing_share = max_missing_share
        # Tables that cannot be joined are an error now, not after the first clips were sampled.
        self.components = ScoreTable.join([_empty(reward) for reward in self.rewards]).components if rewards else ()
        self._lanes: dict[str, list[int]] = {}
        for number, reward in enumerate(self.rewards):
            self._lanes.setdefault(str(getattr(reward, "device", "cpu")), []).append(number)
        self._overdue: dict[int, Future[ScoreTable]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def score(self, clips: list[Clip]) -> ScoreTable:
        """[len(clips), components of all rewards]. Raises nothing that a reward raised, but KeyboardInterrupt."""
        if not self.rewards:
            return ScoreTable((), np.empty((len(clips), 0)))
        tables: dict[int, ScoreTable] = {}

        def run_lane(numbers: list[int]) -> None:
            for number in numbers:
                tables[number] = self._score_in_time(number, list(clips))

        if len(self._lanes) == 1:
            run_lane(list(range(len(self.rewards))))
        else:
            with ThreadPoolExecutor(len(self._lanes), thread_name_prefix="reward-lane") as pool:
                for lane in [pool.submit(run_lane, numbers) for numbers in self._lanes.values()]:
                    lane.result()
        return ScoreTable.join([tables[number] for number in range(len(self.rewards))])

    def _score_in_time(self, number: int, clips: list[Clip]) -> ScoreTable:
        reward = self.rewards[number]
        limit: float | None = getattr(reward, "time_limit", None)
        if limit is None:
            return _score(reward, clips)
        earlier = self._overdue.get(number)
        if earlier is not None and not earlier.done():
            return _missing(reward, clips, f"still busy with an earlier batch that took more than {limit:g} s")
        outcome = _in_daemon_thread(reward, clips)
        try:
            return outcome.result(limit)
        except TimeoutError:
            self._overdue[number] = outcome
            _LOG.warning("reward %s took more than %g s for %d clips", reward.name, limit, len(clips))
            return _missing(reward, clips, f"took more than {limit:g} s for a batch of {len(clips)} clips")

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
        _LOG.warning(
            "reward %s failed on %s sample %d",
            reward.name,
            clip.prompt.id,
            clip.sample,
            exc_info=not isinstance(error, OmniNFTError),
        )
        why = str(error) if isinstance(error, OmniNFTError) else f"{type(error).__name__}: {error}"
        return _missing(reward, clips, why)
    values = np.asarray(table.values, dtype=np.float64)
    reasons = {
        (int(b), int(k)): table.reasons.get((int(b), int(k)), f"{reward.name} returned {values[b, k]}")
        for b, k in np.argwhere(~np.isfinite(values))
    }
    return ScoreTable(components, np.where(np.isfinite(values), values, np.nan), reasons, table.moments)


def _missing(reward: Reward, clips: list[Clip], why: str) -> ScoreTable:
    components = _components(reward)
    reasons = {(b, k): why for b in range(len(clips)) for k in range(len(components))}
    return ScoreTable(components, np.full((len(clips), len(components)), np.nan), reasons)


def _in_daemon_thread(reward: Reward, clips: list[Clip]) -> Future[ScoreTable]:
    """`_score` in a thread that does not keep the process alive, as those of an executor would."""
    outcome: Future[ScoreTable] = Future()

    def work() -> None:
        try:
            outcome.set_result(_score(reward, clips))
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            outcome.set_exception(error)

    threading.Thread(target=work, name=f"reward-{reward.name}", daemon=True).start()
    return outcome
