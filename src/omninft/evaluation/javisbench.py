"""JavisBench (Liu et al. 2025): clip-level metrics as thin formulas over the judging models.

The ten columns of the paper's table, VideoAlign's motion quality, AV-Align, and on request DNSMOS, flicker and motion;
the distances of whole sets (FVD, KVD, FAD) are in `set_metrics`. Pictures are judged with `prompt_v`, sounds with
`prompt_a` (the column `audio_text`, or `text` where there is none). Scores are plain means over clips. CAVP, a metric
of the benchmark's code that the table does not have, is not computed.

`compat` turns on quirks of the official code, each by its own name; "javisbench" is all of them:

bgr_clip         frames go into CLIP with red and blue exchanged
unscaled_fvd     I3D sees pixels in 0..1, not in -1..1: needed beside the official features of real clips, which were
                 made so
aq_no_resample   sound that is not at 16 kHz reaches AudioBox unresampled, taken for 16 kHz

Not imitated: per-clip DeSync of the official code is out of order where clips have several blocks (the mean is the
same, and 4 s are one block); max_audio_len_s must be given there (4.0 here); the metric list "all" fails there;
warnings are silenced there; the mean of a sound is taken off twice where views overlap (negligible); weights are
expected under ./checkpoints and fetched at run time there, never here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omninft.clips.workers import in_workers
from omninft.evaluation.description import BenchmarkDescription, ClipForm, JudgeEntry, SetEntry
from omninft.evaluation.measured import MEASURED_METRICS, ON_REQUEST, measured_judges
from omninft.evaluation.results import Metric
from omninft.evaluation.set_metrics import audio_distance, video_distance
from omninft.rewards.audiobox import AudioBoxReward
from omninft.rewards.clap import CLAPReward
from omninft.rewards.clap import Prepared as SoundAndText
from omninft.rewards.clip import CLIPReward
from omninft.rewards.desync import DeSyncReward
from omninft.rewards.formulas import score_table
from omninft.rewards.imagebind import ImageBindReward
from omninft.rewards.model_reward import prompt_text
from omninft.rewards.registry import ComponentSpec
from omninft.rewards.videoalign import VideoAlignReward
from omninft.scorers.imagebind import ImageBindScorer, cosines
from omninft.scorers.imagebind_inputs import SAMPLE_RATE, audio_views, first_channel, still_frames, video_views
from omninft.scorers.qwen2_vl import Example
from omninft.scorers.synchformer_inputs import SyncInputs
from omninft.scorers.views import fit_length
from omninft.types import Clip, OmniNFTError, Route, ScoreTable

VERSION = "1"
SECONDS = 4.0  # of a clip
FRAME_RATE = 24.0  # Hz
AUDIO_RATE = 16_000  # Hz
WINDOW_SECONDS, OVERLAP_SECONDS = 2.0, 1.5  # of JavisScore
WORST_SHARE = 0.4  # of the frames of a window

COMPAT = ("bgr_clip", "unscaled_fvd", "aq_no_resample")

METRICS = (
    Metric("vq", "VQ", "VideoAlign's visual quality, not normalised"),
    Metric("aq", "AQ", "AudioBox, mean of the four axes over the first 4 s"),
    Metric("tv_ib", "TV-IB", "ImageBind cosine of text and video"),
    Metric("ta_ib", "TA-IB", "ImageBind cosine of text and sound"),
    Metric("clip", "CLIP", "CLIP cosine of text and 48 frames"),
    Metric("clap", "CLAP", "CLAP cosine of text and sound"),
    Metric("av_ib", "AV-IB", "ImageBind cosine of sound and video"),
    Metric("avh_score", "AVHScore", "ImageBind cosine of single frames with the whole sound"),
    Metric("javis_score", "JavisScore", "ImageBind cosine of the worst frames of 2 s windows with their sound"),
    Metric("desync", "DeSync", "Synchformer's offset of sound and picture", False, "s"),
    Metric("mq", "MQ", "VideoAlign's motion quality, not normalised"),
)


def _spec(name: str, route: Route, low: float, high: float) -> ComponentSpec:
    metric = next(m for m in METRICS if m.name == name)
    better = metric.higher_is_better
    return ComponentSpec(name, route, metric.description, 1.0, (low, high), better, metric.unit or "1")


class VideoQuality(VideoAlignReward):
    """VQ and MQ as the head gives them, at the checkpoint's own frame rate."""

    components: tuple[ComponentSpec, ...] = (
        _spec("vq", "video", -math.inf, math.inf),
        _spec("mq", "video", -math.inf, math.inf),
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"fps": None} | options)
        self.components = type(self).components

    def judge(self, prepared: list[Example]) -> np.ndarray:
        return np.asarray(self.scorer.judge(prepared, self.budget)[:, :2])


