from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omninft.credit.advantages import (
    advantage_to_weight,
    conflict_share,
    group_advantages,
    route_advantages,
    shuffle_within_groups,
    zero_variance_groups,
)
from omninft.types import BranchAdvantages, Component, OmniNFTError, RewardAdvantages, ScoreTable

NAN = float("nan")


def expected_advantages(values, groups, std, eps=1e-4):
    """The definition, one clip at a time in Python floats."""
    finite = [v for v in values if math.isfinite(v)]
    out = []
    for value, group in zip(values, groups, strict=True):
        mates = [v for v, g in zip(values, groups, strict=True) if g == group and math.isfinite(v)]
        if not math.isfinite(value) or len(mates) < 2:
            out.append(0.0)
            continue
        pool = finite if std == "global" else mates
        centre = sum(pool) / len(pool)
        spread = math.sqrt(sum((v - centre) ** 2 for v in pool) / len(pool))
        out.append((value - sum(mates) / len(mates)) / (spread + eps))
    return out


def table_of(columns: dict[str, tuple[str, float, list[float]]]) -> ScoreTable:
    components = tuple(Component(name, route, weight) for name, (route, weight, _) in columns.items())
    return ScoreTable(components, np.array([v for _, _, v in columns.values()], dtype=np.float64).T)


def branch(video, audio, video_valid=None, audio_valid=None) -> BranchAdvantages:
    video, audio = torch.tensor(video), torch.tensor(audio)
    ones = torch.ones(len(video), dtype=torch.bool)
    return BranchAdvantages(
        video,
        audio,
        ones if video_valid is None else torch.tensor(video_valid),
        ones if audio_valid is None else torch.tensor(audio_valid),
    )


@pytest.mark.parametrize("std", ["global", "group"])
def test_group_advantages_match_the_definition(std):
    values = [3.0, 1.0, NAN, 2.5, -4.0, 7.0, 7.5, 100.0, NAN, 2.0]
    groups = [5, 5, 5, 5, -2, -2, -2, 9, 9, 5]  # group 9 has one valid score
    got = group_advantages(torch.tensor(values, dtype=torch.float64), torch.tensor(groups), std)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), expected_advantages(values, groups, std), rtol=1e-12, atol=0)
    assert got[7] == 0
    assert got[2] == 0
    assert got[8] == 0


def test_the_better_clip_gets_the_positive_advantage_and_ddof_is_zero():
    values = torch.tensor([0.0, 2.0, 10.0, 14.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1])
    np.testing.assert_allclose(
        group_advantages(values, groups, "group").numpy(), [-1 / 1.0001, 1 / 1.0001, -2 / 2.0001, 2 / 2.0001]
    )
    spread = math.sqrt(((0 - 6.5) ** 2 + (2 - 6.5) ** 2 + (10 - 6.5) ** 2 + (14 - 6.5) ** 2) / 4)
    np.testing.assert_allclose(
        group_advantages(values, groups, "global").numpy(), np.array([-1, 1, -2, 2]) / (spread + 1e-4)
    )


def test_the_global_spread_counts_valid_scores_of_groups_too_small_to_learn_from():
    values = torch.tensor([0.0, 2.0, 50.0], dtype=torch.float64)
    got = group_advantages(values, torch.tensor([0, 0, 1]), "global")
    spread = float(np.std([0.0, 2.0, 50.0]))
    np.testing.assert_allclose(got.numpy(), [-1 / (spread + 1e-4), 1 / (spread + 1e-4), 0.0])


def test_equal_scores_whose_mean_rounds_give_exact_zeros():
    values = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0], dtype=torch.float64)
    assert values[:3].mean() != values[0]  # the trap: subtraction alone would leave a residue
    got = group_advantages(values, torch.tensor([0, 0, 0, 1, 1]), "group")
    assert got[:3].tolist() == [0.0, 0.0, 0.0]
    assert got[4] > 0


def test_missing_everywhere_and_infinite_scores():
    assert group_advantages(torch.full((4,), NAN, dtype=torch.float64), torch.zeros(4).long()).tolist() == [0.0] * 4
    values = torch.tensor([1.0, 3.0, float("inf")], dtype=torch.float64)
    got = group_advantages(values, torch.zeros(3).long())
    np.testing.assert_allclose(got.numpy(), [-1 / 1.0001, 1 / 1.0001, 0.0])


