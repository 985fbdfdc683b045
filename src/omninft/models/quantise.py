"""The frozen linears of the transformer's blocks in 8 or 4 bits, before adapters are added.

Norms, embeddings, modulation, the projections in and out and the attention gates stay as they are: they are small, and
all of a step goes through them. What is left over keeps its dtype, in which products are taken and adapters multiply.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from omninft.types import OmniNFTError

Kind = Literal["int8", "float8", "nf4"]

PACKAGES: dict[Kind, str] = {"int8": "torchao", "float8": "torchao", "nf4": "bitsandbytes"}
_STAY = ("to_gate_logits",)


def quantise_base(transformer: nn.Module, kind: Kind | None, device: torch.device | str) -> None:
    """Quantise the weights in place, linear by linear on `device`, where they then lie; None leaves all alone.

    Raises:
        OmniNFTError: the package is missing or does not import.
    """
    if kind is None:
        return
    try:
        quantised = _by_bitsandbytes if kind == "nf4" else _by_torchao
        quantised(transformer, kind, torch.device(device))
    except ImportError as error:
        raise OmniNFTError(
            f"model.quantise: {kind} needs {PACKAGES[kind]} ({error}); pip install 'omninft[quantised]'"
        ) from error


def block_linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The linears that are quantised, by name."""
    blocks: Any = transformer.transformer_blocks
    return {
        f"transformer_blocks.{name}": module
        for name, module in blocks.named_modules()
        if type(module) is nn.Linear and not name.endswith(_STAY)
    }


def _by_torchao(transformer: nn.Module, kind: Kind, device: torch.device) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    for linear in block_linears(transformer).values():
        quantize_(linear.to(device), config)
        linear.weight.requires_grad_(False)


def _by_bitsandbytes(transformer: nn.Module, kind: Kind, device: torch.device) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in block_linears(transformer).items():
        made = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            quant_type=kind,
            device="meta",
        )
        made.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type=kind)
        made.bias = linear.bias
        parent, _, own = name.rpartition(".")
        setattr(transformer.get_submodule(parent), own, made.to(device).requires_grad_(False))
