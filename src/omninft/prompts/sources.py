"""Where prompts come from: a file, a split of a bundled world, or one of the starter prompts."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

from omninft.naming import did_you_mean
from omninft.prompts.prompt_file import PromptRow, read_prompt_file
from omninft.prompts.prompt_set import PromptSet, load_prompts
from omninft.types import OmniNFTError
from omninft.worlds.wording import world_prompts

WORLD = "world:"
STARTER = "starter:"


def open_prompts(source: str) -> PromptSet:
    """The prompt set of "world:train", "starter:train" (and dev, test) or a JSONL, CSV or TXT file.

    Raises:
        OmniNFTError: unknown split, or what `load_prompts` refuses.
    """
    if source.startswith(WORLD):
        return PromptSet(tuple(world_prompts(source[len(WORLD) :])), source, ())  # type: ignore[arg-type]
    if source.startswith(STARTER):
        return replace(load_prompts(_starter_file(source)), source=source)
    return load_prompts(source)


def open_rows(source: str) -> tuple[PromptRow, ...]:
    """All rows of such a source in their order, repeated ones too; ids are those of `open_prompts`.

    Raises:
        OmniNFTError: unknown split, or what `read_prompt_file` refuses.
    """
    if source.startswith(WORLD):
        prompts = open_prompts(source).prompts
        return tuple(PromptRow(i, p, (p.category,) if p.category else ()) for i, p in enumerate(prompts))
    return read_prompt_file(_starter_file(source) if source.startswith(STARTER) else source).rows


def _starter_file(source: str) -> Path:
    """The shipped file of "starter:train": 240 prompts of events that are seen and heard, 32 of dev, 64 of test."""
    split, splits = source[len(STARTER) :], ("train", "dev", "test")
    if split not in splits:
        raise OmniNFTError(f"{source}: no such split{did_you_mean(split, splits)}; expected one of {', '.join(splits)}")
    return Path(str(resources.files("omninft.prompts") / "data" / f"starter_{split}.jsonl"))
