"""The same clip from tensors and from an mp4: what the codec changes is all that a score may change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from omninft.clips.media import read_clip, write_clip, write_wav
from omninft.config import RewardConfig
from omninft.rewards.registry import build_reward
from tests.moving_clips import moving_clip


@pytest.mark.parametrize(
    ("name", "compressed", "exact_sound"),  # how far scores may be apart: H.264 and AAC; H.264 and WAV
    [
        ("flicker", 0.003, 0.003),
        ("motion", 0.05, 0.05),
        ("speech", 0.05, 1e-3),
        ("dnsmos", 0.1, 0.05),  # hears the noise floor of 16 bits
    ],
)
def test_scores_survive_the_codec(name: str, compressed: float, exact_sound: float, tmp_path: Path) -> None:
    clip = moving_clip(3, frames=36, height=96, width=128)
    clip = replace(clip, prompt=replace(clip.prompt, prompt_a="a man talks"))
    reward = build_reward(RewardConfig(name=name))
    if reward.missing():
        pytest.skip(str(reward.missing()))
    direct = reward.score([clip]).values[0, 0]
    write_clip(tmp_path / "clip.mp4", clip, crf=4)
    assert reward.score([read_clip(tmp_path / "clip.mp4", clip.prompt)]).values[0, 0] == pytest.approx(
        direct, abs=compressed
    )
    write_wav(tmp_path / "clip.wav", clip.waveform, clip.sample_rate)
    assert reward.score([read_clip(tmp_path / "clip.mp4", clip.prompt)]).values[0, 0] == pytest.approx(
        direct, abs=exact_sound
    )
