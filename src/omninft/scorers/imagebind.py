"""ImageBind: pictures, sounds and texts in one space, where the cosine says how well two of them go together.

Girdhar et al., "ImageBind: One Embedding Space To Bind Them All" (CVPR 2023). The huge model's towers of vision, text
and sound, written from the published layout: parameter names and shapes are those of imagebind_huge.pth, which loads
strictly; its towers of depth, heat and motion are left out. Code and weights of the original are for non-commercial
use only (CC-BY-NC-SA 4.0): nothing loads this model unless a recipe names it.

Shapes: n inputs (views or texts), L tokens, D width of a tower, E = 1024 width of the common space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from omninft.scorers.batching import unique
from omninft.scorers.imagebind_inputs import (
    CONTEXT,
    MEL_FRAMES,
    NUM_MELS,
    SIDE,
    TextTokens,
    load_tokens,
    still_views,
)
from omninft.scorers.weights import JudgingModel, load_strict, renamed

_FILE = "imagebind_huge.pth"

IMAGEBIND = JudgingModel(
    name="ImageBind huge",
    parameters=1_073_097_730,  # of the towers of vision, text and sound
    licence="CC-BY-NC-SA 4.0 (code and weights)",
    commercial=False,
    files=(_FILE,),
    url="https://dl.fbaipublicfiles.com/imagebind/",
)

_PARTS = ("preprocessors", "trunks", "heads", "postprocessors")
_LEFT_OUT = tuple(f"modality_{part}.{tower}." for part in _PARTS for tower in ("depth", "thermal", "imu"))
_MAX_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class Tower:
    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class ImageBindConfig:
    """Sizes; the defaults are those of the released model."""

    vision: Tower = Tower(1280, 32, 16)
    text: Tower = Tower(1024, 24, 16)
    audio: Tower = Tower(768, 12, 12)
    embedding: int = 1024
    patch: int = 14  # pixels
    vocabulary: int = 49_408
    audio_patch: int = 16
    audio_stride: int = 10

    @property
    def vision_tokens(self) -> int:
        return 1 + (SIDE // self.patch) ** 2

    @property
    def audio_tokens(self) -> int:
        bands, steps = ((n - self.audio_patch) // self.audio_stride + 1 for n in (NUM_MELS, MEL_FRAMES))
        return 1 + bands * steps


class _Stem(nn.Module):
    """A convolution that makes tokens, and a norm over them where there is one."""

    def __init__(self, proj: nn.Module, norm_layer: nn.Module | None = None) -> None:
        super().__init__()
        self.proj = proj
        self.norm_layer = norm_layer

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        return tokens if self.norm_layer is None else self.norm_layer(tokens)


class _PatchTokens(nn.Module):
    """Class token, then patches, with learned positions."""

    def __init__(self, stem: _Stem, tokens: int, width: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.rgbt_stem = stem
        self.pos_embedding_helper = nn.ParameterDict({"pos_embed": torch.zeros(1, tokens, width)})

    def forward(self, x: Tensor) -> Tensor:
        patches = self.rgbt_stem(x)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return tokens + self.pos_embedding_helper["pos_embed"]


class _TextTokens(nn.Module):
    """Token embeddings with learned positions, and the causal mask that the released file carries."""

    mask: Tensor

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, CONTEXT, width))
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.register_buffer("mask", torch.full((CONTEXT, CONTEXT), -math.inf).triu(1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.pos_embed


class _Attention(nn.Module):
    """Self-attention with the parameters of torch's MultiheadAttention; `bias_kv` adds a learned key and value."""

    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(self, width: int, heads: int, bias_kv: bool) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.bias_k = nn.Parameter(torch.zeros(1, 1, width)) if bias_kv else None
        self.bias_v = nn.Parameter(torch.zeros(1, 1, width)) if bias_kv else None
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], dim=1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(-2))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, bias_kv: bool) -> None:
        super().__init__()
        self.attn = _Attention(width, heads, bias_kv)
        self.norm_1 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _Mlp(width)
        self.norm_2 = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm_1(x), mask)
        return x + self.mlp(self.norm_2(x))


