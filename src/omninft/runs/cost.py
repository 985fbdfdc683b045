"""What a run costs in time, by the seconds of its stages: `check` takes them from a trial, the display as it goes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from omninft.config import Config
from omninft.rollout.sampler import num_passes
from omninft.types import Geometry


@dataclass(frozen=True)
class StageSeconds:
    """Seconds for one clip of training; `probe` is of an iteration that measures the rewards' own gradients."""

    sampling: float
    rest: float  # decode and rewards, which evaluations need as well
    update: float = 0.0
    probe: float = 0.0


def evaluation_clips(config: Config, splits: Collection[str], evaluated: int = -1, previewed: int = 0) -> int:
    """Clips of the evaluations still to come once those of up to `evaluated` iterations are done; -1: none is.

    Dev evaluations of the base and every `evaluation.every` iterations, base and trained on the test prompts, and
    previews of `previewed` clips, of the base, every `samples.every` iterations and of the end.
    """
    evaluation, iterations = config.evaluation, config.run.iterations
    times = (
        iterations // evaluation.every - evaluated // evaluation.every if evaluation.every and "dev" in splits else 0
    )
    every = config.samples.every
    previews = iterations // every - evaluated // every + (iterations % every != 0)
    return times * evaluation.dev_clips + previews * previewed + (2 * evaluation.test_clips if "test" in splits else 0)


def evaluation_seconds(config: Config, seconds: StageSeconds, trained: Geometry, evaluated: Geometry) -> float:
    """Of one clip of an evaluation: sampling by passes of the model and tokens, the rest as in training."""
    passes = num_passes(config.evaluation_sampling) / num_passes(config.sampling)
    tokens = _tokens(evaluated) / _tokens(trained)
    return (seconds.sampling * passes + seconds.rest) * tokens


def run_seconds(
    config: Config,
    splits: Collection[str],
    seconds: StageSeconds,
    trained: Geometry,
    evaluated: Geometry,
    probed_share: float = 0.0,
    previewed: int = 0,
) -> tuple[float, float]:
    """Seconds of an iteration, on average, and of the whole run with its evaluations.

    Args:
        splits: those that are evaluated: "dev", "test".
        probed_share: of the iterations, those that measure the rewards' own gradients.
        previewed: clips of one preview of the user's own prompts.
    """
    one = seconds.sampling + seconds.rest + seconds.update + probed_share * seconds.probe
    iteration = one * config.clips_per_iteration
    each = evaluation_seconds(config, seconds, trained, evaluated)
    return iteration, iteration * config.run.iterations + evaluation_clips(config, splits, previewed=previewed) * each


def _tokens(geometry: Geometry) -> int:
    return geometry.video_tokens + geometry.audio_tokens
