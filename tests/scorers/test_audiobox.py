from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import WavLMConfig

from omninft.scorers import audiobox
from omninft.scorers.audiobox import AXES, AudioBox, AudioBoxScorer, load_audiobox, released_name, valid_frames, windows
from omninft.scorers.weights import load_strict, renamed
from omninft.types import OmniNFTError

SMALL = WavLMConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    conv_dim=(8,) * 7,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
)
TARGETS = {axis: {"mean": 5.0 + i, "std": 1.5 + 0.1 * i} for i, axis in enumerate(AXES)}
SMALL_CONFIG = {"proj_num_layer": 3, "proj_ln": True, "nth_layer": 3, "target_transform": TARGETS}


def published_shapes(
    width: int, inner: int, heads: int, layers: int, conv: int, taps: int, groups: int, head_layers: int
) -> dict[str, list[int]]:
    """Names and shapes in model.safetensors, as the package audiobox_aesthetics 0.0.4 builds them (with proj_ln)."""
    shapes: dict[str, list[int]] = {"mask_emb": [width]}
    for i, kernel in enumerate((10, 3, 3, 3, 3, 2, 2)):
        shapes[f"feature_extractor.conv_layers.{i}.0.weight"] = [conv, 1 if i == 0 else conv, kernel]
    shapes |= {f"feature_extractor.conv_layers.0.2.{part}": [conv] for part in ("weight", "bias")}
    shapes |= {"post_extract_proj.weight": [width, conv], "post_extract_proj.bias": [width]}
    shapes |= {f"layer_norm.{part}": [conv] for part in ("weight", "bias")}
    shapes["encoder.pos_conv.0.bias"] = [width]
    shapes["encoder.pos_conv.0.weight_g"] = [1, 1, taps]
    shapes["encoder.pos_conv.0.weight_v"] = [width, width // groups, taps]
    shapes |= {f"encoder.layer_norm.{part}": [width] for part in ("weight", "bias")}
    for n in range(layers):
        layer = f"encoder.layers.{n}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes[f"{layer}.self_attn.{projection}.weight"] = [width, width]
            shapes[f"{layer}.self_attn.{projection}.bias"] = [width]
        shapes[f"{layer}.self_attn.grep_a"] = [1, heads, 1, 1]
        shapes[f"{layer}.self_attn.grep_linear.weight"] = [8, width // heads]
        shapes[f"{layer}.self_attn.grep_linear.bias"] = [8]
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}.{norm}.{part}": [width] for part in ("weight", "bias")}
        shapes |= {f"{layer}.fc1.weight": [inner, width], f"{layer}.fc1.bias": [inner]}
        shapes |= {f"{layer}.fc2.weight": [width, inner], f"{layer}.fc2.bias": [width]}
    shapes["encoder.layers.0.self_attn.relative_attention_bias.weight"] = [320, heads]
    shapes = {f"wavlm_model.{name}": shape for name, shape in shapes.items()}
    for axis in AXES:
        shapes[f"layer_weights.{axis}"] = [layers + 1]
        for i in range(head_layers):
            out = 1 if i == head_layers - 1 else width
            shapes |= {f"proj_layer.{axis}.{3 * i}.weight": [out, width], f"proj_layer.{axis}.{3 * i}.bias": [out]}
            if i < head_layers - 1:
                shapes |= {f"proj_layer.{axis}.{3 * i + 1}.{part}": [width] for part in ("weight", "bias")}
    return shapes


SMALL_SHAPES = published_shapes(16, 24, 2, 2, 8, 8, 2, 3)


def small_state() -> dict[str, torch.Tensor]:
    """Published names with numbers by a formula: frac(43758.5453 sin(12.9898 i + 78.233 k)), k the name's place."""
    state = {}
    for k, (name, shape) in enumerate(sorted(SMALL_SHAPES.items())):
        size = int(np.prod(shape))
        wave = np.sin(np.arange(1, size + 1) * 12.9898 + k * 78.233) * 43758.5453
        values = (wave - np.floor(wave)) * 2 - 1
        if name.endswith("weight_g") or (name.endswith("weight") and len(shape) == 1):
            values = values * 0.5 + 1
        elif name.endswith("weight") and len(shape) > 1:
            values = values * (3 / (size / shape[0])) ** 0.5
        state[name] = torch.from_numpy(values).float().reshape(shape)
    return state


def small_scorer() -> AudioBoxScorer:
    model = AudioBox(SMALL_CONFIG, SMALL)
    load_strict(model, renamed(small_state(), released_name), "test")
    return AudioBoxScorer(model)


def tone(samples: int) -> np.ndarray:
    t = np.arange(samples)
    return (0.5 * np.sin(t * 0.05) * np.sin(t * 0.0003) + 0.1 * np.sin(t * t * 1e-6)).astype(np.float32)


def test_windows_are_10_seconds_each_and_the_last_is_filled():
    wave = np.ones(25 * 16_000, np.float32)
    cut, lengths = windows(wave)
    assert cut.shape == (3, 160_000)
    assert lengths.tolist() == [160_000, 160_000, 80_000]
    assert cut[2].sum() == 80_000
    assert windows(wave[: 20 * 16_000])[1].tolist() == [160_000, 160_000]
    assert windows(wave[:1])[1].tolist() == [1]


def test_a_frame_counts_when_any_of_its_320_samples_does():
    # 10 s are 499 frames; 160,000 // 499 = 320.
    def count(valid: int) -> int:
        return int(valid_frames(torch.arange(160_000)[None] < valid, 499).sum())

    assert [count(n) for n in (1, 320, 321, 80_640, 159_680, 159_681, 160_000)] == [1, 1, 2, 252, 499, 499, 499]


def test_full_size_names_and_shapes_are_the_released_ones():
    published = published_shapes(768, 3072, 12, 12, 512, 128, 16, 5)
    assert len(published) == 324
    with torch.device("meta"):
        model = AudioBox({"proj_num_layer": 5, "proj_ln": True, "target_transform": TARGETS})
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {released_name(name): shape for name, shape in published.items()} == own
    assert {released_name(f"model.{name}"): shape for name, shape in published.items()} == own
    encoder = sum(p.numel() for p in model.wavlm_model.parameters())
    assert encoder / 1e6 == pytest.approx(94.4, abs=0.05)


def test_ratings_are_those_of_the_released_code():
    """Golden numbers: audiobox_aesthetics 0.0.4's AesMultiOutput in this size and with these weights."""
    found = small_scorer()([tone(176_100), tone(16_000)], budget=2)
    golden = [
        [4.80762535, 6.77598557, 7.06885125, 8.06512448],
        [4.87162113, 6.77879429, 7.06610107, 8.07919312],
    ]
    np.testing.assert_allclose(found, golden, atol=2e-6)


def test_a_clip_is_the_mean_of_its_windows_by_their_lengths():
    scorer = small_scorer()
    wave = tone(200_000)
    parts = scorer([wave[:160_000], wave[160_000:]], budget=1)
    np.testing.assert_allclose(scorer([wave], budget=4)[0], parts[0] * 0.8 + parts[1] * 0.2, atol=2e-6)


def test_a_batch_gives_what_its_clips_give_alone_in_any_order():
    scorer = small_scorer()
    waves = [tone(n) for n in (5_000, 170_000, 64_000)]
    waves[2][::7] *= -1
    alone = np.concatenate([scorer([wave], budget=8) for wave in waves])
    np.testing.assert_allclose(scorer(waves, budget=3), alone, atol=2e-6)
    np.testing.assert_allclose(scorer(waves[::-1], budget=8), alone[::-1], atol=2e-6)
    assert np.ptp(alone, axis=0).min() > 1e-3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_file(small_state(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SMALL_CONFIG))
    monkeypatch.setattr(audiobox, "CARD", dataclasses.replace(audiobox.CARD, sha256=None))
    return tmp_path


def test_files_of_a_folder_are_loaded(folder):
    found = load_audiobox(folder, encoder=SMALL)([tone(16_000)], budget=1)
    np.testing.assert_allclose(found, [[4.87162113, 6.77879429, 7.06610107, 8.07919312]], atol=2e-6)


def test_files_that_do_not_fit_are_refused(folder):
    with pytest.raises(OmniNFTError, match="of another shape"):
        load_audiobox(folder, encoder=WavLMConfig(**SMALL.to_diff_dict() | {"intermediate_size": 32}))
    state = small_state()
    del state["wavlm_model.encoder.layers.1.fc2.bias"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(OmniNFTError, match=r"1 missing: .*layers\.1\.feed_forward\.output_dense\.bias"):
        load_audiobox(folder, encoder=SMALL)


def test_another_release_is_told_by_its_checksum(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SMALL_CONFIG))
    with pytest.raises(OmniNFTError, match=r"sha256 is .* expected a5a3c2412649"):
        load_audiobox(tmp_path, encoder=SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_transform": None}, "no target_transform with mean and std of CE, CU, PC, PQ"),
        ({"target_transform": {axis: TARGETS[axis] for axis in ("CE", "CU", "PQ")}}, "no target_transform"),
        ({"use_weighted_layer_sum": False}, "use_weighted_layer_sum is False in config.json, expected True"),
        ({"nth_layer": 2}, "nth_layer is 2 in config.json, expected 3"),
        ({"proj_act_fn": "relu"}, "proj_act_fn is 'relu'"),
    ],
)
def test_configurations_that_are_not_computed_are_refused(change, message):
    with pytest.raises(OmniNFTError, match=message):
        AudioBox(SMALL_CONFIG | change, SMALL)


def test_a_missing_file_names_the_command_that_fetches_it(tmp_path):
    with pytest.raises(OmniNFTError, match=r"hf download facebook/audiobox-aesthetics config\.json model"):
        load_audiobox(tmp_path)
