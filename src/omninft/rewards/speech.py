"""Is there speech where prompt_a asks for it, and none where it does not? Measured by Silero VAD.

A prompt asks for speech when it holds one of SPEECH_WORDS (or the recipe's `words`), whole words in any case, unless
one of NEGATIONS is among the two words before ("no audible speech"). Speech is not understood: what is said, by whom
and in which language is not judged. A prompt that asks for singing and not for speech is not judged at all, for the
detector hears some singing as speech.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from omninft.rewards.model_reward import ModelReward, prompt_text
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers import silero
from omninft.scorers.views import mono
from omninft.types import Clip, OmniNFTError

ENOUGH = 0.5  # share of the clip with speech that counts as full: people pause
SPEECH_WORDS = (
    *("speech", "speak", "speaks", "speaking", "spoken", "talk", "talks", "talking", "say", "says", "saying"),
    *("voice", "voices", "conversation", "conversations", "dialogue", "dialog", "chat", "chats", "chatting", "chatter"),
    *("narration", "narrates", "narrating", "narrator", "whisper", "whispers", "whispering", "announcer"),
    *("announces", "announcing", "commentator", "commentary", "interview", "monologue", "asks", "replies"),
)
SINGING_WORDS = (
    "sing",
    "sings",
    "singing",
    "singer",
    "singers",
    "sung",
    "song",
    "vocals",
    "choir",
    "chant",
    "chanting",
)
NEGATIONS = ("no", "not", "without", "never", "nobody")


def asks_for(text: str, words: Sequence[str]) -> bool:
    """Whether the text holds one of the words, not negated."""
    known = {word.lower() for word in words}
    # A negation does not reach over a comma or a full stop.
    for clause in re.split(r"[.,;:!?]", text.lower()):
        tokens = re.findall(r"\w+", clause)
        for i, token in enumerate(tokens):
            if token in known and not set(tokens[max(0, i - 2) : i]) & set(NEGATIONS):
                return True
    return False


def agreement(share: float, asked: bool) -> float:
    """0..1, continuous in the share of the clip with speech: up to ENOUGH where asked for, falling where not."""
    heard = min(share / ENOUGH, 1.0)
    return heard if asked else 1 - heard


class SpeechReward(ModelReward[float]):
    """`words` replaces SPEECH_WORDS. The model runs on the CPU, `workers` clips at once."""

    name = "speech"
    components = (ComponentSpec("speech", "audio", "speech is heard where prompt_a asks for it, and only there"),)
    inputs: tuple[Input, ...] = ("audio", "prompt_a")
    model = silero.CARD

    def __init__(
        self,
        words: Sequence[str] = SPEECH_WORDS,
        workers: int | None = None,
        scorer: silero.SileroVAD | None = None,
    ) -> None:
        super().__init__(device="cpu", workers=workers, scorer=scorer)
        fit = not isinstance(words, str) and all(isinstance(w, str) and re.fullmatch(r"\w+", w) for w in words)
        if not fit or not words:
            raise OmniNFTError(f"reward 'speech': words is {words!r}, expected a list of single words")
        self.words = tuple(words)

    def missing(self) -> str | None:
        return None if self._scorer is not None else silero.missing()

    def load(self) -> silero.SileroVAD:
        return silero.SileroVAD()

    def prepare(self, clip: Clip) -> float:
        """The score: the model takes whole clips one by one, so that threads serve better than batches."""
        text = prompt_text(clip, "prompt_a")
        asked = asks_for(text, self.words)
        if not asked and asks_for(text, SINGING_WORDS):
            raise OmniNFTError("prompt_a asks for singing, which a speech detector cannot judge")
        return agreement(self.scorer(mono(clip, silero.RATE)).share, asked)

    def judge(self, prepared: list[float]) -> np.ndarray:
        return np.array(prepared)[:, None]
