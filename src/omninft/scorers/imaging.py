"""MUSIQ (Ke et al. 2021) trained on SPAQ: technical quality of a frame, about 0..100, as VBench's imaging_quality.

A frame is seen three times: with its longer side at 224 and 384 pixels, and as it is. Each is cut into patches of 32
pixels (zeros around, as TensorFlow's SAME); a small ResNet makes a token of a patch; tokens know their scale and their
place on a hashed 10 x 10 grid; 14 transformer blocks; the class token gives the score. Names of the weights are those
of IQA-PyTorch's conversion, the file that VBench loads, and so is the resizing: plain bicubic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from omninft.scorers.unfiltered import in_parts, longer_side_at_most
from omninft.scorers.views import to_tensor
from omninft.scorers.weights import JudgingModel, load_strict

LONGEST = 512  # pixels: VBench shrinks larger frames to that first
PATCH = 32  # pixels
SIDES = (224, 384)  # pixels, longer side of the two smaller scales
GRID = 10  # places a side that positions are hashed to

CARD = JudgingModel(
    name="MUSIQ, SPAQ (IQA-PyTorch's conversion)",
    parameters=27_125_825,
    licence="conversion: PolyForm Noncommercial 1.0.0 / S-Lab 1.0; original: Apache-2.0",
    commercial=False,
    files=("musiq_spaq_ckpt-358bb6af.pth",),
    url="https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/",
)


@dataclass(frozen=True)
class MUSIQSizes:
    """The released sizes; tests take smaller ones."""

    width: int = 384
    mlp: int = 1152
    heads: int = 6
    blocks: int = 14
    stem: int = 64  # channels; the ResNet block gives four times as many
    groups: int = 32


class _Convolution(nn.Conv2d):
    """Weights standardised per output channel; padded with zeros as TensorFlow's SAME."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return functional.conv2d(_same(x, self.kernel_size[0], self.stride[0]), weight, None, self.stride)


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.conv1 = _Convolution(channels, channels, 1, bias=False)
        self.gn1 = nn.GroupNorm(groups, channels, eps=1e-4)
        self.conv2 = _Convolution(channels, channels, 3, bias=False)
        self.gn2 = nn.GroupNorm(groups, channels, eps=1e-4)
        self.conv3 = _Convolution(channels, wide, 1, bias=False)
        self.gn3 = nn.GroupNorm(groups, wide, eps=1e-4)
        self.conv_proj = _Convolution(channels, wide, 1, bias=False)
        self.gn_proj = nn.GroupNorm(groups, wide, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.gn1(self.conv1(x)))
        y = functional.relu(self.gn2(self.conv2(y)))
        return functional.relu(self.gn3(self.conv3(y)) + self.gn_proj(self.conv_proj(x)))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        # What fills up a scale is never seen, and what it sees itself is never read.
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :])
        return self.out(y.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, sizes: MUSIQSizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, eps=1e-6)
        self.attention = _Attention(sizes.width, sizes.heads)
        self.norm2 = nn.LayerNorm(sizes.width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(sizes.width, sizes.mlp), "fc2": nn.Linear(sizes.mlp, sizes.width)})

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), seen)
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


class _Encoder(nn.Module):
    def __init__(self, sizes: MUSIQSizes) -> None:
        super().__init__()
        self.posembed_input = nn.ParameterDict({"position_emb": torch.zeros(1, GRID * GRID, sizes.width)})
        self.scaleembed_input = nn.ParameterDict({"scale_emb": torch.zeros(len(SIDES) + 1, sizes.width)})
        self.cls = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.encoder_norm = nn.LayerNorm(sizes.width, eps=1e-6)
        self.transformer = nn.ModuleDict({f"encoderblock_{n}": _Block(sizes) for n in range(sizes.blocks)})

    def forward(self, tokens: Tensor, places: Tensor, scales: Tensor, seen: Tensor) -> Tensor:
        x = tokens + self.posembed_input["position_emb"][0, places] + self.scaleembed_input["scale_emb"][scales]
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        seen = functional.pad(seen, (1, 0), value=True)
        for block in self.transformer.values():
            x = block(x, seen)
        return self.encoder_norm(x[:, 0])


