from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omninft.clips.journal import file_stamp
from omninft.clips.media import write_clip, write_wav
from omninft.evaluation.clip_folder import find_clips, read, sample_name, unclaimed
from omninft.prompts.prompt_file import PromptRow
from omninft.types import Clip, OmniNFTError, Prompt


def row(index: int, name: str = "", video_path: Path | None = None) -> PromptRow:
    return PromptRow(index, Prompt(name or f"p{index}", "v", "a", "v a"), video_path=video_path)


def put(path: Path, level: float = 0.25, samples: int = 8000) -> Path:
    video = np.full((6, 32, 32, 3), 90, np.uint8)
    write_clip(path, Clip(video, 12.0, np.full((1, samples), level, np.float32), 16_000, Prompt("", "", "", "")))
    return path


def test_names() -> None:
    assert [sample_name(i) for i in (0, 9999, 10139)] == ["sample_0000", "sample_9999", "sample_10139"]


def test_clips_are_found_by_path_number_and_id_in_this_order(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    for name in ("sample_0000.mp4", "p0.mp4", "p1.webm", "p2-1.mp4", "p2-0.mp4", "p2-10.mp4", "notes.txt", ".x.mp4"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "p1.wav").write_bytes(b"x")
    elsewhere = tmp_path / "else" / "v.mp4"
    found = find_clips(folder, [row(0), row(1), row(2), row(3, video_path=elsewhere), row(4)])
    assert [(c.row.index, c.label(folder), c.sample) for c in found] == [
        (0, "sample_0000.mp4", 0),
        (1, "p1.webm", 0),
        (2, "p2-0.mp4", 0),
        (2, "p2-1.mp4", 1),
        (2, "p2-10.mp4", 10),
        (3, "../else/v.mp4", 0),
        (4, "sample_0004.mp4", 0),
    ]
    # A WAV that comes later counts from then on: other processes may still be writing.
    assert found[1].stamp[1] == file_stamp(folder / "p1.wav")
    assert found[0].stamp[1] == []
    (folder / "sample_0000.WAV").write_bytes(b"xy")
    assert found[0].stamp[1] == file_stamp(folder / "sample_0000.WAV")
    assert found[-1].stamp == [[], []]
    assert found[0].stamp[0][0] == 1


def test_a_folder_of_other_clips_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"x")
    with pytest.raises(OmniNFTError, match=r"no clip of the 2 prompts: found x\.mp4, expected e\.g\. sample_0003\.mp4"):
        find_clips(tmp_path, [row(3), row(4)])
    with pytest.raises(OmniNFTError, match="no such folder"):
        find_clips(tmp_path / "absent", [row(0)])


def test_the_wav_beside_a_video_is_its_sound(tmp_path: Path) -> None:
    put(tmp_path / "sample_0000.mp4")
    put(tmp_path / "sample_0001.mp4")
    write_wav(tmp_path / "sample_0001.wav", np.full((2, 9600), -0.5, np.float32), 48_000)
    plain, beside = (read(c) for c in find_clips(tmp_path, [row(0), row(1)]))
    assert (plain.sample_rate, plain.prompt.id) == (16_000, "p0")
    assert plain.waveform.shape == (1, 8000)  # what AAC adds is cut
    assert (beside.sample_rate, beside.waveform.shape) == (48_000, (2, 9600))
    np.testing.assert_allclose(beside.waveform, -0.5, atol=1e-4)


def test_no_sound_is_a_clip_and_a_damaged_file_is_none(tmp_path: Path) -> None:
    put(tmp_path / "sample_0000.mp4", samples=0)
    (tmp_path / "sample_0001.mp4").write_bytes(b"no video")
    silent, broken, absent = find_clips(tmp_path, [row(0), row(1), row(2)])
    assert read(silent).waveform.size == 0
    with pytest.raises(OmniNFTError, match="not a video"):
        read(broken)
    with pytest.raises(OmniNFTError, match="no such file"):
        read(absent)


def test_clips_of_no_row_are_told(tmp_path: Path) -> None:
    for name in ("sample_0000.mp4", "spare.MOV", "notes.txt", ".hidden.mp4"):
        (tmp_path / name).write_bytes(b"x")
    assert unclaimed(tmp_path, find_clips(tmp_path, [row(0)])) == [tmp_path / "spare.MOV"]


def test_repeated_rows_share_clips_named_by_id_and_not_those_named_by_row(tmp_path: Path) -> None:
    prompt = Prompt("x", "v", "a", "v a")
    rows = [PromptRow(0, prompt), PromptRow(1, prompt, repeat=1)]
    for name in ("x-0.mp4", "x-1.mp4"):
        (tmp_path / name).touch()
    assert [(c.row.index, c.video.name) for c in find_clips(tmp_path, rows)] == [(0, "x-0.mp4"), (0, "x-1.mp4")]
    (tmp_path / "sample_0001.mp4").touch()
    found = find_clips(tmp_path, rows)
    assert [(c.row.index, c.sample, c.video.name) for c in found][-1] == (1, 1, "sample_0001.mp4")
