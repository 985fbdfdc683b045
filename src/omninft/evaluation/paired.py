"""Paired evaluation: did training change a measure, by how much, and how sure is that?

Base and trained clips come in pairs (same prompt, same noise). Pairs of one prompt are not independent, so intervals
come from a bootstrap that draws whole prompts. The percentiles are widened for few prompts, where plain percentile
intervals are too narrow (T. Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician
69(4), 2015, section "expanded percentile interval").

Shape letters: n pairs, K measures, P prompts, R resamples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, TypeAdapter
from rich.console import Console
from rich.table import Table

from omninft.files import first_problem, parse_json
from omninft.types import OmniNFTError, Route

# NaN, which is null in our files.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
Group = Literal["trained", "held_out"]
Verdict = Literal["better", "worse", "no difference", "unclear"]

GROUP_TITLES: dict[Group, str] = {
    "trained": "Trained rewards",
    "held_out": "Held-out measures",
}
JUDGED_ON: dict[Route | None, str] = {
    "video": "picture",
    "audio": "sound",
    "joint": "picture with sound",
    None: "clip",
}
# Standard deviations of the base clips' scores within which a difference is as good as none: half of the fifth that is
# called a small effect.
EQUIVALENCE = 0.1
VERDICTS_EXPLAINED = (
    "Better or worse: the interval of the difference excludes 0. No difference: it lies within "
    f"{EQUIVALENCE:g} standard deviations of the base clips around 0. Unclear: neither; these clips cannot tell."
)
# Resample weights held at once: 32 MB of int64.
_WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Measure:
    """One number per clip: what it is called, what it judges and which way is better."""

    name: str
    group: Group
    route: Route | None = None
    higher_is_better: bool = True
    unit: str = ""  # "ms", "dB", ...; empty for a plain number

    @property
    def hint(self) -> str:
        """What a reader must know to read the number, e.g. "ms, lower is better"."""
        direction = f"{'higher' if self.higher_is_better else 'lower'} is better"
        return f"{self.unit}, {direction}" if self.unit else direction


@dataclass(frozen=True)
class Estimate:
    """A mean over clips with its interval; NaN where it cannot be estimated."""

    mean: Number
    low: Number
    high: Number


@dataclass(frozen=True)
class PairedRow:
    """Base against trained on one measure, over the pairs in which both clips have a score."""

    measure: Measure
    num_pairs: int
    num_dropped: int  # pairs in which one score, or both, was missing
    num_prompts: int  # prompts with at least one pair; the independent units
    base: Estimate
    trained: Estimate
    difference: Estimate  # trained minus base, of the same pairs
    base_spread: Number  # standard deviation of the base clips' scores; NaN for fewer than two
    relative_change: Number  # difference / |base mean|; NaN for a base mean of 0
    verdict: Verdict

    @property
    def decimals(self) -> int:
        """Digits after the point that the interval of the difference justifies (two of its half-width)."""
        half = (self.difference.high - self.difference.low) / 2
        size = half if half > 0 else abs(self.base.mean) / 10
        if not math.isfinite(size) or size <= 0:
            return 3
        return min(max(1 - math.floor(math.log10(size)), 0), 6)

    @property
    def standardised(self) -> Estimate:
        """The difference in standard deviations of the base clips, signed so that positive is better."""
        spread = self.base_spread if self.base_spread > 0 else math.nan
        low, high = self.difference.low / spread, self.difference.high / spread
        if self.measure.higher_is_better:
            return Estimate(self.difference.mean / spread, low, high)
        return Estimate(-self.difference.mean / spread, -high, -low)


@dataclass(frozen=True)
class PairedTable:
    """The final table of a run, and how it was made."""

    rows: tuple[PairedRow, ...]
    resamples: int
    confidence: float  # 0..1
    seed: int  # of the bootstrap
    settings: dict[str, Any] = field(default_factory=dict)  # whatever explains the clips: sampler, seeds, commit, ...

    def group(self, name: Group) -> tuple[PairedRow, ...]:
        return tuple(r for r in self.rows if r.measure.group == name)

    def to_json(self) -> str:
        """The text of `evaluation.json`; `from_json` gives an equal table. NaN is written as null."""
        return json.dumps(_without_nan(asdict(self)), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> PairedTable:
        """Raises OmniNFTError when the text is not such a table."""
        try:
            tree = parse_json(text)
            if not isinstance(tree, dict):
                raise ValueError(f"found {tree!r:.60}")
            table = TypeAdapter(PairedTable).validate_python(tree)
        except (ValueError, RecursionError) as error:
            why = first_problem(error) if isinstance(error, ValueError) else "too deep"
            raise OmniNFTError(f"not a paired evaluation table: {why}; expected rows, resamples, ...") from error
        # Whatever an older version called it.
        rows = [
            replace(r, verdict=verdict(r.difference, r.measure.higher_is_better, r.base_spread)) for r in table.rows
        ]
        return replace(table, rows=tuple(rows))

    def to_markdown(self) -> str:
        """A GitHub table with the groups as bold rows and a line on how to read it."""
        percent = f"{self.confidence:.0%}"
        lines = [
            f"| Measure | Judged on | Base | Trained | Difference [{percent} interval] | Change | Verdict |",
            "|---|---|--:|--:|--:|--:|---|",
        ]
        for name, title in GROUP_TITLES.items():
            if rows := self.group(name):
                lines.append(f"| **{title}** | | | | | | |")
                lines += ["| " + " | ".join(c.replace("|", "\\|") for c in _cells(row)) + " |" for row in rows]
        return "\n".join([*lines, "", self.caption]) + "\n"

    @property
    def caption(self) -> str:
        """How to read the table, in two or three sentences."""
        if not self.rows:
            return "No measure was evaluated."
        pairs = max(r.num_pairs + r.num_dropped for r in self.rows)
        prompts = max(r.num_prompts for r in self.rows)
        text = (
            f"{pairs} pairs of clips from {prompts} {'prompt' if prompts == 1 else 'prompts'}; base and trained clips "
            f"of a pair share prompt and noise. {self.confidence:.0%} intervals by a bootstrap over prompts "
            f"({self.resamples:,} resamples). {VERDICTS_EXPLAINED}"
        )
        if self.group("held_out"):
            text += " Held-out measures were never trained on."
        dropped = [f"{r.measure.name} {r.num_dropped}" for r in self.rows if r.num_dropped]
        return text + (f" Pairs left out because a score was missing: {', '.join(dropped)}." if dropped else "")

    def render(self, console: Console) -> None:
        """Print the table for a reader who has never seen one of these."""
        table = Table(caption=self.caption, caption_justify="left", title="Base against trained", title_justify="left")
        table.add_column("Measure", overflow="fold")
        table.add_column("Judged on")
        for heading in ("Base", "Trained", f"Difference [{self.confidence:.0%} interval]", "Change"):
            table.add_column(heading, justify="right")
        table.add_column("Verdict", no_wrap=True)
        styles: dict[Verdict, str] = {"better": "green", "worse": "red", "no difference": "dim", "unclear": "dim"}
        for name, title in GROUP_TITLES.items():
            if not (rows := self.group(name)):
                continue
            table.add_section()
            table.add_row(f"[bold]{title}[/bold]")
            for row in rows:
                *cells, verdict = (cell.replace("[", "\\[") for cell in _cells(row))
                table.add_row(*cells, f"[{styles[row.verdict]}]{verdict}[/{styles[row.verdict]}]")
        console.print(table)


@dataclass(frozen=True)
class PlaceboRow:
    """Trained against placebo on one measure: what is left of the gain once the placebo's gain is taken off."""

    measure: Measure
    num_pairs: int
    num_dropped: int  # clips for which one of the three scores was missing
    num_prompts: int
    trained_gain: Estimate  # trained minus base
    placebo_gain: Estimate  # placebo minus base
    difference: Estimate  # trained minus placebo
    verdict: Verdict


