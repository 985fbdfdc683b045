from __future__ import annotations

import numpy as np
import pytest

from omninft.config import RewardConfig
from omninft.rewards.av_align import AVAlignReward
from omninft.rewards.registry import build_reward
from omninft.scorers.av_align import av_align
from omninft.types import OmniNFTError
from tests.moving_clips import moving_clip, with_sound
from tests.scorers.test_av_align import RATE, clicks, clip_of, jolts


def test_it_is_built_by_its_name_and_steers_both_streams():
    reward = build_reward(RewardConfig(name="av_align"))
    assert [(c.name, c.route, c.weight) for c in reward.components] == [("av_align", "joint", 1.0)]
    assert reward.inputs == ("video", "audio")
    assert reward.missing() is None


def test_scores_and_reasons_of_a_batch():
    video = jolts([6, 16])
    clips = [
        clip_of(video, clicks([6 / 12, 16 / 12])),
        clip_of(video, np.zeros((1, 0))),
        clip_of(video[:1], clicks([0.5])),
        clip_of(video, np.zeros(2 * RATE)),
    ]
    table = AVAlignReward(workers=3).score(clips)
    assert table.values[0, 0] > 0.6
    assert np.isnan(table.values[1:3, 0]).all()
    assert table.values[3, 0] == 0  # no peak of sound: the published score, not a failure
    assert table.reasons == {(1, 0): "the clip has no sound", (2, 0): "optical flow needs 2 frames, found 1"}


def test_order_and_company_do_not_matter():
    seeds = range(4)
    together = AVAlignReward(workers=2).score([moving_clip(s, frames=20) for s in seeds]).values
    np.testing.assert_array_equal(together[:, 0], [av_align(moving_clip(s, frames=20)) for s in seeds])
    np.testing.assert_array_equal(
        AVAlignReward(workers=2).score([moving_clip(s, frames=20) for s in seeds[::-1]]).values, together[::-1]
    )


def test_the_flow_is_shared_with_the_reward_of_motion(monkeypatch):
    clip = moving_clip(1, frames=6, height=96, width=96)
    before = build_reward(RewardConfig(name="motion")).score([clip]).values
    monkeypatch.setattr("omninft.scorers.flow.cv2.calcOpticalFlowFarneback", None)
    assert np.isfinite(AVAlignReward().score([clip]).values).all()
    assert np.isfinite(before).all()
    assert with_sound(clip, clip.waveform).views == {}


def test_shrink_reaches_the_flow():
    clip = moving_clip(1, frames=4, height=128, width=128)
    AVAlignReward(shrink=2).score([clip])
    assert clip.views["flow-2-1"].short_side == 64
    assert "flow-1-1" not in clip.views
    with pytest.raises(OmniNFTError, match="shrink is 9"):
        build_reward(RewardConfig(name="av_align", options={"shrink": 9}))
