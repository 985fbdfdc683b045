"""Batches for models whose inputs differ in length."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item", bound=Hashable)


def micro_batches(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Numbers of the inputs in batches of like length.

    A batch costs its size times its largest cost (padding is paid for) and stays within `budget`; an input above the
    budget goes alone. Every number appears once.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(costs)), key=lambda i: (costs[i], i)):
        if batches and (len(batches[-1]) + 1) * costs[number] <= budget:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def unique(items: Sequence[Item]) -> tuple[list[Item], list[int]]:
    """The different items in order of appearance, and where each input stands among them.

    The clips of a group share their prompts: texts are encoded once.
    """
    places: dict[Item, int] = {}
    index = [places.setdefault(item, len(places)) for item in items]
    return list(places), index
