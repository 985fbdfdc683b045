"""Both spectra against plain float64 numpy written from their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omninft.scorers.spectra import kaldi_fbank, mel_spectrogram


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples)


def triangle(x: float, left: float, middle: float, right: float) -> float:
    return max(0.0, min((x - left) / (middle - left), (right - x) / (right - middle)))


def mel_by_definition(wave: np.ndarray) -> np.ndarray:
    """16 kHz, 1024-point spectra of 400-sample windows every 160 samples, 128 mels."""
    padded = np.pad(wave, 512, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    window = np.concatenate([np.zeros(312), hann, np.zeros(312)])
    frames = [padded[s : s + 1024] * window for s in range(0, len(padded) - 1023, 160)]
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    top = 2595 * np.log10(1 + 8000 / 700)
    corners = [700 * (10 ** (m / 2595) - 1) for m in np.arange(130) * top / 129]
    filters = [[triangle(k * 16000 / 1024, *corners[i : i + 3]) for k in range(513)] for i in range(128)]
    return np.array(filters) @ power.T


def fbank_by_definition(wave: np.ndarray) -> np.ndarray:
    """Kaldi: 400-sample frames every 160 samples, 512-point spectra, 128 mels over 20 .. 8000 Hz."""
    low, high = 1127 * np.log(1 + 20 / 700), 1127 * np.log(1 + 8000 / 700)
    corners = low + np.arange(130) * (high - low) / 129
    mels = 1127 * np.log(1 + np.arange(256) * 16000 / 512 / 700)
    filters = np.array([[triangle(m, *corners[i : i + 3]) for m in mels] for i in range(128)])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    rows = []
    for start in range(0, len(wave) - 399, 160):
        frame = wave[start : start + 400] - wave[start : start + 400].mean()
        emphasised = [frame[0] * (1 - 0.97)] + [frame[n] - 0.97 * frame[n - 1] for n in range(1, 400)]
        power = np.abs(np.fft.rfft(np.concatenate([emphasised * hann, np.zeros(112)]))) ** 2
        rows.append(np.log(np.maximum(filters @ power[:256], 2.0**-23)))
    return np.array(rows)


def test_mel_spectrogram_is_the_definition():
    wave = noise(10_240)
    found = mel_spectrogram(torch.from_numpy(wave), 16_000, 1024, 400, 160, 128)
    assert found.shape == (128, 65)
    np.testing.assert_allclose(found.numpy(), mel_by_definition(wave), rtol=1e-9, atol=1e-12)


def test_mel_spectrogram_of_a_batch_in_float32():
    waves = np.stack([noise(10_240, seed) for seed in range(3)])
    found = mel_spectrogram(torch.from_numpy(waves).float(), 16_000, 1024, 400, 160, 128)
    expected = np.stack([mel_by_definition(w) for w in waves])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_kaldi_fbank_is_the_definition():
    wave = noise(8_000) + 0.2
    wave[3_000:4_500] = 0.1  # constant: without its mean, silence
    found = kaldi_fbank(torch.from_numpy(wave), 16_000, 128)
    np.testing.assert_allclose(found.numpy(), fbank_by_definition(wave), rtol=1e-7, atol=1e-7)
    assert found.min() == pytest.approx(-15.942385, abs=1e-5)  # log of float32 epsilon
    single = kaldi_fbank(torch.from_numpy(wave).float(), 16_000, 128)
    np.testing.assert_allclose(single.numpy(), found.numpy(), atol=2e-2)


@pytest.mark.parametrize(("samples", "frames"), [(32_000, 198), (560, 2), (559, 1), (400, 1), (399, 0), (0, 0)])
def test_kaldi_frames_lie_wholly_inside_the_wave(samples, frames):
    assert kaldi_fbank(torch.zeros(samples), 16_000, 128).shape == (frames, 128)


def test_a_tone_is_in_the_band_of_its_frequency():
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000, dtype=torch.float64) / 16_000)
    # 1000 Hz is 1000 mel on either scale: of 2840.02 in 129 steps, and above the 31.75 mel of 20 Hz.
    htk = mel_spectrogram(tone, 16_000, 1024, 400, 160, 128)[:, 50]
    assert int(htk.argmax()) == round(999.99 / (2840.02 / 129)) - 1
    kaldi = kaldi_fbank(tone, 16_000, 128)[50]
    assert int(kaldi.argmax()) == pytest.approx((1000 - 31.75) / ((2840.04 - 31.75) / 129) - 1, abs=1)
