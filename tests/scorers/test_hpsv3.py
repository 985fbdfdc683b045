from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from omninft.scorers import hpsv3
from omninft.scorers.hpsv3 import MODEL, load_hpsv3, missing, preference_head
from omninft.scorers.qwen2_vl import normalised, patchify
from omninft.types import OmniNFTError
from tests.scorers.small_qwen2_vl import SMALL, make_clip, published_shapes, random_state, write_base

TEMPLATE_SOURCE = 'INSTRUCTION = "rate {text_prompt} "\nprompt_with_special_token = "quality : <|Reward|> END"\n'


def head_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """As published: 0, 3 and 5 of a sequence."""
    layers = {"0": (1024, width), "3": (16, 1024), "5": (2, 16)}
    shapes: dict[str, tuple[int, ...]] = {f"rm_head.{k}.weight": s for k, s in layers.items()}
    return shapes | {f"rm_head.{k}.bias": s[:1] for k, s in layers.items()}


def small_state() -> dict[str, Tensor]:
    shapes = published_shapes(**(SMALL | {"rows": 26})) | head_shapes(16)
    return random_state(shapes | {"lm_head.weight": (26, 16)}, seed=3)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setattr(hpsv3, "MODEL", replace(MODEL, sha256=None))
    write_base(tmp_path / "base", **SMALL)
    save_file(small_state(), tmp_path / "HPSv3.safetensors")
    (tmp_path / "data_collator_qwen.py").write_text(TEMPLATE_SOURCE)
    return tmp_path


def load(folder: Path, **options: Any) -> Any:
    return load_hpsv3(folder, folder / "base", dtype=torch.float32, **options)


def test_card_is_the_published_release() -> None:
    assert (MODEL.repo, MODEL.revision) == ("MizzenAI/HPSv3", "4f81e3e09edd82fe3c5f636444c721b592a735ca")
    assert MODEL.sha256 == {"HPSv3.safetensors": "a13d7ff5a07b7ffa0f7824e60d62e6ae144541ceefd5224b4c08fda7ab39f353"}
    assert not MODEL.commercial
    assert not MODEL.verified


def test_head_has_the_published_names_and_shapes() -> None:
    found = {f"rm_head.{name}": tuple(t.shape) for name, t in preference_head(3584).state_dict().items()}
    assert found == head_shapes(3584)


@pytest.mark.parametrize(
    ("size", "small", "tokens"),
    [((512, 768), (364, 532), 247), ((256, 384), (392, 560), 280), ((704, 1280), (308, 588), 231)],
)
def test_sizes_and_tokens(folder: Path, size: tuple[int, int], small: tuple[int, int], tokens: int) -> None:
    scorer = load(folder)
    example = scorer.prepare(make_clip(1, *size).video[0], "a red ball")
    assert example.frames.shape == (1, 3, *small)
    assert (example.ids == scorer.reader.tokens.id("<|image_pad|>")).sum() == tokens
    assert not (example.ids == scorer.reader.tokens.id("<|video_pad|>")).any()


def test_pixels_are_those_of_the_image_processor(folder: Path) -> None:
    """transformers' own processor on Pillow, given the official limits."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = module.Qwen2VLImageProcessorPil(size={"shortest_edge": 200704, "longest_edge": 200704})
    frame = make_clip(1, 250, 390).video[0]
    official = processor(images=[Image.fromarray(frame)], return_tensors="pt")
    patches, grid = patchify(normalised(load(folder).prepare(frame, "a").frames))
    assert official["image_grid_thw"].tolist() == [list(grid)]
    torch.testing.assert_close(patches, official["pixel_values"].float(), atol=1e-5, rtol=1e-5)


def test_jpeg_changes_the_picture_as_pillow_does(folder: Path) -> None:
    scorer, frame = load(folder), make_clip(1, 100, 120).video[0]
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG")  # Pillow's default quality is 75
    lossy = np.array(Image.open(file).convert("RGB"))
    through = scorer.prepare(frame, "a", jpeg_quality=75).frames
    torch.testing.assert_close(through, scorer.prepare(lossy, "a").frames, atol=0, rtol=0)
    assert (through.int() - scorer.prepare(frame, "a").frames.int()).abs().max() > 1


def test_score_is_the_mean_of_the_head_by_hand(folder: Path) -> None:
    scorer = load(folder)
    example = scorer.prepare(make_clip(1).video[0], "a red ball")
    caught: dict[str, Tensor] = {}
    scorer.reader.network.rm_head.register_forward_hook(lambda module, inputs, _: caught.update(hidden=inputs[0]))
    found = scorer.judge([example], 10**6)
    x, state = caught["hidden"][0, 0].double().numpy(), {k: v.double().numpy() for k, v in small_state().items()}
    x = np.maximum(state["rm_head.0.weight"] @ x + state["rm_head.0.bias"], 0)
    x = np.maximum(state["rm_head.3.weight"] @ x + state["rm_head.3.bias"], 0)
    mean, _ = state["rm_head.5.weight"] @ x + state["rm_head.5.bias"]
    np.testing.assert_allclose(found, [mean], rtol=1e-5)


def test_pictures_of_several_sizes_in_one_pass(folder: Path) -> None:
    scorer = load(folder)
    examples = [
        scorer.prepare(make_clip(1, *size, seed=i).video[0], text)
        for i, (size, text) in enumerate([((28, 56), "a"), ((90, 40), "a red ball falls"), ((28, 28), "red")])
    ]
    singles = np.concatenate([scorer.judge([example], 1) for example in examples])
    np.testing.assert_allclose(scorer.judge(examples, 10**6), singles, atol=1e-4)
    assert np.ptp(singles) > 0.01


def test_missing_names_all_three(folder: Path) -> None:
    assert missing(folder, folder / "base") is None
    (folder / "data_collator_qwen.py").unlink()
    (folder / "HPSv3.safetensors").unlink()
    text = str(missing(folder, folder / "nothing"))
    assert "hf download MizzenAI/HPSv3 HPSv3.safetensors --revision 4f81e3e" in text
    assert "hf download Qwen/Qwen2-VL-7B-Instruct config.json" in text
    assert "data_collator_qwen.py" in text
    with pytest.raises(OmniNFTError, match="HPSv3: missing HPSv3"):
        load(folder)


def test_another_checkpoint_is_refused(folder: Path) -> None:
    state = small_state()
    save_file({k: v for k, v in state.items() if not k.startswith("rm_head.0")}, folder / "HPSv3.safetensors")
    with pytest.raises(OmniNFTError, match=r"no rm_head.0.weight"):
        load(folder)
    save_file(state | {"rm_head.5.weight": torch.zeros(1, 16)}, folder / "HPSv3.safetensors")
    with pytest.raises(OmniNFTError, match=r"rm_head.5.weight \(\[1, 16\], expected \[2, 16\]\)"):
        load(folder)


def test_checksum_is_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpsv3, "MODEL", MODEL)
    with pytest.raises(OmniNFTError, match="expected a13d7ff5"):
        load(folder)
