"""The listing of a clip folder, scores.json: which prompt every clip was made for, and what is known of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omninft.clips.media import sidecar_of
from omninft.files import read_json, write_text
from omninft.types import Clip, OmniNFTError, Prompt

LISTING = "scores.json"
_TEXTS = ("prompt_v", "prompt_a", "prompt_av")
_EVENTS = ("video", "audio")


@dataclass(frozen=True)
class ListedClip:
    """One clip of a folder. Texts of its prompt are empty where the listing does not give them."""

    file: str  # relative to the folder, with slashes
    prompt: Prompt
    sample: int = 0
    scores: Mapping[str, float | None] = field(default_factory=dict)  # None where missing
    reasons: Mapping[str, str] = field(default_factory=dict)  # measure -> why its score is missing
    events: Mapping[str, Sequence[float]] = field(default_factory=dict)  # "video", "audio" -> s, what happens when

    @classmethod
    def of(
        cls,
        clip: Clip,
        file: str,
        scores: Mapping[str, float | None] | None = None,
        reasons: Mapping[str, str] | None = None,
    ) -> ListedClip:
        """Of a clip in memory, with the events that a reward has found in it."""
        return cls(file, clip.prompt, clip.sample, scores or {}, reasons or {}, clip.views.get("events", {}))


def write_listing(folder: Path, clips: Sequence[ListedClip]) -> Path:
    """Write scores.json in `folder`, whole or not at all; scores that are not finite are missing.

    Raises:
        OmniNFTError: it cannot be written.
    """
    path = folder / LISTING
    write_text(path, json.dumps({"clips": [_tree(clip) for clip in clips]}, indent=1, allow_nan=False) + "\n")
    return path


def read_listing(path: Path) -> tuple[ListedClip, ...]:
    """The clips that a listing names, in its order, given the file or its folder.

    A table of `omninft score` in JSON is one too; it gives neither texts nor sample numbers.

    Raises:
        OmniNFTError: naming the file and the entry, counted from 1: it is not there, not a listing, or names a file
            outside its folder.
    """
    path = path / LISTING if path.is_dir() else path
    tree = read_json(path, "not a listing of clips: ")
    entries = tree.get("clips") if isinstance(tree, dict) else None
    if not isinstance(entries, list):
        raise OmniNFTError(f'{path}: not a listing of clips: expected {{"clips": [...]}}')
    clips = tuple(_Entry(f"{path}: entry {number}", entry).clip() for number, entry in enumerate(entries, 1))
    for number, clip in enumerate(clips, 1):
        clip_inside(path.parent, clip.file, f"{path}: entry {number}")
    return clips


def clip_inside(folder: Path, file: str, where: str) -> Path:
    """The clip that a listing in `folder` calls `file`. It need not exist, but does not lie elsewhere.

    A listing may come with the clips of a stranger, and what it names is copied to where others see it.

    Raises:
        OmniNFTError: `file`, or the sound beside it, lies outside the folder, by its path or by a link. `where` begins
            the message.
    """
    path = folder / file
    try:
        inside = [part.resolve().is_relative_to(folder.resolve()) for part in (path, sidecar_of(path)) if part]
    except (OSError, ValueError, RuntimeError) as error:  # a name too long or with a zero byte, links in a circle
        raise OmniNFTError(f"{where}: file: found {file!r:.200}, which names no file ({error})") from error
    if not all(inside):
        raise OmniNFTError(f"{where}: file: found {file!r:.200}, which lies outside {folder}; expected a file in it")
    return path


def _tree(clip: ListedClip) -> dict[str, Any]:
    texts = {name: getattr(clip.prompt, name) for name in _TEXTS}
    scores = {name: _finite(value) for name, value in clip.scores.items()}
    tree = {"file": clip.file, "prompt_id": clip.prompt.id, **texts, "sample": clip.sample, "scores": scores}
    reasons, events = dict(clip.reasons), {name: list(times) for name, times in clip.events.items()}
    return tree | ({"reasons": reasons} if reasons else {}) | ({"events": events} if events else {})


@dataclass(frozen=True)
class _Entry:
    """An entry as JSON has it; what it lacks but need not have is empty."""

    where: str  # for messages
    tree: Any

    def clip(self) -> ListedClip:
        if not isinstance(self.tree, dict):
            raise OmniNFTError(f"{self.where}: found {self.tree!r:.60}, expected an object")
        texts = [self._get(name, str, "") for name in _TEXTS]
        scores = {name: _finite(value) for name, value in self._table("scores", int | float | None).items()}
        events = self._table("events", list)
        for name, times in events.items():
            if name not in _EVENTS or not all(_is(time, int | float) for time in times):
                raise OmniNFTError(
                    f"{self.where}: events: found {name} {times!r:.60}, expected seconds of video, audio"
                )
        return ListedClip(
            file=self._get("file", str),
            prompt=Prompt(str(self._get("prompt_id", int | str)), *texts),
            sample=self._get("sample", int, 0),
            scores=scores,
            reasons=self._table("reasons", str),
            events={name: tuple(map(float, times)) for name, times in events.items()},
        )

    def _get(self, name: str, kind: Any, default: Any = None) -> Any:
        value = self.tree.get(name)
        value = default if value is None else value
        if not _is(value, kind):
            found = "nothing" if value is None else f"{value!r:.60}"
            raise OmniNFTError(f"{self.where}: {name}: found {found}, expected {_NAMES.get(kind, kind)}")
        return value

    def _table(self, name: str, kind: Any) -> dict[str, Any]:
        table: dict[str, Any] = self._get(name, dict, {})
        for key, value in table.items():
            if not _is(value, kind):
                raise OmniNFTError(
                    f"{self.where}: {name}: {key}: found {value!r:.60}, expected {_NAMES.get(kind, kind)}"
                )
        return table


_NAMES = {str: "text", int: "a number", int | str: "text", int | float | None: "a number or null", dict: "an object"}


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _is(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
