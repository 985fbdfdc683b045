"""The comparison page: clips of several systems side by side, in one static folder that opens from disk.

Everything that the page shows is computed here; it loads nothing but its own clips, by relative path. `index.html` is
written last, so that a folder without it is known to be unfinished.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from omninft.distributed import available_cores
from omninft.evaluation.paired import Measure, PairedRow, compare_paired
from omninft.files import write_text
from omninft.gallery import figures
from omninft.gallery.placing import CLIPS, POSTERS, SINGLE_FILE_BYTES, ClipFolder
from omninft.gallery.players import PlayerGroup, player_group
from omninft.gallery.report import page_asset, page_environment
from omninft.gallery.run_folder import ClipRecord
from omninft.gallery.systems import Match, System, match_clips, matching_notes, open_systems
from omninft.types import OmniNFTError

FILE_NAME, MANIFEST = "index.html", "clips.csv"
GENERATOR = "omninft compare"
# Each worker holds the decoded clips of one prompt.
_MOST_WORKERS = 4


@dataclass(frozen=True)
class Comparison:
    """What was made."""

    page: Path
    labels: tuple[str, ...]
    num_prompts: int
    num_clips: int
    notes: tuple[str, ...]  # what matched, what is missing, what could not be shown


@dataclass(frozen=True)
class Means:
    """A row of the table of means, as text; differences are from the first system, per system after it."""

    name: str
    hint: str
    values: tuple[str, ...]
    counts: str
    differences: tuple[tuple[str, str, str], ...]  # difference, interval, tone


def write_comparison(
    inputs: Sequence[str],
    output: Path,
    *,
    single_file: bool = False,
    seed: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Write the page of the systems in `inputs` (see `open_systems`) into the folder `output`.

    The folder gets index.html, clips/, posters/ and clips.csv, which tells what each file was; with `single_file` only
    index.html, with the clips inside. `seed` fixes the shuffle of the blind test; without it every rater draws one.

    Raises:
        OmniNFTError: what `open_systems` and `match_clips` refuse, an output folder that holds something else, or
            more clips than a single file can carry.
    """
    systems = open_systems(inputs)
    matches = match_clips(systems)
    _require_free(output)
    if single_file:
        _require_small(sum(_size(r) for m in matches for r in m.records if isinstance(r, ClipRecord)))
    try:
        groups, notes = _write(systems, matches, output, single_file, seed, progress)
    except OSError as error:
        raise OmniNFTError(f"{output}: cannot be written ({error})") from error
    shown = sum(bool(t.src) for g in groups for t in g.takes)
    return Comparison(output / FILE_NAME, tuple(s.label for s in systems), len(groups), shown, tuple(notes))


def _write(
    systems: Sequence[System],
    matches: Sequence[Match],
    output: Path,
    single_file: bool,
    seed: int | None,
    progress: Callable[[int, int], None],
) -> tuple[list[PlayerGroup], list[str]]:
    output.mkdir(parents=True, exist_ok=True)
    # Not one atomic write: a page, a manifest and two folders of clips change together, the page last.
    with tempfile.TemporaryDirectory(prefix=".part-", dir=output) as work:
        folder = ClipFolder(Path(work), embed=single_file)
        groups = _groups(systems, matches, folder, progress)
        if single_file:
            _require_small(folder.num_bytes)
        notes = [*matching_notes(systems, matches), *_problems(groups, matches)]
        page = render_comparison(systems, matches, groups, notes, seed)
        for name in (FILE_NAME, MANIFEST):
            (output / name).unlink(missing_ok=True)
        for name in (CLIPS, POSTERS):
            shutil.rmtree(output / name, ignore_errors=True)
            if not single_file and (folder.root / name).is_dir():
                os.replace(folder.root / name, output / name)
        if not single_file:
            write_text(output / MANIFEST, _manifest(systems, folder))
        write_text(output / FILE_NAME, page)
    return groups, notes


