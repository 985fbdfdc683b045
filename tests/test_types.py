"""What stages hand to one another stays together when it is cut, stacked and joined."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omninft.config import RewardConfig
from omninft.rewards.registry import ComponentSpec, WeighedReward, build_reward
from omninft.rewards.runner import RewardRunner
from omninft.types import (
    Clip,
    Component,
    Conditioning,
    Latents,
    Moments,
    Needs,
    Prompt,
    PromptGroup,
    Recording,
    Rollout,
    ScoreTable,
    TextContext,
    Trajectory,
    regrouped,
)

NAN = float("nan")


def moments(value: float) -> Moments:
    return Moments(np.array([value, value + 1]), np.array([0.25, 0.75]))


def table(first: float, *names: str) -> ScoreTable:
    """Two clips; the second lacks the last component, the first has its first component over time."""
    values = first + np.arange(2 * len(names), dtype=float).reshape(2, len(names))
    values[1, -1] = NAN
    components = tuple(Component(name, "video") for name in names)
    return ScoreTable(components, values, {(1, len(names) - 1): f"why {first}"}, {(0, 0): moments(first)})


def test_stacked_tables_keep_reasons_and_moments_with_their_clips() -> None:
    made = ScoreTable.cat([table(0, "a", "b"), table(10, "a", "b")])
    assert made.values.shape == (4, 2)
    assert made.reasons == {(1, 1): "why 0", (3, 1): "why 10"}
    assert {k: m.values[0] for k, m in made.moments.items()} == {(0, 0): 0, (2, 0): 10}
    assert all(type(part) is int for key in made.reasons for part in key)
    with pytest.raises(ValueError, match="different components"):
        ScoreTable.cat([table(0, "a"), table(0, "b")])


def test_joined_tables_keep_them_with_their_components() -> None:
    made = ScoreTable.join([table(0, "a", "b"), table(10, "c"), table(20, "d", "e")])
    assert made.names == ("a", "b", "c", "d", "e")
    assert made.reasons == {(1, 1): "why 0", (1, 2): "why 10", (1, 4): "why 20"}
    assert {k: m.values[0] for k, m in made.moments.items()} == {(0, 0): 0, (0, 2): 10, (0, 3): 20}


def test_selected_columns_take_theirs_along() -> None:
    made = ScoreTable.join([table(0, "a", "b"), table(10, "c")]).select([2, 0])
    assert made.names == ("c", "a")
    assert made.values[0].tolist() == [10, 0]
    assert made.reasons == {(1, 0): "why 10"}
    assert {k: m.values[0] for k, m in made.moments.items()} == {(0, 0): 10, (0, 1): 0}


class Localised:
    """A reward with values over time; of its two components a recipe takes the second."""

    name = "localised"
    components = (ComponentSpec("x", "video", "unused"), ComponentSpec("y", "audio", "over time"))
    inputs = ("video",)
    licence = "none"
    model = None

    def score(self, clips: list[Clip]) -> ScoreTable:
        made = {(b, k): moments(10 * b + k) for b in range(len(clips)) for k in range(2)}
        return ScoreTable(tuple(c.component for c in self.components), np.ones((len(clips), 2)), moments=made)


def test_values_over_time_come_through_recipe_and_runner() -> None:
    weighed = build_reward(RewardConfig(name="tests.test_types:Localised", components={"y": 2.0}))
    assert isinstance(weighed, WeighedReward)
    prompt = Prompt("p", "v", "a", "av")
    clips = [Clip(np.zeros((2, 4, 4, 3), np.uint8), 8.0, np.zeros((1, 8), np.float32), 16.0, prompt, n) for n in (0, 1)]
    made = RewardRunner([build_reward(RewardConfig(name="tests.test_types:one", route="video")), weighed]).score(clips)
    assert made.names == ("one", "y")
    assert {k: m.values[0] for k, m in made.moments.items()} == {(0, 1): 1, (1, 1): 11}


def one(clips: list[Clip]) -> list[float]:
    return [1.0] * len(clips)


def rollout(first: int, given: bool) -> Rollout:
    """Three clips of two prompts; every tensor says which clip it is of."""
    groups = (
        PromptGroup(Prompt("a", "v", "a", "a"), (first, first + 1)),
        PromptGroup(Prompt("b", "v", "a", "b"), (0,)),
    )
    number = torch.arange(first, first + 3, dtype=torch.float32)
    video, audio = number[:, None, None].expand(3, 4, 2), number[:, None, None].expand(3, 5, 1)
    steps = number[:, None, None, None]
    return Rollout(
        groups,
        Latents(video, audio),
        TextContext(video, audio, torch.ones(3, 4)),
        Conditioning(video, torch.ones(3, 4, dtype=torch.bool)) if given else None,
        {"v2a_columns": number[:, None].expand(3, 4)},
        Trajectory(
            steps.expand(3, 3, 4, 2),
            steps.expand(3, 3, 5, 1),
            number[:, None, None].expand(3, 2, 4),
            number[:, None, None].expand(3, 2, 5),
            sigmas=number[:, None].expand(3, 3),
        ),
    )


def test_a_rollout_is_stacked_and_cut_clip_by_clip() -> None:
    whole = Rollout.cat([rollout(0, given=False), rollout(3, given=True)])
    assert whole.clip_keys == [("a", 0), ("a", 1), ("b", 0), ("a", 3), ("a", 4), ("b", 0)]
    assert whole.conditioning is not None
    assert whole.conditioning.mask.any(dim=1).tolist() == [False] * 3 + [True] * 3
    part = whole[1:4]
    assert part.clip_keys == whole.clip_keys[1:4]
    assert [g.samples for g in part.groups] == [(1,), (0,), (3,)]
    assert part.trajectory is not None
    assert part.conditioning is not None
    for tensor in (
        part.latents.video, part.latents.audio, part.context.video, part.context.audio, part.recorded["v2a_columns"],
        part.trajectory.video, part.trajectory.audio, part.trajectory.video_log_prob, part.trajectory.audio_log_prob,
        part.trajectory.sigmas,
    ):  # fmt: skip
        assert tensor.flatten(1)[:, 0].tolist() == [1, 2, 3]
    assert part.conditioning.mask.any(dim=1).tolist() == [False, False, True]


def test_neighbours_of_one_prompt_are_a_group() -> None:
    a, b = Prompt("a", "v", "a", "a"), Prompt("b", "v", "a", "b")
    made = regrouped([(a, 0), (a, 2), (b, 1), (a, 3)])
    assert [(g.prompt.id, g.samples) for g in made] == [("a", (0, 2)), ("b", (1,)), ("a", (3,))]


def test_needs_add_up_whichever_comes_first() -> None:
    recording = Recording("v2a_columns")
    credit = Needs(recordings=(recording,))
    objective = Needs(solver="sde", noise_level=0.7, trajectory=True)
    for both in (credit | objective, objective | credit):
        assert both == Needs((recording,), "sde", 0.7, True)
    assert (credit | credit).recordings == (recording,)
