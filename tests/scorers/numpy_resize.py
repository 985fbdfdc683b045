"""Resizing without antialiasing in float64 numpy: pixel centres at half numbers, edges repeated."""

from __future__ import annotations

import numpy as np


def _linear(t: np.ndarray) -> np.ndarray:
    return np.stack([1 - t, t])


def _cubic(t: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Weights of the pixels at -1, 0, 1, 2 for a place t behind pixel 0 (Keys 1981)."""

    def near(d: np.ndarray) -> np.ndarray:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1

    def far(d: np.ndarray) -> np.ndarray:
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a

    return np.stack([far(1 + t), near(t), near(1 - t), far(2 - t)])


def resized_axis(x: np.ndarray, size: int, kind: str, step: float | None = None) -> np.ndarray:
    """The last axis at `size` places, `step` apart (default: the whole axis)."""
    length = x.shape[-1]
    places = (np.arange(size) + 0.5) * (length / size if step is None else step) - 0.5
    if kind == "bilinear":
        places = np.maximum(places, 0)
    first = np.floor(places).astype(int)
    weights, behind = (_linear(places - first), 0) if kind == "bilinear" else (_cubic(places - first), -1)
    taps = [x[..., np.clip(first + behind + n, 0, length - 1)] * w for n, w in enumerate(weights)]
    return np.sum(taps, axis=0)


def resized(x: np.ndarray, height: int, width: int, kind: str, steps: tuple[float, float] | None = None) -> np.ndarray:
    """[..., H, W] to [..., height, width]."""
    rows, columns = steps or (None, None)
    wide = resized_axis(np.asarray(x, dtype=np.float64), width, kind, columns)
    return resized_axis(wide.swapaxes(-1, -2), height, kind, rows).swapaxes(-1, -2)
