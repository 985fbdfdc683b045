from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from omninft.scorers import imaging
from omninft.scorers.imaging import MUSIQ, ImagingScorer, MUSIQSizes, load_imaging, multiscale_patches
from omninft.types import OmniNFTError
from tests.moving_clips import moving_clip
from tests.scorers.numpy_layers import State, attention, gelu, linear, norm, randomise
from tests.scorers.numpy_resize import resized

SMALL = MUSIQSizes(width=12, mlp=20, heads=2, blocks=2, stem=4, groups=2)


def small_model(seed: int = 0) -> MUSIQ:
    return randomise(MUSIQ(SMALL), seed, 0.4)  # type: ignore[return-value]


def same(x: np.ndarray, kernel: int, stride: int) -> np.ndarray:
    pads = [(0, 0)] * (x.ndim - 2)
    for size in x.shape[-2:]:
        total = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
        pads.append((total // 2, total - total // 2))
    return np.pad(x, pads)


def windows(x: np.ndarray, kernel: int, stride: int) -> np.ndarray:
    """[N, C, H, W] to [N, C, h, w, kernel, kernel]."""
    view = np.lib.stride_tricks.sliding_window_view(same(x, kernel, stride), (kernel, kernel), axis=(2, 3))
    return view[:, :, ::stride, ::stride]


def convolution(x: np.ndarray, weight: np.ndarray, stride: int = 1) -> np.ndarray:
    flat = weight.reshape(len(weight), -1)
    flat = (flat - flat.mean(1, keepdims=True)) / (flat.std(1, ddof=1, keepdims=True) + 1e-5)
    return np.einsum("nchwij,ocij->nohw", windows(x, weight.shape[2], stride), flat.reshape(weight.shape))


def group_norm(x: np.ndarray, state: State, name: str, eps: float) -> np.ndarray:
    grouped = x.reshape(len(x), SMALL.groups, -1)
    grouped = grouped - grouped.mean(2, keepdims=True)
    scaled = (grouped / np.sqrt((grouped**2).mean(2, keepdims=True) + eps)).reshape(x.shape)
    return scaled * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def token(patch: np.ndarray, state: State) -> np.ndarray:
    """One patch [3, 32, 32] to a token."""
    x = np.maximum(group_norm(convolution(patch[None], state["conv_root.weight"], 2), state, "gn_root", 1e-6), 0)
    x = windows(x, 3, 2).max((4, 5))
    block = state.under("block1")
    y = np.maximum(group_norm(convolution(x, block["conv1.weight"]), block, "gn1", 1e-4), 0)
    y = np.maximum(group_norm(convolution(y, block["conv2.weight"]), block, "gn2", 1e-4), 0)
    y = group_norm(convolution(y, block["conv3.weight"]), block, "gn3", 1e-4)
    y = np.maximum(y + group_norm(convolution(x, block["conv_proj.weight"]), block, "gn_proj", 1e-4), 0)
    return linear(y[0].transpose(1, 2, 0).reshape(1, -1), state, "embedding")[0]


def by_hand(frame: np.ndarray, model: MUSIQ) -> float:
    """The score of a frame [3, H, W] in 0..1; patches that only fill up are left out altogether."""
    state = State(model.state_dict())
    encoder = state.under("transformer_encoder")
    frame = 2 * np.asarray(frame, dtype=np.float64) - 1
    height, width = frame.shape[1:]
    tokens = [encoder["cls"][0, 0]]
    for scale, side in enumerate((224, 384, None)):
        image = frame
        if side is not None:
            ratio = side / max(height, width)
            image = resized(frame, round(height * ratio), round(width * ratio), "bicubic")
        image = same(image, 32, 32)
        rows, columns = image.shape[1] // 32, image.shape[2] // 32
        for r in range(rows):
            for c in range(columns):
                patch = image[:, 32 * r : 32 * r + 32, 32 * c : 32 * c + 32]
                place = int(r * 10 / rows) * 10 + int(c * 10 / columns)
                tokens.append(
                    token(patch, state)
                    + encoder["posembed_input.position_emb"][0, place]
                    + encoder["scaleembed_input.scale_emb"][scale]
                )
    y = np.stack(tokens)
    for n in range(SMALL.blocks):
        block = encoder.under(f"transformer.encoderblock_{n}")
        x = norm(y, block, "norm1", 1e-6)
        q, k, v = (linear(x, block, f"attention.{name}") for name in ("query", "key", "value"))
        y = y + linear(attention(q, k, v, SMALL.heads), block, "attention.out")
        y = y + linear(gelu(linear(norm(y, block, "norm2", 1e-6), block, "mlp.fc1")), block, "mlp.fc2")
    return float(linear(norm(y[:1], encoder, "encoder_norm", 1e-6), state, "head")[0, 0])


@pytest.mark.parametrize(("height", "width"), [(40, 70), (64, 33)])
def test_scores_against_numpy(height, width):
    frames = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height))
    model = small_model()
    with torch.no_grad():
        found = model(frames)
    expected = [by_hand(frame.numpy(), model) for frame in frames]
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_patches_of_known_numbers():
    patches, places, scales, seen = multiscale_patches(torch.zeros(1, 3, 288, 512))
    # 126 x 224 pixels: 4 x 7 patches of 49; 216 x 384: 7 x 12 of 144; 288 x 512: 9 x 16.
    assert patches.shape == (1, 49 + 144 + 144, 3, 32, 32)
    assert [int(seen[scales == n].sum()) for n in range(3)][1:] == [84, 144]
    assert int(seen[:49].sum()) == 28
    assert places[:7].tolist() == [0, 1, 2, 4, 5, 7, 8]
    assert places[7:9].tolist() == [20, 21]
    assert int(places.max()) == 89


