from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omninft.credit.regions import region_weights, warmup_scale
from omninft.types import OmniNFTError

METHODS = ["minmax", "zscore_sigmoid", "top_share"]


def random_scores(batch=3, frames=4, per_frame=6, seed=0):
    return torch.rand(batch, frames * per_frame, generator=torch.Generator().manual_seed(seed)) ** 3 * 5


def expected_weights(scores, frames, method, strength, share, scale, given):
    """The definitions for one clip, token by token."""
    free = [i for i in range(len(scores)) if not given[i]]
    kept = np.array([scores[i] for i in free])
    omega = np.zeros(len(scores))
    per_frame = len(scores) // frames
    for i in free:
        if method == "minmax":
            omega[i] = 1 + strength * scale * (scores[i] - kept.min()) / (kept.max() - kept.min())
        elif method == "zscore_sigmoid":
            frame = i // per_frame
            mates = np.array([scores[j] for j in free if j // per_frame == frame])
            c = (strength - 1) * scale
            z = (scores[i] - mates.mean()) / mates.std(ddof=1) if len(mates) > 1 else 0.0
            omega[i] = 1 + c / (1 + math.exp(-c * z))
        else:
            clipped = np.minimum(kept, np.percentile(kept, 99))
            top = min(scores[i], np.percentile(kept, 99)) > np.percentile(clipped, 100 * (1 - share))
            omega[i] = 1 + (strength - 1) * scale if top else 1.0
    return omega


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("strength", "share", "scale"), [(1.5, 0.4, 1.0), (2.25, 0.25, 0.4)])
@pytest.mark.parametrize("with_given", [False, True])
def test_region_weights_match_the_definitions(method, strength, share, scale, with_given):
    scores = random_scores()
    given_tokens = torch.zeros_like(scores, dtype=torch.bool)
    if with_given:
        given_tokens[0, :6] = True  # the whole first frame
        given_tokens[1, [3, 7, 8, 9, 10, 11]] = True  # leaves one free token in the second frame
        scores[given_tokens] = 1e6
    got = region_weights(
        scores, 4, method, strength=strength, share=share, scale=scale, given=given_tokens if with_given else None
    )
    assert got.dtype == torch.float32
    for b in range(3):
        expected = expected_weights(
            scores[b].double().numpy(), 4, method, strength, share, scale, given_tokens[b].numpy()
        )
        np.testing.assert_allclose(got[b].numpy(), expected, rtol=1e-6)


def test_defaults_are_the_papers():
    scores = torch.arange(10.0)[None]
    minmax = region_weights(scores, 2)
    np.testing.assert_allclose(minmax[0].numpy(), 1 + 1.5 * np.arange(10) / 9, rtol=1e-6)
    top = region_weights(scores, 2, "top_share")
    assert top[0].tolist() == [1.0] * 6 + [1.5] * 4
    zscore = region_weights(torch.tensor([[0.0, 1.0, 2.0]]), 1, "zscore_sigmoid")  # z = -1, 0, 1
    np.testing.assert_allclose(zscore[0].numpy(), [1 + 0.5 / (1 + math.exp(-0.5 * z)) for z in (-1, 0, 1)], rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_loudest_token_weighs_most_and_infinite_scores_on_given_tokens_do_no_harm(method):
    scores = random_scores(seed=4)
    given_tokens = torch.zeros_like(scores, dtype=torch.bool)
    given_tokens[:, 0] = True
    clean = region_weights(scores, 1, method, given=given_tokens)
    assert (clean[:, 0] == 0).all()
    loudest = torch.where(given_tokens, 0, scores).argmax(dim=1)
    assert torch.equal(clean.gather(1, loudest[:, None])[:, 0], clean.amax(dim=1))
    assert (clean.amax(dim=1) > torch.where(given_tokens, 9.0, clean).amin(dim=1)).all()
    scores[:, 0] = torch.tensor([torch.inf, torch.nan, -torch.inf])
    assert torch.equal(region_weights(scores, 1, method, given=given_tokens), clean)


@pytest.mark.parametrize("method", METHODS)
def test_an_even_map_gives_ones(method):
    even = torch.full((1, 12), 0.7)
    rounding = even + torch.linspace(-1e-7, 1e-7, 12)
    assert rounding.unique().numel() > 1
    uneven = torch.arange(12.0)[None]
    got = region_weights(torch.cat([even, rounding, torch.zeros(1, 12), uneven]), 3, method)
    assert (got[:3] == 1).all()
    assert got[3].unique().numel() > 1


def test_an_even_frame_of_an_uneven_clip_is_neutral_in_zscore():
    got = region_weights(torch.tensor([[1.0, 1.0, 0.0, 2.0]]), 2, "zscore_sigmoid")
    assert got[0, :2].tolist() == [1.25, 1.25]
    assert got[0, 2] < 1.25 < got[0, 3]


@pytest.mark.parametrize("method", METHODS)
def test_a_clip_that_is_wholly_given_has_no_weight(method):
    got = region_weights(random_scores(), 4, method, given=torch.tensor([True, False, True])[:, None].expand(3, 24))
    assert (got[[0, 2]] == 0).all()
    assert (got[1] >= 1).all()


def test_ties_in_top_share():
    mostly_silent = torch.tensor([[0.0] * 7 + [1.0, 2.0, 3.0]])
    assert region_weights(mostly_silent, 1, "top_share")[0].tolist() == [1.0] * 7 + [1.5] * 3
    mostly_loud = torch.tensor([[0.0] * 3 + [3.0] * 7])
    assert region_weights(mostly_loud, 1, "top_share")[0].tolist() == [1.0] * 3 + [1.5] * 7


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0, 1e4, width=32), min_size=12, max_size=12),
    mask=st.lists(st.booleans(), min_size=12, max_size=12),
    method=st.sampled_from(METHODS),
    scale=st.floats(0, 1),
    strength=st.floats(1, 4),
)
def test_region_weights_properties(values, mask, method, scale, strength):
    scores, given_tokens = torch.tensor([values]), torch.tensor([mask])
    got = region_weights(scores, 3, method, strength=strength, scale=scale, given=given_tokens)
    peak = 1 + scale * (strength if method == "minmax" else strength - 1)
    assert torch.isfinite(got).all()
    assert (got[given_tokens] == 0).all()
    assert (got[~given_tokens] >= 1).all()
    assert (got[~given_tokens] <= peak * (1 + 1e-6)).all()
    # Column sums averaged or added up over steps and blocks, the weights are the same.
    doubled = region_weights(2 * scores, 3, method, strength=strength, scale=scale, given=given_tokens)
    np.testing.assert_allclose(doubled.numpy(), got.numpy(), rtol=1e-5)
    assert (region_weights(scores, 3, method, scale=0.0, given=given_tokens)[~given_tokens] == 1).all()


def test_region_weights_refuse_bad_input():
    scores = random_scores()
    for arguments, message in [
        ({"frames": 5}, "multiple of frames = 5"),
        ({"frames": 0}, "multiple of frames = 0"),
        ({"method": "softmax"}, "method is 'softmax'"),
        ({"strength": -0.1}, "strength of minmax"),
        ({"method": "top_share", "strength": 0.9}, "strength of top_share must be at least 1"),
        ({"share": 1.0}, "share must lie"),
        ({"scale": 1.1}, "scale must lie"),
    ]:
        with pytest.raises(ValueError, match=message):
            region_weights(scores, **{"frames": 4, **arguments})
    scores[1, 2] = torch.nan
    with pytest.raises(OmniNFTError, match="not finite"):
        region_weights(scores, 4)


def test_warmup_scale():
    assert [warmup_scale(i, 400) for i in (0, 100, 400, 900)] == [0.0, 0.25, 1.0, 1.0]
    assert warmup_scale(0, 0) == 1.0
    with pytest.raises(ValueError, match="must not be negative"):
        warmup_scale(-1, 10)
