"""LoRA files of any program that makes them for LTX-2, as the adapters of this model.

| form | keys |
|---|---|
| common (ours, ComfyUI, ltx-core) | `diffusion_model.` + original module names, or these alone |
| diffusers | `transformer.` + diffusers' names |
| PEFT folder | `base_model.model.` + diffusers' names, with adapter_config.json |
| kohya | `lora_unet_` + original names with underscores |

The matrices are called lora_A and lora_B or lora_down and lora_up. Alpha is a tensor beside them, in the metadata, or
in adapter_config.json. Where a file of original names has none, every program takes alpha = rank, and so it is here; a
file of diffusers' names without alpha is refused, because such files were written with alpha apart.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from omninft.config import LoraConfig
from omninft.files import first_problem, parse_json, read_json
from omninft.models.adapters import DEFAULT_TARGETS
from omninft.models.originals import ORIGINAL_NAMES
from omninft.types import OmniNFTError

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# The only metadata key of our files: safetensors writes several in a random order, and equal adapters shall give equal
# files. diffusers' own `lora_adapter_metadata` is left out: it would have to say alpha = rank, assumed without it.
METADATA_KEY = "omninft_lora"
ORIGINAL_PREFIX = "diffusion_model."
_DIFFUSERS_NAMES = {original: name for name, original in ORIGINAL_NAMES.items()}
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
_KOHYA = "lora_unet_"
_DOWN_UP = re.compile(
    r"(?P<module>.+)\.(?:(?P<A>lora_A|lora_down|lora\.down)|(?P<B>lora_B|lora_up|lora\.up))(?:\.default)?(?:\.weight)?"
)
_EMBEDDER = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
_LINEARS = (*DEFAULT_TARGETS, *(f"{t.split('.')[0]}.to_gate_logits" for t in DEFAULT_TARGETS if t.endswith("to_q")))
_SHOWN = 3  # names in an error


def read_lora(path: Path, alpha: float | None = None) -> tuple[dict[str, Tensor], LoraConfig]:
    """An adapter (float32, alpha not folded in) by module, with its rank, alpha and targets.

    What `export_lora` wrote comes back bit for bit where alpha / rank is a power of two; otherwise a value of B can be
    off by one unit in the last place, from the rounding of alpha / rank * B in the file.

    Args:
        path: a file, a PEFT folder, or a folder with one LoRA.
        alpha: of a file that does not say it; it takes the place of what a file says.

    Raises:
        OmniNFTError: no such file, tensors that are no LoRA's, modules of several ranks, or no word of alpha.
    """
    file = lora_file(path)
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {key: handle.get_tensor(key).to(torch.float32) for key in handle.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise OmniNFTError(f"{file}: cannot be read as a safetensors file ({error})") from error
    if not tensors:
        raise OmniNFTError(f"{file}: found no tensors, expected names like {ORIGINAL_PREFIX}MODULE.lora_A.weight")
    for key, tensor in sorted(tensors.items()):
        if not tensor.isfinite().all():
            raise OmniNFTError(f"{file}: {key} holds values that are not finite")
    if METADATA_KEY in metadata:
        return _own(file, tensors, metadata[METADATA_KEY])
    modules = _by_module(file, tensors)
    rank = _rank(file, modules)
    try:
        scale = _scales(file, modules, _description(file, metadata), rank, alpha)
        common = Counter(scale.values()).most_common(1)[0][0]
        config = LoraConfig(rank=rank, alpha=common * rank, targets=targets_of(modules))
    except (RuntimeError, TypeError, ValueError) as error:
        why = first_problem(error) if isinstance(error, ValueError) else error
        raise OmniNFTError(f"{file}: its rank {rank} or its alpha is no LoRA's ({why})") from error
    state = {}
    for name, parts in sorted(modules.items()):
        state[f"{name}.lora_A"] = parts["A"]
        state[f"{name}.lora_B"] = parts["B"] if scale[name] == common else parts["B"] * (scale[name] / common)
    return state, config


def lora_file(path: Path) -> Path:
    """The file of a LoRA: itself, or the one in a folder (PEFT's, ours, a run's, or the only .safetensors).

    Raises:
        OmniNFTError: there is none, or several.
    """
    if path.is_dir():
        names = (PEFT_FILE, FILE_NAME, f"export/{FILE_NAME}")
        found = [path / name for name in names if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
        if len(found) == 1 or (found and found[0].name in (PEFT_FILE, FILE_NAME)):
            return found[0]
        if found:
            raise OmniNFTError(f"{path}: found {len(found)} .safetensors files, expected one LoRA; name the file")
        path = path / FILE_NAME
    if not path.is_file():
        raise OmniNFTError(f"no LoRA at {path}; expected a .safetensors file, or a folder with {FILE_NAME} or PEFT's")
    return path


def renamed(name: str, names: Mapping[str, str] = ORIGINAL_NAMES) -> str:
    """A module's name with its first part looked up: names within blocks that take a LoRA are the same everywhere."""
    first, dot, rest = name.partition(".")
    return names.get(first, first) + dot + rest


