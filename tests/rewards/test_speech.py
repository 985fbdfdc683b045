from __future__ import annotations

import numpy as np
import pytest

from omninft.config import RewardConfig
from omninft.rewards.registry import build_reward
from omninft.rewards.speech import SPEECH_WORDS, SpeechReward, agreement, asks_for
from omninft.scorers import silero
from omninft.types import Clip, OmniNFTError
from tests.moving_clips import moving_clip, with_sound
from tests.spoken import babble


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ('A woman speaks calmly, saying "the bridge is closed today".', True),
        ("A male VOICE over soft traffic noise", True),
        ("People chatting in a cafe while cups clink", True),
        ("A distant conversation, then a door slams", True),
        ("The engine idles and a dog barks twice", False),
        ("Rain on a tin roof with no audible speech", False),
        ("Wind in the grass, without any voices", False),
        ("A man is not talking", False),
        ("No music, a man speaks", True),  # a negation ends with its clause
        ("With no background noise a man speaks", True),
        ("A loudspeaker hums and invoices rustle", False),  # whole words only
        ("", False),
    ],
)
def test_what_a_prompt_asks_for(text, asked):
    assert asks_for(text, SPEECH_WORDS) is asked


def test_agreement_is_continuous_in_the_share_of_speech():
    shares = [0.0, 0.1, 0.25, 0.5, 0.8, 1.0]
    np.testing.assert_allclose([agreement(s, True) for s in shares], [0.0, 0.2, 0.5, 1.0, 1.0, 1.0])
    np.testing.assert_allclose([agreement(s, False) for s in shares], [1.0, 0.8, 0.5, 0.0, 0.0, 0.0])


class Share:
    """Hears a set share of speech."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, wave):
        return silero.SpeechFacts(np.array([self.share]), np.empty((0, 2)))


def test_speech_is_rewarded_where_asked_for_only():
    clips = [
        moving_clip(0, frames=3, prompt_a="a man talks"),
        moving_clip(0, frames=3, prompt_a="a dog barks"),
        moving_clip(0, frames=3, prompt_a="a woman sings over a piano, singing loudly"),
        moving_clip(0, frames=3, prompt_a="a singer talks to the crowd"),
        moving_clip(0, frames=3, prompt_a=""),
        with_sound(moving_clip(0, frames=3), np.zeros((1, 0))),
    ]
    table = SpeechReward(scorer=Share(0.2), workers=2).score(clips)
    np.testing.assert_allclose(table.column("speech"), [0.4, 0.6, np.nan, 0.4, np.nan, np.nan])
    assert table.reasons == {
        (2, 0): "prompt_a asks for singing, which a speech detector cannot judge",
        (4, 0): "needs prompt_a, and the clip has none",
        (5, 0): "the clip has no sound",
    }


def test_words_of_the_recipe_replace_the_list():
    reward = build_reward(RewardConfig(name="speech", options={"words": ["Bellt", "Stimme"]}))
    assert [(c.name, c.route, c.range) for c in reward.components] == [("speech", "audio", (0.0, 1.0))]
    own = SpeechReward(words=["stimme"], scorer=Share(0.2))
    clips = [moving_clip(0, frames=2, prompt_a=text) for text in ("eine Stimme", "a man talks")]
    np.testing.assert_allclose(own.score(clips).values[:, 0], [0.4, 0.6])
    for words in ("voice", [], ["two words"], [3]):
        with pytest.raises(OmniNFTError, match="expected a list of single words"):
            build_reward(RewardConfig(name="speech", options={"words": words}))


def test_with_the_model_in_any_order():
    if silero.missing() is not None:
        pytest.skip(str(silero.missing()))

    def clip(sound: np.ndarray, text: str) -> Clip:
        return with_sound(moving_clip(frames=2, prompt_a=text), sound, 16_000)

    silence = np.zeros(24_000)
    cases = [(babble(1.5), "a man talks"), (silence, "a man talks"), (babble(1.5), "rain"), (silence, "rain")]
    reward = SpeechReward(workers=2)
    table = reward.score([clip(*case) for case in cases])
    assert table.values[0, 0] > 0.9
    assert table.values[1, 0] < 0.1
    assert table.values[2, 0] < 0.1
    assert table.values[3, 0] > 0.9
    alone = [reward.score([clip(*case)]).values[0, 0] for case in cases]
    np.testing.assert_array_equal(table.values[:, 0], alone)
    np.testing.assert_array_equal(reward.score([clip(*case) for case in cases[::-1]]).values[::-1], table.values)
    broken = reward.score([clip(np.full(8_000, np.inf), "rain")])
    assert broken.reasons == {(0, 0): "the clip's sound holds values that are not finite"}


def test_without_the_package_nothing_is_scored(monkeypatch):
    monkeypatch.setattr(silero.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OmniNFTError, match="missing silero-vad and onnxruntime; install by: pip install"):
        SpeechReward().score([moving_clip(frames=2)])