class AudioQuality(AudioBoxReward):
    """Mean of CE, CU, PC and PQ over the first 4 s, filled up with zeros that count as sound."""

    components: tuple[ComponentSpec, ...] = (_spec("aq", "audio", 1.0, 10.0),)

    def __init__(self, resample: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.resample = resample

    def prepare(self, clip: Clip) -> np.ndarray:
        wave = super().prepare(clip)
        if not self.resample:
            wave = clip.waveform.mean(axis=0, dtype=np.float32)
        return fit_length(wave, int(SECONDS * AUDIO_RATE))

    def judge(self, prepared: list[np.ndarray]) -> np.ndarray:
        return np.asarray(self.scorer(prepared, self.budget).mean(axis=1, keepdims=True))


class TextVideo(CLIPReward):
    """CLIP's mean cosine over 48 frames."""

    components = (_spec("clip", "video", -1.0, 1.0),)


class TextSound(CLAPReward):
    """CLAP's cosine; sound over 10 s is the mean of its windows, where the official code crops at random."""

    components = (_spec("clap", "audio", -1.0, 1.0),)

    def judge(self, prepared: list[SoundAndText]) -> np.ndarray:
        cosine = self.scorer(
            [p.spectrograms for p in prepared], [p.shares for p in prepared], [p.text for p in prepared], self.budget
        )
        return np.asarray(cosine[:, None])


class DeSync(DeSyncReward):
    """Mean absolute offset over the first 4 s, in s."""

    components: tuple[ComponentSpec, ...] = (_spec("desync", "joint", 0.0, 2.0),)

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"seconds": SECONDS} | options)

    def judge(self, prepared: list[SyncInputs]) -> np.ndarray:
        return np.asarray(self.scorer.desync(prepared, self.budget)[:, None])


Embedded = np.ndarray | OmniNFTError  # or why there is none


@dataclass(frozen=True)
class Embeddings:
    """What ImageBind makes of one clip, each part that was asked for, or why it cannot be had."""

    video: Embedded  # [E]
    sound: Embedded  # [E], of the whole sound
    text_v: Embedded  # [E]
    text_a: Embedded  # [E]
    frames: Embedded  # [T, E]
    windows: Embedded  # [W, E], of sound windows
    frame_starts: tuple[int, ...] = ()  # of the windows of JavisScore, frames
    frame_count: int = 0  # of a window


