"""ImageBind against a float64 numpy network, golden numbers of its inputs, and the released file's layout."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from omninft.scorers import imagebind
from omninft.scorers.imagebind import (
    IMAGEBIND,
    ImageBind,
    ImageBindConfig,
    ImageBindScorer,
    Tower,
    cosines,
    load_imagebind,
)
from omninft.scorers.imagebind_inputs import (
    TextTokens,
    audio_views,
    clip_starts,
    first_channel,
    frame_pairs,
    load_tokens,
    still_frames,
    still_views,
    video_views,
)
from omninft.types import Clip, OmniNFTError, Prompt
from tests.scorers.numpy_layers import State, gelu, linear, norm, packed_attention, patches, randomise
from tests.scorers.test_spectra import fbank_by_definition

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
START, END = 11, 12  # tokens of the small vocabulary; the end has the highest number, as in CLIP's
TINY = ImageBindConfig(
    vision=Tower(24, 2, 3), text=Tower(16, 2, 2), audio=Tower(24, 2, 2), embedding=8, patch=56, vocabulary=13
)

# The released file: name, shape; [n] stands for that many layers.
LAYOUT = """
modality_preprocessors.vision.cls_token 1 1 1280
modality_preprocessors.vision.rgbt_stem.proj.1.weight 1280 3 2 14 14
modality_preprocessors.vision.pos_embedding_helper.pos_embed 1 257 1280
modality_preprocessors.text.pos_embed 1 77 1024
modality_preprocessors.text.mask 77 77
modality_preprocessors.text.token_embedding.weight 49408 1024
modality_preprocessors.audio.cls_token 1 1 768
modality_preprocessors.audio.rgbt_stem.proj.weight 768 1 16 16
modality_preprocessors.audio.rgbt_stem.norm_layer.weight 768
modality_preprocessors.audio.rgbt_stem.norm_layer.bias 768
modality_preprocessors.audio.pos_embedding_helper.pos_embed 1 229 768
modality_trunks.vision.pre_transformer_layer.0.weight 1280
modality_trunks.vision.pre_transformer_layer.0.bias 1280
modality_trunks.audio.blocks.[12].attn.bias_k 1 1 768
modality_trunks.audio.blocks.[12].attn.bias_v 1 1 768
modality_heads.vision.0.weight 1280
modality_heads.vision.0.bias 1280
modality_heads.vision.2.weight 1024 1280
modality_heads.text.proj.0.weight 1024
modality_heads.text.proj.0.bias 1024
modality_heads.text.proj.1.weight 1024 1024
modality_heads.audio.0.weight 768
modality_heads.audio.0.bias 768
modality_heads.audio.2.weight 1024 768
modality_postprocessors.text.1.log_logit_scale
modality_postprocessors.audio.1.log_logit_scale
"""
# Of every block, in widths of its tower.
BLOCK = """
attn.in_proj_weight 3 1
attn.in_proj_bias 3
attn.out_proj.weight 1 1
attn.out_proj.bias 1
norm_1.weight 1
norm_1.bias 1
mlp.fc1.weight 4 1
mlp.fc1.bias 4
mlp.fc2.weight 1 4
mlp.fc2.bias 1
norm_2.weight 1
norm_2.bias 1
"""


def rows(table: str, unit: int = 1) -> list[tuple[str, tuple[int, ...]]]:
    split = [row.split() for row in table.strip().splitlines()]
    return [(name, tuple(unit * int(size) for size in sizes)) for name, *sizes in split]


def released_layout() -> dict[str, tuple[int, ...]]:
    layout: dict[str, tuple[int, ...]] = {}
    for name, shape in rows(LAYOUT):
        count = re.search(r"\[(\d+)\]", name)
        layout |= {re.sub(r"\[\d+\]", str(n), name): shape for n in range(int(count[1]) if count else 1)}
    for tower, layers, width in (("vision", 32, 1280), ("text", 24, 1024), ("audio", 12, 768)):
        for n in range(layers):
            layout |= {f"modality_trunks.{tower}.blocks.{n}.{name}": shape for name, shape in rows(BLOCK, width)}
    return layout


def small_tokenizer() -> Tokenizer:
    words = ["a</w>", "c", "a", "t</w>", "ca", "cat</w>", "s</w>", "b", "&</w>", "<</w>", "!</w>"]
    vocabulary = {word: i for i, word in enumerate(words)} | {"<|startoftext|>": START, "<|endoftext|>": END}
    return CLIPTokenizer(vocab=vocabulary, merges=[("c", "a"), ("ca", "t</w>")]).backend_tokenizer


def clip_of(frames: int = 121, rate: float = 24.0, size: tuple[int, int] = (24, 36), channels: int = 2) -> Clip:
    random = np.random.default_rng(frames)
    video = random.integers(0, 256, (frames, *size, 3), dtype=np.uint8)
    sound = random.uniform(-0.5, 0.5, (channels, round(frames / rate * 16_000))).astype(np.float32)
    return Clip(video, rate, sound, 16_000, Prompt("p", "a cat", "cats", ""))


# --- layout and loading


def test_names_and_shapes_are_those_of_the_released_file():
    with torch.device("meta"):
        network = ImageBind()
    found = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert found == released_layout()
    counts = {
        tower: sum(p.numel() for name, p in network.named_parameters() if f".{tower}." in name)
        for tower in ("vision", "text", "audio")
    }
    assert {tower: round(n / 1e6, 1) for tower, n in counts.items()} == {"vision": 632.8, "text": 354.0, "audio": 86.2}
    assert sum(counts.values()) == IMAGEBIND.parameters


@pytest.fixture
def small_release(tmp_path, monkeypatch):
    """Files like the released ones, but small, and the network that one was saved from."""
    network = randomise(ImageBind(TINY), seed=3)
    state = network.state_dict()
    for part, tower in (("preprocessors", "depth"), ("trunks", "thermal"), ("heads", "imu"), ("postprocessors", "imu")):
        state[f"modality_{part}.{tower}.1.weight"] = torch.ones(2)
    torch.save(state, tmp_path / "imagebind_huge.pth")
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setattr(imagebind, "ImageBindConfig", lambda: TINY)
    return tmp_path, network


def test_every_value_is_loaded_and_only_the_known_towers_are_left_out(small_release):
    folder, network = small_release
    state = network.state_dict()
    loaded = load_imagebind(folder, folder).network.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    state["modality_trunks.smell.1.weight"] = torch.ones(2)
    torch.save(state, folder / "imagebind_huge.pth")
    with pytest.raises(OmniNFTError, match=r"1 unexpected: modality_trunks.smell.1.weight"):
        load_imagebind(folder, folder)
    del state["modality_trunks.smell.1.weight"], state["modality_preprocessors.text.mask"]
    torch.save(state, folder / "imagebind_huge.pth")
    with pytest.raises(OmniNFTError, match=r"1 missing: modality_preprocessors.text.mask"):
        load_imagebind(folder / "imagebind_huge.pth", folder / "tokenizer.json")


def test_missing_files_come_with_the_commands_that_fetch_them(small_release, tmp_path):
    folder, _ = small_release
    with pytest.raises(OmniNFTError, match=r"curl -L .*dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth"):
        load_imagebind(None, folder)
    with pytest.raises(OmniNFTError, match=r"hf download openai/clip-vit-base-patch32 tokenizer.json"):
        load_imagebind(folder, tmp_path / "none")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(OmniNFTError, match="not a tokeniser, or damaged"):
        load_tokens(folder)


# --- the network, by definition


def tower_by_definition(x: np.ndarray, state: State, tower: Tower, allowed: np.ndarray | None = None) -> np.ndarray:
    for n in range(tower.layers):
        block = state.under(f"blocks.{n}")
        x = x + packed_attention(norm(x, block, "norm_1", 1e-6), block.under("attn"), tower.heads, allowed)
        x = x + linear(gelu(linear(norm(x, block, "norm_2", 1e-6), block, "mlp.fc1")), block, "mlp.fc2")
    return x


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def vision_by_definition(view: np.ndarray, state: State) -> np.ndarray:
    own = state.under("modality_preprocessors.vision")
    x = np.concatenate([own["cls_token"][0], patches(view, own, "rgbt_stem.proj.1", TINY.patch)])
    trunk = state.under("modality_trunks.vision")
    x = norm(x + own["pos_embedding_helper.pos_embed"][0], trunk, "pre_transformer_layer.0", 1e-6)
    x = tower_by_definition(x, trunk, TINY.vision)
    head = state.under("modality_heads.vision")
    return unit(linear(norm(x[0], head, "0", 1e-6), head, "2"))


def audio_by_definition(view: np.ndarray, state: State) -> np.ndarray:
    own = state.under("modality_preprocessors.audio")
    x = norm(patches(view, own, "rgbt_stem.proj", 10), own, "rgbt_stem.norm_layer", 1e-5)
    assert len(x) == 12 * 19
    x = np.concatenate([own["cls_token"][0], x]) + own["pos_embedding_helper.pos_embed"][0]
    x = tower_by_definition(x, state.under("modality_trunks.audio"), TINY.audio)
    head = state.under("modality_heads.audio")
    scale = np.exp(state["modality_postprocessors.audio.1.log_logit_scale"])
    return unit(linear(norm(x[0], head, "0", 1e-6), head, "2")) * scale


def text_by_definition(ids: list[int], end: int, state: State) -> np.ndarray:
    own = state.under("modality_preprocessors.text")
    x = own["token_embedding.weight"][ids] + own["pos_embed"][0]
    x = tower_by_definition(x, state.under("modality_trunks.text"), TINY.text, np.tri(77, dtype=bool))
    head = state.under("modality_heads.text")
    scale = np.exp(state["modality_postprocessors.text.1.log_logit_scale"])
    return unit(linear(norm(x[end], head, "proj.0", 1e-6), head, "proj.1")) * scale


@pytest.fixture(scope="module")
def network():
    return randomise(ImageBind(TINY).double())


@pytest.fixture(scope="module")
def state(network):
    return State(network.state_dict())


def test_vision_tower_is_as_defined(network, state):
    views = np.random.default_rng(0).normal(size=(2, 3, 2, 224, 224))
    found = network.embed_vision(torch.from_numpy(views))
    assert found.shape == (2, 8)
    np.testing.assert_allclose(found.numpy(), [vision_by_definition(v, state) for v in views], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found.numpy(), axis=1), 1, atol=1e-6)


def test_audio_tower_is_as_defined(network, state):
    views = np.random.default_rng(1).normal(size=(2, 1, 128, 204))
    found = network.embed_audio(torch.from_numpy(views))
    np.testing.assert_allclose(found.numpy(), [audio_by_definition(v, state) for v in views], atol=1e-6)


def test_text_tower_is_as_defined_and_reads_the_end_token(network, state):
    ids = np.random.default_rng(2).integers(0, 11, (2, 77))
    ids[0, 5:] = [END, *[0] * 71]
    ids[1, 76] = END
    found = network.embed_text(torch.from_numpy(ids))
    expected = [text_by_definition(row.tolist(), end, state) for row, end in zip(ids, (5, 76), strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_logit_scales_begin_as_published_and_stop_at_100():
    network = ImageBind(TINY).requires_grad_(False)
    ids, spectrum = torch.zeros(1, 77, dtype=torch.long), torch.randn(1, 1, 128, 204)
    assert float(network.embed_audio(spectrum).norm()) == pytest.approx(20, rel=1e-5)
    assert float(network.embed_text(ids).norm()) == pytest.approx(1 / 0.07, rel=1e-5)
    network.modality_postprocessors.text[1].log_logit_scale.data.fill_(7.0)
    assert float(network.embed_text(ids).norm()) == pytest.approx(100, rel=1e-5)


# --- inputs


@pytest.mark.parametrize(
    ("duration", "count", "spacing", "starts"),
    [
        (6.0, 5, "n-1", [0, 1, 2, 3, 4]),
        (6.0, 5, "n", [0, 0.8, 1.6, 2.4, 3.2]),
        (5.0, 3, "n-1", [0, 1.5, 3]),
        (1.0, 3, "n-1", [0, 0, 0]),
    ],
)
def test_starts_of_clips(duration, count, spacing, starts):
    np.testing.assert_allclose(clip_starts(duration, count, spacing), starts)


@pytest.mark.parametrize(
    ("total", "rate", "spacing", "pairs"),
    [
        # 121 frames: starts at 18.25 i frames, ends 48 later.
        (121, 24.0, "n-1", [(0, 47), (19, 66), (37, 84), (55, 102), (73, 120)]),
        (121, 24.0, "n", [(0, 47), (15, 62), (30, 77), (44, 91), (59, 106)]),
        (96, 24.0, "n-1", [(0, 47), (12, 59), (24, 71), (36, 83), (48, 95)]),
        (50, 25.0, "n-1", [(0, 49)] * 5),
        (20, 25.0, "n-1", [(0, 19)] * 5),
        (1, 25.0, "n-1", [(0, 0)] * 5),
    ],
)
def test_frames_of_clips(total, rate, spacing, pairs):
    assert frame_pairs(total, rate, spacing) == pairs


def bilinear_by_definition(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W, 3] at the centres of the new pixels, from the nearest two old ones each way: no antialiasing."""

    def weights(new: int, old: int) -> np.ndarray:
        matrix = np.zeros((new, old))
        for i in range(new):
            x = max((i + 0.5) * old / new - 0.5, 0.0)
            low = min(int(x), old - 1)
            matrix[i, low] += 1 - (x - low)
            matrix[i, min(low + 1, old - 1)] += x - low
        return matrix

    rows_, columns = weights(height, frame.shape[0]), weights(width, frame.shape[1])
    return np.einsum("ih,hwc,jw->ijc", rows_, frame.astype(np.float64), columns, optimize=True)


