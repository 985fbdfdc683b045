"""The method on one screen: sample with the old policy, score, assign credit, learn, move the old policy.

prompts -> rollout -> decode -> rewards -> credit -> objective -> policy -> checkpoint / export / report
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omninft.config import Config
from omninft.evaluation.paired import PairedTable
from omninft.runs.display import Display
from omninft.runs.session import Run, join_rollouts


@dataclass(frozen=True)
class TrainResult:
    """Where a run left its things, and what it achieved."""

    folder: Path
    iterations: int
    finished: bool  # False when a signal stopped it
    table: PairedTable | None  # base against trained on the test prompts


def train(config: Config, resume: Path | None = None, display: Display | None = None) -> TrainResult:
    """Post-train a joint audio-video model with online reinforcement learning.

    Args:
        config: the whole run; `omninft.load_config("omninft", ["run.iterations=40"])` makes one from a recipe.
        resume: a run folder to go on with, bit for bit, from its last whole checkpoint.
        display: shows progress; None shows nothing.

    Raises:
        OmniNFTError: a config, prompt, reward, checkpoint or disk problem, or a loss that is no longer finite.
    """
    with Run(config, resume, display, resume=resume is not None) as run:
        if run.iteration == 0:
            run.evaluate_dev("reference")
        for iteration in run.iterations():
            groups = run.sampler.groups(iteration)
            rollouts, scores = [], []
            for batch in run.batches(groups):
                rollout = run.timed("sampling", run.rollouts.sample, batch, config.seed, iteration, "old")
                clips = run.timed("decode", run.decode, rollout)
                scores.append(run.runner.submit(clips))  # scored while the next batch is sampled
                rollouts.append(rollout)
            table = run.timed("rewards", run.gather_scores, scores)
            credit = run.credit(table, groups)
            lessons = run.training_batch(join_rollouts(rollouts), credit)
            metrics = run.timed("update", run.update.run, lessons, iteration)
            run.record(table, credit, metrics)
            run.move_old()
        finished = run.iteration >= config.run.iterations
        table = run.compare_on_test() if finished else None
        run.finish()
    return TrainResult(run.folder, run.iteration, finished, table)
