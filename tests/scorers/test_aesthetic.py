from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from omninft.scorers import aesthetic
from omninft.scorers.aesthetic import AestheticScorer, load_aesthetic, missing_aesthetic
from omninft.scorers.clip import MEAN, STD
from omninft.types import OmniNFTError
from tests.moving_clips import moving_clip
from tests.scorers.numpy_layers import randomise
from tests.scorers.numpy_resize import resized

TOWER = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    projection_dim=8,
)


def head() -> nn.Linear:
    return randomise(nn.Linear(8, 1), seed=7, scale=3)  # type: ignore[return-value]


def test_scores_are_linear_in_features_of_length_one():
    model = randomise(CLIPVisionModelWithProjection(CLIPVisionConfig(**TOWER)), seed=1)
    layer = head()
    video = moving_clip(3, 5, 40, 60).video
    found = AestheticScorer(model, layer)(video, budget=2)
    pixels = resized(video.transpose(0, 3, 1, 2), 28, 42, "bicubic")[..., 7:35] / 255
    pixels = (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    with torch.no_grad():
        features = model(pixel_values=torch.from_numpy(pixels).float()).image_embeds.double().numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    expected = features @ layer.weight.double().numpy()[0] + float(layer.bias)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(found) > 1e-3


def test_the_picture_half_and_the_head_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "weights"))
    assert "hf download openai/clip-vit-large-patch14" in (missing_aesthetic(tmp_path) or "")
    assert "sa_0_4_vit_l_14_linear.pth" in (missing_aesthetic(tmp_path) or "")
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    config = CLIPConfig(vision_config=TOWER, text_config=text, projection_dim=8)
    whole = randomise(CLIPModel(config), seed=2)
    config.to_json_file(tmp_path / "config.json")
    state = whole.state_dict() | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(OmniNFTError, match=r"LAION aesthetic predictor.*curl"):
        load_aesthetic(tmp_path)
    (tmp_path / "weights").mkdir()
    torch.save(head().state_dict(), tmp_path / "weights" / "sa_0_4_vit_l_14_linear.pth")
    assert missing_aesthetic(tmp_path) is None
    video = moving_clip(4, 2, 30, 30).video
    tower = CLIPVisionModelWithProjection(config.vision_config)
    tower.load_state_dict({k: v for k, v in whole.state_dict().items() if k.startswith("vis")})
    expected = AestheticScorer(tower, head())(video)
    np.testing.assert_allclose(load_aesthetic(tmp_path)(video), expected, atol=1e-6)


def test_full_size_is_the_released_one():
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=768))
    assert sum(p.numel() for p in model.parameters()) == aesthetic.CARD.parameters == 303_966_208
    assert aesthetic.HEAD_CARD.parameters == 768 + 1
