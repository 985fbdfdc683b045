"""How well a frame follows from its neighbours: a stand-in for the interpolation network of VBench's motion_smoothness.

VBench drops the odd frames, has AMT-S make them again from the even ones, and compares. Here they are made by optical
flow (Farneback's) in both directions. The numbers are alike in kind, not in value: they go by another name.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from omninft.scorers.flow import FARNEBACK, SMALLEST_SIDE
from omninft.types import Clip, OmniNFTError

Interpolator = Callable[[np.ndarray, np.ndarray], np.ndarray]  # two [H, W, 3] uint8 -> the frame between them


def interpolation_errors(video: np.ndarray, interpolate: Interpolator) -> np.ndarray:
    """[T, H, W, 3] uint8 to [(T - 1) // 2]: mean absolute difference, 0..255, of each odd frame between two even ones.

    A last odd frame that has only one even neighbour is not compared.

    Raises:
        OmniNFTError: fewer than three frames.
    """
    if len(video) < 3:
        raise OmniNFTError(f"motion smoothness needs 3 frames, found {len(video)}")
    errors = [
        cv2.norm(video[t], interpolate(video[t - 1], video[t + 1]), cv2.NORM_L1) / video[t].size
        for t in range(1, len(video) - 1, 2)
    ]
    return np.array(errors)


def flow_errors(clip: Clip) -> np.ndarray:
    """`interpolation_errors` with `flow_midpoint`."""
    return np.asarray(clip.view("flow-interpolation", lambda c: interpolation_errors(c.video, flow_midpoint)))


def flow_midpoint(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The frame half-way between two [H, W, 3] uint8: each moved half its flow towards the other, and averaged.

    Frames under SMALLEST_SIDE pixels are enlarged by a whole factor for the flow.
    """
    factor = -(-SMALLEST_SIDE // min(before.shape[:2])) if min(before.shape[:2]) < SMALLEST_SIDE else 1
    first, second = _grey(before, factor), _grey(after, factor)
    moved = []
    for start, end, frame in ((first, second, before), (second, first, after)):
        flow = cv2.calcOpticalFlowFarneback(start, end, None, **FARNEBACK)  # type: ignore[call-overload]
        moved.append(_moved_half(frame, flow, factor))
    return np.asarray((moved[0] + moved[1]) / 2).round().clip(0, 255).astype(np.uint8)


def _moved_half(frame: np.ndarray, flow: np.ndarray, factor: int) -> np.ndarray:
    """Pixel x of the result is the frame at x - flow(x) / 2."""
    height, width = frame.shape[:2]
    if factor > 1:
        flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA) / factor
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    return cv2.remap(
        frame.astype(np.float32),
        (columns - flow[..., 0] / 2).astype(np.float32),
        (rows - flow[..., 1] / 2).astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _grey(frame: np.ndarray, factor: int) -> np.ndarray:
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR) if factor > 1 else grey
