"""AV-Align: do peaks of motion and peaks of sound coincide? No learned model.

Source: Yariv et al. 2024 (TempoTokens), in the form of the code that JavisBench runs: audio peaks are librosa onsets,
video peaks are strict local maxima of the mean Farneback flow magnitude, and the score is an intersection over union
in which an audio peak counts when a video peak lies strictly within one frame.
"""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
from librosa.onset import onset_detect, onset_strength

from omninft.types import Clip, OmniNFTError

SMALLEST_SIDE = 64  # pixels: half of a 32-pixel frame would fit into Farneback's 15-pixel window
FARNEBACK = {
    "pyr_scale": 0.5,
    "levels": 3,
    "winsize": 15,
    "iterations": 3,
    "poly_n": 5,
    "poly_sigma": 1.2,
    "flags": 0,
}


def audio_peaks(clip: Clip) -> np.ndarray:
    """Onset times in seconds [A], with librosa's defaults on the mono mean at the clip's own rate."""
    if clip.waveform.size == 0:
        raise OmniNFTError("the clip has no sound")
    mono = clip.waveform.mean(axis=0)
    strength = onset_strength(y=mono, sr=clip.sample_rate)
    return np.asarray(onset_detect(onset_envelope=strength, sr=clip.sample_rate, units="time"))


def flow_magnitudes(clip: Clip) -> np.ndarray:
    """Mean optical flow per frame [T], pixels of the (enlarged) frame; element 0 repeats element 1.

    Frames under SMALLEST_SIDE pixels are enlarged by a whole factor first.

    Raises:
        OmniNFTError: fewer than two frames.
    """
    if len(clip.video) < 2:
        raise OmniNFTError(f"optical flow needs 2 frames, found {len(clip.video)}")
    factor = -(-SMALLEST_SIDE // min(clip.video.shape[1:3])) if min(clip.video.shape[1:3]) < SMALLEST_SIDE else 1
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip.video]
    if factor > 1:
        grey = [cv2.resize(g, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR) for g in grey]
    flows = [
        cv2.calcOpticalFlowFarneback(a, b, None, **FARNEBACK)  # type: ignore[call-overload]
        for a, b in pairwise(grey)
    ]
    magnitudes = [float(np.hypot(f[..., 0], f[..., 1]).mean()) for f in flows]
    return np.array([magnitudes[0], *magnitudes])


def video_peaks(clip: Clip) -> np.ndarray:
    """Times in seconds of strict local maxima of the flow, ends excluded [V]."""
    m = flow_magnitudes(clip)
    inner = np.flatnonzero((m[1:-1] > m[:-2]) & (m[1:-1] > m[2:])) + 1
    return inner / clip.frame_rate


def av_align(clip: Clip) -> float:
    """Intersection over union of the peaks; 0 where there are none.

    As published, several audio peaks may count by one video peak, so that it can exceed 1.
    """
    heard, seen = audio_peaks(clip), video_peaks(clip)
    if not len(heard) or not len(seen):
        return 0.0
    near = np.abs(heard[:, None] - seen).min(axis=1) < 1 / clip.frame_rate
    matched = int(near.sum())
    return matched / (len(heard) + len(seen) - matched + 1e-6)
