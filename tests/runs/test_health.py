"""The self-check of the first iteration, and the alarms after it."""

from __future__ import annotations

import pytest
import torch

from omninft.models.ltx2 import LTX2Policy
from omninft.runs.health import HealthCheck
from omninft.types import OmniNFTError
from tests.random_models import make_policy

GOOD = {
    "advantage/mean_abs_video": 1.0,
    "advantage/mean_abs_audio": 1.0,
    "advantage/zero_variance_groups": 0.0,
    "gradient_norm/video": 0.5,
    "gradient_norm/audio": 0.4,
    "missing/sync": 0.0,
}


def test_a_run_that_moved_passes_without_a_word(moved_policy: LTX2Policy) -> None:
    health = HealthCheck(moved_policy, None)
    assert health.after_iteration(0, GOOD, 8) == []
    assert health.facts["lora_modules"] == 28 * len(moved_policy.blocks)
    assert health.facts["moved_from_old"] > 0


def test_a_run_that_did_not_move_stops() -> None:
    with pytest.raises(OmniNFTError, match="the current adapter equals the old one"):
        HealthCheck(make_policy(), None).after_iteration(0, GOOD, 8)


def test_b_that_stayed_zero_stops() -> None:
    policy = make_policy()
    for key, tensor in policy.adapters.state("current").items():
        if key.endswith("lora_A"):
            tensor.add_(torch.ones_like(tensor))
    with pytest.raises(OmniNFTError, match="every B of the current adapter is still 0"):
        HealthCheck(policy, None).after_iteration(0, GOOD, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_norm/audio": 0.0}, "the audio stream's adapters got a gradient of exactly 0"),
        ({"advantage/zero_variance_groups": 2.0}, "2 prompt groups got equal scores"),
        ({"missing/sync": 3.0}, "scores are missing: sync 3 of 8"),
    ],
)
def test_alarms(moved_policy: LTX2Policy, change: dict[str, float], message: str) -> None:
    warnings = HealthCheck(moved_policy, None).after_iteration(0, GOOD | change, 8)
    assert len(warnings) == 1
    assert message in warnings[0]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, "self-check passed: "),
        ({"gradient_norm/audio": 0.0}, "self-check not passed, audio got a gradient of exactly 0: "),
        (
            {"gradient_norm/audio": 0.0, "gradient_norm/video": 0.0},
            "self-check not passed, video and audio got a gradient of exactly 0: ",
        ),
    ],
)
def test_summary_of_a_run_without_gradients_says_so(
    moved_policy: LTX2Policy, change: dict[str, float], found: str
) -> None:
    health = HealthCheck(moved_policy, None)
    health.after_iteration(0, GOOD | change, 8)
    assert health.summary().startswith(found)


def test_summary_of_equal_rewards_that_moved_nothing_says_so() -> None:
    health = HealthCheck(make_policy(), None)
    health.after_iteration(0, GOOD | {"advantage/mean_abs_video": 0.0, "advantage/mean_abs_audio": 0.0}, 8)
    assert health.summary().startswith("self-check not passed, the adapters did not move: ")
