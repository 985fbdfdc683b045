"""From a path to a diffusers LTX-2 pipeline: the bundled model, a local folder, or a pinned hub revision."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from diffusers import LTX2Pipeline, LTX2VideoTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from pydantic import TypeAdapter
from transformers.utils import logging as transformers_logging

from omninft.config import ModelConfig
from omninft.files import first_problem, read_json
from omninft.models.files import local_pipeline
from omninft.models.offload import staying_on_the_host
from omninft.models.quantise import quantise_base
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
    """The device that "auto" or a name stands for."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise OmniNFTError(f"model.device is {device!r}, expected auto, cpu, cuda or cuda:0 and the like") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise OmniNFTError(f"model.device is {device!r}, but torch sees no CUDA device; use auto or cpu")
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Dtype of the frozen base: float32 on a CPU (bfloat16 backward is slower there), bfloat16 elsewhere."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def load_pipeline(config: ModelConfig) -> LTX2Pipeline:
    """The pipeline of `config.path`, frozen, in evaluation mode, on its device.

    Raises:
        OmniNFTError: nothing loadable there, or no package to quantise with; the cause and what was expected are named.
    """
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    path = local_pipeline(model_path(config.path), config)
    if Path(path).exists() and not (Path(path) / "model_index.json").is_file():
        raise OmniNFTError(f"{path} is no pipeline folder: expected a model_index.json of an LTX2Pipeline in it")
    try:
        parts = {}
        if config.transformer != "transformer":
            parts["transformer"] = LTX2VideoTransformer3DModel.from_pretrained(
                path, subfolder=config.transformer, dtype=dtype, local_files_only=True
            )
        pipeline = LTX2Pipeline.from_pretrained(path, dtype=dtype, local_files_only=True, **parts)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged folder ends in whatever the part that reads it raises
        why = f"{type(error).__name__}: {' '.join(str(error).split()):.500}"
        raise OmniNFTError(
            f"no LTX-2 pipeline could be loaded from {config.path!r} ({why}); expected 'tiny', a folder that "
            "LTX2Pipeline.save_pretrained wrote, or a hub id that `omninft fetch` fetched"
        ) from error
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    stay = config.offload == "blocks"
    quantise_base(pipeline.transformer, config.quantise, "cpu" if stay else device)
    with staying_on_the_host(pipeline.transformer, stay):
        return pipeline.to(device)
