"""Words of prompts that a model's text encoder does not know: it reads them all as the same, and prompts lose them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from omninft.models.loading import model_path
from omninft.prompts.sampler import spread
from omninft.types import Prompt

SHOWN_WORDS = 8  # of each kind in a message


def open_tokenizer(model: str) -> Any | None:
    """The tokenizer of a local or cached pipeline; None where there is none yet: nothing is fetched for it."""
    path = model_path(model)
    try:
        if Path(path).is_dir():
            return AutoTokenizer.from_pretrained(Path(path) / "tokenizer", local_files_only=True)
        return AutoTokenizer.from_pretrained(path, subfolder="tokenizer", local_files_only=True)
    except (OSError, ValueError):
        return None


def known_words(tokenizer: Any) -> list[str]:
    """What the tokenizer has a token of its own for, sorted, without special tokens."""
    return sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))


def unknown_words(tokenizer: Any, texts: Iterable[str]) -> list[str]:
    """Words that become the unknown token, each once, in the order in which they come.

    Tokenizers that spell unknown words by pieces or bytes have none.
    """
    if tokenizer.unk_token_id is None:
        return []
    found: dict[str, None] = {}
    for text in dict.fromkeys(texts):
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, stop) in zip(read["input_ids"], read["offset_mapping"], strict=True):
            if token == tokenizer.unk_token_id:
                found[text[start:stop]] = None
    return list(found)


def word_warning(model: str, prompts: Iterable[Prompt]) -> str | None:
    """What of the prompts the model cannot read, with some words that it can; None where it reads all of them."""
    tokenizer = open_tokenizer(model)
    if tokenizer is None or not tokenizer.is_fast:
        return None
    words = unknown_words(tokenizer, (prompt.prompt_av for prompt in prompts))
    if not words:
        return None
    known = [word for word in known_words(tokenizer) if len(word) > 1]
    some = [known[i] for i in spread(min(SHOWN_WORDS, len(known)), len(known))]
    more = f" and {len(words) - SHOWN_WORDS} more" if len(words) > SHOWN_WORDS else ""
    return (
        f"{model} does not know {', '.join(words[:SHOWN_WORDS])}{more}: its text encoder has {len(known)} words, "
        f"such as {', '.join(some)}"
    )
