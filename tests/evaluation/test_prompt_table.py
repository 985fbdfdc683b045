from __future__ import annotations

import json
from pathlib import Path

import pytest

from omninft.evaluation.prompt_table import DIMENSIONS, PromptRow, read_prompt_rows, rows_beside, rows_digest
from omninft.types import OmniNFTError, Prompt
from omninft.worlds.wording import world_prompts


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_javisbench_columns(tmp_path: Path) -> None:
    text = (
        "path,text,audio_text,cat0_ind,cat1_ind,cat2_ind,cat3_ind,cat4_ind,license,pred_video_path\n"
        'a.mp4,"Rain, then a dog",barking,"0,2",[1],"[3, 4]",,0,x,out/v.mp4\n'
        'b.mp4,"Two\nlines",,,,,,,y,\n'
    )
    first, second = read_prompt_rows(write(tmp_path, "p.csv", "\ufeff" + text))
    assert (first.prompt.prompt_v, first.prompt.prompt_a) == ("Rain, then a dog", "barking")
    assert first.prompt.prompt_av == "Rain, then a dog"
    assert first.categories == (
        "event_scenario/0",
        "event_scenario/2",
        "visual_style/1",
        "sound_type/3",
        "sound_type/4",
        "spatial_composition/0",
    )
    assert first.video_path == tmp_path / "out/v.mp4"
    assert (second.index, second.prompt.id) == (1, "00001")
    assert (second.prompt.prompt_a, second.categories, second.video_path) == ("Two\nlines", (), None)
    assert sum(DIMENSIONS.values()) == 19


def test_jsonl_txt_and_the_world(tmp_path: Path) -> None:
    lines = [
        {"id": "a", "prompt_v": "v", "prompt_a": "s", "category": "dogs", "cat2_ind": [1]},
        {"idx": 7, "text": "t"},
    ]
    named, numbered = read_prompt_rows(write(tmp_path, "p.jsonl", "\n\n".join(map(json.dumps, lines))))
    assert named == PromptRow(0, Prompt("a", "v", "s", "v s", "dogs"), ("dogs", "sound_type/1"))
    assert numbered.prompt == Prompt("7", "t", "t", "t")
    assert [r.prompt.prompt_v for r in read_prompt_rows(write(tmp_path, "p.txt", "a\n\nb\n"))] == ["a", "b"]
    world = read_prompt_rows("world:test")
    assert [r.prompt for r in world] == world_prompts("test")
    assert [r.index for r in world] == list(range(len(world)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "title\nx\n", r"p\.csv:1: found the columns title, expected text or"),
        ("p.csv", "text,id\nx,1\n,2\n", r"p\.csv:3: no text"),
        ("p.csv", "text,id\nx,1\ny,1\n", r"p\.csv:3: id: found '1', which line 2 has already"),
        ("p.csv", "text,cat0_ind\nx,loud\n", r"p\.csv:2: cat0_ind: found 'loud', expected numbers"),
        ("p.csv", "text\n", "found no prompts"),
        ("p.jsonl", '{"text": "x"}\n{"te', r"p\.jsonl:2: not JSON"),
        ("p.jsonl", "[1]", r"p\.jsonl:1: found a list"),
        ("p.xlsx", "", r"found the ending '\.xlsx'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(OmniNFTError, match=message):
        read_prompt_rows(write(tmp_path, name, text))
    with pytest.raises(OmniNFTError, match="cannot be read"):
        read_prompt_rows(str(tmp_path / "absent.csv"))


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
    assert rows_digest([row]) != rows_digest([PromptRow(0, Prompt("a", "v", "other", "v s"))])
    assert rows_digest([row, same]) != rows_digest([row])
