"""Column sums of attention maps against maps made the long way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from omninft.models.recording import attention_column_sums


def qkv(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)]
    return [(2 * torch.randn(s, generator=generator)).to(dtype) for s in shapes]


def full_map(query, key, allowed=None, bias=None):
    """softmax(Q K^T / sqrt(d)) in float64 numpy, [B, H, Ta, Tv]."""
    logits = np.einsum("bhqd,bhkd->bhqk", query.double().numpy(), key.double().numpy()) / math.sqrt(query.shape[-1])
    if bias is not None:
        logits = logits + bias
    weights = np.exp(logits)
    if allowed is not None:
        weights = weights * allowed
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_column_sums_equal_those_of_the_full_map(chunk, weighted):
    query, key, value = qkv()
    maps = full_map(query, key)
    sums = maps.sum(2)  # [B, H, Tv]
    if weighted:
        sums = sums * np.sqrt((value.double().numpy() ** 2).sum(-1))
    got = attention_column_sums(query, key, chunk=chunk, value=value if weighted else None)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), sums.mean(1), rtol=1e-5)
    if not weighted:
        np.testing.assert_allclose(got.sum(1).numpy(), 5.0, rtol=1e-6)


@pytest.mark.parametrize("chunk", [None, 2])
def test_column_sums_with_masks(chunk):
    query, key, _ = qkv(1)
    keys = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    expected = full_map(query, key, allowed=keys.numpy()[:, None, None]).sum(2).mean(1)
    got = attention_column_sums(query, key, mask=keys, chunk=chunk)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)
    assert (got[0, 5:] == 0).all()

    added = torch.randn(1, 3, 5, 7, generator=torch.Generator().manual_seed(2))
    got = attention_column_sums(query, key, mask=added, chunk=chunk)
    np.testing.assert_allclose(got.numpy(), full_map(query, key, bias=added.double().numpy()).sum(2).mean(1), rtol=1e-5)

    pairs = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    pairs[0, 0, 3] = False  # a query that may look at nothing
    expected = full_map(query, key, allowed=pairs.numpy()).sum(2).mean(1)
    for mask in (pairs, torch.zeros(pairs.shape).masked_fill(~pairs, -torch.inf)):
        got = attention_column_sums(query, key, mask=mask, chunk=chunk)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)
    assert got[0].sum().item() == pytest.approx(pairs[0, 0].any(-1).sum().item(), rel=1e-5)
    assert got[0].sum() < 5 - 0.5


def test_column_sums_are_float32_under_bf16_inputs_and_autocast():
    query, key, _ = qkv(2, torch.bfloat16)
    expected = full_map(query.float(), key.float()).sum(2).mean(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention_column_sums(query, key)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)


def test_column_sums_hold_no_full_map_and_no_graph():
    query, key, _ = qkv(3)
    query.requires_grad_()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        got = attention_column_sums(query, key, chunk=2)
    assert not got.requires_grad
    assert 0 < largest < 2 * 5 * 7  # less than one head's [B, Ta, Tv]


def test_column_sums_refuse_shapes_that_do_not_fit():
    query, key, value = qkv()
    with pytest.raises(ValueError, match="do not fit"):
        attention_column_sums(query, key[:, :2])
    with pytest.raises(ValueError, match="do not fit"):
        attention_column_sums(query, key, value=value[:, :, :3])
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        attention_column_sums(query, key, chunk=0)
