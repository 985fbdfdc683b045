from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from omninft.rewards.videoscore2 import VideoScore2Reward
from omninft.scorers.qwen2_vl import Example
from omninft.types import Clip, OmniNFTError
from tests.scorers.small_qwen2_vl import make_clip


class ScriptedJudge:
    def __init__(self) -> None:
        self.readings: list[str] = []

    def prepare(self, clip: Clip, text: str) -> Example:
        return Example(torch.tensor([len(clip.video)]), torch.zeros(2, 3, 28, 28), "video")

    def judge(self, examples: list[Example], budget: int, reading: str) -> np.ndarray:
        self.readings.append(reading)
        known = {4: [5.0, 3.0, 1.75], 5: [4.0, np.nan, 2.0], 6: [1.0, 1.0, 1.0]}
        return np.array([known[int(example.ids[0])] for example in examples])


def test_mean_of_three_and_missing_when_one_is() -> None:
    judge = ScriptedJudge()
    table = VideoScore2Reward(scorer=judge).score([make_clip(4), make_clip(5), make_clip(6)])
    np.testing.assert_allclose(table.values[:, 0], [3.25, np.nan, 1.0])
    assert "lacks a digit" in table.reasons[1, 0]
    assert judge.readings == ["expected"]


def test_component_and_range_follow_the_reading() -> None:
    (spec,) = VideoScore2Reward().components
    assert (spec.name, spec.route, spec.range) == ("videoscore2", "video", (1.0, 5.0))
    assert VideoScore2Reward(reading="soft").components[0].range == (0.2, 5.0)
    with pytest.raises(OmniNFTError, match="reading is 'mean', expected one of: expected, soft, hard"):
        VideoScore2Reward(reading="mean")  # type: ignore[arg-type]


def test_missing_names_weights_and_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "cache"))
    text = str(VideoScore2Reward(tmp_path).missing())
    assert "hf download TIGER-Lab/VideoScore2" in text
    assert "vs2_inference.py" in text