def test_places_are_those_of_nearest_neighbour_interpolation():
    for count in range(1, 40):
        _, places, scales, _ = multiscale_patches(torch.zeros(1, 3, 32, 32 * count))
        expected = torch.nn.functional.interpolate(torch.arange(10.0)[None, None], count, mode="nearest")
        assert places[scales == 2].tolist() == expected.flatten().long().tolist()


def test_frames_are_shrunk_to_512_and_batches_do_not_matter():
    video = moving_clip(2, 3, 20, 30).video.repeat(20, 1).repeat(20, 2)  # 400 x 600
    scorer = ImagingScorer(small_model())
    found = scorer(video, budget=2)
    np.testing.assert_allclose(found, scorer(video, budget=1), atol=1e-5)
    small = torch.from_numpy(resized(video.transpose(0, 3, 1, 2), 341, 512, "bilinear") / 255).float()
    with torch.no_grad():
        np.testing.assert_allclose(found, scorer.model(small), atol=1e-4)


def test_released_file_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path))
    with pytest.raises(OmniNFTError, match=r"curl .*musiq_spaq_ckpt-358bb6af\.pth"):
        load_imaging()
    monkeypatch.setattr(imaging, "MUSIQ", lambda: MUSIQ(SMALL))
    model = small_model(3)
    torch.save(model.state_dict(), tmp_path / "musiq_spaq_ckpt-358bb6af.pth")
    video = moving_clip(2, 1, 32, 32).video
    np.testing.assert_allclose(load_imaging()(video), ImagingScorer(model)(video), atol=1e-6)


def test_names_and_size_are_the_released_ones():
    with torch.device("meta"):
        model = MUSIQ()
    state = model.state_dict()
    assert sum(v.numel() for v in state.values()) == imaging.CARD.parameters == 27_125_825
    names = {"transformer_encoder.posembed_input.position_emb": (1, 100, 384)}
    names |= {"transformer_encoder.scaleembed_input.scale_emb": (3, 384), "transformer_encoder.cls": (1, 1, 384)}
    names |= {"conv_root.weight": (64, 3, 7, 7), "embedding.weight": (384, 16_384), "head.weight": (1, 384)}
    names |= {"block1.conv_proj.weight": (256, 64, 1, 1), "block1.gn2.bias": (64,), "gn_root.weight": (64,)}
    block = "transformer_encoder.transformer.encoderblock_13"
    names |= {f"{block}.attention.query.bias": (384,), f"{block}.mlp.fc1.weight": (1152, 384)}
    assert {name: tuple(state[name].shape) for name in names} == names
    assert len(state) == 248
