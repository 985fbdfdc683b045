"""VBench numbers as an `EvaluationResult`: from scores of clips, and from the official package's own JSON.

A row of the result is one clip with the dimensions that its prompt is for. Totals are there only when all their
dimensions are; means of what was measured go by other names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from omninft.evaluation.paired import student_quantile
from omninft.evaluation.results import ClipScores, EvaluationResult, Metric, MetricResult, Protocol
from omninft.evaluation.vbench import BY_NAME, Totals, chosen_dimensions, totals
from omninft.evaluation.vbench_suite import Suite, clip_names, prompt_of
from omninft.files import read_json, write_text
from omninft.types import OmniNFTError

BENCHMARK = "vbench"
CONFIDENCE = 0.95
RESAMPLES = 2000
# Official results of one clip are 0..100 here; the dimension's own score is 0..1.
_CLIP_SCALE = {"imaging_quality": 100.0}
# Keys that hold how many comparisons or frames a clip counted for in the official mean.
_COUNTS = ("cnt_per_video", "frame_count")
_NO_SCORE = "the official package gives this clip no score"


@dataclass(frozen=True)
class ClipRow:
    """One clip: scores and reasons by metric, and what it weighs in a metric's mean (default 1)."""

    file: str
    prompt: str
    scores: dict[str, float | None]
    reasons: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)


def metric_of(name: str) -> Metric:
    """A dimension as a column."""
    dimension = BY_NAME[name]
    return Metric(name, dimension.label, f"VBench {name} ({dimension.part}); official network: {dimension.judge}")


