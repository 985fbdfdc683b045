"""Runs a benchmark on a folder of clips: scores in batches, a journal that survives an end at any moment, shards, and
the sums over clips with intervals.

A benchmark is data: metrics, judges that score clips, set metrics that keep features of them. Any object with
`components` and `score(clips) -> ScoreTable` is a judge; its components are named as the metrics are.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from omninft.clips.journal import Journal
from omninft.clips.workers import decoded_chunks
from omninft.distributed import available_cores
from omninft.evaluation.clip_folder import ClipFile, read
from omninft.evaluation.paired import mean_estimates
from omninft.evaluation.prompt_table import rows_digest
from omninft.evaluation.result_tables import write_tables
from omninft.evaluation.results import RESULT_FILE, ClipScores, EvaluationResult, Metric, MetricResult, Protocol
from omninft.evaluation.set_metrics import SetMetric
from omninft.files import write_atomically
from omninft.prompts.prompt_file import PromptRow
from omninft.rewards.failures import LOG_NAME, FailureLog
from omninft.rewards.registry import Reward
from omninft.rewards.runner import RewardRunner
from omninft.types import Clip, OmniNFTError, ScoreTable

RESAMPLES = 2000  # of the bootstrap over prompts
CLIPS = "clips"  # folder of generated clips, in the folder of the evaluation
FEATURES_FILE = "features.safetensors"
_SHOWN = 5  # files or reasons named in a note

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Benchmark:
    """What is measured and how.

    `settings` is what changes numbers, and is part of the protocol; `weights` and `notes` explain.
    """

    name: str
    version: str
    metrics: tuple[Metric, ...]  # of single clips
    judges: tuple[Reward, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    sets: tuple[SetMetric, ...] = ()
    categories: Callable[[PromptRow], tuple[str, ...]] = lambda row: row.categories
    seconds: float | None = None  # that a clip should last
    weights: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def protocol(self, clips: Sequence[ClipFile]) -> Protocol:
        """The protocol of these prompts."""
        rows = list({clip.row.index: clip.row for clip in clips}.values())
        prompts = {"count": len(rows), "clips": len(clips), "digest": rows_digest(rows)}
        return Protocol(self.name, self.version, {**self.settings, "prompts": prompts})

    @property
    def all_metrics(self) -> tuple[Metric, ...]:
        return (*self.metrics, *(metric for one in self.sets for metric in one.metrics))


@dataclass(frozen=True)
class Shard:
    """Every `world`-th clip from `rank` on."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise OmniNFTError(f"shard {self.rank}/{self.world}: expected RANK/COUNT with 0 <= RANK < COUNT, e.g. 0/4")

    def share(self, items: Sequence[Any]) -> list[Any]:
        return list(items[self.rank :: self.world])


def parse_shard(text: str) -> Shard:
    """From "0/4". Raises OmniNFTError for anything else."""
    rank, slash, world = text.partition("/")
    if not (slash and rank.isdigit() and world.isdigit()):
        raise OmniNFTError(f"--shard is {text!r}, expected RANK/COUNT, e.g. 0/4")
    return Shard(int(rank), int(world))


def run_benchmark(
    benchmark: Benchmark,
    clips: Sequence[ClipFile],
    output: Path,
    *,
    system: str,
    generation: dict[str, Any] | None = None,
    shard: Shard | None = None,
    progress: Progress = lambda done, total: None,
    chunk_clips: int = 32,
) -> EvaluationResult | None:
    """Score this shard's clips that no journal in `output` has; when all clips are there, write result and tables.

    Returns None while other shards have clips to do. A clip that cannot be read is missing in every metric, with the
    reason, and the others count. Called again after an end at any moment, it goes on where it stopped.

    Raises:
        OmniNFTError: nothing to measure, or unfinished work of other settings in `output`.
    """
    if not benchmark.all_metrics:
        raise OmniNFTError("none of the metrics can be computed: " + "; ".join(benchmark.notes))
    shard = shard or Shard()
    base = output / CLIPS if (output / CLIPS).is_dir() else output
    keyed = {(clip.row.index, clip.label(base)): clip for clip in clips}
    protocol = benchmark.protocol(clips)
    header = {"protocol": protocol.digest, "metrics": [m.name for m in benchmark.all_metrics], "system": system}

    def key(entry: dict[str, Any]) -> tuple[int, str]:
        return entry["row"], entry["file"]

    def is_current(entry: dict[str, Any]) -> bool:
        return key(entry) in keyed and keyed[key(entry)].stamp == entry["stamp"]

    _require_own(output, system)
    if (finished := _finished(output, clips, protocol, benchmark, system)) is not None:
        progress(len(clips), len(clips))
        return finished
    path = output / f"journal-{shard.rank}-of-{shard.world}.jsonl"
    work = "scores of other settings, metrics or prompts"
    with (
        Journal(path, header, work) as journal,
        RewardRunner(benchmark.judges, 1.0, FailureLog(output / LOG_NAME)) as runner,
    ):

        def of_others() -> dict[tuple[int, str], dict[str, Any]]:
            journals = [Journal(p, header, work) for p in sorted(output.glob("journal-*.jsonl")) if p != path]
            return {key(e): e for one in journals for e in one.read() if is_current(e)}

        others = of_others()  # read first: a journal of other work refuses this call before it leaves one of its own
        # What failed is tried again; what others could not score stays with its reason.
        own = journal.resume(lambda entry: is_current(entry) and not entry["reasons"])
        entries = others | {key(e): e for e in own}
        mine = shard.share(clips)
        todo = [clip for clip in mine if (clip.row.index, clip.label(base)) not in entries]
        if todo:
            _load(benchmark.judges)
        done = len(mine) - len(todo)
        progress(done, len(mine))
        for chunk in decoded_chunks(todo, read, available_cores(), chunk_clips):
            for entry in _scored(benchmark, runner, chunk, base):
                journal.add(entry)
                entries[key(entry)] = entry
            done += len(chunk)
            progress(done, len(mine))
        # Other shards may have gone on in the meantime.
        entries = of_others() | entries if len(entries) < len(keyed) else entries
        if len(entries) < len(keyed):
            # The one that finds everything done takes the journals away.
            return None if path.is_file() else EvaluationResult.load(output)
        rows = [(clip, entries[name]) for name, clip in keyed.items()]
        if all("problem" in entry for _, entry in rows):
            raise OmniNFTError(f"none of the {len(rows)} clips could be read: {rows[0][1]['problem']}")
        result = _result(benchmark, protocol, rows, system, generation or {})
        _write_features(output, benchmark, rows)
        result.save(output)
        write_tables(result, output)
        journal.remove()
        for other in output.glob("journal-*.jsonl"):
            other.unlink(missing_ok=True)
    return result


