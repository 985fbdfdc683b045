from __future__ import annotations

import numpy as np
import pytest

from omninft.scorers.smoothness import flow_errors, flow_midpoint, interpolation_errors
from omninft.types import Clip, OmniNFTError, Prompt
from tests.moving_clips import moving_clip


def average(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return ((before.astype(int) + after) // 2).astype(np.uint8)


def test_odd_frames_are_compared_with_what_comes_of_even_ones():
    levels = np.array([10, 30, 40, 40, 20, 99])
    video = np.broadcast_to(levels[:, None, None, None], (6, 4, 4, 3)).astype(np.uint8)
    # Frame 1 is 30 where (10 + 40) / 2 is expected, frame 3 is 40 for (40 + 20) / 2; frame 5 has one neighbour only.
    assert interpolation_errors(video, average).tolist() == [5, 10]
    assert interpolation_errors(video[:5], average).tolist() == [5, 10]
    assert interpolation_errors(video[:3], average).tolist() == [5]
    with pytest.raises(OmniNFTError, match="needs 3 frames, found 2"):
        interpolation_errors(video[:2], average)


def waves(x: float, size: int) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    texture = 90 * np.sin((columns - x) / 3.3) * np.cos(rows / 4.1)
    return np.repeat((128 + texture)[..., None], 3, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("size", [96, 32])
def test_the_midpoint_of_a_shift_is_half_the_shift(size):
    before, between, after = waves(0, size), waves(2, size), waves(4, size)
    inner = (slice(8, -8), slice(8, -8))
    moved, faded = (
        np.abs(image[inner].astype(int) - between[inner]).mean()
        for image in (flow_midpoint(before, after), average(before, after))
    )
    assert moved < 0.2 * faded
    # The flow of a still picture is not quite zero: a pixel in some hundred is one level off.
    np.testing.assert_allclose(flow_midpoint(before, before).astype(int), before, atol=1)


def test_errors_grow_when_frames_are_shuffled():
    clip = moving_clip(1, 13, 64, 64)
    order = np.random.default_rng(0).permutation(13)
    shuffled = Clip(clip.video[order], 24.0, clip.waveform, 16_000, Prompt("p", "", "", ""))
    assert flow_errors(clip).shape == (6,)
    assert flow_errors(shuffled).mean() > 2 * flow_errors(clip).mean()
