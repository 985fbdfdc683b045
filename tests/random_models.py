"""Small random-weight pipelines of the LTX-2, LTX-2.3 and LTX-2.5 configurations."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE

from omninft.pretrain import sizes
from omninft.pretrain.text import build_text_encoder, build_tokenizer

HEADS = 2
WIDTHS = {"video": 2 * 12, "audio": 2 * 8}

# What sets the versions apart, from their public configurations.
VERSIONS: dict[str, dict[str, Any]] = {
    "ltx-2": dict(transformer={}, connectors={}, vocoder="plain"),
    "ltx-2.3": dict(
        transformer=dict(
            gated_attn=True,
            audio_gated_attn=True,
            cross_attn_mod=True,
            audio_cross_attn_mod=True,
            use_prompt_embeddings=False,
        ),
        connectors=dict(
            per_modality_projections=True,
            video_hidden_dim=WIDTHS["video"],
            audio_hidden_dim=WIDTHS["audio"],
            video_connector_num_attention_heads=HEADS,
            video_connector_attention_head_dim=12,
            audio_connector_num_attention_heads=HEADS,
            audio_connector_attention_head_dim=8,
            video_gated_attn=True,
            audio_gated_attn=True,
            proj_bias=True,
        ),
        vocoder="bandwidth extension",
    ),
}
VERSIONS["ltx-2.5"] = dict(
    transformer=VERSIONS["ltx-2.3"]["transformer"]
    | dict(ff_bias=False, use_prompt_adaln_single=False, use_keyframes_abs_pos_embedding=True),
    connectors=VERSIONS["ltx-2.3"]["connectors"],
    vocoder="bandwidth extension",
)


def random_pipeline(version: str, num_layers: int = 2, seed: int = 0) -> LTX2Pipeline:
    """A pipeline of `version` whose weights are random and whose clips are 9 frames of 32 x 32 pixels."""
    torch.manual_seed(seed)
    spec = VERSIONS[version]
    transformer = sizes.transformer_config(num_layers, 12, 8, heads=HEADS) | spec["transformer"]
    connectors = sizes.CONNECTORS | spec["connectors"]
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLLTX2Video(**sizes.VIDEO_VAE),
        audio_vae=AutoencoderKLLTX2Audio(**sizes.AUDIO_VAE),
        text_encoder=build_text_encoder(seed),
        tokenizer=build_tokenizer(),
        connectors=LTX2TextConnectors(**connectors),
        transformer=LTX2VideoTransformer3DModel(**transformer),
        vocoder=_vocoder(spec["vocoder"]),
    )


def _vocoder(kind: str) -> Any:
    if kind == "plain":
        return LTX2Vocoder(**sizes.VOCODER)
    # 16 kHz, then twice that by bandwidth extension; mel settings follow the first stage's hop.
    plain = {k: v for k, v in sizes.VOCODER.items() if k != "output_sampling_rate"}
    return LTX2VocoderWithBWE(
        **(plain | dict(act_fn="snakebeta", antialias=True, out_channels=1)),
        bwe_in_channels=16,
        bwe_hidden_channels=16,
        bwe_out_channels=1,
        bwe_upsample_kernel_sizes=[20, 16],
        bwe_upsample_factors=[20, 8],
        bwe_resnet_kernel_sizes=[3],
        bwe_resnet_dilations=[[1, 3]],
        filter_length=512,
        hop_length=80,
        window_length=512,
        num_mel_channels=16,
        input_sampling_rate=16_000,
        output_sampling_rate=32_000,
    )
