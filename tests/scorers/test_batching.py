from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from omninft.scorers.batching import micro_batches, unique


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 100))
def test_micro_batches_hold_every_input_once_within_the_budget(costs: list[int], budget: int) -> None:
    batches = micro_batches(costs, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(costs)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(costs[i] for i in batch) <= budget


def test_inputs_of_like_length_go_together() -> None:
    assert micro_batches([9, 1, 10, 2, 1], 20) == [[1, 4, 3], [0, 2]]


def test_unique_keeps_the_first_appearance() -> None:
    assert unique(["b", "a", "b", "c", "a"]) == (["b", "a", "c"], [0, 1, 0, 2, 1])