@pytest.mark.parametrize(
    ("size", "resized", "corners"),
    [
        ((512, 768), (224, 336), [(0, 0), (0, 56), (0, 112)]),
        ((300, 200), (336, 224), [(0, 0), (56, 0), (112, 0)]),
        ((24, 37), (224, 345), [(0, 0), (0, 61), (0, 121)]),
        ((32, 32), (224, 224), [(0, 0)] * 3),
    ],
)
def test_video_views_are_five_pairs_cropped_at_three_places(size, resized, corners):
    clip = clip_of(60, 24.0, size)  # starts at 3 i frames
    views = video_views(clip)
    assert len(views) == 15
    for i, (first, last) in enumerate([(0, 47), (3, 50), (6, 53), (9, 56), (12, 59)]):
        pair = [bilinear_by_definition(clip.video[n], *resized) for n in (first, last)]
        pair = [((frame / 255 - MEAN) / STD).transpose(2, 0, 1) for frame in pair]
        for (top, left), view in zip(corners, views[3 * i : 3 * i + 3], strict=True):
            expected = np.stack([frame[:, top : top + 224, left : left + 224] for frame in pair], axis=1)
            assert view.shape == (3, 2, 224, 224)
            np.testing.assert_allclose(view.numpy(), expected, atol=1e-3)


