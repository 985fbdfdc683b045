"""A run's folder: its config, its log, and exact checkpoints of every part that carries state."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml
from torch import Tensor

from omninft.checkpoint.store import CheckpointStore, ensure_writable, flatten_optimizer, restore_optimizer
from omninft.config import Config, load_config
from omninft.files import remove_leftovers, write_text
from omninft.learning.update import PolicyUpdate
from omninft.models.protocol import Trainables, TrainedName
from omninft.runs.build import Parts, new_run_folder
from omninft.runs.lock import RunLock
from omninft.runs.metrics import Level, MetricsLog, read_metrics
from omninft.types import OmniNFTError

RUN_BYTES = 50_000_000  # what a run needs at least to start writing
CONFIG_FILE = "config.yaml"


class Stateful(Protocol):
    """A part that a checkpoint must hold to continue exactly."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Named tensors and JSON values."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """What `state` gave."""
        ...


@dataclass(frozen=True)
class TrainableState:
    """One role of the trained parameters."""

    trainables: Trainables
    name: TrainedName

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.trainables.state(self.name), {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.trainables.load_state(self.name, dict(tensors))


@dataclass(frozen=True)
class OptimiserState:
    """The optimiser, and how often it stepped: the learning rate's warm-up reads it."""

    update: PolicyUpdate

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = flatten_optimizer(self.update.optimiser)
        return tensors, {"optimiser": values, "optimiser_step": self.update.optimiser_step}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        restore_optimizer(self.update.optimiser, tensors, values["optimiser"])
        self.update.optimiser_step = values["optimiser_step"]


def stateful_parts(parts: Parts) -> dict[str, Stateful]:
    """By the name that their file has in a checkpoint."""
    return {
        "current": TrainableState(parts.policy.trainables, "current"),
        "old": TrainableState(parts.policy.trainables, "old"),
        "optimiser": OptimiserState(parts.update),
        "credit": parts.credit,
        "objective": parts.objective,
    }


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    iteration: int = 0  # iterations done
    elapsed: float = 0.0  # s, over all sessions


class RunFolder:
    """Where a run keeps what it needs to go on and to be explained. Rank 0 alone writes, and locks it until `close`.

    `notes` is what a person should know of the last `open` or `write`, on rank 0.
    """

    def __init__(self, parts: Parts, path: Path | None) -> None:
        self.processes = parts.processes
        self.config, self.parts = parts.config, stateful_parts(parts)
        # One process decides: a moment later the folder it makes would send another to the next free name.
        self._place(self.processes.gather(path or new_run_folder(self.config))[0])
        self._given = path is not None
        self.log: MetricsLog | None = None  # rank 0 only
        self.notes: list[tuple[Level, str]] = []
        self._whole_at: int | None = None  # the iteration whose checkpoint this process read or wrote

    def _place(self, path: Path) -> None:
        self.path = path
        self.store = CheckpointStore(path, self.config.run.keep_last)
        self.lock = RunLock(path)

    def open(self, resume: bool) -> Progress:
        """Create the folder, or restore the last whole checkpoint in it and take back what was logged after it.

        Raises:
            OmniNFTError: on every process: another process works on the run, no checkpoint is whole, or one is of
                another config. What the run wrote is then as it was.
        """
        self.notes = []
        if not self._given and (made := self._together(partial(make_run_folder, self.config))) is not None:
            self._place(made)
        try:
            path = self._claim(resume)
            progress = Progress() if path is None else self._restore(path)
            self._together(partial(self._begin, resume, progress))
        except BaseException:
            self.close()
            raise
        return progress

    def close(self) -> None:
        """End the log, and let other processes have the folder."""
        if self.log is not None:
            self.log.close()
            self.log = None
        self.lock.release()

    def _together(self, act: Callable[[], Path | None]) -> Path | None:
        """What `act` returns on rank 0, which alone does it; its OmniNFTError is every process's.

        The others would wait for good for a process that raised alone.
        """
        found: tuple[Path | None, str | None] = None, None
        if self.processes.is_main:
            try:
                found = act(), None
            except OmniNFTError as error:
                found = None, str(error)
        path, problem = self.processes.gather(found)[0]
        if problem is not None:
            raise OmniNFTError(problem)
        return path

    def _claim(self, resume: bool) -> Path | None:
        """Lock the folder; the checkpoint to go on from, None where the run starts from nothing."""

        def claim() -> Path | None:
            self.lock.acquire()
            if self.lock.warning is not None:
                self.notes.append(("warning", self.lock.warning))
            return self._newest() if resume else None

        return self._together(claim)

    def _newest(self) -> Path | None:
        path, damaged = self.store.latest(), list(self.store.warnings)
        if path is None and self.store.list_checkpoints():
            raise OmniNFTError(
                f"{self.store.folder}: found no whole checkpoint, expected one to go on from; nothing was changed. "
                + "; ".join(damaged)
            )
        self.notes += [("warning", message) for message in damaged]
        if path is None:
            self.notes.append(("info", f"{self.path} stopped before its first checkpoint: the run starts anew"))
        return path

    def _restore(self, path: Path) -> Progress:
        saved = self.store.load(path, self.config.fingerprint())
        try:
            for name, part in self.parts.items():
                part.load_state(saved.tensors.get(name, {}), saved.state["parts"][name])
            self._whole_at = saved.state["iteration"]
            return Progress(saved.state["iteration"], saved.state["elapsed"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise OmniNFTError(f"{path}: not the state of such a run ({type(error).__name__}: {error})") from error

    def _begin(self, resume: bool, progress: Progress) -> None:
        """The first writes, once nothing can refuse the run any more."""
        tree = json.loads(self.config.model_dump_json())
        ensure_writable(self.path, RUN_BYTES)
        if not resume:
            write_text(self.path / CONFIG_FILE, yaml.safe_dump(tree, sort_keys=False))
        elif self.lock.held:  # without the lock they may be those of a process at work
            remove_leftovers(self.path)
            self.store.clean()
        self.log = MetricsLog(self.path, self.config.run.loggers, tree, self.config.run.wandb)
        self.notes += [("warning", message) for message in self.log.warnings]
        if resume:
            self.log.rewind(progress.iteration)

    def is_evaluated(self, split: str, iteration: int) -> bool:
        """Whether the log holds this evaluation, on every process."""
        rows = read_metrics(self.path) if self.processes.is_main else []
        wanted = {"kind": "evaluation", "split": split, "iteration": iteration}
        return self.processes.gather(any(wanted.items() <= row.items() for row in rows))[0]

    def save(self, progress: Progress) -> None:
        """An exact checkpoint of the state after `progress.iteration` iterations, unless there is one."""
        self.write(progress)
        self.processes.wait()

    def write(self, progress: Progress) -> None:
        """As `save`, without waiting for the other processes."""
        self.notes = []
        # A folder of that name may be a damaged one, which is then replaced.
        if self.processes.is_main and self._whole_at != progress.iteration:
            made = {name: part.state() for name, part in self.parts.items()}
            tensors = {name: found for name, (found, _) in made.items() if found}
            values = {name: found for name, (_, found) in made.items()}
            state = {"iteration": progress.iteration, "elapsed": progress.elapsed, "parts": values}
            self.store.save(progress.iteration, tensors, state, self.config.fingerprint())
            self._whole_at = progress.iteration
            self.notes = [("warning", message) for message in self.store.warnings]


def make_run_folder(config: Config) -> Path:
    """`new_run_folder`, made. Runs that start at the same moment get a folder each.

    Raises:
        OmniNFTError: it cannot be made, or holds a run of the name that the config gives.
    """
    while True:
        folder = new_run_folder(config)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Whose name was given is one run's: the lock keeps others out.
            folder.mkdir(exist_ok=config.run.name is not None)
        except FileExistsError as error:
            if config.run.name is None and folder.exists():
                continue
            raise OmniNFTError(f"{folder}: cannot be made ({error.strerror})") from error
        except OSError as error:
            raise OmniNFTError(f"{folder}: cannot be made ({error.strerror})") from error
        return folder


def read_run_config(folder: Path, overrides: list[str] | None = None) -> Config:
    """The resolved config of a run folder, with overrides (a longer run, other logging) on top.

    Raises:
        OmniNFTError: no run there, or its config is empty or no mapping.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise OmniNFTError(f"{folder} is no run folder: it has no {CONFIG_FILE}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise OmniNFTError(f"{path} cannot be read: {error}; expected the recipe of the run") from error
    if tree is None or tree == {}:
        raise OmniNFTError(f"{path} is empty: expected the recipe of the run; the disk may have lost it")
    if not isinstance(tree, dict):
        raise OmniNFTError(f"{path}: found a {type(tree).__name__}, expected a mapping: the recipe of the run")
    return load_config(str(path), overrides)
