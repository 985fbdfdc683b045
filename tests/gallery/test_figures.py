from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from omninft.gallery import figures
from omninft.gallery.figures import Series

NAN = math.nan


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def of_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [e for e in root.iter() if name in e.get("class", "").split()]


@pytest.mark.parametrize(
    ("value", "digits", "signed", "text"),
    [
        (0.8123, None, False, "0.812"),
        (12.34, None, False, "12.3"),
        (141.0, None, False, "141"),
        (0.000213, None, False, "2.13e\u22124"),
        (250000.0, None, False, "2.50e5"),
        (0.0, None, False, "0"),
        (-0.5, 2, False, "\u22120.50"),
        (0.5, 2, True, "+0.50"),
        (-0.001, 2, True, "0.00"),
        (None, 2, False, "\u2013"),
        (NAN, None, True, "\u2013"),
    ],
)
def test_numbers_as_text(value: float | None, digits: int | None, signed: bool, text: str) -> None:
    assert figures.format_number(value, digits, signed) == text


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.41, 0.69, [0.4, 0.5, 0.6, 0.7]),
        (-3.0, 12.0, [-5.0, 0.0, 5.0, 10.0, 15.0]),
        (7.0, 7.0, [6.0, 6.5, 7.0, 7.5, 8.0]),
        (2e-5, 8e-5, [2e-5, 4e-5, 6e-5, 8e-5]),
    ],
)
def test_ticks_are_round_and_cover_the_data(low: float, high: float, ticks: list[float]) -> None:
    found = figures.nice_ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert found == pytest.approx(ticks)


