from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest

from omninft.scorers import flow as scorer
from omninft.scorers.flow import flow_facts
from omninft.types import Clip, OmniNFTError, Prompt
from tests.moving_clips import moving_clip


def silent(video: np.ndarray, frame_rate: float = 12.0) -> Clip:
    return Clip(video, frame_rate, np.zeros((1, 16), np.float32), 16_000, Prompt("p", "", "", ""))


def shifting(step: int, size: int = 96, frames: int = 4) -> np.ndarray:
    """A smooth texture that moves `step` pixels to the right with every frame."""
    y, x = np.mgrid[:size, :size] * 2 * np.pi / size
    grey = 127 + 40 * np.sin(6 * x + 1) * np.cos(5 * y) + 30 * np.cos(9 * x + 4 * y)
    return np.stack([np.roll(grey, step * t, axis=1) for t in range(frames)])[..., None].repeat(3, -1).astype(np.uint8)


def test_a_shift_is_measured_in_pixels():
    facts = flow_facts(silent(shifting(2)))
    assert facts.mean.shape == facts.top.shape == (3,)
    assert facts.short_side == 96
    np.testing.assert_allclose(facts.mean, 2, rtol=0.15)
    assert (facts.top >= facts.mean).all()
    still = flow_facts(silent(shifting(0)))
    assert still.mean.max() < still.top.max() < 0.05  # not 0: the polynomials are fitted in single precision


def test_statistics_are_those_of_the_flow_fields():
    clip = moving_clip(3, frames=4, height=72, width=80)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip.video]
    facts = flow_facts(clip)
    for i, (a, b) in enumerate(pairwise(grey)):
        field = cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        lengths = np.hypot(field[..., 0], field[..., 1])
        assert facts.mean[i] == float(lengths.mean())  # AV-Align's number, bit for bit
        top = np.sort(lengths.astype(np.float64).ravel())[::-1][: int(0.05 * 72 * 80)]
        assert len(top) == 288
        assert facts.top[i] == pytest.approx(top.mean(), rel=1e-9)


@pytest.mark.parametrize(("size", "read"), [(32, 128), (48, 144), (128, 128), (160, 160)])
def test_small_frames_are_enlarged_by_a_whole_factor(monkeypatch, size, read):
    shapes = []

    def spy(before, after, flow, **settings):
        shapes.append((before.shape, after.shape))
        return np.zeros((*before.shape, 2), np.float32)

    monkeypatch.setattr(scorer, "SMALLEST_SIDE", 128)
    monkeypatch.setattr(scorer.cv2, "calcOpticalFlowFarneback", spy)
    facts = flow_facts(silent(np.zeros((3, size, size, 3), np.uint8)), enlarge=True)
    assert shapes == [((read, read), (read, read))] * 2
    assert facts.short_side == read
    shapes.clear()
    assert (
        flow_facts(silent(np.zeros((3, size, size, 3), np.uint8))).short_side == size
    )  # in full size unless told otherwise
    assert shapes == [((size, size), (size, size))] * 2


def test_frames_are_shrunk_where_that_is_asked_for():
    full, half = flow_facts(silent(shifting(4, 192))), flow_facts(silent(shifting(4, 192)), shrink=2)
    assert (full.short_side, half.short_side) == (192, 96)
    np.testing.assert_allclose(half.mean, full.mean / 2, rtol=0.1)
    assert flow_facts(silent(shifting(4, 192)), shrink=4).short_side == 48
    assert flow_facts(silent(shifting(4, 192)), shrink=4, enlarge=True).short_side == 96


def test_the_fields_are_computed_once_for_all_who_ask(monkeypatch):
    clip = moving_clip(1, frames=3)
    first = flow_facts(clip)
    monkeypatch.setattr(scorer.cv2, "calcOpticalFlowFarneback", None)
    assert flow_facts(clip) is first


def test_one_frame_has_no_flow():
    with pytest.raises(OmniNFTError, match="needs 2 frames, found 1"):
        flow_facts(moving_clip(frames=1))
