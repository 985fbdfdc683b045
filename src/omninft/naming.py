"""Names that people type: the nearest known one, and those that are safe as file names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from omninft.types import OmniNFTError

SAFE_NAME = "letters, digits, '.', '_' and '-', at most 100, no leading dot"
_ALIKE = 0.5  # of difflib's 0..1: half of the letters, in order
_SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


def is_safe_name(name: str) -> bool:
    """Whether a file may bear this name on every system we know: `SAFE_NAME` says what is allowed."""
    return _SAFE.fullmatch(name) is not None


def clip_file(prompt_id: str, sample: int) -> str:
    """The name of a clip's file. Raises OmniNFTError: the id cannot be part of one, or would lead elsewhere."""
    if not is_safe_name(prompt_id):
        raise OmniNFTError(f"prompt id: found {prompt_id!r:.120}, which names the clip's file; expected {SAFE_NAME}")
    return f"{prompt_id}-{sample}.mp4"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ ", did you mean 'name'?" for the known name most like `word`, whatever its case; "" where none is like it."""
    lowered = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.strip().casefold(), lowered, n=1, cutoff=_ALIKE)
    return f", did you mean {lowered[close[0]]!r}?" if close else ""
