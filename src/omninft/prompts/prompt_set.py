"""Sets of distinct prompts, as training and evaluating use them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omninft.prompts.prompt_file import read_prompt_file, shortened, told_once
from omninft.types import OmniNFTError, Prompt


@dataclass(frozen=True)
class PromptSet:
    """Prompts in file order with distinct ids, where they came from, and what the loader filled in or dropped."""

    prompts: tuple[Prompt, ...]
    source: str  # path of the file, for messages
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)


def load_prompts(path: str | Path) -> PromptSet:
    """The distinct prompts of a file, as `read_prompt_file` reads it; rows that repeat one are dropped with a note.

    Raises OmniNFTError as `read_prompt_file`.
    """
    found = read_prompt_file(path)
    prompts = tuple(row.prompt for row in found.rows if row.repeat == 0)
    dropped = (told_once("repeats an earlier row and was dropped", found.repeats),) if found.repeats else ()
    return PromptSet(prompts, str(Path(path)), (*found.notes, *dropped))


def require_disjoint(train: PromptSet, dev: PromptSet | None, test: PromptSet | None) -> None:
    """Refuse sets that share a prompt: the same joint text (whatever its case and spacing) with the same first frame.

    Ids are not compared: files that number their rows from 0 share ids, not prompts.

    Raises OmniNFTError naming the first shared prompt, in the order of the later set, and both of its ids.
    """
    sets = [(name, s) for name, s in (("train", train), ("dev", dev), ("test", test)) if s is not None]
    seen: dict[tuple[str, str | None], tuple[str, str, Prompt]] = {}
    for name, prompt_set in sets:
        for prompt in prompt_set.prompts:
            key = (" ".join(prompt.prompt_av.casefold().split()), prompt.first_frame_path)
            other = seen.setdefault(key, (name, prompt_set.source, prompt))
            if other[0] != name:
                raise OmniNFTError(
                    f"the {other[0]} and {name} prompts share {shortened(prompt.prompt_av)!r}: "
                    f"id {other[2].id!r} in {other[1]}, id {prompt.id!r} in {prompt_set.source}; "
                    "expected disjoint sets: remove it from one of them"
                )
