"""Clips to compare: N takes of one prompt side by side, played as one.

The data behind `templates/players.html.j2` and `players.js`; a page includes both and `report.css`. The first take is
the one that differences are taken from, the last one the one they are of.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
from markupsafe import Markup

from omninft.clips.media import read_clip, read_wav, sidecar_of
from omninft.evaluation.paired import Measure
from omninft.gallery import figures
from omninft.gallery.posters import data_uri, poster
from omninft.gallery.run_folder import ClipRecord, ClipSet
from omninft.scorers.av_align import audio_peaks
from omninft.types import Clip, OmniNFTError, Prompt

# Clips up to this many pixels were enlarged from fewer when they were written: show their pixels, not a blur.
SMALL = 256
# Times that a description of a waveform reads out; the marks show all.
_TIMES_TOLD = 12
_EDGE = 0.1  # s by which an event measured beside the clip's ends is drawn at the end; it was counted
_SAME_SOUND = 0.2  # what AAC may leave of a sound's difference from itself, relative to the louder of the two


@dataclass(frozen=True)
class Place:
    """Where the page finds a clip: URLs relative to it."""

    src: str
    poster: str = ""  # a still to show before the clip is loaded


Placing = Callable[[ClipRecord, Clip], Place]


@dataclass(frozen=True)
class Take:
    """One player; without `src` there is only `problem` to show."""

    label: str
    src: str  # URL relative to the page
    width: int  # pixels, of the file
    height: int
    wave: Markup
    problem: str = ""
    poster: str = ""  # URL relative to the page
    file: str = ""  # what the clip was called where it came from
    frame_rate: float = 0.0  # Hz

    @property
    def ratio(self) -> float:
        """Width over height."""
        return self.width / self.height if self.height else 1.0

    @property
    def is_small(self) -> bool:
        return max(self.width, self.height) <= SMALL


@dataclass(frozen=True)
class ScoreLine:
    """One measure of a group: its score per take as text, and its difference from the first take's."""

    name: str
    hint: str
    values: tuple[str, ...]
    reasons: tuple[str, ...]  # per take, why the score is missing
    differences: tuple[str, ...]  # per take after the first
    tones: tuple[str, ...]  # per difference: "better", "worse" or "" (equal, unknown direction, or missing)


@dataclass(frozen=True)
class PlayerGroup:
    """The takes of one prompt and sample, and their scores."""

    prompt: Prompt
    sample: int
    duration: float  # s, of the longest take; the time axis of all waveforms
    takes: tuple[Take, ...]
    scores: tuple[ScoreLine, ...]
    # Measure -> difference of the last take, signed so that positive is better where the direction is known.
    gains: dict[str, float]
    categories: tuple[str, ...] = ()

    @property
    def frame_rate(self) -> float:
        """Hz, the highest of the takes: the step by which one frame of each is seen; 0 where nothing can be played."""
        return max((take.frame_rate for take in self.takes), default=0.0)

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

    def place(record: ClipRecord, clip: Clip) -> Place:
        src = quote(Path(os.path.relpath(record.path, page_dir)).as_posix())
        return Place(src, data_uri("image/jpeg", poster(record, clip)))

    absent = "No clip of this prompt here."
    return [player_group([(label, s.clips.get(key, absent)) for label, s in sets], measures, place) for key in keys]


def score_names(groups: Sequence[PlayerGroup]) -> list[str]:
    """Measures by which groups can be sorted: those with a difference in at least one group."""
    return list(dict.fromkeys(name for group in groups for name in group.gains))


def player_group(
    records: Sequence[tuple[str, ClipRecord | str]],
    measures: Mapping[str, Measure],
    place: Placing,
    find_onsets: bool = False,
) -> PlayerGroup:
    """The labelled clips of one prompt and sample, at least one; a string says why a clip is absent.

    `place` puts a clip where the page finds it; if it raises OmniNFTError, the take shows that instead. With
    `find_onsets`, sound whose onsets are not known is searched for them.
    """
    present = [record for _, record in records if isinstance(record, ClipRecord)]
    clips = [record if isinstance(record, str) else _read(record) for _, record in records]
    duration = max((len(c.video) / c.frame_rate for c in clips if isinstance(c, Clip)), default=0.0)
    takes = []
    for (label, record), clip in zip(records, clips, strict=True):
        if isinstance(record, str) or isinstance(clip, str):
            takes.append(Take(label, "", 0, 0, Markup(), str(clip)))
        else:
            takes.append(_take(label, record, clip, duration, place, find_onsets))
    scores, gains = _scores([r if isinstance(r, ClipRecord) else None for _, r in records], measures)
    # A bare folder of clips does not know its prompts: whichever record says most is believed.
    told = max(present, key=lambda r: (bool(r.prompt.prompt_av), bool(r.prompt.prompt_v or r.prompt.prompt_a)))
    categories = tuple(dict.fromkeys(c for r in present for c in r.categories))
    return PlayerGroup(told.prompt, told.sample, duration, tuple(takes), tuple(scores), gains, categories)


