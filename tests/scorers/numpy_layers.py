"""Layers of transformers in float64 numpy, as the papers define them: what the networks are compared with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy.special import erf
from torch import nn


def randomise(network: nn.Module, seed: int = 0, scale: float = 0.2) -> nn.Module:
    """Every parameter drawn, also those that start at 0 or 1, so that each has to be used and used rightly."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * scale
    return network.eval().requires_grad_(False)


class State(dict):
    """A state dict in float64 numpy; `state["a.b"]` gives the part under a prefix with "." at the end."""

    def __init__(self, state: Mapping[str, torch.Tensor | np.ndarray]) -> None:
        super().__init__({k: np.asarray(v, dtype=np.float64) for k, v in state.items()})

    def under(self, prefix: str) -> State:
        return State({k[len(prefix) + 1 :]: v for k, v in self.items() if k.startswith(prefix + ".")})


def linear(x: np.ndarray, state: State, name: str) -> np.ndarray:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def norm(x: np.ndarray, state: State, name: str, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """[L, D], [M, D], [M, D], and where a query may look [L, M]: dense attention of one input."""
    outputs = []
    for qh, kh, vh in zip(*(np.split(x, heads, axis=1) for x in (q, k, v)), strict=True):
        scores = qh @ kh.T / np.sqrt(qh.shape[1])
        if allowed is not None:
            scores = np.where(allowed, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        outputs.append(weights / weights.sum(axis=1, keepdims=True) @ vh)
    return np.concatenate(outputs, axis=1)


def packed_attention(x: np.ndarray, state: State, heads: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """torch's MultiheadAttention on one input [L, D], with its extra key and value where the state has them."""
    q, k, v = np.split(x @ state["in_proj_weight"].T + state["in_proj_bias"], 3, axis=1)
    if "bias_k" in state:
        k, v = np.concatenate([k, state["bias_k"][0]]), np.concatenate([v, state["bias_v"][0]])
    return linear(attention(q, k, v, heads, allowed), state, "out_proj")


def patches(x: np.ndarray, state: State, name: str, stride: int) -> np.ndarray:
    """A convolution over the last axes of [C, ...] by loops, as tokens in row-major order [L, D]."""
    kernel = state[f"{name}.weight"]
    size = kernel.shape[2:]
    strides = (size[0], stride, stride) if len(size) == 3 else (stride, stride)
    places = np.ndindex(*((n - s) // step + 1 for n, s, step in zip(x.shape[1:], size, strides, strict=True)))
    tokens = []
    for place in places:
        window = tuple(slice(p * step, p * step + s) for p, step, s in zip(place, strides, size, strict=True))
        tokens.append((kernel * x[(slice(None), *window)]).reshape(len(kernel), -1).sum(1))
    bias = state.get(f"{name}.bias", 0.0)
    return np.array(tokens) + bias
