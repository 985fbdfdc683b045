"""`omninft score`: rewards on clips that are already files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from omninft.config import RewardConfig
from omninft.decode.media import read_clip
from omninft.prompts.sources import open_prompts
from omninft.rewards.registry import build_reward
from omninft.rewards.runner import RewardRunner
from omninft.types import Clip, OmniNFTError, Prompt

CHUNK = 32  # clips held in memory at a time


@dataclass(frozen=True)
class FileScores:
    """One file: its scores, None where missing, and why."""

    file: str
    prompt_id: str
    scores: dict[str, float | None]
    reasons: dict[str, str]


@dataclass(frozen=True)
class ScoreResult:
    """All files, in the order of their names."""

    names: tuple[str, ...]
    rows: tuple[FileScores, ...]

    def means(self) -> dict[str, float | None]:
        """Mean over the files that could be scored."""
        columns = {n: [r.scores[n] for r in self.rows if r.scores[n] is not None] for n in self.names}
        return {n: float(np.mean(v)) if v else None for n, v in columns.items()}  # type: ignore[arg-type]

    def write(self, path: Path) -> None:
        """A .csv or .json table.

        Raises:
            OmniNFTError: another ending.
        """
        if path.suffix == ".json":
            tree = {"clips": [asdict(r) for r in self.rows], "means": self.means()}
            path.write_text(json.dumps(tree, indent=1), encoding="utf-8")
        elif path.suffix == ".csv":
            text = io.StringIO()
            writer = csv.writer(text)
            writer.writerow(["file", "prompt_id", *self.names, "missing"])
            for row in self.rows:
                missing = "; ".join(f"{n}: {why}" for n, why in row.reasons.items())
                writer.writerow([row.file, row.prompt_id, *row.scores.values(), missing])
            path.write_text(text.getvalue(), encoding="utf-8")
        else:
            raise OmniNFTError(f"cannot write {path}: found ending {path.suffix!r}, expected .csv or .json")


def score_files(
    folder: Path,
    rewards: list[str],
    prompts: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ScoreResult:
    """Score every mp4 of a folder. A file that cannot be read is reported and the others are scored.

    Raises:
        OmniNFTError: no clips, or an unknown reward.
    """
    files = [folder] if folder.is_file() else sorted(folder.glob("*.mp4"))
    if not files:
        raise OmniNFTError(f"no mp4 files in {folder}")
    runner = RewardRunner([build_reward(RewardConfig(name=name)) for name in rewards], max_missing_share=1.0)
    known = _known_prompts(files[0].parent, prompts)
    names = tuple(c.name for r in runner.rewards for c in r.components)
    rows: list[FileScores] = []
    for start in range(0, len(files), CHUNK):
        clips: list[Clip] = []
        broken: dict[int, str] = {}
        chunk = files[start : start + CHUNK]
        for i, file in enumerate(chunk):
            try:
                clips.append(read_clip(file, _prompt_of(file, known), require_audio=False))
            except OmniNFTError as error:
                broken[i] = str(error)
        table = runner.score(clips) if clips else None
        scored = iter(range(len(clips)))
        for i, file in enumerate(chunk):
            if i in broken or table is None:
                why = broken[i]
                rows.append(FileScores(file.name, file.stem, dict.fromkeys(names), dict.fromkeys(names, why)))
                continue
            b = next(scored)
            values = {n: float(v) if np.isfinite(v) else None for n, v in zip(names, table.values[b], strict=True)}
            reasons = {names[k]: why for (row, k), why in table.reasons.items() if row == b}
            rows.append(FileScores(file.name, clips[b].prompt.id, values, reasons))
        progress(len(rows), len(files))
    runner.close()
    return ScoreResult(names, tuple(rows))


def _known_prompts(folder: Path, prompts: Path | None) -> dict[str, Prompt]:
    """Prompts by file stem (scores.json beside the clips) or by prompt id (a prompt file)."""
    if prompts is not None:
        return {p.id: p for p in open_prompts(str(prompts)).prompts}
    listing = folder / "scores.json"
    if not listing.is_file():
        return {}
    clips = json.loads(listing.read_text(encoding="utf-8"))["clips"]
    return {Path(c["file"]).stem: Prompt(c["prompt_id"], c["prompt_v"], c["prompt_a"], c["prompt_av"]) for c in clips}


def _prompt_of(file: Path, known: dict[str, Prompt]) -> Prompt:
    stem = file.stem
    found = known.get(stem) or known.get(stem.rsplit("-", 1)[0])
    # Rewards that need words find none here and say so, clip by clip.
    return found or Prompt(stem, "", "", "")
