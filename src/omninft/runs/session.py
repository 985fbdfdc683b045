"""A session of a run: its stages as `train.py` calls them, its log, and how it stops."""

from __future__ import annotations

import copy
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omninft.clips.listing import LISTING
from omninft.config import Config
from omninft.distributed import Processes
from omninft.evaluation.held_out import EvaluationCut, EvaluationScores, Evaluator, save_scores
from omninft.evaluation.paired import PairedTable, compare_paired
from omninft.files import write_text
from omninft.gallery.report import write_report
from omninft.learning.update import TrainingBatch, old_decay
from omninft.models.protocol import AdapterName
from omninft.rewards.failures import LOG_NAME
from omninft.rollout.clips import roll_out
from omninft.runs.build import build, peak_memory_gb
from omninft.runs.display import EVALUATING, Display
from omninft.runs.folder import Progress, RunFolder
from omninft.runs.health import HealthCheck
from omninft.runs.metrics import Level
from omninft.types import Clip, OmniNFTError, PromptGroup, RewardAdvantages, Rollout, ScoreTable

# (iteration, its metrics) -> False to stop the run there.
Callback = Callable[[int, dict[str, float]], bool | None]


class Session(AbstractContextManager["Session"]):
    """A run from its start, or from its last checkpoint, to its end or to a signal.

    Args:
        config: the whole run.
        resume: the folder of a run to go on with; None starts one.
        display: shows progress; None shows nothing.
        callback: told of every iteration, in the main process.

    Raises:
        OmniNFTError: what `build` refuses, or a folder that cannot be written or does not fit.
    """

    def __init__(
        self,
        config: Config,
        resume: Path | None = None,
        display: Display | None = None,
        callback: Callback | None = None,
    ) -> None:
        self._begun = time.monotonic()
        self.config = config
        self.processes = Processes(config.distributed.backend)
        self.display = display if display is not None and self.processes.is_main else Display()
        self.callback = callback if self.processes.is_main else None
        self.display.loading(config)
        try:
            self.parts = build(config, self.processes)
        except BaseException:
            self.display.close()
            raise
        self.health = HealthCheck(self.parts.policy, self.parts.surgery)
        self.run_folder = RunFolder(self.parts, resume)
        self.signal: int | None = None  # the one that asked this process to stop
        self.told_to_stop = False  # by the callback
        self.cut = False  # an evaluation was stopped, in all processes
        # Whether the state is that after `iteration` iterations. Only an update takes it from there, and only moving
        # the old policy brings it to the next. Credit alone moves earlier; `_credit_before` is what it was.
        self.at_boundary = True
        self._credit_before: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._times: dict[str, float] = {}
        self._iteration_begun = time.monotonic()
        progress = self.run_folder.open(resume is not None)
        self.parts.runner.failures.path = self.folder / LOG_NAME
        self.iteration, self._elapsed_before = progress.iteration, progress.elapsed

    @property
    def folder(self) -> Path:
        return self.run_folder.path

    @property
    def finished(self) -> bool:
        return self.iteration >= self.config.run.iterations

    @property
    def stop_requested(self) -> bool:
        """By a signal to this process, or by the callback."""
        return self.signal is not None or self.told_to_stop

    @property
    def progress(self) -> Progress:
        """Iterations done, and seconds over all sessions."""
        return Progress(self.iteration, self._elapsed_before + time.monotonic() - self._begun)

    # The stages of an iteration, in the order in which train.py calls them.

    def iterations(self) -> Iterator[int]:
        """The iterations still to do; ends early when a signal asked to stop."""
        while not self.finished:
            # Every process must leave the loop at the same iteration.
            if self.processes.any(self.stop_requested):
                return
            self._times, self._iteration_begun = {}, time.monotonic()
            self._remember_credit()
            yield self.iteration

    def roll_out(self, groups: Sequence[PromptGroup]) -> Iterator[tuple[Rollout, list[Clip]]]:
        """This process's clips of the iteration, batch by batch, made by the old policy."""
        total, done = sum(len(group.samples) for group in groups) // self.processes.world, 0
        self.display.progress("sampling", done, total)
        for rollout, clips in roll_out(
            self.parts.rollouts,
            groups,
            self.config.seed,
            self.iteration,
            "old",
            rank=self.processes.rank,
            world=self.processes.world,
            stage=self.stage,
        ):
            done += len(clips)
            self.display.progress("sampling", done, total)
            yield rollout, clips

    def gather_scores(self, pending: Sequence[Future[ScoreTable]]) -> ScoreTable:
        """Scores of all clips of the iteration, from all processes; stops the run if too many are missing."""
        with self.stage("rewards"):
            table = ScoreTable.cat([future.result() for future in pending])
            table = ScoreTable.cat(self.processes.gather(table))
        self.parts.runner.check_missing(table)
        return table

    def lessons(self, rollout: Rollout, advantages: RewardAdvantages) -> TrainingBatch:
        """This process's clips with what they teach; surgery is set for the iteration."""
        credit, update, surgery = self.parts.credit, self.parts.update, self.parts.surgery
        start, device = self.processes.rank * len(rollout), self.parts.policy.device
        mine = slice(start, start + len(rollout))
        tokens = credit.weigh(rollout, self.iteration)
        scales = credit.gradient_scales(rollout)
        if surgery is not None and scales is not None:
            surgery.set_schedules(scales.a2v, scales.v2a)
        gradients = None
        if credit.probes(self.iteration):
            alone = [credit.alone(advantages, k)[mine].to(device) for k in range(len(advantages.components))]
            with self.stage("reward gradients"):
                gradients = update.reward_gradients(rollout, tokens, alone, self.iteration)
        branches = credit.combine(advantages, gradients, self.iteration)
        num_valid = int(branches.video_valid.sum()), int(branches.audio_valid.sum())
        return TrainingBatch(rollout, branches[mine].to(device), tokens, num_valid)

    def _remember_credit(self) -> None:
        tensors, values = self.parts.credit.state()
        self._credit_before = {name: tensor.clone() for name, tensor in tensors.items()}, copy.deepcopy(values)

    def learn(self, lessons: TrainingBatch) -> dict[str, float]:
        """The optimiser steps of the iteration."""
        self.at_boundary = False
        with self.stage("update"):
            return self.parts.update.run(lessons, self.iteration)

    def record(self, table: ScoreTable, update: dict[str, float]) -> dict[str, float]:
        """Log the iteration, after its health check; its metrics."""
        metrics: dict[str, float] = {"optimiser_step": self.parts.update.optimiser_step}
        for name, column, valid in zip(table.names, table.values.T, table.valid.T, strict=True):
            metrics[f"reward/{name}"] = float(np.mean(column[valid])) if valid.any() else float("nan")
            metrics[f"missing/{name}"] = float((~valid).sum())
        metrics |= dict(self.parts.credit.metrics()) | update
        first = not self.health.checked
        for message in self.health.after_iteration(self.iteration, metrics, len(table.values)):
            self.say("warning", message)
        if first:
            self.say("info", self.health.summary())
        metrics |= {f"time/{stage}": seconds for stage, seconds in self._times.items()}
        metrics["seconds"] = time.monotonic() - self._iteration_begun
        metrics["elapsed"] = self.progress.elapsed
        metrics["memory_gb"] = peak_memory_gb()
        if self.run_folder.log is not None:
            self.run_folder.log.iteration(self.iteration, metrics)
        self.display.iteration(self.iteration, metrics)
        return metrics

    def move_old(self) -> None:
        """old <- d old + (1 - d) current, which ends the iteration."""
        self.parts.policy.trainables.mix(old_decay(self.config.run.old_schedule, self.iteration))
        self.iteration += 1
        self._credit_before = None
        self.at_boundary = True

    def tell(self, iteration: int, metrics: dict[str, float]) -> None:
        """The callback's turn, once the iteration is done and saved; after the last one there is nothing to stop."""
        if self.callback is not None and self.callback(iteration, metrics) is False and not self.finished:
            self.told_to_stop = True

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Shown as what goes on, its seconds added to the stage's time of this iteration."""
        self.display.stage(name)
        begin = time.monotonic()
        try:
            yield
        finally:
            self._times[name] = self._times.get(name, 0.0) + time.monotonic() - begin

    def say(self, level: Level, message: str) -> None:
        """Say it now and keep it for the report."""
        if self.run_folder.log is not None:
            self.run_folder.log.event(self.iteration, level, message)
        self.display.message(level, message)

    # Evaluations, checkpoints and the end.

    @property
    def evaluation_due(self) -> bool:
        every = self.config.evaluation.every
        return bool(every) and self.iteration % every == 0

    @property
    def save_due(self) -> bool:
        return self.iteration % self.config.run.checkpoint_every == 0

    @property
    def evaluation_owed(self) -> bool:
        """Whether the dev evaluation of now is not in the log: of the base, or one that was cut before a resume."""
        return self.evaluation_due and not self.run_folder.is_evaluated("dev", self.iteration)

    def evaluate_dev(self) -> EvaluationScores | None:
        """The small paired evaluation on dev prompts, with clips; None where there is none, or a signal cut it.

        Before the first iteration it is that of the base.
        """
        if "dev" not in self.parts.evaluators:
            return None
        try:
            scores = self._evaluate(self.parts.evaluators["dev"], self._newest, f"dev-{self.iteration:06d}")
        except EvaluationCut:
            return None
        log = self.run_folder.log
        if log is not None:
            log.evaluation("dev", self.iteration, summarise(scores))
            log.clips("dev", self.iteration, scores.shown)
        self.display.evaluation("dev", self.iteration, summarise(scores))
        return scores

    def compare_on_test(self) -> PairedTable | None:
        """Base against trained on the test prompts, the same noise for both; writes evaluation.json.

        None where there are none, or a signal cut it.
        """
        if "test" not in self.parts.evaluators:
            return None
        try:
            base = self._evaluate(self.parts.evaluators["test"], "reference", "test-base")
            trained = self._evaluate(self.parts.evaluators["test"], "current", "test-trained")
        except EvaluationCut:
            return None
        settings = {
            "recipe": self.config.recipe,
            "iterations": self.iteration,
            "seed": self.config.seed,
            "evaluation": json.loads(self.config.evaluation.model_dump_json()),
            "threads": torch.get_num_threads(),
            "device": str(self.parts.policy.device),
        }
        table = compare_paired(self.parts.measures, base.values, trained.values, base.prompt_ids, settings=settings)
        if self.processes.is_main:
            for name, scores in (("base", base), ("trained", trained)):
                save_scores(self.folder / "samples" / f"test-{name}" / "values.json", scores)
            write_text(self.folder / "evaluation.json", table.to_json())
        return table

    @property
    def preview_due(self) -> bool:
        """Every so many iterations, and at the end."""
        every = self.config.samples.every
        return self.parts.preview is not None and (self.iteration % every == 0 or self.finished)

    @property
    def preview_owed(self) -> bool:
        """Whether the preview of now is not there: that of the base, or one that was cut before a resume."""
        return self.preview_due and not self.processes.gather((self._preview_folder / LISTING).is_file())[0]

    def preview(self) -> None:
        """Clips of the user's own prompts, by the policy of now, for looking at; a signal may cut it."""
        if self.parts.preview is None:
            return
        try:
            made = self._evaluate(self.parts.preview, self._newest, self._preview_folder.name)
        except EvaluationCut:
            return
        if self.run_folder.log is not None:
            self.run_folder.log.clips("preview", self.iteration, made.shown)

    @property
    def _preview_folder(self) -> Path:
        return self.folder / "samples" / f"preview-{self.iteration:06d}"

    @property
    def _newest(self) -> AdapterName:
        """What is trained; before the first iteration the base, which is the same."""
        return "current" if self.iteration else "reference"

    def _evaluate(self, evaluator: Evaluator, adapter: AdapterName, folder: str) -> EvaluationScores:
        progress = partial(self.display.progress, f"{EVALUATING} {folder}")
        place = self.folder / "samples" / folder
        progress(0, sum(len(group.samples) for group in evaluator.groups))
        try:
            return evaluator.run(adapter, place, progress, lambda: self.stop_requested)
        except EvaluationCut:
            self.cut = True
            self.say("warning", f"{folder} was cut by a signal; it is repeated on resume")
            raise

    def save(self) -> None:
        """A checkpoint of now, unless there is one."""
        self.run_folder.save(self.progress)
        self._say_notes()

    def stopped_by(self) -> int | None:
        """The signal that kept the run from its end, the same in all processes; None without one."""
        found = [number for number in self.processes.gather(self.signal) if number is not None]
        return found[0] if found and (self.cut or not self.finished) else None

    def _say_notes(self) -> None:
        for level, message in self.run_folder.notes:
            self.say(level, message)
        self.run_folder.notes = []

    def export(self) -> None:
        """The LoRA, for other programs."""
        if self.processes.is_main:
            self.parts.export(self.folder / "export")

    def report(self) -> None:
        """report.html."""
        if self.run_folder.log is not None:
            self.run_folder.log.close()
            self.run_folder.log = None  # what is said from here on is only shown
            write_report(self.folder)
        self.processes.wait()

    def __enter__(self) -> Session:
        # Only the main thread may set handlers; a notebook's or a server's other threads leave signals to it.
        caught = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.getsignal(number) for number in caught}
        for number in self._previous:
            signal.signal(number, self._on_signal)
        try:
            self.display.start(self)
            self._say_notes()
        except BaseException:
            self._release()
            raise
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.signal = number
        self.display.message(
            "warning", "stopping after this iteration or batch of an evaluation; press Ctrl-C again to stop at once"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and self.processes.is_main:
                self._keep_finished_iterations()
        finally:
            # A reward that hangs must not outlive a second Ctrl-C.
            self._release(wait=not isinstance(error, KeyboardInterrupt))

    def _keep_finished_iterations(self) -> None:
        """After an error: a checkpoint, if the state is one of a boundary. On rank 0, without the other processes.

        They may have raised before it, or wait for it in a transfer that will never come.
        """
        if self.at_boundary:
            if not self.iteration:
                return
            try:
                if self._credit_before is not None:
                    self.parts.credit.load_state(*self._credit_before)
                self.run_folder.write(self.progress)
            except OmniNFTError as problem:  # must not hide the error that ends the run
                self.display.message("error", f"the finished iterations could not be saved: {problem}")
                return
            self._say_notes()
            self.say(
                "info", f"the state after iteration {self.iteration} is saved; --resume {self.folder} goes on there"
            )
            return
        saved = self.run_folder.store.list_checkpoints()
        last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        self.say(
            "warning", f"the run ended inside the update of iteration {self.iteration}, which is not saved; {last}"
        )

    def _release(self, wait: bool = True) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        with ExitStack() as stack:  # each of them, whatever the others raise
            stack.callback(self.run_folder.close)
            stack.callback(self.processes.close)
            stack.callback(self.parts.close, wait)
            stack.callback(self.display.close)


def summarise(scores: EvaluationScores) -> dict[str, dict[str, float]]:
    """Mean and 95 % interval (normal, over clips) of every measure."""
    measures = {}
    for name, column in zip(scores.names, scores.values.T, strict=True):
        valid = column[np.isfinite(column)]
        half = 1.96 * float(valid.std(ddof=1)) / len(valid) ** 0.5 if len(valid) > 1 else float("nan")
        mean = float(valid.mean()) if len(valid) else float("nan")
        measures[name] = {"mean": mean, "low": mean - half, "high": mean + half, "n": float(len(valid))}
    return measures
