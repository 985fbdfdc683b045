"""Guidance arithmetic, Euler steps, and how clips are dealt out."""

from __future__ import annotations

import pytest
import torch

from omninft.config import GuidanceConfig
from omninft.rollout.sampler import batches, collection_steps, guide
from omninft.types import Prompt, PromptGroup


def groups(count: int, size: int) -> list[PromptGroup]:
    return [PromptGroup(Prompt(f"p{i}", "v", "a", "av"), tuple(range(size))) for i in range(count)]


def keys(parts: tuple[PromptGroup, ...]) -> list[tuple[str, int]]:
    return [(g.prompt.id, s) for g in parts for s in g.samples]


def test_guidance_pushes_away_from_the_weaker_prediction() -> None:
    clean = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]])
    weaker = torch.tensor([[[0.0, 2.0], [4.0, 1.0]]])
    guided = guide(clean, [(weaker, 2.0)], GuidanceConfig())
    assert torch.equal(guided, torch.tensor([[[3.0, 2.0], [1.0, 13.0]]]))


def test_rescaling_by_one_restores_the_deviation_of_the_prediction() -> None:
    torch.manual_seed(0)
    clean, weaker = torch.randn(3, 7, 4), torch.randn(3, 7, 4)
    guided = guide(clean, [(weaker, 3.0)], GuidanceConfig(rescale=1.0))
    torch.testing.assert_close(guided.std(dim=(1, 2)), clean.std(dim=(1, 2)))
    half = guide(clean, [(weaker, 3.0)], GuidanceConfig(rescale=0.5))
    plain = guide(clean, [(weaker, 3.0)], GuidanceConfig())
    torch.testing.assert_close(half, 0.5 * guided + 0.5 * plain)


def test_batches_keep_the_order_and_cut_groups() -> None:
    made = list(batches(groups(3, 4), 5))
    assert [len(keys(b)) for b in made] == [5, 5, 2]
    assert [k for b in made for k in keys(b)] == [(f"p{i}", s) for i in range(3) for s in range(4)]
    assert made[0][1].samples == (0,)


@pytest.mark.parametrize(("count", "size", "world"), [(3, 3, 2), (1, 2, 4), (5, 2, 3)])
def test_clips_that_do_not_divide_are_shared_all_the_same(count: int, size: int, world: int) -> None:
    whole = [k for b in batches(groups(count, size), 4) for k in keys(b)]
    parts = [[k for b in batches(groups(count, size), 4, rank, world) for k in keys(b)] for rank in range(world)]
    assert [k for part in parts for k in part] == whole
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_processes_share_the_clips_without_gap_or_overlap() -> None:
    whole = [k for b in batches(groups(4, 4), 8) for k in keys(b)]
    parts = [[k for b in batches(groups(4, 4), 8, rank, 2) for k in keys(b)] for rank in range(2)]
    assert parts[0] + parts[1] == whole
    assert len(parts[0]) == 8


def test_collection_steps() -> None:
    assert collection_steps(20) == range(10, 19)
    assert collection_steps(40) == range(20, 37)
    for n in range(2, 200):
        steps = collection_steps(n)
        assert steps.start == n // 2
        assert steps.stop == min(9 * n // 10 + 1, n)
        assert steps.stop <= n
    assert collection_steps(1) == range(1)
    assert collection_steps(4, (1.0, 1.0)) == range(3, 4)
    for arguments in [(0,), (10, (0.9, 0.5)), (10, (-0.1, 0.5)), (10, (0.5, 1.1))]:
        with pytest.raises(ValueError, match="expected num_steps"):
            collection_steps(*arguments)
