"""DINO ViT-B/16 (Caron et al. 2021): what a frame shows, as VBench's subject_consistency compares it.

Frames are scaled to a short side of 224 pixels (bilinear, no antialiasing) and not cropped: position embeddings are
interpolated to the frame's own grid as the released code does it. The feature is the class token after the last norm.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTModel

from omninft.scorers.unfiltered import in_parts, normalised, short_side
from omninft.scorers.views import to_tensor
from omninft.scorers.weights import JudgingModel, load_strict, read_state, renamed

SIDE = 224  # pixels, of the shorter side
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
NORM_EPS = 1e-6  # of the released code; the hub's configuration says 1e-12
_LICENCE = "Apache-2.0 (of the code; none stated for the weights)"

# The authors' file, and the hub's copy in the layout of older transformers. No revision or checksum is published.
CARD = JudgingModel(
    name="DINO ViT-B/16 (facebookresearch/dino)",
    parameters=85_798_656,
    licence=_LICENCE,
    commercial=False,
    files=("dino_vitbase16_pretrain.pth",),
    url="https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/",
)
HUB_CARD = JudgingModel(
    name="DINO ViT-B/16 (facebook/dino-vitb16)",
    parameters=85_798_656,
    licence=_LICENCE,
    commercial=False,
    files=("pytorch_model.bin",),
    repo="facebook/dino-vitb16",
)

_PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_HUB_PARTS = {
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}


class DINOScorer:
    """Features of frames. The network's layer norms must have NORM_EPS."""

    def __init__(self, model: ViTModel, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.model = model.to(device, dtype).eval()
        self.device, self.dtype = device, dtype
        embeddings = self.model.embeddings
        # The library interpolates to a size; the released code by a factor, which shifts where it samples.
        embeddings.interpolate_pos_encoding = lambda _, height, width: positions(
            embeddings.position_embeddings, height // embeddings.patch_size, width // embeddings.patch_size
        )

    @torch.inference_mode()
    def embed_frames(self, video: np.ndarray, budget: int = 16) -> Tensor:
        """[T, H, W, 3] uint8 to [T, D] float32 of length 1, `budget` frames in a forward pass at most."""
        parts = []
        for frames in in_parts(video, budget):
            inputs = normalised(short_side(to_tensor(frames), SIDE, "bilinear"), MEAN, STD)
            output = self.model(pixel_values=inputs.to(self.device, self.dtype), interpolate_pos_encoding=True)
            parts.append(output.last_hidden_state[:, 0].float())
        return functional.normalize(torch.cat(parts), dim=-1).cpu()


def positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """Position embeddings [1, 1 + n * n, D] for a grid of patches: [1, 1 + rows * columns, D].

    Bicubic by the factors (rows + 0.1) / n and (columns + 0.1) / n, as in the released code.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if rows == columns == side:
        return table
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = ((rows + 0.1) / side, (columns + 0.1) / side)
    grid = functional.interpolate(grid, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def load_dino(path: str | Path | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> DINOScorer:
    """The released weights: the authors' file or the hub's copy, from `path` or the caches.

    Raises:
        OmniNFTError: neither is there, or a file that does not fit.
    """
    card = card_of(path)
    file = card.locate(path)[card.files[0]]
    model = ViTModel(ViTConfig(layer_norm_eps=NORM_EPS), add_pooling_layer=False)
    load_strict(model, own_names(read_state(file)), str(file))
    return DINOScorer(model, device, dtype)


def card_of(path: str | Path | None = None) -> JudgingModel:
    """The card whose file is there; the authors' where both are, or neither."""
    return HUB_CARD if CARD.missing(path) is not None and HUB_CARD.missing(path) is None else CARD


def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the authors' or the hub's layout under the names of `ViTModel`."""
    if "pos_embed" in state:
        split = {}
        for name, tensor in state.items():
            match = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
            if match:
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    split[f"layers.{match[1]}.attention.{part}_proj.{match[2]}"] = piece
            else:
                split[_TOP.get(name, _renamed(name, r"blocks\.(\d+)\.(.+)\.(weight|bias)", _PARTS))] = tensor
        return split
    return renamed(state, _hub_name)


def _hub_name(name: str) -> str | None:
    if name.startswith("pooler."):  # untrained, and not part of DINO
        return None
    return _renamed(name, r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", _HUB_PARTS)


def _renamed(name: str, pattern: str, parts: dict[str, str]) -> str:
    match = re.fullmatch(pattern, name)
    if match is None or match[2] not in parts:
        return name
    return f"layers.{match[1]}.{parts[match[2]]}.{match[3]}"
