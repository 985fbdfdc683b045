"""A run's folder: its config, its log, and exact checkpoints of every part that carries state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from torch import Tensor

from omninft.checkpoint.store import CheckpointStore, ensure_writable, flatten_optimizer, restore_optimizer
from omninft.config import Config, load_config
from omninft.files import write_text
from omninft.learning.update import PolicyUpdate
from omninft.models.protocol import Trainables, TrainedName
from omninft.runs.build import Parts, new_run_folder
from omninft.runs.metrics import MetricsLog
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
    """Where a run keeps what it needs to go on and to be explained. Rank 0 alone writes."""

    def __init__(self, parts: Parts, path: Path | None) -> None:
        self.processes = parts.processes
        # One process decides: a moment later the folder it makes would send another to the next free name.
        self.path = self.processes.gather(path or new_run_folder(parts.config))[0]
        self.store = CheckpointStore(self.path, parts.config.run.keep_last)
        self.config, self.parts = parts.config, stateful_parts(parts)
        self.log: MetricsLog | None = None  # rank 0 only
        self._whole: int | None = None  # iteration of the checkpoint that this session restored or wrote last

    def open(self, resume: bool) -> Progress:
        """Create the folder, or restore the last whole checkpoint in it and take back what was logged after it."""
        tree = json.loads(self.config.model_dump_json())
        if self.processes.is_main:
            ensure_writable(self.path, RUN_BYTES)
            if not resume:
                write_text(self.path / CONFIG_FILE, yaml.safe_dump(tree, sort_keys=False))
            self.log = MetricsLog(self.path, self.config.run.loggers, tree)
        self.processes.wait()
        if not resume:
            return Progress()
        progress = self._restore()
        if self.log is not None:
            self.log.rewind(progress.iteration)
        return progress

    def _restore(self) -> Progress:
        path = self.store.latest()
        if path is None:
            return Progress()
        saved = self.store.load(path, self.config.fingerprint())
        for name, part in self.parts.items():
            part.load_state(saved.tensors.get(name, {}), saved.state["parts"][name])
        progress = Progress(saved.state["iteration"], saved.state["elapsed"])
        self._whole = progress.iteration
        return progress

    def save(self, progress: Progress) -> None:
        """An exact checkpoint of the state after `progress.iteration` iterations, unless there is one.

        A damaged one, which `open` passed over, is replaced.
        """
        if self.processes.is_main and self._whole != progress.iteration:
            made = {name: part.state() for name, part in self.parts.items()}
            tensors = {name: found for name, (found, _) in made.items() if found}
            values = {name: found for name, (_, found) in made.items()}
            state = {"iteration": progress.iteration, "elapsed": progress.elapsed, "parts": values}
            self.store.save(progress.iteration, tensors, state, self.config.fingerprint())
            self._whole = progress.iteration
        self.processes.wait()


def read_run_config(folder: Path, overrides: list[str] | None = None) -> Config:
    """The resolved config of a run folder, with overrides (a longer run, other logging) on top.

    Raises:
        OmniNFTError: no run there.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise OmniNFTError(f"{folder} is no run folder: it has no {CONFIG_FILE}")
    return load_config(str(path), overrides)
