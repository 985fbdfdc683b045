"""Silero VAD (MIT): where in a sound somebody speaks.

The model comes inside the package silero-vad: 16 kHz mono in frames of 512 samples (32 ms), each preceded by the last
64 of the one before; a recurrent state runs through the clip and starts from zeros with each. The package's ONNX model
for whole sequences is run, one call a clip; the package itself is located but not imported, for importing it sets
torch to one thread.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omninft.scorers.weights import JudgingModel
from omninft.types import OmniNFTError

RATE = 16_000  # Hz
FRAME, CONTEXT, STATE = 512, 64, 128
ENTER, LEAVE = 0.5, 0.35  # probability at which speech begins, and below which it ends
SHORTEST_SPEECH, SHORTEST_SILENCE = 0.25, 0.1  # s

CARD = JudgingModel(
    name="Silero VAD", parameters=309_633, licence="MIT", commercial=True, package="silero-vad", verified=True
)
_FILE = "data/silero_vad_16k_sequence.onnx"


@dataclass(frozen=True)
class SpeechFacts:
    """What was heard of speech in one clip."""

    probabilities: np.ndarray  # [F], per frame of 32 ms
    segments: np.ndarray  # [S, 2], beginning and end in seconds

    @property
    def share(self) -> float:
        """Of the clip, 0..1: the mean probability, so that it is continuous in the sound."""
        return float(self.probabilities.mean(dtype=np.float64))

    @property
    def onsets(self) -> np.ndarray:
        """[S] seconds at which speech begins."""
        return self.segments[:, 0]


def missing() -> str | None:
    """None when both packages are there, else what is missing and the command that installs it."""
    modules = {"silero_vad": "silero-vad", "onnxruntime": "onnxruntime"}
    lacking = [package for module, package in modules.items() if importlib.util.find_spec(module) is None]
    if not lacking:
        return None
    return f"Silero VAD: missing {' and '.join(lacking)}; install by: pip install silero-vad onnxruntime"


class SileroVAD:
    """The ONNX session, opened once. Calls from several threads run side by side.

    Raises:
        OmniNFTError: a package is missing, or holds no such model.
    """

    def __init__(self) -> None:
        lacking = missing()
        if lacking is not None:
            raise OmniNFTError(lacking)
        self._session = _open_session()

    def __call__(self, wave: np.ndarray) -> SpeechFacts:
        """[N] at RATE, N > 0, to what was heard."""
        zeros = np.zeros((1, 1, STATE), np.float32)
        (probabilities,) = self._session.run(["speech_probs"], {"input": frames(wave), "h": zeros, "c": zeros})
        probabilities = np.asarray(probabilities).reshape(-1)
        return SpeechFacts(probabilities, speech_segments(probabilities, len(wave)))


def frames(wave: np.ndarray) -> np.ndarray:
    """[N] to [ceil(N / FRAME), CONTEXT + FRAME] float32: context, then the frame; zeros before and after the sound."""
    count = -(-len(wave) // FRAME)
    padded = np.zeros(CONTEXT + count * FRAME, np.float32)
    padded[CONTEXT : CONTEXT + len(wave)] = wave
    starts = np.arange(count)[:, None] * FRAME
    return padded[starts + np.arange(CONTEXT + FRAME)]


def speech_segments(probabilities: np.ndarray, samples: int) -> np.ndarray:
    """Frame probabilities [F] of a sound of `samples` to segments [S, 2], seconds, by the package's rules.

    Speech begins with a frame at ENTER or above and ends where frames stay below ENTER for SHORTEST_SILENCE, counted
    from the first below LEAVE. Segments of SHORTEST_SPEECH or less are left out. Not widened at the ends.
    """
    found: list[tuple[float, float]] = []
    start: int | None = None
    quiet: int | None = None
    for i, probability in enumerate(probabilities):
        now = i * FRAME
        if probability >= ENTER:
            quiet = None
            start = now if start is None else start
        elif start is not None and probability < LEAVE:
            quiet = now if quiet is None else quiet
            if now - quiet >= SHORTEST_SILENCE * RATE:
                found.append((start, quiet))
                start = quiet = None
    if start is not None:
        found.append((start, samples))
    kept = [(a / RATE, b / RATE) for a, b in found if b - a > SHORTEST_SPEECH * RATE]
    return np.array(kept).reshape(-1, 2)


def _open_session() -> Any:
    import onnxruntime

    spec = importlib.util.find_spec("silero_vad")
    path = Path((spec.submodule_search_locations or [""])[0] if spec is not None else "") / _FILE
    if not path.is_file():
        raise OmniNFTError(f"Silero VAD: the package holds no {_FILE}; expected silero-vad 6.2.3 or newer")
    options = onnxruntime.SessionOptions()
    # One thread a call: clips run side by side.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
