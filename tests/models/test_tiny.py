"""The bundled model as a user finds it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LTX2Pipeline

from omninft.models.loading import model_path
from omninft.worlds.wording import world_prompts


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(model_path("tiny"))


def test_is_small_and_in_bfloat16_safetensors(folder: Path) -> None:
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 10_000_000
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config["num_layers"] >= 8


def test_runs_in_diffusers_without_our_code(folder: Path) -> None:
    pipe = LTX2Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    prompt = next(p for p in world_prompts("test") if p.prompt_v == "a green ball bounces once")
    frames, sound = pipe(
        prompt=prompt.prompt_av,
        height=32,
        width=32,
        num_frames=25,
        frame_rate=12.0,
        num_inference_steps=10,
        guidance_scale=1.0,
        audio_guidance_scale=1.0,
        stg_scale=0.0,
        audio_stg_scale=0.0,
        modality_scale=1.0,
        audio_modality_scale=1.0,
        guidance_rescale=0.0,
        audio_guidance_rescale=0.0,
        max_sequence_length=pipe.tokenizer_max_length,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        return_dict=False,
    )
    assert frames.shape == (1, 25, 32, 32, 3)
    assert sound.shape == (1, 1, 32_800)
    # A green thing on a dark ground, and a sound.
    chroma = frames[0] - frames[0].mean(-1, keepdims=True)
    strongest = np.abs(chroma).max(-1) > 0.25
    assert strongest.sum() > 100
    assert chroma[strongest].mean(0).argmax() == 1
    assert float(sound.abs().max()) > 0.1
