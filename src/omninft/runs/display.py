"""What a person sees while a run goes on: stage, rewards, time left."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.table import Table

from omninft.config import Config, RewardConfig
from omninft.rewards.registry import ComponentSpec, build_reward
from omninft.rewards.verification import is_verified
from omninft.runs.build import Parts
from omninft.runs.cost import StageSeconds, evaluation_clips, evaluation_seconds
from omninft.types import OmniNFTError

EVALUATING = "evaluating"  # how the labels of evaluations begin
SLOW = 20.0  # s after which a stage is told of in a file


class RunView(Protocol):
    """What of a session a display reads."""

    @property
    def config(self) -> Config: ...

    @property
    def parts(self) -> Parts: ...

    @property
    def folder(self) -> Path: ...

    @property
    def iteration(self) -> int: ...


class Display:
    """Receives a run's events in order; this one shows nothing."""

    def loading(self, config: Config) -> None:
        """Prompts, rewards and the model are about to be read."""

    def start(self, run: RunView) -> None:
        """The run is put together."""

    def stage(self, name: str) -> None:
        """A stage of the iteration begins."""

    def progress(self, label: str, done: int, total: int) -> None:
        """So many clips are sampled, of an iteration ("sampling") or of an evaluation."""

    def iteration(self, iteration: int, metrics: dict[str, float]) -> None:
        """An iteration ended."""

    def evaluation(self, split: str, iteration: int, measures: dict[str, dict[str, float]]) -> None:
        """An evaluation ended."""

    def message(self, level: str, message: str) -> None:
        """Something a person should know; level is info, warning or error."""

    def close(self) -> None:
        """The run is over."""


class ConsoleDisplay(Display):
    """A live bar with the stage and the time left on a terminal; one line an iteration in a file or a pipe."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        self.live: Live | None = None
        self.rewards: list[dict[str, float]] = []
        self.seconds: list[float] = []
        self.dev: list[tuple[int, dict[str, dict[str, float]]]] = []
        self._stage_shown = time.monotonic()
        self._clips = self.bar.add_task("", total=1, visible=False, note="")
        self._label, self._label_begun, self._label_first = "", 0.0, 0
        self._evaluated: dict[str, int] = {}  # clips done of evaluations whose end is not told yet
        self._evaluation_seconds: float | None = None  # of one clip, as the last evaluation took
        self._loading: Status | None = None

    def loading(self, config: Config) -> None:
        said = f"loading {config.model.path}, prompts and rewards"
        if self.console.is_terminal:
            self._loading = self.console.status(said)
            self._loading.start()
        else:
            self.console.print(said, highlight=False)

    def start(self, run: RunView) -> None:
        self._loaded()
        config, parts = run.config, run.parts
        self.config, self.splits, self.world = config, tuple(parts.evaluators), parts.processes.world
        self.previewed = parts.preview.shown if parts.preview is not None else 0
        self.geometries = parts.rollouts.geometry, parts.policy.geometry(config.evaluation_sampling)
        facts, g = parts.policy.facts, parts.rollouts.geometry
        lines = [
            f"[bold]{config.recipe}[/bold] on {config.model.path}, seed {config.seed}: {config.run.iterations} "
            f"iterations of {config.prompts.per_iteration} prompts x {config.prompts.group_size} clips "
            f"({g.num_frames} frames, {g.height} x {g.width}, {g.frame_rate:g} Hz)",
            f"LoRA rank {config.model.lora.rank} on {facts['lora_modules']} linears in {facts['blocks']} blocks, "
            f"{facts['lora_parameters']:,} parameters; credit {config.credit.kind}, objective {config.objective.kind}; "
            f"sigmas {', '.join(f'{r.sigma:.3g}' for r in parts.update.rounds)}",
            f"run folder {run.folder}",
        ]
        if run.iteration:
            lines.append(f"resumed after iteration {run.iteration}")
        for line in lines:
            self.console.print(line, highlight=False)
        for split, prompts in parts.prompts.items():
            for note in prompts.notes:
                self.console.print(f"note ({split} prompts): {note}", highlight=False)
        self.task = self.bar.add_task("training", total=config.run.iterations, completed=run.iteration, note="starting")
        self.total = config.run.iterations
        if self.console.is_terminal:
            self.live = Live(self._view(), console=self.console, refresh_per_second=4)
            self.live.start()

    def stage(self, name: str) -> None:
        self._note(name)

    def progress(self, label: str, done: int, total: int) -> None:
        now = time.monotonic()
        if label != self._label:
            self._label, self._label_begun, self._label_first = label, now, done
        if label.startswith(EVALUATING):
            self._evaluated[label] = done
            if done > self._label_first:
                each = (now - self._label_begun) / (done - self._label_first)
                self._evaluation_seconds = each / self.world
        self.bar.update(self._clips, description=f"  {label}", completed=done, total=total, visible=done < total)
        self._note("")
        # In a file: evaluations as they end, and whatever is slow.
        if self.live is None and ((done == total and label.startswith(EVALUATING)) or now - self._stage_shown > SLOW):
            self._stage_shown = now
            self.console.print(f"  {label}: {done}/{total} clips", highlight=False)

    def iteration(self, iteration: int, metrics: dict[str, float]) -> None:
        self.rewards.append({k.split("/", 1)[1]: v for k, v in metrics.items() if k.startswith("reward/")})
        self.seconds.append(metrics["seconds"])
        self.stages = {k.split("/", 1)[1]: v for k, v in metrics.items() if k.startswith("time/")}
        self._stage_shown, self._label = time.monotonic(), ""
        self._evaluated.clear()
        self.bar.update(self.task, completed=iteration + 1)
        self._note("")
        if self.live is None:
            rewards = "  ".join(f"{name} {value:.3f}" for name, value in self.rewards[-1].items())
            self.console.print(
                f"{iteration + 1:4d}/{self.total}  {metrics['seconds']:5.1f} s  {rewards}  left {self._left()}",
                highlight=False,
            )

    def evaluation(self, split: str, iteration: int, measures: dict[str, dict[str, float]]) -> None:
        self.dev.append((iteration, measures))
        self._evaluated.clear()
        if self.live is None:
            listed = "  ".join(f"{name} {m['mean']:.3f}" for name, m in measures.items())
            self.console.print(f"  {split} after {iteration}: {listed}", highlight=False)
        self._note("")

    def message(self, level: str, message: str) -> None:
        style = "dim" if level == "info" else "yellow"
        self.console.print(f"[{style}]{level}:[/{style}] {escape(message)}", highlight=False)

    def _loaded(self) -> None:
        if self._loading is not None:
            self._loading.stop()
            self._loading = None

    def close(self) -> None:
        self._loaded()
        if self.live is not None:
            self.live.update(self._view())
            self.live.stop()
            self.live = None

    def _left(self) -> str:
        """Time for the iterations and evaluations still to come, once there was an iteration to judge by."""
        if not self.seconds:
            return "?"
        recent, done = self.seconds[-5:], int(self.bar.tasks[self.task].completed)
        left = sum(recent) / len(recent) * (self.total - done)
        evaluated = done if self.dev and self.dev[-1][0] == done else done - 1
        clips = evaluation_clips(self.config, self.splits, evaluated, self.previewed) - sum(self._evaluated.values())
        left += max(0, clips) * self._evaluation_each()
        return f"{int(left // 60)}:{int(left % 60):02d}"

    def _evaluation_each(self) -> float:
        """Seconds of one clip of an evaluation: as measured, else by what it has to do more than training's clips."""
        if self._evaluation_seconds is not None:
            return self._evaluation_seconds
        sampling, decode, rewards = (self.stages.get(n, 0.0) for n in ("sampling", "decode", "rewards"))
        clips = self.config.clips_per_iteration
        seconds = StageSeconds(sampling / clips, (decode + rewards) / clips)
        return evaluation_seconds(self.config, seconds, *self.geometries)

    def _note(self, note: str) -> None:
        if hasattr(self, "task"):
            self.bar.update(self.task, note=f"left {self._left()}  {note}")
        if self.live is not None:
            self.live.update(self._view())

    def _view(self) -> Table:
        grid = Table.grid()
        grid.add_row(self.bar)
        if self.rewards:
            table = Table("reward", "first 5", "last 5", "dev base", "dev now", box=None, padding=(0, 2))
            for name in self.rewards[0]:
                values = [r[name] for r in self.rewards if not math.isnan(r[name])]
                first, last = values[:5], values[-5:]
                dev = [m[name]["mean"] for _, m in self.dev if name in m]
                table.add_row(
                    name,
                    f"{sum(first) / len(first):.3f}" if first else "-",
                    f"{sum(last) / len(last):.3f}" if last else "-",
                    f"{dev[0]:.3f}" if dev else "-",
                    f"{dev[-1]:.3f}" if len(dev) > 1 else "-",
                )
            grid.add_row(table)
        return grid


