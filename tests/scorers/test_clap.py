from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import ClapConfig, ClapModel

from omninft.scorers import clap
from omninft.scorers.clap import CLAPScorer, load_clap, load_state, log_mel, windows
from omninft.types import OmniNFTError

WORDS = ["a", "dog", "barks", "and", "rain", "falls", "while", "music", "plays", "softly"]


def small_tokenizer() -> Tokenizer:
    """Special tokens under RoBERTa's ids: <s> 0, <pad> 1, </s> 2, <unk> 3."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return tokenizer


def small_config() -> ClapConfig:
    text = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 14,
    }
    audio = {
        "patch_embeds_hidden_size": 4,
        "hidden_size": 8,
        "depths": [1, 1],
        "num_attention_heads": [1, 2],
        "num_hidden_layers": 2,
    }
    return ClapConfig(text_config=text, audio_config=audio, projection_dim=8)


def small_model(seed: int = 0) -> ClapModel:
    torch.manual_seed(seed)
    model = ClapModel(small_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    return model


def small_scorer() -> CLAPScorer:
    return CLAPScorer(small_model(), small_tokenizer())


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def mel_matrix() -> np.ndarray:
    """Slaney's scale (linear to 1 kHz, then logarithmic) and area-normalised triangles, from their definition."""

    def to_mel(f: float) -> float:
        return f / (200 / 3) if f < 1000 else 15 + np.log(f / 1000) / (np.log(6.4) / 27)

    def to_hz(m: float) -> float:
        return m * 200 / 3 if m < 15 else 1000 * np.exp((m - 15) * np.log(6.4) / 27)

    edges = [to_hz(m) for m in np.linspace(to_mel(50), to_mel(14_000), 66)]
    bins = np.arange(513) * 48_000 / 1024
    matrix = np.zeros((513, 64))
    for b in range(64):
        low, middle, high = edges[b : b + 3]
        rise, fall = (bins - low) / (middle - low), (high - bins) / (high - middle)
        matrix[:, b] = np.maximum(0, np.minimum(rise, fall)) * 2 / (high - low)
    return matrix


def test_the_spectrogram_is_that_of_the_definition():
    wave = noise(480_000)
    found = log_mel(wave)
    assert found.shape == (1001, 64)
    assert found.dtype == np.float32
    window = 0.5 * (1 - np.cos(2 * np.pi * np.arange(1024) / 1024))
    transform = np.exp(-2j * np.pi * np.outer(np.arange(1024), np.arange(513)) / 1024)
    padded = np.concatenate([wave[512:0:-1], wave, wave[-2:-514:-1]]).astype(np.float64)
    for frame in (0, 1, 500, 1000):
        power = np.abs((padded[frame * 480 :][:1024] * window) @ transform) ** 2
        np.testing.assert_allclose(found[frame], 10 * np.log10(power @ mel_matrix()), atol=1e-4)


def test_silence_is_100_db_down_and_a_tone_stands_in_its_band():
    assert (log_mel(np.zeros(480_000, np.float32)) == -100).all()
    t = np.arange(480_000) / 48_000
    band = int(log_mel(np.sin(2 * np.pi * 440 * t).astype(np.float32))[500].argmax())
    assert band == int((mel_matrix()[round(440 / 46.875)]).argmax())


def test_short_sounds_are_filled_with_zeros_or_repeated_as_often_as_they_fit():
    wave = noise(144_000)  # 3 s
    zero, shares = windows(wave)
    assert zero.shape == (1, 480_000)
    assert shares.tolist() == [0.3]
    np.testing.assert_array_equal(zero[0, :144_000], wave)
    assert not zero[0, 144_000:].any()
    repeated, _ = windows(wave, "repeatpad")
    np.testing.assert_array_equal(repeated[0, : 3 * 144_000], np.tile(wave, 3))
    assert not repeated[0, 3 * 144_000 :].any()


