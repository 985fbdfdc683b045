"""What rewards raise: told once in a line, kept in a file, counted."""

from __future__ import annotations

import logging
import re
import threading
import traceback
from datetime import datetime
from pathlib import Path

import torch

from omninft.types import Clip, OmniNFTError

_LOG = logging.getLogger(__name__)
LOG_NAME = "rewards.log"
_MEMORY = re.compile(r"out of memory|can't allocate memory", re.IGNORECASE)


class FailureLog:
    """Failures of rewards. Two are of one kind when one reward raised one type at one line of code.

    The first of a kind is one line in the terminal. With a `path`, every failure is a line in that file, the first of a
    kind with its traceback; the file is made by the first failure. Used by several threads.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._counts: dict[tuple[str, str, str], int] = {}
        self._first: dict[tuple[str, str, str], str] = {}
        self._told: dict[tuple[str, str, str], int] = {}
        self._lock = threading.Lock()

    def add(self, reward: str, clip: Clip, error: Exception) -> None:
        """A reward raised on one clip."""
        frames = traceback.extract_tb(error.__traceback__)
        at = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        why = " ".join(reason_of(error).split())
        line = f"reward {reward} failed on {clip.prompt.id} sample {clip.sample}: {why}"
        # The place says enough of a user's own error; ours is made of its message alone.
        trace = "" if isinstance(error, OmniNFTError) else "".join(traceback.format_exception(error))
        self._count((reward, type(error).__name__, at), line, why, trace)

    def late(self, reward: str, why: str) -> None:
        """A reward was left behind at its time limit."""
        self._count((reward, "time_limit", ""), f"reward {reward} {why}", why, "")

    def summarise(self) -> None:
        """Tell how often each kind came since this was told last, where that was more than once."""
        with self._lock:
            for kind, count in self._counts.items():
                if count > self._told.get(kind, 1):
                    text = f"reward {kind[0]} failed {count} times in all: {self._first[kind]}"
                    self._told[kind] = count
                    _LOG.warning("%s", text)
                    self._write(text)

    def _count(self, kind: tuple[str, str, str], line: str, why: str, trace: str) -> None:
        with self._lock:
            self._counts[kind] = self._counts.get(kind, 0) + 1
            first = self._counts[kind] == 1
            if first:
                self._first[kind] = why
                kept = f"; all of them are in {self.path}" if self.path is not None else ""
                _LOG.warning("%s (others of this kind are counted%s)", line, kept)
            self._write(f"{line}\n{trace}" if first and trace else line)

    def _write(self, text: str) -> None:
        if self.path is None:
            return
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{now} {text.rstrip()}\n")
        except OSError as error:  # scores are worth more than their log
            _LOG.warning("%s: cannot be written (%s)", self.path, error.strerror or error)
            self.path = None


def reason_of(error: Exception) -> str:
    """Why a score is missing, for people."""
    if isinstance(error, OmniNFTError):
        return str(error)
    told = f"{type(error).__name__}: {error}"
    if isinstance(error, ValueError) and "read-only" in str(error):
        return f"clips are read-only: copy the array first ({told})"
    return told


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a lack of memory on the CPU or a GPU."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and _MEMORY.search(str(error)):
            return True
        error = error.__cause__
    return False
