from __future__ import annotations

import numpy as np
import pytest
import torch

from omninft.scorers.unfiltered import clip_pixels, in_parts, longer_side_at_most, normalised, short_side
from omninft.scorers.views import to_tensor
from tests.moving_clips import moving_clip
from tests.scorers.numpy_resize import resized


@pytest.mark.parametrize(("height", "width", "expected"), [(48, 64, (20, 26)), (64, 48, (26, 20)), (11, 11, (20, 20))])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_short_side_without_antialiasing(height, width, expected, mode):
    video = moving_clip(1, 2, height, width).video
    found = short_side(to_tensor(video), 20, mode)
    assert found.shape == (2, 3, *expected)
    np.testing.assert_allclose(found, resized(video.transpose(0, 3, 1, 2), *expected, mode), atol=2e-3)


def test_antialiasing_would_differ():
    # Columns black and white in turn, at a third of the size: without a filter every place falls on a pixel.
    video = np.zeros((1, 30, 30, 3), np.uint8)
    video[:, :, ::2] = 255
    found = short_side(to_tensor(video), 10, "bilinear")
    assert set(found.unique().tolist()) == {0.0, 255.0}


def test_longer_side_only_shrinks():
    frames = torch.rand(1, 3, 30, 45)
    assert longer_side_at_most(frames, 45, "bilinear") is frames
    found = longer_side_at_most(frames, 32, "bilinear")
    # 32 / 45 * 30 = 21.33 is rounded down.
    assert found.shape == (1, 3, 21, 32)
    np.testing.assert_allclose(found, resized(frames.numpy(), 21, 32, "bilinear"), atol=1e-5)


def test_clip_pixels_are_cropped_in_the_middle():
    video = moving_clip(2, 2, 40, 60).video
    found = clip_pixels(video, 32)
    whole = resized(video.transpose(0, 3, 1, 2), 32, 48, "bicubic")
    np.testing.assert_allclose(found, whole[..., 8:40], atol=2e-3)


def test_parts_and_normalisation():
    video = moving_clip(3, 7, 8, 8).video
    parts = list(in_parts(video, 3))
    assert [len(p) for p in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(parts), video)
    found = normalised(torch.full((1, 3, 1, 1), 51.0), (0.1, 0.2, 0.3), (0.5, 0.25, 1.0))
    np.testing.assert_allclose(found.flatten(), [0.2, 0.0, -0.1], atol=1e-6)
