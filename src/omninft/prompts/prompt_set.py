"""Prompt sets from JSONL, CSV and plain text files.

A row gives `prompt_v` (what is seen), `prompt_a` (what is heard) and `prompt_av` (both, which the generator reads), and
optionally `id` (or `idx`), `category` and `first_frame_path`. Whatever a loader had to fill in or drop is in the notes.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omninft.types import OmniNFTError, Prompt

TEXT_FIELDS = ("prompt_v", "prompt_a", "prompt_av")
# Other names under which files in the wild hold the joint prompt.
JOINT_NAMES = ("prompt_av", "prompt", "text")
KNOWN_FIELDS = (*TEXT_FIELDS, "prompt", "text", "id", "idx", "category", "first_frame_path")
# Line ends only: str.splitlines would also split at characters that may stand inside a prompt, such as U+2028.
_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class PromptSet:
    """Prompts in file order with distinct ids, where they came from, and what the loader filled in or dropped."""

    prompts: tuple[Prompt, ...]
    source: str  # path of the file, for messages
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class _Row:
    """One record as the file has it; absent and null fields are left out."""

    line: int  # 1-based, where the record begins
    values: dict[str, Any]


@dataclass
class _Notes:
    """What happened to which lines, told once per kind and not once per line."""

    lines: dict[str, list[str]] = field(default_factory=dict)

    def add(self, message: str, where: str) -> None:
        self.lines.setdefault(message, []).append(where)

    def texts(self) -> tuple[str, ...]:
        shown = 5
        texts = []
        for message, where in self.lines.items():
            more = f" and {len(where) - shown} more" if len(where) > shown else ""
            rows = "1 row" if len(where) == 1 else f"{len(where)} rows"
            texts.append(f"{message} ({rows}: {'; '.join(where[:shown])}{more})")
        return tuple(texts)


def load_prompts(path: str | Path) -> PromptSet:
    """Read a prompt file: .jsonl (one object a line), .csv (with a header) or .txt (one prompt a line).

    A missing `prompt_av` is `prompt_v` + space + `prompt_a`. A joint text (`prompt_av`, `prompt` or `text`) serves for
    a missing `prompt_v` or `prompt_a`, with a note; so does each line of a .txt file for all three. When a row has both
    `id` and `idx`, `id` counts. A row without either gets the hash of its content as id, so that the noise keyed by it
    depends neither on the order of the rows nor on their number; a repeated row of that kind is dropped with a note.
    Texts are Unicode NFC without white space at the ends; blank lines are skipped; UTF-8 with or without a byte order
    mark. `first_frame_path` is relative to the prompt file; `Prompt.first_frame_path` is joined to its folder.

    Raises OmniNFTError naming file, line and field, with what was found and what was expected: no such file, another
    extension, not UTF-8, no prompts, a malformed row, an unknown field (with the nearest known one), a missing or empty
    text, two rows of the same id, a first frame that does not exist.
    """
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        known = ", ".join(_READERS)
        raise OmniNFTError(f"{path}: unknown extension {path.suffix!r}, expected one of {known}")
    notes = _Notes()
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}  # id -> line that has it
    hashed: set[str] = set()  # ids that are content hashes
    for row in read(path, _read_text(path)):
        prompt, own_id = _prompt_of(path, row, notes)
        if prompt.id in hashed and not own_id:
            notes.add("repeats an earlier row and was dropped", f"line {row.line} repeats line {lines[prompt.id]}")
            continue
        if prompt.id in lines:
            raise OmniNFTError(
                f"{path}:{row.line}: id: found {prompt.id!r}, which line {lines[prompt.id]} has already; "
                "expected distinct ids"
            )
        lines[prompt.id] = row.line
        if not own_id:
            hashed.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise OmniNFTError(f"{path}: found no prompts, expected at least one")
    told = notes.texts()
    if read is _txt_rows:
        told = ("plain text: each line serves as prompt_v, prompt_a and prompt_av", *told)
    return PromptSet(tuple(prompts), str(path), told)


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
                    f"the {other[0]} and {name} prompts share {_shortened(prompt.prompt_av)!r}: "
                    f"id {other[2].id!r} in {other[1]}, id {prompt.id!r} in {prompt_set.source}; "
                    "expected disjoint sets: remove it from one of them"
                )


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise OmniNFTError(f"{path}: no such file")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The byte order mark, when there is one, is not counted in the error's position.
        content = content.removeprefix(b"\xef\xbb\xbf")
        line = len(re.findall(rb"\r\n|\r|\n", content[: error.start])) + 1
        found = content[error.start]
        raise OmniNFTError(f"{path}:{line}: found byte 0x{found:02x} ({error.reason}), expected UTF-8") from error


def _jsonl_rows(path: Path, text: str) -> Iterator[_Row]:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise OmniNFTError(f"{path}:{number}: {key}: found twice in one row, expected once")
        return dict(pairs)

    for number, line in enumerate(_LINE_END.split(text), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=distinct)
        except (ValueError, RecursionError) as error:
            # A number of thousands of digits is a ValueError of another kind.
            where = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise OmniNFTError(
                f"{path}:{number}: malformed JSON ({where}): found {_shortened(line)!r}, expected one object on a line"
            ) from error
        if not isinstance(value, dict):
            raise OmniNFTError(
                f"{path}:{number}: found a JSON {type(value).__name__}, expected an object such as "
                '{"prompt_v": "...", "prompt_a": "..."}'
            )
        for key in value:
            _require_known(path, number, key)
        yield _Row(number, {key: v for key, v in value.items() if v is not None})


def _csv_rows(path: Path, text: str) -> Iterator[_Row]:
    # strict: an unclosed quote would otherwise swallow the rest of the file as one cell.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            begin, line = line, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                _require_columns(path, begin, header)
                continue
            if len(cells) != len(header):
                raise OmniNFTError(
                    f"{path}:{begin}: found {len(cells)} cells, expected {len(header)} ({', '.join(header)}); "
                    "a text with commas needs quotes"
                )
            # CSV has no null: an empty cell is one.
            yield _Row(begin, {key: cell for key, cell in zip(header, cells, strict=True) if cell.strip()})
    except csv.Error as error:
        raise OmniNFTError(f"{path}:{line}: malformed CSV: {error}") from error


def _txt_rows(path: Path, text: str) -> Iterator[_Row]:
    for number, line in enumerate(_LINE_END.split(text), start=1):
        if line.strip():
            yield _Row(number, dict.fromkeys(TEXT_FIELDS, line))


_READERS: dict[str, Callable[[Path, str], Iterator[_Row]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".txt": _txt_rows,
}


def _require_known(path: Path, line: int, key: str) -> None:
    if key not in KNOWN_FIELDS:
        near = difflib.get_close_matches(key.strip().lower(), KNOWN_FIELDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(KNOWN_FIELDS)}"
        raise OmniNFTError(f"{path}:{line}: {key}: unknown field; {hint}")


def _require_columns(path: Path, line: int, header: list[str]) -> None:
    for key in header:
        _require_known(path, line, key)
        if header.count(key) > 1:
            raise OmniNFTError(f"{path}:{line}: {key}: found two columns of this name, expected one")
    if not any(name in header for name in JOINT_NAMES):
        for name in ("prompt_v", "prompt_a"):
            if name not in header:
                found = ", ".join(header)
                raise OmniNFTError(
                    f"{path}:{line}: {name}: missing column; found {found}, "
                    "expected prompt_v and prompt_a, or prompt_av"
                )


def _prompt_of(path: Path, row: _Row, notes: _Notes) -> tuple[Prompt, bool]:
    """The prompt of a row, and whether its id is its own (not a content hash)."""
    joint_names = [name for name in JOINT_NAMES if name in row.values]
    if len(joint_names) > 1:
        found = " and ".join(joint_names)
        raise OmniNFTError(
            f"{path}:{row.line}: {joint_names[1]}: found {found}, expected one of them: all name prompt_av"
        )
    given = {
        name: _text(path, row.line, name, row.values[name])
        for name in (*TEXT_FIELDS, *JOINT_NAMES)
        if name in row.values
    }
    joint = given[joint_names[0]] if joint_names else None
    texts: dict[str, str] = {}
    for name in ("prompt_v", "prompt_a"):
        if name in given:
            texts[name] = given[name]
        elif joint is not None:
            texts[name] = joint
            notes.add(f"no {name}: {joint_names[0]} serves for it", f"line {row.line}")
        else:
            found = ", ".join(row.values) or "nothing"
            raise OmniNFTError(
                f"{path}:{row.line}: {name}: missing or empty; found {found}, "
                f"expected {name}, or a prompt_av to serve for it"
            )
    prompt_av = joint if joint is not None else f"{texts['prompt_v']} {texts['prompt_a']}"
    category = row.values.get("category", "")
    category = _text(path, row.line, "category", category) if category != "" else None
    stated_frame, first_frame = _first_frame(path, row)
    own_id = _own_id(path, row)
    if own_id is None:
        content = [texts["prompt_v"], texts["prompt_a"], prompt_av]
        # As stated, not as resolved: ids stay when the folder moves.
        content += [stated_frame] if stated_frame is not None else []
        prompt_id = hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()[:16]
    else:
        prompt_id = own_id
    prompt = Prompt(prompt_id, texts["prompt_v"], texts["prompt_a"], prompt_av, category, first_frame)
    return prompt, own_id is not None


def _own_id(path: Path, row: _Row) -> str | None:
    for name in ("id", "idx"):
        value = row.values.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if value is not None:
            return _text(path, row.line, name, value)
    return None


def _first_frame(path: Path, row: _Row) -> tuple[str | None, str | None]:
    """The first frame's path as stated and as found."""
    value = row.values.get("first_frame_path")
    if value is None or value == "":
        return None, None
    if not isinstance(value, str):
        found = type(value).__name__
        raise OmniNFTError(f"{path}:{row.line}: first_frame_path: found a {found}, expected a path")
    frame = path.parent / value
    if not frame.is_file():
        raise OmniNFTError(f"{path}:{row.line}: first_frame_path: found {value!r}, but there is no file {frame}")
    return value, str(frame)


def _text(path: Path, line: int, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise OmniNFTError(f"{path}:{line}: {name}: found {value!r} ({type(value).__name__}), expected text")
    text = unicodedata.normalize("NFC", value).strip()
    if not text:
        raise OmniNFTError(f"{path}:{line}: {name}: found {value!r}, expected a text that is not empty")
    if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        # JSON can spell half a surrogate pair; no tokeniser and no file can hold it.
        raise OmniNFTError(f"{path}:{line}: {name}: found half of a surrogate pair in {text!r}, expected valid Unicode")
    return text


def _shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