def targets_of(modules: Iterable[str]) -> tuple[str, ...]:
    """Targets that match these modules: names within a block where every block has the same, else whole names."""
    names = set(modules)
    blocks: dict[str, set[str]] = {}
    for name in names:
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
        if match is None:
            return tuple(sorted(names))
        blocks.setdefault(match[1], set()).add(match[2])
    kinds = {frozenset(found) for found in blocks.values()}
    if len(kinds) != 1:
        return tuple(sorted(names))
    (kind,) = kinds
    return DEFAULT_TARGETS if kind == set(DEFAULT_TARGETS) else tuple(sorted(kind))


def at_rank(state: Mapping[str, Tensor], file: LoraConfig, run: LoraConfig) -> dict[str, Tensor]:
    """A LoRA as an adapter of `run`'s alpha: B is scaled, so that the model it starts as is the file's.

    Raises:
        OmniNFTError: another rank.
    """
    if file.rank != run.rank:
        raise OmniNFTError(
            f"model.lora.init: {run.init} has rank {file.rank}, not {run.rank}; set model.lora.rank={file.rank}"
        )
    ratio = (file.alpha / file.rank) / (run.alpha / run.rank)
    return {n: t * ratio if n.endswith(".lora_B") and ratio != 1 else t for n, t in state.items()}


def bind(
    state: Mapping[str, Tensor], mine: Mapping[str, Tensor], where: str, partial: bool = False
) -> dict[str, Tensor]:
    """The tensors of a LoRA in the place of an adapter's; modules that it does not have stay as they are, with B = 0.

    Args:
        state: of the file.
        mine: of the adapter, by the same names.
        where: the file, for errors.
        partial: leave out what this model has no place for.

    Raises:
        OmniNFTError: nothing binds, or not all of it and not `partial`; the names are listed.
    """
    fits = {n: t for n, t in state.items() if n in mine and mine[n].shape == t.shape}
    lost = sorted(state.keys() - fits.keys())
    if not fits or (lost and not partial):
        told = ", ".join(
            f"{n} {list(state[n].shape)}" + (f" (here {list(mine[n].shape)})" if n in mine else "")
            for n in lost[:_SHOWN]
        )
        raise OmniNFTError(
            f"{where}: {len(lost)} of {len(state)} tensors have no place in this model's adapters: {told}"
            + (", ..." if len(lost) > _SHOWN else "")
            + ("; model.lora.init_partial=true takes the rest" if fits else "")
        )
    zero = {n: torch.zeros_like(t) for n, t in mine.items() if n.endswith(".lora_B")}
    return {**mine, **zero, **fits}


