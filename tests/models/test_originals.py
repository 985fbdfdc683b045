"""Names of the original implementation, at full size on the meta device and through files of small models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omninft.models.originals import empty, original_names, place, read_headers, version_of_keys
from omninft.models.versions import VERSIONS, Version, published
from omninft.types import OmniNFTError
from tests.models.published import original_state, published_pipeline, save_originals

# diffusers' conversion script (huggingface/diffusers 58eb52c): replaced in every name, in this order. up_blocks.7
# and .8 are of LTX-2.3 and 2.5.
CONVERSION = {
    "transformer": {
        "patchify_proj": "proj_in",
        "audio_patchify_proj": "audio_proj_in",
        "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
        "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
        "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
        "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
        "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
        "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
        "q_norm": "norm_q",
        "k_norm": "norm_k",
        "audio_prompt_adaln_single": "audio_prompt_adaln",
        "prompt_adaln_single": "prompt_adaln",
    },
    "connectors": {
        "video_embeddings_connector": "video_connector",
        "audio_embeddings_connector": "audio_connector",
        "transformer_1d_blocks": "transformer_blocks",
        "text_embedding_projection.aggregate_embed": "text_proj_in",
        "text_embedding_projection.audio_aggregate_embed": "audio_text_proj_in",
        "text_embedding_projection.video_aggregate_embed": "video_text_proj_in",
        "q_norm": "norm_q",
        "k_norm": "norm_k",
    },
    "vae": {
        "down_blocks.1": "down_blocks.0.downsamplers.0",
        "down_blocks.2": "down_blocks.1",
        "down_blocks.3": "down_blocks.1.downsamplers.0",
        "down_blocks.4": "down_blocks.2",
        "down_blocks.5": "down_blocks.2.downsamplers.0",
        "down_blocks.6": "down_blocks.3",
        "down_blocks.7": "down_blocks.3.downsamplers.0",
        "down_blocks.8": "mid_block",
        "up_blocks.0": "mid_block",
        "up_blocks.1": "up_blocks.0.upsamplers.0",
        "up_blocks.2": "up_blocks.0",
        "up_blocks.3": "up_blocks.1.upsamplers.0",
        "up_blocks.4": "up_blocks.1",
        "up_blocks.5": "up_blocks.2.upsamplers.0",
        "up_blocks.6": "up_blocks.2",
        "up_blocks.7": "up_blocks.3.upsamplers.0",
        "up_blocks.8": "up_blocks.3",
        "res_blocks": "resnets",
        "per_channel_statistics.mean-of-means": "latents_mean",
        "per_channel_statistics.std-of-means": "latents_std",
    },
    "audio_vae": {
        "per_channel_statistics.mean-of-means": "latents_mean",
        "per_channel_statistics.std-of-means": "latents_std",
    },
    "vocoder": {
        "resblocks": "resnets",
        "conv_pre": "conv_in",
        "conv_post": "conv_out",
        "act_post": "act_out",
        "downsample.lowpass": "downsample",
    },
}


def converted(component: str, name: str) -> str:
    """diffusers' name of an original one."""
    for old, new in CONVERSION[component].items():
        name = name.replace(old, new)
    if component == "vocoder":
        return re.sub(r"(^|\.)ups\.", r"\1upsamplers.", name)
    for old, new in (("adaln_single.", "time_embed."), ("audio_adaln_single.", "audio_time_embed.")):
        if component == "transformer" and name.startswith(old):
            return new + name.removeprefix(old)
    return name


PREFIX = {"transformer": "model.diffusion_model.", "vae": "vae.", "audio_vae": "audio_vae.", "vocoder": "vocoder."}


@pytest.mark.parametrize("version", VERSIONS)
def test_names_at_full_size_are_those_of_the_published_files(version: Version) -> None:
    sizes, in_the_transformers_file = {}, 0
    for component, config in published(version).items():
        module = empty(component, config)
        state = module.state_dict()
        names = original_names(component, config, state)
        assert len(set(names.values())) == len(state)
        for name, original in names.items():
            assert converted(component, original) == name
            assert place(PREFIX.get(component, "") + original) == (component, original)
        sizes[component] = round(sum(p.numel() for p in module.parameters()) / 1e6)
        if component in ("transformer", "connectors"):
            in_the_transformers_file += sum(not o.startswith("text_embedding_projection.") for o in names.values())
            assert version_of_keys(names.values()) == version or component == "connectors"
    assert (
        list(sizes.values())
        == {
            "2": [18_876, 1_431, 1_222, 53, 56],
            "2.3": [18_989, 3_172, 726, 53, 129],
            "2.5": [18_988, 3_172, 726, 53, 129],
        }[version]
    )
    if version == "2.5":
        # The count of tensors in the published ltx-2.5-22b-*-transformer-bf16.safetensors.
        assert in_the_transformers_file == 4349


def test_what_no_part_computes_with_is_left_out() -> None:
    for key in (
        "vae.per_channel_statistics.mean-of-stds",
        "vae.per_channel_statistics.channel",
        "model.diffusion_model.duration_head.mlp.0.weight",
        "vocoder.resampler.filter",
        "model.layers.0.mlp.up_proj.weight",
        "tokenizer_json",
    ):
        assert place(key) is None
    assert place("per_channel_statistics.mean-of-means") == ("vae", "per_channel_statistics.mean-of-means")
    assert place("transformer_blocks.0.attn1.to_q.weight") == ("transformer", "transformer_blocks.0.attn1.to_q.weight")


def test_the_same_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    state = {"model.diffusion_model.proj_out.weight": torch.zeros(2, 2)}
    for name in ("dev", "distilled"):
        save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.raises(OmniNFTError, match=r"dev\.safetensors and .*distilled\.safetensors both have transformer"):
        read_headers(sorted(tmp_path.glob("*.safetensors")))


def test_files_hold_what_the_pipeline_has(tmp_path: Path) -> None:
    pipeline = published_pipeline("2.3")
    file = save_originals(pipeline, tmp_path, split=False)
    stored = load_file(file)
    for component in ("transformer", "connectors", "vae", "audio_vae", "vocoder"):
        for key, tensor in original_state(pipeline, component).items():
            assert torch.equal(stored[key], tensor)
