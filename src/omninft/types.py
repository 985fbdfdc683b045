"""What the stages hand to one another: frozen, video and audio side by side.

Shape letters used throughout the package:
    B clips, G clips of one prompt group, K reward components,
    Tv video tokens, Ta audio tokens, C / Ca video / audio latent channels,
    L text tokens, D / Da text widths, T frames, H W pixels, N audio samples.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
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
    doubtful: bool = False  # the run can start, but a person should look first


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
class Trajectory(_Batch):
    """Every state the solver went through, and how likely each step was under the policy that took it.

    A log-probability is a mean over channels, one for each token: what reads it knows which tokens are given and what
    the others weigh. A step that was not drawn (solver ode, and the last step of any) has none: NaN.
    """

    video: Tensor  # [B, S + 1, Tv, C] float32, from noise to clean; given tokens are clean in all of them
    audio: Tensor  # [B, S + 1, Ta, Ca]
    video_log_prob: Tensor  # [B, S, Tv] float32
    audio_log_prob: Tensor  # [B, S, Ta]
    sigmas: Tensor  # [B, S + 1] float32, noise levels of the states

    def __len__(self) -> int:
        return len(self.video)


@dataclass(frozen=True)
class Recording:
    """What is recorded of the sampling policy, over steps int(window[0] S) to int(window[1] S), both included.

    `v2a_columns`: [B, Tv] float32, how much the sound attends to each video token (column sums of the V2A maps, head
    mean, mean over blocks and steps). `responses`: norms of the cross-modal outputs before their gates, per block and
    token, mean over steps: `a2v_responses` [B, blocks, Tv] and `v2a_responses` [B, blocks, Ta].
    """

    kind: Literal["v2a_columns", "responses"]
    window: tuple[float, float] = (0.5, 0.9)
    first_block: int | float = 0  # blocks from here on; a float is a share of the depth
    rope: bool = True  # v2a_columns: with rotary positions
    value_weighted: bool = False  # v2a_columns: each key by the norm of its value


@dataclass(frozen=True)
class Needs:
    """What a credit or an objective asks of rollout and update."""

    recordings: tuple[Recording, ...] = ()
    solver: Literal["ode", "sde"] = "ode"
    noise_level: float = 0.0  # a of the stochastic solver
    trajectory: bool = False  # keep every state, with the log-probabilities of steps that were drawn

    def __or__(self, other: Needs) -> Needs:
        stochastic = self if self.solver == "sde" else other
        return Needs(
            tuple(dict.fromkeys((*self.recordings, *other.recordings))),
            stochastic.solver,
            stochastic.noise_level,
            self.trajectory or other.trajectory,
        )


@dataclass(frozen=True)
class Rollout:
    """Clean latents the old policy sampled for a batch of clips, and what was recorded on the way."""

    groups: tuple[PromptGroup, ...]  # clips are in the order of the groups and of their samples
    latents: Latents
    context: TextContext
    conditioning: Conditioning | None = None
    recorded: Mapping[str, Tensor] = field(default_factory=dict)  # name (see `Recording`) -> [B, ...]
    trajectory: Trajectory | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows: slice) -> Rollout:
        """Some clips, with all that belongs to them."""
        return Rollout(
            groups=regrouped([(g.prompt, s) for g in self.groups for s in g.samples][rows]),
            latents=self.latents[rows],
            context=self.context[rows],
            conditioning=None if self.conditioning is None else self.conditioning[rows],
            recorded={name: tensor[rows] for name, tensor in self.recorded.items()},
            trajectory=None if self.trajectory is None else self.trajectory[rows],
        )

    @property
    def clip_keys(self) -> list[tuple[str, int]]:
        """(prompt id, sample number) per clip."""
        return [(g.prompt.id, s) for g in self.groups for s in g.samples]

    @staticmethod
    def cat(parts: Sequence[Rollout]) -> Rollout:
        """All clips in order; batches without given frames get an empty mask beside others'."""
        given = None
        if any(p.conditioning is not None for p in parts):
            given = Conditioning.cat([p.conditioning or _nothing_given(p.latents.video) for p in parts])
        trajectories = [p.trajectory for p in parts if p.trajectory is not None]
        return Rollout(
            groups=tuple(g for p in parts for g in p.groups),
            latents=Latents.cat([p.latents for p in parts]),
            context=TextContext.cat([p.context for p in parts]),
            conditioning=given,
            recorded={name: torch.cat([p.recorded[name] for p in parts]) for name in parts[0].recorded},
            trajectory=Trajectory.cat(trajectories) if trajectories else None,
        )


def regrouped(clips: Sequence[tuple[Prompt, int]]) -> tuple[PromptGroup, ...]:
    """Clips (prompt, sample) in order, neighbours of one prompt as a group."""
    parts: list[PromptGroup] = []
    for prompt, sample in clips:
        if parts and parts[-1].prompt.id == prompt.id:
            parts[-1] = PromptGroup(prompt, (*parts[-1].samples, sample))
        else:
            parts.append(PromptGroup(prompt, (sample,)))
    return tuple(parts)