def print_rewards(configs: Sequence[RewardConfig], console: Console) -> None:
    """What each reward judges and loads, whether it can be used here, and what fetches what is missing."""
    table = Table("reward", "scores (route, range)", "reads", "model", "licence", "ready", box=box.SIMPLE_HEAD)
    lacking: dict[str, str] = {}
    for config in configs:
        try:
            reward = build_reward(config)
        except OmniNFTError as error:
            table.add_row(f"[bold]{config.name}[/bold]", "", "", "", "", f"[yellow]{escape(str(error))}[/yellow]")
            continue
        model, missing = reward.model, reward.missing()
        if missing is not None:
            lacking[reward.name] = missing
        ready = "[green]ready[/green]" if missing is None else "[yellow]files missing[/yellow]"
        if not is_verified(reward.name, model):
            ready += ", [dim]unverified[/dim]"
        commercial = model is None or model.commercial
        table.add_row(
            f"[bold]{reward.name}[/bold]",
            "\n".join(_score_line(c) for c in reward.components),
            ", ".join(reward.inputs),
            "a measurement" if model is None else f"{model.name}{_size(model.parameters)}",
            escape(reward.licence) + ("" if commercial else "; [yellow]not cleared for commercial use[/yellow]"),
            ready,
        )
    console.print(table)
    console.print("[dim]unverified: written from its specification, not yet compared with official scores[/dim]")
    for name, missing in lacking.items():
        console.print(f"\n[bold]{name}[/bold]")
        for part in missing.split("; "):
            command = part.removeprefix("fetch by: ")
            console.print(f"  {escape(command)}" if command == part else f"    {escape(command)}", soft_wrap=True)


def _score_line(c: ComponentSpec) -> str:
    unit = "" if c.unit == "1" else f" {c.unit}"
    direction = "" if c.higher_is_better else ", lower is better"
    return f"{c.name} ({c.route}, {c.range[0]:.3g} .. {c.range[1]:.3g}{unit}{direction})"


def _size(parameters: int) -> str:
    if not parameters:
        return ""
    return f", {parameters / 1e9:.2g} B" if parameters >= 1e9 else f", {parameters / 1e6:.3g} M"
