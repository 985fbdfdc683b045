"""What ImageBind reads: views of a video, of still frames and of sound, and CLIP's byte-pair tokens.

Constants of the released model: 2 frames of 224 pixels per view, 16 kHz, 128 mels, 204 spectrum frames per 2 s.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import soxr
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from omninft.scorers.batching import unique
from omninft.scorers.spectra import kaldi_fbank
from omninft.scorers.views import centre_crop, resize_short_side, to_tensor, uint8_tensor
from omninft.scorers.weights import JudgingModel
from omninft.types import Clip, OmniNFTError

Spacing = Literal["n-1", "n"]

CLIP_SECONDS = 2.0
VIDEO_CLIPS, AUDIO_CLIPS = 5, 3
SIDE = 224  # pixels
SAMPLE_RATE = 16_000  # Hz
MEL_FRAMES, NUM_MELS = 204, 128
MEL_MEAN, MEL_STD = -4.268, 9.138
CONTEXT = 77  # tokens
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

CLIP_TOKENS = JudgingModel(
    name="CLIP tokeniser",
    parameters=0,
    licence="MIT",
    commercial=True,
    files=("tokenizer.json",),
    repo="openai/clip-vit-base-patch32",
)


def clip_starts(duration: float, count: int, spacing: Spacing = "n-1") -> list[float]:
    """Where `count` clips of 2 s begin, s: i * max(duration - 2, 0) / (count - 1).

    The spacing "n" divides by `count`, as pytorchvideo 0.1.5 does, and never sees the end.
    """
    steps = count - 1 if spacing == "n-1" else count
    return [i * max(duration - CLIP_SECONDS, 0.0) / steps for i in range(count)]


def check_spacing(spacing: str) -> Spacing:
    """Raises OmniNFTError when `spacing` is neither."""
    if spacing == "n-1":
        return "n-1"
    if spacing == "n":
        return "n"
    raise OmniNFTError(f"clip_spacing is {spacing!r}, expected one of: n-1, n")


def frame_pairs(total: int, frame_rate: float, spacing: Spacing = "n-1") -> list[tuple[int, int]]:
    """First and last frame number of each of the 5 clips of a video of `total` frames."""
    pairs = []
    for start in clip_starts(total / frame_rate, VIDEO_CLIPS, spacing):
        # The small term keeps what should be a whole number of frames from being rounded up to the next.
        first = math.ceil(frame_rate * start - 1e-6)
        last = math.ceil(frame_rate * (start + CLIP_SECONDS) - 1e-6) - 1
        pairs.append((min(first, total - 1), min(max(first, last), total - 1)))
    return pairs


def video_views(clip: Clip, spacing: Spacing = "n-1") -> list[Tensor]:
    """15 views [3, 2, 224, 224] float32, normalised: 5 clips in order, each cropped at three places.

    The short side is resized bilinearly without antialiasing, as pytorchvideo's ShortSideScale does. Crops are the
    two ends and the middle of the long side. Views share the memory of the resized frames.

    Raises:
        OmniNFTError: no frames.
    """
    if not len(clip.video):
        raise OmniNFTError("the clip has no frames")
    pairs = frame_pairs(len(clip.video), clip.frame_rate, spacing)
    frames = _short_side_bilinear(to_tensor(clip.video[np.ravel(pairs)]) / 255)
    frames = normalised_pixels(frames).unflatten(0, (VIDEO_CLIPS, 2)).transpose(1, 2)
    height, width = frames.shape[-2:]
    # Only the long side has room, so that one of the two lists is zeros.
    tops, lefts = ([0, math.ceil((n - SIDE) / 2), n - SIDE] for n in (height, width))
    return [
        pair[..., top : top + SIDE, left : left + SIDE]
        for pair in frames
        for top, left in zip(tops, lefts, strict=True)
    ]


def still_frames(clip: Clip) -> np.ndarray:
    """[T, 3, 224, 224] uint8: every frame as a still image, bicubic with antialiasing, centre crop.

    Raises:
        OmniNFTError: no frames.
    """
    if not len(clip.video):
        raise OmniNFTError("the clip has no frames")

    def compute(clip: Clip) -> np.ndarray:
        small = [centre_crop(resize_short_side(uint8_tensor(f[None]), SIDE), SIDE) for f in clip.video]
        return torch.cat(small).numpy()

    return np.asarray(clip.view("stills-224", compute))


def still_views(frames: np.ndarray) -> list[Tensor]:
    """Still frames [n, 3, 224, 224] uint8 as n views [3, 2, 224, 224] float32: each frame shown twice."""
    pixels = normalised_pixels(torch.from_numpy(frames).float() / 255)
    return list(pixels.unsqueeze(2).expand(-1, -1, 2, -1, -1))


def normalised_pixels(frames: Tensor) -> Tensor:
    """[n, 3, H, W] in 0 .. 1 by CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return (frames - mean) / std


