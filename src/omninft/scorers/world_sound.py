"""What a clip of the bounce world sounds like, measured from its waveform by analysis and synthesis.

All sounds of the world are lines at multiples of 100 Hz, so power over any whole number of 10 ms is free of ripple
and a 20 ms Hann window keeps neighbouring lines apart. Onsets are rises of power, placed by the kink they make in the
cumulative energy; kind and pitch are the mixture of the world's six spectra that explains the clip's spectrum best.

Estimates are shares and levels rather than decisions, so that a ghost of half the strength counts about half and
scores move when a clip gets a little better.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from librosa.filters import mel
from scipy.optimize import nnls
from scipy.signal import find_peaks

from omninft.types import Clip, OmniNFTError
from omninft.worlds import bounce

_WINDOW = 320  # samples, 20 ms: two periods of the common 100 Hz
_HOP = 160  # samples
_STEP = 16  # samples, 1 ms: grid of onset candidates
_PAD = 960  # samples of silence around the sound, so that onsets at its ends have both sides
_SLACK = 9600  # samples, 0.6 s, by which a clip's sound may be longer or shorter than the world's
_LOUDNESS = 0.35  # exponent of power in loudness, about
_NEAREST = 80  # ms between two onsets
_ATTACK_DELAY = 2 / 3 * bounce.ATTACK  # s by which the energy of a linear attack comes late
_SILENCE, _LOUD = -56.0, -32.0  # dBFS between which a sound comes to count
_CLIPPED = 0.99
_QUIET = 1e-3  # share of its first amplitude at which a sound is over
_MEL_BANDS = 24
_FLOOR = 1e-6  # power under which levels and spectra are not compared, -60 dBFS

SOURCES = tuple((kind, pitch) for kind in bounce.KINDS for pitch in bounce.PITCHES[kind])
# Seconds from an onset until a tone and a buzz are over, per source.
_OVER = float(np.log(1 / _QUIET))
_LASTS = {"ball": bounce.TONE_DECAY * _OVER, "lamp": bounce.BUZZ_HOLD + bounce.BUZZ_RELEASE * _OVER}
_DURATIONS = np.array([_LASTS[kind] for kind, _ in SOURCES])


@dataclass(frozen=True)
class SoundFacts:
    """Measurements of one clip's sound. Times in seconds, levels in dB of full scale, shares in 0..1."""

    sources: dict[tuple[str, str], float]  # evidence per (kind, pitch), adds up to at most 1
    onset_times: np.ndarray  # [E] s, rising
    onset_strengths: np.ndarray  # [E] in 0..1
    level: float  # dBFS of the strongest onset, -120 where there is none
    heard: float  # 0 where that is silence, 1 from -32 dBFS on
    purity: float  # share of the power that lies on the lines of the dominant source
    noise_floor: float  # dBFS where nothing should sound, -120 at least
    clipping: float  # share of samples at full scale
    envelope_error: float  # dB, mean distance of the level over time from that of the world's sounds at the onsets

    @property
    def source(self) -> tuple[str, str]:
        """(kind, pitch) with the most evidence."""
        return max(self.sources, key=self.sources.__getitem__)

    @property
    def kinds(self) -> dict[str, float]:
        """Evidence for tones ("ball") and buzzes ("lamp")."""
        return {kind: sum(v for (k, _), v in self.sources.items() if k == kind) for kind in bounce.KINDS}

    @property
    def pitches(self) -> dict[str, float]:
        """Evidence for low, mid and high, each by the scale of its kind."""
        return {pitch: sum(v for (_, p), v in self.sources.items() if p == pitch) for pitch in bounce.PITCHES["ball"]}


@dataclass(frozen=True)
class Resynthesis:
    """The sound the estimates describe, and how far the clip's is from it."""

    waveform: np.ndarray  # [N] float64
    wave_error: float  # root mean square of the difference over that of the resynthesis
    mel_error: float  # dB, mean absolute difference of the log-mel spectra


def sound_facts(clip: Clip) -> SoundFacts:
    """Measure the sound of a clip, once.

    Raises OmniNFTError for a clip without sound, a sample rate other than 16 kHz, samples that are not finite, or a
    length further than 0.1 s from the world's 2.05 s. Channels are averaged.
    """
    facts: SoundFacts = clip.view("world_sound", _measure)
    return facts


