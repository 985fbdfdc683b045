"""Measures of the bounce world that are never trained on: if training games its rewards, these show it."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from omninft.rewards.formulas import Formula, score_table
from omninft.rewards.registry import ComponentSpec, Input
from omninft.rewards.world import certain_events
from omninft.scorers.av_align import av_align
from omninft.scorers.weights import JudgingModel
from omninft.scorers.world_sound import resynthesis, sound_facts
from omninft.scorers.world_video import video_facts
from omninft.types import Clip, OmniNFTError, ScoreTable
from omninft.worlds.wording import Request, read_request

NO_MATCH = 500.0  # ms: the offset of a clip in which nothing seen has a sound
MEL_CAP = 60.0  # dB: silence against full scale
FAINT_SQUARE = 0.5  # opacity from which a square counts as there


def _request(clip: Clip, *parts: str) -> Request:
    """What the prompt asks for. Raises OmniNFTError where it leaves one of these fields open."""
    request = read_request(clip.prompt.prompt_v, clip.prompt.prompt_a)
    missing = [part for part in parts if getattr(request, part) is None]
    if missing:
        raise OmniNFTError(f"the prompt does not say {', '.join(missing)}: {clip.prompt.prompt_av!r}")
    return request


def sync_offset_ms(clip: Clip) -> float:
    """Mean distance of the best one-to-one pairs of events and onsets, ms; NO_MATCH at most, and without a pair."""
    seen, heard = certain_events(clip)
    if not len(seen) or not len(heard):
        return NO_MATCH
    distance = np.minimum(np.abs(seen[:, None] - heard) * 1000, NO_MATCH)
    rows, columns = linear_sum_assignment(distance)
    return float(distance[rows, columns].mean())


def video_count_right(clip: Clip) -> float:
    """1 where as many events are seen as asked for, else 0."""
    return float(len(certain_events(clip)[0]) == _request(clip, "count").count)


def audio_count_right(clip: Clip) -> float:
    """1 where as many sounds are heard as asked for, else 0."""
    return float(len(certain_events(clip)[1]) == _request(clip, "sound_count").sound_count)


def all_facts(clip: Clip) -> float:
    """1 where kind, colour, both counts, kind of sound, pitch and the silent square are all as asked for, else 0."""
    request = _request(clip, "kind", "colour", "count", "sound_kind", "sound_count", "pitch")
    seen, heard = video_facts(clip), sound_facts(clip)
    return float(
        seen.kind == request.kind
        and seen.colour == request.colour
        and (len(heard.onset_times) > 0 and heard.source == (request.sound_kind, request.pitch))
        and video_count_right(clip) == 1
        and audio_count_right(clip) == 1
        and square_right(clip) == 1
    )


def square_right(clip: Clip) -> float:
    """1 where the silent square is there iff asked for, else 0."""
    return float((video_facts(clip).square >= FAINT_SQUARE) == _request(clip, "kind").square)


def enlarged_av_align(clip: Clip) -> float:
    """AV-Align of the frames enlarged: at the world's size optical flow is mostly blur."""
    return av_align(clip, enlarge=True)


def sharpness(clip: Clip) -> float:
    """Slope of the source's edges relative to the rendered ones, at most 1."""
    return min(float(video_facts(clip).sharpness), 1.0)


def steadiness(clip: Clip) -> float:
    """How little what should stand still changes: 1 - mean absolute change of the pixel rows of the floor, 0..1."""
    floor = clip.video[:, -2:].astype(np.float64) / 255
    return 1 - float(np.abs(np.diff(floor, axis=0)).mean())


def mel_error(clip: Clip) -> float:
    """Mean distance of the log-mel spectra of the sound and of its resynthesis, dB; MEL_CAP at most."""
    return min(resynthesis(clip).mel_error, MEL_CAP)


class WorldHeldOut:
    """Watched at evaluations of the bundled model."""

    name = "world_held_out"
    components: tuple[ComponentSpec, ...] = (
        ComponentSpec(
            "sync_offset_ms",
            "joint",
            "mean distance of events and sounds",
            range=(0.0, NO_MATCH),
            higher_is_better=False,
            unit="ms",
        ),
        ComponentSpec("all_facts", "joint", "kind, colour, counts, sound, pitch and silent square all as asked"),
        ComponentSpec("video_count_right", "video", "exactly as many events seen as asked"),
        ComponentSpec("audio_count_right", "audio", "exactly as many sounds heard as asked"),
        ComponentSpec("square_right", "video", "the silent square there iff asked for"),
        ComponentSpec("av_align", "joint", "AV-Align: peaks of optical flow and of sound coincide", range=(0.0, 25.0)),
        ComponentSpec("sharpness", "video", "edges of the source against the rendered ones"),
        ComponentSpec("steadiness", "video", "the floor does not flicker"),
        ComponentSpec(
            "mel_error",
            "audio",
            "log-mel distance of the sound to its resynthesis",
            range=(0.0, MEL_CAP),
            higher_is_better=False,
            unit="dB",
        ),
    )
    inputs: tuple[Input, ...] = ("video", "audio", "prompt_v", "prompt_a")
    licence = "this package's"
    model: JudgingModel | None = None

    def score(self, clips: list[Clip]) -> ScoreTable:
        """[B, 9]."""
        formulas: tuple[Formula, ...] = (
            sync_offset_ms,
            all_facts,
            video_count_right,
            audio_count_right,
            square_right,
            enlarged_av_align,
            sharpness,
            steadiness,
            mel_error,
        )
        return score_table(self.components, formulas, clips)