def lora_shapes(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """The tensors, without memory, of an adapter of this rank on every linear of a model (plain or quantised)."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            found[f"{name}.lora_A"] = torch.empty(rank, int(module.in_features), device="meta")
            found[f"{name}.lora_B"] = torch.empty(int(module.out_features), rank, device="meta")
    return found


def _own(file: Path, tensors: dict[str, Tensor], text: str) -> tuple[dict[str, Tensor], LoraConfig]:
    try:
        about = parse_json(text)
        config = LoraConfig(rank=about["rank"], alpha=about["alpha"], targets=tuple(about["targets"]))
    except (KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise OmniNFTError(
            f"{file} does not say its rank, alpha and targets ({why}); without alpha its strength would be a guess. "
            "Expected a LoRA written by omninft"
        ) from error
    for key, tensor in sorted(tensors.items()):
        if not re.fullmatch(re.escape(ORIGINAL_PREFIX) + r".+\.lora_[AB]\.weight", key):
            raise OmniNFTError(
                f"{file}: found the tensor {key}, expected names like {ORIGINAL_PREFIX}MODULE.lora_A.weight"
            )
        found = tensor.shape["lora_B" in key] if tensor.ndim == 2 else None
        if found != config.rank:
            shape = f"[{config.rank}, features]" if "lora_A" in key else f"[features, {config.rank}]"
            raise OmniNFTError(f"{file}: {key} has shape {list(tensor.shape)}, expected {shape}")
    scale = config.alpha / config.rank
    state = {}
    for key, tensor in tensors.items():
        name = renamed(key.removeprefix(ORIGINAL_PREFIX).removesuffix(".weight"), _DIFFUSERS_NAMES)
        state[name] = (tensor.double() / scale).float() if name.endswith(".lora_B") else tensor
    return state, config


def _by_module(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Parts "A", "B", "alpha", and whether names were "original" ones, by diffusers' name of the module."""
    modules: dict[str, dict[str, Any]] = {}
    odd = []
    for key, tensor in tensors.items():
        match = _DOWN_UP.fullmatch(key)
        if match is not None:
            name, part = match["module"], "A" if match["A"] else "B"
        elif key.endswith(".alpha"):
            name, part = key.removesuffix(".alpha"), "alpha"
        else:
            odd.append(key)
            continue
        modules.setdefault(_module(name), {"original": not name.startswith(("transformer.", "base_model."))})[part] = (
            tensor
        )
    for name, parts in modules.items():
        if not {"A", "B"} <= parts.keys():
            odd.append(f"{name} (one matrix)")
        elif not parts["A"].dim() == parts["B"].dim() == 2:
            odd.append(f"{name} (of a convolution)")
        elif not 0 < len(parts["A"]) == parts["B"].shape[1]:
            odd.append(f"{name} (of ranks {len(parts['A'])} and {parts['B'].shape[1]})")
    if odd or not modules:
        raise OmniNFTError(
            f"{file}: {len(odd)} things are no LoRA's of linears: {', '.join(sorted(odd)[:_SHOWN])}; expected pairs of "
            f"lora_A and lora_B, or lora_down and lora_up, in the {len(tensors)} tensors"
        )
    return modules


def _module(name: str) -> str:
    if name.startswith(_KOHYA):
        return _from_underscores(name.removeprefix(_KOHYA))
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return renamed(name, _DIFFUSERS_NAMES)


def _from_underscores(name: str) -> str:
    """`transformer_blocks_3_attn1_to_out_0` has dots that only a list of the modules can tell from underscores."""
    match = re.fullmatch(r"transformer_blocks_(\d+)_(.+)", name)
    if match is not None:
        for linear in _LINEARS:
            if linear.replace(".", "_") == match[2]:
                return f"transformer_blocks.{match[1]}.{linear}"
    for module, original in ORIGINAL_NAMES.items():
        for inner in ("", *_EMBEDDER):
            if name == f"{original}.{inner}".strip(".").replace(".", "_"):
                return f"{module}.{inner}".strip(".")
    return name


def _rank(file: Path, modules: Mapping[str, Mapping[str, Any]]) -> int:
    ranks = Counter(len(parts["A"]) for parts in modules.values())
    if len(ranks) > 1:
        told = ", ".join(f"{rank} ({count} modules)" for rank, count in ranks.most_common(_SHOWN))
        raise OmniNFTError(f"{file}: modules of ranks {told}; expected one rank")
    return next(iter(ranks))


def _description(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What adapter_config.json or diffusers' metadata say; empty where there is neither."""
    beside = file.with_name(PEFT_CONFIG)
    try:
        if beside.is_file():
            about = read_json(beside)
        else:
            about = parse_json(metadata.get("lora_adapter_metadata", "{}"))
            about = {key.removeprefix("transformer."): value for key, value in about.items()}
            if "lora_alpha" not in about and "ss_network_alpha" in metadata:
                about["lora_alpha"] = float(metadata["ss_network_alpha"])
        odd = [key for key in ("use_dora", "alpha_pattern", "rank_pattern") if about.get(key)]
    except (AttributeError, TypeError, ValueError) as error:
        raise OmniNFTError(f"{file}: its description is no JSON of a LoRA ({error})") from error
    if odd:
        raise OmniNFTError(
            f"{file}: a LoRA with {odd[0]}: {about[odd[0]]} is another kind of adapter than trained here"
        )
    return dict(about)


def _scales(
    file: Path, modules: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any], rank: int, alpha: float | None
) -> dict[str, float]:
    """alpha / rank of every module."""
    told = alpha if alpha is not None else about.get("lora_alpha")
    root = math.sqrt(rank) if about.get("use_rslora") else rank
    found = {}
    for name, parts in modules.items():
        if alpha is None and "alpha" in parts:
            found[name] = float(parts["alpha"]) / rank
        elif told is not None:
            found[name] = float(told) / root
        elif parts["original"]:
            found[name] = 1.0
        else:
            raise OmniNFTError(
                f"{file}: names of diffusers and no word of alpha; without it its strength would be a guess. Expected "
                f"alpha tensors, diffusers' metadata, {PEFT_CONFIG}, or alpha given in the call"
            )
    return found
