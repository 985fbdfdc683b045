"""Module configurations of the bundled model and of its deeper sister, for the diffusers LTX-2 classes.

Every number that looks odd is forced by those classes at small sizes: equal head counts in both streams (split
rotary embeddings), `base_channels` = latent channels * mel bins / 4 in the audio autoencoder, upsampling kernels whose
excess over the factor is even in the vocoder, and pictures that divide by 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omninft.worlds import bounce

MEL_BINS = 16
HOP = 160  # samples
TEXT_TOKENS = 24
TEXT_WIDTH = 64

VIDEO_VAE: dict[str, Any] = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=16,
    block_out_channels=(32, 64),
    down_block_types=("LTX2VideoDownBlock3D", "LTX2VideoDownBlock3D"),
    layers_per_block=(1, 1, 1),
    spatio_temporal_scaling=(True, True),
    downsample_type=("spatiotemporal", "temporal"),
    decoder_block_out_channels=(32, 48),
    decoder_layers_per_block=(1, 1, 1),
    decoder_spatio_temporal_scaling=(True, True),
    decoder_inject_noise=(False, False, False),
    upsample_type=("temporal", "spatiotemporal"),
    upsample_residual=(True, True),
    upsample_factor=(1, 1),
    timestep_conditioning=False,
    patch_size=4,
    patch_size_t=1,
    encoder_causal=True,
    decoder_causal=False,
    encoder_spatial_padding_mode="zeros",
    decoder_spatial_padding_mode="zeros",
    spatial_compression_ratio=8,
    temporal_compression_ratio=4,
)
AUDIO_VAE: dict[str, Any] = dict(
    base_channels=16,
    output_channels=1,
    in_channels=1,
    ch_mult=(1, 2, 2),
    num_res_blocks=1,
    attn_resolutions=None,
    resolution=16,
    latent_channels=4,
    norm_type="pixel",
    causality_axis="height",
    mid_block_add_attention=False,
    sample_rate=bounce.SAMPLE_RATE,
    mel_hop_length=HOP,
    is_causal=True,
    mel_bins=MEL_BINS,
    double_z=True,
)
VOCODER: dict[str, Any] = dict(
    in_channels=MEL_BINS,
    hidden_channels=64,
    out_channels=1,
    upsample_kernel_sizes=[10, 8, 8],
    upsample_factors=[10, 4, 4],
    resnet_kernel_sizes=[3],
    resnet_dilations=[[1, 3, 9]],
    act_fn="leaky_relu",
    leaky_relu_negative_slope=0.1,
    final_act_fn="tanh",
    output_sampling_rate=bounce.SAMPLE_RATE,
)
TEXT_ENCODER: dict[str, Any] = dict(
    text=dict(
        vocab_size=64,
        hidden_size=TEXT_WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    # Without a vision part of its own the class builds a 93 M parameter default one.
    vision=dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    ),
    mm_tokens_per_image=4,
)
CONNECTORS: dict[str, Any] = dict(
    caption_channels=TEXT_WIDTH,
    text_proj_in_factor=3,
    video_connector_num_attention_heads=4,
    video_connector_attention_head_dim=16,
    video_connector_num_layers=1,
    video_connector_num_learnable_registers=None,
    audio_connector_num_attention_heads=4,
    audio_connector_attention_head_dim=16,
    audio_connector_num_layers=1,
    audio_connector_num_learnable_registers=None,
    connector_rope_base_seq_len=TEXT_TOKENS,
    rope_theta=100.0,
    rope_type="split",
)


@dataclass(frozen=True)
class Size:
    """One size of the model and what its training takes."""

    name: str
    transformer: dict[str, Any]
    vae_steps: int = 3600
    audio_vae_steps: int = 1500
    vocoder_steps: int = 1800
    transformer_steps: int = 2400
    transformer_batch: int = 32
    clips: int = 8192
    autoencoder_clips: int = 2048


def transformer_config(num_layers: int, video_head_dim: int, audio_head_dim: int, heads: int = 4) -> dict[str, Any]:
    """Arguments of `LTX2VideoTransformer3DModel` for the bounce world's latents."""
    return dict(
        in_channels=16,
        out_channels=16,
        audio_in_channels=16,
        audio_out_channels=16,
        num_attention_heads=heads,
        attention_head_dim=video_head_dim,
        cross_attention_dim=heads * video_head_dim,
        audio_num_attention_heads=heads,
        audio_attention_head_dim=audio_head_dim,
        audio_cross_attention_dim=heads * audio_head_dim,
        vae_scale_factors=(4, 8, 8),
        pos_embed_max_pos=2,
        base_height=bounce.HEIGHT,
        base_width=bounce.WIDTH,
        audio_scale_factor=4,
        audio_pos_embed_max_pos=2,
        audio_sampling_rate=bounce.SAMPLE_RATE,
        audio_hop_length=HOP,
        num_layers=num_layers,
        caption_channels=TEXT_WIDTH,
        rope_theta=100.0,
        rope_type="split",
        perturbed_attn=True,
    )


SIZES: dict[str, Size] = {
    "tiny": Size("tiny", transformer_config(8, 24, 16)),
    "deep": Size("deep", transformer_config(16, 24, 16), transformer_steps=6000),
}
