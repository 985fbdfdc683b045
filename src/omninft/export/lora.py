"""The current adapter as one LoRA file that every program for LTX-2 takes at full strength.

The form is the common part of what the loaders of diffusers, ComfyUI, WanGP and ltx-core accept: keys are
`diffusion_model.`, the name of the module in the original implementation, and `.lora_A.weight` or `.lora_B.weight`.
Where no alpha is found all of them take alpha = rank, and no way of writing alpha is read by all of them (diffusers
refuses `.alpha` tensors, the others do not read its metadata). So alpha / rank is folded into B, and the alpha that the
adapter was trained with is told in the metadata, where only `read_lora` looks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omninft.config import LoraConfig
from omninft.files import parse_json, replacing
from omninft.models.adapters import DEFAULT_TARGETS, AdapterSet
from omninft.types import OmniNFTError

FILE_NAME = "pytorch_lora_weights.safetensors"
# The only metadata key: safetensors writes several in a random order, and equal adapters shall give equal files.
# diffusers' own `lora_adapter_metadata` is left out. It would have to say alpha = rank, which is assumed without it.
METADATA_KEY = "omninft_lora"
_PREFIX = "diffusion_model."
# Modules that diffusers renamed, all of them beside the blocks: theirs to the original. Names within a block that can
# carry a LoRA are the same in both, the default targets among them.
_ORIGINAL_NAMES = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
}
_DIFFUSERS_NAMES = {original: name for name, original in _ORIGINAL_NAMES.items()}
_ENDINGS = (".lora_A", ".lora_B")


def export_lora(adapters: AdapterSet, folder: Path, adapter: Literal["current", "old"] = "current") -> Path:
    """Write the adapter into `folder`, which is made, and return the file. Equal adapters give equal bytes.

    The file appears under its name when it is whole, and a file of that name is replaced.

    Raises:
        OmniNFTError: the file cannot be written.
    """
    config = adapters.config
    scale = config.alpha / config.rank
    tensors = {}
    for name, tensor in adapters.state(adapter).items():
        weight = tensor.cpu().float()  # old may be kept in bfloat16
        # Float64 so that only the storing rounds: not at all where alpha / rank is a power of two.
        folded = (weight.double() * scale).float() if name.endswith(".lora_B") else weight
        tensors[f"{_PREFIX}{_renamed(name, _ORIGINAL_NAMES)}.weight"] = folded.contiguous()
    about = {"rank": config.rank, "alpha": config.alpha, "targets": list(config.targets or DEFAULT_TARGETS)}
    return _write(folder / FILE_NAME, tensors, {METADATA_KEY: json.dumps(about, sort_keys=True)})


def read_lora(path: Path) -> tuple[dict[str, Tensor], LoraConfig]:
    """An exported adapter (float32, alpha not folded in) and its rank, alpha and targets, for `AdapterSet.load_state`.

    Takes what `export_lora` writes and what it wrote before: keys that start with `transformer.`, alpha apart in
    diffusers' metadata. The adapter comes back bit for bit where alpha / rank is a power of two (or alpha apart);
    otherwise a value of B can be off by one unit in the last place, from the rounding of alpha / rank * B in the file.

    Raises:
        OmniNFTError: no such file, neither of the two forms, or tensors of other shapes or not finite.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise OmniNFTError(f"no LoRA at {file}; expected a folder with {FILE_NAME} or a .safetensors file")
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {key: handle.get_tensor(key).to(torch.float32) for key in handle.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise OmniNFTError(f"{file}: cannot be read as a safetensors file ({error})") from error
    if METADATA_KEY not in metadata:
        config = _config(file, metadata, "lora_adapter_metadata", ("transformer.r", "transformer.lora_alpha"))
        return _by_module(file, tensors, "transformer.", config.rank), config
    config = _config(file, metadata, METADATA_KEY, ("rank", "alpha"))
    named = _by_module(file, tensors, _PREFIX, config.rank)
    state = {_renamed(name, _DIFFUSERS_NAMES): tensor for name, tensor in named.items()}
    scale = config.alpha / config.rank
    return {n: (t.double() / scale).float() if n.endswith(".lora_B") else t for n, t in state.items()}, config


def _config(file: Path, metadata: dict[str, str], key: str, names: tuple[str, str]) -> LoraConfig:
    """The LoRA's description; `names` are those of rank and alpha in the JSON text under `key`."""
    rank, alpha = names
    try:
        about = parse_json(metadata[key])
        targets = about["targets" if key == METADATA_KEY else "transformer.target_modules"]
        return LoraConfig(rank=about[rank], alpha=about[alpha], targets=tuple(targets))
    except (KeyError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise OmniNFTError(
            f"{file} does not say its rank, alpha and targets ({type(error).__name__}: {why}); without alpha its "
            "strength would be a guess. Expected a LoRA written by omninft, or by diffusers with adapter metadata"
        ) from error


def _by_module(file: Path, tensors: dict[str, Tensor], prefix: str, rank: int) -> dict[str, Tensor]:
    """Tensors without `prefix` and `.weight`, e.g. `transformer_blocks.0.attn1.to_q.lora_A`."""
    if not tensors:
        raise OmniNFTError(f"{file}: found no tensors, expected names like {prefix}MODULE.lora_A.weight")
    for key, tensor in sorted(tensors.items()):
        if not (key.startswith(prefix) and key.removesuffix(".weight").endswith(_ENDINGS)):
            raise OmniNFTError(f"{file}: found the tensor {key}, expected names like {prefix}MODULE.lora_A.weight")
        found = tensor.shape["lora_B" in key] if tensor.ndim == 2 else None
        if found != rank:
            shape = f"[{rank}, features]" if "lora_A" in key else f"[features, {rank}]"
            raise OmniNFTError(f"{file}: {key} has shape {list(tensor.shape)}, expected {shape}")
        if not tensor.isfinite().all():
            raise OmniNFTError(f"{file}: {key} holds values that are not finite")
    return {key.removeprefix(prefix).removesuffix(".weight"): tensor for key, tensor in tensors.items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    first, dot, rest = name.partition(".")
    return names.get(first, first) + dot + rest


def _write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    with replacing(file) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata=metadata)
        # safetensors makes files that only their owner can read; the one made by touch follows the umask.
        temporary.chmod(mode)
    return file
