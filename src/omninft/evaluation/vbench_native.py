"""VBench's dimensions that need only common models, measured here: no second environment, on any clips.

What follows the official recipe with the official weights goes by the official name. Two dimensions whose networks are
in no package go by names of their own and never enter totals: `flow_motion_smoothness` and `flow_dynamic_degree` use
Farneback's optical flow for AMT-S and RAFT. The nine semantic dimensions are the official package's (`omninft vbench
run`).

Known differences from the official numbers: frames are decoded by PyAV (there by decord, which agrees, and for
temporal_flickering by OpenCV, which passes over the colour standard that a file names: some 0.00005), and models run in
single precision unless asked otherwise (there CLIP in half on a GPU).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from omninft.clips.media import read_clip
from omninft.evaluation.results import EvaluationResult, Metric, Protocol
from omninft.evaluation.vbench import consistency, is_dynamic, likeness, sampled_frames, top_speed
from omninft.evaluation.vbench_results import BENCHMARK, ClipRow, assemble, metric_of
from omninft.evaluation.vbench_suite import SAMPLES, Suite, clip_names, prompt_of
from omninft.files import cannot_write, parse_json, read_text, write_text
from omninft.scorers import aesthetic, dino, imaging
from omninft.scorers import clip as clip_scorer
from omninft.scorers.flicker import frame_differences
from omninft.scorers.flow import FARNEBACK
from omninft.scorers.smoothness import flow_errors
from omninft.scorers.unfiltered import clip_pixels, in_parts
from omninft.scorers.weights import JudgingModel, file_sha256
from omninft.types import Clip, OmniNFTError

FLOW_SIDES = (64, 256)  # pixels: the shorter side of frames whose flow is computed is brought between these


class Judges:
    """The judging models, each loaded on first use. `paths` has local files or folders by judge: dino, clip, ..."""

    LOADERS: Mapping[str, Callable[..., Any]] = {
        "dino": dino.load_dino,
        "clip": clip_scorer.load_clip,
        "aesthetic": aesthetic.load_aesthetic,
        "imaging": imaging.load_imaging,
    }

    def __init__(
        self,
        paths: Mapping[str, Path] | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        budget: int = 16,
        **ready: Any,
    ) -> None:
        unknown = sorted({*(paths or {}), *ready} - set(self.LOADERS))
        if unknown:
            raise OmniNFTError(f"no judge of VBench: {', '.join(unknown)}; expected {', '.join(self.LOADERS)}")
        self.paths, self.device, self.dtype, self.budget = dict(paths or {}), device, dtype, budget
        self._ready = dict(ready)
        self._handed_in = frozenset(ready)
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Any:
        with self._lock:
            if name not in self._ready:
                self._ready[name] = self.LOADERS[name](self.paths.get(name), self.device, self.dtype)
            return self._ready[name]

    def cards(self, name: str) -> list[tuple[JudgingModel, Any]]:
        """What a judge loads, and the path that is given for it."""
        path = self.paths.get(name)
        if name == "aesthetic":
            return [(aesthetic.CARD, path), (aesthetic.HEAD_CARD, aesthetic.head_path(path))]
        return [({"dino": dino.card_of(path), "clip": clip_scorer.CARD, "imaging": imaging.CARD}[name], path)]

    def missing(self, name: str) -> str | None:
        """None when the judge is loaded or its files are there, else what lacks and how to fetch it."""
        if name in self._ready:
            return None
        lacking = [card.missing(path) for card, path in self.cards(name)]
        return "; ".join(why for why in lacking if why is not None) or None

    def checksums(self, name: str) -> dict[str, str]:
        """SHA-256 by file of what is loaded; empty for a judge that was handed in."""
        if name in self._handed_in:
            return {}
        files = {f: place for card, path in self.cards(name) for f, place in card.locate(path).items()}
        return {file: file_sha256(place) for file, place in files.items()}


@dataclass(frozen=True)
class Measurement:
    """One number of a clip: the official dimension it is or stands for, and how it is made."""

    metric: Metric
    dimension: str
    score: Callable[[Clip, Judges], float]
    judge: str | None = None
    weight: Callable[[Clip], float] = field(default=lambda clip: 1.0)  # in the mean over clips

    @property
    def name(self) -> str:
        return self.metric.name


def subject_consistency(clip: Clip, judges: Judges) -> float:
    _require_frames(clip, 2)
    return consistency(judges["dino"].embed_frames(clip.video, judges.budget).numpy())


def background_consistency(clip: Clip, judges: Judges) -> float:
    _require_frames(clip, 2)
    scorer = judges["clip"]
    parts = [
        scorer.embed_frames(clip_pixels(part, clip_scorer.SIDE), judges.budget)
        for part in in_parts(clip.video, judges.budget)
    ]
    return consistency(torch.cat(parts).numpy())


def temporal_flickering(clip: Clip, judges: Judges) -> float:
    return likeness(frame_differences(clip))


def aesthetic_quality(clip: Clip, judges: Judges) -> float:
    return float(judges["aesthetic"](clip.video, judges.budget).mean() / 10)


def imaging_quality(clip: Clip, judges: Judges) -> float:
    return float(judges["imaging"](clip.video, judges.budget).mean() / 100)


def flow_motion_smoothness(clip: Clip, judges: Judges) -> float:
    return likeness(flow_errors(clip))


def flow_dynamic_degree(clip: Clip, judges: Judges) -> float:
    speeds, height, width = flow_speeds(clip)
    return float(is_dynamic(speeds, height, width))


def flow_speeds(clip: Clip) -> tuple[list[float], int, int]:
    """`top_speed` between the frames that dynamic_degree compares, by Farneback's flow; and the size of the frames.

    Frames are brought to a short side within FLOW_SIDES: the rule is relative to their size, and Farneback's windows
    are not.

    Raises:
        OmniNFTError: fewer than two frames.
    """
    _require_frames(clip, 2)
    height, width = clip.video.shape[1:3]
    scale = min(max(min(height, width), FLOW_SIDES[0]), FLOW_SIDES[1]) / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    shrink = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    frames = [
        cv2.resize(cv2.cvtColor(clip.video[t], cv2.COLOR_RGB2GRAY), size, interpolation=shrink)
        for t in sampled_frames(len(clip.video), clip.frame_rate)
    ]
    flows = (
        cv2.calcOpticalFlowFarneback(before, after, None, **FARNEBACK)  # type: ignore[call-overload]
        for before, after in zip(frames, frames[1:], strict=False)
    )
    return [top_speed(flow) for flow in flows], size[1], size[0]


def _pairs(clip: Clip) -> float:
    return float(len(clip.video) - 1)


MEASUREMENTS: dict[str, Measurement] = {
    m.name: m
    for m in (
        Measurement(
            metric_of("subject_consistency"), "subject_consistency", subject_consistency, judge="dino", weight=_pairs
        ),
        Measurement(
            metric_of("background_consistency"),
            "background_consistency",
            background_consistency,
            judge="clip",
            weight=_pairs,
        ),
        Measurement(metric_of("temporal_flickering"), "temporal_flickering", temporal_flickering),
        Measurement(metric_of("aesthetic_quality"), "aesthetic_quality", aesthetic_quality, judge="aesthetic"),
        Measurement(metric_of("imaging_quality"), "imaging_quality", imaging_quality, judge="imaging"),
        Measurement(
            Metric(
                "flow_motion_smoothness",
                "Smoothness (flow)",
                "not VBench's motion_smoothness: dropped frames made by Farneback's flow instead of AMT-S",
            ),
            "motion_smoothness",
            flow_motion_smoothness,
        ),
        Measurement(
            Metric(
                "flow_dynamic_degree",
                "Dynamic (flow)",
                "not VBench's dynamic_degree: its rule on Farneback's flow instead of RAFT's",
            ),
            "dynamic_degree",
            flow_dynamic_degree,
        ),
    )
}


def evaluate_native(
    folder: Path,
    names: Sequence[str] | None = None,
    *,
    suite: Suite | None = None,
    judges: Judges | None = None,
    output: Path | None = None,
    system: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluationResult:
    """Measure the mp4 files of a folder; `names` of MEASUREMENTS, by default all whose weights are here.

    With `suite` a clip is judged in the dimensions of its prompt, samples 0..4 as named there, and clips that lack are
    rows with a reason; without, every clip in all. With `output` (a folder) finished clips stay, and the same call goes
    on from there; result.json is written at the end.

    Raises:
        OmniNFTError: no clips, a name that is not measured here, or a named measurement whose weights are missing.
    """
    judges = judges or Judges()
    chosen, notes = _chosen(names, judges)
    plan, strange = _plan(folder, chosen, suite)
    if strange:
        notes.append(f"{len(strange)} files are no clips of the suite and were left out, e.g. {strange[0]!r}")
    settings = {
        "implementation": f"omninft {version('omninft')}",
        "measurements": [m.name for m in chosen],
        "suite": suite.digest if suite else None,
        "dtype": str(judges.dtype).removeprefix("torch."),
        "weights": {m.judge: judges.checksums(m.judge) for m in chosen if m.judge is not None},
    }
    journal = _Journal(output, settings)
    rows = []
    for done, (label, prompt, measurements) in enumerate(plan):
        file = folder / label
        row = journal.row(file, [m.name for m in measurements])
        if row is None:
            row = _row(file, prompt, measurements, judges)
            journal.add(file, row)
        rows.append(row)
        progress(done + 1, len(plan))
    result = assemble(
        system or folder.resolve().name,
        Protocol(BENCHMARK, "0.1.5", settings),
        [m.metric for m in chosen],
        rows,
        suite=suite,
        weights=_weights(chosen, judges),
        notes=notes,
    )
    if output is not None:
        result.save(output)
        journal.remove()
    return result


def _chosen(names: Sequence[str] | None, judges: Judges) -> tuple[list[Measurement], list[str]]:
    unknown = sorted(set(names or ()) - set(MEASUREMENTS))
    if unknown:
        raise OmniNFTError(
            f"not measured here: {', '.join(unknown)}; expected some of {', '.join(MEASUREMENTS)}. "
            "The official package has the 16 dimensions: omninft vbench run"
        )
    chosen, notes = [], []
    for measurement in MEASUREMENTS.values():
        if names is not None and measurement.name not in names:
            continue
        missing = judges.missing(measurement.judge) if measurement.judge else None
        if missing is None:
            chosen.append(measurement)
        elif names is not None:
            raise OmniNFTError(f"{measurement.name}: {missing}")
        else:
            notes.append(f"{measurement.name} was left out: {missing}")
    return chosen, notes


def _plan(
    folder: Path, chosen: Sequence[Measurement], suite: Suite | None
) -> tuple[list[tuple[str, str, list[Measurement]]], list[str]]:
    """(file name, prompt, measurements) of the clips to judge, and files that are none of the suite's."""
    if not folder.is_dir():
        raise OmniNFTError(f"{folder}: no such folder of clips")
    there = sorted(p.name for p in folder.iterdir() if p.suffix.lower() == ".mp4" and not p.name.startswith("."))
    if not there:
        raise OmniNFTError(f"{folder}: no mp4 files in it")
    if suite is None:
        return [(name, prompt_of(name), list(chosen)) for name in there], []
    plan = []
    for prompt, used in suite.prompts({m.dimension for m in chosen}).items():
        measurements = [m for m in chosen if m.dimension in used]
        plan += [(name, prompt, measurements) for name in clip_names(prompt, SAMPLES)]
    known = {name for prompt in suite.prompts() for name in clip_names(prompt, SAMPLES)}
    strange = [name for name in there if name not in known]
    if not known & set(there):
        raise OmniNFTError(f"{folder}: no clip has a name of the suite, e.g. {plan[0][0]!r}; found {there[0]!r}")
    return plan, strange


