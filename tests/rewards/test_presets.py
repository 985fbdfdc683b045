from __future__ import annotations

import pytest

from omninft.config import RewardConfig, load_config
from omninft.rewards.presets import PRESETS, chosen_rewards
from omninft.rewards.registry import build_reward
from omninft.types import OmniNFTError


def test_the_commercial_preset_holds_nothing_that_is_not_cleared() -> None:
    rewards = [build_reward(RewardConfig(name=name)) for name in PRESETS["commercial"]]
    assert all(r.model is None or r.model.commercial for r in rewards)
    assert {c.route for r in rewards for c in r.components} == {"video", "audio", "joint"}


def test_the_commercial_recipe_trains_on_the_commercial_preset() -> None:
    assert {r.name for r in load_config("commercial").rewards} == set(PRESETS["commercial"])


def test_the_papers_preset_is_the_papers_recipe() -> None:
    rewards = load_config("paper").rewards
    assert [r.name for r in rewards] == list(PRESETS["paper"])
    weights = [c.component.weight for r in rewards for c in build_reward(r).components]
    assert weights == [1.0, 1.5, 0.5, 1.0, 1.0]  # of the released configurations


def test_names_presets_and_options_together() -> None:
    chosen = chosen_rewards(["clap", "flicker"], "offline", ["clap.device=cuda", "clap.budget=8", "dnsmos.x=[1, a]"])
    assert [c.name for c in chosen] == [*PRESETS["offline"], "clap"]
    assert chosen[-1].options == {"device": "cuda", "budget": 8}
    assert chosen[0].options == {"x": [1, "a"]}
    assert chosen_rewards(["my.module:judge"], None, ["my.module:judge.scale=2"])[0].options == {"scale": 2}


@pytest.mark.parametrize(
    ("names", "preset", "options", "message"),
    [
        ((), "papr", (), "unknown preset 'papr'; known: paper, commercial, offline"),
        (("clapp",), None, (), "unknown reward 'clapp', did you mean 'clap'?"),
        (("clap",), None, ("clip.device=cuda",), "'clip' is not among the rewards clap, did you mean 'clap'?"),
        (("clap",), None, ("device=cuda",), "expected reward.key=value"),
        (("clap",), None, ("clap.device=[",), r"'clap\.device=\[': the value is not valid YAML"),
    ],
)
def test_what_cannot_be_meant_is_said(names, preset, options, message) -> None:
    with pytest.raises(OmniNFTError, match=message):
        chosen_rewards(names, preset, options)
