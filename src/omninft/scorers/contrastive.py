"""What CLIP and CLAP have in common: texts and things become directions, and the measure is their cosine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from omninft.scorers.batching import unique

TEXTS = 64  # in a forward pass


class ContrastiveScorer:
    """A model of transformers with `get_text_features`, and its tokenizer with truncation and padding set up."""

    def __init__(self, model: Any, tokenizer: Tokenizer, device: str, dtype: torch.dtype) -> None:
        self.model = model.to(device, dtype).eval()
        self.tokenizer, self.device, self.dtype = tokenizer, device, dtype

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """[n, D] float32 of length 1."""
        parts = []
        for start in range(0, len(texts), TEXTS):
            tokens = self.tokenizer.encode_batch(list(texts[start : start + TEXTS]))
            ids = torch.tensor([t.ids for t in tokens], device=self.device)
            mask = torch.tensor([t.attention_mask for t in tokens], device=self.device)
            parts.append(self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output)
        return functional.normalize(torch.cat(parts).float(), dim=-1).cpu()

    def mean_cosines(
        self,
        embed: Callable[[np.ndarray], Tensor],
        things: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        texts: Sequence[str],
    ) -> np.ndarray:
        """[n]: per clip the mean cosine of its things [F_i, ...], weighted [F_i], with its text.

        `embed` gives directions [sum of F_i, D] of all things at once. A text is encoded once, however many clips have
        it.
        """
        different, place = unique(texts)
        directions = self.embed_texts(different)[place]
        owner = np.repeat(np.arange(len(texts)), [len(w) for w in weights])
        cosines = (embed(np.concatenate(things)) * directions[owner]).sum(dim=1).double().numpy()
        return np.array([np.average(cosines[owner == i], weights=weights[i]) for i in range(len(texts))])
