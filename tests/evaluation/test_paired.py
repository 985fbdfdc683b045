from __future__ import annotations

import io
import json
import math
import statistics

import numpy as np
import pytest
from rich.console import Console

from omninft.evaluation import paired
from omninft.evaluation.paired import (
    Estimate,
    Measure,
    PairedRow,
    PairedTable,
    compare_paired,
    difference_of_differences,
    mean_estimates,
    student_quantile,
    verdict,
)
from omninft.types import OmniNFTError

SYNC = Measure("sync", "trained", "joint")
ERROR = Measure("onset_error", "held_out", "joint", higher_is_better=False, unit="ms")


def only_row(base: list[float], trained: list[float], ids: list[str], measure: Measure = SYNC) -> PairedRow:
    table = compare_paired([measure], np.array(base)[:, None], np.array(trained)[:, None], ids)
    return table.rows[0]


def test_means_difference_and_relative_change_by_hand() -> None:
    row = only_row([0.2, 0.4, 0.6, 0.4], [0.5, 0.5, 0.5, 0.9], ["a", "a", "b", "c"])
    assert row.num_pairs == 4
    assert row.num_prompts == 3
    assert row.num_dropped == 0
    assert row.base.mean == pytest.approx(0.4)
    assert row.trained.mean == pytest.approx(0.6)
    assert row.difference.mean == pytest.approx(0.2)
    assert row.relative_change == pytest.approx(0.5)
    assert row.base_spread == pytest.approx(statistics.stdev([0.2, 0.4, 0.6, 0.4]))


def test_interval_agrees_with_students_for_one_clip_per_prompt() -> None:
    rng = np.random.default_rng(5)
    base = rng.normal(0.5, 0.1, 40)
    gains = rng.normal(0.05, 0.1, 40)
    row = only_row(list(base), list(base + gains), [f"p{i}" for i in range(40)])
    half = 2.0227 * gains.std(ddof=1) / math.sqrt(40)  # t(0.975, 39) from a printed table
    assert row.difference.low == pytest.approx(gains.mean() - half, abs=0.06 * half)
    assert row.difference.high == pytest.approx(gains.mean() + half, abs=0.06 * half)


def test_interval_agrees_with_a_plain_loop_over_resampled_prompts() -> None:
    rng = np.random.default_rng(8)
    prompts = [rng.normal(rng.normal(0.1, 0.2), 0.1, size) for size in (1, 5, 2, 3, 4, 2, 6, 1)]
    ids = [f"p{i}" for i, gains in enumerate(prompts) for _ in gains]
    gains = np.concatenate(prompts)
    row = only_row([0.0] * len(gains), list(gains), ids)
    means = []
    for _ in range(4000):
        drawn = [prompts[i] for i in rng.integers(len(prompts), size=len(prompts))]
        means.append(np.concatenate(drawn).mean())
    # Percentiles for 8 prompts, widened as Hesterberg says: Phi(-t(0.975, 7) * sqrt(8 / 7)).
    tail = statistics.NormalDist().cdf(-2.3646 * math.sqrt(8 / 7))
    low, high = np.quantile(means, [tail, 1 - tail])
    assert row.difference.low == pytest.approx(low, abs=0.05 * (high - low))
    assert row.difference.high == pytest.approx(high, abs=0.05 * (high - low))


def test_clips_of_one_prompt_do_not_count_as_independent() -> None:
    rng = np.random.default_rng(0)
    base, trained = rng.normal(0, 1, 12), rng.normal(0.3, 1, 12)
    once = only_row(list(base), list(trained), [f"p{i}" for i in range(12)])
    copies = only_row(list(base.repeat(8)), list(trained.repeat(8)), [f"p{i // 8}" for i in range(96)])
    assert copies.num_pairs == 96
    assert copies.difference.low == pytest.approx(once.difference.low)
    assert copies.difference.high == pytest.approx(once.difference.high)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(11)
    num_prompts, clips, trials = 10, 4, 400
    truth = 0.2
    prompt_effects = rng.normal(truth, 0.5, (num_prompts, 1, trials))
    gains = (prompt_effects + rng.normal(0, 0.2, (num_prompts, clips, trials))).reshape(-1, trials)
    measures = [Measure(f"m{i}", "trained") for i in range(trials)]

    def coverage(ids: list[str]) -> float:
        table = compare_paired(measures, np.zeros_like(gains), gains, ids, resamples=1000)
        return float(np.mean([r.difference.low <= truth <= r.difference.high for r in table.rows]))

    by_prompt = coverage([f"p{i // clips}" for i in range(num_prompts * clips)])
    assert 0.92 <= by_prompt <= 0.98
    # The mistake this module is there to avoid: taking clips for independent.
    assert coverage([f"c{i}" for i in range(num_prompts * clips)]) < 0.8


