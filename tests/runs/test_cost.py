"""Time of a run by hand-made seconds."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from omninft.config import load_config
from omninft.rollout.sampler import num_passes
from omninft.runs import build
from omninft.runs.cost import StageSeconds, evaluation_clips, evaluation_seconds, run_seconds
from omninft.types import Geometry

SIZE = Geometry(
    num_frames=9,
    height=32,
    width=32,
    frame_rate=8.0,
    latent_frames=2,
    latent_height=5,
    latent_width=8,
    video_channels=4,
    audio_tokens=20,
    audio_channels=4,
    sample_rate=8000,
)
FULL = "evaluation.sampling={num_steps: 40, video_guidance: {text: 3, stg: 1, modality: 3}}"


def test_passes_are_steps_times_one_and_each_guidance() -> None:
    config = load_config("omninft")
    assert num_passes(config.sampling) == 10
    assert num_passes(config.evaluation_sampling) == 16
    assert num_passes(load_config("omninft", [FULL]).evaluation_sampling) == 40 * 4
    # One stream is enough, and rescaling alone is no pass.
    one = load_config("omninft", ["sampling.audio_guidance={text: 2, rescale: 0.5}", "sampling.num_steps=7"])
    assert num_passes(one.sampling) == 14
    assert num_passes(load_config("omninft", ["sampling.audio_guidance.rescale=0.5"]).sampling) == 10


def test_clips_of_evaluations() -> None:
    config = load_config("omninft", ["run.iterations=24", "evaluation.every=6"])
    assert evaluation_clips(config, ("dev", "test")) == 5 * 64 + 2 * 256
    assert evaluation_clips(config, ("dev", "test"), 0) == 4 * 64 + 2 * 256
    assert evaluation_clips(config, ("dev",), 17) == 2 * 64
    assert evaluation_clips(config, ("dev",), 18) == 64
    assert evaluation_clips(load_config("omninft", ["evaluation.every=0"]), ("dev",)) == 0
    # Of the base, after 10, after 20 and at the end.
    previewed = load_config("omninft", ["run.iterations=24", "samples.every=10"])
    assert evaluation_clips(previewed, (), previewed=3) == 4 * 3
    assert evaluation_clips(previewed, (), 10, 3) == 2 * 3


def test_seconds_of_a_run_with_guided_evaluations_and_probes() -> None:
    config = load_config("omninft", [FULL, "run.iterations=12"])
    seconds = StageSeconds(sampling=0.1, rest=0.02, update=0.3, probe=0.5)
    assert evaluation_seconds(config, seconds, SIZE, SIZE) == pytest.approx(0.1 * 16 + 0.02)
    iteration, total = run_seconds(config, ("dev", "test"), seconds, SIZE, SIZE, probed_share=0.25)
    assert iteration == pytest.approx(64 * (0.42 + 0.125))
    assert total == pytest.approx(12 * iteration + (3 * 64 + 512) * 1.62)
    twice = replace(SIZE, audio_tokens=120)
    assert evaluation_seconds(config, seconds, SIZE, twice) == pytest.approx(2 * 1.62)


@pytest.mark.parametrize(("system", "unit"), [("darwin", 1), ("linux", 1024)])
def test_peak_memory_is_in_gib_on_every_system(system: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(ru_maxrss=3 * 2**30 // unit)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(build.resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(build.torch.cuda, "is_available", lambda: False)
    assert build.peak_memory_gb() == 3.0
