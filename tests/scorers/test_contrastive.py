from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from omninft.scorers.contrastive import ContrastiveScorer


class Directions(torch.nn.Module):
    """Text i points along axis i; counts the texts it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def get_text_features(self, input_ids, attention_mask):
        self.asked += len(input_ids)
        return SimpleNamespace(pooler_output=3 * torch.nn.functional.one_hot(input_ids[:, 0], 3).float())


def test_the_weighted_mean_of_cosines_and_every_text_once() -> None:
    tokenizer = Tokenizer(WordLevel({"x": 0, "y": 1, "[UNK]": 2}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    model = Directions()
    scorer = ContrastiveScorer(model, tokenizer, "cpu", torch.float32)
    things = [np.array([[1.0, 0, 0], [0, 1, 0]]), np.array([[0.6, 0.8, 0]]), np.array([[0.6, 0.8, 0]])]
    weights = [np.array([3.0, 1.0]), np.array([1.0]), np.array([2.0])]
    found = scorer.mean_cosines(torch.from_numpy, things, weights, ["x", "y", "x"])
    assert found == pytest.approx([0.75, 0.8, 0.6])
    assert model.asked == 2
