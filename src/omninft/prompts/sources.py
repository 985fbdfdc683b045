"""Where prompts come from: a file, or a split of a bundled world."""

from __future__ import annotations

from omninft.prompts.prompt_file import PromptRow, read_prompt_file
from omninft.prompts.prompt_set import PromptSet, load_prompts
from omninft.worlds.wording import world_prompts

WORLD = "world:"


def open_prompts(source: str) -> PromptSet:
    """The prompt set of "world:train", "world:dev", "world:test" or a JSONL, CSV or TXT file.

    Raises:
        OmniNFTError: unknown split, or what `load_prompts` refuses.
    """
    if source.startswith(WORLD):
        return PromptSet(tuple(world_prompts(source[len(WORLD) :])), source, ())  # type: ignore[arg-type]
    return load_prompts(source)


def open_rows(source: str) -> tuple[PromptRow, ...]:
    """All rows of such a source in their order, repeated ones too; ids are those of `open_prompts`.

    Raises:
        OmniNFTError: unknown split, or what `read_prompt_file` refuses.
    """
    if source.startswith(WORLD):
        prompts = open_prompts(source).prompts
        return tuple(PromptRow(i, p, (p.category,) if p.category else ()) for i, p in enumerate(prompts))
    return read_prompt_file(source).rows
