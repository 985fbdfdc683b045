"""Log-mel spectrogram of the bundled model's audio autoencoder.

Analysis: 512-point transform of Hann windows, hop 160 (10 ms at 16 kHz), reflect padding of (512 - 160) / 2 a side so
that N samples give N / 160 frames, 16 triangular bins from 100 to 4000 Hz on the HTK scale, log of the magnitude
clamped at 1e-4, then shifted and scaled to roughly -1.6..1.6.
"""

from __future__ import annotations

from functools import cache

import torch
from librosa.filters import mel as mel_filters
from torch import Tensor

from omninft.pretrain.sizes import HOP, MEL_BINS

N_FFT = 512
FLOOR = 1e-4


@cache
def _filters(sample_rate: int) -> Tensor:
    return torch.from_numpy(
        mel_filters(sr=sample_rate, n_fft=N_FFT, n_mels=MEL_BINS, fmin=100, fmax=4000, htk=True, norm=None)
    )


def log_mel(waveform: Tensor, sample_rate: int = 16_000) -> Tensor:
    """Normalised log-mel of waveforms [B, N] float32, [B, N // 160, 16] float32."""
    pad = (N_FFT - HOP) // 2
    padded = torch.nn.functional.pad(waveform[:, None], (pad, pad), mode="reflect")[:, 0]
    spectrum = torch.stft(padded, N_FFT, HOP, window=torch.hann_window(N_FFT), center=False, return_complex=True).abs()
    mel = torch.einsum("mf,bft->btm", _filters(sample_rate), spectrum)
    return (mel.clamp(min=FLOOR).log() + 4.5) / 3
