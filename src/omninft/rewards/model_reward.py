"""Rewards over judging models: loaded on first use, clips prepared by workers, forward passes in batches."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from omninft.clips.workers import in_workers
from omninft.distributed import available_cores, default_device
from omninft.hub import Need
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers.weights import JudgingModel
from omninft.types import Clip, OmniNFTError, ScoreTable

Prepared = TypeVar("Prepared")
Item = TypeVar("Item")
Result = TypeVar("Result")


class ModelReward(ABC, Generic[Prepared]):
    """What the learned rewards have in common. A reward says how its scorer is loaded, fed and read.

    `path` is a local file or folder with the weights (default: the caches), `device` where the model runs (default: the
    GPU of this process where there is one), `budget` the size of a forward pass in the scorer's own unit (tokens,
    segments, frames). `scorer` takes a ready one instead.
    """

    name: str
    components: tuple[ComponentSpec, ...]
    inputs: tuple[Input, ...]
    model: JudgingModel | None
    default_budget: int = 32
    wave: int | None = None  # clips prepared at a time, where what is prepared is large; None: all

    def __init__(
        self,
        path: str | Path | None = None,
        device: str | None = None,
        dtype: str = "float32",
        budget: int | None = None,
        workers: int | None = None,
        scorer: Any = None,
    ) -> None:
        self.path, self.device = path, device or default_device()
        self.dtype = _dtype(dtype, self.name)
        self.budget = budget or self.default_budget
        self.workers = workers or available_cores()
        self._scorer = scorer
        self._failure: OmniNFTError | None = None
        self._lock = threading.Lock()

    @property
    def licence(self) -> str:
        return self.model.licence if self.model is not None else "this package's"

    @property
    def scorer(self) -> Any:
        """The judging model; loaded on first use, by one thread. A load that failed is not tried again."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._scorer is None:
                try:
                    self._scorer = self.load()
                except OmniNFTError as error:
                    self._failure = error
                    raise
        return self._scorer

    def missing(self) -> str | None:
        """None when the reward can be used, else what is missing and the command that fetches it."""
        if self._scorer is not None or self.model is None:
            return None
        return self.model.missing(self.path)

    @property
    def needs(self) -> tuple[Need, ...]:
        """The files it loads, for `omninft fetch`; none where they come with a package."""
        return (self.model.need(self.path),) if self.model is not None and self.model.files else ()

    @abstractmethod
    def load(self) -> Any:
        """The scorer on `device`, in eval mode. Raises OmniNFTError for missing or wrong weights."""

    @abstractmethod
    def prepare(self, clip: Clip) -> Prepared:
        """What `judge` needs of one clip; CPU work, called by several threads. Raises OmniNFTError: not judgeable."""

    @abstractmethod
    def judge(self, prepared: list[Prepared]) -> np.ndarray:
        """[len(prepared), components], NaN where a score is undefined; forward passes within `budget`."""

    def score(self, clips: list[Clip]) -> ScoreTable:
        """[B, K]; a clip that cannot be prepared is missing with the reason, the others are judged."""
        why = self.missing()
        if why is not None:
            raise OmniNFTError(why)
        _ = self.scorer  # a load that fails is the batch's error, not each clip's
        values = np.full((len(clips), len(self.components)), np.nan)
        reasons: dict[tuple[int, int], str] = {}
        wave = self.wave or max(1, len(clips))
        for start in range(0, len(clips), wave):
            ready: list[tuple[int, Prepared]] = []
            for b, outcome in enumerate(in_workers(self.prepare, clips[start : start + wave], self.workers), start):
                if isinstance(outcome, OmniNFTError):
                    reasons |= {(b, k): str(outcome) for k in range(len(self.components))}
                else:
                    ready.append((b, outcome))
            if ready:
                with torch.inference_mode():
                    values[[b for b, _ in ready]] = self.judge([item for _, item in ready])
        return ScoreTable(tuple(spec.component for spec in self.components), values, reasons)


def prompt_text(clip: Clip, field: Input) -> str:
    """`prompt_v`, `prompt_a` or `prompt_av` of a clip.

    Raises:
        OmniNFTError: the clip comes without that prompt.
    """
    text = str(getattr(clip.prompt, field))
    if not text.strip():
        raise OmniNFTError(f"needs {field}, and the clip has none")
    return text


def _dtype(name: str, reward: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise OmniNFTError(f"reward {reward!r}: dtype is {name!r}, expected one of: {', '.join(known)}")
    return known[name]
