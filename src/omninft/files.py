"""Our files: written whole or not at all, and JSON lines that survive the end of the process that wrote them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omninft.types import OmniNFTError

# What `_beside` makes, and the probe of `checkpoint.store.ensure_writable`.
_TEMPORARY = re.compile(r"\.\d+-[0-9a-f]{8}\.part|\.tmp-probe-[0-9a-f]{8}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for the body to write; it is flushed and takes the place of `path` at the end.

    Readers see the old file or the whole new one. Folders are made. Whatever the body raises leaves nothing behind and
    the old file as it was.

    Raises:
        OmniNFTError: the place cannot be written to, or the disk is full (any OSError of the body).
    """
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OmniNFTError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """As `replacing`, of a folder, which is there and empty for the body to fill; the one that was there is removed."""
    temporary, old = _beside(path), _beside(path)
    try:
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            if path.exists():
                os.replace(path, old)  # a folder that is not empty cannot be replaced in one step
            try:
                os.replace(temporary, path)
            except OSError:
                if old.exists():
                    os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise OmniNFTError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`replacing` by a function that writes the file it is given. Raises OmniNFTError as that."""
    with replacing(path) as temporary:
        write(temporary)


def _beside(path: Path) -> Path:
    # The target's own name may leave no room for an ending.
    return path.parent / f".{os.getpid()}-{secrets.token_hex(4)}.part"


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left anywhere in `folder` under the temporary names of this module.

    No process may be writing there. What cannot be deleted stays: it is in nobody's way.
    """
    for path in [p for p in folder.rglob(".*") if _TEMPORARY.fullmatch(p.name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def file_sha256(path: Path) -> str:
    """Hexadecimal checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
