"""Fixed evaluation sets: which clips, paired rows, files shown, and values that come back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from omninft.config import SamplingConfig
from omninft.distributed import Processes
from omninft.evaluation.held_out import EvaluationScores, Evaluator, load_scores, save_scores
from omninft.models.ltx2 import LTX2Policy
from omninft.noise import Occasion
from omninft.prompts.sampler import evaluation_groups, spread
from omninft.rewards.runner import RewardRunner
from omninft.rollout.sampler import RolloutSampler
from omninft.types import Clip, Prompt, ScoreTable
from omninft.worlds.wording import world_prompts
from tests.random_models import make_policy


def test_clips_are_spread_over_the_prompts() -> None:
    prompts = tuple(Prompt(str(i), "v", "a", "av") for i in range(10))
    few = evaluation_groups(prompts, 4)
    assert [g.prompt.id for g in few] == ["0", "2", "5", "7"]
    assert [g.samples for g in few] == [(0,)] * 4
    many = evaluation_groups(prompts, 23)
    assert sum(len(g.samples) for g in many) == 23
    assert [len(g.samples) for g in many] == [3] * 3 + [2] * 7


@pytest.mark.parametrize(("count", "among", "expected"), [(2, 8, [0, 4]), (9, 3, [0, 1, 2]), (0, 5, [])])
def test_spread(count: int, among: int, expected: list[int]) -> None:
    assert spread(count, among) == expected


def test_scores_come_back_with_their_holes(tmp_path: Path) -> None:
    scores = EvaluationScores(("a", "b"), np.array([[0.1, np.nan], [1 / 3, 2.0]]), ("p", "q"))
    save_scores(tmp_path / "v.json", scores)
    again = load_scores(tmp_path / "v.json")
    np.testing.assert_array_equal(again.values, scores.values)
    assert (again.names, again.prompt_ids) == (scores.names, scores.prompt_ids)


SEED = 1_000_003


def evaluator(policy: LTX2Policy, batch_size: int, occasion: Occasion = Occasion.DEV) -> Evaluator:
    from omninft.config import RewardConfig
    from omninft.rewards.registry import build_reward

    reward = build_reward(RewardConfig(name="tests.test_train:brightness", route="video"))
    sampler = RolloutSampler(policy, SamplingConfig(num_steps=2, batch_size=batch_size))
    prompts = tuple(world_prompts("dev"))[:3]
    return Evaluator(
        sampler, evaluation_groups(prompts, 5), SEED, occasion, RewardRunner([reward]).score, Processes(), shown=2
    )


def test_rows_do_not_depend_on_the_batch_and_splits_share_no_noise(tmp_path: Path) -> None:
    policy = make_policy()
    whole = evaluator(policy, 5).run("reference", tmp_path / "shown")
    parts = evaluator(policy, 2).run("reference", None)
    other = evaluator(policy, 5, occasion=Occasion.TEST).run("reference", None)
    assert whole.prompt_ids == parts.prompt_ids
    np.testing.assert_allclose(whole.values, parts.values, atol=2e-3)  # float rounding before uint8
    assert np.abs(whole.values - other.values).max() > 1e-3
    listing = json.loads((tmp_path / "shown" / "scores.json").read_text())["clips"]
    assert len(listing) == 2
    for entry in listing:
        assert (tmp_path / "shown" / entry["file"]).stat().st_size > 500
    for entry, row in zip(listing, (0, 2), strict=True):  # evenly spaced among the five
        assert entry["scores"]["brightness"] == pytest.approx(whole.values[row, 0])
        assert entry["prompt_id"] == whole.prompt_ids[row]
    assert len({entry["scores"]["brightness"] for entry in listing}) == 2


def test_a_missing_score_is_written_as_null_with_its_reason(tmp_path: Path) -> None:
    policy = make_policy()
    made = evaluator(policy, 5)
    component = made.score([]).components

    def score(clips: list[Clip]) -> ScoreTable:
        values = np.full((len(clips), 1), np.nan)
        return ScoreTable(component, values, {(b, 0): "too dark" for b in range(len(clips))})

    made.score = score
    made.run("reference", tmp_path)
    entry = json.loads((tmp_path / "scores.json").read_text())["clips"][0]
    assert entry["scores"] == {"brightness": None}
    assert entry["reasons"] == {"brightness": "too dark"}


class Simulated:
    """One of several processes, run one after another; `gather` sees what each of them gave, in turn."""

    def __init__(self, rank: int, world: int, given: list[list[object]]) -> None:
        self.rank, self.world, self._given, self._call = rank, world, given, 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: object) -> list[object]:
        while len(self._given) <= self._call:
            self._given.append([])
        self._given[self._call].append(value)
        self._call += 1
        return list(self._given[self._call - 1])

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))


@pytest.mark.parametrize("world", [2, 3, 7])
def test_no_clip_is_lost_where_they_do_not_divide_among_processes(world: int) -> None:
    policy = make_policy()
    whole = evaluator(policy, 5).run("reference", None)
    given: list[list[object]] = []
    for rank in range(world):
        made = evaluator(policy, 5)
        made.processes = Simulated(rank, world, given)  # type: ignore[assignment]
        scores = made.run("reference", None)  # the last process has seen what all gave
    assert scores.prompt_ids == whole.prompt_ids
    assert len(scores.values) == 5
    np.testing.assert_allclose(scores.values, whole.values, atol=2e-3)
