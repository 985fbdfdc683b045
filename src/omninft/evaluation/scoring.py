"""`omninft score`: rewards on clips that are already files.

Work that finished stays: every scored file is a line of `<output>.partial.jsonl` until the table is whole, and the
same command goes on from there.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omninft.clips.journal import Journal, file_stamp
from omninft.clips.listing import LISTING, read_listing
from omninft.clips.media import read_clip
from omninft.clips.workers import CHUNK_CLIPS, VIDEO_ENDINGS, decoded_chunks
from omninft.config import RewardConfig
from omninft.distributed import available_cores
from omninft.evaluation.clip_folder import sample_name
from omninft.files import write_atomically
from omninft.prompts.prompt_file import PROMPT_ENDINGS
from omninft.prompts.sources import open_rows
from omninft.rewards.failures import LOG_NAME, FailureLog
from omninft.rewards.registry import build_reward
from omninft.rewards.runner import RewardRunner
from omninft.types import Clip, OmniNFTError, Prompt, ScoreTable

TABLE_ENDINGS = (".csv", ".json", ".parquet")


@dataclass(frozen=True)
class FileScores:
    """One file: its scores, None where missing, and why."""

    file: str  # relative to the folder
    prompt_id: str
    scores: dict[str, float | None]
    reasons: dict[str, str]
    no_prompt: str = ""  # why its prompt is not known


@dataclass(frozen=True)
class ScoreResult:
    """All files, in the order of their names."""

    names: tuple[str, ...]
    rows: tuple[FileScores, ...]

    def means(self) -> dict[str, float | None]:
        """Mean over the files that could be scored."""
        columns = {n: [r.scores[n] for r in self.rows if r.scores[n] is not None] for n in self.names}
        return {n: float(np.mean(v)) if v else None for n, v in columns.items()}  # type: ignore[arg-type]

    def without_prompts(self) -> dict[str, list[str]]:
        """Why prompts are not known -> the files."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if row.no_prompt:
                found.setdefault(row.no_prompt, []).append(row.file)
        return found

    def write(self, path: Path) -> None:
        """A .csv, .json or .parquet table, whole or not at all.

        Raises:
            OmniNFTError: another ending, Parquet without pyarrow, or a place that cannot be written to.
        """
        write = {".csv": self._csv, ".json": self._json, ".parquet": self._parquet}[table_ending(path)]
        write_atomically(path, write)

    def _columns(self) -> dict[str, list[Any]]:
        return {
            "file": [r.file for r in self.rows],
            "prompt_id": [r.prompt_id for r in self.rows],
            **{n: [r.scores[n] for r in self.rows] for n in self.names},
            "missing": ["; ".join(f"{n}: {why}" for n, why in r.reasons.items()) for r in self.rows],
        }

    def _csv(self, path: Path) -> None:
        text = io.StringIO()
        writer = csv.writer(text)
        columns = self._columns()
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        path.write_text(text.getvalue(), encoding="utf-8")

    def _json(self, path: Path) -> None:
        tree = {"clips": [asdict(r) for r in self.rows], "means": self.means()}
        path.write_text(json.dumps(tree, indent=1, allow_nan=False), encoding="utf-8")

    def _parquet(self, path: Path) -> None:
        pyarrow, parquet = _pyarrow()
        kinds = {n: pyarrow.float64() for n in self.names}
        arrays = {n: pyarrow.array(v, kinds.get(n, pyarrow.string())) for n, v in self._columns().items()}
        parquet.write_table(pyarrow.table(arrays), path)


def table_ending(path: Path) -> str:
    """The ending of a table's name. Raises OmniNFTError: it is none of those that can be written, or Parquet cannot."""
    ending = path.suffix.lower()
    if ending not in TABLE_ENDINGS:
        raise OmniNFTError(f"cannot write {path}: found ending {path.suffix!r}, expected {', '.join(TABLE_ENDINGS)}")
    if ending == ".parquet":
        _pyarrow()
    return ending


def score_files(
    folder: Path,
    rewards: Sequence[RewardConfig],
    prompts: Path | None = None,
    output: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ScoreResult:
    """Score every video of a folder (and the folders in it), or one file.

    A file that cannot be read is reported and the others are scored. With `output` the table is written there, and
    an interrupted call goes on: files scored whole and unchanged since are not scored again.

    Raises:
        OmniNFTError: no clips, an unknown reward, weights that are missing, an output of an unknown ending, or an
            unfinished table of other rewards.
    """
    if output is not None:
        table_ending(output)
    base = folder.parent if folder.is_file() else folder
    found = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_ENDINGS)
    files = [p for p in found if not p.name.startswith(".")]
    if not files:
        raise OmniNFTError(f"no clips in {folder}; looked for {', '.join(VIDEO_ENDINGS)}")
    built = [build_reward(config) for config in rewards]
    missing = [why for reward in built if (why := reward.missing()) is not None]
    if missing:
        raise OmniNFTError("; ".join(missing))
    known = _Prompts(prompts)
    done: dict[str, FileScores] = {}
    failures = FailureLog(output.with_name(f"{output.name}.{LOG_NAME}") if output is not None else None)
    with _journal(output, rewards, prompts) as journal, RewardRunner(built, 1.0, failures) as runner:
        names = tuple(c.name for c in runner.components)
        for entry in journal.resume(lambda e: not e["reasons"] and e["stamp"] == file_stamp(base / e["file"])):
            done[entry["file"]] = FileScores(**{k: v for k, v in entry.items() if k != "stamp"})
        progress(len(done), len(files))
        todo = [file for file in files if _label(file, base) not in done]
        workers = available_cores()
        for chunk in decoded_chunks(
            todo, lambda file: read_clip(file, known.of(file)[0], require_audio=False), workers, CHUNK_CLIPS
        ):
            rows = _rows(runner, chunk, names, base, lambda file: known.of(file)[1])
            for row, file in zip(rows, [file for file, _ in chunk], strict=True):
                done[row.file] = row
                journal.add({**asdict(row), "stamp": file_stamp(file)})
            progress(len(done), len(files))
        result = ScoreResult(names, tuple(done[_label(file, base)] for file in files))
        if output is not None:
            result.write(output)
            journal.remove()
    return result


