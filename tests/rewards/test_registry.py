from __future__ import annotations

import importlib.metadata
import sys
import textwrap
from collections.abc import Iterator

import numpy as np
import pytest

from omninft.config import RewardConfig
from omninft.rewards import registry
from omninft.rewards.registry import ComponentSpec, Reward, WeighedReward, build_reward, reward_names
from omninft.types import Clip, OmniNFTError, Prompt, ScoreTable


def clip(sample: int = 0) -> Clip:
    return Clip(
        np.zeros((1, 2, 2, 3), np.uint8), 12.0, np.zeros((1, 4), np.float32), 16_000, Prompt("p", "", "", ""), sample
    )


class Pair:
    """A reward with two components that scores the sample number and its square."""

    name = "pair"
    components = (
        ComponentSpec("plain", "video", "the number", weight=2.0),
        ComponentSpec("cost", "audio", "its square", weight=3.0, higher_is_better=False),
    )
    inputs = ("video",)
    licence = "none"
    model = None

    def __init__(self, offset: float = 0.0) -> None:
        self.offset = offset

    def score(self, clips: list[Clip]) -> ScoreTable:
        values = np.array([[c.sample + self.offset, float(c.sample**2)] for c in clips])
        return ScoreTable(tuple(s.component for s in self.components), values, {(0, 1): "for the test"})


class Short(Pair):
    def score(self, clips: list[Clip]) -> ScoreTable:
        table = super().score(clips)
        return ScoreTable(table.components, table.values[1:])


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    monkeypatch.setitem(registry.REWARDS, "pair", f"{__name__}:Pair")
    monkeypatch.setitem(registry.REWARDS, "short", f"{__name__}:Short")


@pytest.fixture
def module(tmp_path, monkeypatch) -> Iterator[str]:
    """A module of the user's in the working directory."""
    name = "rewards_of_a_user"
    (tmp_path / f"{name}.py").write_text(
        textwrap.dedent(
            '''
            def loudness(clips):
                """How loud it is.

                More words.
                """
                return [None if c.sample == 1 else 0.25 * c.sample for c in clips]

            def scaled(clips, factor):
                return [factor * c.sample for c in clips]

            def routed(clips):
                return [1.0] * len(clips)

            routed.route = "joint"

            def misrouted(clips):
                return []

            misrouted.route = "sideways"
            number = 3
            '''
        )
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def test_shipped_rewards_follow_the_contract():
    assert {"world", "world_held_out"} <= set(reward_names())
    for name in ("world", "world_held_out"):
        reward = build_reward(RewardConfig(name=name))
        assert isinstance(reward.reward, Reward)
        assert isinstance(reward, Reward)
        assert reward.name == name
        assert set(reward.inputs) <= set(registry.INPUTS)
        names = [spec.name for spec in reward.components]
        assert len(set(names)) == len(names)
        assert all(spec.range[0] < spec.range[1] for spec in reward.components)
        assert all(spec.description for spec in reward.components)


def test_components_keep_their_own_weights_and_lower_is_better_turns_the_sign():
    reward = build_reward(RewardConfig(name="pair", weight=0.5))
    table = reward.score([clip(2), clip(3)])
    assert [(c.name, c.route, c.weight) for c in table.components] == [("plain", "video", 1.0), ("cost", "audio", -1.5)]
    np.testing.assert_array_equal(table.values, [[2, 4], [3, 9]])
    assert table.reasons == {(0, 1): "for the test"}


def test_the_config_selects_and_weighs_components():
    reward = build_reward(RewardConfig(name="pair", weight=0.5, components={"cost": 4.0}))
    table = reward.score([clip(3)])
    assert [(c.name, c.weight) for c in table.components] == [("cost", -2.0)]
    np.testing.assert_array_equal(table.values, [[9]])
    assert table.reasons == {(0, 0): "for the test"}


def test_options_reach_the_factory_and_unknown_ones_are_refused():
    assert build_reward(RewardConfig(name="pair", options={"offset": 1.5})).score([clip(2)]).values[0, 0] == 3.5
    with pytest.raises(OmniNFTError, match=r"pair.*options.*colour"):
        build_reward(RewardConfig(name="pair", options={"colour": 1}))


def test_a_table_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"pair.*\[1, 2\].*\[2, 2\]"):
        build_reward(RewardConfig(name="short")).score([clip(1), clip(2)])


