from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from omninft import files
from omninft.files import (
    parse_yaml,
    read_bytes,
    read_json,
    replacing,
    replacing_folder,
    write_atomically,
    write_text,
)
from omninft.types import OmniNFTError


def listed(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def stop_after(file: Path) -> None:
    file.write_text("tw")
    raise KeyError


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one")
    with pytest.raises(KeyError), replacing(path) as temporary:
        stop_after(temporary)
    assert path.read_text() == "one"
    write_atomically(path, lambda temporary: temporary.write_bytes(b"two"))
    assert path.read_text() == "two"
    assert listed(tmp_path) == ["new/a.txt"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "b" / "c"):
        with pytest.raises(OmniNFTError, match=f"{path}: cannot be written"):
            write_text(path, "x")
        with pytest.raises(OmniNFTError, match=f"{path}: cannot be written"), replacing_folder(path):
            pass


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with replacing_folder(tmp_path / "f") as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / name).touch()
    assert listed(tmp_path) == ["f/sub/two"]
    with pytest.raises(KeyError), replacing_folder(tmp_path / "f") as temporary:
        stop_after(temporary / "three")
    assert listed(tmp_path) == ["f/sub/two"]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with replacing_folder(tmp_path / "f") as temporary:
        (temporary / "one").touch()
    real = files.os.replace
    calls = []

    def full(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OmniNFTError, match="No space left"), replacing_folder(tmp_path / "f") as temporary:
        (temporary / "two").touch()
    assert listed(tmp_path) == ["f/one"]


def test_a_full_disk_is_told_with_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OmniNFTError, match=rf"a\.txt: cannot be written \(No space.*; [\d.]+ MiB free in {tmp_path}"):
        write_text(tmp_path / "new" / "a.txt", "x")
    with (
        pytest.raises(OmniNFTError, match=r"f: cannot be written \(.*os error 28\); [\d.]+ MiB free"),
        replacing(tmp_path / "f"),
    ):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert listed(tmp_path) == []


def test_files_of_unusual_kinds_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("four")
    assert read_bytes(tmp_path / "a", most=4) == b"four"
    with pytest.raises(OmniNFTError, match="found 4 bytes, expected at most 3"):
        read_bytes(tmp_path / "a", most=3)
    with pytest.raises(OmniNFTError, match=r"/dev/zero: cannot be read: found a pipe, device or socket"):
        read_bytes(Path("/dev/zero"))
    with pytest.raises(OmniNFTError, match="cannot be read"):
        read_bytes(tmp_path / "a\0b")
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "b") == {}


def test_aliases_of_yaml_count_as_often_as_they_stand() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}", "r") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": 2},
    }
    few = "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}' if n else '1'] * 10)}]\n" for n in range(6))
    with pytest.raises(OmniNFTError, match="r: its aliases stand for more than"):
        parse_yaml(few, "r")
