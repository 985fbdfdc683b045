from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omninft.evaluation.vbench import (
    BY_NAME,
    DIMENSIONS,
    chosen_dimensions,
    consistency,
    is_dynamic,
    is_static,
    likeness,
    sampled_frames,
    top_speed,
    totals,
)
from omninft.types import OmniNFTError

# The leaderboard's table, written down a second time: (low, high, weight).
QUALITY = {
    "subject_consistency": (0.1462, 1, 1),
    "background_consistency": (0.2615, 1, 1),
    "temporal_flickering": (0.6293, 1, 1),
    "motion_smoothness": (0.706, 0.9975, 1),
    "dynamic_degree": (0, 1, 0.5),
    "aesthetic_quality": (0, 1, 1),
    "imaging_quality": (0, 1, 1),
}
SEMANTIC = {
    "object_class": (0, 1, 1),
    "multiple_objects": (0, 1, 1),
    "human_action": (0, 1, 1),
    "color": (0, 1, 1),
    "spatial_relationship": (0, 1, 1),
    "scene": (0, 0.8222, 1),
    "appearance_style": (0.0009, 0.2855, 1),
    "temporal_style": (0, 0.364, 1),
    "overall_consistency": (0, 0.364, 1),
}


def at_angle(degrees: float) -> np.ndarray:
    return np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])


def test_the_sixteen_dimensions():
    assert list(BY_NAME) == [*QUALITY, *SEMANTIC]
    assert [d.name for d in DIMENSIONS if d.part == "quality"] == list(QUALITY)
    # What the package's code refuses for custom clips, and what GRiT needs.
    refused = {"object_class", "multiple_objects", "scene", "appearance_style", "color", "spatial_relationship"}
    assert {d.name for d in DIMENSIONS if not d.custom} == refused
    assert {d.name for d in DIMENSIONS if d.detectron2} == refused - {"scene", "appearance_style"}
    assert [d.name for d in chosen_dimensions(["scene", "subject_consistency"])] == ["subject_consistency", "scene"]
    with pytest.raises(OmniNFTError, match="not a dimension of VBench: smoothness"):
        chosen_dimensions(["smoothness"])


def test_consistency_of_known_angles():
    # Frames at 0, 60, 90, 180 degrees: neighbours are 60, 30, 90 apart, the first is 60, 90, 180 away (counts as 0).
    features = np.stack([at_angle(a) * length for a, length in ((0, 3), (60, 0.1), (90, 1), (180, 7))])
    expected = ((0.5 + 0.5) / 2 + (math.sqrt(3) / 2 + 0) / 2 + (0 + 0) / 2) / 3
    assert consistency(features) == pytest.approx(expected, abs=1e-12)
    assert consistency(np.ones((5, 8))) == pytest.approx(1, abs=1e-12)
    assert consistency(np.stack([at_angle(0), at_angle(180)])) == 0
    with pytest.raises(OmniNFTError, match="needs 2 frames, found 1"):
        consistency(np.ones((1, 4)))


def test_consistency_counts_the_frame_before_and_the_first():
    # A turn of 60 degrees and back: the way there counts twice (before and first), the way back once.
    there, back = (consistency(np.stack([at_angle(a) for a in way])) for way in ((0, 60, 60), (0, 60, 0)))
    assert there == pytest.approx(((0.5 + 0.5) / 2 + (1 + 0.5) / 2) / 2)
    assert back == pytest.approx(((0.5 + 0.5) / 2 + (0.5 + 1) / 2) / 2)


def test_likeness_is_255_less_the_mean_error():
    assert likeness(np.array([0.0, 25.5, 51.0])) == pytest.approx(0.9)
    assert likeness(np.zeros(4)) == 1
    assert likeness(np.full(3, 255.0)) == 0


def test_frames_at_about_8_hz():
    assert sampled_frames(25, 24.0).tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert sampled_frames(10, 8.0).tolist() == list(range(10))
    assert sampled_frames(5, 4.0).tolist() == list(range(5))
    # 20 / 8 = 2.5 is rounded half to even, 28 / 8 = 3.5 too.
    assert sampled_frames(9, 20.0).tolist() == [0, 2, 4, 6, 8]
    assert sampled_frames(9, 28.0).tolist() == [0, 4, 8]


def test_top_speed_is_the_mean_of_the_largest_share():
    lengths = np.arange(1, 201, dtype=np.float64)
    flow = np.stack([0.6 * lengths, -0.8 * lengths], axis=-1).reshape(10, 20, 2)
    flow = flow[np.random.default_rng(0).permutation(10)]
    assert top_speed(flow) == pytest.approx(np.mean(range(191, 201)))
    assert top_speed(flow, 0.02) == pytest.approx(np.mean(range(197, 201)))
    with pytest.raises(OmniNFTError, match=r"4 x 4 has no 5% of its pixels"):
        top_speed(np.zeros((4, 4, 2)))


