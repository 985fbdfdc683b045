"""CLAP (Wu et al. 2023), laion/clap-htsat-unfused: how well a sound fits a text.

Sound: 48 kHz mono, windows of 10 s, log mel spectrogram [1001, 64]. Text: RoBERTa tokens. Both become directions in a
space of 512 dimensions; the measure is their cosine. The spectrogram is computed here: transformers' extractor takes
random crops of longer sounds, and what its `padding=True` means changed between its versions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from librosa.filters import mel
from numpy.lib.stride_tricks import sliding_window_view
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import ClapConfig, ClapModel

from omninft.scorers.contrastive import ContrastiveScorer
from omninft.scorers.views import fit_length
from omninft.scorers.weights import JudgingModel, load_strict, renamed

RATE = 48_000  # Hz
WINDOW = 10 * RATE  # samples; also the hop of long sounds
FFT, HOP, BANDS = 1024, 480, 64
LOWEST, HIGHEST = 50.0, 14_000.0  # Hz
FLOOR = 1e-10  # power, -100 dB

PadMode = Literal["zero", "repeatpad"]
Long = Literal["mean", "first"]
PAD_MODES: tuple[PadMode, ...] = ("zero", "repeatpad")
LONG: tuple[Long, ...] = ("mean", "first")

CARD = JudgingModel(
    name="CLAP (laion/clap-htsat-unfused)",
    parameters=153_492_890,
    licence="Apache-2.0 (not confirmed)",
    commercial=False,
    files=("config.json", "pytorch_model.bin", "tokenizer.json"),
    repo="laion/clap-htsat-unfused",
    revision="8fa0f1c6d0433df6e97c127f64b2a1d6c0dcda8a",
    sha256={"pytorch_model.bin": "1cd3c601bc4afe0fa87be3de4c13dd2cfadd249fac1e29acf74a9b296c3219bb"},
)

# Buffers that the class computes by itself; releases of transformers differ in which of them they write.
_COMPUTED = ("position_ids", "token_type_ids", "relative_position_index", "num_batches_tracked")


def windows(wave: np.ndarray, pad_mode: PadMode = "zero", long: Long = "mean") -> tuple[np.ndarray, np.ndarray]:
    """[N] at RATE, N > 0, to windows [W, WINDOW] and the share of each that the sound takes before filling [W].

    Sounds over 10 s: "mean" takes windows one after the other, to be averaged by their shares; "first" the first 10 s.
    Shorter windows: "zero" fills up with zeros (what the published scores did); "repeatpad" repeats the sound as often
    as it fits, then zeros (what the model was trained with).
    """
    starts = range(0, len(wave) if long == "mean" else 1, WINDOW)
    parts = [wave[start : start + WINDOW] for start in starts]
    repeats = [WINDOW // len(part) if pad_mode == "repeatpad" else 1 for part in parts]
    filled = [fit_length(np.tile(part, n), WINDOW) for part, n in zip(parts, repeats, strict=True)]
    return np.stack(filled), np.array([len(part) / WINDOW for part in parts])


def log_mel(window: np.ndarray) -> np.ndarray:
    """[WINDOW] to [1001, 64] float32, dB: periodic Hann, centred with reflection, power, Slaney's mel bands."""
    padded = np.pad(window.astype(np.float64), FFT // 2, mode="reflect")
    frames = sliding_window_view(padded, FFT)[::HOP]
    power = np.abs(np.fft.rfft(frames * _hann())) ** 2
    return np.asarray(10 * np.log10(np.maximum(power @ _bands(), FLOOR)), dtype=np.float32)


@functools.cache
def _hann() -> np.ndarray:
    return np.asarray(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT) / FFT))


@functools.cache
def _bands() -> np.ndarray:
    """[513, 64]."""
    filters = mel(
        sr=RATE, n_fft=FFT, n_mels=BANDS, fmin=LOWEST, fmax=HIGHEST, htk=False, norm="slaney", dtype=np.float64
    )
    return np.asarray(filters.T)


class CLAPScorer(ContrastiveScorer):
    """Cosines of sounds with texts."""

    def __init__(
        self, model: ClapModel, tokenizer: Tokenizer, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(model, tokenizer, device, dtype)
        text = model.config.text_config
        # RoBERTa numbers positions from the padding token's id on.
        tokenizer.enable_truncation(text.max_position_embeddings - text.pad_token_id - 1)
        tokenizer.enable_padding(pad_id=text.pad_token_id)

    @torch.inference_mode()
    def embed_windows(self, spectrograms: np.ndarray, budget: int) -> Tensor:
        """[n, 1001, 64] to [n, D] float32 of length 1, `budget` windows in a forward pass at most."""
        parts = []
        for start in range(0, len(spectrograms), budget):
            features = torch.from_numpy(spectrograms[start : start + budget])[:, None].to(self.device, self.dtype)
            parts.append(self.model.get_audio_features(input_features=features).pooler_output)
        return functional.normalize(torch.cat(parts).float(), dim=-1).cpu()

    def __call__(
        self, spectrograms: Sequence[np.ndarray], shares: Sequence[np.ndarray], texts: Sequence[str], budget: int
    ) -> np.ndarray:
        """Windows [W_i, 1001, 64] with their shares [W_i], and a text, per sound: the mean cosine [n]."""
        return self.mean_cosines(lambda all_of: self.embed_windows(all_of, budget), spectrograms, shares, texts)


def load_state(model: ClapModel, state: Mapping[str, Tensor]) -> None:
    """A released state dict into the model, all names but those of computed buffers."""
    own = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(_COMPUTED)}
    released = renamed(state, lambda name: None if name.endswith(_COMPUTED) else name)
    load_strict(model, own | released, CARD.name)


def load_clap(path: str | Path | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> CLAPScorer:
    """The released weights, from `path` or the hub's cache. Raises OmniNFTError for missing or unfit files."""
    files = CARD.locate(path)
    model = ClapModel(ClapConfig.from_json_file(files["config.json"]))
    load_state(model, CARD.state("pytorch_model.bin", path))
    return CLAPScorer(model, Tokenizer.from_file(str(files["tokenizer.json"])), device, dtype)
