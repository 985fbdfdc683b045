from __future__ import annotations

import numpy as np
import pytest

from omninft.config import RewardConfig
from omninft.rewards.clap import CLAPReward
from omninft.rewards.registry import build_reward
from omninft.types import OmniNFTError
from tests.moving_clips import moving_clip, with_sound
from tests.scorers.test_clap import small_scorer


class Cosines:
    """Gives set cosines and keeps what it was asked."""

    def __init__(self, values: list[float]) -> None:
        self.values, self.asked = values, ()

    def __call__(self, spectrograms, shares, texts, budget):
        self.asked = (spectrograms, shares, texts, budget)
        return np.array(self.values)


def test_the_reward_maps_the_cosine_to_0_to_1():
    clips = [moving_clip(i, frames=12) for i in range(4)]
    table = CLAPReward(scorer=Cosines([1.0000001, 0.2, -0.5, -1.0])).score(clips)
    np.testing.assert_allclose(table.column("clap"), [1.0, 0.6, 0.25, 0.0])
    assert table.values.max() <= 1


def test_what_the_model_is_given():
    scorer = Cosines([0.0, 0.0])
    short = moving_clip(0, frames=24, sample_rate=48_000, prompt_a="rain falls")
    long = with_sound(moving_clip(1), np.ones(25 * 16_000) * 0.1, 16_000)
    CLAPReward(scorer=scorer, budget=7).score([short, long])
    spectrograms, shares, texts, budget = scorer.asked
    assert [s.shape for s in spectrograms] == [(1, 1001, 64), (3, 1001, 64)]
    assert [s.tolist() for s in shares] == [[0.1], [1.0, 1.0, 0.5]]
    assert texts == ["rain falls", "a dog barks"]
    assert budget == 7
    # A second of sound, then zeros: 100 dB below full power.
    assert spectrograms[0][0, 5:95].max() > -40
    assert (spectrograms[0][0, 103:] == -100).all()


def test_switches_change_one_thing_each():
    clip = with_sound(moving_clip(0), np.random.default_rng(0).normal(0, 0.1, 48_000), 48_000)
    long = with_sound(clip, np.ones(25 * 16_000) * 0.1, 16_000)
    repeat, first = Cosines([0.0, 0.0]), Cosines([0.0, 0.0])
    CLAPReward(pad_mode="repeatpad", scorer=repeat).score([clip, long])
    CLAPReward(long="first", scorer=first).score([clip, long])
    assert (repeat.asked[0][0][0, 105:995].max(axis=1) > -100).all()  # ten seconds of a second
    assert [len(s) for s in repeat.asked[1]] == [1, 3]
    assert (first.asked[0][0][0, 103:] == -100).all()
    assert [len(s) for s in first.asked[1]] == [1, 1]


def test_defaults_of_the_recipe():
    reward = build_reward(RewardConfig(name="clap"))
    assert [(c.name, c.route, c.weight, c.range) for c in reward.components] == [("clap", "audio", 1.0, (0.0, 1.0))]
    assert reward.inputs == ("audio", "prompt_a")
    with pytest.raises(OmniNFTError, match="pad_mode is 'reflect', expected one of: zero, repeatpad"):
        build_reward(RewardConfig(name="clap", options={"pad_mode": "reflect"}))
    with pytest.raises(OmniNFTError, match="long is 'rand_trunc', expected one of: mean, first"):
        build_reward(RewardConfig(name="clap", options={"long": "rand_trunc"}))


def test_what_cannot_be_judged_is_missing_and_the_rest_as_alone():
    reward = CLAPReward(scorer=small_scorer(), workers=2)
    clips = [
        moving_clip(0, frames=24, prompt_a="a dog barks"),
        with_sound(moving_clip(1), np.zeros((1, 0))),
        moving_clip(2, frames=12, prompt_a=" "),
        moving_clip(3, frames=12, prompt_a="rain falls while music plays"),
        with_sound(moving_clip(4), np.full(800, np.inf)),
    ]
    table = reward.score(clips)
    assert table.reasons == {
        (1, 0): "the clip has no sound",
        (2, 0): "needs prompt_a, and the clip has none",
        (4, 0): "the clip's sound holds values that are not finite",
    }
    assert np.isfinite(table.values[:, 0]).tolist() == [True, False, False, True, False]
    alone = [reward.score([clip]).values[0, 0] for clip in clips]
    np.testing.assert_allclose(table.values[:, 0], alone, atol=1e-5)
    np.testing.assert_allclose(reward.score(clips[::-1]).values[::-1, 0], alone, atol=1e-5)