def assemble(
    system: str,
    protocol: Protocol,
    metrics: Sequence[Metric],
    rows: Sequence[ClipRow],
    *,
    official: Mapping[str, float] | None = None,
    suite: Suite | None = None,
    generation: Mapping[str, Any] | None = None,
    weights: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> EvaluationResult:
    """Means with intervals by a bootstrap over prompts, totals, and the rows.

    `official` are means that the official package gave; they stand as they are.
    """
    overall = {m.name: _mean(rows, m.name, (official or {}).get(m.name)) for m in metrics}
    summary = totals({name: result.value for name, result in overall.items() if name in BY_NAME})
    order = {text: i for i, text in enumerate(suite.prompts() if suite else dict.fromkeys(r.prompt for r in rows))}
    clips = (
        ClipScores(order.get(r.prompt, len(order)), r.file, r.prompt, r.prompt, (), r.scores, r.reasons) for r in rows
    )
    return EvaluationResult(
        system,
        protocol,
        (*metrics, *_total_metrics(summary)),
        overall | {name: MetricResult(value) for name, value in summary.by_name.items()},
        {},
        tuple(sorted(clips, key=lambda clip: (clip.index, clip.file))),
        dict(generation or {}),
        dict(weights or {}),
        (*notes, *_total_notes(summary)),
    )


def read_official(
    sources: Iterable[Path],
    system: str,
    suite: Suite | None = None,
    version: str = "0.1.5",
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> EvaluationResult:
    """`*_eval_results.json` files of the official package, or folders of them, one or several dimensions each.

    With `suite`, clips that it asks for and that have no result are rows with a reason. `more` goes to `assemble`.

    Raises:
        OmniNFTError: no file, not such a file, or a dimension in two of them.
    """
    scores: dict[str, float] = {}
    rows: dict[str, ClipRow] = {}
    for file in _result_files(sources):
        for name, (value, clips) in _official_tree(file).items():
            if name in scores:
                raise OmniNFTError(f"{file}: {name} is in another of the files too; give one result of a dimension")
            scores[name] = value
            for clip in clips:
                _add(rows, name, clip, file)
    if suite is not None:
        _add_missing(rows, suite, scores)
    dimensions = chosen_dimensions(list(scores))
    protocol = Protocol(
        BENCHMARK,
        version,
        {
            "implementation": f"vbench {version}",
            "dimensions": [d.name for d in dimensions],
            "suite": suite.digest if suite else None,
            **(settings or {}),
        },
    )
    metrics = [metric_of(d.name) for d in dimensions]
    return assemble(system, protocol, metrics, list(rows.values()), official=scores, suite=suite, **more)


def write_full_info(path: Path, suite: Suite, folder: Path, dimensions: Sequence[str]) -> Path:
    """`<name>_full_info.json`, as the official package writes it for its dimensions."""
    tree = suite.full_info(folder, dimensions)
    write_text(path, json.dumps(tree, indent=4, ensure_ascii=False))
    return path


def _mean(rows: Sequence[ClipRow], name: str, official: float | None) -> MetricResult:
    asked = [row for row in rows if name in row.scores]
    scored = [(row, score) for row in asked if (score := row.scores[name]) is not None]
    if not scored:
        return MetricResult(official, missing=len(asked))
    values = np.array([score for _, score in scored])
    weights = np.array([row.weights.get(name, 1.0) for row, _ in scored])
    value = float(np.average(values, weights=weights)) if official is None else official
    low, high = _interval(values, weights, [row.prompt for row, _ in scored])
    return MetricResult(value, low, high, len(scored), len(asked) - len(scored))


def _interval(values: np.ndarray, weights: np.ndarray, prompts: list[str]) -> tuple[float | None, float | None]:
    """Of the weighted mean, whole prompts drawn with replacement; percentiles widened for few (Hesterberg 2015)."""
    _, owner = np.unique(np.array(prompts, dtype=object).astype(str), return_inverse=True)
    count = int(owner.max()) + 1
    if count < 2:
        return None, None
    sums, sizes = np.bincount(owner, values * weights), np.bincount(owner, weights)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    means = (drawn @ sums) / (drawn @ sizes)
    wide = student_quantile(0.5 + CONFIDENCE / 2, count - 1) * math.sqrt(count / (count - 1))
    tail = NormalDist().cdf(-wide)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _total_metrics(summary: Totals) -> tuple[Metric, ...]:
    measured = {
        part: ", ".join(n for n in summary.normalised if BY_NAME[n].part == part) or "none"
        for part in ("quality", "semantic")
    }
    return (
        Metric("quality_score", "Quality", "weighted mean of the 7 quality dimensions, normalised"),
        Metric("semantic_score", "Semantic", "mean of the 9 semantic dimensions, normalised"),
        Metric("total_score", "Total", "(4 Quality + Semantic) / 5"),
        Metric("quality_of_measured", "Quality of measured", f"not a VBench score: only {measured['quality']}"),
        Metric("semantic_of_measured", "Semantic of measured", f"not a VBench score: only {measured['semantic']}"),
    )


def _total_notes(summary: Totals) -> tuple[str, ...]:
    if not summary.missing:
        return ()
    return (f"No VBench total: {len(summary.missing)} of 16 dimensions are missing ({', '.join(summary.missing)}).",)


def _result_files(sources: Iterable[Path]) -> list[Path]:
    files: list[Path] = []
    for source in sources:
        found = sorted(source.rglob("*_eval_results.json")) if source.is_dir() else [source]
        if not found:
            raise OmniNFTError(f"{source}: no *_eval_results.json in it; `vbench evaluate` writes them")
        files += found
    return files


def _official_tree(file: Path) -> dict[str, tuple[float, list[dict[str, Any]]]]:
    tree = read_json(file, "not results of VBench: ")
    try:
        chosen_dimensions(list(tree))
        found = {name: (float(value), list(clips)) for name, (value, clips) in tree.items()}
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        raise OmniNFTError(
            f"{file}: not results of VBench ({error!r}); expected "
            '{dimension: [score, [{"video_path": ..., "video_results": ...}]]}'
        ) from error
    except OmniNFTError as error:
        raise OmniNFTError(f"{file}: {error!s:.500}") from error
    unusable = [name for name, (value, _) in found.items() if not math.isfinite(value)]
    if unusable or not found:
        raise OmniNFTError(f"{file}: no finite score of {', '.join(unusable) or 'any dimension'}")
    return found


def _add(rows: dict[str, ClipRow], name: str, clip: Mapping[str, Any], file: Path) -> None:
    """One entry of a dimension's list into the row of its clip."""
    try:
        path = str(clip["video_path"])
        score = float(clip["video_results"]) / _CLIP_SCALE.get(name, 1.0)
        weight = float(next((clip[key] for key in _COUNTS if key in clip), 1.0))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise OmniNFTError(f"{file}: {name}: an entry that cannot be read ({error!r}): {str(clip)[:200]}") from error
    label = Path(path.replace("\\", "/")).name
    row = rows.setdefault(label, ClipRow(label, prompt_of(label), {}))
    if name in row.scores:
        raise OmniNFTError(f"{file}: {name}: two results of {label!r}")
    if math.isfinite(score):
        row.scores[name], row.weights[name] = score, weight
    else:
        row.scores[name], row.reasons[name] = None, f"the official result is {score}"


def _add_missing(rows: dict[str, ClipRow], suite: Suite, scores: Mapping[str, float]) -> None:
    for prompt, names in suite.prompts(list(scores)).items():
        for label in clip_names(prompt):
            row = rows.setdefault(label, ClipRow(label, prompt, {}))
            for name in names:
                if name not in row.scores:
                    row.scores[name], row.reasons[name] = None, _NO_SCORE
