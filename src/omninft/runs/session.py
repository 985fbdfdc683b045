"""A run: its stages put together from the config, its folder, its checkpoints, and how it stops."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import yaml

from omninft.checkpoint.store import CheckpointStore, ensure_writable, flatten_optimizer, restore_optimizer
from omninft.clips.first_frame import read_first_frame
from omninft.config import Config, load_config
from omninft.credit.assignment import Credit, assign_credit, surgery_schedules, weigh_regions
from omninft.credit.regions import attention_column_sums, collection_steps
from omninft.credit.surgery import GradientSurgery
from omninft.distributed import Processes, available_cores
from omninft.evaluation.held_out import EvaluationScores, Evaluator, save_scores
from omninft.evaluation.paired import Group, Measure, PairedTable, compare_paired
from omninft.export.lora import export_lora
from omninft.gallery.report import write_report
from omninft.learning.update import PolicyUpdate, TrainingBatch, old_decay, training_sigmas
from omninft.models.ltx2 import LTX2Policy
from omninft.models.recording import V2ARecorder
from omninft.prompts.prompt_set import PromptSet, require_disjoint
from omninft.prompts.sampler import GroupSampler
from omninft.prompts.sources import open_prompts
from omninft.rewards.registry import WeighedReward, build_reward
from omninft.rewards.runner import RewardRunner
from omninft.rollout.decode import decode_clips
from omninft.rollout.sampler import RolloutSampler, batches
from omninft.runs.display import Display
from omninft.runs.health import HealthCheck
from omninft.runs.metrics import Level, MetricsLog
from omninft.types import (
    Clip,
    Conditioning,
    Latents,
    OmniNFTError,
    PromptGroup,
    Rollout,
    ScoreTable,
    TextContext,
)

RUN_BYTES = 50_000_000  # what a run needs at least to start writing
# Stand where the iteration stands in evaluation noise keys, so that no evaluation shares noise with training.
DEV_NOISE, TEST_NOISE = -1, -2


class Run(AbstractContextManager["Run"]):
    """Everything a training run needs, made once. `train.py` calls it stage by stage."""

    def __init__(
        self, config: Config, folder: Path | None, display: Display | None = None, resume: bool = False
    ) -> None:
        self.started = time.monotonic()
        self.config = config
        torch.set_num_threads(config.run.threads or available_cores())
        self.processes = Processes(config.distributed.backend)
        # One process decides: a moment later the folder it makes would send another to the next free name.
        self.folder = self.processes.gather(folder or new_run_folder(config))[0]
        check_division(config, self.processes.world)
        self.display = display if display is not None and self.processes.is_main else Display()
        self.prompts = open_all_prompts(config)
        self.rewards, self.held_out = build_rewards(config)
        self.policy = LTX2Policy.load(config.model, config.seed)
        self.sampler = GroupSampler(
            self.prompts["train"].prompts, config.prompts.per_iteration, config.prompts.group_size, config.seed
        )
        self.recorder = self._recorder()
        steps = collection_steps(config.sampling.num_steps, config.credit.regions.window)
        self.rollouts = RolloutSampler(
            self.policy, config.sampling, self.recorder, steps if self.recorder else (), read_first_frame
        )
        self.runner = RewardRunner(self.rewards, config.run.max_missing_share)
        self.surgery = self._surgery()
        self.update = PolicyUpdate(
            self.policy,
            self.rollouts.geometry,
            config.objective,
            config.optimiser,
            training_sigmas(config.objective.sigmas, self.rollouts.sigmas),
            config.seed,
            self.processes,
            self.surgery,
            config.credit.surgery.scope == "video_loss_only",
        )
        self.health = HealthCheck(self.policy, self.surgery)
        self.store = CheckpointStore(self.folder, config.run.keep_last)
        self.iteration, self.elapsed_before = 0, 0.0
        self.stop_requested = False
        self._times: dict[str, float] = {}
        self._iteration_started = time.monotonic()
        self.metrics = self._open_folder(resume)  # rank 0 only

    def _recorder(self) -> V2ARecorder | None:
        regions = self.config.credit.regions
        if not regions.enabled:
            return None
        blocks = self.policy.blocks
        first = regions.first_block
        first = int(first * len(blocks)) if isinstance(first, float) else first
        sums = partial(_column_sums)
        return V2ARecorder(blocks, sums, first, regions.rope, regions.value_weighted)

    def _surgery(self) -> GradientSurgery | None:
        surgery = self.config.credit.surgery
        if not surgery.enabled:
            return None
        video, audio = surgery_schedules(surgery, len(self.policy.blocks))
        return GradientSurgery(self.policy.blocks, video, audio, surgery.target)

    def _open_folder(self, resume: bool) -> MetricsLog | None:
        """Create or reopen the run folder; on resume, restore the last whole checkpoint."""
        log, tree = None, json.loads(self.config.model_dump_json())
        if self.processes.is_main:
            ensure_writable(self.folder, RUN_BYTES)
            if not resume:
                text = yaml.safe_dump(tree, sort_keys=False)
                (self.folder / "config.yaml").write_text(text, encoding="utf-8")
            log = MetricsLog(self.folder, self.config.run.loggers, tree)
        self.processes.wait()
        if resume:
            self._restore()
            if log is not None:
                log.rewind(self.iteration)
        return log

    def _restore(self) -> None:
        path = self.store.latest()
        if path is None:
            return
        saved = self.store.load(path, self.config.fingerprint())
        self.policy.adapters.load_state("current", saved.tensors["current"])
        self.policy.adapters.load_state("old", saved.tensors["old"])
        restore_optimizer(self.update.optimiser, saved.tensors["optimiser"], saved.state["optimiser"])
        self.iteration = saved.state["iteration"]
        self.update.optimiser_step = saved.state["optimiser_step"]
        self.elapsed_before = saved.state["elapsed"]

    # The stages, as train.py calls them.

    def iterations(self) -> Iterator[int]:
        """The iterations still to do; ends early when a signal asked to stop."""
        while self.iteration < self.config.run.iterations:
            # Every process must leave the loop at the same iteration.
            if self.processes.any(self.stop_requested):
                return
            self._times, self._iteration_started = {}, time.monotonic()
            yield self.iteration

    def batches(self, groups: list[PromptGroup]) -> Iterator[tuple[PromptGroup, ...]]:
        """This process's clips of the iteration."""
        return batches(groups, self.config.sampling.batch_size, self.processes.rank, self.processes.world)

    def timed(self, stage: str, call: Callable[..., Any], *args: Any) -> Any:
        """`call(*args)`, its seconds added to the stage's time of this iteration."""
        self.display.stage(stage)
        begin = time.monotonic()
        result = call(*args)
        self._times[stage] = self._times.get(stage, 0.0) + time.monotonic() - begin
        return result

    def decode(self, rollout: Rollout) -> list[Clip]:
        """The rollout's clips."""
        return decode_clips(self.policy, rollout, self.rollouts.geometry)

    def gather_scores(self, pending: list[Future[ScoreTable]]) -> ScoreTable:
        """Scores of all clips of the iteration, from all processes; stops the run if too many are missing."""
        table = ScoreTable.cat([future.result() for future in pending])
        table = ScoreTable.cat(self.processes.gather(table))
        self.runner.check_missing(table)
        return table

    def credit(self, table: ScoreTable, groups: list[PromptGroup]) -> Credit:
        """Advantages per branch."""
        return assign_credit(table, groups, self.config.credit.advantage, self.config.seed, self.iteration)

    def training_batch(self, rollout: Rollout, credit: Credit) -> TrainingBatch:
        """This process's clips with their credit."""
        start = self.processes.rank * len(rollout)
        mine = credit.advantages[slice(start, start + len(rollout))].to(self.policy.device)
        omega = weigh_regions(
            rollout,
            self.config.credit.regions,
            self.rollouts.geometry.latent_frames,
            self.iteration,
            self.config.run.iterations,
        )
        return TrainingBatch(rollout, mine, omega, credit.num_valid)

    def move_old(self) -> None:
        """old <- d old + (1 - d) current, which ends the iteration: count it, evaluate and save when due."""
        self.policy.adapters.mix_old(old_decay(self.config.run.old_schedule, self.iteration))
        self.iteration += 1
        every = self.config.evaluation.every
        if every and self.iteration % every == 0:
            self.evaluate_dev()
        if self.iteration % self.config.run.checkpoint_every == 0:
            self.save()

    def record(self, table: ScoreTable, credit: Credit, update: dict[str, float]) -> None:
        """Log the iteration, after its health check."""
        metrics: dict[str, float] = {"optimiser_step": self.update.optimiser_step}
        for name, column, valid in zip(table.names, table.values.T, table.valid.T, strict=True):
            metrics[f"reward/{name}"] = float(np.mean(column[valid])) if valid.any() else float("nan")
            metrics[f"missing/{name}"] = float((~valid).sum())
        metrics |= credit.metrics | update
        first = not self.health.checked
        for message in self.health.after_iteration(self.iteration, metrics, len(table.values)):
            self.say("warning", message)
        if first:
            self.say("info", self.health.summary())
        metrics |= {f"time/{stage}": seconds for stage, seconds in self._times.items()}
        metrics["seconds"] = time.monotonic() - self._iteration_started
        metrics["elapsed"] = self.elapsed
        metrics["memory_gb"] = peak_memory_gb()
        if self.metrics is not None:
            self.metrics.iteration(self.iteration, metrics)
        self.display.iteration(self.iteration, metrics)

    def say(self, level: Level, message: str) -> None:
        """Say it now and keep it for the report."""
        if self.metrics is not None:
            self.metrics.event(self.iteration, level, message)
        self.display.message(level, message)

    @property
    def elapsed(self) -> float:
        """Seconds of this run, over all its sessions."""
        return self.elapsed_before + time.monotonic() - self.started

    # Evaluation and endings.

    def evaluate_dev(self, adapter: str = "current") -> EvaluationScores | None:
        """The small paired evaluation on dev prompts, with clips."""
        evaluation = self.config.evaluation
        if "dev" not in self.prompts or not evaluation.dev_clips or not evaluation.every:
            return None
        scores = self._evaluate("dev", adapter, f"dev-{self.iteration:06d}")
        if self.metrics is not None:
            self.metrics.evaluation("dev", self.iteration, summarise(scores))
            self.metrics.clips("dev", self.iteration, scores.shown)
        self.display.evaluation("dev", self.iteration, summarise(scores))
        return scores

    def compare_on_test(self) -> PairedTable | None:
        """Base against trained on the test prompts, the same noise for both; writes evaluation.json."""
        if "test" not in self.prompts or not self.config.evaluation.test_clips:
            return None
        base = self._evaluate("test", "reference", "test-base")
        trained = self._evaluate("test", "current", "test-trained")
        settings = {
            "recipe": self.config.recipe,
            "iterations": self.iteration,
            "seed": self.config.seed,
            "evaluation": json.loads(self.config.evaluation.model_dump_json()),
            "threads": torch.get_num_threads(),
            "device": str(self.policy.device),
        }
        table = compare_paired(self.measures(), base.values, trained.values, base.prompt_ids, settings=settings)
        if self.processes.is_main:
            for name, scores in (("base", base), ("trained", trained)):
                save_scores(self.folder / "samples" / f"test-{name}" / "values.json", scores)
            (self.folder / "evaluation.json").write_text(table.to_json(), encoding="utf-8")
        return table

    def _evaluate(self, split: str, adapter: str, folder: str) -> EvaluationScores:
        evaluation = self.config.evaluation
        clips = evaluation.dev_clips if split == "dev" else evaluation.test_clips
        evaluator = Evaluator(
            self.policy,
            evaluation,
            self.prompts[split].prompts,
            clips,
            DEV_NOISE if split == "dev" else TEST_NOISE,
            RewardRunner([*self.rewards, *self.held_out], max_missing_share=1.0).score,
            self.processes,
        )
        label = f"evaluating {folder}"
        return evaluator.run(adapter, self.folder / "samples" / folder, partial(self.display.progress, label))

    def measures(self) -> list[Measure]:
        """What an evaluation measures, in the order of its columns."""
        groups: tuple[tuple[Group, list[WeighedReward]], ...]
        groups = ("trained", self.rewards), ("held_out", self.held_out)
        return [
            Measure(c.name, group, c.route, c.higher_is_better, "" if c.unit == "1" else c.unit)
            for group, rewards in groups
            for reward in rewards
            for c in reward.components
        ]

    def save(self) -> None:
        """An exact checkpoint of the state after `self.iteration` iterations."""
        if self.processes.is_main:
            tensors, optimiser = flatten_optimizer(self.update.optimiser)
            groups = {name: self.policy.adapters.state(name) for name in ("current", "old")}
            state = {
                "iteration": self.iteration,
                "optimiser_step": self.update.optimiser_step,
                "optimiser": optimiser,
                "elapsed": self.elapsed,
            }
            self.store.save(self.iteration, groups | {"optimiser": tensors}, state, self.config.fingerprint())
        self.processes.wait()

    def finish(self) -> Path:
        """Last checkpoint, LoRA and report; returns the report."""
        if not (self.store.folder / f"step-{self.iteration:06d}").is_dir():
            self.save()
        if self.metrics is not None:
            export_lora(self.policy.adapters, self.folder / "export")
            self.metrics.close()
            write_report(self.folder)
        self.processes.wait()
        return self.folder / "report.html"

    def __enter__(self) -> Run:
        self._previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        for number in self._previous:
            signal.signal(number, self._on_signal)
        self.display.start(self)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.stop_requested = True
        self.display.message("warning", "stopping after this iteration; press Ctrl-C again to stop at once")

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.display.close()
        self.runner.close()
        self.processes.close()