def first_channel(clip: Clip) -> np.ndarray:
    """[N] float32 at 16 kHz: the first channel alone, which is what the published fbank reads.

    Raises:
        OmniNFTError: the clip has no sound.
    """
    if clip.waveform.size == 0:
        raise OmniNFTError("the clip has no sound")
    wave = clip.waveform[0]
    if clip.sample_rate == SAMPLE_RATE:
        return np.asarray(wave, dtype=np.float32)
    return np.asarray(soxr.resample(wave, clip.sample_rate, SAMPLE_RATE), dtype=np.float32)


def audio_views(wave: np.ndarray, spacing: Spacing = "n-1") -> list[Tensor]:
    """3 clips of 2 s of [N] samples at 16 kHz as normalised spectra [1, 128, 204] float32 (frequency, time).

    A window of 2 s or less gives three times the same view.

    Raises:
        OmniNFTError: shorter than one frame of the spectrum (25 ms).
    """
    length = int(CLIP_SECONDS * SAMPLE_RATE)
    seconds = clip_starts(len(wave) / SAMPLE_RATE, AUDIO_CLIPS, spacing)
    starts, index = unique([math.floor(start * SAMPLE_RATE + 1e-6) for start in seconds])
    views = [_spectrum(torch.from_numpy(wave[start : start + length])) for start in starts]
    return [views[i] for i in index]


def _spectrum(wave: Tensor) -> Tensor:
    """Samples to [1, 128, 204]; the end is filled with 0 before the normalisation, as published."""
    fbank = kaldi_fbank(wave - wave.mean(), SAMPLE_RATE, NUM_MELS)
    if not len(fbank):
        raise OmniNFTError(f"ImageBind needs 25 ms of sound, found {1000 * len(wave) / SAMPLE_RATE:.1f} ms")
    fbank = functional.pad(fbank[:MEL_FRAMES].T, (0, max(0, MEL_FRAMES - len(fbank))))
    return (fbank[None] - MEL_MEAN) / MEL_STD


def _short_side_bilinear(frames: Tensor) -> Tensor:
    """[n, 3, H, W] with the short side at 224 pixels, the long side floored."""
    height, width = frames.shape[-2:]
    size = (math.floor(height / width * SIDE), SIDE) if width < height else (SIDE, math.floor(width / height * SIDE))
    return functional.interpolate(frames, size, mode="bilinear", align_corners=False, antialias=False)


class TextTokens:
    """CLIP's lower-casing byte-pair encoding, 77 tokens: start, text, end, zeros.

    A longer text loses what is too much before its end token. The published code cuts the end token off too, and then
    reads the text at its highest token number instead: `keep_end=False`.
    """

    def __init__(self, tokenizer: Tokenizer, keep_end: bool = True) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.keep_end = keep_end

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), 77] int64."""
        ids = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            # HTML escapes are resolved twice, as in the published tokeniser.
            tokens = self._tokenizer.encode(html.unescape(html.unescape(text)).strip()).ids
            if len(tokens) > CONTEXT:
                tokens = [*tokens[: CONTEXT - 1], tokens[-1]] if self.keep_end else tokens[:CONTEXT]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids


def load_tokens(path: str | Path | None = None, keep_end: bool = True) -> TextTokens:
    """From tokenizer.json of CLIP (the file or its folder), or the hub cache.

    Raises:
        OmniNFTError: a missing file, with the command that fetches it; a damaged one.
    """
    file = CLIP_TOKENS.locate(path)["tokenizer.json"]
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more special
        raise OmniNFTError(f"{file}: not a tokeniser, or damaged ({error})") from error
    return TextTokens(tokenizer, keep_end)
