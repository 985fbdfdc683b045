from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omninft.clips.listing import LISTING, ListedClip, read_listing, write_listing
from omninft.types import Clip, OmniNFTError, Prompt

PROMPT = Prompt("p", "seen", "heard", "both")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    clip = Clip(np.zeros((1, 2, 2, 3), np.uint8), 12.0, np.zeros((1, 4), np.float32), 16_000, PROMPT, sample=3)
    clip.views["events"] = {"video": [0.25], "audio": [0.5, 1.0]}
    plain = ListedClip("b/c.mp4", Prompt("q", "", "", ""))
    scored = ListedClip.of(clip, "a.mp4", {"x": 0.5, "y": math.nan, "z": None}, {"y": "no sound"})
    path = write_listing(tmp_path / "new", [scored, plain])
    assert path == tmp_path / "new" / LISTING
    first, second = read_listing(path)
    assert (first.file, first.prompt, first.sample) == ("a.mp4", PROMPT, 3)
    assert first.scores == {"x": 0.5, "y": None, "z": None}
    assert (first.reasons, first.events) == ({"y": "no sound"}, {"video": (0.25,), "audio": (0.5, 1.0)})
    assert second == plain
    assert read_listing(tmp_path / "new") == (first, second)
    assert [p.name for p in (tmp_path / "new").iterdir()] == [LISTING]


def test_a_table_of_scores_is_a_listing_without_texts(tmp_path: Path) -> None:
    entry = {"file": "a.mp4", "prompt_id": 7, "scores": {"x": None}, "reasons": {"x": "why"}, "no_prompt": ""}
    (tmp_path / LISTING).write_text(json.dumps({"clips": [entry], "means": {"x": None}}))
    assert read_listing(tmp_path) == (ListedClip("a.mp4", Prompt("7", "", "", ""), 0, {"x": None}, {"x": "why"}),)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([], r"not a listing of clips: expected \{"),
        ({"clips": {}}, "not a listing of clips: expected"),
        ({"clips": [{"file": "a", "prompt_id": "p"}, 3]}, "entry 2: found 3, expected an object"),
        ({"clips": [{"file": 1, "prompt_id": "p"}]}, "entry 1: file: found 1, expected text"),
        ({"clips": [{"file": "a"}]}, "entry 1: prompt_id: found nothing, expected text"),
        ({"clips": [{"file": "a", "prompt_id": "p", "sample": "x"}]}, "entry 1: sample: found 'x', expected a number"),
        (
            {"clips": [{"file": "a", "prompt_id": "p", "scores": {"x": "high"}}]},
            "entry 1: scores: x: found 'high', expected a number or null",
        ),
        ({"clips": [{"file": "a", "prompt_id": "p", "events": {"video": ["x"]}}]}, "entry 1: events: found video"),
    ],
)
def test_errors_name_the_file_and_the_entry(tmp_path: Path, tree: Any, message: str) -> None:
    (tmp_path / LISTING).write_text(json.dumps(tree))
    with pytest.raises(OmniNFTError, match=rf"scores\.json: {message}"):
        read_listing(tmp_path)


def test_no_listing_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(OmniNFTError, match=r"scores\.json: cannot be read"):
        read_listing(tmp_path)
    (tmp_path / LISTING).write_bytes(b"\xff{")
    with pytest.raises(OmniNFTError, match=r"scores\.json: not a listing of clips: not JSON"):
        read_listing(tmp_path)


def listing_of(folder: Path, file: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LISTING).write_text(json.dumps({"clips": [{"file": file, "prompt_id": "a"}]}))
    return folder


@pytest.mark.parametrize(
    "file", ["../secret.mp4", "sub/../../secret.mp4", "/etc/secret.mp4", "link.mp4", "linked/x.mp4"]
)
def test_a_listing_names_files_of_its_folder_only(tmp_path: Path, file: str) -> None:
    (tmp_path / "secret.mp4").touch()
    folder = listing_of(tmp_path / "clips", file)
    (folder / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (folder / "linked").symlink_to(tmp_path)
    with pytest.raises(OmniNFTError, match=rf"scores\.json: entry 1: file: found '{file}', which lies outside"):
        read_listing(folder)


def test_the_sound_beside_a_clip_does_not_come_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret.wav").touch()
    folder = listing_of(tmp_path / "clips", "a.mp4")
    (folder / "a.wav").symlink_to(tmp_path / "secret.wav")
    with pytest.raises(OmniNFTError, match="lies outside"):
        read_listing(folder)


def test_a_folder_that_is_a_link_lists_its_files(tmp_path: Path) -> None:
    listing_of(tmp_path / "clips", "sub/a.mp4")
    (tmp_path / "link").symlink_to(tmp_path / "clips")
    assert [clip.file for clip in read_listing(tmp_path / "link")] == ["sub/a.mp4"]
