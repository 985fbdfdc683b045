"""Our files: written whole or not at all, and JSON lines that survive the end of the process that wrote them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from safetensors import SafetensorError

from omninft.types import OmniNFTError

# Far more than any text of ours or of a person; what is longer is no such file, and would only fill the memory.
MOST_BYTES = 256 * 2**20
MOST_LOG_BYTES = 2**30  # logs grow for as long as a run goes
# Of YAML, which is read slowly and may name one part many times over: characters of text, and nodes once spelt out.
MOST_YAML_CHARS, MOST_YAML_NODES = 2**18, 2**16

# What `_beside` makes, and the probe of `checkpoint.store.ensure_writable`.
_TEMPORARY = re.compile(r"\.\d+-[0-9a-f]{8}\.part|\.tmp-probe-[0-9a-f]{8}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for the body to write; it is flushed and takes the place of `path` at the end.

    Readers see the old file or the whole new one. Folders are made. Whatever the body raises leaves nothing behind and
    the old file as it was.

    Raises:
        OmniNFTError: the place cannot be written to, or the disk is full (any OSError or SafetensorError).
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
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error


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
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> OmniNFTError:
    """What to raise when writing `path` failed: why, and how much is free there when the disk is full."""
    why = getattr(error, "strerror", None) or str(error)
    # safetensors tells the system's number in words only.
    if getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error):
        with suppress(OSError):
            existing = next(p for p in path.absolute().parents if p.exists())
            why += f"; {shutil.disk_usage(existing).free / 2**20:.1f} MiB free in {existing}"
    return OmniNFTError(f"{path}: cannot be written ({why})")


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


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """What is in a file.

    Raises:
        OmniNFTError: naming it: not there, no regular file (a pipe would never end), not readable, or of more than
            `most` bytes.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, device or socket"
            raise OmniNFTError(f"{path}: cannot be read: found {kind}, expected a file")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise OmniNFTError(f"{path}: cannot be read ({why})") from error
    if len(content) > most:
        raise OmniNFTError(f"{path}: found {path.stat().st_size} bytes, expected at most {most}")
    return content


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """As `read_bytes`, of UTF-8 with or without a byte order mark; another encoding is an OmniNFTError as well."""
    content = read_bytes(path, most)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OmniNFTError(f"{path}: found {error.object[error.start : error.end]!r}, expected UTF-8 text") from error


def read_json(path: Path, what: str = "") -> Any:
    """The value of a JSON file; `what` it is not, for the message ("not a listing of clips: ").

    Raises:
        OmniNFTError: as `read_bytes`, or no JSON in UTF-8.
    """
    content = read_bytes(path)
    try:
        return parse_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise OmniNFTError(f"{path}: {what}not JSON ({error})") from error


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`, for whom too many brackets inside one another are a ValueError too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("brackets inside one another, too deep") from error


def first_problem(error: ValueError) -> str:
    """What is wrong, on one line: of pydantic's findings the first, with its place and what was found there."""
    if not isinstance(error, ValidationError):
        return str(error)
    first, *more = error.errors(include_url=False, include_context=False)
    place = ".".join(map(str, first["loc"])) or "it"
    others = f", and {len(more)} more such places" if more else ""
    return f"{place}: {first['msg']}; found {first['input']!r:.100}{others}"


def parse_yaml(text: str, where: str) -> Any:
    """The plain value of a YAML text; `where` begins the message.

    Raises:
        OmniNFTError: no YAML, longer than `MOST_YAML_CHARS`, or more than `MOST_YAML_NODES` once its aliases are spelt
            out (a few lines can stand for more than any memory holds).
    """
    if len(text) > MOST_YAML_CHARS:
        raise OmniNFTError(f"{where} is too long: {len(text)} characters, expected at most {MOST_YAML_CHARS}")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        if _spelt_out(node, {}) > MOST_YAML_NODES:
            raise OmniNFTError(f"{where}: its aliases stand for more than {MOST_YAML_NODES} values, or for themselves")
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise OmniNFTError(f"{where} is not valid YAML: {error.problem or error.context}{at}") from error
    except RecursionError as error:
        raise OmniNFTError(f"{where} is not valid YAML: brackets inside one another, too deep") from error
    # A tag such as !!int or !!bool before another text ends in whatever its conversion raises.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise OmniNFTError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def _spelt_out(node: yaml.Node, known: dict[int, float]) -> float:
    """Nodes below and with this one, those of aliases counted wherever they stand; infinite for one within itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_spelt_out(part, known) for part in parts)
    return known[id(node)]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file in order; none when there is no such file yet.

    A last line that a killed process cut short is left out.

    Raises:
        OmniNFTError: another line is not a JSON object; it is named by its number.
    """
    if not path.exists():
        return []
    *lines, last = read_bytes(path, MOST_LOG_BYTES).split(b"\n")
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
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
