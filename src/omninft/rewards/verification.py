"""`omninft rewards verify`: does a reward, with the weights that lie here, give what the official code gives?

Official scores are made elsewhere, by the model's own code, on reference clips that this module writes; they are
compared as soon as weights and scores are there. Until then a model is listed as unverified. What needs no official
scores is checked in any case: files, checksums, strict loading, and that neither batch nor order changes a score.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from omninft.clips.listing import LISTING, ListedClip, read_listing, write_listing
from omninft.clips.media import read_clip, write_clip, write_wav
from omninft.config import RewardConfig
from omninft.files import read_json, write_text
from omninft.rewards.registry import WeighedReward, build_reward
from omninft.scorers.weights import JudgingModel, file_sha256, weights_folder
from omninft.types import Clip, Finding, OmniNFTError
from omninft.worlds.dataset import world_batch, world_clips

REFERENCE_CLIPS = 4
REFERENCE_UPSCALE = 8  # 32 pixels to 256: judging models were not made for thumbnails
SAME = 1e-3  # by which batched scores may differ from single ones, relative to their size
SAME_HALF = 5e-2  # of models in bfloat16 or float16, whose kernels change with the size of the batch
TOLERANCE = 1e-2  # by which ours may differ from official ones, where their file names no other


def write_reference_clips(folder: Path) -> list[Path]:
    """Clips of the bounce world as mp4 + wav with a scores.json of their prompts, for official code to score."""
    batch = world_batch(REFERENCE_CLIPS, seed=20_260)
    paths, rows = [], []
    for clip in world_clips(batch, batch.video, batch.waveforms[:, None]):
        path = folder / f"reference-{clip.prompt.id}.mp4"
        write_clip(path, clip, crf=10, upscale=REFERENCE_UPSCALE)
        write_wav(path.with_suffix(".wav"), clip.waveform, clip.sample_rate)
        paths.append(path)
        rows.append(ListedClip(path.name, replace(clip.prompt, id=path.stem)))
    write_listing(folder, rows)
    return paths


def read_reference_clips(folder: Path) -> list[Clip]:
    """The clips that `write_reference_clips` wrote. Raises OmniNFTError: they are not there."""
    if not (folder / LISTING).is_file():
        raise OmniNFTError(f"no reference clips in {folder}; write them by `omninft rewards reference-clips {folder}`")
    return [read_clip(folder / listed.file, listed.prompt) for listed in read_listing(folder)]


def verify(config: RewardConfig, clips: list[Clip], official: Path | None = None) -> Iterator[Finding]:
    """Findings in the order of the checks; what depends on something broken is left out.

    `official` is a JSON file {"source": ..., "tolerance": ..., "clips": [{"file": name, "scores": {component: value}}]}
    on the reference clips; by default the one that ships for this reward, where one does.
    """
    reward = build_reward(config)
    missing = reward.missing()
    yield Finding("files", missing is None, missing or "all there")
    if missing is not None:
        return
    if reward.model is not None and reward.model.sha256:
        yield _checked("checksums", lambda: _checksums(reward, config.options.get("path")))
    try:
        singles = np.concatenate([_scores(reward, [clip]) for clip in clips])
    except OmniNFTError as error:
        yield Finding("scores", False, str(error))
        return
    listed = "; ".join(
        f"{c.name} {', '.join(f'{v:.4g}' for v in column)}"
        for c, column in zip(reward.components, singles.T, strict=True)
    )
    yield Finding("scores", True, listed)
    half = getattr(reward.reward, "dtype", torch.float32) in (torch.bfloat16, torch.float16)
    same = SAME_HALF if half else SAME
    yield _checked("batch", lambda: _unchanged("scored together", singles, _scores(reward, clips), same))
    yield _checked("order", lambda: _unchanged("in reverse", singles, _scores(reward, clips[::-1])[::-1], same))
    compared = _checked("official", lambda: _compare(reward, singles, clips, official))
    if compared.ok and reward.model is not None and not reward.model.verified:
        write_text(_marker(reward.name), json.dumps({"reward": reward.name, "found": compared.text}))
    yield compared


def is_verified(name: str, model: JudgingModel | None) -> bool:
    """Whether a model was compared with official scores: in the tests, or on this machine by `verify`."""
    return model is None or model.verified or _marker(name).is_file()


def _marker(name: str) -> Path:
    return weights_folder() / "verified" / f"{name}.json"


def _checked(subject: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, True, check())
    except OmniNFTError as error:
        return Finding(subject, False, str(error))


def _scores(reward: WeighedReward, clips: list[Clip]) -> np.ndarray:
    """[B, K], computed afresh: no derived view is shared with an earlier call."""
    table = reward.score([replace(clip, views={}) for clip in clips])
    if table.reasons:
        raise OmniNFTError("; ".join(f"{clips[b].prompt.id}: {why}" for (b, _), why in table.reasons.items()))
    if not table.valid.all():
        raise OmniNFTError(f"{int((~table.valid).sum())} scores of {table.values.size} are not finite")
    return table.values


def _checksums(reward: WeighedReward, path: str | Path | None) -> str:
    model = reward.model
    assert model is not None
    for file, expected in (model.sha256 or {}).items():
        place = model.find(file, path)
        if place is not None and (found := file_sha256(place)) != expected:
            raise OmniNFTError(f"{place}: sha256 is {found}, expected {expected}: damaged, or another release")
    return "as published"


def _unchanged(how: str, expected: np.ndarray, found: np.ndarray, same: float) -> str:
    worst = float(np.max(np.abs(found - expected) / np.maximum(1.0, np.abs(expected))))
    if worst > same:
        raise OmniNFTError(f"scores of clips {how} differ from single ones by {worst:.2g}, expected at most {same:g}")
    return f"scores of clips {how} differ from single ones by {worst:.1e}"


def _compare(reward: WeighedReward, ours: np.ndarray, clips: list[Clip], official: Path | None) -> str:
    if official is None:
        if reward.model is None:
            return "a measurement: nothing to compare with"
        if reward.model.verified:
            return f"compared with {reward.model.package or 'the official code'} in the tests"
        shipped = resources.files("omninft.rewards") / "official" / f"{reward.name}.json"
        if not shipped.is_file():
            raise OmniNFTError(
                "no official scores ship for this reward yet: score the clips of `omninft rewards reference-clips` "
                "with the model's own code and give the file by --official"
            )
        tree = json.loads(shipped.read_text(encoding="utf-8"))
    else:
        tree = read_json(official, "no official scores: ")
    try:
        rows = {Path(row["file"]).stem: dict(row["scores"]) for row in tree["clips"]}
        tolerance = float(tree.get("tolerance", TOLERANCE))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OmniNFTError(
            f'{official}: no official scores ({error!r}); expected {{"clips": [{{"file": ..., "scores": ...}}]}}'
        ) from error
    names = [c.name for c in reward.components]
    lacking = [c.prompt.id for c in clips if c.prompt.id not in rows or set(names) - set(rows[c.prompt.id])]
    if lacking:
        raise OmniNFTError(f"official scores lack {', '.join(lacking)} or some of: {', '.join(names)}")
    theirs = np.array([[rows[c.prompt.id][n] for n in names] for c in clips], dtype=np.float64)
    worst = float(np.abs(ours - theirs).max())
    b, k = np.unravel_index(np.abs(ours - theirs).argmax(), ours.shape)
    detail = f"{names[k]} of {clips[b].prompt.id}: {ours[b, k]:.4f}, official {theirs[b, k]:.4f}"
    if not worst <= tolerance:
        raise OmniNFTError(f"differs by {worst:.4g}, more than {tolerance:g} ({detail}); source: {tree.get('source')}")
    return f"within {worst:.2g} of {tree.get('source', official)}, tolerance {tolerance:g}"
