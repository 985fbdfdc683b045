from __future__ import annotations

import threading

import numpy as np
import pytest

from omninft.clips.workers import in_workers
from omninft.rewards.model_reward import ModelReward, prompt_text
from omninft.rewards.registry import ComponentSpec
from omninft.rewards.runner import RewardRunner
from omninft.scorers.weights import JudgingModel
from omninft.types import Clip, OmniNFTError, Prompt


def clips(count: int, prompt_a: str = "rain") -> list[Clip]:
    frame, wave = np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 4), np.float32)
    return [Clip(frame, 12.0, wave, 16_000, Prompt("p", "", prompt_a, ""), i) for i in range(count)]


class Doubling(ModelReward[int]):
    name = "doubling"
    components = (ComponentSpec("double", "audio", ""), ComponentSpec("half", "video", ""))
    inputs = ("prompt_a",)
    model = JudgingModel("Doubler", 1, "MIT", True, ("weights.bin",), repo="them/doubler", revision="r1")
    loads = 0

    def load(self):
        type(self).loads += 1
        return lambda x: [2.0 * x, x / 2]

    def prepare(self, clip):
        if clip.sample == 2:
            raise OmniNFTError("cannot hear")
        return clip.sample

    def judge(self, prepared):
        return np.array([self.scorer(x) for x in prepared])


def test_missing_weights_are_missing_scores_with_the_command_never_0() -> None:
    reward = Doubling()
    expected = "Doubler: missing weights.bin; fetch by: hf download them/doubler weights.bin --revision r1"
    assert reward.missing() == expected
    table = RewardRunner([reward]).score(clips(3))
    assert not table.valid.any()
    assert table.reasons == {(b, k): expected for b in range(3) for k in range(2)}
    assert Doubling.loads == 0


def test_one_clip_that_cannot_be_prepared_is_missing_alone(tmp_path) -> None:
    (tmp_path / "weights.bin").touch()
    table = Doubling(path=tmp_path).score(clips(5))
    np.testing.assert_array_equal(table.values, [[0, 0], [2, 0.5], [np.nan, np.nan], [6, 1.5], [8, 2]])
    assert table.reasons == {(2, 0): "cannot hear", (2, 1): "cannot hear"}


def test_the_scorer_is_loaded_once_by_many_threads(tmp_path) -> None:
    (tmp_path / "weights.bin").touch()
    Doubling.loads = 0
    reward = Doubling(path=tmp_path)
    threads = [threading.Thread(target=lambda: reward.scorer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert Doubling.loads == 1


def test_workers_keep_the_order_and_raise_what_is_no_fault_of_a_clip() -> None:
    assert in_workers(lambda x: x * x, range(20), 4) == [x * x for x in range(20)]

    def fails(x: int) -> int:
        raise ValueError(x)

    with pytest.raises(ValueError, match="0"):
        in_workers(fails, range(3), 2)


def test_an_empty_prompt_is_no_prompt() -> None:
    assert prompt_text(clips(1)[0], "prompt_a") == "rain"
    with pytest.raises(OmniNFTError, match="needs prompt_a, and the clip has none"):
        prompt_text(clips(1, " ")[0], "prompt_a")


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(OmniNFTError, match="reward 'doubling': dtype is 'fp8', expected one of: float32"):
        Doubling(dtype="fp8")