def _row(file: Path, prompt: str, measurements: Sequence[Measurement], judges: Judges) -> ClipRow:
    row = ClipRow(file.name, prompt, {})
    try:
        clip = read_clip(file, require_audio=False)
    except OmniNFTError as error:
        return ClipRow(
            file.name, prompt, {m.name: None for m in measurements}, {m.name: str(error) for m in measurements}
        )
    for m in measurements:
        try:
            score = m.score(clip, judges)
        except OmniNFTError as error:
            row.scores[m.name], row.reasons[m.name] = None, str(error)
            continue
        if np.isfinite(score):
            row.scores[m.name], row.weights[m.name] = score, m.weight(clip)
        else:
            row.scores[m.name], row.reasons[m.name] = None, f"the score is {score}"
    return row


def _weights(chosen: Sequence[Measurement], judges: Judges) -> dict[str, str]:
    """Judge -> models, revisions and licences. Checksums are settings of the protocol."""
    return {
        judge: "; ".join(
            f"{card.name}, revision {card.revision or 'not pinned'}, licence {card.licence}"
            for card, _ in judges.cards(judge)
        )
        for judge in dict.fromkeys(m.judge for m in chosen if m.judge is not None)
    }


def _require_frames(clip: Clip, count: int) -> None:
    if len(clip.video) < count:
        raise OmniNFTError(f"needs {count} frames, found {len(clip.video)}")


