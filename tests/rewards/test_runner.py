from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch

from omninft.rewards.failures import FailureLog
from omninft.rewards.registry import CallableReward, ComponentSpec
from omninft.rewards.runner import RewardRunner, missing_counts
from omninft.types import Clip, Component, OmniNFTError, Prompt, ScoreTable


def clips(count: int) -> list[Clip]:
    return [
        Clip(np.zeros((1, 2, 2, 3), np.uint8), 12.0, np.zeros((1, 4), np.float32), 16_000, Prompt("p", "", "", ""), i)
        for i in range(count)
    ]


def reward(name: str, function: Callable[[list[Clip]], object]) -> CallableReward:
    return CallableReward(name, function, (ComponentSpec(name, "joint", ""),))  # type: ignore[arg-type]


def samples(batch: list[Clip]) -> list[float]:
    return [float(c.sample) for c in batch]


class Two:
    """Two components; infinite or unexplained where the sample number says so."""

    name, inputs, licence, model = "two", ("video",), "none", None
    components = (ComponentSpec("first", "video", ""), ComponentSpec("second", "audio", "", higher_is_better=False))

    def score(self, batch: list[Clip]) -> ScoreTable:
        values = np.array([[c.sample, -c.sample] for c in batch], dtype=np.float64)
        reasons = {}
        for b, c in enumerate(batch):
            if c.sample == 1:
                values[b, 0] = np.inf
            if c.sample == 2:
                values[b, 1], reasons[b, 1] = np.nan, "too quiet"
        return ScoreTable(tuple(s.component for s in self.components), values, reasons)


def test_columns_of_all_rewards_side_by_side():
    table = RewardRunner([reward("a", samples), Two()]).score(clips(4))
    assert table.names == ("a", "first", "second")
    assert table.components[2] == Component("second", "audio", -1.0)
    np.testing.assert_array_equal(table.column("a"), [0, 1, 2, 3])
    np.testing.assert_array_equal(table.column("first"), [0, np.nan, 2, 3])
    assert table.reasons == {(1, 1): "two returned inf", (2, 2): "too quiet"}


@pytest.mark.parametrize("culprit", range(7))
def test_only_the_culprit_of_a_raising_batch_is_missing(culprit):
    calls = []

    def fragile(batch):
        calls.append(len(batch))
        if any(c.sample == culprit for c in batch):
            raise RuntimeError("cannot look at this")
        return samples(batch)

    table = RewardRunner([reward("fragile", fragile), reward("sound", samples)]).score(clips(7))
    expected = np.arange(7.0)
    expected[culprit] = np.nan
    np.testing.assert_array_equal(table.column("fragile"), expected)
    np.testing.assert_array_equal(table.column("sound"), np.arange(7.0))
    assert table.reasons == {(culprit, 0): "RuntimeError: cannot look at this"}
    assert len(calls) <= 1 + 2 * 3


def test_a_reward_of_several_components_is_missing_in_all_of_them():
    class Broken(Two):
        def score(self, batch):
            raise OSError("service down")

    table = RewardRunner([Broken()]).score(clips(3))
    assert not table.valid.any()
    assert table.reasons == {(b, k): "OSError: service down" for b in range(3) for k in range(2)}
    assert missing_counts(table) == {"first": 3, "second": 3}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "returned None"),
        (float("nan"), "odd returned nan"),
        (float("-inf"), "odd returned -inf"),
        ("text", "ValueError: could not convert string to float: 'text'"),
    ],
)
def test_a_score_that_is_no_number_is_missing_never_0(given, reason):
    odd = reward("odd", lambda batch: [given if c.sample == 1 else 0.5 for c in batch])
    table = RewardRunner([odd]).score(clips(3))
    np.testing.assert_array_equal(table.values[:, 0], [0.5, np.nan, 0.5])
    assert table.reasons == {(1, 0): reason}


def test_tensors_and_arrays_are_scores():
    given = reward("tensors", lambda batch: torch.tensor([0.25 * c.sample for c in batch]))
    np.testing.assert_array_equal(RewardRunner([given]).score(clips(3)).values[:, 0], [0, 0.25, 0.5])


