"""The examples of docs/python.md run as they stand, in their order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
PIECE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for piece in PIECE.finditer(text):
        line = text[: piece.start()].count("\n") + 1
        exec(compile("\n" * line + piece.group(1), str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert said.startswith("False 1 [")
    assert "base holds clips that were made with" in said
    for made in ("base", "trained"):
        assert len(list((tmp_path / made).glob("*.mp4"))) == 2
    for file in ("scores.csv", "comparison/index.html", "evaluations/tiny/result.json", "runs/omninft/report.html"):
        assert (tmp_path / file).is_file()
