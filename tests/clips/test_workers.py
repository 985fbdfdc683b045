from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omninft.clips.journal import Journal, file_stamp
from omninft.clips.workers import decoded_chunks
from omninft.types import Clip, OmniNFTError, Prompt


def read(number: int) -> Clip:
    if number == 3:
        raise OmniNFTError("three is broken")
    return Clip(np.zeros((2, 4, 4, 3), np.uint8), 12.0, np.zeros((1, 8)), 16_000, Prompt(str(number), "", "", ""))


@pytest.mark.parametrize(
    ("workers", "limits", "expected"),
    [
        (2, {"max_clips": 2}, [3, 2, 2]),  # the first is decoded alone
        (2, {"max_clips": 3}, [3, 4]),
        (1, {"max_bytes": 96}, [1, 1, 1, 2, 1, 1]),  # a clip is 96 bytes; number 3 has none
    ],
)
def test_chunks_fit_and_keep_order_and_failures(workers: int, limits: dict[str, int], expected: list[int]) -> None:
    chunks = list(decoded_chunks(range(7), read, workers, **limits))
    assert [len(chunk) for chunk in chunks] == expected
    flat = [item for chunk in chunks for item in chunk]
    assert [number for number, _ in flat] == list(range(7))
    assert str(flat[3][1]) == "three is broken"
    assert all(isinstance(clip, Clip) for number, clip in flat if number != 3)


def test_a_journal_survives_a_torn_line_and_keeps_what_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "new" / "j.jsonl"
    with Journal(path, {"a": (1, 2)}, "rows of other work") as journal:
        assert journal.resume(lambda e: True) == []
        for n in range(3):
            journal.add({"n": n})
    with path.open("a") as file:
        file.write('{"n": 3, "tor')
    with Journal(path, {"a": [1, 2]}, "rows of other work") as journal:
        assert [e["n"] for e in journal.read()] == [0, 1, 2]
        assert [e["n"] for e in journal.resume(lambda e: e["n"] != 1)] == [0, 2]
        journal.add({"n": 9})
    assert [e["n"] for e in Journal(path, {"a": [1, 2]}, "").read()] == [0, 2, 9]
    with pytest.raises(OmniNFTError, match=r"j\.jsonl holds unfinished rows of other work; remove it"):
        Journal(path, {"a": 3}, "rows of other work").read()
    assert Journal(tmp_path / "none", {}, "").read() == []
    assert Journal(None, {}, "").resume(lambda e: True) == []


def test_stamps_tell_a_changed_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    assert file_stamp(file) == []
    file.write_text("a")
    before = file_stamp(file)
    file.write_text("ab")
    assert file_stamp(file) != before
