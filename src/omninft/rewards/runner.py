"""Runs rewards on clips so that one bad clip, or one bad reward, costs no other score.

A score that could not be had is missing, with the reason; it is never 0. Rewards of different devices run side by
side, those of one device in turn; one with a time limit is left behind when it is over.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TypeVar

import numpy as np

from omninft.rewards.failures import FailureLog, is_out_of_memory, reason_of
from omninft.rewards.registry import Reward
from omninft.types import Clip, Component, OmniNFTError, ScoreTable

T = TypeVar("T")
_REASONS_SHOWN = 5


class RewardRunner:
    """Scores clips by several rewards; in the background, one batch after another, where asked to.

    `max_missing_share` (0..1) is the share of missing scores of one component that `check_missing` still accepts. A
    reward may have a `device` ("cpu" otherwise): rewards of one device share a lane, lanes run at the same time. It may
    have a `time_limit` in seconds for one batch: past it, the batch is missing in its components, and so is every
    later one until the reward comes back. A thread cannot be stopped from outside, so a reward that hangs for good
    costs its thread, and nothing else: no thread here keeps the process alive.

    Rewards get clips whose arrays are read-only, a list of their own, and leave the working folder as it was. What they
    raise goes to `failures`, which several runners may share.
    """

    def __init__(
        self, rewards: Sequence[Reward], max_missing_share: float = 0.5, failures: FailureLog | None = None
    ) -> None:
        if not 0 <= max_missing_share <= 1:
            raise OmniNFTError(f"max_missing_share must lie in 0..1, found {max_missing_share}")
        self.rewards = tuple(rewards)
        self.max_missing_share = max_missing_share
        self.failures = failures or FailureLog()
        # Tables that cannot be joined are an error now, not after the first clips were sampled.
        self.components = ScoreTable.join([_empty(reward) for reward in self.rewards]).components if rewards else ()
        self._lanes: dict[str, list[int]] = {}
        for number, reward in enumerate(self.rewards):
            self._lanes.setdefault(str(getattr(reward, "device", "cpu")), []).append(number)
        self._overdue: dict[int, Future[ScoreTable]] = {}
        self._work: queue.SimpleQueue[Callable[[], None] | None] | None = None
        self._worker: threading.Thread | None = None
        self._dropped = False

    def score(self, clips: list[Clip]) -> ScoreTable:
        """[len(clips), components of all rewards]. Of what rewards raise, only KeyboardInterrupt and the like pass.

        Raises:
            OmniNFTError: a reward ran out of memory. It would again, and clips without scores would hide that.
        """
        if not self.rewards:
            return ScoreTable((), np.empty((len(clips), 0)))
        tables: dict[int, ScoreTable] = {}
        guarded, folder = [clip.read_only() for clip in clips], _working_folder()

        def run_lane(numbers: list[int]) -> None:
            for number in numbers:
                try:
                    tables[number] = self._score_in_time(number, list(guarded))
                finally:
                    _return_to(folder)

        if len(self._lanes) == 1:
            run_lane(list(range(len(self.rewards))))
        else:
            lanes = [
                _in_daemon_thread(partial(run_lane, numbers), f"reward-lane-{name}")
                for name, numbers in self._lanes.items()
            ]
            for lane in lanes:
                lane.result()
        return ScoreTable.join([tables[number] for number in range(len(self.rewards))])

    def _score_in_time(self, number: int, clips: list[Clip]) -> ScoreTable:
        reward = self.rewards[number]
        limit: float | None = getattr(reward, "time_limit", None)
        if limit is None:
            return self._score(reward, clips)
        earlier = self._overdue.get(number)
        if earlier is not None and not earlier.done():
            return _missing(reward, clips, f"still busy with an earlier batch that took more than {limit:g} s")
        outcome = _in_daemon_thread(lambda: self._score(reward, clips), f"reward-{reward.name}")
        try:
            return outcome.result(limit)
        except TimeoutError:
            self._overdue[number] = outcome
            why = f"took more than {limit:g} s for a batch of {len(clips)} clips"
            self.failures.late(reward.name, why)
            return _missing(reward, clips, why)

    def submit(self, clips: list[Clip]) -> Future[ScoreTable]:
        """`score` on the one background thread: batches are scored in the order in which they were submitted."""
        if self._work is None:
            # Not an executor's thread, which the interpreter waits for at its end, however long a reward hangs.
            self._work, self._dropped = queue.SimpleQueue(), False
            self._worker = threading.Thread(target=self._run, args=(self._work,), name="rewards", daemon=True)
            self._worker.start()
        outcome: Future[ScoreTable] = Future()
        batch = list(clips)

        def task() -> None:
            if self._dropped:
                outcome.cancel()
            # Whoever asked may have cancelled it, too; from here on nobody can.
            if outcome.set_running_or_notify_cancel():
                _settle(outcome, lambda: self.score(batch))

        self._work.put(task)
        return outcome

    def _run(self, work: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        while (task := work.get()) is not None:
            task()

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

    def close(self, wait: bool = True) -> None:
        """Drop what was submitted and not begun, end the background thread, count what failed.

        Waits for a batch that was begun, unless told not to.
        """
        if self._work is not None and self._worker is not None:
            self._dropped = True
            self._work.put(None)
            if wait:
                self._worker.join()
            self._work = self._worker = None
        self.failures.summarise()

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(wait=not isinstance(error, KeyboardInterrupt))

    def _score(self, reward: Reward, clips: list[Clip]) -> ScoreTable:
        """Scores of one reward; where it raises, both halves again, down to the one clip that made it raise."""
        if not clips:
            return _empty(reward)
        try:
            table = reward.score(list(clips))
            shape = (len(clips), len(reward.components))
            if table.values.shape != shape:
                raise ValueError(f"returned scores of shape {list(table.values.shape)}, expected {list(shape)}")
        except Exception as error:  # a reward is foreign code
            if is_out_of_memory(error):
                raise OmniNFTError(
                    f"reward {reward.name} ran out of memory on a batch of {len(clips)} clips ({_first_line(error)}); "
                    "give it smaller batches (sampling.batch_size, or its option budget), another device (its option "
                    "device), or a process of its own (`omninft serve`, and the reward remote)"
                ) from error
            failed = error
        else:
            return _checked(reward, table)
        # Outside of `except`, so that the errors of halves are not chained to those of the whole.
        if len(clips) > 1:
            middle = len(clips) // 2
            return ScoreTable.cat([self._score(reward, clips[:middle]), self._score(reward, clips[middle:])])
        self.failures.add(reward.name, clips[0], failed)
        return _missing(reward, clips, reason_of(failed))


def missing_counts(table: ScoreTable) -> dict[str, int]:
    """Missing scores per component."""
    counts = (~table.valid).sum(axis=0)
    return {component.name: int(count) for component, count in zip(table.components, counts, strict=True)}


def _components(reward: Reward) -> tuple[Component, ...]:
    return tuple(spec.component for spec in reward.components)


def _empty(reward: Reward) -> ScoreTable:
    return ScoreTable(_components(reward), np.empty((0, len(reward.components))))


def _checked(reward: Reward, table: ScoreTable) -> ScoreTable:
    """A reward's table, with a reason for every score that is not finite."""
    values = np.asarray(table.values, dtype=np.float64)
    reasons = {
        (int(b), int(k)): table.reasons.get((int(b), int(k)), f"{reward.name} returned {values[b, k]}")
        for b, k in np.argwhere(~np.isfinite(values))
    }
    return ScoreTable(_components(reward), np.where(np.isfinite(values), values, np.nan), reasons, table.moments)


def _missing(reward: Reward, clips: list[Clip], why: str) -> ScoreTable:
    components = _components(reward)
    reasons = {(b, k): why for b in range(len(clips)) for k in range(len(components))}
    return ScoreTable(components, np.full((len(clips), len(components)), np.nan), reasons)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _return_to(folder: str | None) -> None:
    if folder is not None and _working_folder() != folder:
        with suppress(OSError):
            os.chdir(folder)


def _settle(outcome: Future[T], work: Callable[[], T]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
        outcome.set_exception(error)


def _in_daemon_thread(work: Callable[[], T], name: str) -> Future[T]:
    """`work` in a thread that does not keep the process alive, as those of an executor would."""
    outcome: Future[T] = Future()
    threading.Thread(target=_settle, args=(outcome, work), name=name, daemon=True).start()
    return outcome
