"""Prompts say what the attributes are, can be read back, and the splits share none."""

from __future__ import annotations

from collections import Counter

import pytest

from omninft.types import OmniNFTError
from omninft.worlds import bounce
from omninft.worlds.wording import read_request, split_of, vocabulary, wordings, world_prompts


def test_every_wording_is_read_back() -> None:
    for attributes in bounce.all_attributes():
        kind, colour, pitch, count, square = attributes
        for v, a, av in wordings(attributes):
            request = read_request(v, a)
            assert (request.kind, request.colour, request.count, request.square) == (kind, colour, count, square)
            assert (request.sound_kind, request.pitch, request.sound_count) == (kind, pitch, count)
            assert av == f"{v} {a}"


def test_a_prompt_from_elsewhere_asks_for_nothing() -> None:
    request = read_request("a cow in a field", "wind")
    assert (request.kind, request.colour, request.count, request.pitch) == (None, None, None, None)


def test_splits_share_no_prompt_and_no_attributes() -> None:
    sets = {split: world_prompts(split) for split in ("train", "dev", "test")}
    texts = [{p.prompt_av for p in prompts} for prompts in sets.values()]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]
    ids = [p.id for prompts in sets.values() for p in prompts]
    assert len(ids) == len(set(ids))


def test_splits_are_balanced() -> None:
    for split, size in (("train", 96), ("dev", 24), ("test", 24)):
        members = [a for a in bounce.all_attributes() if split_of(a) == split]
        assert len(members) == size
        for column in range(5):
            counts = Counter(a[column] for a in members)
            assert len(set(counts.values())) == 1


def test_the_vocabulary_fits_the_text_encoder() -> None:
    assert len(vocabulary()) <= 60


def test_unknown_split() -> None:
    with pytest.raises(OmniNFTError, match="found 'val', expected train, dev or test"):
        world_prompts("val")  # type: ignore[arg-type]
