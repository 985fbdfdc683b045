"""The wiring of credit: options to advantages, region weights, gradient scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from omninft.credit.advantages import group_advantages, route_advantages, shuffle_within_groups
from omninft.credit.combine import CombinedCredit, CombineOptions
from omninft.credit.protocol import CreditContext
from omninft.credit.regions import region_weights
from omninft.distributed import Processes
from omninft.types import (
    Component,
    Conditioning,
    Latents,
    Prompt,
    PromptGroup,
    Rollout,
    ScoreTable,
    TextContext,
)

GROUPS = tuple(PromptGroup(Prompt(name, "v", "a", "av"), (0, 1, 2)) for name in ("rain", "bell"))
INDEX = torch.tensor([0, 0, 0, 1, 1, 1])
TABLE = ScoreTable(
    (Component("look", "video", 1.5), Component("sound", "audio", 0.5), Component("sync", "joint", 2.0)),
    np.array([[1, 5, 0.1], [2, 4, 0.9], [4, np.nan, 0.2], [8, 1, 0.3], [9, 2, 0.3], [7, 9, 0.8]], dtype=float),
    {(2, 1): "too quiet"},
)
FRAMES = 2


def credit(iterations: int = 10, blocks: int = 48, seed: int = 5, **options: Any) -> CombinedCredit:
    context = CreditContext(blocks, FRAMES, iterations, seed, Processes())
    made = CombineOptions(**options).build(context)
    assert isinstance(made, CombinedCredit)
    return made


def rollout(given: bool = False) -> Rollout:
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(6, 8, 2, generator=generator)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[:, :4] = True
    context = TextContext(torch.zeros(6, 1, 1), torch.zeros(6, 1, 1), torch.ones(6, 1))
    columns = torch.rand(6, 8, generator=generator)
    conditioning = Conditioning(video, mask) if given else None
    return Rollout(GROUPS, Latents(video, torch.zeros(6, 3, 2)), context, conditioning, {"v2a_columns": columns})


@pytest.mark.parametrize("kind", ["omninft", "gdpo", "global"])
@pytest.mark.parametrize("std", ["global", "group"])
@pytest.mark.parametrize("norm", [False, True])
def test_each_kind_gives_the_advantages_of_its_method(kind: str, std: str, norm: bool) -> None:
    made = credit(kind=kind, std=std, final_batch_norm=norm)
    got = made.combine(made.assign(TABLE, GROUPS, 3), None, 3)
    expected = route_advantages(TABLE, INDEX, kind, std, norm)  # type: ignore[arg-type]
    for name in ("video", "audio", "video_valid", "audio_valid"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert torch.equal(got.video, got.audio) == (kind != "omninft")


def test_a_routed_sum_written_out() -> None:
    made = credit()
    got = made.combine(made.assign(TABLE, GROUPS, 0), None, 0)
    look, sound, sync = (group_advantages(torch.tensor(TABLE.values[:, k]), INDEX) for k in range(3))
    torch.testing.assert_close(got.video, (1.5 * look + 2 * sync).float())
    torch.testing.assert_close(got.audio, (0.5 * sound + 2 * sync).float())
    assert got.audio_valid.tolist() == [True] * 6  # sync judges the clip without a sound score


def test_per_reward_advantages_keep_routes_weights_and_validity() -> None:
    advantages = credit().assign(TABLE, GROUPS, 0)
    assert advantages.components == TABLE.components
    assert advantages.valid.tolist() == np.isfinite(TABLE.values).tolist()
    assert advantages.values[2, 1] == 0


def test_the_placebo_deals_advantages_out_anew_in_every_iteration() -> None:
    real, placebo = credit(), credit(shuffle=True)
    plain = real.assign(TABLE, GROUPS, 0)
    dealt = [placebo.assign(TABLE, GROUPS, i).values for i in range(6)]
    assert any(not torch.equal(d, plain.values) for d in dealt)
    assert len({tuple(d.flatten().tolist()) for d in dealt}) > 1
    for d in dealt:
        for rows in (slice(0, 3), slice(3, 6)):
            assert sorted(d[rows, 0].tolist()) == sorted(plain.values[rows, 0].tolist())
    expected = shuffle_within_groups(plain, INDEX, 5 * 1_000_003 + 4)
    assert torch.equal(dealt[4], expected.values)
    # What is logged is of the advantages as they are.
    assert placebo.metrics() == real.metrics()


def test_figures_for_the_log() -> None:
    made = credit()
    branches = made.combine(made.assign(TABLE, GROUPS, 0), None, 0)
    opposite = (branches.video.sign() * branches.audio.sign() < 0).double().mean().item()
    assert made.metrics() == {
        "advantage/conflict_share": opposite,
        "advantage/zero_variance_groups": 0.0,
        "advantage/mean_abs_video": pytest.approx(float(branches.video.abs().mean())),
        "advantage/mean_abs_audio": pytest.approx(float(branches.audio.abs().mean())),
    }


@pytest.mark.parametrize(
    ("warmup", "iteration", "scale"),
    [(0.5, 0, 0.0), (0.5, 2, 0.4), (0.5, 9, 1.0), (4.0, 1, 0.25), (4.0, 4, 1.0), (0.0, 0, 1.0)],
)
@pytest.mark.parametrize("given", [False, True])
def test_region_weights_rise_and_leave_given_tokens_out(
    warmup: float, iteration: int, scale: float, given: bool
) -> None:
    made = credit(regions={"warmup": warmup, "strength": 2.0, "method": "zscore_sigmoid"})
    clips = rollout(given)
    weights = made.weigh(clips, iteration)
    mask = clips.conditioning.mask if clips.conditioning is not None else None
    expected = region_weights(
        clips.recorded["v2a_columns"], FRAMES, "zscore_sigmoid", strength=2.0, scale=scale, given=mask
    )
    assert weights.video is not None
    torch.testing.assert_close(weights.video, expected)
    assert weights.audio is None  # region weights are of the video loss alone
    assert (weights.video.std() > 0) == (scale > 0 or given)


def test_what_is_off_asks_for_nothing() -> None:
    off = credit(regions={"enabled": False}, surgery={"enabled": False})
    assert off.needs.recordings == ()
    assert off.surgery is None
    assert off.gradient_scales(rollout()) is None
    assert off.weigh(rollout(), 5).video is None


def test_what_is_on_asks_for_its_own_settings() -> None:
    made = credit(
        regions={"window": [0.2, 0.6], "first_block": 3, "rope": False, "value_weighted": True},
        surgery={"target": "projection", "scope": "video_loss_only"},
    )
    (recording,) = made.needs.recordings
    assert recording.kind == "v2a_columns"
    assert (recording.window, recording.first_block, recording.rope, recording.value_weighted) == (
        (0.2, 0.6), 3, False, True,
    )  # fmt: skip
    assert not made.probes(0)
    assert made.surgery is not None
    assert (made.surgery.target, made.surgery.video_loss_only) == ("projection", True)
    assert credit().surgery.video_loss_only is False  # type: ignore[union-attr]


def test_schedules_go_to_their_own_direction() -> None:
    scales = credit(
        blocks=6,
        surgery={
            "schedule": [{"start": 0, "stop": 2, "scale": 0.25}],
            "audio_schedule": [{"start": 0.5, "stop": 1.0, "scale": 0.75}],
        },
    ).gradient_scales(rollout())
    assert scales is not None
    assert scales.a2v == (0.25, 0.25, 1, 1, 1, 1)
    assert scales.v2a == (1, 1, 1, 0.75, 0.75, 0.75)
    default = credit(blocks=48).gradient_scales(rollout())
    assert default is not None
    assert default.a2v == (0.0,) + (0.1,) * 10 + (1.0,) * 29 + (0.3,) * 8
    assert set(default.v2a) == {1.0}