def test_long_sounds_are_cut_into_windows_or_to_the_first():
    wave = noise(1_200_000)  # 25 s
    cut, shares = windows(wave)
    assert cut.shape == (3, 480_000)
    assert shares.tolist() == [1.0, 1.0, 0.5]
    np.testing.assert_array_equal(cut[1], wave[480_000:960_000])
    first, share = windows(wave, long="first")
    np.testing.assert_array_equal(first, cut[:1])
    assert share.tolist() == [1.0]
    assert len(windows(wave[:960_000])[0]) == 2
    np.testing.assert_array_equal(windows(wave, "repeatpad")[0][2], np.tile(wave[960_000:], 2))


def test_cosines_are_those_of_the_whole_model():
    model, scorer = small_model(), small_scorer()
    spectrograms = np.stack([log_mel(noise(480_000, seed)) for seed in range(2)])
    found = scorer(list(spectrograms[:, None]), [np.ones(1)] * 2, ["a dog barks", "rain falls softly"], budget=8)
    ids = torch.tensor([[0, 4, 5, 6, 2], [0, 8, 9, 13, 2]])
    with torch.no_grad():
        out = model(input_ids=ids, input_features=torch.from_numpy(spectrograms)[:, None])
    expected = (out.text_embeds * out.audio_embeds).sum(1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert abs(found[0] - found[1]) > 1e-3


def test_a_sound_of_several_windows_has_their_mean_by_shares():
    scorer = small_scorer()
    spectrograms = np.stack([log_mel(noise(480_000)), log_mel(np.sin(np.arange(480_000) * 0.02))])
    single = scorer(list(spectrograms[:, None]), [np.ones(1)] * 2, ["music plays"] * 2, budget=8)
    joint = scorer([spectrograms], [np.array([1.0, 0.25])], ["music plays"], budget=1)
    np.testing.assert_allclose(joint, [(single[0] + 0.25 * single[1]) / 1.25], atol=1e-6)
    assert abs(single[0] - single[1]) > 1e-3


def test_a_batch_gives_what_its_clips_give_alone_in_any_order():
    scorer = small_scorer()
    sounds = [noise(480_000), np.sin(np.arange(480_000) * 0.02), np.sin(np.arange(480_000) ** 2 * 1e-7)]
    inputs = [(log_mel(sound)[None], np.ones(1)) for sound in sounds]
    texts = ["a dog barks", "a dog barks and rain falls while music plays softly", "music"]
    alone = np.concatenate([scorer([s], [w], [t], budget=8) for (s, w), t in zip(inputs, texts, strict=True)])
    for order in ([0, 1, 2], [2, 0, 1]):
        found = scorer([inputs[i][0] for i in order], [inputs[i][1] for i in order], [texts[i] for i in order], 2)
        np.testing.assert_allclose(found, alone[order], atol=1e-5)
    assert len(np.unique(alone.round(3))) == 3


def test_every_text_is_embedded_once_and_long_ones_are_cut(monkeypatch):
    scorer = small_scorer()
    asked = []
    encode = scorer.tokenizer.encode_batch
    monkeypatch.setattr(
        scorer, "tokenizer", type("Spy", (), {"encode_batch": lambda self, t: asked.append(t) or encode(t)})()
    )
    mel = log_mel(noise(480_000))[None]
    long = " ".join(WORDS * 3)
    scorer([mel] * 4, [np.ones(1)] * 4, ["a dog", long, "a dog", "a dog"], budget=8)
    assert asked == [["a dog", long]]
    # RoBERTa's 14 positions hold 12 tokens: <s>, 10 words, </s>.
    assert encode([long])[0].ids == [0, *range(4, 14), 2]


def published_names() -> dict[str, list[int]]:
    """Names and shapes in pytorch_model.bin of laion/clap-htsat-unfused."""
    shapes: dict[str, list[int]] = {"logit_scale_a": [], "logit_scale_t": []}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [out, into], [out]

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = [width]

    text = "text_model.embeddings"
    shapes[f"{text}.position_ids"] = [1, 514]
    rows = {"word_embeddings": 50_265, "token_type_embeddings": 1, "position_embeddings": 514}
    shapes |= {f"{text}.{name}.weight": [n, 768] for name, n in rows.items()}
    norm(f"{text}.LayerNorm", 768)
    for n in range(12):
        layer = f"text_model.encoder.layer.{n}"
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            linear(f"{layer}.{part}", 768, 768)
        norm(f"{layer}.attention.output.LayerNorm", 768)
        linear(f"{layer}.intermediate.dense", 3072, 768)
        linear(f"{layer}.output.dense", 768, 3072)
        norm(f"{layer}.output.LayerNorm", 768)
    linear("text_model.pooler.dense", 768, 768)
    for branch in ("text_projection", "audio_projection"):
        linear(f"{branch}.linear1", 512, 768)
        linear(f"{branch}.linear2", 512, 512)
    audio = "audio_model.audio_encoder"
    shapes[f"{audio}.patch_embed.proj.weight"], shapes[f"{audio}.patch_embed.proj.bias"] = [96, 1, 4, 4], [96]
    norm(f"{audio}.patch_embed.norm", 96)
    for stage, (depth, heads) in enumerate(zip((2, 2, 6, 2), (4, 8, 16, 32), strict=True)):
        width = 96 * 2**stage
        for n in range(depth):
            block = f"{audio}.layers.{stage}.blocks.{n}"
            norm(f"{block}.layernorm_before", width)
            shapes[f"{block}.attention.self.relative_position_bias_table"] = [225, heads]
            shapes[f"{block}.attention.self.relative_position_index"] = [64, 64]
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                linear(f"{block}.attention.{part}", width, width)
            norm(f"{block}.layernorm_after", width)
            linear(f"{block}.intermediate.dense", 4 * width, width)
            linear(f"{block}.output.dense", width, 4 * width)
        if stage < 3:
            shapes[f"{audio}.layers.{stage}.downsample.reduction.weight"] = [2 * width, 4 * width]
            norm(f"{audio}.layers.{stage}.downsample.norm", 4 * width)
    norm(f"{audio}.batch_norm", 64)
    shapes |= {f"{audio}.batch_norm.running_{s}": [64] for s in ("mean", "var")}
    shapes[f"{audio}.batch_norm.num_batches_tracked"] = []
    norm(f"{audio}.norm", 768)
    return shapes


def test_full_size_names_and_shapes_are_the_released_ones():
    with torch.device("meta"):
        model = ClapModel(ClapConfig())
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    published = published_names()
    # A computed buffer that releases of transformers write or leave out.
    assert own.keys() - published.keys() == {"text_model.embeddings.token_type_ids"}
    assert {name: shape for name, shape in own.items() if name in published} == published
    assert sum(p.numel() for p in model.parameters()) == clap.CARD.parameters == 153_492_890


def test_a_state_is_loaded_with_and_without_computed_buffers():
    source = small_model(1)
    for leave_out in ((), ("position_ids", "token_type_ids"), ("relative_position_index",)):
        model = small_model(2)
        load_state(model, {k: v for k, v in source.state_dict().items() if not k.endswith(leave_out or ("?",))})
        for name, tensor in source.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    state = source.state_dict()
    del state["audio_projection.linear2.bias"]
    with pytest.raises(OmniNFTError, match=r"1 missing: audio_projection\.linear2\.bias"):
        load_state(small_model(), state)


def test_files_of_a_folder_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "cache"))
    with pytest.raises(OmniNFTError, match=r"hf download laion/clap-htsat-unfused config\.json"):
        load_clap(tmp_path)
    model = small_model(4)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    small_config().to_json_file(tmp_path / "config.json")
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(OmniNFTError, match=r"sha256 is .* expected 1cd3c601bc4a"):
        load_clap(tmp_path)
    monkeypatch.setattr(clap, "CARD", dataclasses.replace(clap.CARD, sha256=None))
    inputs = [log_mel(noise(480_000))[None]], [np.ones(1)], ["rain falls"]
    np.testing.assert_allclose(
        load_clap(tmp_path)(*inputs, budget=1), CLAPScorer(model, small_tokenizer())(*inputs, budget=1), atol=1e-6
    )
