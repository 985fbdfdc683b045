from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from omninft.config import build_config
from omninft.evaluation.held_out import Evaluator
from omninft.naming import clip_file, did_you_mean, is_safe_name
from omninft.prompts.prompt_file import read_prompt_file
from omninft.runs.build import new_run_folder
from omninft.types import Clip, OmniNFTError, Prompt, ScoreTable


@pytest.mark.parametrize(
    ("word", "found"),
    [("aplha", "Alpha"), (" ALPHA ", "Alpha"), ("bet", "beta"), ("zzz", None), ("", None)],
)
def test_the_nearest_name_is_asked_for(word: str, found: str | None) -> None:
    assert did_you_mean(word, ("Alpha", "beta")) == (f", did you mean {found!r}?" if found else "")


def test_no_known_names() -> None:
    assert did_you_mean("x", ()) == ""


@pytest.mark.parametrize("name", ["a", "-", "_x", "A.b-C_9", "x" * 100])
def test_safe_names(name: str) -> None:
    assert is_safe_name(name)


@pytest.mark.parametrize("name", ["", ".a", "a/b", "a b", "a\n", "\u00e9", "x" * 101, "\u0663"])
def test_names_that_are_not_safe(name: str) -> None:
    assert not is_safe_name(name)


@pytest.mark.parametrize("prompt_id", ["../../x", "/etc/x", "a\0b", "x" * 300, ".hidden", "a/b", ""])
def test_no_id_leads_a_writer_elsewhere(tmp_path: Path, prompt_id: str) -> None:
    """Readers refuse such an id, and writers that put one into a file's name, should it come another way."""
    with pytest.raises(OmniNFTError, match="prompt id: found"):
        clip_file(prompt_id, 0)
    rows = tmp_path / "p.jsonl"
    rows.write_text(json.dumps({"id": prompt_id, "prompt": "rain"}))
    with pytest.raises(OmniNFTError, match=r"p\.jsonl:1: id: found"):
        read_prompt_file(rows)
    clip = Clip(
        np.zeros((1, 16, 16, 3), np.uint8), 8.0, np.zeros((1, 4), np.float32), 16_000, Prompt(prompt_id, *"abc")
    )
    evaluator = Evaluator.__new__(Evaluator)
    with pytest.raises(OmniNFTError, match="prompt id: found"):
        evaluator._show(clip, ScoreTable((), np.empty((1, 0))), 0, tmp_path / "samples")
    assert [p.name for p in tmp_path.rglob("*")] == ["p.jsonl"]
    with pytest.raises(OmniNFTError, match=r"run\.name"):
        build_config({"run": {"name": prompt_id}})
    with pytest.raises(OmniNFTError, match="recipe's name"):
        new_run_folder(build_config({"recipe": prompt_id, "run": {"folder": str(tmp_path)}}))
