"""Small random LTX-2, 2.3 and 2.5: every flag and mode as published, only sizes small."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTX2Pipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.gemma4_unified import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

from omninft.config import LoraConfig, ModelConfig
from omninft.models import originals
from omninft.models.loading import ClipDefaults
from omninft.models.ltx2 import LTX2Policy
from omninft.models.originals import original_names
from omninft.models.versions import Version, Weights, published, scheduler_of
from omninft.pretrain.text import build_tokenizer

TEXT_WIDTH, TEXT_LAYERS, REGISTERS, HEADS = 16, 2, 8, 2
CHANNELS = 8  # of video latents; audio's are 2 x 16 / 4
SMALL_CLIP = ClipDefaults(9, 64, 64, 24.0)

# What is smaller than published. Nothing here is a flag or a mode.
SMALL: dict[str, dict[str, Any]] = {
    "transformer": dict(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        audio_in_channels=8,
        audio_out_channels=8,
        num_attention_heads=HEADS,
        attention_head_dim=12,
        cross_attention_dim=24,
        audio_num_attention_heads=HEADS,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
    ),
    "connectors": dict(
        caption_channels=TEXT_WIDTH,
        text_proj_in_factor=TEXT_LAYERS + 1,
        video_connector_num_attention_heads=HEADS,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=REGISTERS,
        audio_connector_num_attention_heads=HEADS,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=REGISTERS,
    ),
    "vae": dict(latent_channels=CHANNELS),
    "audio_vae": dict(base_channels=8, num_res_blocks=1, resolution=16, latent_channels=2, mel_bins=16),
    "vocoder": dict(in_channels=32, hidden_channels=64, resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]]),
}


def small_configs(version: Version) -> dict[str, dict[str, Any]]:
    """The published configurations, made small."""
    found = {name: config | SMALL[name] for name, config in published(version).items()}
    plain = version == "2"
    found["connectors"] |= dict(
        video_connector_attention_head_dim=8 if plain else 12,
        audio_connector_attention_head_dim=8,
        **({} if plain else dict(video_hidden_dim=24, audio_hidden_dim=16)),
    )
    vae = found["vae"]
    for side in ("block_out_channels", "decoder_block_out_channels"):
        vae[side] = [width // 32 for width in vae[side]]
    for side in ("layers_per_block", "decoder_layers_per_block"):
        vae[side] = [1] * len(vae[side])
    if not plain:
        found["vocoder"] |= dict(
            bwe_in_channels=32,
            bwe_hidden_channels=32,
            bwe_resnet_kernel_sizes=[3],
            bwe_resnet_dilations=[[1, 3, 5]],
            num_mel_channels=16,
        )
    return found


def build(component: str, config: dict[str, Any], seed: int) -> nn.Module:
    """A component with random weights, tables and statistics that start at a constant included."""
    torch.manual_seed(seed)
    module = type(originals.empty(component, config))(**config)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith(("keyframes_abs_pos_embedding", "latents_mean", "act.alpha", "act.beta")):
            tensor.normal_(generator=generator)
        if name.endswith("latents_std"):
            tensor.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


def text_encoder(version: Version) -> nn.Module:
    """Gemma 3, of LTX-2.5 Gemma 4, as small as the classes go."""
    text = dict(
        vocab_size=64,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(7)
    if version == "2.5":
        layers = ["sliding_attention", "full_attention"]
        return Gemma4UnifiedForConditionalGeneration(
            Gemma4UnifiedConfig(text_config=text | dict(layer_types=layers, per_layer_config={"01": {"head_dim": 8}}))
        )
    vision = dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def published_pipeline(version: Version, weights: Weights = "full", seed: int = 0) -> LTX2Pipeline:
    """A pipeline of the version with the published scheduler of full or distilled weights."""
    parts = copy.deepcopy(_parts(version, seed))  # made once: it takes longer than a copy
    return LTX2Pipeline(scheduler=scheduler_of(weights), tokenizer=build_tokenizer(), **parts)


@functools.cache
def _parts(version: Version, seed: int) -> dict[str, Any]:
    found = {n: build(n, config, seed + i) for i, (n, config) in enumerate(small_configs(version).items())}
    return found | {"text_encoder": text_encoder(version).eval()}


def published_policy(version: Version, seed: int = 0, **model: Any) -> LTX2Policy:
    """A policy on such a pipeline, able to perturb attention as when it is loaded, LoRA of rank 2 and alpha 4."""
    config = ModelConfig(lora=LoraConfig(rank=2, alpha=4), **model)
    return LTX2Policy(published_pipeline(version, seed=seed), config, clip_defaults=SMALL_CLIP)


PREFIXES = {"transformer": "model.diffusion_model.", "vae": "vae.", "audio_vae": "audio_vae.", "vocoder": "vocoder."}


def original_state(pipeline: LTX2Pipeline, component: str) -> dict[str, Tensor]:
    """A component's tensors as a published file names them."""
    module = getattr(pipeline, component)
    state = module.state_dict()
    names = original_names(component, module.config, state)
    prefix = PREFIXES.get(component, "")
    found = {}
    for name, tensor in state.items():
        original = names[name]
        if component == "connectors" and not original.startswith("text_embedding_projection."):
            original = f"model.diffusion_model.{original}"
        found[prefix + original] = tensor.contiguous().clone()
    return found


def save_originals(pipeline: LTX2Pipeline, folder: Path, split: bool) -> Path:
    """As LTX-2 and 2.3 are published, in one file, or as LTX-2.5, in four; the path to load."""
    states = {name: original_state(pipeline, name) for name in SMALL}
    unused = {"per_channel_statistics.mean-of-stds": torch.zeros(2), "per_channel_statistics.channel": torch.zeros(2)}
    folder.mkdir(parents=True, exist_ok=True)
    if not split:
        whole = {key: tensor for state in states.values() for key, tensor in state.items()}
        save_file(whole | {f"vae.{key}": tensor for key, tensor in unused.items()}, folder / "ltx.safetensors")
        return folder / "ltx.safetensors"
    text = {k: t for k, t in states["connectors"].items() if k.startswith("text_embedding_projection.")}
    connectors = {k: t for k, t in states["connectors"].items() if k not in text}
    gemma = {"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2), "tokenizer_json": torch.zeros(2)}
    files = {
        "diffusion_models/ltx-dev-transformer": states["transformer"] | connectors,
        "text_encoders/gemma-with-proj": text | gemma,
        "vae/video-vae": {k.removeprefix("vae."): t for k, t in states["vae"].items()} | unused,
        "vae/audio-vae": states["audio_vae"] | states["vocoder"],
    }
    for name, state in files.items():
        file = folder / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file(state, file)
    return folder


def as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the small configurations those of original files, whose sizes are not written in them."""
    monkeypatch.setattr(originals, "published", small_configs)
