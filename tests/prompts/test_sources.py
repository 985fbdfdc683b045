"""The starter prompts: well formed, balanced, disjoint, and no two alike."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest

from omninft.config import load_config
from omninft.evaluation.sampling import read_prompts
from omninft.prompts.sources import open_prompts, open_rows
from omninft.runs.build import open_all_prompts
from omninft.types import OmniNFTError, Prompt

COUNTS = {"train": 240, "dev": 32, "test": 64}
CATEGORIES = 16
# Words of no matter to what happens, which many prompts share.
COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an and the of in on at to with as is its it from into for by one two three each comes come shot close up "
        "camera static medium wide after",
    )
)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower())) - COMMON


def every_prompt() -> list[tuple[str, Prompt]]:
    return [(split, prompt) for split in COUNTS for prompt in open_prompts(f"starter:{split}").prompts]


def test_the_sets_are_of_their_sizes_and_balanced() -> None:
    kinds = set()
    for split, count in COUNTS.items():
        found = open_prompts(f"starter:{split}")
        assert (len(found), found.source, found.notes) == (count, f"starter:{split}", ())
        shares = Counter(prompt.category for prompt in found.prompts)
        assert set(shares.values()) == {count // CATEGORIES}
        kinds |= set(shares)
        # Any stretch of a file holds every category, so that a short run sees them all.
        for start in range(0, count, CATEGORIES):
            assert len({p.category for p in found.prompts[start : start + CATEGORIES]}) == CATEGORIES
    assert len(kinds) == CATEGORIES


def test_every_prompt_says_what_is_seen_what_is_heard_and_how_they_go_together() -> None:
    for _, prompt in every_prompt():
        for text in (prompt.prompt_v, prompt.prompt_a, prompt.prompt_av):
            assert text.isascii()
            assert text.endswith(".")
            assert not re.search(r"[\"<>{}|\\]|  ", text)
        assert 2 <= len(re.findall(r"\.(?:\s|$)", prompt.prompt_av)) <= 4
        assert prompt.prompt_av.startswith(f"{prompt.prompt_v} {prompt.prompt_a} ")
        binding = prompt.prompt_av[len(prompt.prompt_v) + len(prompt.prompt_a) + 2 :]
        assert len(binding.split()) >= 9
        assert min(len(prompt.prompt_v.split()), len(prompt.prompt_a.split())) >= 4


def test_no_two_prompts_are_nearly_the_same() -> None:
    bags = [(split, words(prompt.prompt_av), prompt.prompt_v) for split, prompt in every_prompt()]
    for (_, a, first), (_, b, second) in itertools.combinations(bags, 2):
        assert len(a & b) / len(a | b) < 0.3, (first, second)
    assert len({scene for *_, scene in bags}) == sum(COUNTS.values())


def test_a_recipe_of_a_real_model_needs_no_file_of_the_users() -> None:
    sets = open_all_prompts(load_config("ltx2.3+24gb"))
    assert {split: len(found) for split, found in sets.items()} == COUNTS
    rows = open_rows("starter:dev")
    assert [row.prompt for row in rows] == list(open_prompts("starter:dev").prompts)
    assert rows[0].categories == (rows[0].prompt.category,)


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(
        OmniNFTError, match=r"starter:trian: no such split, did you mean 'train'\?; expected one of train"
    ):
        open_prompts("starter:trian")
    with pytest.raises(OmniNFTError, match="starter:: no such split"):
        open_rows("starter:")


def test_sample_takes_them_as_a_set_and_not_as_a_text() -> None:
    found = read_prompts("starter:test", limit=4)
    assert len(found) == 4
    assert set(found) <= set(open_prompts("starter:test").prompts)
