"""Optical flow between consecutive frames, by Farneback's method: what AV-Align and the motion reward read.

Settings are those of AV-Align's published code: grey frames, pyramid scale 0.5, 3 levels, window 15, 3 iterations,
polynomials of 5 pixels with sigma 1.2. Only statistics are kept: the fields of a 121-frame clip would be 100 to 400 MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

from omninft.types import Clip, OmniNFTError

SMALLEST_SIDE = 64  # pixels: half of a 32-pixel frame would fit into Farneback's 15-pixel window
TOP_SHARE = 0.05  # of the pixels, those that move most
FARNEBACK = {
    "pyr_scale": 0.5,
    "levels": 3,
    "winsize": 15,
    "iterations": 3,
    "poly_n": 5,
    "poly_sigma": 1.2,
    "flags": 0,
}


@dataclass(frozen=True)
class FlowFacts:
    """Lengths of the flow vectors per pair of consecutive frames, pixels of the (enlarged) frame."""

    mean: np.ndarray  # [T - 1], over all pixels
    top: np.ndarray  # [T - 1], over the TOP_SHARE of the pixels with the longest vectors
    short_side: int  # pixels of the (enlarged) frame


def flow_facts(clip: Clip, shrink: int = 1, enlarge: bool = False) -> FlowFacts:
    """With `shrink` above 1 both sides of a frame are divided by it first, which takes that much less time squared.

    `enlarge` enlarges frames under SMALLEST_SIDE pixels by a whole factor: without it their flow is mostly blur.

    Raises:
        OmniNFTError: fewer than two frames.
    """
    short_side = max(1, min(clip.video.shape[1:3]) // shrink)
    factor = -(-SMALLEST_SIDE // short_side) if enlarge and short_side < SMALLEST_SIDE else 1
    return clip.view(f"flow-{shrink}-{factor}", lambda clip: _flow_facts(clip, shrink, factor))


def checked_shrink(shrink: object, reward: str) -> int:
    """The option `shrink` of a recipe. Raises OmniNFTError when it is not a whole number from 1 to 8."""
    if not isinstance(shrink, int) or isinstance(shrink, bool) or not 1 <= shrink <= 8:
        raise OmniNFTError(f"reward {reward!r}: shrink is {shrink!r}, expected a whole number from 1 to 8")
    return shrink


def _flow_facts(clip: Clip, shrink: int, factor: int) -> FlowFacts:
    if len(clip.video) < 2:
        raise OmniNFTError(f"optical flow needs 2 frames, found {len(clip.video)}")
    mean, top = [], []
    for before, after in pairwise(_grey(frame, shrink, factor) for frame in clip.video):
        flow = cv2.calcOpticalFlowFarneback(before, after, None, **FARNEBACK)  # type: ignore[call-overload]
        length = np.hypot(flow[..., 0], flow[..., 1])
        mean.append(float(length.mean()))
        top.append(_top_mean(length))
    short_side = max(1, min(clip.video.shape[1:3]) // shrink) * factor
    return FlowFacts(np.array(mean), np.array(top), short_side)


def _grey(frame: np.ndarray, shrink: int, factor: int) -> np.ndarray:
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    if shrink > 1:
        height, width = grey.shape
        size = (max(1, width // shrink), max(1, height // shrink))
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    if factor > 1:
        grey = cv2.resize(grey, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    return grey


def _top_mean(length: np.ndarray) -> float:
    """Mean of the int(TOP_SHARE * pixels) largest values, of one at least."""
    rest = length.size - max(1, int(TOP_SHARE * length.size))
    return float(np.partition(length, rest, axis=None)[rest:].mean(dtype=np.float64))
