"""Long work over clip files: decoded in chunks that fit the memory, finished rows kept on disk."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omninft.rewards.model_reward import in_workers
from omninft.types import Clip, OmniNFTError

VIDEO_ENDINGS = (".mp4", ".webm", ".mov", ".mkv", ".m4v", ".avi")
CHUNK_CLIPS = 32  # scored together
CHUNK_BYTES = 2**30  # of decoded frames held at a time

Item = TypeVar("Item")


def decoded_chunks(
    items: Sequence[Item],
    read: Callable[[Item], Clip],
    workers: int,
    max_clips: int = CHUNK_CLIPS,
    max_bytes: int = CHUNK_BYTES,
) -> Iterator[list[tuple[Item, Clip | OmniNFTError]]]:
    """Items with their clips, or with why there is none, decoded by up to `workers` threads.

    The first is decoded alone; from then on as many at a time as fit `max_bytes`, if they are like the largest so far.
    """
    chunk: list[tuple[Item, Clip | OmniNFTError]] = []
    held, start, width, largest = 0, 0, 1, 0
    while start < len(items):
        some = items[start : start + width]
        for item, clip in zip(some, in_workers(read, some, workers), strict=True):
            chunk.append((item, clip))
            size = clip.video.nbytes if isinstance(clip, Clip) else 0
            held, largest = held + size, max(largest, size)
        start += len(some)
        width = min(workers, max(1, max_bytes // largest)) if largest else 1
        if len(chunk) >= max_clips or held >= max_bytes:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


class Journal:
    """The rows of unfinished work, a JSON line each, on disk as soon as they are known.

    The first line says what work it is. Without a path nothing is kept.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any], work: str) -> None:
        self.path, self.work = path, work
        # Through JSON, so that it compares equal to what is read back.
        self.header = json.loads(json.dumps(header))
        self._file: io.TextIOWrapper | None = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self) -> list[dict[str, Any]]:
        """The whole rows that are there; a line torn by the end of its process is passed over.

        Raises:
            OmniNFTError: the journal is of other work.
        """
        if self.path is None:
            return []
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        entries = [entry for line in lines if (entry := _json_or_none(line)) is not None]
        if entries and entries[0] != self.header:
            raise OmniNFTError(
                f"{self.path} holds unfinished {self.work}; remove it to begin again, or choose another output"
            )
        return entries[1:]

    def resume(self, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """`read`, reduced to the rows to keep; from here on the journal is open for more."""
        if self.path is None:
            return []
        kept = [entry for entry in self.read() if keep(entry)]
        # Written anew, so that a torn last line does not stay in the middle.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.part")
        self._file = temporary.open("w", encoding="utf-8")
        for entry in (self.header, *kept):
            self.add(entry)
        temporary.replace(self.path)
        return kept

    def add(self, entry: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry, allow_nan=False) + "\n")
            self._file.flush()

    def remove(self) -> None:
        if self._file is not None and self.path is not None:
            self._file.close()
            self.path.unlink(missing_ok=True)


def file_stamp(file: Path) -> list[int]:
    """Tells a changed file; [] for none."""
    if not file.is_file():
        return []
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _json_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