class _Journal:
    """Rows of an unfinished evaluation, a line each; those of unchanged files are not measured again."""

    def __init__(self, output: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = output / "clips.partial.jsonl" if output is not None else None
        self._known: dict[str, dict[str, Any]] = {}
        if self.path is None:
            return
        header = json.loads(json.dumps(settings))
        lines = read_text(self.path).splitlines() if self.path.exists() else []
        entries = [entry for line in lines if (entry := _json_or_none(line)) is not None]
        if entries and entries[0] != header:
            raise OmniNFTError(
                f"{self.path} holds unfinished scores of other settings; remove it to begin again, or choose another "
                "output"
            )
        self._known = {e["row"]["file"]: e for e in entries[1:] if not e["row"]["reasons"]}
        # Written anew, so that a torn last line does not stay in the middle.
        write_text(self.path, "".join(json.dumps(e) + "\n" for e in (header, *self._known.values())))

    def row(self, file: Path, names: Sequence[str]) -> ClipRow | None:
        entry = self._known.get(file.name)
        if entry is None or entry["stamp"] != _stamp(file) or list(entry["row"]["scores"]) != list(names):
            return None
        return ClipRow(**entry["row"])

    def add(self, file: Path, row: ClipRow) -> None:
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as journal:
                    journal.write(json.dumps({"row": asdict(row), "stamp": _stamp(file)}, allow_nan=False) + "\n")
            except OSError as error:
                raise cannot_write(self.path, error) from error

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _stamp(file: Path) -> list[int]:
    status = file.stat() if file.is_file() else None
    return [status.st_size, status.st_mtime_ns] if status is not None else []


def _json_or_none(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None