class _Trunk(nn.Module):
    def __init__(self, tower: Tower, norm_first: bool = False, bias_kv: bool = False) -> None:
        super().__init__()
        self.pre_transformer_layer = nn.Sequential(*([nn.LayerNorm(tower.width, eps=1e-6)] if norm_first else []))
        self.blocks = nn.ModuleList(_Block(tower.width, tower.heads, bias_kv) for _ in range(tower.layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.pre_transformer_layer(x)
        for block in self.blocks:
            x = block(x, mask)
        return x


class _ClassToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class _TextHead(nn.Module):
    """Reads the text at its end token, which has the highest number of all."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, embedding, bias=False))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.proj(x[torch.arange(len(x), device=x.device), ids.argmax(dim=-1)])


class _UnitLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x.float(), dim=-1)


class _LogitScale(nn.Module):
    """Multiplies by exp(log_logit_scale), at most 100: learned for text, 20 for sound."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log_logit_scale.float().exp().clamp_max(_MAX_LOGIT_SCALE)


class ImageBind(nn.Module):
    """The three towers. Each gives [n, E] float32: unit vectors, those of text and sound times a logit scale."""

    def __init__(self, config: ImageBindConfig | None = None) -> None:
        super().__init__()
        c = config or ImageBindConfig()
        cube = (2, c.patch, c.patch)
        # The original repeats still images in a step in front of the convolution; here the views come as pairs.
        vision = _Stem(nn.Sequential(nn.Identity(), nn.Conv3d(3, c.vision.width, cube, cube, bias=False)))
        audio = _Stem(
            nn.Conv2d(1, c.audio.width, c.audio_patch, c.audio_stride, bias=False), nn.LayerNorm(c.audio.width)
        )
        self.modality_preprocessors = nn.ModuleDict(
            {
                "vision": _PatchTokens(vision, c.vision_tokens, c.vision.width),
                "text": _TextTokens(c.vocabulary, c.text.width),
                "audio": _PatchTokens(audio, c.audio_tokens, c.audio.width),
            }
        )
        self.modality_trunks = nn.ModuleDict(
            {
                "vision": _Trunk(c.vision, norm_first=True),
                "text": _Trunk(c.text),
                "audio": _Trunk(c.audio, bias_kv=True),
            }
        )
        self.modality_heads = nn.ModuleDict(
            {
                "vision": _class_head(c.vision.width, c.embedding),
                "text": _TextHead(c.text.width, c.embedding),
                "audio": _class_head(c.audio.width, c.embedding),
            }
        )
        self.modality_postprocessors = nn.ModuleDict(
            {
                "vision": _UnitLength(),
                "text": nn.Sequential(_UnitLength(), _LogitScale(1 / 0.07)),
                "audio": nn.Sequential(_UnitLength(), _LogitScale(20.0)),
            }
        )

    def embed_vision(self, views: Tensor) -> Tensor:
        """Pairs of normalised frames [n, 3, 2, 224, 224]."""
        return self._embed("vision", views)

    def embed_audio(self, views: Tensor) -> Tensor:
        """Normalised spectra [n, 1, 128, 204]."""
        return self._embed("audio", views)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Token numbers [n, 77]."""
        tokens = self.modality_preprocessors["text"]
        hidden = self.modality_trunks["text"](tokens(ids), tokens.mask)
        return self.modality_postprocessors["text"](self.modality_heads["text"](hidden, ids))

    def _embed(self, tower: str, views: Tensor) -> Tensor:
        hidden = self.modality_trunks[tower](self.modality_preprocessors[tower](views))
        return self.modality_postprocessors[tower](self.modality_heads[tower](hidden))


def _class_head(width: int, embedding: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width, eps=1e-6), _ClassToken(), nn.Linear(width, embedding, bias=False))


class ImageBindScorer:
    """Embeddings of many clips at once; `budget` is the number of views or texts in a forward pass.

    The embedding of something with several views is the mean of theirs, after their postprocessing.
    """

    def __init__(self, network: ImageBind, tokens: TextTokens) -> None:
        self.network = network.eval().requires_grad_(False)
        self.tokens = tokens

    def videos(self, videos: Sequence[Sequence[Tensor]], budget: int = 32) -> np.ndarray:
        """[len(videos), E] from the views [3, 2, 224, 224] of each (`video_views`)."""
        return self._mean_of_views(self.network.embed_vision, videos, budget)

    def sounds(self, sounds: Sequence[Sequence[Tensor]], budget: int = 32) -> np.ndarray:
        """[len(sounds), E] from the views [1, 128, 204] of each (`audio_views`)."""
        return self._mean_of_views(self.network.embed_audio, sounds, budget)

    def frames(self, frames: np.ndarray, budget: int = 32) -> np.ndarray:
        """[n, E] of still frames [n, 3, 224, 224] uint8 (`still_frames`)."""
        return self._mean_of_views(self.network.embed_vision, [[view] for view in still_views(frames)], budget)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], budget: int = 32) -> np.ndarray:
        """[len(texts), E]; equal texts are embedded once."""
        different, index = unique(texts)
        ids = self.tokens(different).to(next(self.network.parameters()).device)
        embedded = torch.cat([self.network.embed_text(part) for part in ids.split(budget)])
        return embedded.double().cpu().numpy()[index]

    @torch.inference_mode()
    def _mean_of_views(
        self, embed: Callable[[Tensor], Tensor], items: Sequence[Sequence[Tensor]], budget: int
    ) -> np.ndarray:
        """[len(items), E] float64. A view that stands several times in an item is embedded once."""
        parameter = next(self.network.parameters())
        views = [view for item in items for view in item]
        different, index = unique([id(view) for view in views])
        once = {id(view): view for view in views}
        embedded = [
            embed(torch.stack([once[key] for key in different[i : i + budget]]).to(parameter)).double().cpu()
            for i in range(0, len(different), budget)
        ]
        rows = torch.cat(embedded).numpy()[index]
        ends = np.cumsum([len(item) for item in items])
        return np.stack([part.mean(axis=0) for part in np.split(rows, ends[:-1])])


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row, -1 .. 1: of [n, E] and [n, E], or of shapes that broadcast."""
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def load_imagebind(
    path: str | Path | None = None,
    tokenizer: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    keep_end: bool = True,
) -> ImageBindScorer:
    """The released model from `path` (the file or its folder) or the weights folder; see `load_tokens` for the rest.

    Raises:
        OmniNFTError: a missing file (with the command that fetches it), other names or shapes.
    """
    tokens = load_tokens(tokenizer, keep_end)
    state = renamed(IMAGEBIND.state(_FILE, path), lambda key: None if key.startswith(_LEFT_OUT) else key)
    with torch.device("meta"):
        network = ImageBind()
    network = network.to_empty(device="cpu")  # every value comes from the file
    load_strict(network, state, _FILE)
    return ImageBindScorer(network.to(device, dtype), tokens)
