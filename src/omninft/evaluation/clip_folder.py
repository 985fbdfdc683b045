"""Clips of a benchmark as files: which file belongs to which prompt, and how it is read.

The layout is JavisBench's: `sample_0000.mp4` with `sample_0000.wav`, numbered by the rows of the prompt file. Folders
of `omninft sample` (`<prompt id>-0.mp4`) do as well, and a prompt file may name the files itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omninft.clips.journal import file_stamp
from omninft.clips.media import read_clip, read_wav, sidecar_of
from omninft.clips.workers import VIDEO_ENDINGS
from omninft.prompts.prompt_file import PromptRow
from omninft.types import Clip, OmniNFTError


@dataclass(frozen=True)
class ClipFile:
    """One clip to score; `video` may be a file that is not there, which reading reports."""

    row: PromptRow
    video: Path
    audio: Path | None = None  # named by the row; else a WAV beside the video, else the sound in it
    sample: int = 0

    @property
    def stamp(self) -> list[list[int]]:
        """Tells changed files."""
        sound = self.audio or sidecar_of(self.video)
        return [file_stamp(self.video), file_stamp(sound) if sound is not None else []]

    def label(self, base: Path) -> str:
        """The video's path from `base`, with slashes."""
        return Path(os.path.relpath(self.video, base)).as_posix()


def sample_name(index: int) -> str:
    """JavisBench's name of a row's clip, without ending: five digits where four do not do."""
    return f"sample_{index:04d}"


def find_clips(folder: Path, rows: Sequence[PromptRow]) -> list[ClipFile]:
    """The clips of every row, in order; a row without any stands with the name it should have.

    In this order: the path that the row gives, sample_<row>, <prompt id>, <prompt id>-0, -1, ...; clips of the last two
    kinds are found once, however many rows ask for the same. A WAV of the same stem
    beside the video is its sound: encoders of video files lose some, and JavisBench reads WAVs.

    Raises:
        OmniNFTError: no such folder, or no clip of any row in it.
    """
    if not folder.is_dir():
        raise OmniNFTError(f"{folder}: no such folder of clips")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in VIDEO_ENDINGS and not path.name.startswith("."):
            files.setdefault(path.stem, path)
    samples: dict[str, list[tuple[int, Path]]] = {}
    for stem, path in files.items():
        if numbered := re.fullmatch(r"(.+)-(\d+)", stem):
            samples.setdefault(numbered[1], []).append((int(numbered[2]), path))
    found: list[ClipFile] = []
    by_id: set[str] = set()
    for row in rows:
        name = sample_name(row.index)
        whole = row.video_path or files.get(name)
        if whole is None and row.prompt.id in by_id:
            continue  # a repeated row: its prompt's clips stand already
        if whole is None and (row.prompt.id in files or row.prompt.id in samples):
            by_id.add(row.prompt.id)
            whole = files.get(row.prompt.id)
        if whole is None and row.prompt.id in samples:
            found += [_clip_file(row, path, number) for number, path in sorted(samples[row.prompt.id])]
        else:
            found.append(_clip_file(row, whole or folder / f"{name}.mp4", row.repeat))
    if not any(clip.video.is_file() for clip in found):
        first = found[0].row if found else None
        expected = f"e.g. {sample_name(first.index)}.mp4 or {first.prompt.id}-0.mp4" if first else "none"
        present = _listed(sorted(path.name for path in files.values()))
        raise OmniNFTError(f"{folder} holds no clip of the {len(rows)} prompts: found {present}, expected {expected}")
    return found


def unclaimed(folder: Path, found: Sequence[ClipFile]) -> list[Path]:
    """The videos of a folder that are no row's clip."""
    claimed = {clip.video for clip in found}
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in VIDEO_ENDINGS and not path.name.startswith(".") and path not in claimed
    ]


def read(clip: ClipFile) -> Clip:
    """Frames and sound, with the row's prompt. Without any sound the waveform is [0, 0].

    Raises:
        OmniNFTError: a file that is missing or cannot be decoded.
    """
    own = clip.audio is None
    made = replace(read_clip(clip.video, clip.row.prompt, require_audio=False, sidecar=own), sample=clip.sample)
    if clip.audio is None:
        return made
    waveform, rate = read_wav(clip.audio)
    return replace(made, waveform=waveform, sample_rate=rate)


def _clip_file(row: PromptRow, video: Path, sample: int = 0) -> ClipFile:
    return ClipFile(row, video, row.audio_path, sample)


def _listed(names: Sequence[str], most: int = 3) -> str:
    if not names:
        return "no video"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
