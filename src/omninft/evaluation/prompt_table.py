"""The prompts of a benchmark, row by row: a row's number names its clip (`sample_0000.mp4`).

Read from CSV with a header, JSONL, TXT (a prompt a line) or a split of the bundled world. JavisBench's columns: `text`,
`audio_text`, `path`, `audio_path`, `cat0_ind` .. `cat4_ind`, and `pred_video_path`, `pred_audio_path` for clips that
lie elsewhere. Own columns: `id` (or `idx`), `prompt_v`, `prompt_a`, `prompt_av`, `category`. Others are passed over.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omninft.prompts.prompt_set import TEXT_FIELDS
from omninft.prompts.sources import WORLD, open_prompts
from omninft.types import OmniNFTError, Prompt

# JavisBench's dimensions in the order of cat0_ind .. cat4_ind, and how many categories each has: 19 in all.
DIMENSIONS = {
    "event_scenario": 5,
    "visual_style": 3,
    "sound_type": 5,
    "temporal_composition": 3,
    "spatial_composition": 3,
}
LISTING = "scores.json"
PROMPT_ENDINGS = (".csv", ".jsonl", ".txt")
_TEXTS = ("text", "prompt_v", "prompt_av")
_CLIP_PATHS = ("pred_video_path", "pred_audio_path")


@dataclass(frozen=True)
class PromptRow:
    """One prompt; a file that gives the clip's place gives it here."""

    index: int  # 0-based row of the file
    prompt: Prompt
    categories: tuple[str, ...] = ()  # "sound_type/2", or the row's own `category`
    video_path: Path | None = None
    audio_path: Path | None = None


def read_prompt_rows(source: str) -> tuple[PromptRow, ...]:
    """All rows of "world:test" (or another split) or of a file, in its order.

    What is seen is judged by `prompt_v`, else `text`; what is heard by `audio_text`, else `prompt_a`, else `text`. A
    model is asked for `prompt_av`, else `text`, else `prompt_v` and `prompt_a` together. Without `id` (or `idx`) the
    row's number is the prompt's id. Relative clip paths start at the file's folder.

    Raises:
        OmniNFTError: naming file, line and column: no such file, another ending, no text, a category that is no list of
            numbers, an id that stands twice.
    """
    if source.startswith(WORLD):
        prompts = open_prompts(source).prompts
        return tuple(PromptRow(i, p, (p.category,) if p.category else ()) for i, p in enumerate(prompts))
    path = Path(source)
    readers = dict(zip(PROMPT_ENDINGS, (_csv_rows, _jsonl_rows, _txt_rows), strict=True))
    if path.suffix.lower() not in readers:
        raise OmniNFTError(f"{path}: found the ending {path.suffix!r}, expected .csv, .jsonl or .txt, or world:test")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise OmniNFTError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise OmniNFTError(f"{path}: not UTF-8 ({error})") from error
    rows: list[PromptRow] = []
    lines: dict[str, int] = {}
    for line, values in readers[path.suffix.lower()](path, text):
        row = _row(path, line, len(rows), values)
        if row.prompt.id in lines:
            before = lines[row.prompt.id]
            raise OmniNFTError(f"{path}:{line}: id: found {row.prompt.id!r}, which line {before} has already")
        lines[row.prompt.id] = line
        rows.append(row)
    if not rows:
        raise OmniNFTError(f"{path}: found no prompts, expected at least one")
    return tuple(rows)


def rows_digest(rows: Sequence[PromptRow]) -> str:
    """16 hexadecimal digits of what is asked for, in which order; not of where clips lie."""
    tree = [[p.id, p.prompt_v, p.prompt_a, p.prompt_av] for p in (row.prompt for row in rows)]
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:16]


def rows_beside(folder: Path) -> tuple[PromptRow, ...]:
    """The clips that a scores.json in the folder lists with their prompts, as `omninft sample` writes it.

    `sample_0012.mp4` is row 12; clips of other names are numbered as they are listed.

    Raises:
        OmniNFTError: there is none, or it is not such a file.
    """
    listing = folder / LISTING
    try:
        entries = json.loads(listing.read_text(encoding="utf-8"))["clips"]
        rows = []
        for number, entry in enumerate(entries):
            prompt = Prompt(str(entry["prompt_id"]), *(str(entry.get(k) or "") for k in TEXT_FIELDS))
            file = folder / entry["file"]
            named = re.fullmatch(r"sample_(\d+)", file.stem)
            rows.append(PromptRow(int(named[1]) if named else number, prompt, video_path=file))
        return tuple(rows)
    except FileNotFoundError as error:
        raise OmniNFTError(
            f"{folder} does not say what its clips were asked for: it has no {LISTING}; give a prompt file (--prompts)"
        ) from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise OmniNFTError(f"{listing}: not a listing of clips as `omninft sample` writes it ({error!r})") from error


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    found = reader.fieldnames or []
    if not set(found) & set(_TEXTS):
        raise OmniNFTError(f"{path}:1: found the columns {', '.join(found) or 'none'}, expected {' or '.join(_TEXTS)}")
    line = 2
    for values in reader:
        yield line, values
        line = reader.line_num + 1


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, content in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if not content.strip():
            continue
        try:
            values = json.loads(content)
        except json.JSONDecodeError as error:
            raise OmniNFTError(f"{path}:{line}: not JSON ({error})") from error
        if not isinstance(values, dict):
            raise OmniNFTError(f"{path}:{line}: found a {type(values).__name__}, expected an object")
        yield line, values


def _txt_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, content in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if content.strip():
            yield line, {"text": content}


def _row(path: Path, line: int, index: int, values: Mapping[str, Any]) -> PromptRow:
    def cell(*names: str) -> str:
        found = (values.get(name) for name in names)
        return next((str(v).strip() for v in found if v is not None and str(v).strip()), "")

    seen = cell("prompt_v", "text", "prompt_av")
    heard = cell("audio_text", "prompt_a", "text", "prompt_av") or seen
    if not seen:
        raise OmniNFTError(f"{path}:{line}: no text; expected one in {', '.join(_TEXTS)}")
    asked = cell("prompt_av", "text") or (f"{seen} {heard}" if heard != seen else seen)
    category = cell("category")
    places = [path.parent / cell(name) if cell(name) else None for name in _CLIP_PATHS]
    # A row's number in full digits: ids sort as rows do.
    prompt = Prompt(cell("id", "idx") or f"{index:05d}", seen, heard, asked, category or None)
    categories = (*((category,) if category else ()), *_javis_categories(path, line, values))
    return PromptRow(index, prompt, categories, *places)


def _javis_categories(path: Path, line: int, values: Mapping[str, Any]) -> list[str]:
    """From cat0_ind .. cat4_ind, each a list of numbers: "0,2", "[0, 2]", or one in JSON."""
    labels = []
    for number, dimension in enumerate(DIMENSIONS):
        name = f"cat{number}_ind"
        value = values.get(name)
        if value is None:
            continue
        text = str(value).strip().strip("[]() ")
        if not text:
            continue
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isdigit() for part in parts):
            raise OmniNFTError(f"{path}:{line}: {name}: found {value!r}, expected numbers such as 0,2")
        labels += [f"{dimension}/{int(part)}" for part in dict.fromkeys(parts)]
    return labels
