"""What the stages hand to one another: frozen, video and audio side by side.

Shape letters used throughout the package:
    B clips, G clips of one prompt group, K reward components,
    Tv video tokens, Ta audio tokens, C / Ca video / audio latent channels,
    L text tokens, D / Da text widths, T frames, H W pixels, N audio samples.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

Route = Literal["video", "audio", "joint"]
ROUTES: tuple[Route, ...] = ("video", "audio", "joint")
Modality = Literal["video", "audio"]
MODALITIES: tuple[Modality, ...] = ("video", "audio")


class OmniNFTError(Exception):
    """An error a user can act on: it says what was found, what was expected, and where."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check looked at."""

    subject: str
    ok: bool
    text: str


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt set. The generator reads `prompt_av`; rewards read the part they judge."""

    id: str
    prompt_v: str
    prompt_a: str
    prompt_av: str
    category: str | None = None
    first_frame_path: str | None = None


@dataclass(frozen=True)
class PromptGroup:
    """The clips of one prompt in one iteration; `samples` are the sample numbers that key their noise."""

    prompt: Prompt
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Sizes of one clip in pixels, frames and tokens, as the model's autoencoders fix them."""

    num_frames: int
    height: int  # pixels
    width: int  # pixels
    frame_rate: float  # Hz
    latent_frames: int
    latent_height: int
    latent_width: int
    video_channels: int
    audio_tokens: int
    audio_channels: int
    sample_rate: int  # Hz, of the decoded waveform

    @property
    def video_tokens(self) -> int:
        return self.latent_frames * self.latent_height * self.latent_width

    @property
    def duration(self) -> float:
        """Seconds of video."""
        return self.num_frames / self.frame_rate


@dataclass(frozen=True)
class _Batch:
    """Tensors whose first dimension is the clip; indexing keeps the fields together."""

    def __getitem__(self, index: slice | Tensor | list[int]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[index] for k, v in values.items() if isinstance(v, Tensor)})

    def to(self, device: torch.device | str) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)})

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        first = parts[0]
        joined = {
            f.name: torch.cat([getattr(p, f.name) for p in parts])
            for f in fields(first)
            if isinstance(getattr(first, f.name), Tensor)
        }
        return replace(first, **joined)


@dataclass(frozen=True)
class Latents(_Batch):
    """Packed, normalised latents of both streams (or noise, or velocities, of the same shapes)."""

    video: Tensor  # [B, Tv, C] float32
    audio: Tensor  # [B, Ta, Ca] float32

    def __len__(self) -> int:
        return self.video.shape[0]


@dataclass(frozen=True)
class TextContext(_Batch):
    """Text embeddings after the connectors, as the transformer's cross-attentions read them."""

    video: Tensor  # [B, L, D]
    audio: Tensor  # [B, L, Da]
    mask: Tensor  # [B, L], 1 where a token counts

    def __len__(self) -> int:
        return self.video.shape[0]


@dataclass(frozen=True)
class Conditioning(_Batch):
    """Video tokens that are given (a first frame): they keep sigma 0 and leave loss and region weights."""

    video: Tensor  # [B, Tv, C] clean latents, read where `mask` is True
    mask: Tensor  # [B, Tv] bool

    def __len__(self) -> int:
        return self.video.shape[0]


@dataclass(frozen=True)
class Rollout:
    """Clean latents the old policy sampled for a batch of clips, and what was recorded on the way."""

    groups: tuple[PromptGroup, ...]  # clips are in the order of the groups and of their samples
    latents: Latents
    context: TextContext
    conditioning: Conditioning | None = None
    # Column sums of the V2A attention of the old policy, [B, Tv] float32, mean over the window's steps and blocks.
    attention: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def clip_keys(self) -> list[tuple[str, int]]:
        """(prompt id, sample number) per clip."""
        return [(g.prompt.id, s) for g in self.groups for s in g.samples]


@dataclass(frozen=True)
class Clip:
    """One decoded clip, as a viewer and a reward get it."""

    video: np.ndarray  # [T, H, W, 3] uint8
    frame_rate: float  # Hz
    waveform: np.ndarray  # [channels, N] float32 in [-1, 1]
    sample_rate: int  # Hz
    prompt: Prompt
    sample: int = 0
    # Derived views (resampled sound, resized frames, detected events), computed once and shared by scorers.
    views: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    _lock: Any = field(default_factory=threading.RLock, init=False, repr=False, compare=False)

    def view(self, name: str, compute: Callable[[Clip], Any]) -> Any:
        """The derived view `name`, computed by `compute(clip)` on first use, once whoever asks meanwhile."""
        with self._lock:
            if name not in self.views:
                self.views[name] = compute(self)
            return self.views[name]


@dataclass(frozen=True)
class Component:
    """One number a reward gives: which branch it judges and what it weighs there."""

    name: str
    route: Route
    weight: float = 1.0


@dataclass(frozen=True)
class ScoreTable:
    """Scores of B clips in K components. A missing score is NaN with a reason, never 0."""

    components: tuple[Component, ...]
    values: np.ndarray  # [B, K] float64, NaN where missing
    reasons: dict[tuple[int, int], str] = field(default_factory=dict)  # (clip, component) -> why it is missing

    @property
    def valid(self) -> np.ndarray:
        """[B, K] bool."""
        return np.isfinite(self.values)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.components)

    def column(self, name: str) -> np.ndarray:
        return self.values[:, self.names.index(name)]

    @staticmethod
    def cat(tables: list[ScoreTable]) -> ScoreTable:
        """Stack the rows of tables with equal components."""
        reasons: dict[tuple[int, int], str] = {}
        offset = 0
        for table in tables:
            if table.components != tables[0].components:
                raise ValueError("score tables with different components cannot be stacked")
            reasons |= {(b + offset, k): why for (b, k), why in table.reasons.items()}
            offset += len(table.values)
        return ScoreTable(tables[0].components, np.concatenate([t.values for t in tables]), reasons)

    @staticmethod
    def join(tables: list[ScoreTable]) -> ScoreTable:
        """Put the columns of several rewards on the same clips side by side."""
        reasons: dict[tuple[int, int], str] = {}
        offset = 0
        for table in tables:
            reasons |= {(b, k + offset): why for (b, k), why in table.reasons.items()}
            offset += len(table.components)
        components = tuple(c for t in tables for c in t.components)
        names = [c.name for c in components]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise OmniNFTError(f"two rewards give a component of the same name: {', '.join(twice)}")
        return ScoreTable(components, np.concatenate([t.values for t in tables], axis=1), reasons)


@dataclass(frozen=True)
class BranchAdvantages(_Batch):
    """What each branch learns from: advantages, and the clips that had any valid score for the branch."""

    video: Tensor  # [B] float32
    audio: Tensor  # [B] float32
    video_valid: Tensor  # [B] bool
    audio_valid: Tensor  # [B] bool
