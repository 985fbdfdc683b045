from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omninft.scorers import silero
from omninft.scorers.silero import SileroVAD, frames, speech_segments
from omninft.types import OmniNFTError
from tests.spoken import babble

pytest.importorskip("onnxruntime")
FOUND = importlib.util.find_spec("silero_vad")
if FOUND is None:
    pytest.skip("silero-vad is not installed", allow_module_level=True)
FOLDER = Path((FOUND.submodule_search_locations or [""])[0])


@pytest.fixture(scope="module")
def model() -> SileroVAD:
    return SileroVAD()


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)


def test_probabilities_are_those_of_the_package_frame_by_frame(model):
    """The streaming torchscript model of the package, an independent file, on sound that ends within a frame."""
    streaming = torch.jit.load(FOLDER / "data" / "silero_vad.jit").eval()
    wave = np.concatenate([noise(4_000), babble(0.8), np.zeros(3_000, np.float32)])
    padded = torch.nn.functional.pad(torch.from_numpy(wave), (0, -len(wave) % 512))
    streaming.reset_states()
    with torch.no_grad():
        expected = [streaming(chunk, 16_000).item() for chunk in padded.split(512)]
    found = model(wave).probabilities
    assert len(found) == 39
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.max() > 0.9
    assert found.min() < 0.1


def test_speech_is_heard_where_it_is(model):
    wave = np.concatenate([np.zeros(16_000, np.float32), babble(1.2)])
    facts = model(wave)
    assert len(facts.onsets) == 1
    assert facts.onsets[0] == pytest.approx(1.0, abs=0.1)
    assert facts.segments[0, 1] == pytest.approx(2.2, abs=0.2)
    assert facts.share == pytest.approx(1.2 / 2.2, abs=0.1)
    for quiet in (noise(32_000), np.zeros(32_000, np.float32), np.sin(np.arange(32_000) * 0.2).astype(np.float32)):
        heard = model(quiet)
        assert heard.share < 0.05
        assert heard.segments.shape == (0, 2)


def test_no_state_is_left_over_from_the_clip_before(model):
    wave = noise(16_000)
    fresh = SileroVAD()(wave).probabilities
    model(babble(1.0))
    np.testing.assert_array_equal(model(wave).probabilities, fresh)


def test_frames_carry_the_end_of_the_one_before():
    found = frames(np.arange(1, 1_101, dtype=np.float32))
    assert found.shape == (3, 576)
    np.testing.assert_array_equal(found[0], [*[0] * 64, *range(1, 513)])
    np.testing.assert_array_equal(found[1], np.arange(512 - 63, 1_025))
    np.testing.assert_array_equal(found[2, : 64 + 76], np.arange(1_024 - 63, 1_101))
    assert not found[2, 64 + 76 :].any()
    assert frames(np.ones(512)).shape == (1, 576)


@pytest.fixture(scope="module")
def package_segments():
    threads = torch.get_num_threads()
    from silero_vad.utils_vad import get_speech_timestamps_from_probs  # sets torch to one thread

    torch.set_num_threads(threads)

    def segments(probabilities: list[float], samples: int) -> list[tuple[float, float]]:
        found = get_speech_timestamps_from_probs(probabilities, speech_pad_ms=0, audio_length_samples=samples)
        return [(s["start"] / 16_000, s["end"] / 16_000) for s in found]

    return segments


LEVELS = st.sampled_from([0.0, 0.2, 0.3499, 0.36, 0.45, 0.4999, 0.5, 0.7, 1.0])
RUNS = st.lists(st.tuples(LEVELS, st.integers(1, 12)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(runs=RUNS, cut=st.integers(0, 511))
def test_segments_are_those_of_the_package(package_segments, runs, cut):
    probabilities = [level for level, times in runs for _ in range(times)]
    samples = len(probabilities) * 512 - cut
    found = speech_segments(np.array(probabilities), samples)
    assert found.tolist() == [list(s) for s in package_segments(probabilities, samples)]


def test_segments_by_hand():
    # Frames of 32 ms: 10 of speech, 2 doubtful, 3 quiet (under 100 ms), 9 of speech, 5 quiet, 7 of speech (too few).
    probabilities = np.repeat([0.9, 0.4, 0.1, 0.6, 0.1, 0.9], [10, 2, 3, 9, 5, 7])
    assert speech_segments(probabilities, 36 * 512).tolist() == [[0.0, 24 * 0.032]]


def test_the_number_of_torch_threads_is_left_alone():
    torch.set_num_threads(2)
    SileroVAD()(noise(1_000))
    assert torch.get_num_threads() == 2


def test_what_is_not_installed_is_named(monkeypatch):
    find = silero.importlib.util.find_spec
    monkeypatch.setattr(silero.importlib.util, "find_spec", lambda name: None if name == "silero_vad" else find(name))
    assert silero.missing() == "Silero VAD: missing silero-vad; install by: pip install silero-vad onnxruntime"
    with pytest.raises(OmniNFTError, match="pip install silero-vad onnxruntime"):
        SileroVAD()
