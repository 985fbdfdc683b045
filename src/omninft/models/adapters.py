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


class AdapterSet:
    """The adapters of a transformer. `current` is trained, `old` samples, `reference` is the base alone.

    Adapters are float32 whatever the base's dtype; `B` starts at 0, so that all three policies start out equal.
    """

    def __init__(self, transformer: nn.Module, config: LoraConfig, seed: int) -> None:
        self.transformer = transformer
        self.config = config
        _require_targets(transformer, config)
        peft = peft_config(config)
        # The draw of A is keyed by the run's seed and leaves torch's own generator as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                for name in ("current", "old"):
                    transformer.add_adapter(peft, adapter_name=name)  # type: ignore[operator]
        self.layers: list[LoraLinear] = [m for m in transformer.modules() if isinstance(m, LoraLinear)]
        if not self.layers:
            raise OmniNFTError(f"no module matches the LoRA targets {list(config.targets or DEFAULT_TARGETS)}")
        for layer in self.layers:
            for part in (layer.lora_A, layer.lora_B):
                part.float()
        self._forwards = [_AdapterLinear(layer) for layer in self.layers]
        for layer, forward in zip(self.layers, self._forwards, strict=True):
            layer.forward = forward  # type: ignore[method-assign]
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(".current." in name)
        self.copy("current", "old")
        self._active: AdapterName = "reference"

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
            # In this order, and not as a lerp, decay 0 gives exactly current.
            tensor.mul_(decay).add_(current[key], alpha=1 - decay)
        self._forget_merged()

    @contextmanager
    def using(self, name: AdapterName) -> Iterator[None]:
        """Forwards inside read this adapter. A backward inside recomputes (checkpointing) with it as well."""
        before = self._active
        self._set(name)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, name: AdapterName) -> None:
        self._active = name
        for forward in self._forwards:
            forward.active = name

    def _forget_merged(self) -> None:
        for forward in self._forwards:
            forward.merged_old = None


class _AdapterLinear:
    """Forward of one adapted linear, with the adapter folded into the weight: y = x (W + s B A)^T + b.

    One product instead of three, and for *old*, which is fixed during an iteration, the folded weight is kept. Folding
    pays where a call sees more tokens than the layer has features; elsewhere, and wherever the base is not a plain
    float32 weight (bfloat16 would round the update away, a quantised weight cannot be folded), the products stay apart.
    """

    def __init__(self, layer: LoraLinear) -> None:
        self.layer = layer
        self.active: AdapterName = "reference"
        self.merged_old: Tensor | None = None
        base = layer.get_base_layer()
        self.foldable = type(base) is nn.Linear and base.weight.dtype == torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        base = self.layer.get_base_layer()
        if self.active == "reference":
            return base(x)
        a, b = self.layer.lora_A[self.active].weight, self.layer.lora_B[self.active].weight
        scale = self.layer.scaling[self.active]
        if not (self.foldable and x.shape[:-1].numel() > base.in_features):
            return base(x) + (F.linear(F.linear(x.to(a.dtype), a), b) * scale).to(x.dtype)
        if self.active == "old":
            if self.merged_old is None:
                self.merged_old = torch.add(base.weight, b @ a, alpha=scale).detach()
            return F.linear(x, self.merged_old, base.bias)
        return F.linear(x, torch.add(base.weight, b @ a, alpha=scale), base.bias)


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
