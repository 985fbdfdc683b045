"""How much a clip changes from frame to frame: what VBench's temporal_flickering measures. No learned model."""

from __future__ import annotations

import cv2
import numpy as np

from omninft.types import Clip, OmniNFTError


def frame_differences(clip: Clip) -> np.ndarray:
    """[T - 1] mean absolute difference of consecutive frames over pixels and channels, in 0..255.

    Raises:
        OmniNFTError: fewer than two frames.
    """
    return np.asarray(clip.view("frame-differences", _frame_differences))


def _frame_differences(clip: Clip) -> np.ndarray:
    video = clip.video
    if len(video) < 2:
        raise OmniNFTError(f"flicker needs 2 frames, found {len(video)}")
    # The sum of absolute differences of uint8 is exact, in whatever order it is taken.
    sums = [cv2.norm(video[t], video[t + 1], cv2.NORM_L1) for t in range(len(video) - 1)]
    return np.array(sums) / video[0].size
