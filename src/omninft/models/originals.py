"""LTX-2 weights as Lightricks publishes them: one file or several, with the names of the original implementation.

A file's parts are told apart by the names of its tensors. The map goes from diffusers' names to the original ones,
name by name: what a file should hold is then known before it is read, and anything else is said by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from omninft.models.versions import COMPONENTS, Version, published
from omninft.types import OmniNFTError

# Modules beside the blocks: diffusers' name to the original one.
ORIGINAL_NAMES = {
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
_IN_BLOCKS = {
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
_CONNECTORS = {
    "video_connector": "video_embeddings_connector",
    "audio_connector": "audio_embeddings_connector",
    "transformer_blocks": "transformer_1d_blocks",
    "text_proj_in": "text_embedding_projection.aggregate_embed",
    "video_text_proj_in": "text_embedding_projection.video_aggregate_embed",
    "audio_text_proj_in": "text_embedding_projection.audio_aggregate_embed",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
_VOCODER = {
    "upsamplers": "ups",
    "resnets": "resblocks",
    "conv_in": "conv_pre",
    "conv_out": "conv_post",
    "act_out": "act_post",
}
_STATISTICS = {
    "latents_mean": "per_channel_statistics.mean-of-means",
    "latents_std": "per_channel_statistics.std-of-means",
}
# Tensors of the files that no part computes with, or that it computes itself.
_UNUSED = ("per_channel_statistics.channel", "per_channel_statistics.mean-of-", "per_channel_statistics.std-of-st")
_UNUSED_VOCODER = ("resampler.",)
_TRANSFORMER = "model.diffusion_model."
_CONNECTOR_STARTS = ("video_embeddings_connector.", "audio_embeddings_connector.", "text_embedding_projection.")
_FIRST = {*ORIGINAL_NAMES.values(), "transformer_blocks", "proj_out", "audio_proj_out", "caption_projection"} | {
    "audio_caption_projection",
    "scale_shift_table",
    "audio_scale_shift_table",
    "keyframes_abs_pos_embedding",
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, under which name, and its shape."""

    file: Path
    key: str
    shape: tuple[int, ...]


def original_name(component: str, name: str) -> str:
    """The original name, without its component's prefix, of a tensor that diffusers calls `name`."""
    parts = name.split(".")
    if component == "transformer":
        parts[0] = ORIGINAL_NAMES.get(parts[0], parts[0])
        return ".".join(_IN_BLOCKS.get(part, part) for part in parts)
    if component == "connectors":
        return ".".join(_CONNECTORS.get(part, part) for part in parts)
    if component == "vocoder":
        return ".".join(_VOCODER.get(part, part) for part in parts).replace(".downsample.", ".downsample.lowpass.")
    if name in _STATISTICS:
        return _STATISTICS[name]
    return _video_vae_name(name) if component == "vae" else name


def _video_vae_name(name: str) -> str:
    """diffusers groups the original's flat list of stages and changes of size into blocks."""
    name = name.replace(".resnets.", ".res_blocks.")
    name = re.sub(r"\.down_blocks\.(\d+)\.downsamplers\.0\.", lambda m: f".down_blocks.{2 * int(m[1]) + 1}@", name)
    name = re.sub(r"\.down_blocks\.(\d+)\.(?!.*@)", lambda m: f".down_blocks.{2 * int(m[1])}.", name)
    name = re.sub(r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f".up_blocks.{2 * int(m[1]) + 1}@", name)
    name = re.sub(r"\.up_blocks\.(\d+)\.(?!.*@)", lambda m: f".up_blocks.{2 * int(m[1]) + 2}.", name)
    name = name.replace("decoder.mid_block.", "decoder.up_blocks.0.")
    name = re.sub(r"^decoder\.(time_embedder|scale_shift_table)", r"decoder.last_\1", name)
    return name.replace("@", ".")


