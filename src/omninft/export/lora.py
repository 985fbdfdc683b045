"""The current adapter as a LoRA file for stock diffusers: `pipe.load_lora_weights(folder)`.

diffusers' own writer leaves alpha out unless told, and its loader then assumes alpha = rank, so that a LoRA of rank 4
and alpha 8 comes back at half strength without an error. Files written here carry the adapter's full description.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import LTX2Pipeline
from safetensors import safe_open
from torch import Tensor

from omninft.config import LoraConfig
from omninft.models.adapters import AdapterSet, peft_config
from omninft.types import OmniNFTError

FILE_NAME = "pytorch_lora_weights.safetensors"


def export_lora(adapters: AdapterSet, folder: Path, adapter: str = "current") -> Path:
    """Write the adapter and return the file. It holds the LoRA config, so that rank and alpha survive loading."""
    state = {
        f"{name}.weight": tensor.cpu().contiguous()
        for name, tensor in adapters.state(adapter).items()  # type: ignore[arg-type]
    }
    config = peft_config(adapters.config).to_dict()
    metadata = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items() if _plain(v)}
    folder.mkdir(parents=True, exist_ok=True)
    LTX2Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=state,
        weight_name=FILE_NAME,
        transformer_lora_adapter_metadata=metadata,
        safe_serialization=True,
    )
    return folder / FILE_NAME


def _plain(value: object) -> bool:
    if isinstance(value, set | list | tuple):
        return all(isinstance(v, str | int | float | bool) for v in value)
    return value is None or isinstance(value, str | int | float | bool)


def read_lora(path: Path) -> tuple[dict[str, Tensor], LoraConfig]:
    """An exported adapter and its rank, alpha and targets, for `AdapterSet.load_state`.

    Raises:
        OmniNFTError: no such file, or one that does not carry its own alpha.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise OmniNFTError(f"no LoRA at {file}; expected a folder with {FILE_NAME} or a .safetensors file")
    with safe_open(file, framework="pt") as handle:
        header = json.loads((handle.metadata() or {}).get("lora_adapter_metadata", "{}"))
        state = {
            key.removeprefix("transformer.").removesuffix(".weight"): handle.get_tensor(key).float()
            for key in handle.keys()  # noqa: SIM118 (not a dict)
        }
    try:
        rank, alpha = int(header["transformer.r"]), float(header["transformer.lora_alpha"])
        targets = tuple(header["transformer.target_modules"])
    except KeyError as error:
        raise OmniNFTError(
            f"{file} does not say its {error.args[0].removeprefix('transformer.')}; without alpha its strength "
            "would be a guess. Expected a LoRA written by omninft or by diffusers with adapter metadata"
        ) from error
    return {k: v.to(torch.float32) for k, v in state.items()}, LoraConfig(rank=rank, alpha=alpha, targets=targets)
