"""The systems of a comparison: folders of clips, with what is known about them, matched clip by clip."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omninft.clips.listing import LISTING, clip_inside, read_listing
from omninft.clips.workers import VIDEO_ENDINGS
from omninft.evaluation.paired import Measure, PairedTable
from omninft.evaluation.results import RESULT_FILE, EvaluationResult
from omninft.files import read_text
from omninft.gallery.run_folder import ClipRecord, clip_record, read_run_folder, shown_sets
from omninft.types import OmniNFTError, Prompt


@dataclass(frozen=True)
class System:
    """One side of a comparison."""

    label: str
    folder: Path
    source: str  # what told about the clips: "result.json", "scores.json" or "files"
    records: tuple[ClipRecord, ...]
    measures: dict[str, Measure] = field(default_factory=dict)  # score -> how to name and read it, where known

    @property
    def knows_prompts(self) -> bool:
        return self.source != "files"


@dataclass(frozen=True)
class Match:
    """One prompt and sample: the clip of every system, or why it is absent."""

    key: str
    records: tuple[ClipRecord | str, ...]

    @property
    def is_complete(self) -> bool:
        return all(isinstance(r, ClipRecord) for r in self.records)


def open_systems(inputs: Sequence[str]) -> list[System]:
    """Read what `omninft compare` was given, in that order; a run folder gives two systems.

    Each input is a folder, or NAME=FOLDER: of an evaluation (result.json), of clips with scores.json, of a run, or of
    nothing but clips. Labels are made to differ.

    Raises:
        OmniNFTError: no such folder, nothing to show in it, a damaged file, or fewer than two systems.
    """
    systems = [system for text in inputs for system in _open(text)]
    if len(systems) < 2:
        found = f"found one ({systems[0].folder})" if systems else "found none"
        raise OmniNFTError(f"a comparison needs at least two systems, {found}; give two folders, or a run folder")
    labels = [s.label for s in systems]
    if len(set(labels)) < len(labels):
        labels = ["/".join(s.folder.resolve().parts[-2:]) if labels.count(s.label) > 1 else s.label for s in systems]
    for i, label in enumerate(labels):
        if labels.index(label) < i:
            labels[i] = f"{label} ({labels[: i + 1].count(label)})"
    return [replace(s, label=label) for s, label in zip(systems, labels, strict=True)]


def match_clips(systems: Sequence[System]) -> list[Match]:
    """Clips of one prompt and sample together, in the order of the first system that has them.

    Where every system knows its prompts, by prompt id and sample; else by the names of the files without ending.

    Raises:
        OmniNFTError: no clip of any system has a counterpart in another.
    """
    by_prompt = all(s.knows_prompts for s in systems)
    clips = [{_key(r, by_prompt): r for r in s.records} for s in systems]
    keys = list(dict.fromkeys(key for known in clips for key in known))
    what = "clip of this prompt" if by_prompt else "file of this name"
    matches = [
        Match(key, tuple(c.get(key, f"{s.label} has no {what}.") for s, c in zip(systems, clips, strict=True)))
        for key in keys
    ]
    if all(sum(isinstance(r, ClipRecord) for r in m.records) < 2 for m in matches):
        named = "prompt ids" if by_prompt else "file names"
        examples = "; ".join(f"{s.label} has {', '.join(list(c)[:3])}" for s, c in zip(systems, clips, strict=True))
        raise OmniNFTError(f"nothing to compare: the systems share no {named} ({examples})")
    return matches


def matching_notes(systems: Sequence[System], matches: Sequence[Match]) -> list[str]:
    """What was matched and what was not, a sentence each."""
    by_prompt = all(s.knows_prompts for s in systems)
    complete = sum(m.is_complete for m in matches)
    way = "prompt and sample" if by_prompt else "file name"
    notes = [f"Matched by {way}: {complete} of {len(matches)} have a clip of every system."]
    for i, system in enumerate(systems):
        lacking = [m.key for m in matches if not isinstance(m.records[i], ClipRecord)]
        notes.append(f"{system.label}: {_clips(len(system.records))} from {system.folder} ({system.source}).")
        if lacking:
            notes.append(f"{system.label} lacks {len(lacking)}: {_listed(lacking)}.")
    other = [m.key for m in matches if len(_texts(m)) > 1]
    if other:
        notes.append(f"The systems give different prompt texts for {len(other)}: {_listed(other)}.")
    return notes


def _open(text: str) -> list[System]:
    name, equals, place = text.partition("=")
    if not equals or Path(text).exists():
        name, place = "", text
    folder = Path(place)
    if not folder.is_dir():
        raise OmniNFTError(f"{place}: no such folder; give FOLDER or NAME=FOLDER")
    label = name or folder.resolve().name
    if (folder / RESULT_FILE).is_file():
        return [_evaluated(name, folder)]
    if (folder / LISTING).is_file():
        return [System(label, folder, LISTING, _scored_clips(folder), _run_measures(folder.resolve().parents[1:2]))]
    if any(folder.glob(f"samples/*/{LISTING}")):
        return _run_systems(name, folder)
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in VIDEO_ENDINGS and not p.name.startswith("."))
    if not files:
        raise OmniNFTError(
            f"{folder}: nothing to show; expected {RESULT_FILE}, {LISTING}, a run's samples/, "
            f"or clips ({', '.join(VIDEO_ENDINGS)})"
        )
    return [System(label, folder, "files", tuple(ClipRecord(p, Prompt(p.stem, "", "", ""), 0, {}, {}) for p in files))]


def _evaluated(name: str, folder: Path) -> System:
    result = EvaluationResult.load(folder)
    base = folder / "clips" if (folder / "clips").is_dir() else folder
    seen: dict[str, int] = {}
    records = []
    for clip in sorted(result.clips, key=lambda c: c.index):
        sample = seen[clip.prompt_id] = seen.get(clip.prompt_id, -1) + 1
        records.append(
            ClipRecord(
                path=clip_inside(base, clip.file, f"{folder / RESULT_FILE}: clip {clip.index}"),
                prompt=Prompt(clip.prompt_id, "", "", clip.prompt),
                sample=sample,
                scores={n: float(v) for n, v in clip.scores.items() if v is not None},
                reasons=dict(clip.reasons),
                categories=clip.categories,
            )
        )
    if not records:
        raise OmniNFTError(f"{folder / RESULT_FILE}: the evaluation has no clips")
    measures = {m.name: Measure(m.label, "held_out", None, m.higher_is_better, m.unit) for m in result.metrics}
    return System(name or result.system, folder, RESULT_FILE, tuple(records), measures)


def _scored_clips(folder: Path) -> tuple[ClipRecord, ...]:
    taken: set[tuple[str, int]] = set()
    records = []
    for listed in read_listing(folder):
        record = clip_record(folder, listed)
        # A table of `omninft score` does not number the samples of a prompt.
        while (record.prompt.id, record.sample) in taken:
            record = replace(record, sample=record.sample + 1)
        taken.add((record.prompt.id, record.sample))
        records.append(record)
    if not records:
        raise OmniNFTError(f"{folder / LISTING}: it lists no clips")
    return tuple(records)


def _run_systems(name: str, folder: Path) -> list[System]:
    run = read_run_folder(folder)
    sets = shown_sets(run)
    if not sets:
        raise OmniNFTError(f"{folder}: the run has no clips that can be read ({'; '.join(run.problems) or 'none yet'})")
    measures = _run_measures([folder])
    return [
        System(f"{name} {label}".strip(), folder / "samples" / s.name, LISTING, tuple(s.clips.values()), measures)
        for label, s in sets
    ]


def _run_measures(folders: Iterable[Path]) -> dict[str, Measure]:
    """Directions and units from a run's final table, where there is one."""
    for folder in folders:
        try:
            table = PairedTable.from_json(read_text(folder / "evaluation.json"))
        except OmniNFTError:
            continue
        return {row.measure.name: row.measure for row in table.rows}
    return {}


def _key(record: ClipRecord, by_prompt: bool) -> str:
    return f"{record.prompt.id}#{record.sample}" if by_prompt else record.path.stem


def _texts(match: Match) -> set[str]:
    """The prompt texts that systems give; a run and a benchmark may split one prompt differently."""
    prompts: list[Any] = [r.prompt for r in match.records if isinstance(r, ClipRecord)]
    return {" ".join(p.prompt_av.split()) for p in prompts if p.prompt_av}


def _clips(count: int) -> str:
    return f"{count} clip" if count == 1 else f"{count} clips"


def _listed(keys: Sequence[str], most: int = 5) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(k.removesuffix("#0") for k in keys[:most]) + more
