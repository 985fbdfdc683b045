from __future__ import annotations

from pathlib import Path

from omninft.runs.lock import RunLock, is_locked


def test_a_folder_is_locked_while_a_process_holds_it(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)  # no lock file
    lock = RunLock(tmp_path)
    lock.acquire()
    assert is_locked(tmp_path)
    assert is_locked(tmp_path)  # looking takes nothing away
    lock.release()
    assert not is_locked(tmp_path)  # the file stays, the lock does not
    lock.acquire()
    lock.release()