@pytest.mark.parametrize(
    ("gain", "higher_is_better", "verdict"),
    [(0.3, True, "better"), (-0.3, True, "worse"), (0.3, False, "worse"), (-0.3, False, "better"), (0.0, True, None)],
)
def test_verdict_takes_the_direction_into_account(gain: float, higher_is_better: bool, verdict: str | None) -> None:
    noise = np.random.default_rng(3).normal(0, 0.1, 30)
    measure = Measure("m", "trained", None, higher_is_better)
    row = only_row([0.0] * 30, list(noise - noise.mean() + gain), [f"p{i}" for i in range(30)], measure)
    assert row.verdict == (verdict or "unclear")
    assert row.difference.mean == pytest.approx(gain, abs=1e-9)


@pytest.mark.parametrize(
    ("low", "high", "spread", "expected"),
    [
        (0.001, 0.2, 1.0, "better"),
        (-0.2, -0.001, 1.0, "worse"),
        (0.0, 0.2, 1.0, "unclear"),  # touches 0: neither shown nor excluded
        (-0.25, 0.0, 1.0, "unclear"),
        (-0.1, 0.1, 1.0, "no difference"),
        (-0.1, 0.11, 1.0, "unclear"),
        (-0.02, 0.02, 0.1, "unclear"),  # the margin is a share of the spread
        (0.0, 0.0, 0.0, "no difference"),  # the same clips
        (math.nan, math.nan, 1.0, "unclear"),
        (-0.01, 0.01, math.nan, "unclear"),
    ],
)
def test_verdict_of_an_interval(low: float, high: float, spread: float, expected: str) -> None:
    assert verdict(Estimate((low + high) / 2, low, high), True, spread) == expected
    swapped = {"better": "worse", "worse": "better"}.get(expected, expected)
    assert verdict(Estimate((low + high) / 2, low, high), False, spread) == swapped


def test_a_table_of_an_older_version_gets_the_verdicts_of_now() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(0, 1, (20, 1))
    table = compare_paired([SYNC], base, base + rng.normal(0, 1, (20, 1)), [f"p{i}" for i in range(20)])
    assert table.rows[0].verdict == "unclear"
    assert "unclear" in table.to_markdown()
    old = table.to_json().replace('"unclear"', '"no difference"')
    assert PairedTable.from_json(old) == table


def test_standardised_difference_is_positive_when_better() -> None:
    row = only_row([100, 140, 120, 160], [90, 120, 115, 150], ["a", "b", "c", "d"], ERROR)
    spread = statistics.stdev([100, 140, 120, 160])
    assert row.standardised.mean == pytest.approx(11.25 / spread)
    assert row.standardised.low == pytest.approx(-row.difference.high / spread)
    assert row.standardised.low < row.standardised.mean < row.standardised.high


def test_a_missing_member_drops_the_pair_on_both_sides_and_is_counted() -> None:
    nan = math.nan
    ids = ["a", "a", "b", "b", "c"]
    with_gaps = only_row([0.1, nan, 0.3, 0.5, 0.2], [0.2, 0.9, nan, 0.7, 0.4], ids)
    without = only_row([0.1, 0.5, 0.2], [0.2, 0.7, 0.4], ["a", "b", "c"])
    assert with_gaps.num_dropped == 2
    assert with_gaps.num_pairs == 3
    assert with_gaps.base == without.base
    assert with_gaps.trained == without.trained
    assert with_gaps.difference == without.difference


def test_a_prompt_that_lost_all_its_pairs_is_not_resampled() -> None:
    row = only_row([0.1, 0.2, math.nan], [0.2, 0.4, 0.5], ["a", "b", "lost"])
    assert row.num_prompts == 2


