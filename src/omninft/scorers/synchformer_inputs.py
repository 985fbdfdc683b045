"""What Synchformer reads of a clip: segments of 0.64 s of picture and sound, and the blocks they are judged in.

Constants of the released model: 25 Hz, 224 pixels, 16 kHz, 16 frames every 8, 10240 samples every 5120, 128 mels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from omninft.scorers.spectra import mel_spectrogram
from omninft.scorers.views import fit_length, frames_25fps_224, mono
from omninft.types import Clip, OmniNFTError

Seconds = float | Literal["clip"]

FRAME_RATE = 25  # Hz
SEGMENT_FRAMES, FRAME_STEP = 16, 8
SAMPLE_RATE = 16_000  # Hz
SEGMENT_SAMPLES, SAMPLE_STEP = 10_240, 5_120
SEGMENT_SECONDS = SEGMENT_FRAMES / FRAME_RATE
BLOCK_SEGMENTS = 14
MEL_FRAMES, NUM_MELS = 66, 128
MEL_MEAN, MEL_STD = -4.2677393, 4.5689974


@dataclass(frozen=True)
class SyncInputs:
    """One clip, ready for the networks."""

    frames: np.ndarray  # [F, 3, 224, 224] uint8 at 25 Hz; black from F on
    mel: np.ndarray  # [S, 66, 128] float32, normalised log mel spectra of the S segments

    @property
    def num_segments(self) -> int:
        return len(self.mel)

    def picture(self, segment: int) -> Tensor:
        """[16, 3, 224, 224] uint8: the frames of one segment, black where the clip has ended."""
        frames = self.frames[segment * FRAME_STEP : segment * FRAME_STEP + SEGMENT_FRAMES]
        return torch.from_numpy(np.pad(frames, [(0, SEGMENT_FRAMES - len(frames)), (0, 0), (0, 0), (0, 0)]))

    def sound(self, segment: int) -> Tensor:
        """[66, 128]: the normalised log mel spectrum of one segment."""
        return torch.from_numpy(self.mel[segment])

    def is_black(self, segment: int) -> bool:
        """Whether the segment lies wholly beyond the clip's end."""
        return segment * FRAME_STEP >= len(self.frames)


def check_seconds(seconds: object) -> Seconds:
    """`seconds` as an option: "clip", or a number that holds at least one segment.

    Raises:
        OmniNFTError: anything else.
    """
    if seconds == "clip":
        return "clip"
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not SEGMENT_SECONDS <= float(seconds) < math.inf:  # type: ignore[arg-type]
        raise OmniNFTError(
            f'seconds is {seconds!r}, expected "clip" (the clip\'s own length) or a number of at least '
            f"{SEGMENT_SECONDS} s"
        )
    return float(seconds)  # type: ignore[arg-type]


def sync_inputs(clip: Clip, seconds: Seconds = "clip") -> SyncInputs:
    """Segments of the first `seconds` of a clip, or of as long as its picture lasts.

    A shorter clip is filled up with black frames and silence. The sound is cut or filled to the picture.

    Raises:
        OmniNFTError: no sound, or picture or sound shorter than one segment (0.64 s): nothing real fills a segment.
    """
    wave = mono(clip, SAMPLE_RATE)
    lengths = {
        "picture": len(clip.video) / clip.frame_rate,
        "sound": clip.waveform.shape[-1] / clip.sample_rate,
    }
    for name, length in lengths.items():
        if length * FRAME_RATE + 1e-6 < SEGMENT_FRAMES:  # counted as the frames of `frames_25fps_224` are
            raise OmniNFTError(f"DeSync needs {SEGMENT_SECONDS} s, the {name} of the clip has {length:.3f} s")
    frames = frames_25fps_224(clip)
    # The small term keeps 4.04 * 25 from becoming 100.
    num_frames = len(frames) if seconds == "clip" else math.floor(seconds * FRAME_RATE + 1e-6)
    num_segments = (num_frames - SEGMENT_FRAMES) // FRAME_STEP + 1
    # The segments of the sound end with those of the picture: what follows is never read.
    wave = fit_length(wave, SEGMENT_SAMPLES + SAMPLE_STEP * (num_segments - 1))
    segments = np.lib.stride_tricks.sliding_window_view(wave, SEGMENT_SAMPLES)[::SAMPLE_STEP]
    return SyncInputs(frames[:num_frames], log_mel(torch.from_numpy(segments.copy())).numpy())


def log_mel(segments: Tensor) -> Tensor:
    """[S, 10240] samples at 16 kHz to normalised log mel spectra [S, 66, 128] (time, frequency).

    The 65 frames are padded with 0 before the normalisation, as published: not with the logarithm of silence.
    """
    mel = mel_spectrogram(segments, SAMPLE_RATE, n_fft=1024, window=400, hop=160, num_mels=NUM_MELS)
    mel = functional.pad((mel + 1e-6).log(), (0, MEL_FRAMES - mel.shape[-1]))
    return ((mel - MEL_MEAN) / (2 * MEL_STD)).transpose(-1, -2).contiguous()


def normalised_pictures(pictures: Tensor) -> Tensor:
    """uint8 of any shape to float32 in -1 .. 1."""
    return pictures.float() / 127.5 - 1


def block_segments(num_segments: int) -> list[list[int]]:
    """Numbers of the 14 segments in each block.

    Blocks follow one another; fewer than 14 segments repeat from the first; a later block that would be short is
    the last 14 instead.
    """
    if num_segments <= BLOCK_SEGMENTS:
        return [[i % num_segments for i in range(BLOCK_SEGMENTS)]]
    starts = [min(s, num_segments - BLOCK_SEGMENTS) for s in range(0, num_segments, BLOCK_SEGMENTS)]
    return [list(range(s, s + BLOCK_SEGMENTS)) for s in starts]