def test_a_wrong_number_of_scores_is_narrowed_down_to_single_clips():
    def forgetful(batch):
        return [float(c.sample) for c in batch if c.sample != 2]

    table = RewardRunner([reward("forgetful", forgetful)]).score(clips(5))
    np.testing.assert_array_equal(table.values[:, 0], [0, 1, np.nan, 3, 4])
    assert table.reasons == {(2, 0): "ValueError: forgetful returned 0 scores for 1 clips"}


def test_a_table_of_the_wrong_shape_is_narrowed_down():
    class Shapeless(Two):
        def score(self, batch):
            table = super().score(batch)
            return ScoreTable(table.components, table.values[:, :1]) if any(c.sample == 3 for c in batch) else table

    table = RewardRunner([Shapeless()]).score([c for c in clips(5) if c.sample not in (1, 2)])
    assert table.valid.tolist() == [[True, True], [False, False], [True, True]]
    assert "[1, 1]" in table.reasons[1, 0]


def test_an_interrupt_passes_through():
    def interrupted(batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RewardRunner([reward("slow", interrupted)]).score(clips(4))


def test_two_components_of_one_name_are_refused_at_once():
    with pytest.raises(OmniNFTError, match="same name: twin"):
        RewardRunner([reward("twin", samples), reward("twin", samples)])


def test_nothing_to_score():
    table = RewardRunner([reward("a", samples)]).score([])
    assert table.values.shape == (0, 1)
    assert RewardRunner([]).score(clips(3)).values.shape == (3, 0)


def test_submitted_batches_run_in_the_background_in_order():
    gate, order = threading.Event(), []

    def slow(batch):
        gate.wait(5)
        order.append(batch[0].sample)
        return samples(batch)

    threads = torch.get_num_threads()
    with RewardRunner([reward("slow", slow)]) as runner:
        futures = [runner.submit(clips(4)[i:]) for i in range(4)]
        assert not futures[0].done()
        assert order == []
        gate.set()
        tables = [f.result(timeout=5) for f in futures]
    assert order == [0, 1, 2, 3]
    assert [t.values[0, 0] for t in tables] == [0, 1, 2, 3]
    assert torch.get_num_threads() == threads


def test_submitted_clips_may_be_dropped_by_the_caller():
    with RewardRunner([reward("a", samples)]) as runner:
        batch = clips(3)
        future = runner.submit(batch)
        batch.clear()
        assert future.result(timeout=5).values.shape == (3, 1)


def test_an_interrupt_in_the_background_reaches_the_waiter():
    def interrupted(batch):
        raise KeyboardInterrupt

    with RewardRunner([reward("slow", interrupted)]) as runner, pytest.raises(KeyboardInterrupt):
        runner.submit(clips(2)).result(timeout=5)


def half_missing(count: int = 10) -> ScoreTable:
    values = np.zeros((count, 2))
    values[: count // 2 + 1, 1] = np.nan
    reasons = {(b, 1): f"ValueError: reason {b % 7}" for b in range(count // 2 + 1)}
    return ScoreTable((Component("whole", "video"), Component("torn", "audio")), values, reasons)


def test_too_many_missing_scores_stop_with_the_reasons():
    with pytest.raises(OmniNFTError, match=r"more than 50%.*torn on 6 of 10 clips") as error:
        RewardRunner([]).check_missing(half_missing())
    assert "whole" not in str(error.value)
    assert str(error.value).count("1 x ValueError") == 5
    assert "and 1 more reasons" in str(error.value)


def test_the_most_frequent_reason_comes_first():
    values = np.full((4, 1), np.nan)
    table = ScoreTable(
        (Component("a", "video"),), values, {(0, 0): "rare", (1, 0): "often", (2, 0): "often", (3, 0): "often"}
    )
    with pytest.raises(OmniNFTError, match="3 x often; 1 x rare"):
        RewardRunner([]).check_missing(table)


def test_the_allowed_share_is_still_accepted():
    table = half_missing()
    RewardRunner([], max_missing_share=0.6).check_missing(table)
    RewardRunner([], max_missing_share=1.0).check_missing(table)
    with pytest.raises(OmniNFTError, match="more than 59%"):
        RewardRunner([], max_missing_share=0.59).check_missing(table)
    with pytest.raises(OmniNFTError, match=r"0\.\.1, found 1\.5"):
        RewardRunner([], max_missing_share=1.5)


def test_missing_scores_are_counted_per_component():
    assert missing_counts(half_missing()) == {"whole": 0, "torn": 6}


class Placed(Two):
    """Waits for the others before it answers."""

    def __init__(self, name, device, wait, time_limit=None):
        self.name, self.device, self.wait, self.time_limit = name, device, wait, time_limit
        self.components = (ComponentSpec(name, "video", ""),)

    def score(self, batch):
        self.wait()
        return ScoreTable((Component(self.name, "video"),), np.ones((len(batch), 1)))


def test_rewards_of_different_devices_run_at_the_same_time():
    meeting = threading.Barrier(2)
    runner = RewardRunner([Placed(f"on {d}", d, lambda: meeting.wait(5)) for d in ("cuda:0", "cuda:1")])
    table = runner.score(clips(2))  # a barrier that only one of them reaches breaks, and its scores were missing
    assert table.names == ("on cuda:0", "on cuda:1")
    assert table.valid.all()


def test_rewards_of_one_device_run_in_turn():
    inside, most = [], []

    def work():
        inside.append(1)
        most.append(len(inside))
        inside.pop()

    RewardRunner([Placed(n, "cuda:0", work) for n in "abc"]).score(clips(1))
    assert most == [1, 1, 1]


def test_past_its_time_limit_a_batch_is_missing_until_the_reward_is_back():
    gate = threading.Event()
    slow = Placed("slow", "cpu", lambda: gate.wait(10), time_limit=0.05)
    runner = RewardRunner([slow, reward("quick", samples)])
    first, second = runner.score(clips(3)), runner.score(clips(2))
    assert not first.column("slow")[np.isfinite(first.column("slow"))].size
    assert first.reasons[2, 0] == "took more than 0.05 s for a batch of 3 clips"
    assert second.reasons[1, 0] == "still busy with an earlier batch that took more than 0.05 s"
    np.testing.assert_array_equal(first.column("quick"), [0, 1, 2])
    gate.set()
    runner._overdue[0].result(5)
    slow.time_limit = 5
    np.testing.assert_array_equal(runner.score(clips(2)).column("slow"), [1, 1])


def test_an_interrupt_passes_through_a_time_limit():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RewardRunner([Placed("slow", "cpu", interrupted, time_limit=5)]).score(clips(2))


def brightness(batch):
    return [float(c.video.mean() + c.waveform.mean()) for c in batch]


def noisy_clips(count: int) -> list[Clip]:
    numbers = np.random.default_rng(0)
    return [
        Clip(
            numbers.integers(1, 255, (2, 4, 4, 3), np.uint8),
            12.0,
            numbers.random((1, 8), np.float32),
            16_000,
            Prompt("p", "", "", ""),
            i,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("part", ["video", "waveform"])
def test_a_reward_that_writes_into_clips_spoils_no_other(part):
    def spoils(batch):
        for clip in batch:
            getattr(clip, part)[:] = 0
        return [0.0] * len(batch)

    given = noisy_clips(3)
    expected = brightness(given)
    table = RewardRunner([reward("spoils", spoils), reward("honest", brightness)]).score(given)
    np.testing.assert_array_equal(table.column("honest"), expected)
    assert not np.isfinite(table.column("spoils")).any()
    assert table.reasons[0, 0].startswith("clips are read-only: copy the array first (ValueError:")
    given[0].video[:] = 0  # the caller's arrays are the caller's


def test_a_reward_that_empties_its_list_empties_no_other():
    def takes(batch):
        found = samples(batch)
        batch.clear()
        return found

    table = RewardRunner([reward("takes", takes), reward("after", samples)]).score(clips(3))
    assert table.reasons[0, 0].startswith("ValueError: takes returned")
    np.testing.assert_array_equal(table.column("after"), [0, 1, 2])


@pytest.mark.parametrize("time_limit", [None, 5])
def test_a_reward_that_changes_the_working_folder_moves_nothing(tmp_path, monkeypatch, time_limit):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    seen = []
    rewards = [
        Placed("wanders", "cpu", lambda: os.chdir(tmp_path / "elsewhere"), time_limit),
        Placed("after", "cpu", lambda: seen.append(os.getcwd())),
    ]
    RewardRunner(rewards).score(clips(2))
    assert seen == [str(tmp_path)]
    assert os.getcwd() == str(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_out_of_memory_is_no_missing_score(error, device):
    def hungry():
        raise error

    rewards = [Placed("hungry", device, hungry, 5), reward("other", samples)]
    with (
        RewardRunner(rewards, max_missing_share=1.0) as runner,
        pytest.raises(OmniNFTError, match=r"reward hungry ran out of memory on a batch of 4 clips .*omninft serve"),
    ):
        runner.submit(clips(4)).result(5)


def test_an_error_that_memory_caused_is_one_of_memory():
    def wraps(batch):
        try:
            raise MemoryError
        except MemoryError as cause:
            raise OmniNFTError("the judge failed") from cause

    with pytest.raises(OmniNFTError, match="wraps ran out of memory"):
        RewardRunner([reward("wraps", wraps)]).score(clips(1))


def test_an_error_is_told_once_and_counted_and_all_are_in_the_file(tmp_path, caplog):
    def broken(batch):
        raise RuntimeError(f"cannot read frame {batch[0].sample}")

    log = tmp_path / "rewards.log"
    with RewardRunner([reward("broken", broken), reward("sound", samples)], failures=FailureLog(log)) as runner:
        assert not log.exists()
        runner.score(clips(4))
        runner.score(clips(2))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("reward broken failed on p sample 0: RuntimeError: cannot read frame 0 (")
    assert str(log) in lines[0]
    assert lines[1] == "reward broken failed 6 times in all: RuntimeError: cannot read frame 0"
    assert not any(record.exc_info for record in caplog.records)
    text = log.read_text()
    assert text.count("Traceback") == 1
    assert text.count("failed on p sample") == 6
    assert "cannot read frame 3" in text


def test_two_errors_of_one_reward_are_told_apart(tmp_path, caplog):
    def two(batch):
        if batch[0].sample % 2:
            raise KeyError("a")
        raise RuntimeError("b")

    with RewardRunner([reward("two", two)]) as runner:
        runner.score(clips(1))
        runner.score(clips(2)[1:])
    assert len(caplog.records) == 2


def test_a_batch_that_is_cancelled_is_left_out_and_the_next_is_scored():
    gate, begun = threading.Event(), threading.Event()

    def waits(batch):
        begun.set()
        gate.wait(5)
        return samples(batch)

    with RewardRunner([reward("waits", waits)]) as runner:
        futures = [runner.submit(clips(n)) for n in (1, 2, 3)]
        begun.wait(5)
        assert not futures[0].cancel()
        assert futures[1].cancel()
        gate.set()
        assert [len(f.result(5).values) for f in (futures[0], futures[2])] == [1, 3]


def test_closing_without_waiting_leaves_a_reward_that_hangs():
    gate, begun = threading.Event(), threading.Event()

    def hangs(batch):
        begun.set()
        gate.wait(10)
        return samples(batch)

    runner = RewardRunner([reward("hangs", hangs)])
    first, second = runner.submit(clips(1)), runner.submit(clips(1))
    begun.wait(5)
    start = time.monotonic()
    runner.close(wait=False)
    assert time.monotonic() - start < 1
    gate.set()
    assert first.result(5).values.shape == (1, 1)
    with pytest.raises(CancelledError):
        second.result(5)
