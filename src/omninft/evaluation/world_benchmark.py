"""The benchmark of the bundled bounce world: JavisBench's ten columns, measured where the truth is known.

Every column stands under the label and with the direction of the one it is the analogue of, and is computed from pixels
and samples by the world's scorers; none is learned. All but DeSync lie in 0..1.

VQ          frames explained by the scene rendered again from what was measured (reward `video_quality`): blur, ghosts,
            wrong shapes and an empty picture cost; the prompt does not matter. For VideoAlign's visual quality.
AQ          level over time, purity, quiet between sounds, no clipping (`audio_quality`); 0 for silence. For the mean
            of AudioBox's axes.
TV-IB       all that prompt_v says: colour, kind, count, square (`video_text`). For the cosine of text and whole video.
TA-IB       all that prompt_a says: pitch, kind of sound, count (`audio_text`). For the cosine of text and sound.
CLIP        what single frames can show of prompt_v: mean evidence for the colour and the kind asked for; neither
            counts nor times. For the mean cosine of frames and text.
CLAP        what the timbre can tell of prompt_a: mean evidence for the pitch and the kind of sound asked for.
AV-IB       do picture and sound show the same thing, whenever: the evidence that both are of one kind (ball and tone,
            lamp and buzz), times the match of the number of events seen and heard. No prompt.
AVHScore    do the frames show what the sound as a whole is of: VQ times the evidence that both are of one kind. For
            the mean cosine of single frames with the whole sound.
JavisScore  synchrony where it is worst: windows of 1 s every 0.25 s (half of JavisBench's, for clips half as long) are
            scored by the events seen and heard in them; the mean of the worst 40 % (at least one) of the windows in
            which anything happens. 0 where nothing does.
DeSync      mean distance of events and their sounds in s, 0..0.5; 0.5 where nothing seen has a sound. Lower is better.
            For the offset that Synchformer estimates.

Beyond the ten: AV-Align, and on request DNSMOS, temporal flickering and motion, by the measurements used elsewhere.

Clips may be enlarged, of another frame rate that holds the world's, stereo, or of another sample rate: they are brought
to the world's form before anything is measured. A clip of other length or without sound is missing in the columns
concerned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

from omninft.distributed import available_cores
from omninft.evaluation.description import BenchmarkDescription, JudgeEntry
from omninft.evaluation.measured import MEASURED_METRICS, ON_REQUEST, measured_judges
from omninft.evaluation.results import Metric
from omninft.prompts.prompt_file import PromptRow
from omninft.rewards.formulas import score_table
from omninft.rewards.registry import ComponentSpec, Input, Reward
from omninft.rewards.world import (
    audio_quality,
    audio_text,
    count_match,
    offset_kernel,
    video_quality,
    video_text,
)
from omninft.rewards.world_held_out import NO_MATCH, sync_offset_ms
from omninft.scorers.views import mono
from omninft.scorers.weights import JudgingModel
from omninft.scorers.world_sound import sound_facts
from omninft.scorers.world_video import video_facts
from omninft.types import Clip, OmniNFTError, Prompt, ScoreTable
from omninft.worlds import bounce
from omninft.worlds.wording import Request, read_request

VERSION = "1"
WINDOW, HOP = 1.0, 0.25  # s
WORST_SHARE = 0.4

METRICS = (
    Metric("vq", "VQ", "frames explained by the world's scene"),
    Metric("aq", "AQ", "level over time, purity, quiet, no clipping"),
    Metric("tv_ib", "TV-IB", "colour, kind, count and square as prompt_v asks"),
    Metric("ta_ib", "TA-IB", "pitch, kind of sound and count as prompt_a asks"),
    Metric("clip", "CLIP", "colour and kind of the frames as prompt_v asks"),
    Metric("clap", "CLAP", "pitch and kind of sound as prompt_a asks"),
    Metric("av_ib", "AV-IB", "same kind and number of events seen and heard"),
    Metric("avh_score", "AVHScore", "frames show the kind of thing that is heard"),
    Metric("javis_score", "JavisScore", "synchrony in the worst 40 % of 1 s windows"),
    Metric("desync", "DeSync", "mean distance of events and their sounds", False, "s"),
)


def clip(made: Clip) -> float:
    """Mean evidence for the colour and the kind that prompt_v asks for.

    Raises OmniNFTError when it asks for neither.
    """
    request, facts = _request(made), video_facts(made)
    parts = [facts.colours[request.colour]] if request.colour is not None else []
    parts += [facts.kinds[request.kind]] if request.kind is not None else []
    if not parts:
        raise OmniNFTError(f"prompt_v names no colour and no kind of the bounce world: {made.prompt.prompt_v!r}")
    return float(np.mean(parts))


def clap(made: Clip) -> float:
    """Mean evidence for the pitch and the kind of sound that prompt_a asks for.

    Raises OmniNFTError when it asks for neither.
    """
    request, facts = _request(made), sound_facts(made)
    parts = [facts.pitches[request.pitch]] if request.pitch is not None else []
    parts += [facts.kinds[request.sound_kind]] if request.sound_kind is not None else []
    if not parts:
        raise OmniNFTError(f"prompt_a names no pitch and no sound of the bounce world: {made.prompt.prompt_a!r}")
    return float(np.mean(parts))


def same_kind(made: Clip) -> float:
    """Evidence in 0..1 that what is seen and what is heard are of one kind; 0 where either shows nothing."""
    seen, heard = video_facts(made).kinds, sound_facts(made).kinds
    return float(sum(seen[kind] * heard[kind] for kind in bounce.KINDS))


def av_ib(made: Clip) -> float:
    """`same_kind` times the match of the numbers of events."""
    seen = float(video_facts(made).event_strengths.sum())
    heard = float(sound_facts(made).onset_strengths.sum())
    return same_kind(made) * count_match(seen - heard, 0)


def avh_score(made: Clip) -> float:
    """`same_kind` times the share of the frames that is explained."""
    return video_quality(made) * same_kind(made)


def desync(made: Clip) -> float:
    """Mean distance of events and their sounds, s."""
    return sync_offset_ms(made) / 1000


def javis_score(made: Clip) -> float:
    """Mean of the worst windows of `windowed_synchrony`."""
    seen, heard = video_facts(made), sound_facts(made)
    windows = windowed_synchrony(seen.event_times, seen.event_strengths, heard.onset_times, heard.onset_strengths)
    if not len(windows):
        return 0.0
    return float(np.sort(windows)[: max(1, int(WORST_SHARE * len(windows)))].mean())


def windowed_synchrony(
    event_times: np.ndarray, event_strengths: np.ndarray, onset_times: np.ndarray, onset_strengths: np.ndarray
) -> np.ndarray:
    """Synchrony in 0..1 of every window in which something is seen or heard, in order.

    Events [E] and onsets [F] (s, strengths in 0..1) are paired one to one over the whole clip, as in the reward `sync`,
    so that no window's edge parts a pair. A pair stands at its event's time, what is left over at its own.
    """
    gains = np.minimum(event_strengths[:, None], onset_strengths) * offset_kernel(event_times[:, None] - onset_times)
    rows, columns = linear_sum_assignment(gains, maximize=True)
    alone_seen = np.setdiff1d(np.arange(len(event_times)), rows)
    alone_heard = np.setdiff1d(np.arange(len(onset_times)), columns)
    times = np.concatenate([event_times[rows], event_times[alone_seen], onset_times[alone_heard]])
    larger = np.maximum(event_strengths[rows], onset_strengths[columns])
    weights = np.concatenate([larger, event_strengths[alone_seen], onset_strengths[alone_heard]])
    values = np.concatenate([gains[rows, columns], np.zeros(len(alone_seen) + len(alone_heard))])
    last = bounce.NUM_FRAMES / bounce.FRAME_RATE - WINDOW
    scores = []
    for start in [*np.arange(0.0, last, HOP), last]:
        inside = (times >= start) & (times < start + WINDOW)
        if inside.any():
            # One event at least: faint things that happen to coincide are not synchronous.
            scores.append(values[inside].sum() / max(weights[inside].sum(), 1.0))
    return np.array(scores)


def conformed(made: Clip) -> Clip:
    """The clip in the world's size, rates and channels, as far as that can be done; once."""
    same: Clip = made.view("world_conformed", _conform)
    return same


