from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from omninft.scorers.videoalign import BASE, MODEL, TEMPLATE, load_videoalign, merged_lora, missing
from omninft.types import OmniNFTError
from tests.scorers.small_qwen2_vl import SMALL, make_clip, make_tokenizer, published_shapes, random_state, write_base

ROWS = 28  # 25 of the tokenizer and three reward tokens
TEMPLATE_TEXT = "quality <|VQ_reward|> END motion <|MQ_reward|> END {text_prompt} <|TA_reward|> END"
ALPHA, RANK = 6, 4
WRAPPED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def _own_weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "cache"))


def plain_state(outputs: int = 1) -> dict[str, Tensor]:
    return random_state(published_shapes(**(SMALL | {"rows": ROWS})) | {"rm_head.weight": (outputs, 16)}, seed=1)


def lora_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pairs for every linear layer of the language model, under the plain names of the weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, weight in state.items():
        if name.startswith("model.layers.") and name.removesuffix(".weight").endswith(WRAPPED):
            stem = name.removesuffix(".weight")
            shapes |= {f"{stem}.lora_A": (RANK, weight.shape[1]), f"{stem}.lora_B": (weight.shape[0], RANK)}
    return random_state(shapes, seed=2)


def peft_state(state: dict[str, Tensor], lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT's model.state_dict() calls them."""
    full: dict[str, Tensor] = {"base_model.model.lm_head.weight": state["model.embed_tokens.weight"]}
    for name, tensor in state.items():
        stem, _, last = name.rpartition(".")
        wrapped = f"{stem}.lora_A" in lora
        full[f"base_model.model.{stem}.base_layer.{last}" if wrapped else f"base_model.model.{name}"] = tensor
    return full | {f"base_model.model.{name}.default.weight": tensor for name, tensor in lora.items()}


def write_checkpoint(folder: Path, outputs: int = 1, number: int = 7, config: dict[str, Any] | None = None) -> Path:
    """model_config.json, template and checkpoint-N/model.pth; the base in base/."""
    write_base(folder / "base", **SMALL)
    (folder / "prompt_template.txt").write_text(TEMPLATE_TEXT)
    given = {
        "data_config": {"fps": 2.0, "max_frame_pixels": 200704, "prompt_template_type": "detailed_special"},
        "model_config": {"output_dim": outputs},
        "peft_lora_config": {"lora_r": RANK, "lora_alpha": ALPHA},
        "inference_config": None,
    }
    (folder / "model_config.json").write_text(json.dumps(given | (config or {})))
    place = folder / f"checkpoint-{number}"
    place.mkdir()
    state = plain_state(outputs)
    torch.save(peft_state(state, lora_state(state)), place / "model.pth")
    return folder


def load(folder: Path, **options: Any) -> Any:
    return load_videoalign(folder, folder / "base", dtype=torch.float32, **options)


def test_card_is_the_published_release() -> None:
    assert (MODEL.repo, MODEL.revision) == ("KlingTeam/VideoReward", "4f26600130683e6f1de9f5d463887f28e8ef995c")
    assert MODEL.sha256 == {
        "checkpoint-11352/model.pth": "48375908e6112de9f0248402db156a23b480709a6960b091c598c6f4c88d21b9"
    }
    assert not MODEL.commercial
    assert not MODEL.verified


@pytest.mark.parametrize(
    ("size", "frames", "fps", "expected", "tokens"),
    [
        ((512, 768), 121, 24.0, (120, 3, 364, 532), 60 * 247),
        ((256, 384), 121, None, (10, 3, 280, 392), 5 * 140),
        ((704, 1280), 121, 2.0, (10, 3, 308, 588), 5 * 231),
    ],
)
def test_frames_and_tokens_of_real_sizes(
    tmp_path: Path, size: tuple[int, int], frames: int, fps: float | None, expected: tuple[int, ...], tokens: int
) -> None:
    scorer = load(write_checkpoint(tmp_path / "w"))
    clip = make_clip(frames, *size)
    text_tokens = len(scorer.prepare(make_clip(2, 28, 28), "a ball", fps)) - 144  # 28 x 28 grows to 336 x 336
    example = scorer.prepare(clip, "a ball", fps)
    assert example.frames.shape == expected
    assert (example.ids == scorer.reader.tokens.id("<|video_pad|>")).sum() == tokens
    assert len(example) - tokens == text_tokens


def test_chosen_frames_are_uniform(tmp_path: Path) -> None:
    """Frame number i is grey i: 10 of 121 at 2 fps."""
    scorer = load(write_checkpoint(tmp_path / "w"))
    clip = make_clip(121, 28, 28)
    clip.video[:] = np.arange(121, dtype=np.uint8)[:, None, None, None]
    assert scorer.prepare(clip, "a").frames[:, 0, 0, 0].round().tolist() == [0, 13, 27, 40, 53, 67, 80, 93, 107, 120]


@pytest.mark.parametrize("outputs", [1, 3])
def test_scores_by_hand_from_hidden_states(tmp_path: Path, outputs: int) -> None:
    """One shared row, or row i for token i; mean and deviation as published."""
    scorer = load(write_checkpoint(tmp_path / "w", outputs))
    example = scorer.prepare(make_clip(), "a red ball")
    reader, found = scorer.reader, {}
    reader.network.rm_head.register_forward_hook(lambda module, inputs, _: found.update(hidden=inputs[0]))
    raw = scorer.judge([example], 10**6)
    hidden = found["hidden"][0].double().numpy()
    head = plain_state(outputs)["rm_head.weight"].double().numpy()
    expected = [hidden[i] @ head[i if outputs == 3 else 0] for i in range(3)]
    assert raw.shape == (1, 3)
    np.testing.assert_allclose(raw[0], expected, rtol=1e-5)
    vq, mq, ta = raw[0]
    by_hand = [(vq - 3.6757) / 2.2476, (mq - 1.1646) / 1.3811, (ta - 2.8105) / 2.5121]
    np.testing.assert_allclose(scorer.normalised(raw)[0], by_hand, rtol=1e-9)


def test_lora_is_merged_as_peft_applies_it() -> None:
    state = plain_state()
    lora = lora_state(state)
    assert len(lora) == 2 * 2 * 7
    merged = merged_lora(peft_state(state, lora), {"lora_alpha": ALPHA})
    assert len(merged) == len(state)
    for name, tensor in state.items():
        new = name if name.startswith("rm_head") else f"model.{name}"
        new = new.replace("model.model.", "model.language_model.")
        expected = tensor.double().numpy()
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A" in lora:
            expected = (
                expected
                + ALPHA / RANK * lora[f"{stem}.lora_B"].double().numpy() @ lora[f"{stem}.lora_A"].double().numpy()
            )
        np.testing.assert_allclose(merged[new].numpy(), expected, atol=1e-5, err_msg=name)


def test_lora_faults_are_named() -> None:
    state = plain_state()
    full = peft_state(state, lora_state(state))
    with pytest.raises(OmniNFTError, match="no lora_alpha"):
        merged_lora(full, {})
    stem = "base_model.model.model.layers.1.mlp.up_proj"
    lost = {name: tensor for name, tensor in full.items() if name != f"{stem}.lora_B.default.weight"}
    with pytest.raises(OmniNFTError, match=r"only one of lora_A and lora_B for .*layers.1.mlp.up_proj.weight"):
        merged_lora(lost, {"lora_alpha": 1})
    lost = {name: tensor for name, tensor in full.items() if name != f"{stem}.base_layer.weight"}
    with pytest.raises(OmniNFTError, match=r"changes .*layers.1.mlp.up_proj.weight, which neither"):
        merged_lora(lost, {"lora_alpha": 1})


def test_adapter_over_base_weights_gives_the_scores_of_the_full_checkpoint(tmp_path: Path) -> None:
    full = load(write_checkpoint(tmp_path / "full"))
    folder = write_checkpoint(tmp_path / "adapter")
    place, state = folder / "checkpoint-7", plain_state()
    (place / "model.pth").unlink()
    lora = {f"base_model.model.{name}.weight": tensor for name, tensor in lora_state(state).items()}
    save_file(lora, place / "adapter_model.safetensors")
    trained = {k: v for k, v in state.items() if k.startswith(("visual.", "rm_head.", "model.embed"))}
    torch.save({f"base_model.model.{k}": v for k, v in trained.items()}, place / "non_lora_state_dict.pth")
    assert "needs the base weights" in str(missing(folder, folder / "base"))
    base = random_state(published_shapes(**SMALL), seed=9)  # 40 rows, other vision weights
    base |= {k: v for k, v in state.items() if k.startswith("model.") and "embed" not in k}
    names = sorted(base)
    for part, half in enumerate((names[::2], names[1::2])):
        save_file({k: base[k].contiguous() for k in half}, folder / "base" / f"model-0000{part}-of-00002.safetensors")
    assert missing(folder, folder / "base") is None
    adapted = load(folder)
    clip = make_clip()
    scores = [s.judge([s.prepare(clip, "a red ball")], 10**6) for s in (full, adapted)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)


def test_highest_checkpoint_counts_as_a_number(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "w", number=11352, config={"peft_lora_config": {"lora_alpha": 0}})
    (folder / "checkpoint-11352" / "model.pth").rename(folder / "checkpoint-11352" / "gone")
    with pytest.raises(OmniNFTError, match=r"no checkpoint-N .* holds model.pth"):
        load(folder)
    (folder / "checkpoint-11352").rename(folder / "checkpoint-900")
    (folder / "checkpoint-900" / "gone").rename(folder / "checkpoint-900" / "model.pth")
    (folder / "checkpoint-80").mkdir()
    load(folder)
    (folder / "checkpoint-900").rename(folder / "checkpoint-11352")
    with pytest.raises(OmniNFTError, match="sha256"):
        load(folder)


def test_tokenizer_of_the_checkpoint_goes_before_the_base(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "w")
    assert load(folder).reader.tokens.reward_ids == (25, 26, 27)
    saved = make_tokenizer()
    saved.add_tokens(["<|TA_reward|>", "<|MQ_reward|>", "<|VQ_reward|>"], special_tokens=True)
    saved.chat_template = None
    saved.save_pretrained(str(folder / "checkpoint-7" / "tokenizer"))
    scorer = load(folder)
    assert scorer.reader.tokens.reward_ids == (27, 26, 25)
    assert scorer.prepare(make_clip(), "a").ids.tolist().count(26) == 1


def test_configuration_of_the_checkpoint_is_read(tmp_path: Path) -> None:
    inference = {f"{d}_{n}": v for d in ("VQ", "MQ", "TA") for n, v in (("mean", 1.0), ("std", 2.0))}
    data = {"fps": 3.0, "max_frame_pixels": 128 * 784}
    scorer = load(write_checkpoint(tmp_path / "w", config={"inference_config": inference, "data_config": data}))
    np.testing.assert_allclose(scorer.normalised(np.array([[3.0, 1.0, 0.0]])), [[1.0, 0.0, -0.5]])
    example = scorer.prepare(make_clip(96, 512, 768), "a")  # 12 frames; beta = 1.9795: 252 x 364
    assert example.frames.shape == (12, 3, 252, 364)
    (tmp_path / "w" / "model_config.json").write_text('{"data_config": {"prompt_template_type": "simple"}}')
    with pytest.raises(OmniNFTError, match="prompt_template_type is 'simple', expected 'detailed_special'"):
        load(tmp_path / "w")


def test_missing_names_weights_base_and_template(tmp_path: Path) -> None:
    text = str(missing(tmp_path, tmp_path / "base"))
    assert "hf download KlingTeam/VideoReward model_config.json checkpoint-11352/model.pth --revision 4f26600" in text
    assert "hf download Qwen/Qwen2-VL-2B-Instruct config.json tokenizer.json tokenizer_config.json" in text
    assert f"{TEMPLATE.url}prompt_template.py" in text
    with pytest.raises(OmniNFTError, match="hf download KlingTeam/VideoReward"):
        load_videoalign(tmp_path)
    assert BASE.name in str(missing())


def test_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OmniNFTError, match=r"rm_head.weight is \[2, 16\], expected 1 row"):
        load(write_checkpoint(tmp_path / "w", outputs=2))


def test_a_weight_too_many_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "w")
    state = plain_state() | {"model.layers.2.mlp.up_proj.weight": torch.zeros(24, 16)}
    torch.save(state, folder / "checkpoint-7" / "model.pth")
    with pytest.raises(OmniNFTError, match=r"1 unexpected: model.language_model.layers.2.mlp.up_proj.weight"):
        load(folder)
