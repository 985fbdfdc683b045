"""AV-Align: do peaks of motion and peaks of sound coincide? No learned model.

Source: Yariv et al. 2024 (TempoTokens), in the form of the code that JavisBench runs: audio peaks are librosa onsets,
video peaks are strict local maxima of the mean Farneback flow magnitude, and the score is an intersection over union
in which an audio peak counts when a video peak lies strictly within one frame.
"""

from __future__ import annotations

import numpy as np
from librosa.onset import onset_detect, onset_strength

from omninft.scorers.flow import flow_facts
from omninft.types import Clip, OmniNFTError


def audio_peaks(clip: Clip) -> np.ndarray:
    """Onset times in seconds [A], with librosa's defaults on the mono mean at the clip's own rate."""
    if clip.waveform.size == 0:
        raise OmniNFTError("the clip has no sound")
    mono = clip.waveform.mean(axis=0)
    if not np.isfinite(mono).all():
        raise OmniNFTError("the clip's sound holds values that are not finite")
    strength = onset_strength(y=mono, sr=clip.sample_rate)
    return np.asarray(onset_detect(onset_envelope=strength, sr=clip.sample_rate, units="time"))


def flow_magnitudes(clip: Clip, shrink: int = 1, enlarge: bool = False) -> np.ndarray:
    """Mean optical flow per frame [T], pixels; element 0 repeats element 1. Options and errors as in `flow_facts`."""
    mean = flow_facts(clip, shrink, enlarge).mean
    return np.array([mean[0], *mean])


def video_peaks(clip: Clip, shrink: int = 1, enlarge: bool = False) -> np.ndarray:
    """Times in seconds of strict local maxima of the flow, ends excluded [V]."""
    m = flow_magnitudes(clip, shrink, enlarge)
    inner = np.flatnonzero((m[1:-1] > m[:-2]) & (m[1:-1] > m[2:])) + 1
    return inner / clip.frame_rate


def av_align(clip: Clip, shrink: int = 1, enlarge: bool = False) -> float:
    """Intersection over union of the peaks; 0 where there are none.

    As published, several audio peaks may count by one video peak, so that it can exceed 1. So is the flow of frames in
    full size; `shrink` takes smaller ones, `enlarge` larger ones of pictures too small for optical flow.
    """
    heard, seen = audio_peaks(clip), video_peaks(clip, shrink, enlarge)
    if not len(heard) or not len(seen):
        return 0.0
    near = np.abs(heard[:, None] - seen).min(axis=1) < 1 / clip.frame_rate
    matched = int(near.sum())
    return matched / (len(heard) + len(seen) - matched + 1e-6)
