from __future__ import annotations

import numpy as np
import pytest

from omninft.config import RewardConfig
from omninft.rewards.imagebind import ImageBindReward
from omninft.rewards.registry import build_reward
from omninft.scorers.imagebind import ImageBind, ImageBindScorer
from omninft.scorers.imagebind_inputs import TextTokens
from omninft.types import Clip, OmniNFTError, Prompt
from tests.scorers.numpy_layers import randomise
from tests.scorers.test_imagebind import TINY, small_tokenizer


def clip_of(seed: int, frames: int = 60, prompt_v: str = "a cat", prompt_a: str = "cats") -> Clip:
    random = np.random.default_rng(seed)
    video = random.integers(0, 32, (frames, 24, 36, 3), dtype=np.uint8) + random.integers(0, 224, 3, dtype=np.uint8)
    sound = 0.5 ** random.integers(1, 9) * random.uniform(-1, 1, (2, round(frames / 24 * 16_000)))
    return Clip(video, 24.0, sound.astype(np.float32), 16_000, Prompt(f"p{seed}", prompt_v, prompt_a, ""))


@pytest.fixture(scope="module")
def scorer() -> ImageBindScorer:
    return ImageBindScorer(randomise(ImageBind(TINY), scale=0.5), TextTokens(small_tokenizer()))


class Stub:
    """Embeddings known beforehand, one clip."""

    def videos(self, videos, budget):
        assert [len(v) for v in videos] == [15]
        return np.array([[1.0, 0, 0]])

    def sounds(self, sounds, budget):
        assert [len(s) for s in sounds] == [3]
        return np.array([[0.0, 20, 0]])

    def texts(self, texts, budget):
        assert texts == ["a cat", "cats"]
        return np.array([[3.0, 4, 0], [0, 8, 6]])


def test_score_is_the_mean_of_the_three_cosines():
    table = ImageBindReward(scorer=Stub()).score([clip_of(0)])
    np.testing.assert_allclose(table.column("imagebind"), [(0.6 + 0.8 + 0.0) / 3])
    (spec,) = ImageBindReward.components
    assert (spec.route, spec.weight, spec.range, spec.higher_is_better) == ("joint", 1.0, (-1, 1), True)


def test_a_batch_gives_what_single_clips_give_in_any_order(scorer):
    reward = ImageBindReward(scorer=scorer, budget=7, workers=2)
    prompts = [("a cat", "cats"), ("a cat", "cats"), ("cat", "a"), ("a a", "cat cat"), ("cats", "cats")]
    clips = [clip_of(i, frames, *p) for i, (frames, p) in enumerate(zip((60, 30, 90, 60, 48), prompts, strict=True))]
    together = reward.score(clips).column("imagebind")
    assert together.std() > 0.01
    assert (np.abs(together) <= 1).all()
    alone = [reward.score([clip]).column("imagebind")[0] for clip in clips]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    order = [3, 0, 4, 2, 1]
    permuted = reward.score([clips[i] for i in order]).column("imagebind")
    np.testing.assert_allclose(permuted, together[order], atol=1e-6)


def test_clips_that_cannot_be_judged_are_missing_with_the_reason(scorer):
    silent = clip_of(2)
    silent = Clip(silent.video, 24.0, silent.waveform[:, :0], 16_000, silent.prompt)
    clips = [clip_of(0, prompt_v=" "), clip_of(1), silent, clip_of(3, prompt_a="")]
    table = ImageBindReward(scorer=scorer).score(clips)
    np.testing.assert_array_equal(table.valid[:, 0], [False, True, False, False])
    assert table.reasons == {
        (0, 0): "needs prompt_v, and the clip has none",
        (2, 0): "the clip has no sound",
        (3, 0): "needs prompt_a, and the clip has none",
    }


def test_clip_spacing_changes_which_frames_are_seen(scorer):
    clip = clip_of(0, frames=121)
    clip.video[107:] = 255  # "n" ends at frame 106
    changed = clip_of(0, frames=121)
    scores = {
        (spacing, name): ImageBindReward(scorer=scorer, clip_spacing=spacing).score([c]).column("imagebind")[0]
        for spacing in ("n-1", "n")
        for name, c in (("white end", clip), ("as it was", changed))
    }
    assert scores["n", "white end"] == scores["n", "as it was"]
    assert abs(scores["n-1", "white end"] - scores["n-1", "as it was"]) > 1e-3


def test_options_come_from_a_recipe():
    reward = build_reward(RewardConfig(name="imagebind", options={"clip_spacing": "n", "keep_end": False}))
    assert (reward.reward.clip_spacing, reward.reward.keep_end) == ("n", False)
    with pytest.raises(OmniNFTError, match="clip_spacing is 'n-2', expected one of: n-1, n"):
        build_reward(RewardConfig(name="imagebind", options={"clip_spacing": "n-2"}))
    with pytest.raises(OmniNFTError, match="keep_end is 'maybe', expected true or false"):
        build_reward(RewardConfig(name="imagebind", options={"keep_end": "maybe"}))


def test_without_the_files_the_reward_says_what_fetches_both(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path))
    reward = ImageBindReward(tokenizer=tmp_path)
    assert reward.model.commercial is False
    assert "NC" in reward.licence
    assert "imagebind_huge.pth; fetch by: curl" in reward.missing()
    assert "tokenizer.json" in reward.missing()
    assert "hf download openai/clip-vit-base-patch32" in reward.missing()
