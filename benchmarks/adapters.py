"""What adapters, masks, quantised weights and 8-bit moments cost, on a random transformer with LTX-2's published flags.

    python -m benchmarks.adapters [--device cuda] [--rounds 5] [--blocks 4] [--tokens 512] [--compile]

Each row holds two ways of the same work against one another, in turn in one process; a ratio above 1 says how many
times longer the second takes (median over the rounds). The base is bfloat16. Bytes are those of the frozen blocks, and
of the optimiser's state. Kinds whose package is missing are left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F

from omninft.config import LoraConfig, OptimiserConfig
from omninft.learning.update import make_optimiser
from omninft.models.adapters import AdaptedLinear, AdapterSet
from omninft.models.compiling import compile_blocks
from omninft.models.protocol import AdapterName
from omninft.models.quantise import PACKAGES, quantise_base
from omninft.types import OmniNFTError

AUDIO_TOKENS, TEXT_TOKENS, CHANNELS, CAPTION = 32, 128, 128, 256


def random_transformer(blocks: int, device: str) -> LTX2VideoTransformer3DModel:
    torch.manual_seed(0)
    model = LTX2VideoTransformer3DModel(
        num_attention_heads=8,
        attention_head_dim=64,
        cross_attention_dim=512,
        audio_num_attention_heads=8,
        audio_attention_head_dim=32,
        audio_cross_attention_dim=256,
        caption_channels=CAPTION,
        num_layers=blocks,
        rope_type="split",
        perturbed_attn=True,
    )
    return model.bfloat16().to(device).requires_grad_(False).eval()


class Work:
    """Forwards, and backwards of current, of one model on fixed inputs."""

    def __init__(self, tokens: int, blocks: int, device: str, kind: Any = None) -> None:
        self.model = random_transformer(blocks, device)
        quantise_base(self.model, kind, device)
        self.bytes = sum(_nbytes(t) for t in (*self.model.transformer_blocks.parameters(),))
        self.adapters = AdapterSet(self.model, LoraConfig(), 0)
        sigma = torch.tensor([500.0], device=device)

        def normal(*shape: int) -> Tensor:
            return torch.randn(1, *shape, device=device, dtype=torch.bfloat16)

        self.inputs = dict(
            hidden_states=normal(tokens, CHANNELS),
            audio_hidden_states=normal(AUDIO_TOKENS, CHANNELS),
            encoder_hidden_states=normal(TEXT_TOKENS, CAPTION),
            audio_encoder_hidden_states=normal(TEXT_TOKENS, CAPTION),
            timestep=sigma,
            audio_timestep=sigma,
            sigma=sigma,
            audio_sigma=sigma,
            num_frames=tokens // 64,
            height=8,
            width=8,
            audio_num_frames=AUDIO_TOKENS,
            use_cross_timestep=True,
            return_dict=False,
        )
        self.ones = torch.ones(1, TEXT_TOKENS, device=device)

    def forward(self, adapter: AdapterName, mask: Tensor | None = None) -> Tensor:
        with self.adapters.using(adapter):
            video, audio = self.model(**self.inputs, encoder_attention_mask=mask, audio_encoder_attention_mask=mask)
        return video.float().square().mean() + audio.float().square().mean()

    def predict(self, mask: Tensor | None = None) -> None:
        with torch.no_grad():
            self.forward("old", mask)

    def learn(self) -> None:
        self.forward("current").backward()  # type: ignore[no-untyped-call]


def _nbytes(tensor: Any) -> int:
    if hasattr(tensor, "quant_state"):
        return tensor.nbytes + tensor.quant_state.absmax.nbytes
    if type(tensor) is not nn.Parameter and hasattr(tensor, "__tensor_flatten__"):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return sum(part.nbytes for part in parts if isinstance(part, Tensor))
    return tensor.nbytes


def float32_products(layer: AdaptedLinear, x: Tensor) -> Tensor:
    """The adapter's products in float32 beside a bfloat16 base."""
    active = layer.switch.active
    made: Tensor = layer.base_layer(x)
    if active == "reference":
        return made
    a, b = layer.lora_A[active].weight, layer.lora_B[active].weight
    return made + (F.linear(F.linear(x.float(), a), b) * layer.scaling[active]).to(x.dtype)


def in_float32(call: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        ours = AdaptedLinear.forward
        AdaptedLinear.forward = float32_products  # type: ignore[method-assign]
        try:
            call()
        finally:
            AdaptedLinear.forward = ours  # type: ignore[method-assign]

    return run


def seconds(call: Callable[[], None], device: str) -> float:
    begin = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def optimiser_step(kind: Any, device: str) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    parameters = [nn.Parameter(torch.randn(32, 4096, device=device)) for _ in range(56)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimiser = make_optimiser(parameters, OptimiserConfig(kind=kind))
    return lambda: optimiser.step() and None, optimiser


def state_bytes(optimiser: torch.optim.Optimizer) -> int:
    return sum(v.nbytes for state in optimiser.state.values() for v in state.values() if isinstance(v, Tensor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of video, a multiple of 64")
    parser.add_argument("--compile", action="store_true", help="blocks by inductor against eager code")
    chosen = parser.parse_args()
    size = chosen.tokens, chosen.blocks, chosen.device
    base = Work(*size)
    rows: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "adapter in bf16 | float32, old predicts": (base.predict, in_float32(base.predict)),
        "adapter in bf16 | float32, current learns": (base.learn, in_float32(base.learn)),
        "no text mask | a mask of ones": (base.predict, lambda: base.predict(base.ones)),
    }
    if chosen.compile:
        compiled = Work(*size)
        compile_blocks(compiled.model)
        rows["compiled | eager, current learns"] = compiled.learn, base.learn
    for kind in PACKAGES:
        try:
            other = Work(*size, kind)
        except OmniNFTError as error:
            print(error)
            continue
        print(f"{kind}: blocks {base.bytes} bytes in bf16, {other.bytes} now ({other.bytes / base.bytes:.3f})")
        rows[f"bf16 | {kind} base, current learns"] = base.learn, other.learn
    plain_step, plain = optimiser_step("adamw", chosen.device)
    try:
        small_step, small = optimiser_step("adamw8bit", chosen.device)
        rows["AdamW | AdamW8bit, a step"] = plain_step, small_step
    except OmniNFTError as error:
        print(error)
        small = None
    for name, pair in rows.items():
        for call in pair:
            call()  # warm-up, and what is compiled
        times = [[seconds(call, chosen.device) for call in pair] for _ in range(chosen.rounds)]
        first, second = (statistics.median(t[i] for t in times) for i in (0, 1))
        print(f"{name:45}{1000 * first:9.1f} ms{1000 * second:9.1f} ms   ratio {second / first:.2f}")
    if small is not None:
        print(f"moments: {state_bytes(plain)} bytes in float32, {state_bytes(small)} in 8 bits")


if __name__ == "__main__":
    main()
