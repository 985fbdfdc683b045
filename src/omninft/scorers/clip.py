"""CLIP (Radford et al. 2021), openai/clip-vit-base-patch32: how well frames fit a text.

48 frames at round(linspace(0, T - 1, 48)), each scaled to a short side of 224 pixels (bicubic) and cropped in the
middle; text cut to 77 tokens; the measure is the mean cosine of frames with text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from omninft.scorers.contrastive import ContrastiveScorer
from omninft.scorers.views import centre_crop, resize_short_side, uint8_tensor, uniform_indices
from omninft.scorers.weights import JudgingModel, load_strict, renamed
from omninft.types import Clip

FRAMES = 48
SIDE = 224  # pixels
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

CARD = JudgingModel(
    name="CLIP ViT-B/32 (openai/clip-vit-base-patch32)",
    parameters=151_277_313,
    licence="MIT (of the code; none stated for the weights)",
    commercial=False,
    files=("config.json", "pytorch_model.bin", "tokenizer.json"),
    repo="openai/clip-vit-base-patch32",
)


def frames(clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """The different frames among the FRAMES sampled [F, 3, SIDE, SIDE] uint8, and how often each was taken [F]."""

    def compute(clip: Clip) -> tuple[np.ndarray, np.ndarray]:
        indices, counts = np.unique(uniform_indices(len(clip.video), FRAMES), return_counts=True)
        # One frame at a time: only the small ones are kept.
        small = [centre_crop(resize_short_side(uint8_tensor(clip.video[[i]]), SIDE, "bicubic"), SIDE) for i in indices]
        return torch.cat(small).contiguous().numpy(), counts

    found: tuple[np.ndarray, np.ndarray] = clip.view("frames-48-224", compute)
    return found


def normalised(pixels: np.ndarray) -> Tensor:
    """[F, 3, H, W] uint8 to float32: in 0..1, less MEAN, by STD."""
    scaled = torch.from_numpy(pixels).float() / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class CLIPScorer(ContrastiveScorer):
    """Cosines of frames with texts."""

    def __init__(
        self, model: CLIPModel, tokenizer: Tokenizer, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(model, tokenizer, device, dtype)
        tokenizer.enable_truncation(model.config.text_config.max_position_embeddings)
        # Behind the end token and causally masked, what fills up is never seen; it must not be above the end token,
        # which older configurations find as the largest id.
        tokenizer.enable_padding(pad_id=0)

    @torch.inference_mode()
    def embed_frames(self, pixels: np.ndarray, budget: int) -> Tensor:
        """[n, 3, SIDE, SIDE] uint8 to [n, D] float32 of length 1, `budget` frames in a forward pass at most."""
        parts = []
        for start in range(0, len(pixels), budget):
            inputs = normalised(pixels[start : start + budget]).to(self.device, self.dtype)
            parts.append(self.model.get_image_features(pixel_values=inputs).pooler_output)
        return functional.normalize(torch.cat(parts).float(), dim=-1).cpu()

    def __call__(
        self, pixels: Sequence[np.ndarray], counts: Sequence[np.ndarray], texts: Sequence[str], budget: int
    ) -> np.ndarray:
        """Frames [F_i, 3, SIDE, SIDE] with their counts [F_i], and a text, per clip: the mean cosine [n]."""
        return self.mean_cosines(lambda all_of: self.embed_frames(all_of, budget), pixels, counts, texts)


def load_clip(path: str | Path | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> CLIPScorer:
    """The released weights, from `path` or the hub's cache. Raises OmniNFTError for missing or unfit files."""
    files = CARD.locate(path)
    model = CLIPModel(CLIPConfig.from_json_file(files["config.json"]))
    # Older releases of transformers wrote the position numbers, which the class computes.
    state = renamed(CARD.state("pytorch_model.bin", path), lambda n: None if n.endswith("position_ids") else n)
    load_strict(model, state, CARD.name)
    return CLIPScorer(model, Tokenizer.from_file(str(files["tokenizer.json"])), device, dtype)
