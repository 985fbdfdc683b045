"""Names that people type: those that are safe as file names."""

from __future__ import annotations

import re

SAFE_NAME = "letters, digits, '.', '_' and '-', at most 100, no leading dot"
_SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


def is_safe_name(name: str) -> bool:
    """Whether a file may bear this name on every system we know: `SAFE_NAME` says what is allowed."""
    return _SAFE.fullmatch(name) is not None
