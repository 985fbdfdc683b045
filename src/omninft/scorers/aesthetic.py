"""LAION's aesthetic predictor, first version: a linear layer on CLIP ViT-L/14 picture features; about 1..10.

Frames as VBench feeds them: short side bicubic to 224 pixels without antialiasing, cropped in the middle.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPVisionModelWithProjection

from omninft.scorers.clip import MEAN, STD
from omninft.scorers.unfiltered import clip_pixels, in_parts, normalised
from omninft.scorers.weights import JudgingModel, load_strict, renamed
from omninft.types import OmniNFTError

CARD = JudgingModel(
    name="CLIP ViT-L/14 (openai/clip-vit-large-patch14), its picture half",
    parameters=303_966_208,
    licence="MIT (of the code; none stated for the weights)",
    commercial=False,
    files=("config.json", "pytorch_model.bin"),
    repo="openai/clip-vit-large-patch14",
)
HEAD_CARD = JudgingModel(
    name="LAION aesthetic predictor (sa_0_4_vit_l_14_linear)",
    parameters=769,
    licence="MIT (of the repository that holds it)",
    commercial=False,
    files=("sa_0_4_vit_l_14_linear.pth",),
    url="https://github.com/LAION-AI/aesthetic-predictor/raw/main/",
)


class AestheticScorer:
    """Aesthetic scores of frames."""

    def __init__(
        self,
        model: CLIPVisionModelWithProjection,
        head: nn.Linear,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model.to(device, dtype).eval()
        self.head = head.to(device).eval()
        self.device, self.dtype = device, dtype
        self.side = int(model.config.image_size)

    @torch.inference_mode()
    def __call__(self, video: np.ndarray, budget: int = 16) -> np.ndarray:
        """[T, H, W, 3] uint8 to [T] float64, `budget` frames in a forward pass at most."""
        scores = []
        for frames in in_parts(video, budget):
            inputs = normalised(torch.from_numpy(clip_pixels(frames, self.side)), MEAN, STD)
            features = self.model(pixel_values=inputs.to(self.device, self.dtype)).image_embeds
            scores.append(self.head(functional.normalize(features.float(), dim=-1))[:, 0])
        return torch.cat(scores).double().cpu().numpy()


def missing_aesthetic(path: str | Path | None = None) -> str | None:
    """None when both files can be found, else what lacks and the commands that fetch it."""
    lacking = [CARD.missing(path), HEAD_CARD.missing(head_path(path))]
    return "; ".join(why for why in lacking if why is not None) or None


def load_aesthetic(
    path: str | Path | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> AestheticScorer:
    """The released weights. `path` is the folder of CLIP; the head lies there too, or in the weights' folder.

    Raises:
        OmniNFTError: missing or unfit files.
    """
    missing = missing_aesthetic(path)
    if missing is not None:
        raise OmniNFTError(missing)
    config = CLIPConfig.from_json_file(CARD.locate(path)["config.json"])
    model = CLIPVisionModelWithProjection(config.vision_config)
    load_strict(model, renamed(CARD.state("pytorch_model.bin", path), _picture_half), CARD.name)
    head = nn.Linear(model.config.projection_dim, 1)
    load_strict(head, HEAD_CARD.state(HEAD_CARD.files[0], head_path(path)), HEAD_CARD.name)
    return AestheticScorer(model, head, device, dtype)


def head_path(path: str | Path | None) -> str | Path | None:
    """Where the head is looked for when CLIP is in `path`: there if it is there, else in the caches (None)."""
    return path if path is not None and HEAD_CARD.find(HEAD_CARD.files[0], path) is not None else None


def _picture_half(name: str) -> str | None:
    picture = name.startswith(("vision_model.", "visual_projection."))
    return name if picture and not name.endswith("position_ids") else None