scores = st.lists(st.one_of(st.just(NAN), st.floats(-50, 50).map(lambda x: round(x, 2))), min_size=1, max_size=24)


@settings(max_examples=60, deadline=None)
@given(values=scores, num_groups=st.integers(1, 5), std=st.sampled_from(["global", "group"]), seed=st.integers(0, 99))
def test_group_advantages_properties(values, num_groups, std, seed):
    groups = torch.randint(num_groups, (len(values),), generator=torch.Generator().manual_seed(seed))
    tensor = torch.tensor(values, dtype=torch.float64)
    got = group_advantages(tensor, groups, std)
    np.testing.assert_allclose(got.numpy(), expected_advantages(values, groups.tolist(), std), rtol=1e-7, atol=1e-9)
    for group in groups.unique():
        assert abs(got[groups == group].sum().item()) < 1e-7
    # A constant added to every score, and the order of the clips, change nothing.
    np.testing.assert_allclose(group_advantages(tensor + 7.0, groups, std).numpy(), got.numpy(), atol=1e-8)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed + 1))
    np.testing.assert_allclose(group_advantages(tensor[order], groups[order], std), got[order], atol=1e-9)


def test_group_advantages_refuse_bad_input():
    with pytest.raises(ValueError, match="must both be"):
        group_advantages(torch.zeros(3), torch.zeros(2).long())
    with pytest.raises(ValueError, match="must both be"):
        group_advantages(torch.zeros(3, 1), torch.zeros(3, 1).long())
    with pytest.raises(ValueError, match="std is 'batch'"):
        group_advantages(torch.zeros(3), torch.zeros(3).long(), "batch")


GROUPS = [0, 0, 0, 1, 1, 1]
COLUMNS = {
    "look": ("video", 1.5, [1.0, 2.0, 4.0, 0.0, 5.0, 3.0]),
    "sound": ("audio", 0.5, [9.0, 2.0, 1.0, NAN, 4.0, 4.5]),
    "sync": ("joint", -1.0, [0.1, 0.9, 0.4, 0.3, 0.2, NAN]),
}


@pytest.mark.parametrize("std", ["global", "group"])
def test_omninft_routes_each_reward_to_the_branches_it_judges(std):
    got = route_advantages(table_of(COLUMNS), torch.tensor(GROUPS), "omninft", std)
    part = {n: w * np.array(expected_advantages(v, GROUPS, std)) for n, (_, w, v) in COLUMNS.items()}
    np.testing.assert_allclose(got.video.numpy(), part["look"] + part["sync"], rtol=1e-6)
    np.testing.assert_allclose(got.audio.numpy(), part["sound"] + part["sync"], rtol=1e-6)
    assert got.video.dtype == torch.float32
    assert got.video_valid.all()
    assert got.audio_valid.all()


@pytest.mark.parametrize("std", ["global", "group"])
def test_gdpo_gives_both_branches_the_sum_of_advantages(std):
    got = route_advantages(table_of(COLUMNS), torch.tensor(GROUPS), "gdpo", std)
    total = sum(w * np.array(expected_advantages(v, GROUPS, std)) for _, w, v in COLUMNS.values())
    np.testing.assert_allclose(got.video.numpy(), total, rtol=1e-6)
    assert torch.equal(got.video, got.audio)


def test_global_normalises_the_sum_of_raw_rewards_and_drops_clips_without_every_score():
    got = route_advantages(table_of(COLUMNS), torch.tensor(GROUPS), "global", "global")
    raw = [sum(w * v[b] for _, w, v in COLUMNS.values()) for b in range(6)]
    expected = expected_advantages(raw, GROUPS, "global")  # NaN + x = NaN: clips 3 and 5 are missing
    np.testing.assert_allclose(got.video.numpy(), expected, rtol=1e-6)
    assert torch.equal(got.video, got.audio)
    assert got.video_valid.tolist() == got.audio_valid.tolist() == [True, True, True, False, True, False]
    assert got.video[4] == 0  # alone in its group


