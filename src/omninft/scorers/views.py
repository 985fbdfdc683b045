"""What judging models look at, derived from a clip once and shared by all of them (`Clip.view`).

Frames stay uint8 until a model normalises its own micro-batch: a clip's views are small enough to keep.
"""

from __future__ import annotations

import math

import numpy as np
import soxr
import torch
from torch import Tensor
from torch.nn import functional

from omninft.types import Clip, OmniNFTError


def mono(clip: Clip, rate: int) -> np.ndarray:
    """[N] float32: the mean of the channels at `rate` Hz, ceil or floor of duration * rate samples.

    Raises:
        OmniNFTError: the clip has no sound (or too little for one sample), or values that are not finite.
    """

    def compute(clip: Clip) -> np.ndarray:
        if clip.waveform.size == 0:
            raise OmniNFTError("the clip has no sound")
        wave = clip.waveform.mean(axis=0, dtype=np.float32)
        if not np.isfinite(wave).all():
            raise OmniNFTError("the clip's sound holds values that are not finite")
        if clip.sample_rate == rate:
            return wave
        wave = np.asarray(soxr.resample(wave, clip.sample_rate, rate), dtype=np.float32)
        if wave.size == 0:
            raise OmniNFTError("the clip has no sound")
        return wave

    return np.asarray(clip.view(f"mono-{rate}", compute))


def uniform_indices(total: int, count: int) -> np.ndarray:
    """[count] frame numbers round(linspace(0, total - 1, count)), first and last frame included."""
    if total < 1:
        raise OmniNFTError("the clip has no frames")
    return np.linspace(0, total - 1, count).round().astype(int)


def rate_indices(total: int, source: float, target: float) -> np.ndarray:
    """Frame numbers that show a video of `source` Hz at `target` Hz, as ffmpeg's fps filter picks them.

    floor(total / source * target) frames, the i-th being number ceil((i + 0.5) * source / target) - 1.
    """
    # Rates are ratios of small numbers; the small term keeps 96 / 24 * 25 from becoming 99.
    count = max(1, math.floor(total / source * target + 1e-6))
    wanted = np.ceil((np.arange(count) + 0.5) * source / target - 1e-9).astype(int) - 1
    return np.clip(wanted, 0, total - 1)


def frames_25fps_224(clip: Clip) -> np.ndarray:
    """[T, 3, 224, 224] uint8 at 25 Hz: short side bicubic to 224 pixels with antialiasing, centre crop."""

    def compute(clip: Clip) -> np.ndarray:
        indices = rate_indices(len(clip.video), clip.frame_rate, 25.0)
        # Neighbours at 25 Hz are often one frame shown twice: every source frame is resized once.
        unique, inverse = np.unique(indices, return_inverse=True)
        small = resize_short_side(uint8_tensor(clip.video[unique]), 224, "bicubic")
        return np.ascontiguousarray(centre_crop(small, 224).numpy()[inverse])

    return np.asarray(clip.view("frames-25fps-224", compute))


def uint8_tensor(frames: np.ndarray) -> Tensor:
    """[T, H, W, 3] uint8 as [T, 3, H, W]. Resized as it is, it is rounded and clamped as Pillow does it.

    Not copied, unless it is read-only: torch has no such tensors, and warns.
    """
    return torch.from_numpy(frames if frames.flags.writeable else frames.copy()).permute(0, 3, 1, 2)


def to_tensor(frames: np.ndarray) -> Tensor:
    """[T, H, W, 3] uint8 to [T, 3, H, W] float32 in 0..255."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))).float()


def to_uint8(frames: Tensor) -> Tensor:
    """Rounded and clamped to 0..255, as image libraries leave a resized picture."""
    return frames.round().clamp(0, 255).to(torch.uint8)


def resize(frames: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """[T, 3, H, W] resized with antialiasing (the filters of Pillow).

    float is neither rounded nor clamped; uint8 is, after each of the two passes, to within 2 of what Pillow gives, and
    several times faster.
    """
    if frames.shape[-2:] == (height, width):
        return frames
    return functional.interpolate(frames, (height, width), mode=mode, antialias=True, align_corners=False)


def resize_short_side(frames: Tensor, side: int, mode: str = "bicubic") -> Tensor:
    """The shorter side becomes `side` pixels, the longer int(side * long / short)."""
    height, width = frames.shape[-2:]
    if height <= width:
        return resize(frames, side, int(side * width / height), mode)
    return resize(frames, int(side * height / width), side, mode)


def centre_crop(frames: Tensor, side: int) -> Tensor:
    """The middle [side, side] pixels; a margin of half a pixel is rounded to the even number."""
    height, width = frames.shape[-2:]
    top, left = round((height - side) / 2), round((width - side) / 2)
    return frames[..., top : top + side, left : left + side]


def fit_length(wave: np.ndarray, length: int) -> np.ndarray:
    """Cut, or padded with zeros at the end, to `length` samples (last axis)."""
    wave = wave[..., :length]
    return np.pad(wave, [(0, 0)] * (wave.ndim - 1) + [(0, length - wave.shape[-1])])
