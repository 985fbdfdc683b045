from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omninft.rewards.hpsv3 import HPSv3Reward, clip_score
from omninft.scorers.hpsv3 import HPSv3
from omninft.scorers.qwen2_vl import Example
from omninft.types import Clip, OmniNFTError, Prompt
from tests.scorers.small_qwen2_vl import make_clip


class ScriptedJudge:
    """Scores a frame by its first grey value; an example per prepared frame."""

    def __init__(self) -> None:
        self.passes: list[int] = []
        self.seen: list[tuple[str, int | None]] = []

    def prepare(self, frame: np.ndarray, text: str, jpeg_quality: int | None) -> Example:
        self.seen.append((text, jpeg_quality))
        return Example(torch.tensor([int(frame[0, 0, 0])]), torch.zeros(1, 3, 28, 28), "image")

    def judge(self, examples: list[Example], budget: int) -> np.ndarray:
        self.passes.append(len(examples))
        return np.array([float(example.ids[0]) for example in examples])


def grey(values: list[int]) -> Clip:
    clip = make_clip(len(values), 28, 28)
    clip.video[:] = np.array(values, dtype=np.uint8)[:, None, None, None]
    return clip


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1, 9, 3, 7, 5], 8.0),  # ceil(0.3 * 5) = 2
        ([20, 16, 3, 4, 5], 15.0),
        ([20, 11, 3, 4, 5], 13.0),
        ([-3, -1, -2, -9, -4], -1.5),  # no lower bound
        ([4], 4.0),
        ([1, 2, 3, 4, 5, 6, 7], 6.0),  # ceil(2.1) = 3
    ],
)
def test_clip_score(scores: list[float], expected: float) -> None:
    assert clip_score(np.array(scores, dtype=float)) == pytest.approx(expected)


def test_declared_component() -> None:
    (spec,) = HPSv3Reward().components
    assert (spec.name, spec.route, spec.weight, spec.range) == ("hpsv3", "video", 1.5, (-np.inf, 15.0))


def test_five_frames_of_all_clips_are_judged_at_once() -> None:
    judge = ScriptedJudge()
    reward = HPSv3Reward(scorer=judge, workers=1)
    # Frames round(i * 120 / 4): 0, 30, 60, 90, 120; their values are 0, 3, 6, 9, 12.
    table = reward.score([grey([i // 10 for i in range(121)]), grey([7, 1, 1])])
    np.testing.assert_allclose(table.values, [[(12 + 9) / 2], [7.0]])  # 0, 0.5, 1, 1.5, 2 round to 0, 0, 1, 2, 2
    assert judge.passes == [10]
    assert judge.seen[0] == ("a red ball", None)


def test_jpeg_quality_reaches_the_scorer() -> None:
    judge = ScriptedJudge()
    HPSv3Reward(scorer=judge, jpeg_quality=75).score([grey([1])])
    assert judge.seen == [("a red ball", 75)] * 5


def test_a_clip_without_prompt_is_missing_alone() -> None:
    clips = [grey([1]), replace(grey([1]), prompt=Prompt("p", " ", "a", "a")), grey([2])]
    table = HPSv3Reward(scorer=ScriptedJudge()).score(clips)
    np.testing.assert_allclose(table.values[:, 0], [1.0, np.nan, 2.0])
    assert "needs prompt_v" in table.reasons[1, 0]


def test_batch_equals_singles_and_permutes_through_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    from omninft.scorers import hpsv3
    from tests.scorers.small_qwen2_vl import SMALL, write_base
    from tests.scorers.test_hpsv3 import TEMPLATE_SOURCE, small_state

    monkeypatch.setattr(hpsv3, "MODEL", replace(hpsv3.MODEL, sha256=None))
    write_base(tmp_path / "base", **SMALL)
    save_file(small_state(), tmp_path / "HPSv3.safetensors")
    (tmp_path / "data_collator_qwen.py").write_text(TEMPLATE_SOURCE)
    reward = HPSv3Reward(tmp_path, tmp_path / "base", dtype="float32")
    assert reward.missing() is None
    clips = [make_clip(3, 30, 40), make_clip(7, 28, 80, "a ball", seed=1)]
    together = reward.score(clips).values
    assert isinstance(reward.scorer, HPSv3)
    np.testing.assert_allclose(np.concatenate([reward.score([clip]).values for clip in clips]), together, atol=1e-4)
    np.testing.assert_allclose(reward.score(clips[::-1]).values, together[::-1], atol=1e-4)


def test_missing_names_all_that_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "cache"))
    text = str(HPSv3Reward(tmp_path, tmp_path).missing())
    for part in ("hf download MizzenAI/HPSv3", "hf download Qwen/Qwen2-VL-7B-Instruct", "data_collator_qwen.py"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"), [({"jpeg_quality": 0}, "jpeg_quality is 0"), ({"positions": "x"}, "positions is 'x'")]
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OmniNFTError, match=message):
        HPSv3Reward(**options)
