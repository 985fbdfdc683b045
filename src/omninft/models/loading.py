"""From a path to a diffusers LTX-2 pipeline: the bundled model, a folder, a pinned hub revision, or original files.

Every part goes to its device by itself, tensor by tensor, and only the parts that are used are read. What version and
which weights they are is read from the files; where those do not tell, it has to be said.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline
from diffusers.pipelines import ltx2
from diffusers.utils import logging as diffusers_logging
from pydantic import TypeAdapter
from safetensors import safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from omninft.config import ModelConfig, load_config, recipe_names
from omninft.distributed import default_device
from omninft.files import first_problem, read_json
from omninft.models.contexts import identity_of
from omninft.models.files import TEXT_PARTS, local_pipeline
from omninft.models.offload import staying_on_the_host
from omninft.models.originals import Entry, find_files, load_component, read_headers, version_of_keys
from omninft.models.quantise import quantise_base
from omninft.models.versions import Version, Weights, scheduler_of, version_of, weights_of
from omninft.types import OmniNFTError

BUNDLED = "tiny"
CLIP_FILE = "clip_defaults.json"


@dataclass(frozen=True)
class ClipDefaults:
    """Clip size, and compression of given frames, where a recipe names none."""

    num_frames: int
    height: int  # pixels
    width: int  # pixels
    frame_rate: float  # Hz
    first_frame_crf: int | None = None  # that the model was trained with; None: LTX's own, by version


LTX2_CLIP = ClipDefaults(121, 512, 768, 24.0)


def read_clip_defaults(path: str) -> ClipDefaults:
    """The clip size that a model folder names in clip_defaults.json, else LTX-2's."""
    file = Path(model_path(path)) / CLIP_FILE
    if not file.exists():
        return LTX2_CLIP
    tree = read_json(file, "not the sizes of a model's clips: ")
    try:
        return TypeAdapter(ClipDefaults).validate_python(tree)
    except ValueError as error:
        raise OmniNFTError(f"{file}: not the sizes of a model's clips ({first_problem(error)})") from error


def model_path(path: str) -> str:
    """Folder of the bundled model for "tiny", else the path or hub id as given."""
    if path != BUNDLED:
        return path
    folder = Path(str(resources.files("omninft.models") / BUNDLED))
    if not (folder / "model_index.json").is_file():
        raise OmniNFTError(
            f"the bundled model is not at {folder}; `omninft pretrain --output {folder}` builds it, "
            "or install the package from a release"
        )
    return str(folder)


def resolve_device(device: str) -> torch.device:
    """The device that "auto" or a name stands for; "auto" and "cuda" are this process's own GPU, where there is one."""
    if device == "auto":
        return torch.device(default_device())
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise OmniNFTError(f"model.device is {device!r}, expected auto, cpu, cuda or cuda:0 and the like") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise OmniNFTError(f"model.device is {device!r}, but torch sees no CUDA device; use auto or cpu")
    return torch.device(default_device()) if device == "cuda" else chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Dtype of the frozen base: float32 on a CPU (bfloat16 backward is slower there), bfloat16 elsewhere."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


@dataclass(frozen=True)
class Source:
    """Where a model's parts are, and what the files say of them."""

    path: Path
    version: Version
    weights: Weights | None  # None: not one of the published schedulers, as of the bundled model
    index: Mapping[str, Any] | None  # model_index.json; None: original files
    entries: Mapping[str, Mapping[str, Entry]]  # of original files, by component