class MUSIQ(nn.Module):
    """Frames [B, 3, H, W] in 0..1 to scores [B]."""

    def __init__(self, sizes: MUSIQSizes | None = None) -> None:
        super().__init__()
        sizes = sizes or MUSIQSizes()
        self.conv_root = _Convolution(3, sizes.stem, 7, 2, bias=False)
        self.gn_root = nn.GroupNorm(sizes.groups, sizes.stem, eps=1e-6)
        self.block1 = _Bottleneck(sizes.stem, sizes.groups)
        self.embedding = nn.Linear(4 * sizes.stem * (PATCH // 4) ** 2, sizes.width)
        self.transformer_encoder = _Encoder(sizes)
        self.head = nn.Linear(sizes.width, 1)

    def forward(self, frames: Tensor) -> Tensor:
        patches, places, scales, seen = multiscale_patches(2 * frames - 1)
        x = patches.flatten(0, 1)
        x = functional.relu(self.gn_root(self.conv_root(x)))
        x = self.block1(functional.max_pool2d(_same(x, 3, 2), 3, 2))
        # Row, column, channel: the order of the original's framework.
        tokens = self.embedding(x.permute(0, 2, 3, 1).flatten(1)).unflatten(0, patches.shape[:2])
        seen = seen.expand(len(frames), -1)
        return self.head(self.transformer_encoder(tokens, places, scales, seen))[:, 0]


def multiscale_patches(frames: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, 3, H, W] to patches [B, L, 3, PATCH, PATCH], and for each place, scale and whether it is one, [L].

    The smaller scales fill up to the patches of a square of that side.
    """
    height, width = frames.shape[-2:]
    parts = []
    for scale, side in enumerate((*SIDES, None)):
        image = frames
        if side is not None:
            ratio = side / max(height, width)
            size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
            image = functional.interpolate(frames, size, mode="bicubic", align_corners=False)
        padded = _same(image, PATCH, PATCH)
        rows, columns = padded.shape[-2] // PATCH, padded.shape[-1] // PATCH
        cut = padded.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [B, 3, rows, columns, PATCH, PATCH]
        cut = cut.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        places = (_hashed(rows)[:, None] * GRID + _hashed(columns)[None]).flatten()
        room = math.ceil(side / PATCH) ** 2 if side is not None else rows * columns
        fill = room - rows * columns
        parts.append(
            (
                functional.pad(cut, (0, 0, 0, 0, 0, 0, 0, fill)),
                functional.pad(places, (0, fill)),
                functional.pad(torch.full_like(places, scale), (0, fill)),
                functional.pad(torch.ones_like(places, dtype=torch.bool), (0, fill)),
            )
        )
    patches, all_places, scales, seen = zip(*parts, strict=True)
    device = frames.device
    return torch.cat(patches, 1), *(torch.cat(x).to(device) for x in (all_places, scales, seen))  # type: ignore[return-value]


class ImagingScorer:
    """Technical quality of frames."""

    def __init__(self, model: MUSIQ, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.model = model.to(device, dtype).eval()
        self.device, self.dtype = device, dtype

    @torch.inference_mode()
    def __call__(self, video: np.ndarray, budget: int = 4) -> np.ndarray:
        """[T, H, W, 3] uint8 to [T] float64, `budget` frames in a forward pass at most."""
        scores = []
        for frames in in_parts(video, budget):
            inputs = longer_side_at_most(to_tensor(frames), LONGEST, "bilinear") / 255
            scores.append(self.model(inputs.to(self.device, self.dtype)))
        return torch.cat(scores).double().cpu().numpy()


def load_imaging(
    path: str | Path | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ImagingScorer:
    """The released weights, from `path` or the weights' folder. Raises OmniNFTError for missing or unfit files."""
    model = MUSIQ()
    load_strict(model, CARD.state(CARD.files[0], path), CARD.name)
    return ImagingScorer(model, device, dtype)


def _same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around so that a window of `kernel` by `stride` gives ceil(size / stride); the odd one behind."""
    pads: list[int] = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads)


def _hashed(count: int) -> Tensor:
    """[count] places on a side of GRID, spread evenly."""
    return (torch.arange(count) * GRID / count).floor().long()