def render_comparison(
    systems: Sequence[System],
    matches: Sequence[Match],
    groups: Sequence[PlayerGroup],
    notes: Sequence[str],
    seed: int | None = None,
) -> str:
    """The page as text."""
    measures = _measures(systems)
    labels = [s.label for s in systems]
    names = list(dict.fromkeys(n for m in matches for r in m.records if isinstance(r, ClipRecord) for n in r.scores))
    scores = score_table(matches, names)
    data = _page_data(labels, matches, groups, names, measures, scores, seed)
    return (
        page_environment()
        .get_template("compare.html.j2")
        .render(
            generator=GENERATOR,
            labels=labels,
            title=" and ".join(labels) if len(labels) < 3 else f"{', '.join(labels[:-1])} and {labels[-1]}",
            counts=[(s.label, len(s.records), s.folder.name) for s in systems],
            groups=groups,
            num_complete=sum(all(t.src for t in g.takes) for g in groups),
            means=mean_rows(scores, names, measures, [m.key.rsplit("#", 1)[0] for m in matches]),
            measures=[(n, data["measures"][i]["label"]) for i, n in enumerate(names)],
            categories=list(dict.fromkeys(c for g in groups for c in g.categories)),
            has_seen=any('class="mark seen"' in t.wave for g in groups for t in g.takes),
            has_heard=any('class="mark heard"' in t.wave for g in groups for t in g.takes),
            searched=any(isinstance(r, ClipRecord) and r.heard is None for m in matches for r in m.records),
            notes=notes,
            data=data,
            css=Markup(page_asset("report.css") + page_asset("compare.css")),
            scripts=[page_asset("players.js"), page_asset("compare.js"), page_asset("blind.js")],
        )
    )


def score_table(matches: Sequence[Match], names: Sequence[str]) -> np.ndarray:
    """Scores [prompts, systems, measures], NaN where missing."""
    rows = [
        [[r.scores.get(n, np.nan) if isinstance(r, ClipRecord) else np.nan for n in names] for r in m.records]
        for m in matches
    ]
    return np.array(rows, dtype=np.float64)


def disagreement(scores: np.ndarray) -> np.ndarray:
    """How far the systems are apart on each prompt [prompts]; scores are [prompts, systems, measures].

    The range over systems in standard deviations of that measure over all clips, averaged over the measures that two
    systems have; NaN where there is none. A measure that never varies says nothing and is left out.
    """
    known = np.isfinite(scores)
    low = np.where(known, scores, np.inf).min(axis=1)
    high = np.where(known, scores, -np.inf).max(axis=1)
    spread = np.array([s[k].std() if k.any() else 0.0 for s, k in zip(scores.T, known.T, strict=True)])
    apart = np.full(low.shape, np.nan)
    valid = (known.sum(axis=1) > 1) & (spread > 1e-12)
    apart[valid] = ((high - low)[valid]) / np.broadcast_to(spread, low.shape)[valid]
    counts = valid.sum(axis=1)
    sums = np.where(valid, apart, 0.0).sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def mean_rows(
    scores: np.ndarray, names: Sequence[str], measures: dict[str, Measure], prompt_ids: Sequence[str]
) -> list[Means]:
    """Means over the prompts that every system has a score for, and paired differences from the first system."""
    rows = []
    for k, name in enumerate(names):
        shared = np.isfinite(scores[:, :, k]).all(axis=1)
        if not shared.any():
            continue
        known = measures.get(name)
        measure = known or Measure(name, "held_out")
        ids = [p for p, s in zip(prompt_ids, shared, strict=True) if s]
        columns = scores[shared, :, k]
        paired = [
            compare_paired([measure], columns[:, :1], columns[:, i : i + 1], ids).rows[0]
            for i in range(1, columns.shape[1])
        ]
        digits = max(row.decimals for row in paired)
        rows.append(
            Means(
                name=measure.name,
                hint=known.hint if known is not None else "",
                values=tuple(figures.format_number(float(v), digits) for v in columns.mean(axis=0)),
                counts=f"{len(columns)} of {len(scores)}",
                differences=tuple(_difference(row, digits, known is not None) for row in paired),
            )
        )
    return rows


def _difference(row: PairedRow, digits: int, has_direction: bool) -> tuple[str, str, str]:
    low, high = (figures.format_number(v, digits, signed=True) for v in (row.difference.low, row.difference.high))
    tone = {"better": "better", "worse": "worse"}.get(row.verdict, "") if has_direction else ""
    interval = f"[{low}, {high}]" if np.isfinite(row.difference.low) else ""
    return figures.format_number(row.difference.mean, digits, signed=True), interval, tone