def _require_own(output: Path, system: str) -> None:
    """Raises OmniNFTError when the folder holds another system's result, which would be lost."""
    if (output / RESULT_FILE).is_file() and (there := EvaluationResult.load(output).system) != system:
        raise OmniNFTError(f"{output} holds the result of {there!r}, not of {system!r}: choose another output")


def _finished(
    output: Path, clips: Sequence[ClipFile], protocol: Protocol, benchmark: Benchmark, system: str
) -> EvaluationResult | None:
    """The result that is there already: of this work, and newer than its clips."""
    path = output / RESULT_FILE
    if not path.is_file() or any(output.glob("journal-*.jsonl")):
        return None
    try:
        result = EvaluationResult.load(path)
    except OmniNFTError:
        return None
    times = [time for clip in clips for _, time in filter(None, clip.stamp)]
    same = (result.protocol.digest, result.system, result.metrics) == (protocol.digest, system, benchmark.all_metrics)
    whole = len(result.clips) == len(clips) and not any(clip.reasons for clip in result.clips)
    return result if same and whole and max(times, default=0) < path.stat().st_mtime_ns else None


def _load(judges: Sequence[Reward]) -> None:
    """Judging models now: one that cannot be loaded would be tried again for every clip, and be missing on all."""
    for judge in judges:
        getattr(judge, "scorer", None)


def _scored(
    benchmark: Benchmark,
    runner: RewardRunner,
    chunk: Sequence[tuple[ClipFile, Clip | OmniNFTError]],
    base: Path,
) -> Iterator[dict[str, Any]]:
    """A journal entry for each clip of a chunk."""
    names = [metric.name for metric in benchmark.metrics]
    clips = [clip for _, clip in chunk if isinstance(clip, Clip)]
    table = runner.score(clips) if clips else ScoreTable((), np.empty((0, 0)))
    features = {one.name: _features(one, clips) for one in benchmark.sets if one.given is None}
    b = 0
    for file, clip in chunk:
        entry: dict[str, Any] = {"row": file.row.index, "file": file.label(base), "stamp": file.stamp, "features": {}}
        if isinstance(clip, OmniNFTError):
            entry |= {"scores": dict.fromkeys(names), "reasons": dict.fromkeys(names, str(clip)), "problem": str(clip)}
            yield entry
            continue
        scores, reasons = {}, {}
        for name in names:
            k = table.names.index(name)
            value = float(table.values[b, k])
            scores[name] = value if math.isfinite(value) else None
            if scores[name] is None:
                reasons[name] = table.reasons.get((b, k), "no score")
        for one, found in features.items():
            row = found[b]
            if isinstance(row, OmniNFTError):
                reasons[one] = str(row)
            else:
                entry["features"][one] = base64.b64encode(np.asarray(row, dtype="<f4").tobytes()).decode()
        seconds = len(clip.video) / clip.frame_rate
        yield entry | {"scores": scores, "reasons": reasons, "seconds": seconds}
        b += 1


def _features(one: SetMetric, clips: list[Clip]) -> list[np.ndarray | OmniNFTError]:
    return one.features(clips) if clips else []


