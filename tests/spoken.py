"""Something that detectors of speech take for speech, made by arithmetic: vowels by formants over a glottal pulse."""

from __future__ import annotations

import numpy as np
from scipy.signal import lfilter

RATE = 16_000
VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (570, 840, 2410), (530, 1840, 2480))  # Hz
SYLLABLE = 2_880  # samples


def babble(seconds: float = 2.0, pitch: float = 180.0, seed: int = 0) -> np.ndarray:
    """[seconds * RATE] float32: syllables of a fifth of a second each, peaks of 0.4."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    phase = np.cumsum(pitch * (1 + 0.1 * np.sin(2 * np.pi * 1.3 * t))) / RATE
    pulses = np.diff(np.floor(phase), prepend=0) + 0.02 * rng.standard_normal(len(t))
    source = lfilter([1], [1, -0.95], pulses)
    sound = np.zeros(len(t))
    for start in range(0, len(t), SYLLABLE):
        part = source[start : start + SYLLABLE]
        for frequency, width in zip(VOWELS[rng.integers(4)], (60, 90, 150), strict=True):
            radius = np.exp(-np.pi * width / RATE)
            pole = 2 * radius * np.cos(2 * np.pi * frequency / RATE)
            part = lfilter([1 - radius], [1, -pole, radius * radius], part)
        sound[start : start + SYLLABLE] = part / np.abs(part).max() * np.sqrt(np.hanning(len(part)))
    return (0.4 * sound).astype(np.float32)