def test_moving_where_enough_pairs_pass_the_threshold():
    # 16 sampled frames: 4 of 15 pairs must be faster than 6 pixels of a short side of 256.
    slow, fast = 6.0, 6.01
    assert not is_dynamic([fast] * 3 + [slow] * 12, 256, 448)
    assert is_dynamic([slow] * 11 + [fast] * 4, 256, 448)
    # Twice the size, twice the threshold.
    assert not is_dynamic([fast] * 15, 512, 512)
    assert is_dynamic([12.01] * 4 + [0.0] * 11, 896, 512)


def test_moving_clips_of_few_frames_follow_the_released_code():
    # 4 * n / 16 is rounded half to even: n = 2 needs no pair, n = 3 to 5 one, n = 6 (1.5) two, n = 10 (2.5) two.
    assert is_dynamic([0.0], 256, 256)
    assert not is_dynamic([], 256, 256)
    for frames, needed in ((3, 1), (5, 1), (6, 2), (10, 2), (14, 4), (18, 4)):
        speeds = [7.0] * needed + [0.0] * (frames - 1 - needed)
        assert is_dynamic(speeds, 256, 256), frames
        assert not is_dynamic([0.0, *speeds[1:]], 256, 256), frames


def test_the_static_filter():
    # 16 frames: 2 fast pairs are allowed, and first to last may be as fast as 4 thresholds of 3 pixels.
    assert is_static([3.01] * 2 + [3.0] * 13, (12.0, 12.0), 256, 256)
    assert not is_static([3.01] * 3 + [0.0] * 12, (0.0, 0.0), 256, 256)
    assert not is_static([0.0] * 15, (12.01, 0.0), 256, 256)
    assert not is_static([0.0] * 15, (0.0, 12.01), 256, 256)
    assert is_static([6.0] * 15, (24.0, 24.0), 512, 600)


def by_hand(scores: dict[str, float]) -> tuple[float, float, float]:
    parts = []
    for table in (QUALITY, SEMANTIC):
        weighted = [weight * (scores[n] - low) / (high - low) for n, (low, high, weight) in table.items()]
        parts.append(sum(weighted) / sum(weight for _, _, weight in table.values()))
    return parts[0], parts[1], (4 * parts[0] + parts[1]) / 5


def test_totals_against_the_table():
    rng = np.random.default_rng(3)
    scores = {name: float(rng.uniform(0.2, 0.9)) for name in (*QUALITY, *SEMANTIC)}
    found = totals(scores)
    assert (found.quality, found.semantic, found.total) == pytest.approx(by_hand(scores), abs=1e-12)
    assert found.missing == ()
    assert (found.quality_of_measured, found.semantic_of_measured) == (found.quality, found.semantic)


def test_totals_at_their_limits():
    limits = QUALITY | SEMANTIC
    for side, expected in ((0, 0.0), (1, 1.0)):
        found = totals({name: row[side] for name, row in limits.items()})
        assert found.total == pytest.approx(expected, abs=1e-12)
        assert found.quality == pytest.approx(expected, abs=1e-12)
        assert found.semantic == pytest.approx(expected, abs=1e-12)
        np.testing.assert_allclose(list(found.normalised.values()), expected, atol=1e-12)
    # Dynamic degree counts half: 0.5 of 6.5.
    top = {name: limits[name][1] for name in limits}
    assert totals(top | {"dynamic_degree": 0}).quality == pytest.approx(6 / 6.5)
    assert totals(top | {"imaging_quality": 0}).quality == pytest.approx(5.5 / 6.5)


@given(st.sampled_from([*QUALITY, *SEMANTIC]), st.sampled_from([None, float("nan")]))
def test_a_missing_dimension_takes_its_totals_along(name, value):
    scores: dict[str, float | None] = dict.fromkeys((*QUALITY, *SEMANTIC), 0.3)
    whole = totals(scores)
    found = totals(scores | {name: value})
    assert found.total is None
    assert found.missing == (name,)
    lacking, kept = ("quality", "semantic") if name in QUALITY else ("semantic", "quality")
    assert getattr(found, lacking) is None
    assert getattr(found, kept) == getattr(whole, kept)
    # What is there is averaged under another name.
    table = QUALITY if lacking == "quality" else SEMANTIC
    rest = {n: limits for n, limits in table.items() if n != name}
    mean = sum(w * (0.3 - low) / (high - low) for low, high, w in rest.values()) / sum(w for *_, w in rest.values())
    assert getattr(found, f"{lacking}_of_measured") == pytest.approx(mean)


def test_totals_of_nothing_and_of_strangers():
    found = totals({})
    assert set(found.by_name.values()) == {None}
    assert len(found.missing) == 16
    with pytest.raises(OmniNFTError, match="flow_dynamic_degree"):
        totals({"flow_dynamic_degree": 1.0})
