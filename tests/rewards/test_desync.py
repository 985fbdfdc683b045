from __future__ import annotations

import numpy as np
import pytest

from omninft.config import RewardConfig
from omninft.rewards.desync import DeSyncReward
from omninft.rewards.registry import build_reward
from omninft.scorers.synchformer import DeSyncScorer, Synchformer, SynchformerConfig
from omninft.types import Clip, OmniNFTError, Prompt
from tests.scorers.numpy_layers import randomise

TINY = SynchformerConfig(width=24, heads=3, layers=1, fusion_heads=2, fusion_layers=1, patch=112)


def clip_of(seed: int, frames: int = 40, sound: float | None = None) -> Clip:
    random = np.random.default_rng(seed)
    colours = random.integers(0, 224, (1, 1, 1, 3), dtype=np.uint8)
    video = random.integers(0, 32, (frames, 16, 24, 3), dtype=np.uint8) + colours
    seconds = frames / 24 if sound is None else sound
    wave = (0.5 ** random.integers(1, 9) * random.uniform(-1, 1, (2, round(seconds * 16_000)))).astype(np.float32)
    return Clip(video, 24.0, wave, 16_000, Prompt(f"p{seed}", "", "", ""))


@pytest.fixture(scope="module")
def scorer() -> DeSyncScorer:
    """Its class depends on nothing but the clip."""
    network = randomise(Synchformer(TINY), seed=0, scale=0.5)
    for name, parameter in network.named_parameters():
        if name.endswith(("bias", "pos_emb", "embed", "embeddings", "_tok", "_token")):
            parameter.data.zero_()
    return DeSyncScorer(network)


class Stub:
    """A scorer that has measured already."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = np.array(seconds)

    def desync(self, inputs, budget):
        self.segments = [item.num_segments for item in inputs]
        return self.seconds


def test_score_is_one_over_one_plus_the_mean_absolute_offset():
    reward = DeSyncReward(scorer=Stub([0.0, 0.5, 2.0, np.nan]))
    table = reward.score([clip_of(seed) for seed in range(4)])
    np.testing.assert_allclose(table.column("desync"), [1.0, 2 / 3, 1 / 3, np.nan])
    (spec,) = reward.components
    assert (spec.route, spec.weight, spec.range, spec.higher_is_better) == ("joint", 1.0, (1 / 3, 1.0), True)


@pytest.mark.parametrize(("options", "segments"), [({}, 14), ({"seconds": 8.0}, 24), ({"seconds": 4}, 11)])
def test_how_much_of_a_clip_of_121_frames_is_judged(options, segments):
    stub = Stub([0.0])
    DeSyncReward(scorer=stub, **options).score([clip_of(0, frames=121)])
    assert stub.segments == [segments]


def test_a_batch_gives_what_single_clips_give_in_any_order(scorer):
    reward = DeSyncReward(scorer=scorer, budget=5, workers=2)
    clips = [clip_of(seed, frames) for seed, frames in enumerate([40, 25, 70, 40, 31])]
    together = reward.score(clips).column("desync")
    assert len(set(together)) == 5
    assert ((together >= 1 / 3) & (together <= 1)).all()
    np.testing.assert_array_equal([reward.score([clip]).column("desync")[0] for clip in clips], together)
    order = [3, 0, 4, 2, 1]
    np.testing.assert_array_equal(reward.score([clips[i] for i in order]).column("desync"), together[order])


def test_clips_that_cannot_be_judged_are_missing_with_the_reason(scorer):
    table = DeSyncReward(scorer=scorer).score([clip_of(0, frames=12), clip_of(1), clip_of(2, sound=0.0)])
    np.testing.assert_array_equal(table.valid[:, 0], [False, True, False])
    assert table.reasons == {
        (0, 0): "DeSync needs 0.64 s, the picture of the clip has 0.500 s",
        (2, 0): "the clip has no sound",
    }


def test_options_come_from_a_recipe():
    reward = build_reward(RewardConfig(name="desync", options={"seconds": 8.0}))
    assert reward.reward.seconds == 8.0
    with pytest.raises(OmniNFTError, match=r'seconds is "?.?full.*expected "clip"'):
        build_reward(RewardConfig(name="desync", options={"seconds": "full"}))
    with pytest.raises(OmniNFTError, match="does not take the options"):
        build_reward(RewardConfig(name="desync", options={"second": 8.0}))


def test_without_the_file_the_reward_says_what_fetches_it(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path))
    reward = DeSyncReward()
    assert reward.model.commercial is False
    assert "missing synchformer_state_dict.pth; fetch by: curl" in reward.missing()
    with pytest.raises(OmniNFTError, match="fetch by: curl"):
        reward.score([clip_of(0)])
