"""The current adapter as one LoRA file that every program for LTX-2 takes at full strength.

The form is the common part of what the loaders of diffusers, ComfyUI, WanGP and ltx-core accept: keys are
`diffusion_model.`, the name of the module in the original implementation, and `.lora_A.weight` or `.lora_B.weight`.
Where no alpha is found all of them take alpha = rank, and no way of writing alpha is read by all of them (diffusers
refuses `.alpha` tensors, the others do not read its metadata). So alpha / rank is folded into B, and the alpha that the
adapter was trained with is told in the metadata, where only `read_lora` looks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor

from omninft.config import LoraConfig
from omninft.files import replacing
from omninft.models.adapters import DEFAULT_TARGETS, AdapterSet
from omninft.models.lora_file import FILE_NAME, METADATA_KEY, ORIGINAL_PREFIX, renamed
from omninft.models.lora_file import read_lora as read_lora  # what was written, read


def export_lora(adapters: AdapterSet, folder: Path, adapter: Literal["current", "old"] = "current") -> Path:
    """Write the adapter into `folder`, which is made, and return the file. Equal adapters give equal bytes.

    The file appears under its name when it is whole, and a file of that name is replaced.

    Raises:
        OmniNFTError: the file cannot be written.
    """
    return write_common(adapters.state(adapter), adapters.config, folder)


def write_common(state: Mapping[str, Tensor], config: LoraConfig, folder: Path) -> Path:
    """`export_lora` of tensors by module, with the LoRA that they are."""
    scale = config.alpha / config.rank
    tensors = {}
    for name, tensor in state.items():
        weight = tensor.cpu().float()  # old may be kept in bfloat16
        # Float64 so that only the storing rounds: not at all where alpha / rank is a power of two.
        folded = (weight.double() * scale).float() if name.endswith(".lora_B") else weight
        tensors[f"{ORIGINAL_PREFIX}{renamed(name)}.weight"] = folded.contiguous()
    about = {"rank": config.rank, "alpha": config.alpha, "targets": list(config.targets or DEFAULT_TARGETS)}
    return _write(folder / FILE_NAME, tensors, {METADATA_KEY: json.dumps(about, sort_keys=True)})


def _write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    with replacing(file) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata=metadata)
        # safetensors makes files that only their owner can read; the one made by touch follows the umask.
        temporary.chmod(mode)
    return file