def _result(
    benchmark: Benchmark,
    protocol: Protocol,
    rows: Sequence[tuple[ClipFile, dict[str, Any]]],
    system: str,
    generation: dict[str, Any],
) -> EvaluationResult:
    names = [metric.name for metric in benchmark.metrics]
    made = tuple(
        ClipScores(
            index=clip.row.index,
            file=entry["file"],
            prompt_id=clip.row.prompt.id,
            prompt=clip.row.prompt.prompt_av,
            categories=benchmark.categories(clip.row),
            scores=entry["scores"],
            reasons=entry["reasons"],
        )
        for clip, entry in rows
    )
    overall = aggregate(names, made)
    notes = list(benchmark.notes)
    for one in benchmark.sets:
        results, note = _set_results(one, rows)
        overall |= results
        notes += [note] if note else []
    every = sorted({category for clip in made for category in clip.categories})
    categories = {c: aggregate(names, [clip for clip in made if c in clip.categories]) for c in every}
    notes += _missing_notes(benchmark, rows)
    return EvaluationResult(
        system=system,
        protocol=protocol,
        metrics=benchmark.all_metrics,
        overall=overall,
        categories=categories,
        clips=made,
        generation=generation,
        weights=benchmark.weights,
        notes=tuple(notes),
    )


def aggregate(names: Sequence[str], clips: Sequence[ClipScores]) -> dict[str, MetricResult]:
    """Mean over the clips that have a score, per metric, with its interval."""
    values = np.array(
        [[math.nan if (v := clip.scores.get(n)) is None else v for n in names] for clip in clips], dtype=np.float64
    ).reshape(len(clips), len(names))
    estimates = mean_estimates(values, [clip.prompt_id for clip in clips], resamples=RESAMPLES)
    results = {}
    for k, (name, estimate) in enumerate(zip(names, estimates, strict=True)):
        count = int(np.isfinite(values[:, k]).sum())
        mean, low, high = (x if math.isfinite(x) else None for x in (estimate.mean, estimate.low, estimate.high))
        results[name] = MetricResult(mean, low, high, count, len(clips) - count)
    return results


def _feature_rows(one: SetMetric, rows: Sequence[tuple[ClipFile, dict[str, Any]]]) -> list[np.ndarray]:
    """[D] float64 of every clip that has the features, in order."""
    texts = [entry["features"][one.name] for _, entry in rows if one.name in entry["features"]]
    return [np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64) for text in texts]


def _set_results(
    one: SetMetric, rows: Sequence[tuple[ClipFile, dict[str, Any]]]
) -> tuple[dict[str, MetricResult], str]:
    """Results of a set metric, and a note where there is none."""
    found = _feature_rows(one, rows) if one.given is None else list(one.given)
    count, missing = len(found), max(0, len(rows) - len(found))
    labels = ", ".join(metric.label for metric in one.metrics)
    try:
        if not found:
            raise OmniNFTError("no clip has features")
        values = one.values(np.stack(found))
    except OmniNFTError as error:
        empty = {metric.name: MetricResult(None, count=count, missing=missing) for metric in one.metrics}
        return empty, f"{labels}: not computed: {error}"
    note = f"{labels}: of {count} given features" if one.given is not None else ""
    return {name: MetricResult(value, count=count, missing=missing) for name, value in values.items()}, note


def _write_features(output: Path, benchmark: Benchmark, rows: Sequence[tuple[ClipFile, dict[str, Any]]]) -> None:
    """What was computed of features, in the form that --features and --real take."""
    tensors = {}
    for one in benchmark.sets:
        if one.given is None and (found := _feature_rows(one, rows)):
            tensors[one.name] = torch.from_numpy(np.stack(found).astype(np.float32))
    if tensors:
        write_atomically(output / FEATURES_FILE, lambda temporary: temporary.write_bytes(save(tensors)))


def _missing_notes(benchmark: Benchmark, rows: Sequence[tuple[ClipFile, dict[str, Any]]]) -> list[str]:
    notes = []
    unread = [entry for _, entry in rows if "problem" in entry]
    if unread:
        listed = "; ".join(entry["problem"] for entry in unread[:_SHOWN])
        more = f"; and {len(unread) - _SHOWN} more" if len(unread) > _SHOWN else ""
        notes.append(f"{len(unread)} of {len(rows)} clips could not be read and count in no metric: {listed}{more}")
    labels = {metric.name: metric.label for metric in benchmark.metrics} | {
        one.name: ", ".join(metric.label for metric in one.metrics) for one in benchmark.sets
    }
    lacking: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for name, label in labels.items():
        reasons = Counter(e["reasons"][name] for _, e in rows if name in e["reasons"] and "problem" not in e)
        if reasons:
            lacking.setdefault(tuple(reasons.most_common(_SHOWN)), []).append(label)
    for found, named in lacking.items():
        total = sum(count for _, count in found)
        why = "; ".join(f"{reason} ({count})" for reason, count in found)
        notes.append(f"{', '.join(named)}: missing on {total} of {len(rows)} clips: {why}")
    if benchmark.seconds is not None:
        lengths = [e["seconds"] for _, e in rows if "seconds" in e]
        other = [s for s in lengths if abs(s - benchmark.seconds) > 0.5 / 24]
        if other:
            notes.append(
                f"{len(other)} of {len(rows)} clips do not last {benchmark.seconds:g} s "
                f"({min(other):.2f} to {max(other):.2f} s)"
            )
    return notes
