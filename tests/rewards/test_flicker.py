from __future__ import annotations

import numpy as np
import pytest

from omninft.config import RewardConfig
from omninft.rewards.flicker import FlickerReward
from omninft.rewards.registry import build_reward
from omninft.types import Clip, Prompt
from tests.moving_clips import moving_clip


def grey(levels: list[int]) -> Clip:
    video = np.ones((len(levels), 4, 6, 3), np.uint8) * np.array(levels, np.uint8)[:, None, None, None]
    return Clip(video, 24.0, np.zeros((1, 0), np.float32), 16_000, Prompt("p", "", "", ""))


@pytest.mark.parametrize(
    ("levels", "score"),
    [
        ([7, 7, 7], 1.0),
        ([0, 51], 0.8),
        ([0, 51, 0, 51], 0.8),
        ([0, 255, 0], 0.0),
        ([10, 20, 20], 1 - 5 / 255),
        ([250, 0, 10], 1 - 130 / 255),  # unsigned bytes: 0 - 250 is 250 apart, not 6
    ],
)
def test_the_formula_of_vbench(levels, score):
    assert FlickerReward().score([grey(levels)]).values[0, 0] == pytest.approx(score, abs=1e-12)


def test_it_is_built_by_its_name_and_steers_the_video():
    reward = build_reward(RewardConfig(name="flicker", options={"workers": 2}))
    assert [(c.name, c.route, c.weight) for c in reward.components] == [("flicker", "video", 1.0)]
    assert reward.missing() is None


def test_one_frame_is_missing_and_the_others_are_scored():
    table = FlickerReward(workers=2).score([grey([0, 51]), grey([0]), grey([3, 3])])
    np.testing.assert_allclose(table.values[:, 0], [0.8, np.nan, 1.0])
    assert table.reasons == {(1, 0): "flicker needs 2 frames, found 1"}


def test_order_and_company_do_not_matter():
    make = [lambda seed=seed: moving_clip(seed, frames=5) for seed in range(4)]
    together = FlickerReward(workers=3).score([m() for m in make]).values
    alone = np.concatenate([FlickerReward(workers=1).score([m()]).values for m in make])
    backwards = FlickerReward(workers=3).score([m() for m in make[::-1]]).values
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, backwards[::-1])
    assert len(np.unique(together)) == 4
