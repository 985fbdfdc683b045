"""Frames resized without antialiasing, as VBench feeds its judging models (torchvision's Resize, antialias=False).

Values stay float in 0..255: neither rounded nor clamped, as there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from omninft.scorers.views import centre_crop, to_tensor


def short_side(frames: Tensor, side: int, mode: str) -> Tensor:
    """[T, 3, H, W] float: the shorter side becomes `side` pixels, the longer int(side * long / short)."""
    height, width = frames.shape[-2:]
    if height <= width:
        return _resized(frames, side, int(side * width / height), mode)
    return _resized(frames, int(side * height / width), side, mode)


def longer_side_at_most(frames: Tensor, side: int, mode: str) -> Tensor:
    """[T, 3, H, W] float: a longer side above `side` pixels becomes that, both sides rounded down."""
    height, width = frames.shape[-2:]
    if max(height, width) <= side:
        return frames
    scale = side / max(height, width)
    return _resized(frames, max(1, int(scale * height)), max(1, int(scale * width)), mode)


def clip_pixels(video: np.ndarray, side: int = 224) -> np.ndarray:
    """[T, H, W, 3] uint8 to [T, 3, side, side] float32 in about 0..255: short side bicubic, cropped in the middle."""
    return centre_crop(short_side(to_tensor(video), side, "bicubic"), side).numpy()


def in_parts(video: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """A video in runs of at most `budget` frames: resized whole, a long one would take gigabytes."""
    for start in range(0, len(video), budget):
        yield video[start : start + budget]


def normalised(frames: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[T, 3, H, W] in 0..255 to (x / 255 - mean) / std."""
    return (frames / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _resized(frames: Tensor, height: int, width: int, mode: str) -> Tensor:
    if frames.shape[-2:] == (height, width):
        return frames
    return functional.interpolate(frames, (height, width), mode=mode, align_corners=False, antialias=False)