def test_tick_labels_have_equal_digits() -> None:
    assert figures.tick_labels([0.0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert figures.tick_labels([-10.0, 0.0, 10.0]) == ["\u221210", "0", "10"]
    assert figures.tick_labels([0.0, 2e-4, 4e-4]) == ["0", "2e\u22124", "4e\u22124"]


def test_line_chart_puts_points_where_they_belong() -> None:
    root = parsed(figures.line_chart([Series("a", [0, 5, 10], [0.0, 0.5, 1.0])], label="a"))
    (line,) = of_class(root, "line")
    # x: 0..10 over 46..350; y: ticks 0..1 over 152..8, downwards.
    assert line.get("points") == "46.0,152.0 198.0,80.0 350.0,8.0"
    assert root.get("aria-label") == "a"
    assert [e.get("y1") for e in of_class(root, "grid")] == ["152.0", "80.0", "8.0"]


def test_missing_values_break_the_line_and_leave_no_gap_filled() -> None:
    root = parsed(figures.line_chart([Series("a", [0, 1, 2, 3, 4, 5], [0.0, 1.0, NAN, 1.0, NAN, 0.0])], label="a"))
    assert [e.get("points") for e in of_class(root, "line")] == ["46.0,152.0 106.8,8.0"]
    assert [(e.get("cx"), e.get("cy")) for e in of_class(root, "dot")] == [("228.4", "8.0"), ("350.0", "152.0")]


def test_band_goes_along_the_top_and_back_along_the_bottom() -> None:
    series = Series("a", [0, 10], [0.5, 0.5], low=[0.0, 0.25], high=[1.0, 0.75])
    (band,) = of_class(parsed(figures.line_chart([series], label="a")), "band")
    assert band.get("points") == "46.0,8.0 350.0,44.0 350.0,116.0 46.0,152.0"


def test_points_carry_interval_bars_inside_the_axis() -> None:
    series = Series("dev", [0, 10], [0.4, 0.6], low=[0.0, NAN], high=[1.0, NAN], kind="points")
    root = parsed(figures.line_chart([series], label="dev"))
    (bar,) = of_class(root, "bar")
    assert (bar.get("x1"), bar.get("y1"), bar.get("y2")) == ("46.0", "152.0", "8.0")
    assert [(e.get("cx"), e.get("cy")) for e in of_class(root, "dot")] == [("46.0", "94.4"), ("350.0", "65.6")]


def test_hover_data_joins_series_by_x() -> None:
    training = Series("training", [0, 1], [0.5, NAN], tone="faint")
    dev = Series("dev", [0], [0.6], low=[0.55], high=[0.65], kind="points")
    root = parsed(figures.line_chart([training, dev], label="both", unit="ms"))
    hover = json.loads(root.get("data-hover", ""))
    assert hover == [[198.0, "after 0 iterations", [["training", "0.500 ms"], ["dev", "0.600 [0.550, 0.650] ms"]]]]


def test_a_single_point_is_in_the_middle_and_a_chart_of_nothing_is_refused() -> None:
    root = parsed(figures.line_chart([Series("a", [3], [2.0])], label="a"))
    assert [(e.get("cx"), e.get("cy")) for e in of_class(root, "dot")] == [("198.0", "80.0")]
    with pytest.raises(ValueError, match="at least one finite point"):
        figures.line_chart([Series("a", [0], [NAN])], label="a")


def test_text_from_outside_is_escaped() -> None:
    root = parsed(figures.line_chart([Series('<b>"&', [0, 1], [0, 1]), Series("b", [0], [1])], label='<i>"'))
    assert root.get("aria-label") == '<i>"'
    assert json.loads(root.get("data-hover", ""))[0][2][0][0] == '<b>"&'


def test_dot_plot_lines_up_with_its_axis() -> None:
    root = parsed(figures.dot_plot(0.5, 0.25, 0.75, domain=(-1, 1), tone="is-better", label="d"))
    (interval,) = of_class(root, "interval")
    (dot,) = of_class(root, "dot")
    (zero,) = of_class(root, "zero")
    assert (interval.get("x1"), interval.get("x2")) == ("147.5", "202.5")
    assert (dot.get("cx"), dot.get("cy")) == ("175.0", "29")
    assert zero.get("x1") == "120.0"
    assert "is-better" in dot.get("class", "")
    axis = parsed(figures.dot_axis((-1, 1)))
    labels = {t.text: t.get("x") for t in axis.iter("text")}
    assert labels["0.0"] == "120.0"
    assert labels["1.0"] == "230.0"
    heading = [(t.text, t.get("x"), t.get("text-anchor")) for t in parsed(figures.dot_heading((-1, 1))).iter("text")]
    assert heading == [("\u2190 worse", "112.0", "end"), ("better \u2192", "128.0", None)]


def test_dot_plot_without_an_estimate_shows_zero_only() -> None:
    root = parsed(figures.dot_plot(NAN, NAN, NAN, domain=(-1, 1), tone="is-same", label="d"))
    assert not of_class(root, "dot")
    assert not of_class(root, "interval")
    assert len(of_class(root, "zero")) == 1


def test_stacked_bar_shares() -> None:
    root = parsed(figures.stacked_bar({"sampling": 3.0, "update": 9.0}, label="time"))
    assert [(r.get("x"), r.get("width")) for r in root.iter("rect")] == [("0.00", "250.00"), ("250.00", "750.00")]
    assert [t.text for t in root.iter("title")] == ["sampling: 25%", "update: 75%"]
    for parts in ({}, {"a": 0.0}, {"a": 2.0, "b": -1.0}):
        with pytest.raises(ValueError, match="stacked bar"):
            figures.stacked_bar(parts, label="time")


def test_peaks_are_extremes_over_channels_and_time() -> None:
    sound = np.array([[0.0, 0.5, -0.25, 0.1], [0.2, 0.0, 0.0, -0.75]], dtype=np.float32)
    assert figures.peaks(sound, 2).tolist() == [[0.0, 0.5], [-0.75, pytest.approx(0.1)]]
    assert figures.peaks(sound, 100).shape == (4, 2)


def test_waveform_marks_meet_in_the_middle() -> None:
    svg = figures.waveform(np.array([[-1.0, 1.0], [0.0, 0.0]]), 2.0, seen=[0.5], heard=[0.51], label="w")
    root = parsed(svg)
    (seen,) = of_class(root, "seen")
    (heard,) = of_class(root, "heard")
    assert (seen.get("x1"), seen.get("y1"), seen.get("y2")) == ("250.0", "0", "50")
    assert (heard.get("x1"), heard.get("y1"), heard.get("y2")) == ("255.0", "50", "100")
    (sound,) = of_class(root, "sound")
    # Buckets' centres at 1/4 and 3/4; full scale takes 92 % of the half height, silence a hair.
    assert sound.get("d") == "M250,4.0L750,49.5L750,50.5L250,96.0Z"
    assert len(of_class(root, "playhead")) == 1
    assert [t.text for t in root.iter("title")] == ["seen at 0.50 s", "heard at 0.51 s"]


def test_sound_shorter_than_the_clip_ends_early() -> None:
    root = parsed(figures.waveform(np.array([[-1.0, 1.0], [-1.0, 1.0]]), 2.0, sound_seconds=1.0, label="w"))
    (sound,) = of_class(root, "sound")
    assert sound.get("d", "").startswith("M125,4.0L375,4.0")


def test_silence_without_a_stream_draws_no_sound() -> None:
    root = parsed(figures.waveform(np.zeros((0, 2)), 2.0, label="No sound"))
    assert not of_class(root, "sound")
