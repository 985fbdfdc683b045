"""DNSMOS P.835 and P.808 (Reddy et al. 2022): how people would rate recorded speech, MOS of about 1 to 5.

The ONNX models come inside the package speechmos (MIT), whose rules are followed here: 16 kHz mono, doubled until it
fills 9.01 s, windows of 9.01 s every second, raw outputs mapped by fixed polynomials, means over windows. The package's
own entry computes the P.808 rating, by a slow route, for every call; here it is computed where asked for. Sound that is
no speech is rated low: about 1.1 to 1.3 for noise and tones.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omninft.scorers.weights import JudgingModel
from omninft.types import OmniNFTError

RATE = 16_000  # Hz
SECONDS = 9.01  # of a window
RATINGS = ("ovrl", "sig", "bak", "p808")  # overall, speech, background (P.835); overall (P.808)

CARD = JudgingModel(
    name="DNSMOS (speechmos)", parameters=0, licence="MIT", commercial=True, package="speechmos", verified=True
)

# Rating by powers of the raw output, highest first.
_POLYNOMIALS = {
    "sig": (-0.08397278, 1.22083953, 0.0052439),
    "bak": (-0.13166888, 1.60915514, -0.39604546),
    "ovrl": (-0.06766283, 1.11546468, 0.04602535),
}
_P835_FILE = "dnsmos_models/sig_bak_ovr.onnx"
_P808_FILE = "dnsmos_models/model_v8.onnx"


def missing() -> str | None:
    """None when both packages are there, else what is missing and the command that installs it."""
    lacking = [name for name in ("speechmos", "onnxruntime") if importlib.util.find_spec(name) is None]
    return (
        f"DNSMOS: missing {' and '.join(lacking)}; install by: pip install speechmos onnxruntime" if lacking else None
    )


def windows(wave: np.ndarray) -> Iterator[np.ndarray]:
    """[N] at RATE, N > 0, to windows of 9.01 s, as speechmos cuts them."""
    length = int(SECONDS * RATE)
    while len(wave) < length:
        wave = np.append(wave, wave)
    for i in range(int(np.floor(len(wave) / RATE) - SECONDS) + 1):
        window = wave[i * RATE : int((i + SECONDS) * RATE)]
        # For some i the end is rounded down, one sample short: the package leaves these windows out.
        if len(window) == length:
            yield window


class DNSMOS:
    """The ONNX sessions, opened once. Calls from several threads run side by side.

    Raises:
        OmniNFTError: a package is missing, or holds no such model.
    """

    def __init__(self, ratings: Sequence[str] = ("ovrl",)) -> None:
        lacking = missing()
        if lacking is not None:
            raise OmniNFTError(lacking)
        self.ratings = tuple(ratings)
        self._p835 = _session(_P835_FILE) if set(ratings) - {"p808"} else None
        self._p808 = _session(_P808_FILE) if "p808" in ratings else None

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        """[N] at RATE to one rating per entry of `ratings`, float64. Values beyond -1..1 are clipped."""
        rated: dict[bytes, list[float]] = {}  # windows of a doubled sound can be the same
        ratings = []
        for window in windows(np.clip(wave, -1, 1)):
            key = window.tobytes()
            if key not in rated:
                rated[key] = self._rate(window)
            ratings.append(rated[key])
        return np.mean(ratings, axis=0)

    def _rate(self, window: np.ndarray) -> list[float]:
        found = {}
        if self._p835 is not None:
            raw = self._p835.run(None, {"input_1": window[None].astype(np.float32)})[0][0]
            found = {
                name: float(np.polyval(_POLYNOMIALS[name], float(value)))
                for name, value in zip(("sig", "bak", "ovrl"), raw, strict=True)
            }
        if self._p808 is not None:
            found["p808"] = float(self._p808.run(None, {"input_1": _p808_mel(window[:-160])[None]})[0][0][0])
        return [found[name] for name in self.ratings]


def _p808_mel(sound: np.ndarray) -> np.ndarray:
    """[144000] to [900, 120] float32: log mel power below its maximum, (dB + 40) / 40."""
    import librosa  # some seconds on first use, and only P.808 needs it

    power = librosa.feature.melspectrogram(y=sound, sr=RATE, n_fft=321, hop_length=160, n_mels=120)
    return np.asarray((librosa.power_to_db(power, ref=np.max) + 40) / 40, dtype=np.float32).T


def _session(file: str) -> Any:
    import onnxruntime

    # The package is located, not imported: it would bring requests, pandas and tqdm.
    spec = importlib.util.find_spec("speechmos")
    path = Path((spec.submodule_search_locations or [""])[0] if spec is not None else "") / file
    if not path.is_file():
        raise OmniNFTError(f"DNSMOS: speechmos holds no {file}; expected speechmos 0.0.1.1")
    options = onnxruntime.SessionOptions()
    # One thread a call: clips run side by side.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
