"""Building a pipeline from nothing, in miniature: every stage, an interruption, and the same weights in the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import LTX2Pipeline
from safetensors.torch import load_file

from omninft.pretrain import run
from omninft.pretrain.sizes import SIZES, Size, transformer_config
from omninft.pretrain.text import build_text_encoder, build_tokenizer, encode_captions

MINI = Size(
    "mini",
    transformer_config(1, 12, 8, heads=2),
    vae_steps=2,
    audio_vae_steps=2,
    vocoder_steps=2,
    transformer_steps=6,
    transformer_batch=4,
    clips=16,
    autoencoder_clips=8,
)


class Interrupted(Exception):
    pass


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "mini", MINI)
    monkeypatch.setattr(run, "CHECKPOINT_STEPS", 2)
    stages: list[str] = []

    def interrupt(stage: str, step: int, total: int, metrics: dict[str, float]) -> None:
        stages.append(stage)
        if stage == "transformer" and step == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        run.pretrain("mini", tmp_path / "work", tmp_path / "model", 0, "cpu", interrupt)
    assert set(stages) == {"vae", "audio_vae", "vocoder", "encode", "transformer"}
    assert not (tmp_path / "model").exists()

    seen: list[tuple[str, int]] = []
    first = run.pretrain("mini", tmp_path / "work", tmp_path / "model", 0, "cpu", lambda s, i, *_: seen.append((s, i)))
    assert seen == [("transformer", i) for i in (3, 4, 5, 6)]  # goes on from the checkpoint of step 2

    # From the same autoencoders and latents, but without a checkpoint on the way.
    for part in (tmp_path / "work").glob("transformer-*"):
        part.rename(tmp_path / "old")
    whole = run.pretrain("mini", tmp_path / "work", tmp_path / "again", 0, "cpu", lambda *_: None)
    a, b = (load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in (first, whole))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert a["proj_in.weight"].dtype == torch.bfloat16

    pipe = LTX2Pipeline.from_pretrained(first)
    assert pipe.transformer.config.num_layers == 1
    assert json.loads((first / "clip_defaults.json").read_text())["num_frames"] == 25


def test_every_word_of_the_world_has_its_own_token_and_state() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer("a red ball bounces once and a blue lamp").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.unk_token_id in tokenizer("a purple cow").input_ids
    encoder = build_text_encoder(0)
    states, mask = encode_captions(encoder, tokenizer, ["", "a red ball", "a blue ball"])
    assert mask.sum(1).tolist() == [1, 4, 4]
    assert (states[1] - states[2]).abs().max() > 0.01
    again, _ = encode_captions(build_text_encoder(0), tokenizer, ["a red ball"])
    torch.testing.assert_close(again[0], states[1])
