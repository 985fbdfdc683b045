from __future__ import annotations

import numpy as np
import pytest

from omninft.config import RewardConfig
from omninft.rewards.clip import CLIPReward
from omninft.rewards.registry import build_reward
from omninft.types import Clip, OmniNFTError
from tests.moving_clips import moving_clip
from tests.scorers.test_clip import small_scorer


def swapped(clip: Clip) -> Clip:
    return Clip(
        np.ascontiguousarray(clip.video[..., ::-1]), clip.frame_rate, clip.waveform, clip.sample_rate, clip.prompt
    )


def test_the_reward_is_the_mean_cosine_over_the_frames():
    reward = CLIPReward(scorer=small_scorer())
    moving = moving_clip(1, frames=3)
    stills = [Clip(moving.video[[t]], 24.0, moving.waveform, 16_000, moving.prompt) for t in range(3)]
    whole, parts = reward.score([moving]).column("clip")[0], reward.score(stills).column("clip")
    # round(2 i / 47), i = 0 ... 47: 12 times the first frame, 24 times the second, 12 times the third.
    assert whole == pytest.approx((12 * parts[0] + 24 * parts[1] + 12 * parts[2]) / 48, abs=1e-6)
    assert -1 <= whole <= 1


def test_bgr_exchanges_red_and_blue_and_nothing_else():
    clip = moving_clip(2, frames=4)
    plain, exchanged = CLIPReward(scorer=small_scorer()), CLIPReward(bgr=True, scorer=small_scorer())
    assert exchanged.score([clip]).values == pytest.approx(plain.score([swapped(clip)]).values, abs=1e-6)
    assert abs(exchanged.score([clip]).values - plain.score([clip]).values) > 1e-4


def test_defaults_of_the_recipe():
    reward = build_reward(RewardConfig(name="clip"))
    assert [(c.name, c.route, c.weight) for c in reward.components] == [("clip", "video", 1.0)]
    assert reward.inputs == ("video", "prompt_v")
    with pytest.raises(OmniNFTError, match="bgr is 1, expected true or false"):
        build_reward(RewardConfig(name="clip", options={"bgr": 1}))


def test_what_cannot_be_judged_is_missing_and_the_rest_as_alone():
    reward = CLIPReward(scorer=small_scorer(), workers=2, budget=5)
    clips = [
        moving_clip(0, frames=3),
        moving_clip(1, frames=3, prompt_v=""),
        moving_clip(2, frames=2, prompt_v="green grass"),
    ]
    table = reward.score(clips)
    assert table.reasons == {(1, 0): "needs prompt_v, and the clip has none"}
    alone = [reward.score([clip]).values[0, 0] for clip in clips]
    np.testing.assert_allclose(table.values[:, 0], alone, atol=1e-5)
    np.testing.assert_allclose(reward.score(clips[::-1]).values[::-1, 0], alone, atol=1e-5)
    assert abs(alone[0] - alone[2]) > 1e-4
