from __future__ import annotations

import numpy as np
import pytest

from omninft.scorers import av_align as scorer
from omninft.scorers.av_align import audio_peaks, av_align, flow_magnitudes, video_peaks
from omninft.types import Clip, OmniNFTError, Prompt
from omninft.worlds import bounce

RATE = 22_050


def clip_of(video: np.ndarray, waveform: np.ndarray, frame_rate: float = 12.0, sample_rate: int = RATE) -> Clip:
    return Clip(video, frame_rate, np.atleast_2d(waveform).astype(np.float32), sample_rate, Prompt("p", "", "", ""))


def clicks(times: list[float], seconds: float = 2.0) -> np.ndarray:
    wave = np.zeros(int(seconds * RATE))
    for t in times:
        start = int(t * RATE)
        wave[start : start + 400] = np.sin(np.arange(400)) * np.exp(-np.arange(400) / 100)
    return wave


def jolts(frames: list[int], size: int = 128) -> np.ndarray:
    """A textured patch that stands still except for a jump at the given frames."""
    texture = np.random.default_rng(0).integers(0, 255, (size, size), dtype=np.uint8)
    texture = np.kron(texture[::4, ::4], np.ones((4, 4), np.uint8))
    return np.stack([np.roll(texture, 2 * sum(f <= t for f in frames), axis=1) for t in range(25)])[..., None].repeat(
        3, -1
    )


def test_flow_repeats_its_first_value_and_peaks_at_the_jumps():
    clip = clip_of(jolts([6, 14]), clicks([]))
    flow = flow_magnitudes(clip)
    assert flow.shape == (25,)
    assert flow[0] == flow[1]
    assert flow[6] > 1 > 0.1 > flow[10]
    np.testing.assert_allclose(video_peaks(clip), [6 / 12, 14 / 12])


def test_onsets_are_those_of_librosa():
    found = audio_peaks(clip_of(jolts([6]), clicks([0.5, 1.2])))
    np.testing.assert_allclose(found, [0.5, 1.2], atol=0.05)


@pytest.mark.parametrize(
    ("heard", "seen", "score"),
    [
        ([0.5, 1.0], [0.5, 1.0], 1.0),
        ([0.5, 1.0], [0.5], 1 / 2),
        ([0.5], [0.5, 1.0, 1.5], 1 / 3),
        ([0.5, 1.0], [0.75, 1.75], 0.0),
        ([0.5], [0.5 + 0.99 / 12], 1.0),
        ([0.5], [0.5 + 1.01 / 12], 0.0),
        ([0.48, 0.52], [0.5], 2.0),  # two audio peaks by one video peak: 2 / (2 + 1 - 2)
        ([], [0.5], 0.0),
        ([0.5], [], 0.0),
    ],
)
def test_score_is_the_published_intersection_over_union(monkeypatch, heard, seen, score):
    monkeypatch.setattr(scorer, "audio_peaks", lambda clip: np.array(heard))
    monkeypatch.setattr(scorer, "video_peaks", lambda clip, shrink, enlarge: np.array(seen))
    assert av_align(clip_of(jolts([]), clicks([]))) == pytest.approx(score, abs=1e-5)


def test_matching_sound_scores_above_sound_out_of_time():
    video = jolts([6, 16])
    assert av_align(clip_of(video, clicks([6 / 12, 16 / 12]))) > 0.6
    assert av_align(clip_of(video, clicks([0.9, 1.8]))) < 0.2


def test_a_ball_of_the_world_gives_peaks_near_its_contacts():
    scene = bounce.Scene("ball", "red", "mid", (5, 15), (5 / 12, 15 / 12), 13.3, 12, 14)
    clip = clip_of(bounce.render_video(scene), bounce.render_audio(scene), sample_rate=16_000)
    for found in (video_peaks(clip), audio_peaks(clip)):
        assert all(np.abs(found - t).min() <= 0.17 for t in scene.event_times)
    assert av_align(clip) > 0.3


def test_silence_and_stillness_score_0():
    assert av_align(clip_of(jolts([]), clicks([0.5]))) == 0
    assert av_align(clip_of(jolts([6, 14]), np.zeros(2 * RATE))) == 0


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(OmniNFTError, match="no sound"):
        av_align(clip_of(jolts([6]), np.zeros((1, 0))))
    with pytest.raises(OmniNFTError, match="not finite"):
        av_align(clip_of(jolts([6]), np.full(2 * RATE, np.nan)))
    with pytest.raises(OmniNFTError, match="found 1"):
        av_align(clip_of(jolts([6])[:1], clicks([0.5])))