def resynthesis(clip: Clip) -> Resynthesis:
    """Render the sound again from its measurements, once. Raises as `sound_facts` does."""
    made: Resynthesis = clip.view("world_sound_resynthesis", _resynthesise)
    return made


def _mono(clip: Clip) -> np.ndarray:
    """[NUM_SAMPLES] float32, cut or padded with silence."""
    wave = np.asarray(clip.waveform, dtype=np.float32)
    if wave.size == 0:
        raise OmniNFTError("the clip has no sound")
    if clip.sample_rate != bounce.SAMPLE_RATE:
        raise OmniNFTError(f"the bounce world's sound has {bounce.SAMPLE_RATE} Hz, found {clip.sample_rate}")
    if wave.ndim != 2 or abs(wave.shape[1] - bounce.NUM_SAMPLES) > _SLACK:
        raise OmniNFTError(
            f"the bounce world's sound is [channels, {bounce.NUM_SAMPLES} +- {_SLACK}], found {list(wave.shape)}"
        )
    if not np.isfinite(wave).all():
        raise OmniNFTError("the sound has samples that are not finite")
    mono = wave.mean(0)[: bounce.NUM_SAMPLES]
    return np.pad(mono, (0, bounce.NUM_SAMPLES - len(mono)))


def _measure(clip: Clip) -> SoundFacts:
    raw = _mono(clip)
    wave = _without_offset(raw)
    spectrum = _power(wave).sum(0)
    shares = _mixture(spectrum)
    times, strengths, level = _onsets(wave, SOURCES[int(np.argmax(shares))])
    # One source as a rule; where two compete, their weighted mean, so that nothing jumps as one overtakes the other.
    likely = (shares + 1e-3) ** 4
    likely /= likely.sum()
    heard = _heard(level)
    return SoundFacts(
        sources=dict(zip(SOURCES, (shares * heard).tolist(), strict=True)),
        onset_times=times,
        onset_strengths=strengths,
        level=level,
        heard=heard,
        purity=float(likely @ (_lines() @ spectrum)) / max(float(spectrum.sum()), 1e-12),
        noise_floor=_noise_floor(wave, float(likely @ _DURATIONS), times, strengths),
        clipping=float((np.abs(raw) >= _CLIPPED).mean()),
        envelope_error=_envelope_error(wave, likely, times, strengths),
    )


