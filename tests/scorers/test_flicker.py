from __future__ import annotations

import numpy as np
import pytest

from omninft.scorers.flicker import frame_differences
from omninft.types import OmniNFTError
from tests.moving_clips import moving_clip


def test_differences_are_exact_means():
    clip = moving_clip(5, frames=7)
    pixels = clip.video.astype(np.int64)
    expected = np.abs(pixels[1:] - pixels[:-1]).mean(axis=(1, 2, 3))
    found = frame_differences(clip)
    assert found.shape == (6,)
    assert found.max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_view_of_a_larger_video_is_measured_alike():
    clip = moving_clip(5, frames=8)
    cropped = type(clip)(clip.video[::2, 3:30, 5:], 12.0, clip.waveform, 16_000, clip.prompt)
    pixels = cropped.video.astype(np.int64)
    np.testing.assert_allclose(frame_differences(cropped), np.abs(np.diff(pixels, axis=0)).mean(axis=(1, 2, 3)))


def test_one_frame_cannot_flicker():
    with pytest.raises(OmniNFTError, match="needs 2 frames, found 1"):
        frame_differences(moving_clip(frames=1))
