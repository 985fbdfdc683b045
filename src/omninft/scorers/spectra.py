"""Mel spectra under the two conventions that judging models were trained with.

`mel_spectrogram` follows the defaults of torchaudio's MelSpectrogram, `kaldi_fbank` those of Kaldi's fbank features
(torchaudio.compliance.kaldi.fbank with htk_compat, a Hann window, no dither, no energy). Both are plain torch.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

PREEMPHASIS = 0.97
LOWEST_KALDI_FREQUENCY = 20.0  # Hz
LOG_FLOOR = 1.1920928955078125e-07  # float32 epsilon, as Kaldi floors the energies of a filter before the logarithm


def mel_spectrogram(wave: Tensor, sample_rate: int, n_fft: int, window: int, hop: int, num_mels: int) -> Tensor:
    """[..., N] samples to power [..., num_mels, 1 + N // hop].

    Periodic Hann window of `window` samples in the middle of `n_fft`, frames centred on multiples of `hop` with the
    ends reflected, |X|^2, triangles over 0 .. sample_rate / 2 on the HTK mel scale, of height 1.
    """
    hann = torch.hann_window(window, periodic=True, dtype=wave.dtype, device=wave.device)
    flat = wave.reshape(-1, wave.shape[-1])
    spectrum = torch.stft(
        flat, n_fft, hop, window, hann, center=True, pad_mode="reflect", normalized=False, return_complex=True
    )
    filters = _htk_filters(sample_rate, n_fft, num_mels).to(wave)
    mel = filters @ spectrum.abs().square()
    return mel.reshape(*wave.shape[:-1], num_mels, -1)


def kaldi_fbank(wave: Tensor, sample_rate: int, num_mels: int, frame: float = 0.025, shift: float = 0.010) -> Tensor:
    """[N] samples to log mel energies [frames, num_mels], frames wholly inside the wave (Kaldi's snip_edges).

    Per frame: its mean off; each sample less 0.97 of the one before (the first less 0.97 of itself); symmetric Hann
    window; zeros up to a power of two; |X|^2; triangles in mel over 20 Hz .. sample_rate / 2; natural logarithm of at
    least LOG_FLOOR. A wave shorter than one frame gives no frames.
    """
    length, step = int(sample_rate * frame), int(sample_rate * shift)
    if len(wave) < length:
        return wave.new_zeros((0, num_mels))
    frames = wave.unfold(0, length, step)
    frames = frames - frames.mean(dim=1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    hann = torch.hann_window(length, periodic=False, dtype=wave.dtype, device=wave.device)
    frames = (frames - PREEMPHASIS * before) * hann
    n_fft = 1 << (length - 1).bit_length()
    power = torch.fft.rfft(functional.pad(frames, (0, n_fft - length))).abs().square()
    filters = _kaldi_filters(sample_rate, n_fft, num_mels).to(wave)
    return (power @ filters.T).clamp_min(LOG_FLOOR).log()


@functools.cache
def _htk_filters(sample_rate: int, n_fft: int, num_mels: int) -> Tensor:
    """[num_mels, n_fft // 2 + 1] float64: triangles that are straight in Hz, their corners evenly spaced in mel."""
    highest = 2595 * math.log10(1 + sample_rate / 2 / 700)
    mels = torch.linspace(0, highest, num_mels + 2, dtype=torch.float64)
    corners = (700 * (10 ** (mels / 2595) - 1))[:, None]
    hertz = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    return _triangles(hertz, corners)


@functools.cache
def _kaldi_filters(sample_rate: int, n_fft: int, num_mels: int) -> Tensor:
    """[num_mels, n_fft // 2 + 1] float64: triangles that are straight in mel; the Nyquist bin is not used."""
    lowest, highest = (1127 * math.log1p(f / 700) for f in (LOWEST_KALDI_FREQUENCY, sample_rate / 2))
    corners = torch.linspace(lowest, highest, num_mels + 2, dtype=torch.float64)[:, None]
    hertz = torch.arange(n_fft // 2, dtype=torch.float64) * sample_rate / n_fft
    return functional.pad(_triangles(1127 * torch.log1p(hertz / 700), corners), (0, 1))


def _triangles(at: Tensor, corners: Tensor) -> Tensor:
    """[filters, len(at)]: the i-th rises from corner i to 1 at corner i + 1 and falls to corner i + 2."""
    left, middle, right = corners[:-2], corners[1:-1], corners[2:]
    return torch.minimum((at - left) / (middle - left), (right - at) / (right - middle)).clamp_min(0)