def _groups(
    systems: Sequence[System], matches: Sequence[Match], folder: ClipFolder, progress: Callable[[int, int], None]
) -> list[PlayerGroup]:
    """Decode, place and draw the clips of all prompts, several prompts at a time."""
    measures = _measures(systems)
    labels = [s.label for s in systems]

    def make(match: Match) -> PlayerGroup:
        return player_group(list(zip(labels, match.records, strict=True)), measures, folder.place, find_onsets=True)

    groups: list[PlayerGroup | None] = [None] * len(matches)
    with ThreadPoolExecutor(min(_MOST_WORKERS, available_cores())) as pool:
        futures = {pool.submit(make, match): i for i, match in enumerate(matches)}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                groups[futures[future]] = future.result()
                progress(done, len(matches))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [g for g in groups if g is not None]


def _measures(systems: Sequence[System]) -> dict[str, Measure]:
    """What any system knows about scores; the first one's word counts."""
    return {name: measure for s in reversed(systems) for name, measure in s.measures.items()}


def _page_data(
    labels: Sequence[str],
    matches: Sequence[Match],
    groups: Sequence[PlayerGroup],
    names: Sequence[str],
    measures: dict[str, Measure],
    scores: np.ndarray,
    seed: int | None,
) -> dict[str, Any]:
    """What the page's scripts filter, sort and vote by."""
    apart = disagreement(scores)
    entries = []
    for i, (match, group) in enumerate(zip(matches, groups, strict=True)):
        prompt = group.prompt
        entries.append(
            {
                "key": match.key,
                "prompt_id": prompt.id,
                "sample": group.sample,
                "prompt": prompt.prompt_av or " / ".join(filter(None, (prompt.prompt_v, prompt.prompt_a))),
                "text": " ".join([prompt.id, prompt.prompt_v, prompt.prompt_a, prompt.prompt_av, *group.categories]),
                "categories": group.categories,
                "shown": [bool(t.src) for t in group.takes],
                "scores": [[_number(v) for v in column] for column in scores[i].T],
                "disagreement": _number(apart[i]),
            }
        )
    identity = hashlib.sha256(json.dumps([labels, [e["key"] for e in entries]]).encode())
    for take in (t for g in groups for t in g.takes):
        identity.update(take.src.encode())
    return {
        # Votes are kept under this name: another set of clips is another test.
        "page": identity.hexdigest()[:12],
        "seed": seed,
        "systems": list(labels),
        "measures": [{"name": n, "label": measures[n].name if n in measures else n} for n in names],
        "prompts": entries,
    }


def _number(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def _problems(groups: Sequence[PlayerGroup], matches: Sequence[Match]) -> list[str]:
    """Clips that are there but cannot be shown."""
    return [
        f"{take.label} {group.prompt.id} cannot be shown: {take.problem}"
        for group, match in zip(groups, matches, strict=True)
        for take, record in zip(group.takes, match.records, strict=True)
        if isinstance(record, ClipRecord) and not take.src
    ]


def _manifest(systems: Sequence[System], folder: ClipFolder) -> str:
    """CSV of what every file in clips/ was."""
    placed = {p.source: p for p in folder.placed}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "system", "prompt_id", "sample", "source", "made"])
    for system in systems:
        for record in system.records:
            if (found := placed.get(record.path)) is not None:
                made = "copied" if found.is_copy else "encoded for browsers"
                writer.writerow([found.file, system.label, record.prompt.id, record.sample, found.source, made])
    return text.getvalue()


def _require_free(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise OmniNFTError(f"{output}: a file is in the way of the folder")
    if not output.is_dir() or not any(p for p in output.iterdir() if not p.name.startswith(".part-")):
        return
    page = output / FILE_NAME
    if page.is_file() and f'content="{GENERATOR}"' in page.read_text(encoding="utf-8", errors="replace")[:2000]:
        return
    raise OmniNFTError(f"{output}: the folder holds something else than a comparison; choose another by -o")


def _require_small(num_bytes: int) -> None:
    if num_bytes > SINGLE_FILE_BYTES:
        raise OmniNFTError(
            f"the clips take {num_bytes / 2**20:.0f} MiB, a single file may carry {SINGLE_FILE_BYTES // 2**20} MiB; "
            "leave --single-file out, or compare fewer clips"
        )


def _size(record: ClipRecord) -> int:
    return record.path.stat().st_size if record.path.is_file() else 0