@pytest.mark.parametrize("size", [1, 5])
def test_one_prompt_says_nothing_about_others(size: int) -> None:
    row = only_row([0.1] * size, [0.9] * size, ["only"] * size)
    assert row.difference.mean == pytest.approx(0.8)
    assert math.isnan(row.difference.low)
    assert math.isnan(row.difference.high)
    assert row.verdict == "unclear"


def test_a_measure_without_any_pair_stays_in_the_table() -> None:
    row = only_row([math.nan, math.nan], [0.1, 0.2], ["a", "b"])
    assert (row.num_pairs, row.num_dropped, row.num_prompts) == (0, 2, 0)
    assert math.isnan(row.base.mean)
    assert row.verdict == "unclear"


def test_equal_clips_give_exactly_no_difference() -> None:
    row = only_row([0.1, 0.7, 0.3], [0.1, 0.7, 0.3], ["a", "b", "c"])
    assert (row.difference.low, row.difference.mean, row.difference.high) == (0.0, 0.0, 0.0)
    assert row.verdict == "no difference"


def test_seed_fixes_the_interval_and_other_measures_do_not_move_it() -> None:
    rng = np.random.default_rng(1)
    base, trained = rng.normal(size=(20, 2)), rng.normal(size=(20, 2))
    ids = [f"p{i // 2}" for i in range(20)]
    both = compare_paired([SYNC, ERROR], base, trained, ids)
    alone = compare_paired([ERROR], base[:, 1:], trained[:, 1:], ids)
    assert both.rows[1] == alone.rows[0]
    reseeded = compare_paired([ERROR], base[:, 1:], trained[:, 1:], ids, seed=1)
    assert reseeded.rows[0].difference.low != alone.rows[0].difference.low


@pytest.mark.parametrize("weights_at_once", [700, 60])
def test_resampling_in_pieces_changes_nothing(weights_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    base, trained = rng.normal(size=(20, 1)), rng.normal(size=(20, 1))
    ids = [f"p{i}" for i in range(20)]
    whole = compare_paired([SYNC], base, trained, ids)
    monkeypatch.setattr(paired, "_WEIGHTS_AT_ONCE", weights_at_once)
    assert compare_paired([SYNC], base, trained, ids) == whole


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(OmniNFTError, match=r"trained scores have shape \[2, 1\], expected \[3, 1\]"):
        compare_paired([SYNC], np.zeros((3, 1)), np.zeros((2, 1)), ["a", "b", "c"])


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [(0.975, 1, 12.7062), (0.975, 4, 2.7764), (0.95, 9, 1.8331), (0.995, 30, 2.7500), (0.025, 9, -2.2622)],
)
def test_student_quantiles_are_those_of_the_tables(probability: float, degrees: int, expected: float) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(expected, abs=1e-3)


def sample_table() -> PairedTable:
    rng = np.random.default_rng(2)
    base = rng.normal([0.5, 120], [0.1, 40], (64, 2))
    trained = base + rng.normal([0.1, -60], [0.1, 30], (64, 2))
    base[0, 0] = math.nan
    ids = [f"p{i // 4}" for i in range(64)]
    return compare_paired([SYNC, ERROR], base, trained, ids, settings={"steps": 16, "commit": "abc"})


def test_json_round_trip_keeps_every_number_and_nan() -> None:
    lone = compare_paired([SYNC], np.zeros((1, 1)), np.ones((1, 1)), ["a"])
    for table in (sample_table(), lone):
        text = table.to_json()
        assert "NaN" not in text
        assert PairedTable.from_json(text).to_json() == text
    table = sample_table()
    assert PairedTable.from_json(table.to_json()) == table
    assert json.loads(table.to_json())["settings"] == {"steps": 16, "commit": "abc"}
    assert math.isnan(PairedTable.from_json(lone.to_json()).rows[0].difference.low)


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"measure": {}}]}', '{"seed": 1}'])
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(OmniNFTError, match="not a paired evaluation table"):
        PairedTable.from_json(text)


