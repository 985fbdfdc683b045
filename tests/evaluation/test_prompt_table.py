from __future__ import annotations

import json
from pathlib import Path

import pytest

from omninft.evaluation.prompt_table import rows_beside, rows_digest
from omninft.prompts.prompt_file import PromptRow
from omninft.types import OmniNFTError, Prompt


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_rows_come_from_the_listing_beside_the_clips(tmp_path: Path) -> None:
    entries = [{"file": f, "prompt_id": p, "prompt_v": "v"} for f, p in (("sample_0012.mp4", "a"), ("b-0.mp4", "b"))]
    write(tmp_path, "scores.json", json.dumps({"clips": entries}))
    rows = rows_beside(tmp_path)
    assert [(r.index, r.prompt.id, r.video_path) for r in rows] == [
        (12, "a", tmp_path / "sample_0012.mp4"),
        (1, "b", tmp_path / "b-0.mp4"),
    ]
    write(tmp_path, "scores.json", "{}")
    with pytest.raises(OmniNFTError, match="not a listing"):
        rows_beside(tmp_path)
    with pytest.raises(OmniNFTError, match="give a prompt file"):
        rows_beside(tmp_path / "elsewhere")


def test_the_digest_is_of_what_is_asked_for() -> None:
    row = PromptRow(0, Prompt("a", "v", "s", "v s"))
    same = PromptRow(5, Prompt("a", "v", "s", "v s"), ("x",), Path("elsewhere.mp4"))
    assert rows_digest([row]) == rows_digest([same])
    assert rows_digest([row]) == rows_digest([PromptRow(0, Prompt("another id", "v", "s", "v s"))])
    assert rows_digest([row]) != rows_digest([PromptRow(0, Prompt("a", "v", "other", "v s"))])
    assert rows_digest([row, same]) != rows_digest([row])
