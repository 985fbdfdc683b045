from __future__ import annotations

import numpy as np
import pytest

from omninft.config import RewardConfig
from omninft.rewards.audiobox import AudioBoxReward
from omninft.rewards.registry import build_reward
from omninft.types import OmniNFTError
from tests.moving_clips import moving_clip, with_sound
from tests.scorers.test_audiobox import small_scorer


class Ratings:
    """Gives set ratings and keeps what it was asked."""

    def __init__(self, rows: list[list[float]]) -> None:
        self.rows, self.asked, self.budget = rows, [], 0

    def __call__(self, waves, budget):
        self.asked, self.budget = waves, budget
        return np.array(self.rows[: len(waves)])


def test_the_reward_is_the_sum_of_three_axes_less_complexity():
    # CE, CU, PC, PQ
    reward = AudioBoxReward(scorer=Ratings([[5.0, 6.0, 3.0, 7.0], [1.0, 1.0, 10.0, 1.0], [10.0, 10.0, 1.0, 10.0]]))
    scores = reward.score([moving_clip(i, frames=3) for i in range(3)]).column("audiobox")
    np.testing.assert_allclose(scores, [15 / 40, -7 / 40, 29 / 40])
    assert reward.components[0].range == (-7 / 40, 29 / 40)


def test_axes_can_be_taken_one_by_one():
    reward = AudioBoxReward(separate=True, scorer=Ratings([[5.0, 6.0, 3.0, 7.0]]))
    table = reward.score([moving_clip(frames=3)])
    assert table.names == ("audiobox_ce", "audiobox_cu", "audiobox_pc", "audiobox_pq")
    assert table.values.tolist() == [[5.0, 6.0, 3.0, 7.0]]
    assert [c.weight for c in table.components] == [0.125, 0.125, -0.125, 0.125]  # complexity is to fall


def test_sound_is_read_as_16_khz_mono():
    scorer = Ratings([[1.0] * 4] * 2)
    clip = moving_clip(frames=24, sample_rate=48_000)
    stereo = with_sound(clip, np.stack([np.full(16_000, 0.5), np.full(16_000, -0.1)]), 16_000)
    AudioBoxReward(scorer=scorer, budget=5).score([clip, stereo])
    assert [len(wave) for wave in scorer.asked] == [16_000, 16_000]
    np.testing.assert_allclose(scorer.asked[1], 0.2, atol=1e-6)
    assert scorer.budget == 5


def test_defaults_of_the_recipe():
    reward = build_reward(RewardConfig(name="audiobox"))
    assert [(c.name, c.route, c.weight) for c in reward.components] == [("audiobox", "audio", 0.5)]
    assert reward.inputs == ("audio",)
    assert reward.licence == "CC-BY-4.0"
    with pytest.raises(OmniNFTError, match="separate is 'axes', expected true or false"):
        build_reward(RewardConfig(name="audiobox", options={"separate": "axes"}))
    with pytest.raises(OmniNFTError, match="does not take the options"):
        build_reward(RewardConfig(name="audiobox", options={"axis": "CE"}))


def test_without_weights_nothing_is_scored(tmp_path):
    reward = AudioBoxReward(path=tmp_path)
    assert "fetch by: hf download facebook/audiobox-aesthetics" in str(reward.missing())
    with pytest.raises(OmniNFTError, match=r"missing config\.json, model\.safetensors"):
        reward.score([moving_clip(frames=3)])


def test_a_silent_film_is_missing_and_the_batch_is_scored_as_its_clips():
    reward = AudioBoxReward(scorer=small_scorer(), workers=2)
    clips = [moving_clip(0, frames=30), with_sound(moving_clip(1), np.zeros((1, 0))), moving_clip(2, frames=12)]
    table = reward.score(clips)
    assert table.reasons == {(1, 0): "the clip has no sound"}
    assert np.isnan(table.values[1, 0])
    alone = [reward.score([clip]).values[0, 0] for clip in clips]
    np.testing.assert_allclose(table.values[:, 0], alone, atol=1e-6)
    np.testing.assert_allclose(reward.score(clips[::-1]).values[::-1, 0], alone, atol=1e-6)
