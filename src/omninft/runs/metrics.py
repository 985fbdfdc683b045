"""What a run records while it trains: `metrics.jsonl`, and the same numbers in TensorBoard, W&B or trackio.

`metrics.jsonl` is the record that reports read; the loggers are views of it. One JSON object a line, by `kind`:

    iteration    iteration, and any numbers by name ("reward/sync", "gradient_norm/video", ...)
    evaluation   split, iteration, measures: name -> {mean, low, high, n}
    event        iteration, level ("info" | "warning" | "error"), message

An evaluation at iteration i measures the policy that i iterations made, so the one at 0 measures the base.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TextIO

import numpy as np
import yaml

from omninft.config import WandbConfig
from omninft.files import json_object, read_json_lines, write_atomically, write_text
from omninft.types import Clip, OmniNFTError

LoggerName = Literal["tensorboard", "wandb", "trackio"]
Level = Literal["info", "warning", "error"]
FILE_NAME = "metrics.jsonl"
DAMAGED_NAME = "metrics.damaged"  # lines that were no rows
ID_NAME = "tracker_id.txt"
STRIP_FRAMES = 8  # of a clip, side by side in TensorBoard


class Sink(Protocol):
    """Where numbers go beside `metrics.jsonl`."""

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None: ...

    def text(self, name: str, iteration: int, text: str) -> None: ...

    def clips(self, tag: str, iteration: int, clips: Sequence[tuple[Path, Clip]]) -> None: ...

    def rewind(self, iteration: int, kept: Mapping[str, float]) -> None:
        """Forget steps from `iteration` on; `kept` are the numbers of that step that stay."""

    def close(self) -> None: ...


class MetricsLog:
    """The metrics of one run, written by one process (rank 0); use it as a context manager.

    Every row is one flushed write, so a killed run loses the row it was writing and no other. Opening a log whose
    last line was cut mends it; a damaged line is moved to `metrics.damaged` and told in `warnings`. Rows of
    iterations and evaluations are on the disk when their call returns. Values may be Python, numpy or torch scalars;
    those that are not finite become null.
    """

    def __init__(
        self,
        run_dir: str | Path,
        loggers: Sequence[LoggerName] = (),
        config: Mapping[str, Any] | None = None,
        wandb: WandbConfig | None = None,
    ) -> None:
        """Open or create the log in `run_dir`; `config` (the resolved tree) is shown by the loggers.

        Raises OmniNFTError as `require_loggers`.
        """
        require_loggers(loggers)
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._sinks = [_open_sink(name, self.path.parent, config or {}, wandb or WandbConfig()) for name in loggers]
        _mend_last_line(self.path)
        self.warnings = _set_aside_damaged(self.path)
        self._file = self._open()

    def iteration(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Record the numbers of one finished iteration."""
        plain = {name: _plain(value) for name, value in values.items()}
        self._append({"kind": "iteration", "iteration": iteration, **plain}, sync=True)
        self._scalars(iteration, plain)

    def evaluation(self, split: str, iteration: int, measures: Mapping[str, Mapping[str, Any]]) -> None:
        """Record the measures ({mean, low, high, n} each) of the policy that `iteration` iterations made."""
        plain = {name: {key: _plain(v) for key, v in numbers.items()} for name, numbers in measures.items()}
        self._append({"kind": "evaluation", "split": split, "iteration": iteration, "measures": plain}, sync=True)
        self._scalars(iteration, _flat(split, plain))

    def event(self, iteration: int, level: Level, message: str) -> None:
        """Record something a person should know, such as a warning."""
        self._append({"kind": "event", "iteration": iteration, "level": level, "message": message})
        for sink in self._sinks:
            sink.text(f"event/{level}", iteration, message)

    def clips(self, tag: str, iteration: int, clips: Sequence[tuple[Path, Clip]]) -> None:
        """Show clips (the written file, and what is in it) in the loggers; `metrics.jsonl` does not hold them."""
        for sink in self._sinks:
            sink.clips(tag, iteration, clips)

    def rewind(self, iteration: int) -> int:
        """Forget what is done again when the run goes on from the checkpoint after `iteration` iterations.

        Rows of iterations from `iteration` on go (numbers start from 0), and evaluations of policies that more than
        `iteration` iterations made. Events stay: that a run failed and was resumed is part of its story. TensorBoard
        forgets too; W&B and trackio cannot, there the iterations appear a second time.

        Returns the number of rows taken out. The file is replaced in one step.
        """
        rows = read_metrics(self.path.parent)
        kept = [row for row in rows if not _is_done_again(row, iteration)]
        if len(kept) < len(rows):
            self._file.close()
            write_text(self.path, "".join(_line(row) for row in kept))
            self._file = self._open()
        at_checkpoint: dict[str, Any] = {}
        for row in kept:
            if row.get("kind") == "evaluation" and row.get("iteration") == iteration:
                at_checkpoint |= _flat(str(row.get("split")), row.get("measures") or {})
        for sink in self._sinks:
            sink.rewind(iteration, _numbers(at_checkpoint))
        return len(rows) - len(kept)

    def close(self) -> None:
        with suppress(OSError):  # of a row that `_append` could not write, and has told of
            self._file.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> TextIO:
        return self.path.open("a", encoding="utf-8")

    def _append(self, row: Mapping[str, Any], sync: bool = False) -> None:
        try:
            self._file.write(_line(row))
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise OmniNFTError(f"{self.path}: cannot be written ({error})") from error

    def _scalars(self, iteration: int, values: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.scalars(iteration, _numbers(values))


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl` in file order; none when there is no such file yet.

    A last line that a killed process cut short is left out. Raises OmniNFTError, with the line's number, for any
    other line that is not a JSON object.
    """
    return read_json_lines(Path(run_dir) / FILE_NAME)


def _mend_last_line(path: Path) -> None:
    """Make a file that ends inside a line end after it (if it is whole) or before it."""
    if not path.is_file():
        return
    content = path.read_bytes()
    if not content or content.endswith(b"\n"):
        return
    start = content.rfind(b"\n") + 1
    with path.open("r+b") as file:
        if json_object(content[start:]) is None:
            file.truncate(start)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def _set_aside_damaged(path: Path) -> list[str]:
    """Move lines that are no JSON objects to a file beside `path`, which is replaced in one step; says which."""
    if not path.is_file():
        return []
    kept: list[bytes] = []
    warnings: list[str] = []
    damaged = path.with_name(DAMAGED_NAME)
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.strip() or json_object(line) is not None:
            kept.append(line)
            continue
        warnings.append(
            f"{path}, line {number}: expected a JSON object, found {line[:60]!r}; it is kept in {damaged.name}"
        )
        with damaged.open("ab") as file:
            file.write(line)
    if warnings:
        write_atomically(path, lambda temporary: temporary.write_bytes(b"".join(kept)))
    return warnings


def _is_done_again(row: Mapping[str, Any], iteration: int) -> bool:
    at = row.get("iteration")
    if row.get("kind") == "event" or not isinstance(at, int):
        return False
    return at > iteration if row.get("kind") == "evaluation" else at >= iteration


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """A JSON value: scalars of numpy and torch as Python numbers, and null for what is not finite."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(split: str, measures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Measures of an evaluation by the names that loggers show: dev/sync, dev/sync_low, dev/sync_high."""
    suffixes = {"mean": "", "low": "_low", "high": "_high"}
    return {
        f"{split}/{name}{suffix}": numbers.get(key)
        for name, numbers in measures.items()
        for key, suffix in suffixes.items()
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def require_loggers(names: Sequence[str]) -> None:
    """Import what the loggers need; opens none of them.

    Raises:
        OmniNFTError: a logger is unknown, not installed (with the command that installs it), or cannot be imported.
    """
    for name in names:
        if name not in _MODULES:
            raise OmniNFTError(f"unknown logger {name!r}, expected one of: {', '.join(_MODULES)}")
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            why = f"cannot be imported: {error}"
            if (error.name or "").partition(".")[0] == name:
                package = name if name == "tensorboard" else f"'omninft[{name}]'"
                why = f"is not installed: pip install {package}"
            raise OmniNFTError(f"run.loggers names {name}, which {why}") from error


_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def _open_sink(name: str, run_dir: Path, config: Mapping[str, Any], wandb: WandbConfig) -> Sink:
    plain = json.loads(json.dumps(config))  # tuples as lists, as YAML and the services want them
    return _TensorBoard(run_dir, plain) if name == "tensorboard" else _Hosted(name, run_dir, plain, wandb)


def _tracker_id(run_dir: Path) -> str:
    """Of the run among all runs of a project: drawn once, kept in its folder."""
    path = run_dir / ID_NAME
    found = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not found:
        found = secrets.token_hex(4)
        write_text(path, f"{found}\n")
    return found


class _TensorBoard:
    """Event files under `tensorboard/`.

    TensorBoard encodes videos with moviepy, without sound; a clip is shown as a strip of frames and a playable sound
    instead, and the clip itself is in `samples/`.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._folder = str(run_dir / "tensorboard")
        self._writer = self._open(purge_step=None)
        if config:
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            # Four spaces make Markdown show it verbatim.
            self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))

    def _open(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._folder, purge_step=purge_step)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def text(self, name: str, iteration: int, text: str) -> None:
        self._writer.add_text(name, text, iteration)

    def clips(self, tag: str, iteration: int, clips: Sequence[tuple[Path, Clip]]) -> None:
        for path, clip in clips:
            name = f"{tag}/{path.stem}"
            self._writer.add_image(name, frame_strip(clip), iteration, dataformats="HWC")
            if clip.waveform.size:
                mono = clip.waveform.mean(axis=0).clip(-1, 1)
                self._writer.add_audio(name, mono[None], iteration, sample_rate=clip.sample_rate)
        self._writer.flush()

    def rewind(self, iteration: int, kept: Mapping[str, float]) -> None:
        self._writer.close()
        self._writer = self._open(purge_step=iteration)
        self.scalars(iteration, kept)

    def close(self) -> None:
        self._writer.close()


class _Hosted:
    """W&B or trackio, which share an interface. Both only append: `iteration` is a logged number and the x axis."""

    def __init__(self, name: str, run_dir: Path, config: Mapping[str, Any], settings: WandbConfig) -> None:
        self._module = importlib.import_module(name)
        self._media = settings.media
        title, run_id = run_dir.absolute().name, _tracker_id(run_dir)
        options: dict[str, Any] = {"project": settings.project, "group": settings.group}
        if name == "wandb":
            options |= {"entity": settings.entity, "tags": list(settings.tags) or None, "mode": settings.mode}
            options |= {"id": run_id, "name": title, "dir": str(run_dir.absolute())}
        else:
            options["name"] = f"{title}-{run_id}"  # by which trackio finds a run to go on with
        given = {key: value for key, value in options.items() if value is not None}
        self._run = self._module.init(config=dict(config), resume="allow", **given)
        if name == "wandb":
            self._run.define_metric("*", step_metric="iteration")

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log({"iteration": iteration, **values})

    def text(self, name: str, iteration: int, text: str) -> None:
        self._run.log({"iteration": iteration, name: text})

    def clips(self, tag: str, iteration: int, clips: Sequence[tuple[Path, Clip]]) -> None:
        if not self._media or not clips:
            return
        video = self._module.Video
        videos = {
            f"{tag}/{path.stem}": video(str(path), caption=clip.prompt.prompt_av, format="mp4") for path, clip in clips
        }
        self._run.log({"iteration": iteration, **videos})

    def rewind(self, iteration: int, kept: Mapping[str, float]) -> None:
        self.text("event/info", iteration, f"resumed from the checkpoint after {iteration} iterations")

    def close(self) -> None:
        self._run.finish()


def frame_strip(clip: Clip, num_frames: int = STRIP_FRAMES) -> np.ndarray:
    """Evenly spaced frames of a clip, first and last included, side by side: uint8 [H, num_frames * W, 3]."""
    indices = np.round(np.linspace(0, len(clip.video) - 1, min(num_frames, len(clip.video)))).astype(int)
    return np.concatenate(list(clip.video[indices]), axis=1)
