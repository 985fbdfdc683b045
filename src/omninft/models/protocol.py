"""What stages ask of a joint audio-video model. `models/ltx2.py` is one; another family is a folder beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from omninft.config import SamplingConfig
from omninft.types import Conditioning, Geometry, Latents, Modality, OmniNFTError, Recording, TextContext

# current is trained, old samples, reference is the model without adapter.
AdapterName = Literal["current", "old", "reference"]
TrainedName = Literal["current", "old"]
# joint: the model as it is (conditional or not is a matter of the context); stg: self-attention of some blocks
# replaced by its values; isolated: the cross-modal attentions switched off.
Mode = Literal["joint", "stg", "isolated"]
Direction = Literal["a2v", "v2a"]


class Trainables(Protocol):
    """The trained parameters in their three roles. LoRA is one way; full or sharded weights would be others."""

    def state(self, name: TrainedName) -> dict[str, Tensor]:
        """Parameters by module name; views, not copies."""
        ...

    def load_state(self, name: TrainedName, state: dict[str, Tensor]) -> None:
        """Overwrite. Raises OmniNFTError: names or shapes differ."""
        ...

    def mix(self, decay: float) -> None:
        """old <- decay * old + (1 - decay) * current."""
        ...

    def using(self, name: AdapterName) -> AbstractContextManager[None]:
        """Forwards and backwards inside read this one."""
        ...

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters of `current`, in a fixed order."""
        ...


@dataclass(frozen=True)
class CrossSite:
    """One attention that reads the other stream: where gradient crosses, and where attention between streams is seen.

    `a2v`: queries video, keys and values audio. `v2a`: the reverse. Modules are looked up at each call, so that one
    that was replaced since is noticed.
    """

    block: int
    direction: Direction
    parent: nn.Module  # the transformer block
    attention: str  # the module's name in it
    projections: tuple[str, ...] = ("to_k", "to_v")  # what projects the other stream

    def find(self, path: str) -> nn.Module:
        """The module at `path` below the block. Raises OmniNFTError: there is none."""
        module = self.parent
        for name in path.split("."):
            child = getattr(module, name, None)
            if not isinstance(child, nn.Module):
                raise OmniNFTError(f"block {self.block} ({type(self.parent).__name__}) has no module {path!r}")
            module = child
        return module


class Recorder(Protocol):
    """Collects something of the model's forwards while `recording` is set."""

    recording: bool

    def collect(self) -> Mapping[str, Tensor]:
        """What was recorded, by name, [B, ...]; starts anew. Raises OmniNFTError: nothing was."""
        ...


class JointPolicy(Protocol):
    """A model that denoises video and audio together, with the parameters that are trained in it."""

    @property
    def device(self) -> torch.device: ...

    @property
    def trainables(self) -> Trainables: ...

    @property
    def sites(self) -> tuple[CrossSite, ...]:
        """Every place where the streams read each other, block by block."""
        ...

    @property
    def facts(self) -> Mapping[str, int]:
        """Counts for people: blocks, lora_modules, lora_parameters."""
        ...

    def geometry(self, sampling: SamplingConfig) -> Geometry:
        """Sizes of the clips. Raises OmniNFTError: a size that the autoencoders cannot take."""
        ...

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """Raises OmniNFTError: guidance that this model would silently ignore."""
        ...

    def sigmas(self, num_steps: int, geometry: Geometry, shift_tokens: int | None = None) -> Tensor:
        """The sampling schedule, [num_steps + 1] float32, 1 down to 0, shifted for so many tokens or the clip's."""
        ...

    def encode(self, prompts: Sequence[str]) -> TextContext:
        """Text contexts of the prompts, in order."""
        ...

    def encode_first_frame(self, frames: Tensor, geometry: Geometry) -> Conditioning:
        """Condition on given first frames, uint8 [B, H, W, 3]."""
        ...

    def velocity(
        self,
        latents: Latents,
        sigma: Tensor,
        context: TextContext,
        geometry: Geometry,
        adapter: AdapterName,
        conditioning: Conditioning | None = None,
        mode: Mode = "joint",
        stg_blocks: Sequence[int] = (),
    ) -> Latents:
        """eps - x0 of noisy latents at `sigma` [B] float32, both streams, float32. Given tokens have sigma 0."""
        ...

    def decode(self, latents: Latents, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
        """Frames uint8 [B, T, H, W, 3] and waveforms float32 [B, channels, N] in -1..1."""
        ...

    def stream_of(self, parameter: str) -> Modality:
        """Which stream the module that owns this parameter writes to."""
        ...

    def recorder(self, recording: Recording) -> Recorder:
        """Hooks that record. Raises OmniNFTError: blocks that there are not."""
        ...