def _without_offset(wave: np.ndarray) -> np.ndarray:
    """The wave less its mean over 10 ms: every line of the world passes whole, what nobody hears does not."""
    total = np.concatenate([[0.0], np.cumsum(np.pad(wave, _HOP // 2), dtype=np.float64)])
    return np.asarray(wave - (total[_HOP:] - total[:-_HOP])[: len(wave)] / _HOP, dtype=np.float32)


def _smoothstep(x: float | np.ndarray) -> np.ndarray:
    """0 up to x = 0, 1 from x = 1, smooth between."""
    x = np.clip(x, 0.0, 1.0)
    return x * x * (3 - 2 * x)


def _heard(level: float) -> float:
    return float(_smoothstep((level - _SILENCE) / (_LOUD - _SILENCE)))


def _decibels(power: float) -> float:
    return 10 * float(np.log10(max(power, 1e-12)))


@cache
def _hann() -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)).astype(np.float32)


def _power(wave: np.ndarray) -> np.ndarray:
    """Power spectra of 20 ms windows every 10 ms, [frames, 161]; bins are 50 Hz apart."""
    windows = np.lib.stride_tricks.sliding_window_view(wave, _WINDOW)[::_HOP]
    spectrum = np.fft.rfft(windows * _hann())
    return np.asarray(spectrum.real**2 + spectrum.imag**2)


@cache
def _spectra() -> np.ndarray:
    """Power spectrum of each source, and of white noise as the last, [7, 161], each adding up to 1."""
    spectra = [_power(bounce.carrier(kind, pitch)).sum(0) for kind, pitch in SOURCES]
    spectra.append(np.ones_like(spectra[0]))
    return np.stack([s / s.sum() for s in spectra])


@cache
def _lines() -> np.ndarray:
    """Where each source has its lines, [6, 161] bool."""
    spectra = _spectra()[:-1]
    return np.asarray(spectra > 1e-4 * spectra.max(1, keepdims=True))


def _mixture(spectrum: np.ndarray) -> np.ndarray:
    """Shares of the six sources in a power spectrum, [6]; add up to less than 1 as noise outweighs them."""
    total = float(spectrum.sum())
    if total <= 1e-12:
        return np.zeros(len(SOURCES))
    # Loudness, not power, is mixed: a vocoder that dims some lines still lets the pattern of lines decide.
    patterns = _spectra() ** _LOUDNESS
    patterns /= np.linalg.norm(patterns, axis=1, keepdims=True)
    weights = nnls(patterns.T.astype(np.float64), (spectrum / total).astype(np.float64) ** _LOUDNESS)[0]
    sounding, noise = weights[:-1], weights[-1]
    clear = sounding.sum() / (sounding.sum() + 0.02 * noise + 1e-9)
    return np.asarray(clear * sounding**2 / max(float(np.square(sounding).sum()), 1e-12))


def _onsets(wave: np.ndarray, source: tuple[str, str]) -> tuple[np.ndarray, np.ndarray, float]:
    """Times (s) and strengths of onsets, and the amplitude of the strongest in dBFS."""
    energy = np.concatenate([[0.0], np.cumsum(np.square(np.pad(wave, _PAD), dtype=np.float64))])
    grid = np.arange(_PAD - 2 * _STEP, _PAD + len(wave), _STEP)  # the sound starts at _PAD
    after = np.sqrt(np.maximum(energy[grid + _WINDOW] - energy[grid], 0) / _WINDOW)
    before = np.sqrt(np.maximum(energy[grid] - energy[grid - _WINDOW], 0) / _WINDOW)
    rise = np.maximum(after - before, 0.0)
    contrast = rise / (after + before + 1e-6)
    # Steady noise rises and falls by a few percent; a sound out of silence has a contrast of 1.
    novelty = rise * _smoothstep((contrast - 0.15) / 0.35)
    strongest = float(novelty.max())
    level = _decibels(2 * strongest**2)
    if strongest <= 0:
        return np.zeros(0), np.zeros(0), level
    peaks = find_peaks(novelty, height=0.1 * strongest, distance=_NEAREST)[0]
    strengths = _smoothstep((novelty[peaks] / strongest - 0.1) / 0.6)
    strengths = strengths * _heard(level)
    kept = strengths > 0.01
    times = _kinks(energy, _clock(source), grid[peaks[kept]])
    order = np.argsort(times)
    return times[order], strengths[kept][order], level


@cache
def _clock(source: tuple[str, str]) -> np.ndarray:
    """Energy of a steady source up to each sample, [N + 2 pads + 1], in samples: a buzz gives its own in pulses.

    Part of it is plain time, so that it never stands still.
    """
    power = np.square(bounce.carrier(*source))
    power = 0.85 * power / power.mean() + 0.15
    power = np.concatenate([power[-_PAD:], power, power[:_PAD]])  # periodic: N is a whole number of periods
    return np.concatenate([[0.0], np.cumsum(power)])


def _kinks(energy: np.ndarray, clock: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Seconds at which the cumulative energy bends, near the given samples.

    Power p0 before and p1 after a step at t0 give C(b) - C(a) = p0 (t0 - a) + p1 (b - t0), solved for t0 in the
    source's own time.
    """
    first, last = near - 3 * _HOP // 2, near + 3 * _HOP // 2
    p0 = (energy[first] - energy[first - 2 * _HOP]) / (clock[first] - clock[first - 2 * _HOP])
    p1 = (energy[last] - energy[last - _HOP]) / (clock[last] - clock[last - _HOP])
    gained = energy[last] - energy[first]
    at = (p1 * clock[last] - p0 * clock[first] - gained) / np.maximum(p1 - p0, 1e-12)
    samples = np.interp(np.clip(at, clock[first], clock[last]), clock, np.arange(len(clock)))
    return np.asarray((samples - _PAD) / bounce.SAMPLE_RATE - _ATTACK_DELAY)


def _noise_floor(wave: np.ndarray, lasts: float, times: np.ndarray, strengths: np.ndarray) -> float:
    """Level between the sounds, which last so many seconds, dBFS: mean power of the 10 ms that should be quiet."""
    power = np.square(wave[: len(wave) // _HOP * _HOP]).reshape(-1, _HOP).mean(1)
    centres = (np.arange(len(power)) + 0.5) * _HOP / bounce.SAMPLE_RATE
    since = centres - times[:, None]
    # Two hops of grace before an onset: a vocoder's sounds begin a little early.
    sounding = ((since > -2 * _HOP / bounce.SAMPLE_RATE) & (since < lasts)) * strengths[:, None]
    quiet = np.prod(1 - sounding, axis=0) ** 2
    # Half a frame of the mean stands in where no frame is quiet.
    return _decibels(float((quiet @ power + 0.5 * power.mean() * (quiet.sum() < 0.5)) / max(quiet.sum(), 0.5)))


@cache
def _decay_energy(kind: str) -> np.ndarray:
    """Energy of a sound's envelope up to each sample after its onset, [N + 1], in samples."""
    return np.concatenate([[0.0], np.cumsum(np.square(bounce.envelope(kind, (0.0,))))])


def _envelope_error(wave: np.ndarray, likely: np.ndarray, times: np.ndarray, strengths: np.ndarray) -> float:
    """dB, mean over 10 ms frames: the wave's level against that of the likely sources' [6] sounds at the onsets."""
    energy = np.concatenate([[0.0], np.cumsum(np.square(wave, dtype=np.float64))])
    edges = np.arange(0, len(wave) + 1, _HOP)
    level = 10 * np.log10(np.diff(energy[edges]) / _HOP + _FLOOR)
    error = 0.0
    for kind in bounce.KINDS:
        weight = float(likely[[k == kind for k, _ in SOURCES]].sum())
        if weight < 0.01:
            continue
        decay = _decay_energy(kind)
        grid = np.arange(len(decay))
        expected = np.zeros(len(level))
        for start, strength in zip(times * bounce.SAMPLE_RATE, strengths, strict=True):
            # As loud as the clip is over the first 60 ms; a faint onset is a whole one from half strength on.
            first = np.clip([int(start), int(start) + 6 * _HOP], 0, len(wave))
            gain = float(energy[first[1]] - energy[first[0]]) / decay[6 * _HOP] * min(strength / 0.5, 1.0)
            expected = np.maximum(expected, gain * np.diff(np.interp(edges - start, grid, decay)) / _HOP)
        error += weight * float(np.abs(level - 10 * np.log10(expected + _FLOOR)).mean())
    return error


@cache
def _mel_filters() -> np.ndarray:
    return mel(sr=bounce.SAMPLE_RATE, n_fft=_WINDOW, n_mels=_MEL_BANDS, fmin=50, fmax=bounce.SAMPLE_RATE / 2, norm=None)


def _log_mel(wave: np.ndarray) -> np.ndarray:
    """dB of full scale, [frames, bands], floored at -60."""
    scale = 2 / _hann().sum() ** 2  # a sine of amplitude 1 has 0.5 in its three bins together, about
    return np.asarray(10 * np.log10(_power(wave) * scale @ _mel_filters().T + _FLOOR))


def _resynthesise(clip: Clip) -> Resynthesis:
    wave, facts = _mono(clip).astype(np.float64), sound_facts(clip)
    kind, pitch = facts.source
    loudness = np.zeros(len(wave))
    for time, strength in zip(facts.onset_times, facts.onset_strengths, strict=True):
        shape = bounce.envelope(kind, (float(time),))
        part = slice(max(int(time * bounce.SAMPLE_RATE), 0), int((time + 0.06) * bounce.SAMPLE_RATE))
        expected = np.square(shape[part] * bounce.carrier(kind, pitch)[part]).sum()
        amplitude = np.sqrt(np.square(wave[part]).sum() / max(float(expected), 1e-9))
        loudness = np.maximum(loudness, min(strength / 0.5, 1.0) * amplitude * shape)
    made = loudness * bounce.carrier(kind, pitch)
    norm = max(float(np.linalg.norm(made)), 1e-3)
    return Resynthesis(
        waveform=made,
        wave_error=float(np.linalg.norm(wave - made)) / norm,
        mel_error=float(np.abs(_log_mel(wave) - _log_mel(made)).mean()),
    )
