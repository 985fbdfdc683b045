"""Each form, loaded back by the program it is for, gives the outputs of the adapter that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from huggingface_hub.errors import HFValidationError
from peft import PeftModel

from omninft.config import LoraConfig, ModelConfig, SamplingConfig
from omninft.export.card import push, write_card
from omninft.export.forms import write_merged, write_peft
from omninft.export.lora import write_common
from omninft.models.lora_file import read_lora
from omninft.models.ltx2 import LTX2Policy
from omninft.models.originals import empty
from omninft.models.versions import VERSIONS, Version
from omninft.types import Latents, OmniNFTError
from tests.models.published import published_pipeline
from tests.random_models import PROMPTS


@pytest.fixture(scope="module", params=VERSIONS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LTX2Policy:
    """A policy on a folder of each version, with an adapter that changes something."""
    version: Version = request.param
    folder = tmp_path_factory.mktemp("base") / version
    published_pipeline(version).save_pretrained(folder)
    policy = LTX2Policy.load(ModelConfig(path=str(folder), lora=LoraConfig(rank=2, alpha=3)))
    torch.manual_seed(1)
    for name, tensor in policy.adapters.state("current").items():
        if name.endswith("lora_B"):
            tensor.normal_(0, 0.1)
    return policy


def velocity(policy: LTX2Policy, adapter: Any) -> Latents:
    geometry = policy.geometry(SamplingConfig(num_frames=9, height=64, width=64))
    torch.manual_seed(5)
    noise = Latents(
        torch.randn(2, geometry.video_tokens, geometry.video_channels),
        torch.randn(2, geometry.audio_tokens, geometry.audio_channels),
    )
    with torch.no_grad():
        return policy.velocity(noise, torch.full((2,), 0.8), policy.encode(PROMPTS), geometry, adapter)


def assert_same(policy: LTX2Policy, adapter: Any, trained: LTX2Policy) -> None:
    made, expected, base = velocity(policy, adapter), velocity(trained, "current"), velocity(trained, "reference")
    torch.testing.assert_close(made.video, expected.video, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.audio, expected.audio, atol=1e-5, rtol=1e-5)
    assert (expected.video - base.video).abs().max() > 0.01


@pytest.mark.parametrize("form", ["common", "peft"])
def test_an_adapter_comes_back_as_the_start_of_a_run(form: str, trained: LTX2Policy, tmp_path: Path) -> None:
    write = write_common if form == "common" else write_peft
    write(trained.adapters.state("current"), trained.adapters.config, tmp_path)
    lora = LoraConfig(rank=2, alpha=3, init=str(tmp_path))
    policy = LTX2Policy.load(trained.config.model_copy(update={"lora": lora}))
    assert_same(policy, "current", trained)
    assert_same(policy, "old", trained)
    assert torch.equal(velocity(policy, "reference").video, velocity(trained, "reference").video)


def test_peft_loads_its_folder(trained: LTX2Policy, tmp_path: Path) -> None:
    write_peft(trained.adapters.state("current"), trained.adapters.config, tmp_path, "some/base")
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (2, 3, "some/base")
    plain = LTX2VideoTransformer3DModel.from_pretrained(Path(trained.config.path) / "transformer")
    wrapped = PeftModel.from_pretrained(plain, tmp_path)
    state = {n.removeprefix("base_model.model."): p for n, p in wrapped.named_parameters() if ".lora_" in n}
    assert len(state) == len(trained.adapters.state("current"))
    layer = wrapped.base_model.model.transformer_blocks[1].attn1.to_q
    ours = trained.pipeline.transformer.transformer_blocks[1].attn1.to_q
    x = torch.randn(3, layer.in_features)
    with torch.no_grad(), trained.adapters.using("current"):
        torch.testing.assert_close(layer(x), ours(x), atol=1e-6, rtol=1e-6)


def test_merged_weights_are_the_model(trained: LTX2Policy, tmp_path: Path) -> None:
    folder = write_merged(trained.adapters.state("current"), trained.adapters.config, trained.config, tmp_path)
    policy = LTX2Policy.load(trained.config.model_copy(update={"transformer": str(folder)}))
    assert_same(policy, "reference", trained)
    stock = LTX2VideoTransformer3DModel.from_pretrained(folder)
    assert {p.dtype for p in stock.parameters()} == {torch.float32}  # of the base's files
    assert stock.state_dict().keys() == empty("transformer", dict(stock.config)).state_dict().keys()
    halves = write_merged(
        trained.adapters.state("current"), trained.adapters.config, trained.config, tmp_path / "half", "bfloat16"
    )
    stored = LTX2VideoTransformer3DModel.from_pretrained(halves, torch_dtype=torch.bfloat16).state_dict()
    for name, tensor in stock.state_dict().items():
        torch.testing.assert_close(stored[name].float(), tensor, atol=0, rtol=2**-8)


def test_a_quantised_base_is_not_merged(tmp_path: Path) -> None:
    state = {"a.lora_A": torch.zeros(2, 2), "a.lora_B": torch.zeros(2, 2)}
    with pytest.raises(OmniNFTError, match="trained on a base in int8"):
        write_merged(state, LoraConfig(rank=2), ModelConfig(quantise="int8"), tmp_path)
    with pytest.raises(OmniNFTError, match="merged: 2 of 2 tensors have no place"):
        write_merged(state, LoraConfig(rank=2), ModelConfig(), tmp_path)


def test_peft_and_common_hold_the_same_adapter(tmp_path: Path) -> None:
    names = ("transformer_blocks.0.attn1.to_q", "proj_in")
    state = {f"{n}.lora_{p}": torch.randn(2, 2) for n in names for p in "AB"}
    lora = LoraConfig(rank=2, alpha=4, targets=names)
    for folder, write in (("common", write_common), ("peft", write_peft)):
        write(state, lora, tmp_path / folder)
        found, config = read_lora(tmp_path / folder)
        assert (config.rank, config.alpha, set(config.targets or ())) == (2, 4, set(names))
        assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


class TestCard:
    def test_says_how_to_load_what_was_measured_and_whose_licence_holds(self, tmp_path: Path) -> None:
        text = write_card(tmp_path, "common", "Lightricks/LTX-2", LoraConfig(), "| sync | better |").read_text()
        assert text.startswith("---\nlicense: other\nlibrary_name: diffusers\nbase_model: Lightricks/LTX-2\n")
        for said in ("load_lora_weights", "ComfyUI", "WanGP", "ltx-core", "model.lora.init", "| sync | better |"):
            assert said in text
        assert "rank 32, alpha 64" in text
        merged = write_card(tmp_path, "merged", "Lightricks/LTX-2", LoraConfig()).read_text()
        assert 'LTX2Pipeline.from_pretrained("Lightricks/LTX-2"' in merged
        assert "No evaluation of base against trained" in merged
        assert "base_model" not in write_card(tmp_path, "peft", "tiny", LoraConfig()).read_text()

    def test_pushes_the_folder_and_nothing_else(self, tmp_path: Path) -> None:
        calls: list[tuple[str, Any]] = []

        class Hub:
            def create_repo(self, repo_id: str, **options: Any) -> str:
                calls.append((repo_id, options))
                return f"https://hub/{repo_id}"

            def upload_folder(self, **options: Any) -> None:
                calls.append(("upload", options))

        assert push(tmp_path, "me/it", Hub()) == "https://hub/me/it"  # type: ignore[arg-type]
        assert calls == [
            ("me/it", {"exist_ok": True, "private": True}),
            ("upload", {"repo_id": "me/it", "folder_path": tmp_path}),
        ]

        class Closed(Hub):
            def create_repo(self, repo_id: str, **options: Any) -> str:
                raise HFValidationError("no such name")

        with pytest.raises(OmniNFTError, match=r"me/it: cannot be uploaded to \(no such name\)"):
            push(tmp_path, "me/it", Closed())  # type: ignore[arg-type]
