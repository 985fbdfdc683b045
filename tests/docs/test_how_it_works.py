"""The pieces of code in the documentation are those of the source."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-it-works.md"
PIECE = re.compile(r"```python\n# (src/\S+)\n(.*?)\n```", re.DOTALL)


def pieces() -> list[tuple[str, str]]:
    return PIECE.findall(PAGE.read_text(encoding="utf-8"))


def stands_in(code: str, source: str) -> bool:
    """Whether the lines stand together in the source, at whatever depth."""
    wanted = [line.rstrip() for line in code.splitlines()]
    lines = [line.rstrip() for line in source.splitlines()]
    windows = (lines[i : i + len(wanted)] for i in range(len(lines) - len(wanted) + 1))
    return any(textwrap.dedent("\n".join(window)).splitlines() == wanted for window in windows)


@pytest.mark.parametrize(("file", "code"), pieces(), ids=[file for file, _ in pieces()])
def test_each_piece_stands_in_its_file(file: str, code: str) -> None:
    assert stands_in(code, (ROOT / file).read_text(encoding="utf-8")), f"{file} no longer has:\n{code}"


def test_there_is_a_piece_of_every_stage() -> None:
    rooms = {file.split("/")[2].removesuffix(".py") for file, _ in pieces()}
    assert rooms == {"train", "noise", "rollout", "credit", "runs", "objectives", "learning", "models"}


def test_a_changed_line_is_noticed() -> None:
    assert stands_in("a = 1\nif a:\n    b = 2", "def f():\n    a = 1\n    if a:\n        b = 2\n    return b\n")
    assert not stands_in("a = 1\nif a:\n    b = 3", "def f():\n    a = 1\n    if a:\n        b = 2\n")


def test_every_named_part_can_be_imported() -> None:
    from importlib import import_module

    table = PAGE.read_text(encoding="utf-8").partition("## Parts to use on their own")[2].partition("Methods beside")[0]
    tried = 0
    for line in table.splitlines():
        cells = line.split("|")
        if len(cells) < 4 or "omninft" not in cells[2]:
            continue
        for entry in re.findall(r"`(omninft\.[\w.]+)`(?: \(([^)]*(?:\([^)]*\))?[^)]*)\))?", cells[2]):
            module, names = entry[0], re.findall(r"`([A-Za-z_]\w*)", entry[1])
            if not names and module.rpartition(".")[2][:1].isupper():
                module, _, name = module.rpartition(".")
                names = [name]
            found = import_module(module)
            for name in names:
                assert hasattr(found, name), f"{module}.{name}"
                tried += 1
    assert tried > 15