def test_still_frames_are_shown_twice():
    clip = clip_of(3, 24.0, (448, 672))
    clip.video[:] = np.arange(672, dtype=np.uint16)[:, None] // 3  # a ramp: halved and cropped, it stays one
    frames = still_frames(clip)
    assert frames.shape == (3, 3, 224, 224)
    expected = (np.arange(112, 560, 2) + 0.5) / 3
    assert np.abs(frames[0, 0, 100] - expected).max() < 1.5
    views = still_views(frames)
    assert len(views) == 3
    assert views[0].shape == (3, 2, 224, 224)
    np.testing.assert_array_equal(views[2][:, 0], views[2][:, 1])
    np.testing.assert_allclose(views[0][:, 1, 0, 0].numpy(), (frames[0, :, 0, 0] / 255 - MEAN) / STD, atol=1e-5)


def test_audio_views_are_three_spectra_of_the_first_channel():
    clip = clip_of(120, 24.0)  # 5 s: starts at 0, 1.5 and 3 s
    wave = first_channel(clip)
    np.testing.assert_array_equal(wave, clip.waveform[0])
    views = audio_views(wave)
    for start, view in zip((0, 24_000, 48_000), views, strict=True):
        assert view.shape == (1, 128, 204)
        piece = wave[start : start + 32_000].astype(np.float64)
        expected = fbank_by_definition(piece - piece.mean())
        assert len(expected) == 198
        np.testing.assert_allclose(view[0, :, :198].numpy(), (expected.T + 4.268) / 9.138, atol=2e-3)
        np.testing.assert_allclose(view[0, :, 198:].numpy(), 4.268 / 9.138, rtol=1e-6)


