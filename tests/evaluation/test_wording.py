from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from omninft.evaluation.wording import known_words, open_tokenizer, unknown_words, word_warning
from omninft.types import Prompt
from omninft.worlds.wording import vocabulary, world_prompts


def prompt(text: str) -> Prompt:
    return Prompt("p", text, text, text)


def test_words_outside_a_closed_vocabulary_are_named_once() -> None:
    tokenizer = open_tokenizer("tiny")
    assert tokenizer is not None
    assert unknown_words(tokenizer, ["a red cat bounces", "A cat, twice"]) == ["cat", "A", ","]
    assert known_words(tokenizer) == vocabulary()


def test_the_world_is_known_and_a_warning_says_what_is() -> None:
    assert word_warning("tiny", world_prompts("test")) is None
    told = word_warning("tiny", [prompt("a purple dog barks")])
    assert told is not None
    assert told.startswith("tiny does not know purple, dog, barks: its text encoder has ")
    assert told.rpartition("such as ")[2].split(", ")[0] in vocabulary()


def test_an_open_vocabulary_has_no_unknown_words(tmp_path: Path) -> None:
    spelled = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0, "b": 1}, [], byte_fallback=True)))
    assert unknown_words(spelled, ["anything at all"]) == []
    assert word_warning(str(tmp_path), [prompt("anything")]) is None
