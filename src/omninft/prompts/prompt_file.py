"""The one reader of prompt files: JSONL, CSV and plain text, our columns and JavisBench's.

A row gives `prompt_v` (what is seen), `prompt_a` (what is heard) and `prompt_av` (both, which the generator reads), and
optionally `id` (or `idx`), `category` and `first_frame_path`. JavisBench's names are known too: `text`, `audio_text`,
`cat0_ind` to `cat4_ind`, and where the clips of a row lie. Whatever the reader had to fill in or drop is in the notes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omninft.files import read_bytes
from omninft.naming import SAFE_NAME, did_you_mean, is_safe_name
from omninft.types import OmniNFTError, Prompt

TEXT_FIELDS = ("prompt_v", "prompt_a", "prompt_av")
# Other names under which files in the wild hold the joint prompt, and what is heard.
JOINT_NAMES = ("prompt_av", "prompt", "text")
HEARD_NAMES = ("prompt_a", "audio_text")
# JavisBench's dimensions in the order of cat0_ind .. cat4_ind, and how many categories each has: 19 in all.
DIMENSIONS = {
    "event_scenario": 5,
    "visual_style": 3,
    "sound_type": 5,
    "temporal_composition": 3,
    "spatial_composition": 3,
}
CATEGORY_FIELDS = tuple(f"cat{number}_ind" for number in range(len(DIMENSIONS)))
CLIP_FIELDS = ("pred_video_path", "pred_audio_path")
REAL_FIELDS = ("path", "audio_path")  # JavisBench's own clip of the row, which nothing here reads
OWN_FIELDS = (*TEXT_FIELDS, "prompt", "text", "id", "idx", "category", "first_frame_path")
KNOWN_FIELDS = (*OWN_FIELDS, "audio_text", *CATEGORY_FIELDS, *CLIP_FIELDS, *REAL_FIELDS)
PROMPT_ENDINGS = (".csv", ".jsonl", ".txt")
# No model reads more than some thousand characters, which the service of rewards takes too; known fields are 20.
MOST_CHARACTERS, MOST_FIELDS = 10_000, 200
# Line ends only: str.splitlines would also split at characters that may stand inside a prompt, such as U+2028.
_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class PromptRow:
    """One row of a prompt file: its prompt, and what a benchmark wants to know beside it."""

    index: int  # 0-based row of the file: it finds sample_0000.mp4 and the like, and is no id
    prompt: Prompt
    categories: tuple[str, ...] = ()  # "sound_type/2", or the row's own `category`
    video_path: Path | None = None  # of the row's clip, where the file says it
    audio_path: Path | None = None
    repeat: int = 0  # rows before this one that ask for the same


@dataclass(frozen=True)
class PromptFile:
    """All rows of a file in its order, repeated ones too, and what the reader filled in."""

    rows: tuple[PromptRow, ...]
    notes: tuple[str, ...] = ()
    repeats: tuple[str, ...] = ()  # "line 4 repeats line 1"


@dataclass(frozen=True)
class _Row:
    """One record as the file has it; absent and null fields are left out."""

    line: int  # 1-based, where the record begins
    values: dict[str, Any]


@dataclass
class _Notes:
    """What happened to which lines, told once per kind and not once per line."""

    told: list[str] = field(default_factory=list)  # of the file as a whole
    lines: dict[str, list[str]] = field(default_factory=dict)

    def add(self, message: str, where: str) -> None:
        self.lines.setdefault(message, []).append(where)

    def texts(self) -> tuple[str, ...]:
        return (*self.told, *(told_once(message, where) for message, where in self.lines.items()))


def read_prompt_file(path: str | Path) -> PromptFile:
    """Read a prompt file: .jsonl (one object a line), .csv (with a header) or .txt (one prompt a line).

    A missing `prompt_av` is `prompt_v` + space + `prompt_a`. A joint text (`prompt_av`, `prompt` or `text`) serves for
    a missing `prompt_v` or `prompt_a`, with a note; so does each line of a .txt file for all three. `audio_text` is
    another name of `prompt_a`. When a row has both `id` and `idx`, `id` counts. A row without either gets the hash of
    its content as id, so that the noise keyed by it depends neither on the order of the rows nor on their number; rows
    that ask for the same then share it, and are counted. Texts are Unicode NFC without white space at the ends; blank
    lines are skipped; UTF-8 with or without a byte order mark. Paths are relative to the prompt file; those of the
    rows are joined to its folder. Of a row with JavisBench's categories, fields of other names are left out with a
    note: that file comes with facts about its media.

    Raises OmniNFTError naming file, line and field, with what was found and what was expected: no such file, another
    extension, not UTF-8, no prompts, a malformed row, an unknown field (with the nearest known one), a missing or empty
    text, an id that no file can bear, two rows of the same id, a category that is no list of numbers, a first frame
    that does not exist.
    """
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        known = ", ".join(_READERS)
        raise OmniNFTError(f"{path}: unknown extension {path.suffix!r}, expected one of {known}")
    notes = _Notes()
    rows: list[PromptRow] = []
    lines: dict[str, int] = {}  # id -> line that has it first
    counts: dict[str, int] = {}  # content hash -> rows that have it
    repeats: list[str] = []
    for row in read(path, _read_text(path), notes):
        prompt, own_id = _prompt_of(path, row, notes)
        if prompt.id in counts and not own_id:
            repeats.append(f"line {row.line} repeats line {lines[prompt.id]}")
        elif prompt.id in lines:
            raise OmniNFTError(
                f"{path}:{row.line}: id: found {prompt.id!r}, which line {lines[prompt.id]} has already; "
                "expected distinct ids"
            )
        lines.setdefault(prompt.id, row.line)
        repeat = counts.get(prompt.id, 0)
        if not own_id:
            counts[prompt.id] = repeat + 1
        own = (prompt.category,) if prompt.category else ()
        categories = (*own, *_javis_categories(path, row))
        video, audio = (_clip_path(path, row, name) for name in CLIP_FIELDS)
        rows.append(PromptRow(len(rows), prompt, categories, video, audio, repeat))
    if not rows:
        raise OmniNFTError(f"{path}: found no prompts, expected at least one")
    return PromptFile(tuple(rows), notes.texts(), tuple(repeats))


def told_once(message: str, where: Sequence[str], shown: int = 5) -> str:
    """A note about several rows, the first of them named."""
    more = f" and {len(where) - shown} more" if len(where) > shown else ""
    rows = "1 row" if len(where) == 1 else f"{len(where)} rows"
    return f"{message} ({rows}: {'; '.join(where[:shown])}{more})"


def _read_text(path: Path) -> str:
    if not path.exists():
        raise OmniNFTError(f"{path}: no such file")
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The byte order mark, when there is one, is not counted in the error's position.
        content = content.removeprefix(b"\xef\xbb\xbf")
        line = len(re.findall(rb"\r\n|\r|\n", content[: error.start])) + 1
        found = content[error.start]
        raise OmniNFTError(f"{path}:{line}: found byte 0x{found:02x} ({error.reason}), expected UTF-8") from error


def _jsonl_rows(path: Path, text: str, notes: _Notes) -> Iterator[_Row]:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _require_few(path, number, len(pairs))
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise OmniNFTError(f"{path}:{number}: {shortened(key)}: found twice in one row, expected once")
            found[key] = value
        return found

    for number, line in enumerate(_LINE_END.split(text), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=distinct)
        except (ValueError, RecursionError) as error:
            # A number of thousands of digits is a ValueError of another kind.
            where = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise OmniNFTError(
                f"{path}:{number}: malformed JSON ({where}): found {shortened(line)!r}, expected one object on a line"
            ) from error
        if not isinstance(value, dict):
            raise OmniNFTError(
                f"{path}:{number}: found a JSON {type(value).__name__}, expected an object such as "
                '{"prompt_v": "...", "prompt_a": "..."}'
            )
        for key in _foreign(path, number, list(value)):
            notes.add(_FOREIGN.format(key), f"line {number}")
            del value[key]
        yield _Row(number, {key: v for key, v in value.items() if v is not None})


def _csv_rows(path: Path, text: str, notes: _Notes) -> Iterator[_Row]:
    # strict: an unclosed quote would otherwise swallow the rest of the file as one cell.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    foreign: list[str] = []
    line = 1
    try:
        for cells in reader:
            begin, line = line, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                _require_few(path, begin, len(header))
                foreign = _foreign(path, begin, header)
                for key in foreign:
                    notes.add(_FOREIGN.format(key), f"line {begin}")
                _require_columns(path, begin, header)
                continue
            if len(cells) != len(header):
                raise OmniNFTError(
                    f"{path}:{begin}: found {len(cells)} cells, expected {len(header)} ({', '.join(header)}); "
                    "a text with commas needs quotes"
                )
            # CSV has no null: an empty cell is one.
            named = {key: cell for key, cell in zip(header, cells, strict=True) if cell.strip()}
            yield _Row(begin, {key: cell for key, cell in named.items() if key not in foreign})
    except csv.Error as error:
        raise OmniNFTError(f"{path}:{line}: malformed CSV: {error}") from error


def _txt_rows(path: Path, text: str, notes: _Notes) -> Iterator[_Row]:
    notes.told.append("plain text: each line serves as prompt_v, prompt_a and prompt_av")
    for number, line in enumerate(_LINE_END.split(text), start=1):
        if line.strip():
            yield _Row(number, dict.fromkeys(TEXT_FIELDS, line))


_READERS: dict[str, Callable[[Path, str, _Notes], Iterator[_Row]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".txt": _txt_rows,
}
_FOREIGN = "{} is a field of another tool's and was left out"


def _foreign(path: Path, line: int, keys: Sequence[str]) -> list[str]:
    """Keys that nobody here knows, of a row with JavisBench's categories. Raises OmniNFTError for those of others."""
    unknown = [key for key in keys if key not in KNOWN_FIELDS]
    if not set(keys) & set(CATEGORY_FIELDS):
        for key in unknown:
            hint = did_you_mean(shortened(key), KNOWN_FIELDS) or f"; expected some of {', '.join(OWN_FIELDS)}"
            raise OmniNFTError(f"{path}:{line}: {shortened(key)}: unknown field{hint}")
    return unknown