def _take(label: str, record: ClipRecord, clip: Clip, duration: float, place: Placing, find_onsets: bool) -> Take:
    try:
        found = place(record, clip)
    except OmniNFTError as error:
        return Take(label, "", 0, 0, Markup(), str(error))
    heard = record.heard
    if heard is None and find_onsets and clip.waveform.size and np.isfinite(clip.waveform).all():
        heard = tuple(float(t) for t in audio_peaks(clip))
    height, width = clip.video.shape[1:3]
    wave = _wave(clip, record.seen, heard or (), duration)
    return Take(label, found.src, width, height, wave, "", found.poster, record.path.name, clip.frame_rate)


def _read(record: ClipRecord) -> Clip | str:
    """The clip, or why there is none."""
    beside = sidecar_of(record.path)
    try:
        clip = read_clip(record.path, record.prompt, require_audio=False, sidecar=False)
        return _with_sound_of(clip, beside) if beside is not None else clip
    except OmniNFTError as error:
        return str(error).replace(f"{record.path}: ", f"{record.path.name}: ")


def _with_sound_of(clip: Clip, beside: Path) -> Clip:
    """The clip with the sound of a WAV file, which is what benchmarks judge, unless it is the clip's own."""
    waveform, rate = read_wav(beside)
    if not clip.waveform.size:
        return replace(clip, waveform=waveform, sample_rate=rate)
    own, other = clip.waveform.mean(axis=0), waveform.mean(axis=0)
    length = min(len(own), len(other))
    if rate == clip.sample_rate and abs(len(own) - len(other)) < 0.1 * rate and length:
        own, other = own[:length], other[:length]
        # Encoding for the video file leaves a little noise.
        if np.linalg.norm(own - other) <= _SAME_SOUND * max(np.linalg.norm(own), np.linalg.norm(other)):
            return clip
    return replace(clip, waveform=waveform, sample_rate=rate)


def _wave(clip: Clip, seen: Sequence[float], heard: Sequence[float], duration: float) -> Markup:
    has_sound = clip.waveform.size > 0
    seen, heard = (
        [min(max(t, 0.0), duration) for t in times if -_EDGE <= t <= duration + _EDGE] for times in (seen, heard)
    )
    words = [f"Sound of {len(clip.video) / clip.frame_rate:.2f} s" if has_sound else "No sound"]
    for name, times in (("seen", seen), ("heard", heard)):
        if times:
            more = f" and {len(times) - _TIMES_TOLD} more" if len(times) > _TIMES_TOLD else ""
            words.append(f"{name} at {', '.join(f'{t:.2f}' for t in times[:_TIMES_TOLD])} s{more}")
    length = clip.waveform.shape[1] / clip.sample_rate if has_sound else 0.0
    # Sound may outlast the picture by a part of a codec frame; what is not played is not drawn.
    shown = clip.waveform[:, : round(min(length, duration) * clip.sample_rate)]
    svg = figures.waveform(
        figures.peaks(shown) if has_sound else shown.reshape(0, 2),
        duration,
        sound_seconds=min(length, duration),
        seen=seen,
        heard=heard,
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
        sign = -1 if measure is not None and not measure.higher_is_better else 1
        first, differences, tones = values[0], [], []
        for value in values[1:]:
            difference = None if value is None or first is None else value - first
            gain = 0.0 if difference is None or measure is None else sign * round(difference, digits)
            differences.append(figures.format_number(difference, digits, signed=True))
            tones.append("better" if gain > 0 else "worse" if gain < 0 else "")
        if differences and first is not None and values[-1] is not None:
            gains[name] = sign * (values[-1] - first)
        lines.append(
            ScoreLine(
                name=measure.name if measure is not None else name,
                hint=measure.hint if measure is not None else "",
                values=tuple(figures.format_number(v, digits) for v in values),
                reasons=tuple("" if r is None or name in r.scores else r.reasons.get(name, "") for r in records),
                differences=tuple(differences),
                tones=tuple(tones),
            )
        )
    return lines, gains


def _digits(values: Sequence[float]) -> int:
    """Digits after the point that show clips' scores without noise: two for scores around 1, none for hundreds."""
    largest = max((abs(v) for v in values), default=0.0)
    return 0 if largest >= 100 else 1 if largest >= 10 else 2
