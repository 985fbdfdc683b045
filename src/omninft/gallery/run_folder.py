"""What a run folder holds, read for a report. Whatever is absent or damaged is left out and said, never fatal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omninft.clips.listing import LISTING, ListedClip, read_listing
from omninft.evaluation.paired import PairedTable
from omninft.files import parse_yaml, read_json_lines, read_text
from omninft.prompts.prompt_file import shortened
from omninft.types import OmniNFTError, Prompt


@dataclass(frozen=True)
class ClipRecord:
    """One clip as `scores.json` describes it."""

    path: Path
    prompt: Prompt
    sample: int
    scores: dict[str, float]  # only those that are there
    reasons: dict[str, str]  # measure -> why its score is missing
    seen: tuple[float, ...] = ()  # s, events in the picture
    heard: tuple[float, ...] | None = None  # s, onsets in the sound; None where nobody has looked for them
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClipSet:
    """The clips of one folder under `samples/`, by (prompt id, sample), in the order of evaluation."""

    name: str
    clips: dict[tuple[str, int], ClipRecord]


@dataclass(frozen=True)
class RunFolder:
    """Everything a report tells about."""

    path: Path
    config: dict[str, Any]  # {} when there is none yet
    config_text: str
    metrics: tuple[dict[str, Any], ...]
    table: PairedTable | None
    clip_sets: dict[str, ClipSet]
    exports: tuple[str, ...]  # safetensors files under export/, as paths relative to it
    problems: tuple[str, ...]  # what could not be read, and why

    @property
    def iterations(self) -> list[dict[str, Any]]:
        """Rows of finished iterations by number; of a number that was done twice, the later row."""
        rows = {r["iteration"]: r for r in self.metrics if r.get("kind") == "iteration" and "iteration" in r}
        return [rows[i] for i in sorted(rows)]

    def evaluations(self) -> dict[str, list[dict[str, Any]]]:
        """Evaluation rows of every split by iteration; of one that was done twice, the later row."""
        splits: dict[str, dict[int, dict[str, Any]]] = {}
        for row in self.metrics:
            if row.get("kind") == "evaluation" and "iteration" in row:
                splits.setdefault(str(row.get("split", "dev")), {})[row["iteration"]] = row
        return {split: [rows[i] for i in sorted(rows)] for split, rows in splits.items()}

    @property
    def events(self) -> list[dict[str, Any]]:
        return [row for row in self.metrics if row.get("kind") == "event"]

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A value of the config by its dotted key."""
        node: Any = self.config
        for part in dotted.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        return node


def read_run_folder(run_dir: str | Path) -> RunFolder:
    """Read what is there. Raises OmniNFTError only when `run_dir` is not a folder."""
    path = Path(run_dir)
    if not path.is_dir():
        raise OmniNFTError(f"{path}: no such run folder")
    problems: list[str] = []
    config, config_text = _read_config(path / "config.yaml", problems)
    metrics = _read_metrics(path / "metrics.jsonl", problems)
    clip_sets = {}
    for scores in sorted((path / "samples").glob(f"*/{LISTING}")):
        clips = _read_clips(scores, problems)
        if clips:
            clip_sets[scores.parent.name] = ClipSet(scores.parent.name, clips)
    export = path / "export"
    exports = tuple(sorted(p.relative_to(export).as_posix() for p in export.rglob("*.safetensors")))
    table = _read_table(path / "evaluation.json", problems)
    return RunFolder(path, config, config_text, tuple(metrics), table, clip_sets, exports, tuple(problems))


def shown_sets(run: RunFolder) -> list[tuple[str, ClipSet]]:
    """The sets to compare, with labels: base and trained on test, else the first and last on dev, else any one."""
    if "test-base" in run.clip_sets and "test-trained" in run.clip_sets:
        return [("Base", run.clip_sets["test-base"]), ("Trained", run.clip_sets["test-trained"])]
    dev = {int(m[1]): s for name, s in run.clip_sets.items() if (m := re.fullmatch(r"dev-(\d+)", name))}
    if dev:
        chosen = sorted({min(dev), max(dev)})
        return [(after(at), dev[at]) for at in chosen]
    others = [(name, clips) for name, clips in run.clip_sets.items() if not name.startswith("preview-")]
    return others[:1]


def after(iterations: int) -> str:
    """What the policy is called that so many iterations made."""
    return "Base" if iterations == 0 else f"After {iterations} iteration{'' if iterations == 1 else 's'}"


def _read_metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        rows = read_json_lines(path)
    except OmniNFTError as error:
        problems.append(str(error))
        return []
    kept = [row for row in rows if _is_row(row)]
    if len(kept) < len(rows):
        first = next(row for row in rows if not _is_row(row))
        odd = f"{len(rows) - len(kept)} of {len(rows)} rows"
        problems.append(f"{path.name}: left out {odd}, which no run writes, such as {shortened(str(first))}")
    return kept


def _is_row(row: Mapping[str, Any]) -> bool:
    """Whether a row of metrics has the types that `runs/metrics.py` describes."""
    kind, at = row.get("kind"), row.get("iteration")
    if not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < 2**53:
        return False
    if kind == "event":
        return all(isinstance(row.get(name), str) for name in ("level", "message"))
    if kind == "evaluation":
        measures = row.get("measures")
        return (
            isinstance(row.get("split"), str)
            and isinstance(measures, dict)
            and all(
                isinstance(numbers, dict) and all(map(_is_number, numbers.values())) for numbers in measures.values()
            )
        )
    return all(_is_number(value) for name, value in row.items() if name not in ("kind", "iteration"))


def _is_number(value: object) -> bool:
    """Numbers in the range of a float, and null."""
    return value is None or (isinstance(value, int | float) and abs(value) < 2.0**1023)


def _read_config(path: Path, problems: list[str]) -> tuple[dict[str, Any], str]:
    if not path.is_file():
        return {}, ""
    text = ""
    try:
        text = read_text(path)
        tree = parse_yaml(text, path.name)
    except OmniNFTError as error:
        problems.append(str(error))
        return {}, text
    return (tree if isinstance(tree, dict) else {}), text


def _read_table(path: Path, problems: list[str]) -> PairedTable | None:
    if not path.is_file():
        return None
    try:
        return PairedTable.from_json(read_text(path))
    except OmniNFTError as error:
        problems.append(f"{path.name}: {error}")
        return None


def _read_clips(path: Path, problems: list[str]) -> dict[tuple[str, int], ClipRecord]:
    try:
        records = [clip_record(path.parent, listed) for listed in read_listing(path)]
    except OmniNFTError as error:
        why = str(error).removeprefix(f"{path}: ")
        problems.append(f"samples/{path.parent.name}/{path.name} cannot be read: {why}")
        return {}
    return {(record.prompt.id, record.sample): record for record in records}


def clip_record(folder: Path, listed: ListedClip) -> ClipRecord:
    """A clip that the listing in `folder` names."""
    return ClipRecord(
        path=folder / listed.file,
        prompt=listed.prompt,
        sample=listed.sample,
        scores={name: value for name, value in listed.scores.items() if value is not None},
        reasons=dict(listed.reasons),
        seen=tuple(listed.events.get("video", ())),
        heard=tuple(listed.events["audio"]) if "audio" in listed.events else None,
    )
