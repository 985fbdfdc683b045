from __future__ import annotations

import numpy as np
import pytest

from omninft.config import RewardConfig
from omninft.rewards.dnsmos import DNSMOSReward
from omninft.rewards.registry import build_reward
from omninft.scorers import dnsmos
from omninft.types import OmniNFTError
from tests.moving_clips import moving_clip, with_sound
from tests.spoken import babble


def test_defaults_of_the_recipe():
    reward = build_reward(RewardConfig(name="dnsmos"))
    assert [(c.name, c.route, c.range, c.unit) for c in reward.components] == [("dnsmos", "audio", (1.0, 5.0), "MOS")]
    assert reward.licence == "MIT"
    four = build_reward(RewardConfig(name="dnsmos", options={"ratings": ["p808", "ovrl", "sig", "bak"]}))
    assert [c.name for c in four.components] == ["dnsmos_p808", "dnsmos", "dnsmos_sig", "dnsmos_bak"]


@pytest.mark.parametrize("ratings", [["mos"], [], "ovrl", ["sig", "sig"]])
def test_unknown_ratings_are_refused(ratings):
    with pytest.raises(OmniNFTError, match="expected a list of different ones of: ovrl, sig, bak, p808"):
        build_reward(RewardConfig(name="dnsmos", options={"ratings": ratings}))


def test_the_table_of_a_batch_in_any_order():
    pytest.importorskip("speechmos")
    pytest.importorskip("onnxruntime")
    reward = DNSMOSReward(ratings=["bak", "ovrl"], workers=2)
    base = moving_clip(frames=2)
    broken = np.full(8_000, np.nan)
    stereo = np.stack([babble(0.6), np.zeros(9_600)])
    clips = [
        with_sound(base, babble(0.6)),
        with_sound(base, np.zeros((1, 0))),
        with_sound(base, broken),
        with_sound(base, stereo),
        with_sound(base, np.ones(1), 48_000),  # not one sample at 16 kHz
    ]
    table = reward.score(clips)
    assert {b: why for (b, k), why in table.reasons.items() if k == 1} == {
        1: "the clip has no sound",
        2: "the clip's sound holds values that are not finite",
        4: "the clip has no sound",
    }
    model = dnsmos.DNSMOS(("bak", "ovrl"))
    np.testing.assert_array_equal(table.values[0], model(babble(0.6)))
    np.testing.assert_allclose(table.values[3], model(babble(0.6) / 2), atol=1e-4)
    np.testing.assert_array_equal(reward.score(clips[::-1]).values[::-1], table.values)


def test_without_the_package_nothing_is_scored(monkeypatch):
    monkeypatch.setattr(dnsmos.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OmniNFTError, match="missing speechmos and onnxruntime; install by: pip install"):
        DNSMOSReward().score([moving_clip(frames=2)])
