"""The method on one screen: sample with the old policy, score, assign credit, learn, move the old policy.

prompts -> rollout -> decode -> rewards -> credit -> objective -> policy -> checkpoint / export / report
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from omninft.config import Config, load_config, override_config
from omninft.evaluation.paired import PairedTable
from omninft.runs.display import ConsoleDisplay, Display
from omninft.runs.folder import read_run_config
from omninft.runs.session import Callback, Session
from omninft.types import Rollout

Overrides = Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True)
class TrainResult:
    """Where a run left its things, and what it achieved."""

    folder: Path
    iterations: int
    finished: bool  # False when a signal or the callback stopped it
    stopped_by: int | None  # the signal's number
    table: PairedTable | None  # base against trained on the test prompts

    @property
    def export(self) -> Path:
        """The folder of the LoRA, for `omninft.sample(lora=...)`, diffusers and others."""
        return self.folder / "export"

    @property
    def samples(self) -> Path:
        """The folder of the clips of evaluations."""
        return self.folder / "samples"

    @property
    def page(self) -> Path:
        """report.html: table, clips side by side, curves, health."""
        return self.folder / "report.html"


def train(
    config: Config | str | PathLike[str] | None = None,
    overrides: Overrides = (),
    *,
    resume: str | PathLike[str] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    display: Display | None = None,
) -> TrainResult:
    """Post-train a joint audio-video model with online reinforcement learning.

    In the main thread SIGINT and SIGTERM stop the run at the next boundary, saved; elsewhere signals are left alone.

    Args:
        config: a recipe by name, a YAML file, or a whole `Config`; None: the recipe omninft, or that of `resume`.
        overrides: changes, {"run.iterations": 40} or ["run.iterations=40"].
        resume: a run folder to go on with, bit for bit, from its last whole checkpoint.
        callback: called after every iteration with its number (from 0) and its metrics, as metrics.jsonl has them,
            e.g. "reward/sync"; when it returns False the run stops there, saved. In the main process alone.
        progress: show stages, rewards and the time left.
        display: shows progress in a way of its own.

    Raises:
        OmniNFTError: a config, prompt, reward, checkpoint or disk problem, a run that another process works on, or a
            loss that is no longer finite.
    """
    resume = Path(resume) if resume is not None else None
    config = _resolved(config, overrides, resume)
    display = ConsoleDisplay() if display is None and progress else display
    with Session(config, resume, display, callback) as run:
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
            metrics = run.record(table, metrics)
            run.move_old()
            if run.evaluation_due:
                run.evaluate_dev()
            if run.preview_due:
                run.preview()
            if run.save_due:
                run.save()
            run.tell(iteration, metrics)
        comparison = run.compare_on_test() if run.finished else None
        run.save()
        run.export()
        run.report()
        stopped_by = run.stopped_by()
    finished = run.finished and stopped_by is None
    return TrainResult(run.folder, run.iteration, finished, stopped_by, comparison)


def _resolved(config: Config | str | PathLike[str] | None, overrides: Overrides, resume: Path | None) -> Config:
    """The whole config that a call means."""
    if isinstance(config, Config):
        return override_config(config, overrides)
    if config is None and resume is not None:
        return override_config(read_run_config(resume), overrides)
    return override_config(load_config(str(config or "omninft")), overrides)
