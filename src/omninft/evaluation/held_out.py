"""Sampling, scoring and writing the clips of a fixed evaluation set."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from omninft.clips.listing import ListedClip, write_listing
from omninft.clips.media import write_clip
from omninft.distributed import Processes
from omninft.files import first_problem, read_json, write_text
from omninft.models.protocol import AdapterName
from omninft.naming import clip_file
from omninft.noise import Occasion
from omninft.prompts.sampler import spread
from omninft.rollout.clips import roll_out
from omninft.rollout.sampler import RolloutSampler, share_of
from omninft.types import Clip, OmniNFTError, PromptGroup, ScoreTable

_SCORES: dict[str, Any] = {"names": tuple[str, ...], "prompt_ids": tuple[str, ...], "values": list[list[float | None]]}
SHOWN_SIDE = 256  # pixels: smaller clips are enlarged to about this, so that players show them


@dataclass(frozen=True)
class EvaluationScores:
    """Scores of one policy on one evaluation set; rows are in a fixed order, so two of them are paired."""

    names: tuple[str, ...]
    values: np.ndarray  # [n, K], NaN where missing
    prompt_ids: tuple[str, ...]
    shown: tuple[tuple[Path, Clip], ...] = ()  # clips this process wrote


class EvaluationCut(Exception):
    """An evaluation stopped between batches because it was asked to; raised in every process."""


def save_scores(path: Path, scores: EvaluationScores) -> None:
    """Every value of an evaluation, so that other runs can be paired with it later."""
    rows = [[float(v) if np.isfinite(v) else None for v in row] for row in scores.values]
    tree = {"names": scores.names, "prompt_ids": scores.prompt_ids, "values": rows}
    write_text(path, json.dumps(tree, allow_nan=False))


def load_scores(path: Path) -> EvaluationScores:
    """What `save_scores` wrote.

    Raises:
        OmniNFTError: no such file, or not such a file.
    """
    tree = read_json(path, "not the scores of an evaluation: ")
    try:
        names, ids, rows = (TypeAdapter(kind).validate_python(tree[name]) for name, kind in _SCORES.items())
        values = np.array(rows, dtype=np.float64).reshape(len(ids), len(names))
    except (ValueError, LookupError, TypeError) as error:
        why = first_problem(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise OmniNFTError(f"{path}: not the scores of an evaluation ({why})") from error
    return EvaluationScores(names, values, ids)


class Evaluator:
    """Runs one evaluation set (dev or test) for any adapter.

    Args:
        sampler: how its clips are sampled.
        groups: its clips.
        seed, occasion: key the noise: the same for every policy that is evaluated, apart from training's.
        score: clips -> ScoreTable of every trained and held-out measure.
        shown: number of clips that are written as files.
    """

    def __init__(
        self,
        sampler: RolloutSampler,
        groups: Sequence[PromptGroup],
        seed: int,
        occasion: Occasion,
        score: Callable[[list[Clip]], ScoreTable],
        processes: Processes,
        shown: int = 0,
    ) -> None:
        self.sampler, self.groups, self.score, self.processes = sampler, tuple(groups), score, processes
        self.seed, self.occasion, self.shown = seed, occasion, shown

    def run(
        self,
        adapter: AdapterName,
        folder: Path | None,
        progress: Callable[[int, int], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> EvaluationScores:
        """Sample, decode, score; the clips to show go to `folder` with a scores.json.

        Raises:
            EvaluationCut: `stop`, asked before each batch, said so in some process. Each process asks for itself and
                they agree after their last batches, for they may have different numbers of batches.
        """
        total = sum(len(g.samples) for g in self.groups)
        shown = set(spread(self.shown, total)) if folder is not None else set()
        tables = [self.score([])]  # columns, for a process that has no clips
        entries: list[ListedClip] = []
        written: list[tuple[Path, Clip]] = []
        rank, world = self.processes.rank, self.processes.world
        done, end = share_of(total, rank, world).start, share_of(total, rank, world).stop
        made = roll_out(self.sampler, self.groups, self.seed, self.occasion, adapter, rank=rank, world=world)
        while done < end and not stop():
            _, clips = next(made)
            table = self.score(clips)
            tables.append(table)
            for i, clip in enumerate(clips):
                if done + i in shown and folder is not None:
                    entries.append(self._show(clip, table, i, folder))
                    written.append((folder / entries[-1].file, clip))
            done += len(clips)
            if progress is not None:
                progress(done, total)
        if self.processes.any(done < end):
            raise EvaluationCut
        table = ScoreTable.cat(self.processes.gather(ScoreTable.cat(tables)))
        entries = [entry for part in self.processes.gather(entries) for entry in part]
        if folder is not None and self.processes.is_main:
            write_listing(folder, entries)
        ids = tuple(g.prompt.id for g in self.groups for _ in g.samples)
        return EvaluationScores(table.names, table.values, ids, tuple(written))

    def _show(self, clip: Clip, table: ScoreTable, row: int, folder: Path) -> ListedClip:
        name = clip_file(clip.prompt.id, clip.sample)
        write_clip(folder / name, clip, upscale=max(1, SHOWN_SIDE // max(clip.video.shape[1:3])))
        scores = {n: float(v) for n, v in zip(table.names, table.values[row], strict=True)}
        reasons = {table.names[k]: why for (b, k), why in table.reasons.items() if b == row}
        return ListedClip.of(clip, name, scores, reasons)
