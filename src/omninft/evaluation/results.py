"""What an evaluation of one system gives, on disk and in memory: the hand-over from evaluating to ranking and showing.

A folder of an evaluation holds result.json (this), table.md and table.csv. Rows of different protocols are never
compared: `Protocol.digest` covers everything that changes a number but the system itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from omninft.evaluation.paired import Estimate
from omninft.files import first_problem, read_json, write_text
from omninft.types import OmniNFTError

RESULT_FILE = "result.json"
FORMAT = 1


@dataclass(frozen=True)
class Metric:
    """One column of a benchmark's table."""

    name: str  # key in files, e.g. "av_ib"
    label: str  # heading, e.g. "AV-IB"
    description: str
    higher_is_better: bool = True
    unit: str = ""  # "s", "ms"; empty for a plain number
    decimals: int = 3


@dataclass(frozen=True)
class Protocol:
    """How numbers were made. `settings` is JSON: prompts digest, window lengths, compat switches, weights checksums."""

    benchmark: str  # "javisbench", "vbench", "world"
    version: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """12 hexadecimal digits; equal digests may be ranked together."""
        text = json.dumps([self.benchmark, self.version, self.settings], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class ClipScores:
    """One clip: None where a score is missing, and why."""

    index: int  # row of the prompt file
    file: str  # relative to the folder of clips
    prompt_id: str
    prompt: str
    categories: tuple[str, ...]
    scores: dict[str, float | None]
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricResult:
    """A metric over a set of clips. The interval is 95 %, by a bootstrap over prompts; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    count: int = 0  # clips that have a score
    missing: int = 0  # clips that have none

    @property
    def estimate(self) -> Estimate:
        return Estimate(*(math.nan if v is None else v for v in (self.value, self.low, self.high)))


@dataclass(frozen=True)
class EvaluationResult:
    """One system on one benchmark."""

    system: str  # name to show
    protocol: Protocol
    metrics: tuple[Metric, ...]
    overall: dict[str, MetricResult]  # metric name -> over all clips
    categories: dict[str, dict[str, MetricResult]]  # category -> metric name -> over its clips
    clips: tuple[ClipScores, ...]
    generation: dict[str, Any] = field(default_factory=dict)  # model, LoRA, seed, steps, guidance; what is known
    weights: dict[str, str] = field(default_factory=dict)  # judging model -> checksums, revision, versions
    notes: tuple[str, ...] = ()  # what a reader must know, e.g. metrics left out and why

    def save(self, folder: Path) -> Path:
        """Write result.json there, whole or not at all. Raises OmniNFTError when it cannot be written."""
        path = folder / RESULT_FILE
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False) + "\n")
        return path

    @staticmethod
    def load(path: Path) -> EvaluationResult:
        """What `save` wrote, given the file or its folder.

        Raises:
            OmniNFTError: no such file, or not such a file.
        """
        path = path / RESULT_FILE if path.is_dir() else path
        if not path.exists():
            raise OmniNFTError(f"{path}: cannot be read: no such file; `omninft evaluate` writes it")
        tree = read_json(path, "not a result of `omninft evaluate`: ")
        try:
            if not isinstance(tree, dict) or tree.pop("format", None) != FORMAT:
                raise ValueError(f"expected an object of format {FORMAT}")
            result = TypeAdapter(EvaluationResult).validate_python(tree)
            _ = result.protocol.digest  # of finite numbers
        except ValueError as error:
            raise OmniNFTError(f"{path}: not a result of `omninft evaluate` ({first_problem(error)})") from error
        return result