def test_short_sound_gives_the_same_view_three_times():
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32)
    first, second, third = audio_views(wave)
    assert first is second is third
    assert first[0, :, 97].std() > 0.01  # 98 frames, then filling
    np.testing.assert_allclose(first[0, :, 98:].numpy(), 4.268 / 9.138, rtol=1e-6)
    with pytest.raises(OmniNFTError, match=r"25 ms of sound, found 20.0 ms"):
        audio_views(wave[:320])


def test_silence_and_emptiness_are_errors_not_views():
    clip = clip_of(24)
    with pytest.raises(OmniNFTError, match="no sound"):
        first_channel(Clip(clip.video, 24.0, np.zeros((2, 0), np.float32), 16_000, clip.prompt))
    for read in (video_views, still_frames):
        with pytest.raises(OmniNFTError, match="no frames"):
            read(Clip(clip.video[:0], 24.0, clip.waveform, 16_000, clip.prompt))


def test_other_rates_are_resampled():
    clip = clip_of(24)
    tone = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000).astype(np.float32)[None]
    found = first_channel(Clip(clip.video, 24.0, tone, 48_000, clip.prompt))
    assert found.shape == (16_000,)
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(found[500:-500], expected[500:-500], atol=1e-3)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A  CAT\n", [START, 0, 5, END]),
        ("cats", [START, 4, 12, 6, END]),  # "cat" within a word is not "cat" at its end; "t" alone is unknown
        ("a &amp;amp; &lt; a", [START, 0, 8, 9, 0, END]),
    ],
)
def test_texts_are_lower_cased_and_split_by_the_merges(text, tokens):
    ids = TextTokens(small_tokenizer())([text])
    assert ids.shape == (1, 77)
    assert ids[0].tolist() == tokens + [0] * (77 - len(tokens))


