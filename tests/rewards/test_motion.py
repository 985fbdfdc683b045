from __future__ import annotations

import numpy as np
import pytest

from omninft.config import RewardConfig
from omninft.rewards.motion import MotionReward, motion
from omninft.rewards.registry import build_reward
from omninft.types import OmniNFTError
from tests.moving_clips import moving_clip
from tests.scorers.test_flow import shifting, silent


def test_speed_is_in_shorter_sides_per_second():
    # 2 pixels a frame at 12 Hz over 96 pixels: a quarter of the picture a second.
    assert motion(silent(shifting(2), 12.0)) == pytest.approx(0.25, rel=0.2)
    assert motion(silent(shifting(2), 24.0)) == pytest.approx(2 * motion(silent(shifting(2), 12.0)), rel=1e-12)
    assert motion(silent(shifting(0))) < 0.005


def test_more_motion_scores_more():
    speeds = [motion(silent(shifting(step))) for step in (0, 1, 2, 3)]
    assert speeds == sorted(speeds)
    assert speeds[1] > 0.05


def test_it_speaks_for_the_pixels_that_move_most():
    video = shifting(0, size=128).copy()
    moving = shifting(2, size=128)
    video[:, :32, :64] = moving[:, :32, :64]  # an eighth of the picture
    # The window of 15 pixels blurs the edge of so small a patch.
    assert motion(silent(video)) == pytest.approx(2 * 12 / 128, rel=0.4)


def test_small_frames_are_measured_on_the_enlarged_scale():
    large, small = silent(shifting(4, size=96)), silent(shifting(4, size=96)[:, ::2, ::2])
    assert motion(small) == pytest.approx(motion(large), rel=0.25)


def test_table_of_a_batch():
    reward = build_reward(RewardConfig(name="motion"))
    assert [(c.name, c.route, c.unit) for c in reward.components] == [("motion", "video", "frame sides/s")]
    clips = [moving_clip(0, frames=4), moving_clip(1, frames=1), moving_clip(2, frames=4)]
    table = reward.score(clips)
    assert table.reasons == {(1, 0): "optical flow needs 2 frames, found 1"}
    alone = MotionReward(workers=1).score([moving_clip(2, frames=4)]).values[0, 0]
    assert table.values[2, 0] == alone > 0
    np.testing.assert_array_equal(reward.score(clips[::-1]).values, table.values[::-1])


def test_shrunk_frames_have_about_the_same_speed_for_less_work():
    clip = silent(shifting(4, size=192))
    full, half = MotionReward().score([clip]).values[0, 0], MotionReward(shrink=2).score([clip]).values[0, 0]
    assert half == pytest.approx(full, rel=0.2)
    assert half != full
    for shrink in (0, 1.5, True, "2"):
        with pytest.raises(OmniNFTError, match=r"shrink is .*, expected a whole number from 1 to 8"):
            build_reward(RewardConfig(name="motion", options={"shrink": shrink}))
