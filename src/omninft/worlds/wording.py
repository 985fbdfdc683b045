"""The bounce world in words: prompts for a scene's attributes, the attributes a prompt asks for, and the splits.

Wordings share a vocabulary of under 60 words, so that the bundled word-level tokenizer covers them. Prompts for
training, development and test are made from disjoint combinations of attributes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omninft.types import OmniNFTError, Prompt
from omninft.worlds import bounce

Split = Literal["train", "dev", "test"]
Attributes = tuple[str, str, str, int, bool]

TIMES = {1: "once", 2: "twice", 3: "thrice"}
NUMBERS = {1: "one", 2: "two", 3: "three"}

VIDEO_WORDINGS: dict[str, tuple[str, ...]] = {
    "ball": (
        "a {colour} ball bounces {times}",
        "a {colour} ball falls and hits the floor {times}",
        "a {colour} ball touches the ground {times}",
    ),
    "lamp": (
        "a {colour} lamp flashes {times}",
        "a {colour} lamp lights up {times}",
        "a {colour} lamp blinks {times}",
    ),
}
AUDIO_WORDINGS: dict[str, tuple[str, ...]] = {
    "ball": ("a {pitch} tone rings {times}", "{number} {pitch} notes ring out", "the sound of {number} {pitch} tones"),
    "lamp": (
        "a {pitch} buzz sounds {times}",
        "{number} {pitch} buzzes are heard",
        "the sound of {number} {pitch} buzzes",
    ),
}
SQUARE_WORDINGS = ("while a square drifts by", "and a silent square slides past", "behind a moving square")


@dataclass(frozen=True)
class Request:
    """What a prompt asks for; None where it does not say."""

    kind: str | None
    colour: str | None
    count: int | None
    square: bool
    sound_kind: str | None
    sound_count: int | None
    pitch: str | None


def vocabulary() -> list[str]:
    """Every word of every wording, sorted."""
    words: set[str] = set()
    for attributes in bounce.all_attributes():
        for v in range(3):
            for a in range(3):
                words.update(_words(attributes, v, a, v)[2].split())
    return sorted(words)


def _words(attributes: Attributes, video: int, audio: int, square: int) -> tuple[str, str, str]:
    kind, colour, pitch, count, has_square = attributes
    times, number = TIMES[count], NUMBERS[count]
    prompt_v = VIDEO_WORDINGS[kind][video].format(colour=colour, times=times)
    if has_square:
        prompt_v += " " + SQUARE_WORDINGS[square]
    prompt_a = AUDIO_WORDINGS[kind][audio].format(pitch=pitch, times=times, number=number)
    return prompt_v, prompt_a, f"{prompt_v} {prompt_a}"


def wordings(attributes: Attributes) -> list[tuple[str, str, str]]:
    """Every (prompt_v, prompt_a, prompt_av) for these attributes."""
    squares = range(len(SQUARE_WORDINGS)) if attributes[4] else range(1)
    return [_words(attributes, v, a, s) for v in range(3) for a in range(3) for s in squares]


def split_of(attributes: Attributes) -> Split:
    """train, dev or test in shares of 4 : 1 : 1, each balanced in kind, colour, pitch, count and square."""
    kind, colour, pitch, count, square = attributes
    pair = (("low", "mid", "high").index(pitch) + count) % 3
    parity = (bounce.KINDS.index(kind) + list(bounce.COLOURS).index(colour) + square) % 2
    if (pair, parity) == (0, 0):
        return "dev"
    return "test" if (pair, parity) == (1, 1) else "train"


def world_prompts(split: Split) -> list[Prompt]:
    """The prompts of a split in a fixed order: nine wordings of each of its attribute combinations."""
    if split not in ("train", "dev", "test"):
        raise OmniNFTError(f"unknown split of the bounce world: found {split!r}, expected train, dev or test")
    prompts = []
    for attributes in bounce.all_attributes():
        if split_of(attributes) != split:
            continue
        name = "-".join([*map(str, attributes[:4]), "square" if attributes[4] else "alone"])
        # Every pair of wordings; the square's wording goes round, so that prompts with one are not three times as many.
        texts = [_words(attributes, v, a, (v + a) % 3) for v in range(3) for a in range(3)]
        for i, (v, a, av) in enumerate(texts):
            prompts.append(Prompt(f"{name}-{i:02d}", v, a, av, category=attributes[0]))
    return prompts


def read_request(prompt_v: str, prompt_a: str) -> Request:
    """The attributes that prompts of this world ask for (unknown words are passed over)."""
    seen, heard = prompt_v.lower().split(), prompt_a.lower().split()
    heard_set = set(heard)
    sound_kind = None
    if heard_set & {"tone", "tones", "note", "notes"}:
        sound_kind = "ball"
    elif heard_set & {"buzz", "buzzes"}:
        sound_kind = "lamp"
    return Request(
        kind=next((k for k in bounce.KINDS if k in seen), None),
        colour=next((c for c in bounce.COLOURS if c in seen), None),
        count=_count(seen),
        square="square" in seen,
        sound_kind=sound_kind,
        sound_count=_count(heard),
        pitch=next((p for p in ("low", "mid", "high") if p in heard), None),
    )


def _count(words: list[str]) -> int | None:
    for names in (TIMES, NUMBERS):
        for count, word in names.items():
            if word in words:
                return count
    return None
