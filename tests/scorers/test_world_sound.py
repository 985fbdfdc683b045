from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from omninft.scorers.world_sound import SoundFacts, resynthesis, sound_facts
from omninft.types import Clip, OmniNFTError, Prompt
from omninft.worlds import bounce
from omninft.worlds.dataset import world_batch

VIDEO = np.zeros((1, 1, 1, 3), np.uint8)
SCENE = bounce.Scene("ball", "red", "mid", (4, 14), (4 / 12, 14 / 12), 10.0, 12, 14)


def clip_of(waveform: np.ndarray, sample_rate: int = bounce.SAMPLE_RATE) -> Clip:
    return Clip(VIDEO, 12.0, np.atleast_2d(waveform).astype(np.float32), sample_rate, Prompt("p", "", "", ""))


def facts_of(waveform: np.ndarray) -> SoundFacts:
    return sound_facts(clip_of(waveform))


def sound(**changes) -> np.ndarray:
    return bounce.render_audio(replace(SCENE, **changes))


@pytest.fixture(scope="module")
def truth():
    batch = world_batch(256, 17)
    return batch.scenes, [facts_of(w) for w in batch.waveforms]


def test_facts_of_real_clips_are_all_right(truth):
    scenes, facts = truth
    assert [f.source for f in facts] == [(s.kind, s.pitch) for s in scenes]
    offsets = []
    for f, s in zip(facts, scenes, strict=True):
        assert len(f.onset_times) == s.count
        assert f.onset_strengths.min() > 0.95
        assert f.sources[s.kind, s.pitch] > 0.94
        assert f.kinds[s.kind] > 0.94
        assert f.pitches[s.pitch] > 0.94
        offsets += list(np.abs(f.onset_times - s.sound_times))
    assert np.mean(offsets) < 0.001
    assert np.max(offsets) < 0.003


def test_real_clips_are_clean(truth):
    _, facts = truth
    assert min(f.purity for f in facts) > 0.99
    assert max(f.noise_floor for f in facts) < -70
    assert max(f.clipping for f in facts) == 0
    assert max(f.envelope_error for f in facts) < 0.3
    assert min(f.heard for f in facts) == 1


@pytest.mark.parametrize("shift", [-0.1, -0.013, 0.004, 0.05, 0.21])
@pytest.mark.parametrize("kind", bounce.KINDS)
def test_onsets_follow_a_shift(kind, shift):
    times = tuple(t + shift for t in SCENE.sound_times)
    facts = facts_of(sound(kind=kind, sound_times=times))
    np.testing.assert_allclose(facts.onset_times, times, atol=0.004)


def test_a_gentle_attack_is_still_one_onset_a_little_later():
    wave = sound()
    smeared = np.convolve(np.abs(wave), np.ones(640) / 640)[: len(wave)] * bounce.carrier("ball", "mid")
    facts = facts_of(smeared)
    assert len(facts.onset_times) == 2
    late = facts.onset_times - SCENE.sound_times
    assert (late > 0.003).all()
    assert (late < 0.04).all()


def test_a_ghost_sound_counts_by_its_strength():
    ghost = sound(sound_times=(0.8,))
    strengths = []
    for share in (0.0, 0.1, 0.25, 0.4, 0.6, 1.0):
        facts = facts_of(sound() + share * ghost)
        strengths.append(float(facts.onset_strengths[np.abs(facts.onset_times - 0.8) < 0.02].sum()))
    assert strengths[0] == 0
    assert strengths[-1] > 0.95
    assert all(a < b for a, b in zip(strengths[1:-2], strengths[2:-1], strict=True))
    assert 0.2 < strengths[3] < 0.8


def test_mixed_pitches_share_the_evidence():
    low, high = sound(pitch="low"), sound(pitch="high")
    evidence = [facts_of((1 - a) * low + a * high).pitches["high"] for a in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    assert all(a < b for a, b in zip(evidence[:-1], evidence[1:], strict=True))
    assert evidence[0] < 0.02
    assert evidence[-1] > 0.95
    assert 0.2 < evidence[2] < 0.5 < evidence[3] < 0.8


def test_a_buzz_with_weak_overtones_is_still_a_buzz():
    buzz = sound(kind="lamp", pitch="low")
    spectrum = np.fft.rfft(buzz)
    hertz = np.fft.rfftfreq(len(buzz), 1 / bounce.SAMPLE_RATE)
    dimmed = np.fft.irfft(spectrum * np.where(hertz < 350, 0.25, 1), len(buzz))
    assert facts_of(dimmed).source == ("lamp", "low")


def test_noise_lowers_purity_and_raises_the_floor():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, len(sound()))
    facts = [facts_of(sound() + level * noise) for level in (0, 1e-3, 1e-2, 1e-1)]
    assert [round(f.noise_floor) for f in facts[1:]] == [-60, -40, -20]
    assert facts[0].purity > facts[1].purity > facts[2].purity > facts[3].purity + 0.3
    assert facts[3].purity < 0.6
    assert facts[1].envelope_error > facts[0].envelope_error + 0.5
    assert all(f.source == ("ball", "mid") for f in facts)


