"""One process at a time writes to a run folder: a lock that the system takes back however its holder ends."""

from __future__ import annotations

import errno
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import TextIO

from omninft.types import OmniNFTError

try:
    import fcntl
except ImportError:  # no such lock on this system
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


class RunLock:
    """Holds the lock file of a run folder from `acquire` to `release`, or to the end of the process.

    The file stays: removing it would let two processes lock two files of one name. Its text is for people, what counts
    is the lock. `warning` says that the file system has none, so that nothing guards the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self.warning: str | None = None
        self._file: TextIO | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def acquire(self) -> None:
        """Take the lock, making the folder if it is missing.

        Raises:
            OmniNFTError: another process holds it, named by what it wrote, or the file cannot be opened.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+", encoding="utf-8")  # does not truncate: the text may be another's
        except OSError as error:
            raise OmniNFTError(f"{self.path}: cannot be written to ({error})") from error
        try:
            _lock(file)
        except OSError as error:
            taken = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            holder = _holder(file) if taken else ""
            file.close()
            if taken:
                raise OmniNFTError(
                    f"{self.path.parent} is in use by another process{holder}; expected a run that nobody works on: "
                    "wait for it or stop it, then resume"
                ) from error
            self.warning = (
                f"{self.path}: cannot be locked here ({error.strerror or error}): "
                "take care that no other process works on this run"
            )
            return
        self._file = file
        start = datetime.now().astimezone().isoformat(timespec="seconds")
        _write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "start": start}))

    def release(self) -> None:
        """Let others have the folder; does nothing without the lock."""
        if self._file is not None:
            _write(self._file, "")
            self._file.close()
            self._file = None


def is_locked(folder: Path) -> bool:
    """Whether a process works on the run folder; False, too, where the file system cannot tell."""
    try:
        file = (folder / LOCK_FILE).open(encoding="utf-8")
    except OSError:
        return False
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False


def _lock(file: TextIO) -> None:
    if fcntl is None:
        raise OSError(errno.ENOSYS, "this system has no flock")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _write(file: TextIO, text: str) -> None:
    try:
        file.truncate(0)
        file.write(text)
        file.flush()
    except OSError:
        pass  # a full disk takes away the name of the holder, not the lock


def _holder(file: TextIO) -> str:
    try:
        file.seek(0)
        found = json.loads(file.read())
        return f" (pid {found['pid']} on {found['host']}, since {found['start']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