def test_a_clip_with_no_valid_score_for_a_branch_is_masked_there_only():
    columns = {"look": ("video", 1.0, [1.0, 2.0, NAN]), "sound": ("audio", 1.0, [NAN, 2.0, 3.0])}
    groups = torch.zeros(3).long()
    omninft = route_advantages(table_of(columns), groups, "omninft")
    assert omninft.video_valid.tolist() == [True, True, False]
    assert omninft.audio_valid.tolist() == [False, True, True]
    assert omninft.video[2] == 0
    assert omninft.audio[0] == 0
    gdpo = route_advantages(table_of(columns), groups, "gdpo")
    assert gdpo.video_valid.all()
    assert gdpo.audio_valid.all()


@pytest.mark.parametrize("method", ["omninft", "gdpo", "global"])
def test_a_branch_that_no_reward_judges_is_masked(method):
    columns = {"look": ("video", 1.0, [1.0, 2.0])}
    got = route_advantages(table_of(columns), torch.zeros(2).long(), method)
    assert got.video_valid.all()
    assert got.audio_valid.tolist() == ([False, False] if method == "omninft" else [True, True])
    watched = {"look": ("video", 0.0, [1.0, 2.0])}
    none = route_advantages(table_of(watched), torch.zeros(2).long(), method)
    assert not none.video_valid.any()
    assert not none.audio_valid.any()


@pytest.mark.parametrize("method", ["omninft", "gdpo", "global"])
def test_a_reward_of_weight_zero_neither_judges_nor_costs_clips(method):
    columns = {"look": ("joint", 1.0, [1.0, 2.0, 4.0]), "watched": ("joint", 0.0, [NAN, 3.0, 1.0])}
    groups = torch.zeros(3).long()
    got = route_advantages(table_of(columns), groups, method)
    alone = route_advantages(table_of({"look": columns["look"]}), groups, method)
    assert torch.equal(got.video, alone.video)
    assert torch.equal(got.video_valid, alone.video_valid)


def test_a_routed_advantage_that_sums_to_exactly_zero_is_kept():
    columns = {"look": ("video", 1.0, [0.0, 1.0, 1.0, 0.0]), "sound": ("audio", 2.0, [5.0, 3.0, 1.0, 2.0])}
    got = route_advantages(table_of(columns), torch.tensor([0, 0, 1, 1]), "omninft")
    assert got.video.sum().item() == 0.0  # the condition under which a fallback would fire
    a = 0.5 / (0.5 + 1e-4)
    np.testing.assert_allclose(got.video.numpy(), [-a, a, a, -a], rtol=1e-6)
    np.testing.assert_allclose(
        got.audio.numpy(), 2 * np.array(expected_advantages([5, 3, 1, 2], [0, 0, 1, 1], "global"))
    )