def _nothing_given(video: Tensor) -> Conditioning:
    return Conditioning(torch.zeros_like(video), torch.zeros(video.shape[:2], dtype=torch.bool, device=video.device))


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

    def read_only(self) -> Clip:
        """This clip, with the same derived views, in arrays that raise ValueError when they are written to."""
        video, waveform = self.video.view(), self.waveform.view()
        video.flags.writeable = waveform.flags.writeable = False
        return replace(self, video=video, waveform=waveform)

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
class Moments:
    """A score over the time of one clip."""

    values: np.ndarray  # [T] float64, NaN where there is none
    seconds: np.ndarray  # [T] float64, rising, middle of what each value judges


@dataclass(frozen=True)
class ScoreTable:
    """Scores of B clips in K components. A missing score is NaN with a reason, never 0."""

    components: tuple[Component, ...]
    values: np.ndarray  # [B, K] float64, NaN where missing
    reasons: dict[tuple[int, int], str] = field(default_factory=dict)  # (clip, component) -> why it is missing
    # (clip, component) -> the score over time, of rewards that localise. No shipped reward fills it yet.
    moments: dict[tuple[int, int], Moments] = field(default_factory=dict)

    @property
    def valid(self) -> np.ndarray:
        """[B, K] bool."""
        return np.isfinite(self.values)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.components)

    def select(self, columns: Sequence[int]) -> ScoreTable:
        """Some components, in the order of `columns`."""
        place = {k: i for i, k in enumerate(columns)}
        return ScoreTable(
            tuple(self.components[k] for k in columns),
            self.values[:, list(columns)],
            {(b, place[k]): why for (b, k), why in self.reasons.items() if k in place},
            {(b, place[k]): moments for (b, k), moments in self.moments.items() if k in place},
        )

    def column(self, name: str) -> np.ndarray:
        return self.values[:, self.names.index(name)]

    @staticmethod
    def cat(tables: list[ScoreTable]) -> ScoreTable:
        """Stack the rows of tables with equal components."""
        for table in tables:
            if table.components != tables[0].components:
                raise ValueError("score tables with different components cannot be stacked")
        offsets = np.cumsum([0, *(len(t.values) for t in tables)]).tolist()
        return ScoreTable(
            tables[0].components,
            np.concatenate([t.values for t in tables]),
            {(b + o, k): why for t, o in zip(tables, offsets, strict=False) for (b, k), why in t.reasons.items()},
            {(b + o, k): m for t, o in zip(tables, offsets, strict=False) for (b, k), m in t.moments.items()},
        )

    @staticmethod
    def join(tables: list[ScoreTable]) -> ScoreTable:
        """Put the columns of several rewards on the same clips side by side."""
        components = tuple(c for t in tables for c in t.components)
        names = [c.name for c in components]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise OmniNFTError(f"two rewards give a component of the same name: {', '.join(twice)}")
        offsets = np.cumsum([0, *(len(t.components) for t in tables)]).tolist()
        return ScoreTable(
            components,
            np.concatenate([t.values for t in tables], axis=1),
            {(b, k + o): why for t, o in zip(tables, offsets, strict=False) for (b, k), why in t.reasons.items()},
            {(b, k + o): m for t, o in zip(tables, offsets, strict=False) for (b, k), m in t.moments.items()},
        )


@dataclass(frozen=True)
class RewardAdvantages(_Batch):
    """Each reward's own advantages, before they are combined into what a branch learns from."""

    values: Tensor  # [B, K] float64, 0 where not valid
    valid: Tensor  # [B, K] bool
    components: tuple[Component, ...]  # K: name, route, weight

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class RewardGradients:
    """Inner products of the K rewards' own gradients in the trained parameters, over all processes.

    A reward that a branch does not hear has zeros there.
    """

    video: Tensor  # [K, K] float64, of the video loss
    audio: Tensor  # [K, K] float64, of the audio loss
    both: Tensor  # [K, K] float64, of their weighted mean


@dataclass(frozen=True)
class TokenWeights(_Batch):
    """How much each token weighs in its branch's loss; None is 1 everywhere."""

    video: Tensor | None = None  # [B, Tv] float32 >= 0
    audio: Tensor | None = None  # [B, Ta] float32 >= 0


@dataclass(frozen=True)
class GradientScales:
    """Factor on the gradient that crosses between the streams, per block; 1 leaves it alone."""

    a2v: tuple[float, ...]  # the video loss's gradient into the audio stream
    v2a: tuple[float, ...]  # the audio loss's gradient into the video stream


@dataclass(frozen=True)
class BranchAdvantages(_Batch):
    """What each branch learns from: advantages, and the clips that had any valid score for the branch."""

    video: Tensor  # [B] float32
    audio: Tensor  # [B] float32
    video_valid: Tensor  # [B] bool
    audio_valid: Tensor  # [B] bool