def categories(prompt: Prompt) -> tuple[str, ...]:
    """What a prompt of the world asks for, as far as it says: "kind/ball", "count/2", "square/with"."""
    request = read_request(prompt.prompt_v, prompt.prompt_a)
    if request.kind is None:
        return ()
    counted = (f"count/{request.count}",) if request.count is not None else ()
    return (f"kind/{request.kind}", *counted, f"square/{'with' if request.square else 'without'}")


def _request(made: Clip) -> Request:
    return read_request(made.prompt.prompt_v, made.prompt.prompt_a)


def _conform(made: Clip) -> Clip:
    video, waveform, rate = made.video, made.waveform, made.sample_rate
    frame_rate = made.frame_rate
    # The frames on screen at the world's times, where the clip is fast and long enough to have them all.
    wanted = np.round(np.arange(bounce.NUM_FRAMES) * frame_rate / bounce.FRAME_RATE).astype(int)
    if frame_rate > bounce.FRAME_RATE + 1e-3 and wanted[-1] < len(video):
        video, frame_rate = video[wanted], bounce.FRAME_RATE
    height, width = video.shape[1:3]
    # Means over areas: a whole factor is undone exactly.
    if height == width > bounce.HEIGHT:
        size = (bounce.WIDTH, bounce.HEIGHT)
        video = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in video])
    if waveform.size and rate != bounce.SAMPLE_RATE:
        waveform, rate = mono(made, bounce.SAMPLE_RATE)[None], bounce.SAMPLE_RATE
    return replace(made, video=video, frame_rate=frame_rate, waveform=waveform, sample_rate=rate, views={})