def _rows(
    runner: RewardRunner,
    chunk: list[tuple[Path, Clip | OmniNFTError]],
    names: tuple[str, ...],
    base: Path,
    no_prompt: Callable[[Path], str],
) -> Iterator[FileScores]:
    clips = [clip for _, clip in chunk if isinstance(clip, Clip)]
    table = runner.score(clips) if clips else ScoreTable((), np.empty((0, len(names))))
    b = 0
    for file, clip in chunk:
        label = _label(file, base)
        if isinstance(clip, OmniNFTError):
            yield FileScores(label, file.stem, dict.fromkeys(names), dict.fromkeys(names, str(clip)))
            continue
        values = {n: float(v) if np.isfinite(v) else None for n, v in zip(names, table.values[b], strict=True)}
        reasons = {names[k]: why for (row, k), why in table.reasons.items() if row == b}
        if unknown := no_prompt(file):
            # What a reward says of an empty prompt (it names the field) would mislead: nobody gave an empty one.
            reasons = {n: f"its prompt is not known: {unknown}" if "prompt_" in r else r for n, r in reasons.items()}
        yield FileScores(label, clip.prompt.id, values, reasons, unknown)
        b += 1


def _label(file: Path, base: Path) -> str:
    return file.relative_to(base).as_posix()


def _journal(output: Path | None, rewards: Sequence[RewardConfig], prompts: Path | None) -> Journal:
    path = output.with_name(f"{output.name}.partial.jsonl") if output is not None else None
    digest = hashlib.sha256(prompts.read_bytes()).hexdigest() if prompts is not None and prompts.is_file() else None
    header = {"rewards": [r.model_dump() for r in rewards], "prompts": digest}
    return Journal(path, header, "scores of other rewards, options or prompts")


@dataclass(frozen=True)
class _Known:
    """Prompts by the stem of a clip's file, or its part before the sample's number; and where one is not known, why."""

    prompts: dict[str, Prompt]
    absence: Callable[[str], str]  # stem -> why it is not among them

    def of(self, stem: str) -> tuple[Prompt, str]:
        found = self.prompts.get(stem) or self.prompts.get(stem.rsplit("-", 1)[0])
        return (found, "") if found is not None else (Prompt(stem, "", "", ""), self.absence(stem))


class _Prompts:
    """Prompts of clip files, by id, by file name, or by JavisBench's sample_0000 for row 0 of a prompt file.

    They come from the file given, else from a scores.json or prompts.csv (.jsonl, .txt) beside the clips.
    """

    def __init__(self, source: Path | None) -> None:
        self._given = _in_file(str(source)) if source is not None else None
        self._beside: dict[Path, _Known] = {}

    def of(self, file: Path) -> tuple[Prompt, str]:
        """A file's prompt; or an empty one and why, so that rewards that need no words are scored all the same."""
        if self._given is not None:
            return self._given.of(file.stem)
        folder = file.parent
        if folder not in self._beside:
            tables = [t for ending in PROMPT_ENDINGS if (t := folder / f"prompts{ending}").is_file()]
            listing = folder / LISTING
            if listing.is_file():
                self._beside[folder] = _listed(listing)
            elif tables:
                self._beside[folder] = _in_file(str(tables[0]))
            else:
                nothing = f"{folder} has no {listing.name} and no prompts{PROMPT_ENDINGS[0]}, and no --prompts is given"
                self._beside[folder] = _Known({}, lambda stem: nothing)
        return self._beside[folder].of(file.stem)


def _in_file(source: str) -> _Known:
    rows = open_rows(source)
    known = {sample_name(row.index): row.prompt for row in rows} | {row.prompt.id: row.prompt for row in rows}

    def absence(stem: str) -> str:
        if re.fullmatch(r"sample_\d+", stem):
            return f"{source} has {len(rows)} rows, from {sample_name(0)} to {sample_name(len(rows) - 1)}"
        return f"{source} has no prompt of the file's name as id, with or without a sample's number"

    return _Known(known, absence)


def _listed(listing: Path) -> _Known:
    clips = read_listing(listing)
    known = {Path(c.file).stem: c.prompt for c in clips if c.prompt.prompt_v or c.prompt.prompt_a or c.prompt.prompt_av}
    bare = {Path(c.file).stem for c in clips} - set(known)
    return _Known(known, lambda stem: f"{listing} " + ("gives no text for it" if stem in bare else "does not list it"))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise OmniNFTError("a .parquet table needs pyarrow: pip install 'omninft[parquet]'") from error
    return pyarrow, pyarrow.parquet