def test_a_hum_between_the_sounds_is_noise_floor():
    seconds = np.arange(bounce.NUM_SAMPLES) / bounce.SAMPLE_RATE
    humming = facts_of(sound() + 0.01 * np.sin(2 * np.pi * 300 * seconds))
    assert humming.noise_floor == pytest.approx(-43, abs=1)


def test_an_offset_nobody_hears_changes_nothing():
    plain, offset = facts_of(sound()), facts_of(sound() + 0.2)
    assert offset.purity == pytest.approx(plain.purity, abs=0.01)
    np.testing.assert_allclose(offset.onset_times[-2:], plain.onset_times, atol=1e-3)
    assert offset.source == plain.source


def test_clipping_is_the_share_of_samples_at_full_scale():
    loud = np.clip(4 * sound(), -1, 1)
    share = np.mean(np.abs(loud) >= 0.99)
    assert share > 0.02
    assert facts_of(loud).clipping == pytest.approx(share, abs=1e-9)
    assert facts_of(loud).purity < facts_of(sound()).purity


def test_a_fading_sound_is_heard_less_and_less():
    heard = [facts_of(sound() * 10 ** (-db / 20)).heard for db in (0, 24, 32, 40, 48, 80)]
    assert heard[0] == 1
    assert all(a >= b for a, b in zip(heard[:-1], heard[1:], strict=True))
    assert 0.1 < heard[3] < 0.7
    assert heard[-1] == 0


def test_silence_has_nothing_to_hear():
    facts = facts_of(np.zeros(bounce.NUM_SAMPLES))
    assert len(facts.onset_times) == 0
    assert facts.heard == 0
    assert facts.level == -120
    assert sum(facts.sources.values()) == 0


def test_noise_that_comes_up_slowly_has_no_onset():
    rng = np.random.default_rng(3)
    facts = facts_of(np.linspace(0, 0.2, bounce.NUM_SAMPLES) * rng.normal(0, 1, bounce.NUM_SAMPLES))
    assert facts.onset_strengths[facts.onset_times > 0.1].sum() < 0.3


def test_channels_are_averaged_and_lengths_within_a_tenth_of_a_second_accepted():
    mono = facts_of(sound())
    stereo = sound_facts(clip_of(np.stack([sound() * 1.5, sound() * 0.5])))
    longer = facts_of(np.pad(sound(), (0, 1000)))
    shorter = facts_of(sound()[:-1000])
    np.testing.assert_allclose(stereo.onset_times, mono.onset_times, atol=1e-6)
    assert stereo.level == pytest.approx(mono.level, abs=1e-3)
    np.testing.assert_array_equal(longer.onset_times, mono.onset_times)
    np.testing.assert_allclose(shorter.onset_times, mono.onset_times, atol=1e-9)


@pytest.mark.parametrize(
    ("waveform", "rate", "found"),
    [
        (np.zeros((1, 0)), 16_000, "no sound"),
        (np.zeros((1, 16_000)), 16_000, r"\[1, 16000\]"),
        (np.zeros((1, 32_800)), 24_000, "found 24000"),
        (np.full((1, 32_800), np.nan), 16_000, "not finite"),
    ],
)
def test_other_sounds_are_refused_with_what_was_found(waveform, rate, found):
    with pytest.raises(OmniNFTError, match=found):
        sound_facts(clip_of(waveform, rate))


def test_resynthesis_comes_close_to_the_truth_and_far_from_noise():
    rng = np.random.default_rng(0)
    batch = world_batch(24, 8)
    for wave in batch.waveforms:
        made = resynthesis(clip_of(wave))
        assert made.waveform.shape == wave.shape
        assert made.wave_error < 0.12
        assert made.mel_error < 0.1
        noisy = resynthesis(clip_of(wave + rng.normal(0, 0.02, wave.shape)))
        assert noisy.mel_error > made.mel_error + 0.5


def test_a_clip_is_measured_once():
    clip = clip_of(sound())
    assert sound_facts(clip) is sound_facts(clip)
    assert resynthesis(clip) is resynthesis(clip)
