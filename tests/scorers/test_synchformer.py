"""Synchformer against a float64 numpy network, golden numbers of its inputs, and the released file's layout."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from omninft.scorers import synchformer
from omninft.scorers.synchformer import (
    OFFSETS,
    SYNCHFORMER,
    DeSyncScorer,
    Synchformer,
    SynchformerConfig,
    load_synchformer,
)
from omninft.scorers.synchformer_inputs import (
    SyncInputs,
    block_segments,
    check_seconds,
    log_mel,
    normalised_pictures,
    sync_inputs,
)
from omninft.types import Clip, OmniNFTError, Prompt
from tests.scorers.numpy_layers import State, attention, gelu, linear, norm, packed_attention, patches, randomise
from tests.scorers.test_spectra import mel_by_definition

TINY = SynchformerConfig(width=24, heads=3, layers=2, fusion_heads=2, fusion_layers=2, image_size=32, patch=16)

# The released file: every name, "pair" rows standing for .weight of that shape and .bias of its first size.
TENSORS = """
vfeat_extractor.cls_token 1 1 768
vfeat_extractor.pos_embed 1 197 768
vfeat_extractor.temp_embed 1 8 768
vfeat_extractor.spatial_attn_agg.cls_token 1 1 768
vfeat_extractor.spatial_attn_agg.self_attn.in_proj_weight 2304 768
vfeat_extractor.spatial_attn_agg.self_attn.in_proj_bias 2304
afeat_extractor.ast.embeddings.cls_token 1 1 768
afeat_extractor.ast.embeddings.distillation_token 1 1 768
afeat_extractor.ast.embeddings.position_embeddings 1 74 768
afeat_extractor.freq_attn_agg.cls_token 1 1 768
afeat_extractor.freq_attn_agg.self_attn.in_proj_weight 2304 768
afeat_extractor.freq_attn_agg.self_attn.in_proj_bias 2304
transformer.OFF_tok 1 1 768
transformer.MOD_tok 1 1 768
transformer.pos_emb_cfg.pos_emb 1 198 768
"""
PAIRS = """
vfeat_extractor.patch_embed.proj 768 3 16 16
vfeat_extractor.patch_embed_3d.proj 768 3 2 16 16
vfeat_extractor.blocks.[12].norm1 768
vfeat_extractor.blocks.[12].attn.qkv 2304 768
vfeat_extractor.blocks.[12].attn.proj 768 768
vfeat_extractor.blocks.[12].timeattn.qkv 2304 768
vfeat_extractor.blocks.[12].timeattn.proj 768 768
vfeat_extractor.blocks.[12].norm2 768
vfeat_extractor.blocks.[12].mlp.fc1 3072 768
vfeat_extractor.blocks.[12].mlp.fc2 768 3072
vfeat_extractor.blocks.[12].norm3 768
vfeat_extractor.norm 768
vfeat_extractor.spatial_attn_agg.self_attn.out_proj 768 768
vfeat_extractor.spatial_attn_agg.linear1 3072 768
vfeat_extractor.spatial_attn_agg.linear2 768 3072
vfeat_extractor.spatial_attn_agg.norm1 768
vfeat_extractor.spatial_attn_agg.norm2 768
afeat_extractor.ast.embeddings.patch_embeddings.projection 768 1 16 16
afeat_extractor.ast.encoder.layer.[12].attention.attention.query 768 768
afeat_extractor.ast.encoder.layer.[12].attention.attention.key 768 768
afeat_extractor.ast.encoder.layer.[12].attention.attention.value 768 768
afeat_extractor.ast.encoder.layer.[12].attention.output.dense 768 768
afeat_extractor.ast.encoder.layer.[12].intermediate.dense 3072 768
afeat_extractor.ast.encoder.layer.[12].output.dense 768 3072
afeat_extractor.ast.encoder.layer.[12].layernorm_before 768
afeat_extractor.ast.encoder.layer.[12].layernorm_after 768
afeat_extractor.ast.layernorm 768
afeat_extractor.freq_attn_agg.self_attn.out_proj 768 768
afeat_extractor.freq_attn_agg.linear1 3072 768
afeat_extractor.freq_attn_agg.linear2 768 3072
afeat_extractor.freq_attn_agg.norm1 768
afeat_extractor.freq_attn_agg.norm2 768
vproj 768 768
aproj 768 768
transformer.vis_in_lnorm 768
transformer.aud_in_lnorm 768
transformer.blocks.[3].ln1 768
transformer.blocks.[3].ln2 768
transformer.blocks.[3].attn.key 768 768
transformer.blocks.[3].attn.query 768 768
transformer.blocks.[3].attn.value 768 768
transformer.blocks.[3].attn.proj 768 768
transformer.blocks.[3].mlp.0 3072 768
transformer.blocks.[3].mlp.2 768 3072
transformer.ln_f 768
transformer.off_head 21 768
"""


def released_layout() -> dict[str, tuple[int, ...]]:
    layout: dict[str, tuple[int, ...]] = {}
    for rows, pair in ((TENSORS, False), (PAIRS, True)):
        for row in rows.strip().splitlines():
            name, *sizes = row.split(" ")
            shape = tuple(map(int, sizes))
            count = re.search(r"\[(\d+)\]", name)
            for layer in range(int(count[1]) if count else 1):
                full = re.sub(r"\[\d+\]", str(layer), name)
                layout |= {f"{full}.weight": shape, f"{full}.bias": shape[:1]} if pair else {full: shape}
    return layout


def clip_of(
    frames: int = 121, rate: float = 24.0, seconds: float | None = None, channels: int = 1, seed: int = 0
) -> Clip:
    random = np.random.default_rng(seed)
    video = random.integers(0, 256, (frames, 16, 24, 3), dtype=np.uint8)
    samples = round((frames / rate if seconds is None else seconds) * 16_000)
    sound = random.uniform(-0.5, 0.5, (channels, samples)).astype(np.float32)
    return Clip(video, rate, sound, 16_000, Prompt("p", "", "", ""))


# --- layout and loading


def test_names_and_shapes_are_those_of_the_released_file():
    with torch.device("meta"):
        network = Synchformer()
    found = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert found == released_layout()
    assert len(found) == 513
    total = sum(np.prod(shape, dtype=int) for shape in found.values())
    assert total == SYNCHFORMER.parameters
    assert round(total / 1e6, 2) == 237.46
    parts = {
        p: sum(x.numel() for x in getattr(network, p).parameters()) for p in ("vfeat_extractor", "afeat_extractor")
    }
    assert {p: round(n / 1e6, 1) for p, n in parts.items()} == {"vfeat_extractor": 122.4, "afeat_extractor": 92.4}
    assert round(sum(x.numel() for x in network.transformer.parameters()) / 1e6, 1) == 21.4


@pytest.fixture
def small_release(tmp_path, monkeypatch):
    """A file like the released one, but small, and the network it was saved from."""
    network = randomise(Synchformer(TINY), seed=3)
    file = tmp_path / "synchformer_state_dict.pth"
    torch.save(network.state_dict(), file)
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setattr(synchformer, "SynchformerConfig", lambda: TINY)
    card = replace(SYNCHFORMER, sha256={file.name: hashlib.sha256(file.read_bytes()).hexdigest()})
    monkeypatch.setattr(synchformer, "SYNCHFORMER", card)
    return file, network


def test_every_value_is_loaded(small_release):
    file, network = small_release
    for path in (file, file.parent):
        loaded = load_synchformer(path).network.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in network.state_dict().items())


def test_a_file_of_another_layout_is_refused(small_release, monkeypatch):
    file, network = small_release
    state = network.state_dict()
    state["vproj.weight"] = torch.zeros(3, 3)
    state["more.bias"] = torch.zeros(1)
    del state["transformer.OFF_tok"]
    torch.save(state, file)
    with pytest.raises(OmniNFTError, match="sha256"):
        load_synchformer(file)
    monkeypatch.setattr(synchformer, "SYNCHFORMER", replace(SYNCHFORMER, sha256=None))
    with pytest.raises(
        OmniNFTError, match=r"missing: transformer.OFF_tok.*more.bias.*vproj.weight \(\[3, 3\], expected"
    ):
        load_synchformer(file)


def test_a_missing_file_comes_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path))
    with pytest.raises(OmniNFTError, match=r"curl -L .*releases/download/v0.1/synchformer_state_dict.pth"):
        load_synchformer()


# --- the networks, by definition


def divided_by_definition(x: np.ndarray, state: State, heads: int, steps: int, along: str) -> np.ndarray:
    """Dense attention [1 + steps * P, D] with a mask: everyone sees the class token and the own group."""
    number = np.arange(len(x) - 1)
    group = number % ((len(x) - 1) // steps) if along == "time" else number // ((len(x) - 1) // steps)
    allowed = np.ones((len(x), len(x)), dtype=bool)
    allowed[1:, 1:] = group[:, None] == group
    q, k, v = np.split(linear(x, state, "qkv"), 3, axis=1)
    return linear(attention(q, k, v, heads, allowed), state, "proj")


def pooled_by_definition(tokens: np.ndarray, state: State, heads: int) -> np.ndarray:
    x = np.concatenate([state["cls_token"][0], tokens])
    x = x + packed_attention(norm(x, state, "norm1", 1e-6), state.under("self_attn"), heads)
    x = x + linear(gelu(linear(norm(x, state, "norm2", 1e-6), state, "linear1")), state, "linear2")
    return x[0]


def video_by_definition(pictures: np.ndarray, state: State, config: SynchformerConfig) -> np.ndarray:
    """[16, 3, H, W] to [8, D]."""
    x = patches(pictures.swapaxes(0, 1), state, "patch_embed_3d.proj", config.patch)
    position, time = state["pos_embed"][0], state["temp_embed"][0]
    x = np.array([token + position[1 + i % config.patches] + time[i // config.patches] for i, token in enumerate(x)])
    x = np.concatenate([state["cls_token"][0] + position[:1], x])
    for n in range(config.layers):
        block = state.under(f"blocks.{n}")
        x = x + divided_by_definition(norm(x, block, "norm3", 1e-6), block.under("timeattn"), config.heads, 8, "time")
        x = x + divided_by_definition(norm(x, block, "norm1", 1e-6), block.under("attn"), config.heads, 8, "space")
        x = x + linear(gelu(linear(norm(x, block, "norm2", 1e-6), block, "mlp.fc1")), block, "mlp.fc2")
    frames = np.split(norm(x[1:], state, "norm", 1e-6), 8)
    return np.array([pooled_by_definition(f, state.under("spatial_attn_agg"), config.heads) for f in frames])


def audio_by_definition(mel: np.ndarray, state: State, config: SynchformerConfig) -> np.ndarray:
    """[66, 128] to [6, D]."""
    ast = state.under("ast")
    x = patches(mel.T[None], ast, "embeddings.patch_embeddings.projection", 10)
    own = [ast[f"embeddings.{name}"][0] for name in ("cls_token", "distillation_token")]
    x = np.concatenate([*own, x]) + ast["embeddings.position_embeddings"][0]
    for n in range(config.layers):
        layer = ast.under(f"encoder.layer.{n}")
        y = norm(x, layer, "layernorm_before", 1e-12)
        q, k, v = (linear(y, layer, f"attention.attention.{name}") for name in ("query", "key", "value"))
        x = x + linear(attention(q, k, v, config.heads), layer, "attention.output.dense")
        y = gelu(linear(norm(x, layer, "layernorm_after", 1e-12), layer, "intermediate.dense"))
        x = x + linear(y, layer, "output.dense")
    grid = norm(x, ast, "layernorm", 1e-12)[2:].reshape(12, 6, -1)
    return np.array([pooled_by_definition(grid[:, t], state.under("freq_attn_agg"), config.heads) for t in range(6)])


def fused_by_definition(video: np.ndarray, audio: np.ndarray, state: State, config: SynchformerConfig) -> np.ndarray:
    """[14, 8, D] and [14, 6, D], projected, to logits [21]."""
    video = norm(np.concatenate(video), state, "vis_in_lnorm", 1e-5)
    audio = norm(np.concatenate(audio), state, "aud_in_lnorm", 1e-5)
    x = np.concatenate([state["OFF_tok"][0], video, state["MOD_tok"][0], audio]) + state["pos_emb_cfg.pos_emb"][0]
    assert len(x) == 198
    for n in range(config.fusion_layers):
        block = state.under(f"blocks.{n}")
        y = norm(x, block, "ln1", 1e-5)
        q, k, v = (linear(y, block, f"attn.{name}") for name in ("query", "key", "value"))
        x = x + linear(attention(q, k, v, config.fusion_heads), block, "attn.proj")
        x = x + linear(gelu(linear(norm(x, block, "ln2", 1e-5), block, "mlp.0")), block, "mlp.2")
    return linear(norm(x[0], state, "ln_f", 1e-5), state, "off_head")


@pytest.fixture(scope="module")
def network():
    return randomise(Synchformer(TINY).double())


@pytest.fixture(scope="module")
def state(network):
    return State(network.state_dict())


@pytest.mark.parametrize("along", ["time", "space"])
def test_divided_attention_is_dense_attention_under_a_mask_of_groups(network, state, along):
    name = "timeattn" if along == "time" else "attn"
    x = np.random.default_rng(0).normal(size=(2, 1 + 8 * 4, 24))
    found = getattr(network.vfeat_extractor.blocks[0], name)(torch.from_numpy(x), 8, along)
    part = state.under(f"vfeat_extractor.blocks.0.{name}")
    expected = [divided_by_definition(one, part, 3, 8, along) for one in x]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_video_segments_are_encoded_as_defined(network, state):
    pictures = np.random.default_rng(1).uniform(-1, 1, (2, 16, 3, 32, 32))
    found = network.encode_video(torch.from_numpy(pictures))
    assert found.shape == (2, 8, 24)
    expected = [linear(video_by_definition(p, state.under("vfeat_extractor"), TINY), state, "vproj") for p in pictures]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_audio_segments_are_encoded_as_defined(network, state):
    mel = np.random.default_rng(2).normal(size=(2, 66, 128))
    found = network.encode_audio(torch.from_numpy(mel))
    assert found.shape == (2, 6, 24)
    expected = [linear(audio_by_definition(m, state.under("afeat_extractor"), TINY), state, "aproj") for m in mel]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_blocks_are_judged_as_defined(network, state):
    random = np.random.default_rng(3)
    video, audio = random.normal(size=(2, 14, 8, 24)), random.normal(size=(2, 14, 6, 24))
    found = network(torch.from_numpy(video), torch.from_numpy(audio))
    expected = [fused_by_definition(v, a, state.under("transformer"), TINY) for v, a in zip(video, audio, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


# --- inputs


def test_mel_is_the_logarithm_padded_with_zeros_and_normalised():
    wave = np.random.default_rng(4).uniform(-0.5, 0.5, 10_240)
    found = log_mel(torch.from_numpy(wave)[None])
    assert found.shape == (1, 66, 128)
    expected = (np.log(mel_by_definition(wave) + 1e-6) + 4.2677393) / (2 * 4.5689974)
    np.testing.assert_allclose(found[0, :65].numpy(), expected.T, atol=1e-9)
    np.testing.assert_allclose(found[0, 65].numpy(), 4.2677393 / (2 * 4.5689974))  # 0.4670323


def test_pictures_run_from_minus_one_to_one():
    found = normalised_pictures(torch.tensor([0, 255, 102], dtype=torch.uint8))
    np.testing.assert_allclose(found.numpy(), [-1, 1, -0.2], atol=1e-6)


@pytest.mark.parametrize(
    ("frames", "rate", "seconds", "segments", "held"),
    [
        (121, 24.0, "clip", 14, 126),
        (121, 24.0, 8.0, 24, 126),
        (121, 24.0, 4.0, 11, 100),
        (96, 24.0, "clip", 11, 100),
        (16, 25.0, "clip", 1, 16),
        (200, 25.0, 8.0, 24, 200),
        (300, 25.0, 8.0, 24, 200),
        (250, 25.0, "clip", 30, 250),
    ],
)
def test_number_of_segments(frames, rate, seconds, segments, held):
    found = sync_inputs(clip_of(frames, rate), seconds)
    assert found.num_segments == segments
    assert found.frames.shape == (held, 3, 224, 224)
    assert found.mel.shape == (segments, 66, 128)


def test_segments_are_the_clip_at_their_times():
    clip = clip_of(50, 25.0, seconds=2.0, channels=2)
    found = sync_inputs(clip)
    assert found.num_segments == 5
    mono = clip.waveform.astype(np.float64).mean(axis=0)
    for s in range(5):
        np.testing.assert_array_equal(found.picture(s).numpy(), found.frames[8 * s : 8 * s + 16])
        expected = np.log(mel_by_definition(mono[5120 * s : 5120 * s + 10_240]) + 1e-6)
        np.testing.assert_allclose(found.mel[s, :65], (expected.T + 4.2677393) / (2 * 4.5689974), atol=1e-3)


def test_what_lies_past_the_end_is_black_and_silent():
    found = sync_inputs(clip_of(50, 25.0), 4.0)
    assert found.num_segments == 11
    assert [found.is_black(s) for s in range(11)] == [False] * 7 + [True] * 4  # segment 6 begins at frame 48
    assert found.picture(6)[:2].float().mean() > 100
    assert found.picture(6)[2:].max() == 0
    assert found.picture(7).shape == (16, 3, 224, 224)
    assert found.picture(7).max() == 0
    np.testing.assert_allclose(found.mel[7, :65], (np.log(1e-6) + 4.2677393) / (2 * 4.5689974), rtol=1e-6)


def test_the_sound_is_cut_or_filled_to_the_picture():
    long, short = sync_inputs(clip_of(50, 25.0, seconds=3.0)), sync_inputs(clip_of(50, 25.0, seconds=1.0))
    assert long.num_segments == short.num_segments == 5
    np.testing.assert_allclose(short.mel[4, :65], (np.log(1e-6) + 4.2677393) / (2 * 4.5689974), rtol=1e-6)
    assert long.mel[4, :65].mean() > short.mel[4, :65].mean() + 0.5


@pytest.mark.parametrize("seconds", ["clip", 8.0])
@pytest.mark.parametrize(
    ("frames", "sound", "match"),
    [(15, 2.0, "picture of the clip has 0.600 s"), (50, 0.5, "sound of the clip has 0.500 s"), (50, 0.0, "no sound")],
)
def test_a_clip_without_one_whole_segment_is_not_judged(frames, sound, match, seconds):
    with pytest.raises(OmniNFTError, match=match):
        sync_inputs(clip_of(frames, 25.0, sound), seconds)


@pytest.mark.parametrize("seconds", ["Clip", 0.5, 0, -1, True, None, float("nan"), float("inf"), "8"])
def test_seconds_that_mean_nothing_are_refused(seconds):
    with pytest.raises(OmniNFTError, match=r'expected "clip".*at least 0.64 s'):
        check_seconds(seconds)


@pytest.mark.parametrize(
    ("segments", "blocks"),
    [
        (1, [[0] * 14]),
        (11, [[*range(11), 0, 1, 2]]),
        (14, [[*range(14)]]),
        (15, [[*range(14)], [*range(1, 15)]]),
        (24, [[*range(14)], [*range(10, 24)]]),
        (28, [[*range(14)], [*range(14, 28)]]),
        (30, [[*range(14)], [*range(14, 28)], [*range(16, 30)]]),
    ],
)
def test_blocks(segments, blocks):
    assert block_segments(segments) == blocks


# --- the scorer


def inputs_of(segments: int, seed: int, frames: int | None = None) -> SyncInputs:
    random = np.random.default_rng(seed)
    count = 8 * (segments + 1) if frames is None else frames
    colours = random.integers(0, 128, (1, 3, 1, 1), dtype=np.uint8)
    video = random.integers(0, 128, (count, 3, 32, 32), dtype=np.uint8) + colours
    return SyncInputs(video, (random.normal(size=128) + random.normal(size=(segments, 66, 128))).astype(np.float32))


def offsets_by_definition(item: SyncInputs, state: State) -> list[float]:
    frames = np.zeros((8 * (item.num_segments + 1), 3, 32, 32))
    frames[: len(item.frames)] = item.frames
    segments = [frames[8 * s : 8 * s + 16] / 127.5 - 1 for s in range(item.num_segments)]
    video = [linear(video_by_definition(x, state.under("vfeat_extractor"), TINY), state, "vproj") for x in segments]
    audio = [linear(audio_by_definition(x, state.under("afeat_extractor"), TINY), state, "aproj") for x in item.mel]
    found = []
    for start in [0] if item.num_segments <= 14 else [0, item.num_segments - 14]:
        numbers = [(start + i) % item.num_segments for i in range(14)]
        v, a = ([x[i] for i in numbers] for x in (video, audio))
        logits = fused_by_definition(np.array(v), np.array(a), state.under("transformer"), TINY)
        found.append(-2 + 0.2 * int(logits.argmax()))
    return found


def telling_network() -> Synchformer:
    """One whose class depends on the clip: nothing but what the segments say reaches the head."""
    network = randomise(Synchformer(TINY), seed=5, scale=0.5)
    for name, parameter in network.named_parameters():
        if name.endswith(("bias", "pos_emb", "embed", "embeddings", "_tok", "_token")):
            parameter.data.zero_()
    return network


def test_offsets_of_blocks_are_as_defined_and_shared_segments_are_encoded_once(monkeypatch):
    network = telling_network()
    clips = [inputs_of(24, 1, frames=126), inputs_of(11, 2), inputs_of(24, 3, frames=126), inputs_of(14, 4)]
    encoded = {"video": 0, "audio": 0}
    for name in encoded:
        encode = getattr(network, f"encode_{name}")

        def counted(x, name=name, encode=encode):
            encoded[name] += len(x)
            assert len(x) <= 5
            return encode(x)

        monkeypatch.setattr(network, f"encode_{name}", counted)
    found = DeSyncScorer(network).offsets(clips, budget=5)
    # Of 24 segments the last 8 begin past frame 126: one black segment stands for those of both clips.
    assert encoded == {"video": 16 + 11 + 16 + 14 + 1, "audio": 24 + 11 + 24 + 14}
    state = State(network.state_dict())
    expected = [offsets_by_definition(clip, state) for clip in clips]
    assert [len(e) for e in expected] == [2, 1, 2, 1]
    assert len({x for e in expected for x in e}) >= 4
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
    np.testing.assert_allclose(
        DeSyncScorer(network).desync(clips, budget=5), [np.abs(e).mean() for e in expected], atol=1e-12
    )


def test_classes_are_steps_of_a_fifth_of_a_second():
    np.testing.assert_allclose(OFFSETS, np.linspace(-2, 2, 21), atol=1e-15)
    assert OFFSETS[10] == 0


def test_logits_that_are_not_finite_give_no_offset():
    network = randomise(Synchformer(TINY), seed=5)
    broken = inputs_of(14, 1)
    broken.mel[3] = np.nan
    found = DeSyncScorer(network).desync([broken, inputs_of(14, 2)])
    assert np.isnan(found[0])
    assert np.isfinite(found[1])


def test_half_precision_runs():
    network = telling_network()
    clips = [inputs_of(14, seed) for seed in range(4)]
    single = DeSyncScorer(network).desync(clips)
    half = DeSyncScorer(network.bfloat16()).desync(clips)
    assert np.abs(single - half).max() < 0.5  # the class may move where two are close
