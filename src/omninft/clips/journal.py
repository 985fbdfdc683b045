"""Long work over clip files: finished rows kept on disk, so that whatever ends the work, it goes on from there."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from omninft.files import MOST_LOG_BYTES, cannot_write, parse_json, read_bytes, write_text
from omninft.types import OmniNFTError


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
            with suppress(OSError):  # of a row that `add` could not write, and has told of
                self._file.close()

    def read(self) -> list[dict[str, Any]]:
        """The whole rows that are there; a line torn by the end of its process is passed over.

        Raises:
            OmniNFTError: the journal is of other work.
        """
        if self.path is None:
            return []
        if not self.path.exists():
            return []
        lines = read_bytes(self.path, MOST_LOG_BYTES).split(b"\n")
        entries = [entry for line in lines if (entry := _json_or_none(line)) is not None]
        if entries and entries[0] != self.header:
            raise OmniNFTError(
                f"{self.path} holds unfinished {self.work}; remove it to begin again, or choose another output"
            )
        return [entry for entry in entries[1:] if isinstance(entry, dict)]

    def resume(self, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """`read`, reduced to the rows to keep; from here on the journal is open for more."""
        if self.path is None:
            return []
        kept = [entry for entry in self.read() if keep(entry)]
        # Written anew, so that a torn last line does not stay in the middle.
        write_text(self.path, "".join(map(_line, (self.header, *kept))))
        self._file = self.path.open("a", encoding="utf-8")
        return kept

    def add(self, entry: Mapping[str, Any]) -> None:
        if self._file is not None:
            try:
                self._file.write(_line(entry))
                self._file.flush()
            except OSError as error:
                assert self.path is not None
                raise cannot_write(self.path, error) from error

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


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"


def _json_or_none(line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None