class BindScores(ImageBindReward):
    """The five metrics of ImageBind; what several of them need is embedded once.

    `wanted` names the metrics to compute (the others are not in the table). A clip without sound still has TV-IB.
    """

    ALL = (
        _spec("tv_ib", "video", -1.0, 1.0),
        _spec("ta_ib", "audio", -1.0, 1.0),
        _spec("av_ib", "joint", -1.0, 1.0),
        _spec("avh_score", "joint", -1.0, 1.0),
        _spec("javis_score", "joint", -1.0, 1.0),
    )

    def __init__(self, wanted: Sequence[str] = (), **options: Any) -> None:
        super().__init__(**options)
        self.components = tuple(spec for spec in self.ALL if not wanted or spec.name in wanted)

    def score(self, clips: list[Clip]) -> ScoreTable:
        """[B, metrics]; prepared by threads a few clips at a time, as stills take much memory."""
        why = self.missing()
        if why is not None:
            raise OmniNFTError(why)
        formulas = {
            "tv_ib": _tv_ib,
            "ta_ib": _ta_ib,
            "av_ib": _av_ib,
            "avh_score": avh_score,
            "javis_score": javis_score,
        }
        tables = []
        for start in range(0, len(clips), self.workers):
            some = clips[start : start + self.workers]
            embedded = dict(zip(map(id, some), self.embeddings(some), strict=True))
            chosen = [_on(formulas[spec.name], embedded) for spec in self.components]
            tables.append(score_table(self.components, chosen, some))
        return ScoreTable.cat(tables)

    def embeddings(self, clips: Sequence[Clip]) -> list[Embeddings]:
        """Of every clip the parts that the wanted metrics need."""
        names = {spec.name for spec in self.components}
        scorer: ImageBindScorer = self.scorer
        plans = [_windows(clip) for clip in clips]
        no = OmniNFTError("not asked for")

        def parts(needed: set[str], prepare: Callable[[Clip], Any], embed: Callable[[list[Any]], Any]) -> list[Any]:
            if not names & needed:
                return [no] * len(clips)
            prepared = in_workers(prepare, clips, self.workers)
            ready = [item for item in prepared if not isinstance(item, OmniNFTError)]
            made = iter(embed(ready) if ready else ())
            return [item if isinstance(item, OmniNFTError) else next(made) for item in prepared]

        def windows(clip: Clip) -> list[Any]:
            wave, plan = first_channel(clip), _windows(clip)
            return [audio_views(wave[s : s + plan.samples], self.clip_spacing) for s in plan.sample_starts]

        def embed_all(groups: list[list[Any]]) -> Any:
            """Sounds of every clip, [W_i, E] each."""
            rows = scorer.sounds([views for group in groups for views in group], self.budget)
            return np.split(rows, np.cumsum([len(group) for group in groups])[:-1])

        video = parts(
            {"tv_ib", "av_ib"},
            lambda clip: video_views(clip, self.clip_spacing),
            lambda ready: scorer.videos(ready, self.budget),
        )
        sound = parts(
            {"ta_ib", "av_ib", "avh_score"},
            lambda clip: audio_views(first_channel(clip), self.clip_spacing),
            lambda ready: scorer.sounds(ready, self.budget),
        )
        text_v = parts({"tv_ib"}, lambda c: prompt_text(c, "prompt_v"), lambda r: scorer.texts(r, self.budget))
        text_a = parts({"ta_ib"}, lambda c: prompt_text(c, "prompt_a"), lambda r: scorer.texts(r, self.budget))
        frames = parts(
            {"avh_score", "javis_score"},
            still_frames,
            lambda ready: [scorer.frames(stills, self.budget) for stills in ready],
        )
        heard = parts({"javis_score"}, windows, embed_all)
        return [
            Embeddings(v, s, tv, ta, f, h, plan.frame_starts, plan.frames)
            for v, s, tv, ta, f, h, plan in zip(video, sound, text_v, text_a, frames, heard, plans, strict=True)
        ]


@dataclass(frozen=True)
class Windows:
    """Where the windows of JavisScore begin and how long they are, in frames and in samples at 16 kHz."""

    frame_starts: tuple[int, ...]
    frames: int
    sample_starts: tuple[int, ...]
    samples: int


def javis_windows(num_frames: int, frame_rate: float, num_samples: int) -> Windows:
    """Windows of 2 s every 0.5 s, as many as picture and sound both have; the last ends with the clip.

    A clip of one window or less is one window.
    """
    frames, samples = int(WINDOW_SECONDS * frame_rate), int(WINDOW_SECONDS * SAMPLE_RATE)
    frame_starts = _starts(num_frames, frames, frames - int(OVERLAP_SECONDS * frame_rate))
    sample_starts = _starts(num_samples, samples, samples - int(OVERLAP_SECONDS * SAMPLE_RATE))
    count = min(len(frame_starts), len(sample_starts))
    return Windows(frame_starts[:count], min(frames, num_frames), sample_starts[:count], min(samples, num_samples))


