"""Our files: written whole or not at all, and JSON lines that survive the end of the process that wrote them."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omninft.types import OmniNFTError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)` beside `path`, flushed, then renamed: readers see the old file or the whole new one.

    Folders are made. Whatever `write` raises leaves nothing behind and the old file as it was.

    Raises:
        OmniNFTError: the place cannot be written to, or the disk is full.
    """
    # The target's own name may leave no room for an ending.
    temporary = path.parent / f".{os.getpid()}-{secrets.token_hex(4)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OmniNFTError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8, whole or not at all. Raises OmniNFTError as `write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file in order; none when there is no such file yet.

    A last line that a killed process cut short is left out.

    Raises:
        OmniNFTError: another line is not a JSON object; it is named by its number.
    """
    if not path.is_file():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = json_object(line)
        if row is None:
            raise OmniNFTError(f"{path}, line {number}: expected a JSON object, found {line[:60]!r}")
        rows.append(row)
    # Without its line end a line is whole only if it parses: the process may have been killed inside the write.
    unfinished = json_object(last)
    return rows if unfinished is None else [*rows, unfinished]


def json_object(line: bytes) -> dict[str, Any] | None:
    """The object a line holds; None when it holds none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
