from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

from omninft.scorers import dino
from omninft.scorers.dino import DINOScorer, load_dino, own_names, positions
from omninft.types import OmniNFTError
from tests.moving_clips import moving_clip
from tests.scorers.numpy_layers import State, attention, gelu, linear, norm, patches
from tests.scorers.numpy_resize import resized

WIDTH, HEADS, BLOCKS = 12, 2, 2


def published(width: int = WIDTH, blocks: int = BLOCKS, mlp: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict in the layout of dino_vitbase16_pretrain.pth."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 197, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for n in range(blocks):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", mlp, width),
            ("mlp.fc2", width, mlp),
        ):
            shapes[f"blocks.{n}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{n}.{name}.bias"] = (rows,)
        for name in ("norm1", "norm2"):
            shapes[f"blocks.{n}.{name}.weight"] = shapes[f"blocks.{n}.{name}.bias"] = (width,)
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def small_config() -> ViTConfig:
    return ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        intermediate_size=24,
        layer_norm_eps=1e-6,
    )


def small_scorer() -> DINOScorer:
    model = ViTModel(small_config(), add_pooling_layer=False)
    model.load_state_dict(own_names(published()))
    return DINOScorer(model)


def by_hand(frame: np.ndarray) -> np.ndarray:
    """The class token of one frame [H, W, 3], from the published state dict."""
    state = State(published())
    height, width = frame.shape[:2]
    size = (224, int(224 * width / height)) if height <= width else (int(224 * height / width), 224)
    x = resized(frame.transpose(2, 0, 1), *size, "bilinear") / 255
    x = (x - np.reshape((0.485, 0.456, 0.406), (3, 1, 1))) / np.reshape((0.229, 0.224, 0.225), (3, 1, 1))
    rows, columns = size[0] // 16, size[1] // 16
    tokens = patches(x[:, : rows * 16, : columns * 16], state, "patch_embed.proj", 16)
    table = state["pos_embed"][0]
    if (rows, columns) != (14, 14):
        grid = table[1:].reshape(14, 14, WIDTH).transpose(2, 0, 1)
        # 0.1 is added to the numbers of patches before they become factors.
        grid = resized(grid, rows, columns, "bicubic", (14 / (rows + 0.1), 14 / (columns + 0.1)))
        table = np.concatenate([table[:1], grid.reshape(WIDTH, -1).T])
    y = np.concatenate([state["cls_token"][0], tokens]) + table
    for n in range(BLOCKS):
        block = state.under(f"blocks.{n}")
        q, k, v = np.split(linear(norm(y, block, "norm1", 1e-6), block, "attn.qkv"), 3, axis=1)
        y = y + linear(attention(q, k, v, HEADS), block, "attn.proj")
        y = y + linear(gelu(linear(norm(y, block, "norm2", 1e-6), block, "mlp.fc1")), block, "mlp.fc2")
    feature = norm(y, state, "norm", 1e-6)[0]
    return feature / np.linalg.norm(feature)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (80, 50)])
def test_features_against_numpy(height, width):
    video = moving_clip(4, 2, height, width).video
    found = small_scorer().embed_frames(video, budget=1)
    np.testing.assert_allclose(found, np.stack([by_hand(frame) for frame in video]), atol=2e-5)


def test_features_do_not_depend_on_the_batch():
    video = moving_clip(5, 5, 40, 56).video
    scorer = small_scorer()
    np.testing.assert_allclose(scorer.embed_frames(video, 2), scorer.embed_frames(video, 5), atol=1e-6)
    np.testing.assert_allclose(scorer.embed_frames(video).norm(dim=1), 1, atol=1e-6)


def test_positions_of_the_trained_grid_are_untouched():
    table = torch.randn(1, 197, 4)
    assert positions(table, 14, 14) is table
    assert positions(table, 14, 24).shape == (1, 1 + 14 * 24, 4)


def test_full_size_is_the_released_one():
    with torch.device("meta"):
        model = ViTModel(ViTConfig(layer_norm_eps=dino.NORM_EPS), add_pooling_layer=False)
        state = own_names({k: v.to("meta") for k, v in published(768, 12, 3072).items()})
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert sum(v.numel() for v in state.values()) == dino.CARD.parameters == 85_798_656


def hub_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the hub's pytorch_model.bin has it, written for transformers 4."""
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    parts = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    out = {"pooler.dense.weight": torch.zeros(2, 2)}
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, n, rest = name.split(".", 2)
            part, kind = rest.rsplit(".", 1)
            if part == "attn.qkv":
                for word, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    out[f"encoder.layer.{n}.attention.attention.{word}.{kind}"] = piece
            else:
                out[f"encoder.layer.{n}.{parts[part]}.{kind}"] = tensor
        else:
            name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
            out[names.get(name, name.replace("norm.", "layernorm."))] = tensor
    return out


def test_both_layouts_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setattr(dino, "ViTConfig", lambda **_: small_config())
    with pytest.raises(OmniNFTError, match=r"curl .*dl\.fbaipublicfiles\.com/dino/.*dino_vitbase16_pretrain\.pth"):
        load_dino(tmp_path)
    video = moving_clip(6, 2, 40, 40).video
    expected = small_scorer().embed_frames(video)
    (tmp_path / "hub").mkdir()
    torch.save(hub_layout(published()), tmp_path / "hub" / "pytorch_model.bin")
    np.testing.assert_allclose(load_dino(tmp_path / "hub").embed_frames(video), expected, atol=1e-6)
    torch.save(published(), tmp_path / "dino_vitbase16_pretrain.pth")
    for path in (tmp_path, tmp_path / "dino_vitbase16_pretrain.pth"):
        np.testing.assert_allclose(load_dino(path).embed_frames(video), expected, atol=1e-6)
    torch.save({k: v for k, v in published().items() if k != "norm.bias"}, tmp_path / "dino_vitbase16_pretrain.pth")
    with pytest.raises(OmniNFTError, match=r"1 missing: layernorm\.bias"):
        load_dino(tmp_path)