def _starts(total: int, length: int, hop: int) -> tuple[int, ...]:
    if total <= length:
        return (0,)
    steps = math.ceil((total - length) / hop)
    return tuple(min(i * hop, total - length) for i in range(steps + 1))


def _windows(clip: Clip) -> Windows:
    samples = round(clip.waveform.shape[-1] * SAMPLE_RATE / clip.sample_rate) if clip.waveform.size else 0
    return javis_windows(len(clip.video), clip.frame_rate, samples)


def avh_score(made: Embeddings) -> float:
    """Mean over all frames of the cosine with the whole sound."""
    return float(cosines(_part(made.frames), _part(made.sound)).mean())


def javis_score(made: Embeddings) -> float:
    """Mean over windows of the mean of the int(0.4 w) smallest of the w cosines of frames with the window's sound."""
    frames, sounds = _part(made.frames), _part(made.windows)
    scores = []
    for start, sound in zip(made.frame_starts, sounds, strict=True):
        found = np.sort(cosines(frames[start : start + made.frame_count], sound))
        scores.append(found[: max(1, int(WORST_SHARE * len(found)))].mean())
    return float(np.mean(scores))


def _tv_ib(made: Embeddings) -> float:
    return float(cosines(_part(made.text_v), _part(made.video)))


def _ta_ib(made: Embeddings) -> float:
    return float(cosines(_part(made.text_a), _part(made.sound)))


def _av_ib(made: Embeddings) -> float:
    return float(cosines(_part(made.sound), _part(made.video)))


def _part(found: Embedded) -> np.ndarray:
    if isinstance(found, OmniNFTError):
        raise found
    return found


def _on(formula: Callable[[Embeddings], float], embedded: dict[int, Embeddings]) -> Callable[[Clip], float]:
    return lambda clip: formula(embedded[id(clip)])


# By the name of the reward whose model it shares; options on the command line go by these names too.
JUDGES: dict[str, JudgeEntry] = {
    "videoalign": JudgeEntry(VideoQuality, ("vq", "mq"), takes_device=True),
    "audiobox": JudgeEntry(AudioQuality, ("aq",), {"aq_no_resample": {"resample": False}}, takes_device=True),
    "imagebind": JudgeEntry(
        BindScores,
        ("tv_ib", "ta_ib", "av_ib", "avh_score", "javis_score"),
        takes_device=True,
        takes_wanted=True,
    ),
    "clip": JudgeEntry(TextVideo, ("clip",), {"bgr_clip": {"bgr": True}}, takes_device=True),
    "clap": JudgeEntry(TextSound, ("clap",), takes_device=True),
    "desync": JudgeEntry(DeSync, ("desync",), takes_device=True),
}

SETTINGS: dict[str, Any] = {
    "javis_window_s": WINDOW_SECONDS,
    "javis_overlap_s": OVERLAP_SECONDS,
    "javis_worst_share": WORST_SHARE,
    "aq_seconds": SECONDS,
    "desync_seconds": SECONDS,
    "clip_frames": 48,
    "imagebind_spacing": "n-1",
    "clap_long": "mean",
    "clap_padding": "zero",
    "videoalign_fps": "the checkpoint's",
}

JAVISBENCH = BenchmarkDescription(
    name="javisbench",
    version=VERSION,
    metrics=(*METRICS, *MEASURED_METRICS),
    judges={**JUDGES, **measured_judges()},
    on_request=ON_REQUEST,
    sets={
        "video": SetEntry(video_distance, ("fvd", "kvd"), {"unscaled_fvd": {"unscaled": True}}),
        "audio": SetEntry(audio_distance, ("fad",)),
    },
    quirks=COMPAT,
    settings=SETTINGS,
    form=ClipForm(SECONDS, FRAME_RATE, AUDIO_RATE),
    fetch_prompts="hf download JavisDiT/JavisBench JavisBench.csv --repo-type dataset --local-dir javisbench",
)
