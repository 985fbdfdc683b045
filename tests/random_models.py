"""Small random-weight pipelines of the LTX-2, LTX-2.3 and LTX-2.5 configurations."""

from __future__ import annotations

from typing import Any

import numpy as np
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

from omninft.config import LoraConfig, ModelConfig, SamplingConfig
from omninft.models.loading import ClipDefaults
from omninft.models.ltx2 import LTX2Policy
from omninft.pretrain import sizes
from omninft.pretrain.text import build_text_encoder, build_tokenizer
from omninft.types import Latents, Prompt, PromptGroup

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
    transformer=VERSIONS["ltx-2.3"]["transformer"] | dict(ff_bias=False, use_keyframes_abs_pos_embedding=True),
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


SMALL = ClipDefaults(9, 32, 32, 12.0)
PROMPTS = ("a red ball bounces once a low tone rings once", "a blue lamp flashes twice")


def make_policy(version: str = "ltx-2") -> LTX2Policy:
    """A policy on a random pipeline, LoRA of rank 2 and alpha 4."""
    config = ModelConfig(lora=LoraConfig(rank=2, alpha=4))
    return LTX2Policy(random_pipeline(version), config, clip_defaults=SMALL)


def groups() -> tuple[PromptGroup, ...]:
    return tuple(PromptGroup(Prompt(str(i), p, p, p), (0,)) for i, p in enumerate(PROMPTS))


def through_pipeline(
    pipe: LTX2Pipeline, noise: Latents, sampling: SamplingConfig, **extra: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Frames in 0..255 and waveforms from the pipeline's own call on the same noise."""
    video, audio = sampling.video_guidance, sampling.audio_guidance
    # The pipeline normalises given audio latents, so they go in as if they were not.
    audio_noise = noise.audio * pipe.audio_vae.latents_std + pipe.audio_vae.latents_mean
    frames, waveform = pipe(
        prompt=list(PROMPTS),
        height=32,
        width=32,
        num_frames=9,
        frame_rate=12.0,
        num_inference_steps=sampling.num_steps,
        guidance_scale=video.text,
        stg_scale=video.stg,
        modality_scale=video.modality,
        guidance_rescale=video.rescale,
        audio_guidance_scale=audio.text,
        audio_stg_scale=audio.stg,
        audio_modality_scale=audio.modality,
        audio_guidance_rescale=audio.rescale,
        spatio_temporal_guidance_blocks=list(sampling.stg_blocks) or None,
        audio_latents=audio_noise,
        max_sequence_length=pipe.tokenizer_max_length,
        output_type="np",
        return_dict=False,
        **({"latents": noise.video.clone()} | extra),
    )
    return frames * 255, waveform.numpy()
