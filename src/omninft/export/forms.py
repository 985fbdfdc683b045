"""The other forms of a trained adapter: a folder as PEFT writes it, and full weights with the adapter added to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from omninft.config import LoraConfig, ModelConfig
from omninft.models.adapters import peft_config
from omninft.models.loading import load_transformer, open_source, stored_dtype
from omninft.models.lora_file import PEFT_CONFIG, PEFT_FILE, bind, lora_shapes
from omninft.types import OmniNFTError

TRANSFORMER = "transformer"  # the sub-folder of merged weights


def write_peft(state: Mapping[str, Tensor], config: LoraConfig, folder: Path, base: str | None = None) -> Path:
    """Write adapter_model.safetensors and adapter_config.json into an empty folder, alpha apart.

    Args:
        state: tensors by module, e.g. `transformer_blocks.0.attn1.to_q.lora_A`.
        config: their rank, alpha and targets.
        folder: is made.
        base: hub id or path of the model it belongs to, which PEFT keeps.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{n}.weight": t.cpu().float().contiguous() for n, t in state.items()}
    save_file(tensors, folder / PEFT_FILE, metadata={"format": "pt"})
    about = peft_config(config).to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    text = json.dumps(about, indent=2, sort_keys=True, default=_plain)
    (folder / PEFT_CONFIG).write_text(text + "\n", encoding="utf-8")
    return folder


def write_merged(
    state: Mapping[str, Tensor], config: LoraConfig, model: ModelConfig, folder: Path, dtype: str = "auto"
) -> Path:
    """Write W + alpha / rank * B A of all weights as a diffusers transformer, in `folder`/transformer.

    Sums are taken in float32 and stored in `dtype`: "auto" (that of the base's files), "float32" or "bfloat16". In
    bfloat16 what the adapter adds to a weight is rounded to about a 256th of that weight.

    Returns:
        The transformer's folder.

    Raises:
        OmniNFTError: a quantised base, or modules that it does not have.
    """
    if model.quantise is not None:
        raise OmniNFTError(
            f"merged: the adapter was trained on a base in {model.quantise} (model.quantise), whose rounding it makes "
            "up for; added to other weights it is another model. Export it as common or peft, or evaluate it on the "
            "full weights first and merge it with model.quantise=null"
        )
    source = open_source(model)
    stored = stored_dtype(source, model)
    kept = stored if dtype == "auto" else getattr(torch, dtype)
    transformer: Any = load_transformer(source, model, "cpu", torch.promote_types(stored, kept))
    bound = bind(state, lora_shapes(transformer, config.rank), "merged")
    scale = config.alpha / config.rank
    for name in sorted({n.rpartition(".")[0] for n in state}):
        weight = transformer.get_submodule(name).weight
        added = scale * bound[f"{name}.lora_B"].float() @ bound[f"{name}.lora_A"].float()
        weight.copy_(weight.float() + added)
    transformer.to(kept).save_pretrained(folder / TRANSFORMER)
    return folder / TRANSFORMER


def _plain(value: Any) -> Any:
    """What JSON has no word for: PEFT's sets and enumerations."""
    return sorted(value) if isinstance(value, set) else str(value)