def test_markdown_names_groups_numbers_and_what_was_left_out() -> None:
    table = sample_table()
    text = table.to_markdown()
    row = table.rows[1]
    assert text.index("**Trained rewards**") < text.index("sync (higher is better)")
    assert text.index("sync (") < text.index("**Held-out measures**") < text.index("onset_error (ms, lower is better)")
    assert f"| {row.base.mean:.1f} | {row.trained.mean:.1f} |" in text
    assert "↓ better" in text
    assert "64 pairs of clips from 16 prompts" in text
    assert "score was missing: sync 1." in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {8}


def test_console_table_shows_arrow_and_interval() -> None:
    out = io.StringIO()
    table = sample_table()
    table.render(Console(file=out, width=150))
    text = out.getvalue()
    difference = table.rows[0].difference
    assert f"+{difference.mean:.3f} [+{difference.low:.3f}, +{difference.high:.3f}]" in text
    assert "picture with sound" in text
    assert "↑ better" in text
    assert "↓ better" in text


@pytest.mark.parametrize(("scale", "digits"), [(0.1, 3), (1.0, 2), (100.0, 0)])
def test_digits_follow_the_interval(scale: float, digits: int) -> None:
    gains = np.random.default_rng(0).normal(0, scale, 60)
    row = only_row([0.0] * 60, list(gains), [f"p{i}" for i in range(60)])
    half = (row.difference.high - row.difference.low) / 2
    assert row.decimals == digits
    assert 10 <= half * 10**digits < 100 or digits == 0


def test_placebo_gain_is_taken_off() -> None:
    rng = np.random.default_rng(4)
    base = rng.normal(0, 1, (40, 1))
    placebo = base + rng.normal(0.3, 0.1, (40, 1))
    trained = base + rng.normal(0.5, 0.1, (40, 1))
    base[0, 0] = math.nan
    ids = [f"p{i // 2}" for i in range(40)]
    (row,) = difference_of_differences([SYNC], trained, placebo, base, ids)
    kept = slice(1, None)
    direct = compare_paired([SYNC], placebo[kept], trained[kept], ids[1:]).rows[0]
    assert row.num_dropped == 1
    assert row.trained_gain.mean == pytest.approx(float((trained - base)[kept].mean()))
    assert row.placebo_gain.mean == pytest.approx(float((placebo - base)[kept].mean()))
    assert row.difference.mean == pytest.approx(row.trained_gain.mean - row.placebo_gain.mean)
    assert row.difference.low == pytest.approx(direct.difference.low)
    assert row.difference.high == pytest.approx(direct.difference.high)
    assert row.verdict == "better"


def test_a_gain_that_the_placebo_has_too_is_no_gain() -> None:
    rng = np.random.default_rng(6)
    base = rng.normal(0, 1, (40, 1))
    gains = rng.normal(0, 0.2, (40, 2))
    gains += 0.5 - gains.mean(axis=0)
    ids = [f"p{i}" for i in range(40)]
    (row,) = difference_of_differences([SYNC], base + gains[:, :1], base + gains[:, 1:], base, ids)
    assert row.trained_gain.low > 0.3
    assert row.difference.low < 0 < row.difference.high
    assert row.verdict == "no difference"


def test_means_of_single_samples_have_the_intervals_of_paired_ones() -> None:
    rng = np.random.default_rng(0)
    ids = [f"p{i // 2}" for i in range(24)]
    values = rng.normal(size=(24, 2))
    values[3, 1] = np.nan
    first, second = mean_estimates(values, ids, resamples=500)
    row = compare_paired([Measure("m", "trained")], values[:, :1], values[:, :1] + 1, ids, resamples=500).rows[0]
    assert (first.mean, first.low, first.high) == (row.base.mean, row.base.low, row.base.high)
    assert second.mean == pytest.approx(np.nanmean(values[:, 1]))
    assert second.low < second.mean < second.high
    assert math.isnan(mean_estimates(np.full((2, 1), np.nan), ["a", "b"])[0].mean)
    (one,) = mean_estimates(np.array([[1.0], [2.0]]), ["a", "a"])
    assert one.mean == 1.5
    assert math.isnan(one.low)
    with pytest.raises(OmniNFTError, match="one row for each of 3 ids"):
        mean_estimates(values, ["a", "b", "c"])