def _column_sums(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
    return attention_column_sums(query, key, value=value)


def check_division(config: Config, processes: int) -> None:
    """Refuse an iteration whose clips do not divide into processes and micro-batches.

    Raises:
        OmniNFTError: with the numbers found and ones that would do.
    """
    clips, micro = config.clips_per_iteration, config.objective.micro_batch
    if clips % processes:
        raise OmniNFTError(
            f"{config.prompts.per_iteration} prompts x {config.prompts.group_size} clips = {clips} clips an iteration "
            f"do not divide by {processes} processes; change prompts.per_iteration or prompts.group_size"
        )
    share = clips // processes
    if share > micro and share % micro:
        raise OmniNFTError(
            f"{clips} clips an iteration over {processes} processes are {share} each, which objective.micro_batch "
            f"{micro} does not divide; {max(m for m in range(1, micro + 1) if share % m == 0)} would"
        )


def open_all_prompts(config: Config) -> dict[str, PromptSet]:
    """Train, dev and test prompts, checked to be disjoint."""
    sources = {"train": config.prompts.train, "dev": config.prompts.dev, "test": config.prompts.test}
    sets = {split: open_prompts(source) for split, source in sources.items() if source}
    require_disjoint(sets["train"], sets.get("dev"), sets.get("test"))
    return sets


def build_rewards(config: Config) -> tuple[list[WeighedReward], list[WeighedReward]]:
    """Trained and held-out rewards, with all they load in place; no component may be in both."""
    trained = [build_reward(r) for r in config.rewards]
    held_out = [build_reward(r) for r in config.held_out]
    missing = [f"reward {r.name!r}: {why}" for r in (*trained, *held_out) if (why := r.missing()) is not None]
    if missing:
        raise OmniNFTError("not ready (`omninft rewards` has the commands line by line):\n" + "\n".join(missing))
    names = [c.name for r in (*trained, *held_out) for c in r.components]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise OmniNFTError(f"rewards and held_out give components of the same name: {', '.join(twice)}")
    return trained, held_out


def summarise(scores: EvaluationScores) -> dict[str, dict[str, float]]:
    """Mean and 95 % interval (normal, over clips) of every measure."""
    measures = {}
    for name, column in zip(scores.names, scores.values.T, strict=True):
        valid = column[np.isfinite(column)]
        half = 1.96 * float(valid.std(ddof=1)) / len(valid) ** 0.5 if len(valid) > 1 else float("nan")
        mean = float(valid.mean()) if len(valid) else float("nan")
        measures[name] = {"mean": mean, "low": mean - half, "high": mean + half, "n": float(len(valid))}
    return measures


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far; on CUDA the largest allocation."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def new_run_folder(config: Config) -> Path:
    """runs/NAME, or NAME-2, NAME-3, ... if there is one already; a name the user gave must be free."""
    parent = Path(config.run.folder)
    if config.run.name is not None:
        folder = parent / config.run.name
        if folder.exists() and any(folder.iterdir()):
            raise OmniNFTError(
                f"{folder} already holds a run; go on with it by `omninft train --resume {folder}`, "
                "or choose another run.name"
            )
        return folder
    folder, number = parent / config.recipe, 1
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = parent / f"{config.recipe}-{number}"
    return folder


def read_run_config(folder: Path, overrides: list[str] | None = None) -> Config:
    """The resolved config of a run folder, with overrides (a longer run, other logging) on top.

    Raises:
        OmniNFTError: no run there.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise OmniNFTError(f"{folder} is no run folder: it has no config.yaml")
    return load_config(str(path), overrides)


def join_rollouts(parts: list[Rollout]) -> Rollout:
    """One rollout of all batches of an iteration; batches without given frames get an empty mask beside others'."""
    given = None
    if any(p.conditioning is not None for p in parts):
        given = Conditioning.cat([p.conditioning or _nothing_given(p) for p in parts])
    attention = [p.attention for p in parts if p.attention is not None]
    return Rollout(
        groups=tuple(g for p in parts for g in p.groups),
        latents=Latents.cat([p.latents for p in parts]),
        context=TextContext.cat([p.context for p in parts]),
        conditioning=given,
        attention=torch.cat(attention) if attention else None,
    )


def _nothing_given(rollout: Rollout) -> Conditioning:
    video = rollout.latents.video
    return Conditioning(torch.zeros_like(video), torch.zeros(video.shape[:2], dtype=torch.bool, device=video.device))