def compare_paired(
    measures: Sequence[Measure],
    base: np.ndarray,
    trained: np.ndarray,
    prompt_ids: Sequence[str],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> PairedTable:
    """Compare base and trained scores, [n, K] with NaN where missing; row i of both is the pair of `prompt_ids[i]`.

    A pair with a missing member leaves that measure, on both sides, and is counted. With pairs of one prompt only,
    intervals are NaN and the verdict is "unclear": one prompt says nothing about others.

    Raises OmniNFTError when the shapes do not fit one another.
    """
    _require_shapes(measures, prompt_ids, base=base, trained=trained)
    columns = [(base[:, k], trained[:, k], trained[:, k] - base[:, k]) for k in range(len(measures))]
    samples = [_PromptSums.of(np.stack(c), prompt_ids) for c in columns]
    rows = []
    for measure, sample, estimates in zip(
        measures, samples, _estimates(samples, resamples, confidence, seed), strict=True
    ):
        first, second, difference = estimates
        rows.append(
            PairedRow(
                measure=measure,
                num_pairs=sample.num_clips,
                num_dropped=len(prompt_ids) - sample.num_clips,
                num_prompts=len(sample.sizes),
                base=first,
                trained=second,
                difference=difference,
                base_spread=sample.spread,
                relative_change=difference.mean / abs(first.mean) if first.mean else math.nan,
                verdict=verdict(difference, measure.higher_is_better, sample.spread),
            )
        )
    return PairedTable(tuple(rows), resamples, confidence, seed, settings or {})


def difference_of_differences(
    measures: Sequence[Measure],
    trained: np.ndarray,
    placebo: np.ndarray,
    base: np.ndarray,
    prompt_ids: Sequence[str],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[PlaceboRow, ...]:
    """What training did beyond what the same run with meaningless advantages (the placebo) did.

    Arguments as for `compare_paired`; a clip counts where all three have a score. On those clips
    (trained - base) - (placebo - base) is trained - placebo, which is what the interval is of.
    """
    _require_shapes(measures, prompt_ids, trained=trained, placebo=placebo, base=base)
    samples = []
    for k in range(len(measures)):
        a, p, b = trained[:, k], placebo[:, k], base[:, k]
        # The third column does not contain the base, but counts only where the other two do.
        samples.append(_PromptSums.of(np.stack([a - b, p - b, a - p]), prompt_ids, spread_of=b))
    rows = []
    for measure, sample, estimates in zip(
        measures, samples, _estimates(samples, resamples, confidence, seed), strict=True
    ):
        gain, placebo_gain, difference = estimates
        found = verdict(difference, measure.higher_is_better, sample.spread)
        dropped = len(prompt_ids) - sample.num_clips
        rows.append(
            PlaceboRow(measure, sample.num_clips, dropped, len(sample.sizes), gain, placebo_gain, difference, found)
        )
    return tuple(rows)


def mean_estimates(
    values: np.ndarray,
    prompt_ids: Sequence[str],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Estimate]:
    """Mean over clips of each column of `values` [n, K] (NaN where missing), with its bootstrap interval over prompts.

    The mean of no clips is NaN, and so is the interval for clips of fewer than two prompts.

    Raises OmniNFTError when there is not one prompt id per row.
    """
    if values.ndim != 2 or len(values) != len(prompt_ids):
        raise OmniNFTError(
            f"scores have shape {list(values.shape)}, expected one row for each of {len(prompt_ids)} ids"
        )
    samples = [_PromptSums.of(column[None], prompt_ids) for column in values.T]
    return [estimates[0] for estimates in _estimates(samples, resamples, confidence, seed)]


@dataclass(frozen=True)
class _PromptSums:
    """A few columns (C) of one measure, summed over the clips of each prompt that has any."""

    sums: np.ndarray  # [P, C]
    sizes: np.ndarray  # [P] clips
    spread: float  # standard deviation of the base clips' scores; NaN for fewer than two

    @property
    def num_clips(self) -> int:
        return int(self.sizes.sum())

    @staticmethod
    def of(columns: np.ndarray, prompt_ids: Sequence[str], spread_of: np.ndarray | None = None) -> _PromptSums:
        """`columns` is [C, n]; a clip counts where all of them are finite.

        The spread is that of the first column, or of `spread_of` [n].
        """
        valid = np.isfinite(columns).all(axis=0)
        kept = columns[:, valid].astype(np.float64)
        _, prompt = np.unique(np.asarray(prompt_ids, dtype=object)[valid].astype(str), return_inverse=True)
        sizes = np.bincount(prompt).astype(np.float64) if len(prompt) else np.zeros(0)
        sums = np.stack([np.bincount(prompt, c, minlength=len(sizes)) for c in kept], axis=1)
        base = kept[0] if spread_of is None else spread_of[valid].astype(np.float64)
        spread = float(base.std(ddof=1)) if len(base) > 1 else math.nan
        return _PromptSums(sums, sizes, spread)


def _estimates(
    samples: Sequence[_PromptSums], resamples: int, confidence: float, seed: int
) -> list[tuple[Estimate, ...]]:
    """Means and intervals of the columns of every sample, as many in each.

    Samples with the same number of prompts share their draws, so adding a measure does not move another's interval.
    """
    draws: dict[int, np.ndarray] = {}
    width = samples[0].sums.shape[1] if samples else 0
    for count in {len(s.sizes) for s in samples if len(s.sizes) > 1}:
        alike = [s for s in samples if len(s.sizes) == count]
        sums = np.concatenate([s.sums for s in alike], axis=1)
        sizes = np.repeat(np.stack([s.sizes for s in alike], axis=1), width, axis=1)
        draws[count] = _resampled_means(sums, sizes, resamples, seed)
    taken = dict.fromkeys(draws, 0)
    estimates = []
    for sample in samples:
        count = len(sample.sizes)
        # fsum rounds once: equal columns have equal means, alone or beside others.
        means = [math.fsum(c) / sample.num_clips if count else math.nan for c in sample.sums.T]
        low, high = np.full(width, math.nan), np.full(width, math.nan)
        if count > 1:
            drawn = draws[count][:, taken[count] : taken[count] + width]
            taken[count] += width
            tail = _tail_share(confidence, count)
            low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
        estimates.append(
            tuple(Estimate(float(m), float(a), float(b)) for m, a, b in zip(means, low, high, strict=True))
        )
    return estimates


def _resampled_means(sums: np.ndarray, sizes: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means over clips when P prompts are drawn with replacement; sums and sizes [P, M], the result [R, M].

    The bits of a column are the same whatever the other columns and however many resamples are taken at once. A matrix
    product does not promise that: libraries choose the order of summation by shape and processor.
    """
    rng = np.random.default_rng(seed)
    count = len(sums)
    means = []
    rows_at_once = max(_WEIGHTS_AT_ONCE // count, 1)
    for start in range(0, resamples, rows_at_once):
        rows = min(rows_at_once, resamples - start)
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        drawn_times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        weights = np.ascontiguousarray(drawn_times.T, dtype=np.float64)  # [P, rows]
        totals = np.zeros((sums.shape[1], rows))
        for weight, of_prompt in zip(weights, sums, strict=True):
            totals += of_prompt[:, None] * weight
        # Whole numbers: exact in any order.
        means.append((totals / (sizes.T @ weights)).T)
    return np.concatenate(means)


def _tail_share(confidence: float, count: int) -> float:
    """Share of resampled means beyond each end of the interval, for `count` independent units.

    A bootstrap mean varies by (P - 1) / P of what it should and has normal, not Student, tails; expanding the
    percentiles undoes both (Hesterberg 2015).
    """
    wide = student_quantile(0.5 + confidence / 2, count - 1) * math.sqrt(count / (count - 1))
    return NormalDist().cdf(-wide)


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t for 0 < probability < 1.

    With t = sqrt(degrees) * tan(angle) the density becomes cos(angle) ** (degrees - 1) on a bounded interval.
    """
    if degrees > 1000:
        return NormalDist().inv_cdf(probability)
    angle = np.linspace(-math.pi / 2, math.pi / 2, 100_001)
    density = np.cos(angle) ** (degrees - 1)
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(float(np.interp(probability, cumulative / cumulative[-1], angle)))


def verdict(difference: Estimate, higher_is_better: bool, base_spread: float) -> Verdict:
    """What an interval of a difference says: the one place where a verdict comes from.

    "better" or "worse" where it excludes 0, "no difference" where it lies within EQUIVALENCE * `base_spread` (the
    standard deviation of the base clips' scores) around 0, else "unclear", as without an interval.
    """
    if difference.low > 0:
        return "better" if higher_is_better else "worse"
    if difference.high < 0:
        return "worse" if higher_is_better else "better"
    if max(-difference.low, difference.high) <= EQUIVALENCE * base_spread:
        return "no difference"
    return "unclear"


def _cells(row: PairedRow) -> tuple[str, ...]:
    """The row as text: measure, judged on, base, trained, difference with interval, change, verdict with arrow."""
    digits = row.decimals
    difference = (
        f"{row.difference.mean:+.{digits}f} [{row.difference.low:+.{digits}f}, {row.difference.high:+.{digits}f}]"
    )
    arrow = "-" if row.verdict not in ("better", "worse") else "↑" if row.difference.mean > 0 else "↓"
    return (
        f"{row.measure.name} ({row.measure.hint})",
        JUDGED_ON[row.measure.route],
        f"{row.base.mean:.{digits}f}",
        f"{row.trained.mean:.{digits}f}",
        difference,
        f"{row.relative_change:+.1%}" if math.isfinite(row.relative_change) else "-",
        f"{arrow} {row.verdict}",
    )


def _require_shapes(measures: Sequence[Measure], prompt_ids: Sequence[str], **tables: np.ndarray) -> None:
    expected = (len(prompt_ids), len(measures))
    for name, values in tables.items():
        if values.shape != expected:
            raise OmniNFTError(
                f"{name} scores have shape {list(values.shape)}, expected [{expected[0]}, {expected[1]}]: "
                "one row per prompt id, one column per measure"
            )


def _without_nan(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