def load_pipeline(config: ModelConfig) -> LTX2Pipeline:
    """The pipeline of `config.path`, frozen, in evaluation mode, on its device; the vocoder in float32.

    Where text contexts are kept on disk (`config.text_cache`), text encoder and connectors are left out.

    Raises:
        OmniNFTError: nothing loadable there, other weights than the recipe is made for, tensors that are missing or
            unknown, or no package to quantise with; the cause and what was expected are named.
    """
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    try:
        source = open_source(config)
        transformer = load_transformer(source, config, "cpu" if _comes_later(config) else device, dtype)
        parts = {name: _load_part(source, name, device, dtype) for name in ("vae", "audio_vae", "vocoder")}
        pipeline = LTX2Pipeline(
            transformer=transformer,
            scheduler=_scheduler(source, config),
            text_encoder=None,
            tokenizer=None,
            connectors=None,
            **parts,
        )
        if config.text_cache is None:
            load_text(pipeline, config, source)
    except (OmniNFTError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged folder ends in whatever the part that reads it raises
        why = f"{type(error).__name__}: {' '.join(str(error).split()):.500}"
        raise OmniNFTError(
            f"no LTX-2 pipeline could be loaded from {config.path!r} ({why}); expected 'tiny', a folder that "
            "LTX2Pipeline.save_pretrained wrote, a hub id that `omninft fetch` fetched, or original .safetensors files"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    stay = config.offload == "blocks"
    quantise_base(transformer, config.quantise, "cpu" if stay else device)
    with staying_on_the_host(transformer, stay):
        transformer.to(device)
    return pipeline


def _comes_later(config: ModelConfig) -> bool:
    """Whether the transformer is read to the host first: its linears are then quantised one by one, or stay there."""
    return config.quantise is not None or config.offload == "blocks"


def open_source(config: ModelConfig) -> Source:
    """What is at `config.path`, or in the hub's cache. No weights are read.

    Raises:
        OmniNFTError: neither a pipeline folder nor original files, other weights than `config.weights`, or a hub model
            that was not fetched.
    """
    path = Path(local_pipeline(model_path(config.path), config))
    if not path.exists():
        raise OmniNFTError(
            f"no LTX-2 pipeline could be loaded from {config.path!r}: there is nothing; expected 'tiny', a folder that "
            "LTX2Pipeline.save_pretrained wrote, a hub id, or original .safetensors files"
        )
    index = path / "model_index.json"
    if not index.is_file():
        return _open_originals(path, config)
    folder = path / config.transformer
    if not (folder / "config.json").is_file():
        near = sorted(p.parent.name for p in path.glob("transformer*/config.json"))
        raise OmniNFTError(f"model.transformer: {folder} is no transformer; there are: {', '.join(near) or 'none'}")
    about = _read_mapping(folder / "config.json")
    weights = weights_of(_scheduler_config(path))
    if weights == "distilled" and config.transformer == "transformer_full":
        # LTX-2.5's repository has one scheduler, that of its distilled transformer/; the full one lies beside it.
        weights = "full"
    _check_weights(config, weights, (path / "transformer_full").is_dir())
    entries: dict[str, Mapping[str, Entry]] = {}
    return Source(path, version_of(about), config.weights or weights, _read_mapping(index), entries)


def _open_originals(path: Path, config: ModelConfig) -> Source:
    files = find_files(path)
    if not files:
        raise OmniNFTError(
            f"{path} is no pipeline folder: expected a model_index.json of an LTX2Pipeline in it, or original "
            ".safetensors files"
        )
    if path.is_dir() and config.transformer.endswith(".safetensors"):
        # Full and distilled transformers of a repository lie in one folder; the one that is asked for is taken.
        chosen = path / config.transformer
        files = [chosen, *(f for f in files if f.parent != chosen.parent)]
    entries = read_headers(files)
    if not entries["transformer"]:
        raise OmniNFTError(f"{path}: no LTX-2 transformer in {len(files)} .safetensors files")
    if config.weights is None:
        name = next(iter(entries["transformer"].values())).file.name
        raise OmniNFTError(
            f"{path}: original files hold the same tensors and metadata for full and for distilled weights; say which "
            f"{name} has, by model.weights=full or model.weights=distilled"
        )
    return Source(path, version_of_keys(entries["transformer"]), config.weights, None, entries)


def _check_weights(config: ModelConfig, found: Weights | None, full_beside: bool) -> None:
    if config.weights is None or found is None or config.weights == found:
        return
    fitting = [name for name in recipe_names() if _recipe_weights(name) == found]
    advice = f"use recipe {' or '.join(fitting)}" if fitting else f"use a recipe with model.weights: {found}"
    if config.weights == "full" and full_beside:
        advice = f"take the full ones by model.transformer=transformer_full, or {advice}"
    raise OmniNFTError(
        f"this recipe is made for {config.weights} weights, and {config.path} ({config.transformer}) has {found} ones, "
        f"which are sampled on another schedule; {advice}"
    )


def _recipe_weights(name: str) -> Weights | None:
    with suppress(OmniNFTError):  # a recipe that is a part of others
        return load_config(name).model.weights
    return None


def _scheduler_config(path: Path) -> dict[str, Any]:
    return _read_mapping(path / "scheduler" / "scheduler_config.json")


def _read_mapping(file: Path) -> dict[str, Any]:
    tree = read_json(file)
    if not isinstance(tree, dict):
        raise OmniNFTError(f"{file}: found {tree!r:.60}, expected a mapping, as of an LTX-2 model")
    return tree


def _scheduler(source: Source, config: ModelConfig) -> FlowMatchEulerDiscreteScheduler:
    """The files' own scheduler, but that of the weights where the files have another or none."""
    if source.index is not None:
        own = _scheduler_config(source.path)
        if source.weights is None or weights_of(own) in (None, source.weights):
            return FlowMatchEulerDiscreteScheduler.from_config(own)
    assert source.weights is not None
    return scheduler_of(source.weights)


def load_transformer(source: Source, config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """The frozen transformer, able to perturb attention: LTX-2's configuration says no, but it takes no weights."""
    return _load_part(source, "transformer", device, dtype, config.transformer)


def stored_dtype(source: Source, config: ModelConfig) -> torch.dtype:
    """The dtype in which the transformer's files hold its weights; bfloat16 of quantised ones."""
    if source.index is None:
        files = [next(iter(source.entries["transformer"].values())).file]
    else:
        files = sorted((source.path / config.transformer).glob("*.safetensors"))
    with safe_open(files[0], framework="pt") as handle:
        kinds = {handle.get_slice(key).get_dtype() for key in handle.keys()}  # noqa: SIM118
    return torch.float32 if "F32" in kinds and "BF16" not in kinds else torch.bfloat16


def _load_part(
    source: Source, name: str, device: torch.device | str, dtype: torch.dtype, folder: str | None = None
) -> nn.Module:
    dtype = torch.float32 if name == "vocoder" else dtype  # in bfloat16 most of its spectrum is lost
    more: dict[str, Any] = {"perturbed_attn": True} if name == "transformer" else {}
    if source.index is None:
        module = load_component(name, source.version, source.entries[name], device, dtype, **more)
    else:
        kind = _class(source.index, name)
        place = {"": torch.device(device)}
        module = kind.from_pretrained(
            source.path / (folder or name), torch_dtype=dtype, device_map=place, low_cpu_mem_usage=True, **more
        )
    frozen: nn.Module = module.eval().requires_grad_(False)
    return frozen


def _class(index: Mapping[str, Any], name: str) -> Any:
    library, kind = index.get(name, (None, None))
    homes = {"diffusers": diffusers, "ltx2": ltx2, "transformers": transformers}
    if library not in homes or not hasattr(homes[library], kind):
        raise OmniNFTError(f"model_index.json: {name} is {library}.{kind}, expected a part of an LTX2Pipeline")
    return getattr(homes[library], kind)


def load_text(pipeline: LTX2Pipeline, config: ModelConfig, source: Source | None = None) -> None:
    """Put text encoder, tokenizer and connectors into the pipeline, on their device.

    Raises:
        OmniNFTError: original files, and no `config.text_encoder` that has them.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    try:
        source = source or open_source(config)
        folder = text_folder(config, source)
        kind = _text_class(folder, source)
        encoder = kind.from_pretrained(folder / "text_encoder", dtype=dtype, device_map={"": device})
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
        connectors = _load_part(source, "connectors", device, dtype)
    except (OmniNFTError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # as in `load_pipeline`
        why = f"{type(error).__name__}: {' '.join(str(error).split()):.500}"
        raise OmniNFTError(f"no text encoder could be loaded for {config.path!r} ({why})") from error
    pipeline.register_modules(
        text_encoder=encoder.eval().requires_grad_(False), tokenizer=tokenizer, connectors=connectors
    )
    pipeline.tokenizer_max_length = tokenizer.model_max_length


def text_identity(config: ModelConfig) -> dict[str, Any]:
    """What the contexts of prompts depend on beside the prompt."""
    source = open_source(config)
    files = [f for f in (source.path / "connectors").rglob("*") if f.is_file()]
    if source.index is None:
        files = sorted({entry.file for entry in source.entries["connectors"].values()})
    folder = text_folder(config, source)
    parts = (folder / "text_encoder", folder / "tokenizer")
    told = identity_of([*files, *(f for part in parts for f in part.rglob("*") if f.is_file())])
    dtype = str(resolve_dtype(config.dtype, resolve_device(config.device)))
    return {"files": told, "dtype": dtype, "tokens": config.max_text_tokens}


def text_folder(config: ModelConfig, source: Source) -> Path:
    """The folder with `text_encoder/` and `tokenizer/`; of a hub id, in the hub's cache.

    Raises:
        OmniNFTError: there is none.
    """
    if config.text_encoder is not None:
        folder = Path(local_pipeline(model_path(config.text_encoder), config, TEXT_PARTS))
    elif source.index is None:
        raise OmniNFTError(
            f"{source.path}: original files have no text encoder; name a pipeline folder or hub id that has "
            "text_encoder/ and tokenizer/ as model.text_encoder, e.g. model.text_encoder=Lightricks/LTX-2"
        )
    else:
        folder = source.path
    if not (folder / "text_encoder" / "config.json").is_file():
        raise OmniNFTError(f"{folder}: expected text_encoder/ and tokenizer/ in it")
    return folder


def _text_class(folder: Path, source: Source) -> Any:
    if source.index is not None and "text_encoder" in source.index:
        return _class(source.index, "text_encoder")
    about = _read_mapping(folder / "text_encoder" / "config.json")
    return getattr(transformers, about["architectures"][0])
