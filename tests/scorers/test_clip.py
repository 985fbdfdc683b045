from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel

from omninft.scorers import clip as scorer_module
from omninft.scorers.clip import CLIPScorer, frames, load_clip, normalised
from omninft.types import OmniNFTError
from tests.moving_clips import moving_clip

WORDS = ["a", "red", "ball", "rolls", "over", "green", "grass"]


def small_tokenizer() -> Tokenizer:
    """As CLIP's, the end token has the largest id: 0 to 6 are words, 7 begins, 8 ends."""
    tokens = [*WORDS, "<start>", "<end>"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(tokens)}, unk_token="a"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 7), ("<end>", 8)]
    )
    return tokenizer


def small_config(eos: int = 8) -> CLIPConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = sizes | {"vocab_size": 9, "eos_token_id": eos, "bos_token_id": 7}
    return CLIPConfig(text_config=text, vision_config=sizes | {"patch_size": 32, "image_size": 224}, projection_dim=8)


def small_model(eos: int = 8, seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    model = CLIPModel(small_config(eos)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def small_scorer() -> CLIPScorer:
    return CLIPScorer(small_model(), small_tokenizer())


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 224, 224), dtype=np.uint8)


def test_48_frames_are_spread_over_the_clip():
    clip = moving_clip(0, frames=121, height=8, width=8)
    found, counts = frames(clip)
    # i * 120 / 47 is never half a frame: rounding needs no rule.
    wanted = [int(Fraction(i * 120, 47) + Fraction(1, 2)) for i in range(48)]
    assert wanted[:6] == [0, 3, 5, 8, 10, 13]
    assert wanted[-1] == 120
    assert found.shape == (48, 3, 224, 224)
    assert counts.tolist() == [1] * 48
    flat = np.stack([np.full((8, 8, 3), t, np.uint8) for t in range(121)])
    shown, _ = frames(type(clip)(flat, 24.0, clip.waveform, 16_000, clip.prompt))
    assert shown[:, 0, 0, 0].tolist() == wanted


def test_a_short_clip_shows_some_frames_twice():
    found, counts = frames(moving_clip(0, frames=10))
    assert found.shape == (10, 3, 224, 224)
    assert counts.sum() == 48
    # round(9 i / 47) is 0 for i = 0, 1, 2 and 1 for i = 3 ... 7.
    assert counts[:2].tolist() == [3, 5]
    assert frames(moving_clip(0, frames=1))[1].tolist() == [48]


def test_frames_are_resized_as_pillow_does():
    clip = moving_clip(3, frames=1, height=256, width=384)
    found, _ = frames(clip)
    resized = np.asarray(Image.fromarray(clip.video[0]).resize((336, 224), Image.Resampling.BICUBIC))
    expected = resized[:, 56:280].transpose(2, 0, 1)
    assert np.abs(found[0].astype(int) - expected).max() <= 1
    # Pillow rounds between the two directions as well.
    assert np.abs(found[0].astype(int) - expected).mean() < 0.2
    assert frames(moving_clip(0, frames=1, height=90, width=60))[0].shape == (1, 3, 224, 224)


def test_normalisation_is_clips_own():
    ramp = np.zeros((1, 3, 1, 3), np.uint8)
    ramp[..., 1], ramp[..., 2] = 255, 128
    found = normalised(ramp)[0, :, 0].numpy()
    expected = [
        [-1.79226253, 1.93033625, 0.07633567],
        [-1.75209713, 2.07488384, 0.16889731],
        [-1.48021977, 2.14589699, 0.33994877],
    ]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_cosines_are_those_of_the_whole_model():
    model, scorer = small_model(), small_scorer()
    images = pixels(3)
    found = scorer([images[:1], images[1:2], images[2:]], [np.ones(1)] * 3, ["a red ball"] * 3, budget=2)
    ids = torch.tensor([[7, 0, 1, 2, 8]])
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=normalised(images))
    np.testing.assert_allclose(found, (out.image_embeds @ out.text_embeds.T)[:, 0].numpy(), atol=1e-5)
    assert np.ptp(found) > 1e-3


