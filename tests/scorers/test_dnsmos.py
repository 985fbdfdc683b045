from __future__ import annotations

import numpy as np
import pytest

from omninft.scorers import dnsmos
from omninft.scorers.dnsmos import DNSMOS, RATINGS, windows
from omninft.types import OmniNFTError
from tests.spoken import babble

pytest.importorskip("speechmos")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model() -> DNSMOS:
    return DNSMOS(RATINGS)


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, samples).clip(-1, 1).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "wave"),
    [("short", babble(0.6)), ("clip", noise(80_640)), ("windows", np.concatenate([babble(4.0), noise(115_000)]))],
)
def test_ratings_are_those_of_the_package(model, name, wave):
    from speechmos import dnsmos as package

    expected = package.run(wave, 16_000)
    found = dict(zip(RATINGS, model(wave), strict=True))
    for rating in RATINGS:
        assert found[rating] == pytest.approx(expected[f"{rating}_mos"], abs=1e-4), (name, rating)


def test_speech_is_rated_above_noise(model):
    spoken, noisy = model(babble(1.2, pitch=120)), model(noise(19_200))
    assert (spoken > noisy + 0.1).all()
    assert 1.0 < noisy[0] < 1.4


def test_short_sounds_are_doubled_until_they_fill_a_window():
    wave = np.arange(1, 40_001, dtype=np.float32)
    (found,) = windows(wave)
    assert len(found) == 144_160  # 9.01 s
    np.testing.assert_array_equal(found, np.tile(wave, 4)[:144_160])


def test_windows_that_are_the_same_are_rated_once(monkeypatch):
    model, rated = DNSMOS(), []
    monkeypatch.setattr(model, "_rate", lambda window: rated.append(window[0]) or [float(window[0])])
    # 4 s are doubled to 16 s, of which 7 windows are taken: at 0, 1, 2, 3, 0, 1, 2 s of the sound.
    wave = np.repeat([0.1, 0.2, 0.3, 0.4], 16_000).astype(np.float32)
    assert model(wave) == pytest.approx([(2 * 0.1 + 2 * 0.2 + 2 * 0.3 + 0.4) / 7])
    assert len(rated) == 4


def test_long_sounds_have_a_window_a_second():
    assert [len(list(windows(np.zeros(round(s * 16_000))))) for s in (9.01, 9.5, 10.0, 11.0, 12.0, 16.0)] == [
        *(1, 1, 1, 2, 3, 7)
    ]
    # 16.01 * 16000 falls short of 256160: the package leaves out the windows from 7 s to 23 s.
    assert len(list(windows(np.zeros(20 * 16_000)))) == 7
    starts = [window[0] for window in windows(np.arange(12 * 16_000))]
    assert starts == [0, 16_000, 32_000]


def test_only_what_is_asked_for_is_computed(monkeypatch):
    monkeypatch.setattr(dnsmos, "_p808_mel", None)
    wave = babble(0.6)
    overall, background = DNSMOS(("ovrl", "bak"))(wave)
    assert DNSMOS()(wave).tolist() == [overall]
    assert overall != background


def test_values_beyond_full_scale_are_clipped(model):
    wave = babble(0.6) * 4
    np.testing.assert_array_equal(model(wave), model(wave.clip(-1, 1)))


def test_what_is_not_installed_is_named(monkeypatch):
    find = dnsmos.importlib.util.find_spec
    monkeypatch.setattr(dnsmos.importlib.util, "find_spec", lambda name: None if name == "speechmos" else find(name))
    assert dnsmos.missing() == "DNSMOS: missing speechmos; install by: pip install speechmos onnxruntime"
    with pytest.raises(OmniNFTError, match="pip install speechmos onnxruntime"):
        DNSMOS()
