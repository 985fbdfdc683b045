"""Rows of prompt files as benchmarks want them; `test_prompt_set` has the rest of the reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omninft.prompts.prompt_file import DIMENSIONS, PromptRow, read_prompt_file
from omninft.prompts.prompt_set import load_prompts
from omninft.prompts.sources import open_prompts, open_rows
from omninft.types import OmniNFTError, Prompt
from omninft.worlds.wording import world_prompts

JAVISBENCH = (
    "path,audio_path,text,audio_text,cat0_ind,cat1_ind,cat2_ind,cat3_ind,cat4_ind,fps,pred_video_path,pred_audio_path\n"
    'a.mp4,a.wav,"Rain, then a dog",barking,"0,2",[1],"[3, 4]",,0,24,out/v.mp4,\n'
    'b.mp4,,"Two\nlines",,,,,,,,,\n'
)


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_javisbench_columns(tmp_path: Path) -> None:
    first, second = open_rows(write(tmp_path, "p.csv", "\ufeff" + JAVISBENCH))
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
    assert (first.video_path, first.audio_path) == (tmp_path / "out/v.mp4", None)
    assert (second.index, second.prompt.prompt_a, second.categories, second.video_path) == (1, "Two\nlines", (), None)
    assert sum(DIMENSIONS.values()) == 19


def test_javisbench_is_a_training_set_with_the_same_ids(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", JAVISBENCH)
    loaded = load_prompts(path)
    assert loaded.prompts == tuple(row.prompt for row in open_rows(path))
    # First 16 hex digits of sha256('["Rain, then a dog", "barking", "Rain, then a dog"]').
    assert loaded.prompts[0].id == "fa81c5eee7b582db"
    assert "fps is a field of another tool's and was left out (1 row: line 1)" in loaded.notes
    assert "no prompt_v: text serves for it (2 rows: line 2; line 3)" in loaded.notes


def test_jsonl_txt_and_the_world(tmp_path: Path) -> None:
    lines = [
        {"id": "a", "prompt_v": "v", "prompt_a": "s", "category": "dogs", "cat2_ind": [1]},
        {"idx": 7, "text": "t", "cat0_ind": 3},
    ]
    named, numbered = open_rows(write(tmp_path, "p.jsonl", "\n\n".join(map(json.dumps, lines))))
    assert named == PromptRow(0, Prompt("a", "v", "s", "v s", "dogs"), ("dogs", "sound_type/1"))
    assert numbered == PromptRow(1, Prompt("7", "t", "t", "t"), ("event_scenario/3",))
    assert [r.prompt.prompt_v for r in open_rows(write(tmp_path, "p.txt", "a\n\nb\n"))] == ["a", "b"]
    world = open_rows("world:test")
    assert [r.prompt for r in world] == world_prompts("test") == list(open_prompts("world:test").prompts)
    assert [r.index for r in world] == list(range(len(world)))


def test_repeated_rows_keep_their_numbers_and_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "rain\nwind\nrain\nrain\n")
    rows = open_rows(path)
    assert [(r.index, r.prompt.prompt_v, r.repeat) for r in rows] == [
        (0, "rain", 0),
        (1, "wind", 0),
        (2, "rain", 1),
        (3, "rain", 2),
    ]
    assert len({r.prompt.id for r in rows}) == len(open_prompts(path)) == 2


@pytest.mark.parametrize("name", ["a/b", ".hidden", "a b", "\u00e9t\u00e9", "x" * 101, "..", "a\\b"])
def test_an_id_must_be_safe_as_a_file_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, "p.jsonl", json.dumps({"id": name, "prompt": "x"}))
    with pytest.raises(OmniNFTError) as caught:
        read_prompt_file(path)
    assert str(caught.value).startswith(f"{path}:1: id: found ")
    assert str(caught.value).endswith("expected letters, digits, '.', '_' and '-', at most 100, no leading dot")


def test_safe_ids_are_taken(tmp_path: Path) -> None:
    for name in ("x" * 100, "a.b_c-D9", "-1", "_"):
        assert open_rows(write(tmp_path, "p.jsonl", json.dumps({"id": name, "prompt": "x"})))[0].prompt.id == name


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "text,cat0_ind\nx,loud\n", r"p\.csv:2: cat0_ind: found 'loud', expected numbers"),
        ("p.csv", "text,license\nx,y\n", r"p\.csv:1: license: unknown field"),
        ("p.csv", "text,audio_txt\nx,y\n", r"p\.csv:1: audio_txt: unknown field, did you mean 'audio_text'"),
        ("p.csv", "prompt_v,prompt_a,audio_text\nx,y,z\n", r"p\.csv:2: audio_text: found prompt_a and audio_text"),
        ("p.csv", "prompt_v,path\nx,y\n", r"p\.csv:1: prompt_a: missing column"),
        ("p.jsonl", '{"text": "x", "pred_video_path": 3}', r"p\.jsonl:1: pred_video_path: found 3 \(int\)"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(OmniNFTError, match=message):
        open_rows(write(tmp_path, name, text))
