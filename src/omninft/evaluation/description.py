"""What a benchmark is, as data: one value in one file, registered by one line in `catalogue`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from omninft.evaluation.results import Metric
from omninft.evaluation.set_metrics import FeatureDistance
from omninft.prompts.prompt_file import PromptRow

Options = Mapping[str, Any]


def _as_it_is(judge: Any) -> Any:
    return judge


@dataclass(frozen=True)
class JudgeEntry:
    """A judge of single clips: how it is made, and which metrics it gives."""

    make: Callable[..., Any]  # options -> Reward
    metrics: tuple[str, ...]
    quirks: Mapping[str, Options] = field(default_factory=dict)  # quirk -> what it changes in the options
    options: Options = field(default_factory=dict)  # in this benchmark; the user's own come after them
    takes_device: bool = False  # `make` has the option `device`
    takes_wanted: bool = False  # `make` has the option `wanted`: the names of the metrics to compute
    wrap: Callable[[Any], Any] = _as_it_is  # Reward -> Reward, e.g. one that is shown clips in another form
    provenance: str = ""  # what it is, for readers; "": as its judging model says


@dataclass(frozen=True)
class SetEntry:
    """A distance of sets of clips, by features of the name it is filed under."""

    make: Callable[..., FeatureDistance]  # network, real, given, device and a quirk's options
    metrics: tuple[str, ...]
    quirks: Mapping[str, Options] = field(default_factory=dict)


@dataclass(frozen=True)
class ClipForm:
    """What clips must be, where a full-size model makes them."""

    seconds: float
    frame_rate: float  # Hz
    audio_rate: int  # Hz


def _row_categories(row: PromptRow) -> tuple[str, ...]:
    return row.categories


@dataclass(frozen=True)
class BenchmarkDescription:
    """Everything that evaluating needs to know of a benchmark.

    Judges are filed under the names that options on the command line go by. Where no prompts are given, a model is
    asked for `prompts`; where there are none, `fetch_prompts` is what an error says.
    """

    name: str
    version: str  # changes when numbers do
    metrics: tuple[Metric, ...]  # of single clips, in the order of the table
    judges: Mapping[str, JudgeEntry]
    on_request: tuple[str, ...] = ()  # metrics that are not computed unless asked for
    sets: Mapping[str, SetEntry] = field(default_factory=dict)  # "video", "audio"
    quirks: tuple[str, ...] = ()  # of the official code, by name; the benchmark's own name is all of them
    settings: Options = field(default_factory=dict)  # part of the protocol, JSON
    categories: Callable[[PromptRow], tuple[str, ...]] = _row_categories
    form: ClipForm | None = None
    prompts: str | None = None  # a source of `open_rows`
    limit: int | None = None  # prompts of it by default, evenly spaced; None: all
    fetch_prompts: str = ""  # command

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*(m.name for m in self.metrics), *(name for entry in self.sets.values() for name in entry.metrics))
