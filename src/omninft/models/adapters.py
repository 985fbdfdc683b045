"""Current, old and reference policy as low-rank adapters on one frozen base.

PEFT keeps the adapters (names, files, loading elsewhere); which one a forward uses is an argument here, never ambient
state. PEFT's own switches are avoided on purpose: `set_adapter("old")` makes *old* trainable and *current* frozen, and
`disable_adapter()` clears `requires_grad` on all, so that gradients of *current* can silently come out as None.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

from omninft.config import LoraConfig
from omninft.models.protocol import AdapterName, TrainedName
from omninft.naming import did_you_mean
from omninft.types import OmniNFTError

ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
FEED_FORWARDS = ("ff", "audio_ff")
# The reference code's 28 linears of a block.
DEFAULT_TARGETS = tuple(f"{a}.{p}" for a in ATTENTIONS for p in ("to_q", "to_k", "to_v", "to_out.0")) + tuple(
    f"{f}.{p}" for f in FEED_FORWARDS for p in ("net.0.proj", "net.2")
)


@dataclass
class Switch:
    """Which adapter forwards read: one object for all layers, so that a compiled block sees a value, not a layer."""

    active: AdapterName = "reference"


class AdaptedLinear(LoraLinear):
    """A linear of any kind (plain, torchao, bitsandbytes) with its adapters: y = x W^T + b + s (x A^T) B^T.

    Adapters multiply in the dtype of what the base makes, from whatever dtype they are kept in. On a plain float32
    weight they are folded, y = x (W + s B A)^T + b, where a call sees more tokens than the layer has features: one
    product instead of three; for *old*, which is fixed during an iteration, the folded weight is kept. Elsewhere the
    products stay apart: bfloat16 would round the update away, a quantised weight cannot be folded, and a compiler has
    to see one graph.
    """

    switch: Switch
    foldable: bool
    merged_old: Tensor | None

    def set_up(self, switch: Switch) -> None:
        """After the adapters were added."""
        self.switch, self.merged_old = switch, None
        weight = self.base_layer.weight
        self.foldable = (
            type(self.base_layer) is nn.Linear and type(weight) is nn.Parameter and weight.dtype == torch.float32
        )

    def forward(self, x: Tensor) -> Tensor:
        active = self.switch.active
        if active == "reference":
            made: Tensor = self.base_layer(x)
            return made
        if self.foldable and not torch.compiler.is_compiling() and x.shape[:-1].numel() > self.in_features:
            return F.linear(x, self._folded(active), self.base_layer.bias)
        rows = x.reshape(-1, x.shape[-1])
        made = self.base_layer(rows)
        a, b = (part[active].weight.to(made.dtype) for part in (self.lora_A, self.lora_B))
        made = torch.addmm(made, rows.to(made.dtype) @ a.t(), b.t(), alpha=self.scaling[active])
        return made.reshape(*x.shape[:-1], made.shape[-1])

    def _folded(self, active: AdapterName) -> Tensor:
        if active == "old" and self.merged_old is not None:
            return self.merged_old
        weight = self.base_layer.weight
        a, b = (part[active].weight.to(weight.dtype) for part in (self.lora_A, self.lora_B))
        folded = torch.addmm(weight, b, a, alpha=self.scaling[active])
        if active == "old":
            self.merged_old = folded = folded.detach()
        return folded


class AdapterSet:
    """The adapters of a transformer. `current` is trained, `old` samples, `reference` is the base alone.

    Adapters are float32 whatever the base's dtype (`old` may be kept in bfloat16: half the memory, and then not exactly
    what current was); `B` starts at 0, so that all three policies start out equal.
    """

    def __init__(
        self, transformer: nn.Module, config: LoraConfig, seed: int, old_dtype: torch.dtype = torch.float32
    ) -> None:
        self.transformer = transformer
        self.config = config
        _require_targets(transformer, config)
        peft = peft_config(config)
        peft._register_custom_module({nn.Linear: AdaptedLinear})
        # The draw of A is keyed by the run's seed and leaves torch's own generator as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                for name in ("current", "old"):
                    transformer.add_adapter(peft, adapter_name=name)  # type: ignore[operator]
        self.layers = [m for m in transformer.modules() if isinstance(m, AdaptedLinear)]
        if not self.layers:
            raise OmniNFTError(f"no module matches the LoRA targets {list(config.targets or DEFAULT_TARGETS)}")
        self._switch = Switch()
        for layer in self.layers:
            layer.set_up(self._switch)
            for part in (layer.lora_A, layer.lora_B):
                part["current"].float()
                part["old"].to(old_dtype)
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(".current." in name)
        self.copy("current", "old")

    @property
    def active(self) -> AdapterName:
        """What a forward reads now."""
        return self._switch.active

    def state(self, name: TrainedName) -> dict[str, Tensor]:
        """Parameters of an adapter by module name, e.g. `transformer_blocks.0.attn1.to_q.lora_A`."""
        mark = f".{name}."
        return {
            n.replace(f"{mark}weight", ""): p.detach()
            for n, p in self.transformer.named_parameters()
            if mark in n and ".lora_" in n
        }

    def load_state(self, name: TrainedName, state: dict[str, Tensor]) -> None:
        """Overwrite an adapter.

        Raises:
            OmniNFTError: names or shapes differ.
        """
        mine = self.state(name)
        if mine.keys() != state.keys():
            odd = sorted(mine.keys() ^ state.keys())[:3]
            raise OmniNFTError(f"adapter {name}: tensors do not match this model, e.g. {', '.join(odd)}")
        for key, tensor in state.items():
            if mine[key].shape != tensor.shape:
                raise OmniNFTError(
                    f"adapter {name}: {key} has shape {list(tensor.shape)}, expected {list(mine[key].shape)}"
                )
            mine[key].copy_(tensor)
        self._forget_merged()

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, in a fixed order."""
        return [p for p in self.transformer.parameters() if p.requires_grad]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Name and trained parameter, in the order of `parameters()`."""
        return [(n, p) for n, p in self.transformer.named_parameters() if p.requires_grad]

    def copy(self, source: TrainedName, target: TrainedName) -> None:
        """Make `target` equal to `source`."""
        self.load_state(target, self.state(source))

    def mix(self, decay: float) -> None:
        """old <- decay * old + (1 - decay) * current."""
        current, old = self.state("current"), self.state("old")
        for key, tensor in old.items():
            # In this order, and not as a lerp, decay 0 gives exactly current; in float32 whatever old is kept in.
            tensor.copy_((tensor.float() * decay).add_(current[key], alpha=1 - decay))
        self._forget_merged()

    @contextmanager
    def using(self, name: AdapterName) -> Iterator[None]:
        """Forwards inside read this adapter. A backward inside recomputes (checkpointing) with it as well."""
        before, self._switch.active = self._switch.active, name
        try:
            yield
        finally:
            self._switch.active = before

    def _forget_merged(self) -> None:
        for layer in self.layers:
            layer.merged_old = None


def _require_targets(transformer: nn.Module, config: LoraConfig) -> None:
    """PEFT passes over a target that names nothing as long as another one does."""
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    unknown = [t for t in config.targets or () if not any(f".{name}".endswith(f".{t}") for name in linears)]
    if unknown:
        there = sorted({re.sub(r"^transformer_blocks\.\d+\.", "", name) for name in linears})
        hint = did_you_mean(unknown[0], there)
        raise OmniNFTError(
            f"model.lora.targets: found {unknown[0]!r:.100}, which names no linear layer of the model{hint}; "
            f"there are {', '.join(there)}"
        )


def peft_config(config: LoraConfig) -> PeftLoraConfig:
    """The same adapter as PEFT describes it."""
    return PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        init_lora_weights="gaussian",
        target_modules=list(config.targets or DEFAULT_TARGETS),
    )
