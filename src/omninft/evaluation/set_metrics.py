"""Metrics of a whole set of clips: the distance of its features from those of real clips (FVD, KVD, FAD).

The networks are not part of this package. Their features come from a file, or from a TorchScript file of the network:

video   I3D trained on Kinetics-400: [1, 3, 24, 224, 224] float32 in -1..1 to [1, 400] logits, or [1, 400, T']
audio   AudioCLIP's sound tower: [1, 64000] float32 in -1..1 (4 s at 16 kHz) to [1, D]

A file of features holds the tensors "video" [n, D] and "audio" [n, D], either or both; safetensors, or what torch.save
wrote of tensors alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from omninft.clips.workers import in_workers
from omninft.evaluation.frechet import frechet_audio_distance, frechet_distance, kernel_distance
from omninft.evaluation.results import Metric
from omninft.scorers.views import fit_length, mono, resize, to_tensor, uniform_indices
from omninft.scorers.weights import file_sha256, read_state
from omninft.types import Clip, OmniNFTError

FRAMES = 24  # JavisBench's max_frames; an older document says 16
SIDE = 224  # pixels
SECONDS, RATE = 4.0, 16_000  # of sound

Distance = Callable[[np.ndarray, np.ndarray], float]


class SetMetric(Protocol):
    """Metrics of all clips together, from features that each clip gives."""

    @property
    def name(self) -> str:
        """Of its features."""
        ...

    @property
    def metrics(self) -> tuple[Metric, ...]: ...

    @property
    def given(self) -> np.ndarray | None:
        """Features [n, D] of the whole set that are known already; then clips are not asked for theirs."""
        ...

    def missing(self) -> str | None:
        """None when it can be computed, else what is missing."""
        ...

    def features(self, clips: list[Clip]) -> list[np.ndarray | OmniNFTError]:
        """[D] of every clip, or why there are none. Raises OmniNFTError when no clip can have them."""
        ...

    def values(self, features: np.ndarray) -> dict[str, float]:
        """Every metric, of the features [n, D] of all clips. Raises OmniNFTError when they do not do."""
        ...


@dataclass(frozen=True)
class FeatureDistance:
    """Distances of the clips' features from `real` ones [m, D].

    Features are `given` [n, D] (clips are not looked at then), or computed by the TorchScript file `network`.
    """

    name: str  # "video" or "audio"
    distances: dict[Metric, Distance]
    prepare: Callable[[Clip], Tensor]
    network: Path | None = None
    real: np.ndarray | None = None
    given: np.ndarray | None = None
    device: str = "cpu"
    hint: str = ""  # how to get the network

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(self.distances)

    def missing(self) -> str | None:
        if self.real is None:
            return f"no {self.name} features of real clips; give a file of them (--real)"
        if self.given is None and self.network is None:
            return f"no network for {self.name} features; {self.hint}, or a file of features (--features)"
        return None

    def features(self, clips: list[Clip]) -> list[np.ndarray | OmniNFTError]:
        module = _network(self.network, self.device)
        return [item if isinstance(item, OmniNFTError) else self._run(module, item) for item in self._prepared(clips)]

    def values(self, features: np.ndarray) -> dict[str, float]:
        if self.real is None:
            raise OmniNFTError(self.missing() or "")
        return {metric.name: distance(features, self.real) for metric, distance in self.distances.items()}

    def _prepared(self, clips: list[Clip]) -> list[Tensor | OmniNFTError]:
        return in_workers(self.prepare, clips, 1)

    @torch.inference_mode()
    def _run(self, module: Any, item: Tensor) -> np.ndarray | OmniNFTError:
        try:
            made = module(item[None].to(self.device)).float().cpu()
        except RuntimeError as error:
            return OmniNFTError(f"{self.network} does not take {list(item[None].shape)}: {error}")
        made = made.flatten(2).mean(dim=2) if made.ndim > 2 else made
        if made.ndim != 2 or len(made) != 1:
            return OmniNFTError(f"{self.network} returned {list(made.shape)}, expected [1, D] features")
        return np.asarray(made[0].numpy())


def video_distance(unscaled: bool = False, **options: Any) -> FeatureDistance:
    """FVD and KVD. `unscaled` shows I3D pixels in 0..1."""
    distances: dict[Metric, Distance] = {
        Metric("fvd", "FVD", "Frechet distance of I3D logits from those of real clips", False, "", 1): frechet_distance,
        Metric("kvd", "KVD", "kernel distance of I3D logits from those of real clips", False, "", 3): kernel_distance,
    }
    hint = "give I3D as a TorchScript file (--i3d)"
    return FeatureDistance("video", distances, functools.partial(i3d_input, unscaled=unscaled), hint=hint, **options)


def audio_distance(**options: Any) -> FeatureDistance:
    """FAD."""
    description = "Frechet distance of AudioCLIP features from those of real clips, times 10,000"
    distances: dict[Metric, Distance] = {Metric("fad", "FAD", description, False, "", 2): frechet_audio_distance}
    hint = "give AudioCLIP's sound tower as a TorchScript file (--audioclip)"
    return FeatureDistance("audio", distances, audioclip_input, hint=hint, **options)


def i3d_input(clip: Clip, unscaled: bool = False) -> Tensor:
    """[3, 24, 224, 224]: frames by linspace, the longest side 224 pixels, black around to a square; -1..1 or 0..1.

    Black is 0 of 0..1 before that is brought to -1..1.
    """
    frames = to_tensor(clip.video[uniform_indices(len(clip.video), FRAMES)]) / 255
    height, width = frames.shape[-2:]
    scale = SIDE / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    frames = resize(frames, height, width, "bilinear").clamp(0, 1)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    frames = functional.pad(frames, (left, SIDE - width - left, top, SIDE - height - top))
    return (frames if unscaled else frames * 2 - 1).transpose(0, 1)


def audioclip_input(clip: Clip) -> Tensor:
    """[64000]: the first 4 s of the mono sound at 16 kHz, zeros behind. Raises OmniNFTError: no sound."""
    return torch.from_numpy(fit_length(mono(clip, RATE), int(SECONDS * RATE)).copy())


def read_features(path: Path | None) -> tuple[dict[str, np.ndarray], str]:
    """Features by name ("video", "audio") and the file's checksum; nothing for no file.

    Raises:
        OmniNFTError: a file that cannot be read, or that holds neither.
    """
    if path is None:
        return {}, ""
    if not path.is_file():
        raise OmniNFTError(f"{path}: no such file of features")
    state = read_state(path)
    names: tuple[str, ...] = ("video", "audio")
    found = {name: state[name].double().numpy() for name in names if name in state}
    if not found:
        raise OmniNFTError(f"{path}: holds {', '.join(list(state)[:5])}; expected tensors named video or audio")
    for name, rows in found.items():
        if rows.ndim != 2:
            raise OmniNFTError(f"{path}: {name} has shape {list(rows.shape)}, expected [clips, features]")
    return found, file_sha256(path)


@functools.cache
def _network(path: Path | None, device: str) -> Any:
    if path is None:
        raise OmniNFTError("no network of features")
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise OmniNFTError(f"{path}: not a TorchScript file, or damaged ({error})") from error