def original_names(component: str, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Original names of diffusers' `names`, all of one component of this configuration."""
    stages = 2 * len(config.get("block_out_channels", ()))
    found = {name: original_name(component, name) for name in names}
    return {n: o.replace("encoder.mid_block.", f"encoder.down_blocks.{stages}.") for n, o in found.items()}


def place(key: str) -> tuple[str, str] | None:
    """Component and name without prefix of a key of a published file; None: of no component that is used here."""
    if key.startswith(_TRANSFORMER):
        key = key.removeprefix(_TRANSFORMER)
    elif key.startswith(("audio_vae.", "vocoder.", "vae.")):
        component, _, name = key.partition(".")
        unused = _UNUSED_VOCODER if component == "vocoder" else _unused_statistics(name)
        return None if name.startswith(unused) else (component, name)
    elif key.startswith(("encoder.", "decoder.", "per_channel_statistics.")):  # the video autoencoder's own file
        return None if key.startswith(_unused_statistics(key)) else ("vae", key)
    key = key.removeprefix("connectors.")
    if key.startswith(_CONNECTOR_STARTS):
        return "connectors", key
    return ("transformer", key) if key.partition(".")[0] in _FIRST else None


def _unused_statistics(name: str) -> tuple[str, ...]:
    return () if name in _STATISTICS.values() else _UNUSED


def read_headers(files: Iterable[Path]) -> dict[str, dict[str, Entry]]:
    """Tensors of all files by component and original name; nothing but the files' headers is read.

    Raises:
        OmniNFTError: a file that cannot be read, or two files with the same tensor.
    """
    found: dict[str, dict[str, Entry]] = {name: {} for name in COMPONENTS}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118
                    placed = place(key)
                    if placed is None:
                        continue
                    component, name = placed
                    if name in found[component]:
                        other = found[component][name].file
                        raise OmniNFTError(
                            f"{other} and {file} both have {component} tensors, e.g. {key}; name one of them as "
                            "model.transformer, or move the other away"
                        )
                    found[component][name] = Entry(file, key, tuple(handle.get_slice(key).get_shape()))
        except (OSError, SafetensorError) as error:
            raise OmniNFTError(f"{file}: cannot be read as a safetensors file ({error})") from error
    return found


def version_of_keys(transformer: Iterable[str]) -> Version:
    """The version whose transformer has tensors of these original names."""
    names = set(transformer)
    if "keyframes_abs_pos_embedding" in names or "transformer_blocks.0.ff.net.0.proj.bias" not in names:
        return "2.5"
    return "2.3" if "transformer_blocks.0.attn1.to_gate_logits.weight" in names else "2"


def empty(component: str, config: Mapping[str, Any]) -> nn.Module:
    """A component without memory for its weights, on the meta device; what it computes itself is real."""
    classes: dict[str, Any] = {
        "transformer": LTX2VideoTransformer3DModel,
        "connectors": LTX2TextConnectors,
        "vae": AutoencoderKLLTX2Video,
        "audio_vae": AutoencoderKLLTX2Audio,
        "vocoder": LTX2VocoderWithBWE if "bwe_in_channels" in config else LTX2Vocoder,
    }
    with init_empty_weights(include_buffers=False):
        module: nn.Module = classes[component](**config)
    return module


def component_config(component: str, version: Version, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The published configuration, with the one thing that files of a version may differ in."""
    config = published(version)[component]
    if component == "vae":
        config["timestep_conditioning"] = any(name.startswith("decoder.last_time_embedder.") for name in entries)
    return config


def load_component(
    component: str,
    version: Version,
    entries: Mapping[str, Entry],
    device: torch.device | str,
    dtype: torch.dtype,
    **more: Any,
) -> nn.Module:
    """One component of published files, tensor by tensor to where it belongs; `more` changes its configuration.

    Raises:
        OmniNFTError: tensors that are missing, unknown, or of another shape; they are named.
    """
    config = component_config(component, version, entries) | more
    module = empty(component, config)
    state = module.state_dict()
    names = original_names(component, config, state)
    _check_names(component, version, names, entries)
    wrong = [n for n, o in names.items() if tuple(state[n].shape) != entries[o].shape]
    if wrong:
        first = wrong[0]
        raise OmniNFTError(
            f"{component} of LTX-{version}: {len(wrong)} tensors have another shape, e.g. {entries[names[first]].key} "
            f"has {list(entries[names[first]].shape)}, expected {list(state[first].shape)}"
        )
    wanted = {entries[original]: name for name, original in names.items()}
    for entry, tensor in _tensors(wanted, device):
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        set_module_tensor_to_device(module, wanted[entry], device, value=tensor, dtype=tensor.dtype)
    return module.to(device)


def _tensors(wanted: Mapping[Entry, str], device: torch.device | str) -> Iterator[tuple[Entry, Tensor]]:
    for file in sorted({entry.file for entry in wanted}):
        with safe_open(file, framework="pt", device=str(device)) as handle:
            for entry in wanted:
                if entry.file == file:
                    yield entry, handle.get_tensor(entry.key)


def _check_names(component: str, version: Version, names: Mapping[str, str], entries: Mapping[str, Entry]) -> None:
    expected = set(names.values())
    missing, unknown = sorted(expected - entries.keys()), sorted(entries.keys() - expected)
    if not entries:
        raise OmniNFTError(f"no tensor of the {component} in the files; LTX-{version} has {len(missing)} of them")
    if missing or unknown:
        told = [f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in _both(missing, unknown) if names]
        raise OmniNFTError(f"{component} does not fit LTX-{version}: {'; '.join(told)}")


def _both(missing: list[str], unknown: list[str]) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
    return ("missing", missing), ("unknown", unknown)


def find_files(path: Path) -> list[Path]:
    """The published files of a path: the file itself, or every .safetensors file below a folder."""
    return [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