def _require_few(path: Path, line: int, fields: int) -> None:
    if fields > MOST_FIELDS:
        raise OmniNFTError(f"{path}:{line}: found {fields} fields in one row, expected at most {MOST_FIELDS}")


def _require_columns(path: Path, line: int, header: list[str]) -> None:
    for key in header:
        if header.count(key) > 1:
            raise OmniNFTError(f"{path}:{line}: {key}: found two columns of this name, expected one")
    if not any(name in header for name in JOINT_NAMES):
        for names in (("prompt_v",), HEARD_NAMES):
            if not set(names) & set(header):
                found = ", ".join(header)
                raise OmniNFTError(
                    f"{path}:{line}: {names[0]}: missing column; found {found}, "
                    "expected prompt_v and prompt_a, or prompt_av"
                )


def _prompt_of(path: Path, row: _Row, notes: _Notes) -> tuple[Prompt, bool]:
    """The prompt of a row, and whether its id is its own (not a content hash)."""
    joint_name = _one_of(path, row, JOINT_NAMES)
    names = {"prompt_v": "prompt_v", "prompt_a": _one_of(path, row, HEARD_NAMES) or "prompt_a"}
    given = {
        name: _text(path, row.line, name, row.values[name])
        for name in (*TEXT_FIELDS, *JOINT_NAMES, *HEARD_NAMES)
        if name in row.values
    }
    joint = given[joint_name] if joint_name is not None else None
    texts: dict[str, str] = {}
    for part, name in names.items():
        if name in given:
            texts[part] = given[name]
        elif joint is not None:
            texts[part] = joint
            notes.add(f"no {part}: {joint_name} serves for it", f"line {row.line}")
        else:
            found = ", ".join(row.values) or "nothing"
            raise OmniNFTError(
                f"{path}:{row.line}: {part}: missing or empty; found {found}, "
                f"expected {part}, or a prompt_av to serve for it"
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


def _one_of(path: Path, row: _Row, names: Sequence[str]) -> str | None:
    """Which of several names of one thing the row uses."""
    used = [name for name in names if name in row.values]
    if len(used) > 1:
        found = " and ".join(used)
        raise OmniNFTError(f"{path}:{row.line}: {used[1]}: found {found}, expected one of them: all name {names[0]}")
    return used[0] if used else None


def _own_id(path: Path, row: _Row) -> str | None:
    for name in ("id", "idx"):
        value = row.values.get(name)
        if value is None:
            continue
        is_number = isinstance(value, int) and not isinstance(value, bool)
        found = str(value) if is_number else _text(path, row.line, name, value)
        if not is_safe_name(found):
            # Clips are named by it.
            raise OmniNFTError(f"{path}:{row.line}: {name}: found {shortened(found)!r}, expected {SAFE_NAME}")
        return found
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
    try:
        there = frame.is_file()
    except OSError:  # a name too long for any file
        there = False
    if not there:
        found, place = shortened(value), shortened(str(frame), 300)
        raise OmniNFTError(f"{path}:{row.line}: first_frame_path: found {found!r}, but there is no file {place}")
    return value, str(frame)


def _clip_path(path: Path, row: _Row, name: str) -> Path | None:
    return path.parent / _text(path, row.line, name, row.values[name]) if row.values.get(name) else None


def _javis_categories(path: Path, row: _Row) -> list[str]:
    """From cat0_ind .. cat4_ind, each a list of numbers: "0,2", "[0, 2]", or one in JSON."""
    labels = []
    for name, dimension in zip(CATEGORY_FIELDS, DIMENSIONS, strict=True):
        value = row.values.get(name, "")
        text = str(value).strip().strip("[]() ")
        parts = [part.strip() for part in text.split(",")] if text else []
        if not all(part.isdecimal() and len(part) < 10 for part in parts):
            raise OmniNFTError(
                f"{path}:{row.line}: {name}: found {shortened(repr(value))}, expected numbers such as 0,2"
            )
        labels += [f"{dimension}/{int(part)}" for part in dict.fromkeys(parts)]
    return labels


def _text(path: Path, line: int, name: str, value: object) -> str:
    if not isinstance(value, str):
        found = shortened(repr(value))
        raise OmniNFTError(f"{path}:{line}: {name}: found {found} ({type(value).__name__}), expected text")
    if len(value) > MOST_CHARACTERS:
        found = f"{len(value)} characters, {shortened(value)!r}"
        raise OmniNFTError(f"{path}:{line}: {name}: found {found}, expected at most {MOST_CHARACTERS}")
    if "\0" in value:
        raise OmniNFTError(f"{path}:{line}: {name}: found a zero byte in {shortened(value)!r}, expected text")
    text = unicodedata.normalize("NFC", value).strip()
    if not text:
        raise OmniNFTError(f"{path}:{line}: {name}: found {value!r}, expected a text that is not empty")
    if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        # JSON can spell half a surrogate pair; no tokeniser and no file can hold it.
        raise OmniNFTError(
            f"{path}:{line}: {name}: found half of a surrogate pair in {shortened(text)!r}, expected valid Unicode"
        )
    return text


def shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