def test_unknown_names_get_the_nearest_and_the_list():
    with pytest.raises(OmniNFTError, match=r"did you mean 'world'.*world_held_out"):
        build_reward(RewardConfig(name="wrld"))
    with pytest.raises(OmniNFTError, match=r"no component 'plane', did you mean 'plain'.*plain, cost"):
        build_reward(RewardConfig(name="pair", components={"plane": 1.0}))


def test_a_registered_reward_refuses_another_route():
    with pytest.raises(OmniNFTError, match="'cost' has the route 'audio', the config says 'video'"):
        build_reward(RewardConfig(name="pair", route="video"))
    assert (
        build_reward(RewardConfig(name="pair", route="audio", components={"cost": 1.0})).components[0].route == "audio"
    )


def test_a_callable_from_the_working_directory(module):
    reward = build_reward(RewardConfig(name=f"{module}:loudness", route="audio", weight=2.0))
    assert isinstance(reward, WeighedReward)
    (spec,) = reward.components
    assert (spec.name, spec.route, spec.weight, spec.description) == ("loudness", "audio", 2.0, "How loud it is.")
    table = reward.score([clip(0), clip(1), clip(2)])
    np.testing.assert_array_equal(table.values, [[0.0], [np.nan], [0.5]])
    assert table.reasons == {(1, 0): "returned None"}
    assert table.components[0].weight == 2.0


def test_a_callable_takes_options_and_its_own_route(module):
    scaled = build_reward(RewardConfig(name=f"{module}:scaled", route="video", options={"factor": 3}))
    assert scaled.score([clip(2)]).values.tolist() == [[6.0]]
    assert build_reward(RewardConfig(name=f"{module}:routed")).components[0].route == "joint"


def test_a_callable_without_a_usable_route_is_refused(module):
    with pytest.raises(OmniNFTError, match=r"needs a route.*video, audio, joint"):
        build_reward(RewardConfig(name=f"{module}:loudness"))
    with pytest.raises(OmniNFTError, match="'sideways'"):
        build_reward(RewardConfig(name=f"{module}:misrouted"))
    with pytest.raises(OmniNFTError, match="`route` is 'joint', the config says 'video'"):
        build_reward(RewardConfig(name=f"{module}:routed", route="video"))


def test_import_paths_that_lead_nowhere(module):
    with pytest.raises(OmniNFTError, match=r"cannot import 'no_such_module'.*ModuleNotFoundError"):
        build_reward(RewardConfig(name="no_such_module:f", route="video"))
    with pytest.raises(OmniNFTError, match="has no 'loudnes', did you mean 'loudness'"):
        build_reward(RewardConfig(name=f"{module}:loudnes", route="video"))
    with pytest.raises(OmniNFTError, match="is a int, expected a callable"):
        build_reward(RewardConfig(name=f"{module}:number", route="video"))


def test_a_module_that_fails_to_import_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('no weights here')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    with pytest.raises(OmniNFTError, match="RuntimeError: no weights here"):
        build_reward(RewardConfig(name="broken_rewards:f", route="video"))


def test_a_class_by_import_path_is_constructed():
    reward = build_reward(RewardConfig(name=f"{__name__}:Pair", options={"offset": 2.0}, components={"plain": 1.0}))
    assert reward.score([clip(1)]).values.tolist() == [[3.0]]


def test_a_callable_with_too_few_scores_raises(module):
    reward = registry.CallableReward("few", lambda clips: [1.0], (ComponentSpec("few", "video", ""),))
    with pytest.raises(ValueError, match="1 scores for 2 clips"):
        reward.score([clip(), clip()])


def test_installed_packages_add_rewards(monkeypatch):
    point = importlib.metadata.EntryPoint("from_afar", f"{__name__}:Pair", registry.ENTRY_POINTS)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == "omninft.rewards" else [])
    assert "from_afar" in reward_names()
    assert build_reward(RewardConfig(name="from_afar")).score([clip(2)]).values.tolist() == [[2.0, 4.0]]