def test_long_texts_keep_their_end_unless_the_published_cut_is_asked_for():
    text = "cat " + "a " * 90
    kept, cut = (TextTokens(small_tokenizer(), keep_end)([text])[0].tolist() for keep_end in (True, False))
    assert kept == [START, 5] + [0] * 74 + [END]
    assert cut == [START, 5] + [0] * 75
    just = "a " * 75
    for keep_end in (True, False):
        assert TextTokens(small_tokenizer(), keep_end)([just])[0].tolist() == [START] + [0] * 75 + [END]


# --- the scorer


def test_views_are_averaged_after_the_postprocessing(state):
    network = randomise(ImageBind(TINY))
    scorer = ImageBindScorer(network, TextTokens(small_tokenizer()))
    random = np.random.default_rng(5)
    sounds = [[torch.from_numpy(random.normal(size=(1, 128, 204))).float() for _ in range(n)] for n in (3, 1, 2)]
    found = scorer.sounds(sounds, budget=4)
    own = State(network.state_dict())
    expected = [np.mean([audio_by_definition(view.numpy(), own) for view in item], axis=0) for item in sounds]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    videos = [[torch.from_numpy(random.normal(size=(3, 2, 224, 224))).float() for _ in range(n)] for n in (2, 3)]
    found = scorer.videos(videos, budget=2)
    expected = [np.mean([vision_by_definition(view.numpy(), own) for view in item], axis=0) for item in videos]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_equal_texts_and_views_are_embedded_once(monkeypatch):
    network = randomise(ImageBind(TINY))
    scorer = ImageBindScorer(network, TextTokens(small_tokenizer()))
    seen = []
    for name in ("embed_text", "embed_audio"):
        embed = getattr(network, name)
        monkeypatch.setattr(network, name, lambda x, embed=embed: seen.append(len(x)) or embed(x))
    texts = scorer.texts(["a cat", "cats", "a cat", "cats", "a cat"])
    assert seen == [2]
    np.testing.assert_array_equal(texts[[0, 1, 0, 1, 0]], texts)
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 32_000).astype(np.float32)
    scorer.sounds([audio_views(wave), audio_views(wave[:20_000])])
    assert seen == [2, 2]


def test_frames_are_embedded_one_by_one():
    network = randomise(ImageBind(TINY))
    scorer = ImageBindScorer(network, TextTokens(small_tokenizer()))
    frames = np.random.default_rng(6).integers(0, 256, (3, 3, 224, 224), dtype=np.uint8)
    own = State(network.state_dict())
    pixels = (frames / 255 - MEAN[:, None, None]) / STD[:, None, None]
    expected = [vision_by_definition(np.stack([p, p], axis=1), own) for p in pixels]
    np.testing.assert_allclose(scorer.frames(frames, budget=2), expected, atol=1e-4)


def test_half_precision_stays_close():
    network = randomise(ImageBind(TINY))
    item = [[torch.from_numpy(np.random.default_rng(7).normal(size=(1, 128, 204)))]]
    scorer = ImageBindScorer(network, TextTokens(small_tokenizer()))
    single = (scorer.sounds(item), scorer.texts(["a cat"]))
    network.bfloat16()
    for one, other in zip(single, (scorer.sounds(item), scorer.texts(["a cat"])), strict=True):
        assert cosines(one, other)[0] > 0.99


def test_cosines_row_by_row():
    a, b = np.array([[1.0, 0], [3, 4]]), np.array([[2.0, 0], [-4, 3]])
    np.testing.assert_allclose(cosines(a, b), [1, 0], atol=1e-12)
    np.testing.assert_allclose(cosines(a, b[:1]), [1, 0.6], atol=1e-12)