@pytest.mark.parametrize("eos", [8, 2])
def test_the_end_token_is_found_by_both_kinds_of_configuration(eos):
    """The released config.json says 2, and means the largest id; the shorter text is filled up behind its end."""
    scorer = CLIPScorer(small_model(eos), small_tokenizer())
    together = scorer.embed_texts(["ball", "a red ball rolls over green grass"])
    torch.testing.assert_close(together[:1], scorer.embed_texts(["ball"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))
    reference = small_model(8).get_text_features(
        input_ids=torch.tensor([[7, 2, 8]]), attention_mask=torch.ones(1, 3, dtype=torch.long)
    )
    expected = reference.pooler_output / reference.pooler_output.norm()
    torch.testing.assert_close(together[:1], expected, atol=1e-5, rtol=0)


def test_texts_are_cut_to_77_tokens_with_their_end():
    scorer = small_scorer()
    tokens = scorer.tokenizer.encode("ball " * 100).ids
    assert len(tokens) == 77
    assert tokens[0] == 7
    assert tokens[-1] == 8
    torch.testing.assert_close(scorer.embed_texts(["ball " * 100]), scorer.embed_texts(["ball " * 75]))


def test_the_mean_counts_frames_as_often_as_they_were_taken():
    scorer = small_scorer()
    images = pixels(2)
    single = scorer([images[:1], images[1:]], [np.ones(1)] * 2, ["grass"] * 2, budget=8)
    joint = scorer([images], [np.array([3, 1])], ["grass"], budget=1)
    np.testing.assert_allclose(joint, [(3 * single[0] + single[1]) / 4], atol=1e-6)


def test_a_batch_gives_what_its_clips_give_alone_in_any_order():
    scorer = small_scorer()
    images = [pixels(n, n) // n for n in (1, 3, 2)]
    counts = [np.ones(len(i)) for i in images]
    texts = ["a red ball", "a red ball rolls over green grass", "grass"]
    alone = np.concatenate([scorer([i], [c], [t], budget=8) for i, c, t in zip(images, counts, texts, strict=True)])
    for order in ([0, 1, 2], [2, 0, 1]):
        found = scorer([images[i] for i in order], [counts[i] for i in order], [texts[i] for i in order], budget=4)
        np.testing.assert_allclose(found, alone[order], atol=1e-5)
    assert len(np.unique(alone.round(3))) == 3


def published_names() -> dict[str, list[int]]:
    """Names and shapes in pytorch_model.bin of openai/clip-vit-base-patch32."""
    shapes: dict[str, list[int]] = {
        "logit_scale": [],
        "text_projection.weight": [512, 512],
        "visual_projection.weight": [512, 768],
        "text_model.embeddings.position_ids": [1, 77],
        "text_model.embeddings.token_embedding.weight": [49_408, 512],
        "text_model.embeddings.position_embedding.weight": [77, 512],
        "vision_model.embeddings.position_ids": [1, 50],
        "vision_model.embeddings.class_embedding": [768],
        "vision_model.embeddings.patch_embedding.weight": [768, 3, 32, 32],
        "vision_model.embeddings.position_embedding.weight": [50, 768],
    }
    norms = {"text_model.final_layer_norm": 512, "vision_model.pre_layrnorm": 768, "vision_model.post_layernorm": 768}
    for tower, width in (("text_model", 512), ("vision_model", 768)):
        for n in range(12):
            layer = f"{tower}.encoder.layers.{n}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes[f"{layer}.self_attn.{part}.weight"] = [width, width]
                shapes[f"{layer}.self_attn.{part}.bias"] = [width]
            shapes |= {f"{layer}.mlp.fc1.weight": [4 * width, width], f"{layer}.mlp.fc1.bias": [4 * width]}
            shapes |= {f"{layer}.mlp.fc2.weight": [width, 4 * width], f"{layer}.mlp.fc2.bias": [width]}
            norms |= {f"{layer}.layer_norm1": width, f"{layer}.layer_norm2": width}
    for name, width in norms.items():
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = [width]
    return shapes


def test_full_size_names_and_shapes_are_the_released_ones():
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig())
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    published = {name: shape for name, shape in published_names().items() if not name.endswith("position_ids")}
    assert len(published) == 398
    assert own == published
    assert sum(p.numel() for p in model.parameters()) == scorer_module.CARD.parameters == 151_277_313


def test_files_of_a_folder_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "cache"))
    with pytest.raises(OmniNFTError, match=r"hf download openai/clip-vit-base-patch32 config\.json"):
        load_clip(tmp_path)
    model = small_model(seed=4)
    state = model.state_dict() | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    torch.save(state, tmp_path / "pytorch_model.bin")
    small_config().to_json_file(tmp_path / "config.json")
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    inputs = [pixels(1)], [np.ones(1)], ["red ball"]
    expected = CLIPScorer(model, small_tokenizer())(*inputs, budget=1)
    np.testing.assert_allclose(load_clip(tmp_path)(*inputs, budget=1), expected, atol=1e-6)
    del state["visual_projection.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(OmniNFTError, match=r"1 missing: visual_projection\.weight"):
        load_clip(tmp_path)
