"""Text contexts on disk, and a text encoder that leaves and comes back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from omninft.config import LoraConfig, ModelConfig
from omninft.models.loading import model_path, text_identity
from omninft.models.ltx2 import LTX2Policy
from omninft.types import OmniNFTError
from tests.models.published import published_pipeline
from tests.random_models import PROMPTS

MODEL: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A small LTX-2 in a folder."""
    folder = tmp_path_factory.mktemp("models") / "small"
    published_pipeline("2").save_pretrained(folder)
    MODEL[:] = [str(folder)]


def config(cache: Path | None, path: str | None = None) -> ModelConfig:
    return ModelConfig(
        path=path or MODEL[0], text_cache=None if cache is None else str(cache), lora=LoraConfig(rank=2, alpha=4)
    )


def test_a_kept_context_needs_no_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LTX2Policy.load(config(None)).encode(PROMPTS)
    first = LTX2Policy.load(config(tmp_path))
    assert first.pipeline.text_encoder is None
    assert torch.equal(first.encode(PROMPTS).video, plain.video)
    assert first.pipeline.text_encoder is not None
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    monkeypatch.setattr("omninft.models.ltx2.load_text", lambda *_: pytest.fail("the encoder was loaded"))
    again = LTX2Policy.load(config(tmp_path)).encode(PROMPTS[::-1])
    for part in ("video", "audio", "mask"):
        assert torch.equal(getattr(again, part).flip(0), getattr(plain, part))


def test_preparing_frees_what_encoded_and_a_new_prompt_brings_it_back(tmp_path: Path) -> None:
    policy = LTX2Policy.load(config(tmp_path))
    policy.prepare_texts(PROMPTS)
    assert policy.pipeline.text_encoder is None
    assert policy.pipeline.connectors is None
    policy.encode(PROMPTS)
    assert policy.pipeline.text_encoder is None
    new = policy.encode(["a green ball"])
    assert policy.pipeline.text_encoder is not None
    assert torch.equal(new.video, LTX2Policy.load(config(None)).encode(["a green ball"]).video)


def test_a_freed_encoder_comes_back_without_a_cache() -> None:
    policy = LTX2Policy.load(config(None))
    before = policy.encode(PROMPTS[:1])
    policy.free_text_encoder()
    after = policy.encode(PROMPTS[1:])
    assert torch.equal(after.video, LTX2Policy.load(config(None)).encode(PROMPTS[1:]).video)
    assert torch.equal(policy.encode(PROMPTS[:1]).video, before.video)
    with pytest.raises(OmniNFTError, match="text_cache: expected a folder"):
        policy.prepare_texts(PROMPTS)


def test_another_encoder_or_length_has_other_contexts(tmp_path: Path) -> None:
    folder = shutil.copytree(MODEL[0], tmp_path / "model")
    here = config(tmp_path, str(folder))
    one = text_identity(here)
    assert one == text_identity(here)
    assert one != text_identity(config(tmp_path, "tiny"))
    assert one != text_identity(here.model_copy(update={"max_text_tokens": 8}))
    assert one != text_identity(here.model_copy(update={"dtype": "bfloat16"}))
    weights = folder / "connectors" / "diffusion_pytorch_model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert one != text_identity(here)


def test_the_identity_in_the_hubs_cache_is_the_content(tmp_path: Path) -> None:
    """Files there are links to names that are hashes; times do not matter."""
    folder = shutil.copytree(MODEL[0], tmp_path / "model")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, part in enumerate(("text_encoder", "tokenizer", "connectors")):
        for file in (folder / part).iterdir():
            blob = blobs / f"{number}{file.name}"
            file.rename(blob)
            file.symlink_to(blob)
    one = text_identity(config(None, str(folder)))
    for blob in blobs.iterdir():
        os.utime(blob, ns=(1, 1))
    assert one == text_identity(config(None, str(folder)))


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    policy = LTX2Policy.load(config(tmp_path))
    policy.prepare_texts(PROMPTS[:1])
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"half")
    with pytest.raises(OmniNFTError, match=f"{file.name}: damaged .*; remove it"):
        policy.encode(PROMPTS[:1])


def test_the_encoder_is_gone_from_where_it_was(tmp_path: Path) -> None:
    folder = shutil.copytree(MODEL[0], tmp_path / "model")
    policy = LTX2Policy.load(config(None, str(folder)))
    policy.free_text_encoder()
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(OmniNFTError, match="no text encoder could be loaded"):
        policy.encode(PROMPTS)


def test_no_weights_are_read_to_know_the_encoder() -> None:
    told = text_identity(ModelConfig())["files"]
    assert any("model.safetensors" in line for line in told)
    assert len(told) == len(
        [f for part in ("text_encoder", "tokenizer", "connectors") for f in (Path(model_path("tiny")) / part).iterdir()]
    )
