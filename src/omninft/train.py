"""The method on one screen: sample with the old policy, score, assign credit, learn, move the old policy.

prompts -> rollout -> decode -> rewards -> credit -> objective -> policy -> checkpoint / export / report
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omninft.config import Config
from omninft.evaluation.paired import PairedTable
from omninft.runs.display import Display
from omninft.runs.session import Session
from omninft.types import Rollout


@dataclass(frozen=True)
class TrainResult:
    """Where a run left its things, and what it achieved."""

    folder: Path
    iterations: int
    finished: bool  # False when a signal stopped it
    stopped_by: int | None  # the signal's number
    table: PairedTable | None  # base against trained on the test prompts


def train(config: Config, resume: Path | None = None, display: Display | None = None) -> TrainResult:
    """Post-train a joint audio-video model with online reinforcement learning.

    Args:
        config: the whole run; `omninft.load_config("omninft", ["run.iterations=40"])` makes one from a recipe.
        resume: a run folder to go on with, bit for bit, from its last whole checkpoint.
        display: shows progress; None shows nothing.

    Raises:
        OmniNFTError: a config, prompt, reward, checkpoint or disk problem, a run that another process works on, or a
            loss that is no longer finite.
    """
    with Session(config, resume, display) as run:
        parts = run.parts
        if run.evaluation_owed:
            run.evaluate_dev()
        if run.preview_owed:
            run.preview()
        for iteration in run.iterations():
            groups = parts.groups.groups(iteration)
            rollouts, pending = [], []
            for rollout, clips in run.roll_out(groups):
                pending.append(parts.runner.submit(clips))  # scored while the next batch is sampled
                rollouts.append(rollout)
            table = run.gather_scores(pending)
            advantages = parts.credit.assign(table, groups, iteration)
            lessons = run.lessons(Rollout.cat(rollouts), advantages)
            metrics = run.learn(lessons)
            run.record(table, metrics)
            run.move_old()
            if run.evaluation_due:
                run.evaluate_dev()
            if run.preview_due:
                run.preview()
            if run.save_due:
                run.save()
        comparison = run.compare_on_test() if run.finished else None
        run.save()
        run.export()
        run.report()
        stopped_by = run.stopped_by()
    return TrainResult(run.folder, run.iteration, stopped_by is None, stopped_by, comparison)