@pytest.mark.parametrize("method", ["omninft", "gdpo", "global"])
def test_final_batch_norm_over_valid_clips(method):
    columns = dict(COLUMNS, look=("video", 1.5, [1.0, 2.0, 4.0, 0.0, NAN, 3.0]))
    columns["sync"] = ("joint", -1.0, [0.1, 0.9, 0.4, 0.3, NAN, NAN])
    plain = route_advantages(table_of(columns), torch.tensor(GROUPS), method)
    normed = route_advantages(table_of(columns), torch.tensor(GROUPS), method, final_batch_norm=True)
    for name in ("video", "audio"):
        valid = getattr(plain, f"{name}_valid").numpy()
        raw = getattr(plain, name).double().numpy()
        expected = np.where(valid, (raw - raw[valid].mean()) / (raw[valid].std() + 1e-4), 0.0)
        np.testing.assert_allclose(getattr(normed, name).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert not plain.video_valid.all() or method == "gdpo"


def test_a_reward_without_a_known_route_is_an_error():
    with pytest.raises(OmniNFTError, match="'look' has route 'picture'"):
        route_advantages(table_of({"look": ("picture", 1.0, [1.0])}), torch.zeros(1).long(), "omninft")
    with pytest.raises(ValueError, match="method is 'best'"):
        route_advantages(table_of({"look": ("video", 1.0, [1.0])}), torch.zeros(1).long(), "best")
    with pytest.raises(ValueError, match="1 clips in the table, 2"):
        route_advantages(table_of({"look": ("video", 1.0, [1.0])}), torch.zeros(2).long(), "omninft")


def test_advantage_to_weight():
    got = advantage_to_weight(torch.tensor([-9.0, -5.0, -1.0, 0.0, 1.0, 5.0, 9.0]))
    np.testing.assert_allclose(got.numpy(), [0.0, 0.0, 0.4, 0.5, 0.6, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(advantage_to_weight(torch.tensor([1.0]), clip=2.0).numpy(), [0.75])
    with pytest.raises(ValueError, match="clip must be positive"):
        advantage_to_weight(torch.zeros(1), clip=0.0)


@settings(max_examples=50, deadline=None)
@given(a=st.floats(-1e6, 1e6), b=st.floats(-1e6, 1e6), clip=st.floats(0.01, 100))
def test_advantage_to_weight_stays_in_range_and_never_decreases(a, b, clip):
    low, high = advantage_to_weight(torch.tensor([min(a, b), max(a, b)], dtype=torch.float64), clip).tolist()
    assert 0 <= low <= high <= 1
    assert math.isclose(low, min(max((min(a, b) / clip + 1) / 2, 0), 1), abs_tol=1e-9)


def some_advantages(ids):
    """Two rewards whose values tell the clips apart."""
    valid = torch.stack([ids % 3 == 0, ids % 5 == 0], dim=1)
    values = torch.stack([ids.double(), ids.double() + 100], dim=1)
    return RewardAdvantages(values, valid, (Component("a", "video"), Component("b", "audio")))


def test_shuffle_moves_whole_clips_inside_their_group():
    groups = torch.arange(6).repeat_interleave(8)[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    ids = torch.arange(48)
    real = some_advantages(ids)
    placebo = shuffle_within_groups(real, groups, seed=3)
    source = placebo.values[:, 0].long()
    assert sorted(source.tolist()) == ids.tolist()
    assert torch.equal(groups[source], groups)
    assert torch.equal(placebo.values, real.values[source])
    assert torch.equal(placebo.valid, real.valid[source])
    for group in range(6):
        assert not torch.equal(source[groups == group], ids[groups == group])


def test_shuffle_is_keyed_by_seed_and_group():
    groups = torch.arange(4).repeat_interleave(8)
    real = some_advantages(torch.arange(32))
    first = shuffle_within_groups(real, groups, seed=1)
    assert torch.equal(first.values, shuffle_within_groups(real, groups, seed=1).values)
    assert not torch.equal(first.values, shuffle_within_groups(real, groups, seed=2).values)
    within = [(first.values[groups == g, 0] - 8 * g).tolist() for g in range(4)]
    assert len({tuple(w) for w in within}) == 4  # groups do not share a permutation
    later = shuffle_within_groups(real[16:], groups[16:], seed=1)  # group 2 does not care who else is there
    assert torch.equal(later.values, first.values[16:])


def test_conflict_share():
    got = conflict_share(
        branch(
            [1.0, -1.0, 2.0, 0.0, 3.0, 5.0],
            [-0.5, 2.0, 3.0, -1.0, -1.0, -5.0],
            video_valid=[True, True, True, True, True, False],
        )
    )
    assert got == pytest.approx(3 / 5)
    assert math.isnan(conflict_share(branch([1.0], [-1.0], video_valid=[False])))
    tiny = branch([1e-30, 1e-30], [-1e-30, 1e-30])  # a product of these underflows
    assert conflict_share(tiny) == pytest.approx(0.5)


def test_zero_variance_groups():
    table = table_of(
        {
            "look": ("video", 1.0, [1.0, 1.0, 2.0, 2.0, 5.0, NAN, 1.0, 1.0]),
            "sound": ("audio", 1.0, [0.3, 0.3, 0.1, 0.2, NAN, 4.0, 2.0, 2.0]),
            "watched": ("joint", 0.0, [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 1.0]),
        }
    )
    # Group 0 is flat but for the watched reward, 1 varies in sound, 2 never has two scores, 3 is flat.
    assert zero_variance_groups(table, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])) == 3
    assert zero_variance_groups(table, torch.zeros(8).long()) == 0
