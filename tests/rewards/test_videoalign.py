from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omninft.config import RewardConfig
from omninft.rewards.registry import build_reward
from omninft.rewards.videoalign import VideoAlignReward, overall
from omninft.types import Clip, OmniNFTError, Prompt
from tests.scorers.small_qwen2_vl import make_clip
from tests.scorers.test_videoalign import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("videoalign"))


@pytest.fixture(autouse=True)
def _own_weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "cache"))


def make_reward(folder: Path, **options: Any) -> VideoAlignReward:
    return VideoAlignReward(folder, folder / "base", **({"dtype": "float32", "workers": 2} | options))


def clips() -> list[Clip]:
    shapes = [(6, 40, 56, "a red ball"), (9, 28, 28, "falls"), (4, 56, 30, "a red ball falls")]
    return [make_clip(*shape, seed=i) for i, shape in enumerate(shapes)]


def test_formula_is_the_mean_of_vq_and_ta() -> None:
    scores = np.array([[2.0, 100.0, 4.0], [-50.0, 0.0, 1.0]])
    np.testing.assert_allclose(overall(scores), [3.0, -24.5])


def test_declared_component_is_omninfts(folder: Path) -> None:
    (spec,) = VideoAlignReward().components
    assert (spec.name, spec.route, spec.weight) == ("videoalign", "video", 1.0)
    assert VideoAlignReward().fps == 24.0
    separate = VideoAlignReward(parts="separate").components
    assert [s.name for s in separate] == ["vq", "mq", "ta"]
    assert sum(s.weight for s in separate) == pytest.approx(1.0)


def test_overall_follows_from_the_separate_parts(folder: Path) -> None:
    parts = make_reward(folder, parts="separate").score(clips())
    table = make_reward(folder).score(clips())
    assert table.names == ("videoalign",)
    assert table.valid.all()
    np.testing.assert_allclose(table.values[:, 0], (parts.column("vq") + parts.column("ta")) / 2, rtol=1e-9)
    assert np.ptp(table.values) > 0.01


def test_batch_equals_singles_and_permutes(folder: Path) -> None:
    reward = make_reward(folder)
    together = reward.score(clips()).values
    np.testing.assert_allclose(np.concatenate([reward.score([clip]).values for clip in clips()]), together, atol=1e-5)
    np.testing.assert_allclose(reward.score(clips()[::-1]).values, together[::-1], atol=1e-5)
    small_budget = make_reward(folder, budget=1)
    np.testing.assert_allclose(small_budget.score(clips()).values, together, atol=1e-5)


def test_what_cannot_be_judged_is_missing_alone(folder: Path) -> None:
    good = clips()[0]
    bad = [
        replace(good, prompt=Prompt("p", "", "sound", "x"), views={}),
        make_clip(1),
        replace(good, prompt=Prompt("p", "a <|TA_reward|>", "", "x"), views={}),
        make_clip(4, 8, 2000),
    ]
    table = make_reward(folder).score([good, *bad])
    np.testing.assert_array_equal(table.valid[:, 0], [True, False, False, False, False])
    reasons = [table.reasons[b, 0] for b in range(1, 5)]
    for reason, part in zip(reasons, ["needs prompt_v", "found 1", "does the prompt hold one", "8x2000"], strict=True):
        assert part in reason


def test_compat_switches_change_the_score(folder: Path) -> None:
    clip = make_clip(48, 60, 80)
    scores = {
        name: make_reward(folder, **options).score([clip]).values[0, 0]
        for name, options in {
            "default": {},
            "fps": {"fps": None},
            "rounded": {"rounded": True},
            "mrope": {"positions": "mrope"},
        }.items()
    }
    assert len({round(score, 9) for score in scores.values()}) == 4
    assert scores["rounded"] == pytest.approx(scores["default"], abs=0.02)  # half a grey level at most


def test_a_recipe_builds_it_and_learns_what_is_missing(tmp_path: Path) -> None:
    options = {"path": str(tmp_path), "base": str(tmp_path), "parts": "separate"}
    reward = build_reward(RewardConfig(name="videoalign", options=options, components={"vq": 2.0}))
    assert [spec.weight for spec in reward.components] == [2.0]
    for part in ("hf download KlingTeam/VideoReward", "hf download Qwen/Qwen2-VL-2B-Instruct", "prompt_template.py"):
        assert part in str(reward.missing())
    with pytest.raises(OmniNFTError, match="hf download"):
        reward.score([make_clip()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": "all"}, "parts is 'all', expected one of: overall, separate"),
        ({"fps": 0}, "fps is 0"),
        ({"positions": "rope"}, "positions is 'rope'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OmniNFTError, match=message):
        VideoAlignReward(**options)
