from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from omninft.scorers.views import (
    centre_crop,
    fit_length,
    frames_25fps_224,
    mono,
    rate_indices,
    resize,
    resize_short_side,
    to_tensor,
    to_uint8,
    uint8_tensor,
    uniform_indices,
)
from omninft.types import Clip, OmniNFTError, Prompt


def clip(frames: int = 24, rate: float = 24.0, size: tuple[int, int] = (40, 60), sound: int = 16_000) -> Clip:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (frames, *size, 3), dtype=np.uint8)
    time = np.arange(sound) / 16_000
    wave = np.stack([np.sin(2 * np.pi * 440 * time), np.zeros(sound)]).astype(np.float32)
    return Clip(video, rate, wave, 16_000, Prompt("p", "", "", ""))


def test_mono_is_the_mean_of_the_channels_resampled_once() -> None:
    c = clip(sound=16_000)
    same = mono(c, 16_000)
    np.testing.assert_allclose(same, c.waveform.mean(axis=0), atol=1e-7)
    high = mono(c, 48_000)
    assert high.shape == (48_000,)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
    np.testing.assert_allclose(high[500:-500], expected[500:-500], atol=2e-3)
    assert mono(c, 48_000) is high


def test_no_sound_is_said() -> None:
    with pytest.raises(OmniNFTError, match="the clip has no sound"):
        mono(clip(sound=0), 16_000)


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(121, 5, [0, 30, 60, 90, 120]), (96, 4, [0, 32, 63, 95]), (3, 5, [0, 0, 1, 2, 2]), (1, 3, [0, 0, 0])],
)
def test_uniform_indices(total: int, count: int, expected: list[int]) -> None:
    # linspace(0, 95, 4) is 0, 31.67, 63.33, 95; (0, 2, 5) has 0.5 and 1.5, rounded half to even.
    assert uniform_indices(total, count).tolist() == expected


@pytest.mark.parametrize(
    ("total", "source", "count"), [(121, 24.0, 126), (96, 24.0, 100), (24, 12.0, 50), (50, 25.0, 50)]
)
def test_frames_at_25_hz_follow_the_fps_filter(total: int, source: float, count: int) -> None:
    indices = rate_indices(total, source, 25.0)
    assert len(indices) == count
    # ffmpeg's fps filter shows at output time i the last input frame whose rounded output time is not after i.
    slots = np.floor(np.arange(total) * 25.0 / source + 0.5)
    expected = [max(np.flatnonzero(slots <= i), default=0) for i in range(count)]
    assert indices.tolist() == expected


def test_25_to_25_is_the_identity() -> None:
    assert rate_indices(75, 25.0, 25.0).tolist() == list(range(75))


def test_frames_for_224_models() -> None:
    c = clip(frames=24, size=(40, 60))
    frames = frames_25fps_224(c)
    assert frames.shape == (25, 3, 224, 224)
    assert frames.dtype == np.uint8
    # Pillow's bicubic of the same picture: short side to 224, long side int(224 * 60 / 40) = 336, middle columns.
    first = np.asarray(Image.fromarray(c.video[0]).resize((336, 224), Image.Resampling.BICUBIC))[:, 56:280]
    assert np.abs(frames[0].transpose(1, 2, 0).astype(int) - first).max() <= 2


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_reduction_antialiases_as_pillow_does(mode: str) -> None:
    c = clip(frames=1, size=(120, 90))
    small = (resize(uint8_tensor(c.video), 40, 30, mode)).numpy()[0].transpose(1, 2, 0)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    expected = np.asarray(Image.fromarray(c.video[0]).resize((30, 40), filters[mode]))
    assert np.abs(small.astype(int) - expected).max() <= 1
    unrounded = resize(to_tensor(c.video), 40, 30, mode)
    assert unrounded.dtype == torch.float32
    assert np.abs(to_uint8(unrounded).numpy()[0].transpose(1, 2, 0).astype(int) - expected).mean() < 0.5


def test_short_side_and_crop() -> None:
    frames = torch.zeros(1, 3, 30, 50)
    assert resize_short_side(frames, 20).shape == (1, 3, 20, 33)
    assert resize_short_side(frames.transpose(2, 3), 20).shape == (1, 3, 33, 20)
    rows = torch.arange(7.0)[:, None].expand(7, 4)
    assert centre_crop(rows, 4)[:, 0].tolist() == [2, 3, 4, 5]  # (7 - 4) / 2 = 1.5, half to even


def test_fit_length() -> None:
    assert fit_length(np.ones(3), 5).tolist() == [1, 1, 1, 0, 0]
    assert fit_length(np.arange(10).reshape(2, 5), 2).tolist() == [[0, 1], [5, 6]]


def test_a_view_is_computed_once_by_whoever_asks_first() -> None:
    c, calls, gate = clip(), [], threading.Event()

    def compute(_: Clip) -> int:
        gate.wait(5)
        calls.append(1)
        return len(calls)

    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(c.view("slow", compute))) for _ in range(4)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(5)
    assert (seen, len(calls)) == ([1, 1, 1, 1], 1)