def _spec(metric: Metric, route: str) -> ComponentSpec:
    span = (0.0, NO_MATCH / 1000) if metric.name == "desync" else (0.0, 1.0)
    return ComponentSpec(
        metric.name,
        route,  # type: ignore[arg-type]
        metric.description,
        range=span,
        higher_is_better=metric.higher_is_better,
        unit=metric.unit or "1",
    )


class Conformed:
    """A judge that is shown clips in the world's form: enlarging a clip to be watched changes no score."""

    def __init__(self, judge: Reward) -> None:
        self.judge = judge
        self.name, self.components, self.inputs = judge.name, judge.components, judge.inputs
        self.licence, self.model = judge.licence, judge.model

    def missing(self) -> str | None:
        """As of the judge."""
        look: Callable[[], str | None] = getattr(self.judge, "missing", lambda: None)
        return look()

    def score(self, clips: list[Clip]) -> ScoreTable:
        return self.judge.score([conformed(made) for made in clips])


class WorldAnalogues:
    """The ten columns as a judge of clips; `workers` clips are measured at once."""

    name = "world_analogues"
    components: tuple[ComponentSpec, ...] = tuple(
        _spec(metric, route)
        for metric, route in zip(
            METRICS,
            ("video", "audio", "video", "audio", "video", "audio", "joint", "joint", "joint", "joint"),
            strict=True,
        )
    )
    inputs: tuple[Input, ...] = ("video", "audio", "prompt_v", "prompt_a")
    licence = "this package's"
    model: JudgingModel | None = None

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or available_cores()

    def score(self, clips: list[Clip]) -> ScoreTable:
        """[B, 10]; a clip that is none of this world is missing, with the reason."""
        formulas = (
            video_quality,
            audio_quality,
            video_text,
            audio_text,
            clip,
            clap,
            av_ib,
            avh_score,
            javis_score,
            desync,
        )
        return score_table(self.components, formulas, [conformed(made) for made in clips], self.workers)


def _row_categories(row: PromptRow) -> tuple[str, ...]:
    return categories(row.prompt)


WORLD = BenchmarkDescription(
    name="world",
    version=VERSION,
    metrics=(*METRICS, *MEASURED_METRICS),
    judges={
        "world analogues": JudgeEntry(
            WorldAnalogues, tuple(metric.name for metric in METRICS), provenance=f"measured, version {VERSION}"
        ),
        # The world's frames are too small for optical flow.
        **measured_judges({"av_align": {"enlarge": True}}, Conformed),
    },
    on_request=ON_REQUEST,
    categories=_row_categories,
    prompts="world:test",
    limit=64,  # about two minutes on two cores
)
