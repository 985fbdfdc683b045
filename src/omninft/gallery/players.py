"""Clips to compare: N takes of one prompt side by side, played as one.

The data behind `templates/players.html.j2` and `players.js`; a page includes both and `report.css`. The first take is
the one that differences are taken from, the last one the one they are of.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from omninft.decode.media import read_clip
from omninft.evaluation.paired import Measure
from omninft.gallery import figures
from omninft.gallery.run_folder import ClipRecord, ClipSet
from omninft.types import Clip, OmniNFTError, Prompt

# Clips up to this many pixels were enlarged from fewer when they were written: show their pixels, not a blur.
SMALL = 256


@dataclass(frozen=True)
class Take:
    """One player; without `src` there is only `problem` to show."""

    label: str
    src: str  # URL relative to the page
    width: int  # pixels, of the file
    height: int
    wave: Markup
    problem: str = ""

    @property
    def ratio(self) -> float:
        """Width over height."""
        return self.width / self.height if self.height else 1.0

    @property
    def is_small(self) -> bool:
        return max(self.width, self.height) <= SMALL


@dataclass(frozen=True)
class ScoreLine:
    """One measure of a group: its score per take as text, and the difference of the last take from the first."""

    name: str
    hint: str
    values: tuple[str, ...]
    reasons: tuple[str, ...]  # per take, why the score is missing
    difference: str
    tone: str  # "better", "worse" or "" (equal, unknown direction, or missing)


@dataclass(frozen=True)
class PlayerGroup:
    """The takes of one prompt and sample, and their scores."""

    prompt: Prompt
    sample: int
    duration: float  # s, of the longest take; the time axis of all waveforms
    takes: tuple[Take, ...]
    scores: tuple[ScoreLine, ...]
    gains: dict[str, float]  # measure -> difference, signed so that positive is better where the direction is known

    @property
    def title(self) -> str:
        """The joint prompt, unless it is just its two parts, which are shown anyway."""
        prompt = self.prompt
        parts = (prompt.prompt_v, prompt.prompt_a)
        told = (
            all(parts)
            and len(prompt.prompt_av) <= sum(map(len, parts)) + 2
            and all(p in prompt.prompt_av for p in parts)
        )
        return "" if told else prompt.prompt_av or prompt.id


def player_groups(
    sets: Sequence[tuple[str, ClipSet]], page_dir: Path, measures: Mapping[str, Measure]
) -> list[PlayerGroup]:
    """One group for every (prompt, sample) of the labelled sets, for a page in `page_dir`.

    Clips are decoded one group at a time for their waveforms. A clip that is absent or unreadable becomes a take with
    its reason. `measures` gives directions and units of the scores that it knows.
    """
    keys = dict.fromkeys(key for _, clips in sets for key in clips.clips)
    return [_group([(label, s.clips.get(key)) for label, s in sets], page_dir, measures) for key in keys]


def score_names(groups: Sequence[PlayerGroup]) -> list[str]:
    """Measures by which groups can be sorted: those with a difference in at least one group."""
    return list(dict.fromkeys(name for group in groups for name in group.gains))


def _group(
    records: Sequence[tuple[str, ClipRecord | None]], page_dir: Path, measures: Mapping[str, Measure]
) -> PlayerGroup:
    clips = [_read(record) for _, record in records]
    lengths = [len(c.video) / c.frame_rate for c in clips if isinstance(c, Clip)]
    duration = max(lengths, default=0.0)
    takes = []
    for (label, record), clip in zip(records, clips, strict=True):
        if record is None or isinstance(clip, str):
            takes.append(Take(label, "", 0, 0, Markup(), str(clip)))
            continue
        src = quote(Path(os.path.relpath(record.path, page_dir)).as_posix())
        height, width = clip.video.shape[1:3]
        takes.append(Take(label, src, width, height, _wave(clip, record, duration)))
    present = [record for _, record in records if record is not None]
    scores, gains = _scores([record for _, record in records], measures)
    return PlayerGroup(present[0].prompt, present[0].sample, duration, tuple(takes), tuple(scores), gains)


def _read(record: ClipRecord | None) -> Clip | str:
    """The clip, or why there is none."""
    if record is None:
        return "No clip of this prompt here."
    try:
        return read_clip(record.path, record.prompt, require_audio=False)
    except OmniNFTError as error:
        return str(error).replace(f"{record.path}: ", f"{record.path.name}: ")


def _wave(clip: Clip, record: ClipRecord, duration: float) -> Markup:
    has_sound = clip.waveform.size > 0
    words = [f"Sound of {len(clip.video) / clip.frame_rate:.2f} s" if has_sound else "No sound"]
    for name, times in (("seen", record.seen), ("heard", record.heard)):
        if times:
            words.append(f"{name} at {', '.join(f'{t:.2f}' for t in times)} s")
    length = clip.waveform.shape[1] / clip.sample_rate if has_sound else 0.0
    # Sound may outlast the picture by a part of a codec frame; what is not played is not drawn.
    shown = clip.waveform[:, : round(min(length, duration) * clip.sample_rate)]
    svg = figures.waveform(
        figures.peaks(shown) if has_sound else shown.reshape(0, 2),
        duration,
        sound_seconds=min(length, duration),
        seen=[t for t in record.seen if 0 <= t <= duration],
        heard=[t for t in record.heard if 0 <= t <= duration],
        label="; ".join(words),
    )
    return Markup(svg)


def _scores(
    records: Sequence[ClipRecord | None], measures: Mapping[str, Measure]
) -> tuple[list[ScoreLine], dict[str, float]]:
    names = dict.fromkeys(n for r in records if r is not None for n in (*r.scores, *r.reasons))
    lines, gains = [], {}
    for name in names:
        values = [r.scores.get(name) if r is not None else None for r in records]
        measure = measures.get(name)
        digits = _digits([v for v in values if v is not None])
        difference, tone = "", ""
        first, last = values[0], values[-1]
        if len(records) > 1:
            difference = figures.ABSENT
            if first is not None and last is not None:
                gains[name] = (last - first) * (-1 if measure is not None and not measure.higher_is_better else 1)
                difference = figures.format_number(last - first, digits, signed=True)
                if measure is not None and round(gains[name], digits) != 0:
                    tone = "better" if gains[name] > 0 else "worse"
        lines.append(
            ScoreLine(
                name=name,
                hint=measure.hint if measure is not None else "",
                values=tuple(figures.format_number(v, digits) for v in values),
                reasons=tuple("" if r is None or name in r.scores else r.reasons.get(name, "") for r in records),
                difference=difference,
                tone=tone,
            )
        )
    return lines, gains


def _digits(values: Sequence[float]) -> int:
    """Digits after the point that show clips' scores without noise: two for scores around 1, none for hundreds."""
    largest = max((abs(v) for v in values), default=0.0)
    return 0 if largest >= 100 else 1 if largest >= 10 else 2
