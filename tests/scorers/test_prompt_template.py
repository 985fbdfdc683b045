from __future__ import annotations

from pathlib import Path

import pytest

from omninft.scorers.prompt_template import find_template, read_template
from omninft.scorers.weights import JudgingModel
from omninft.types import OmniNFTError

CARD = JudgingModel("judge template", 0, "MIT", True, files=("judge.py",), url="https://example.org/raw/")


def write(tmp_path: Path, text: str, name: str = "judge.py") -> Path:
    file = tmp_path / name
    file.write_text(text)
    return file


def test_text_file_is_taken_to_the_last_character(tmp_path: Path) -> None:
    template = read_template(write(tmp_path, "\nscore {{x}} of {text_prompt} <|A|>\n", "t.txt"), ["<|A|>"])
    assert template.pieces == ("\nscore {x} of ", " <|A|>\n")
    # A prompt with braces stays as it is: only the template is formatted.
    assert template.fill("a {dog}") == "\nscore {x} of a {dog} <|A|>\n"


def test_python_file_is_parsed_and_never_run(tmp_path: Path) -> None:
    source = '''
import no_such_module
raise SystemExit("was run")
PLAIN = "{text_prompt} plain"
NAMES = {"VQ": "visual", 3: 4}
FULL = """
{text_prompt}: <|A|>
END <|B|>
""".strip()
def build(): return PLAIN
'''
    assert read_template(write(tmp_path, source), ["<|A|>", "<|B|>"]).pieces == ("", ": <|A|>\nEND <|B|>")


def test_instruction_and_token_line_are_joined_by_name_or_by_content(tmp_path: Path) -> None:
    source = 'DEBUG = "{text_prompt}"\nFIRST = "rate {text_prompt}. "\nLAST = "overall: <|R|>\\n"\n'
    file = write(tmp_path, source)
    assert read_template(file, ["<|R|>"], names=("FIRST", "LAST")).fill("x") == "rate x. overall: <|R|>\n"
    with pytest.raises(OmniNFTError, match=r"found 0.*DEBUG, FIRST, LAST"):
        read_template(file, ["<|R|>"])
    file.write_text(source.partition("\n")[2])
    assert read_template(file, ["<|R|>"], names=("GONE",)).fill("x") == "rate x. overall: <|R|>\n"


def test_dict_entries_and_string_templates(tmp_path: Path) -> None:
    file = write(tmp_path, 'T = {"short": "{text_prompt}", "long": "{text_prompt} <|R|>"}\n')
    assert read_template(file, ["<|R|>"]).fill("x") == "x <|R|>"
    file = write(tmp_path, 'from string import Template\nQ = Template("""\n$p at {fps} $$\n""".strip())\n')
    assert read_template(file, [], field="p").fill("x") == "x at {fps} $"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no place <|A|><|B|>", "no place for the prompt"),
        ("{text_prompt} <|A|>", r"<\|B\|>': 0"),
        ("{text_prompt} <|A|><|B|><|A|>", r"<\|A\|>': 2"),
        ("{text_prompt} <|B|><|A|>", "in this order"),
        ("{text_prompt} {other} <|A|><|B|>", "KeyError: 'other'"),
        ("{text_prompt} { <|A|><|B|>", "ValueError"),
    ],
)
def test_a_template_that_would_break_pooling_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(OmniNFTError, match=message):
        read_template(write(tmp_path, text, "t.txt"), ["<|A|>", "<|B|>"])


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(OmniNFTError, match=r"judge.py:2: not Python"):
        read_template(write(tmp_path, "a = 1\nb = = 2\n"), [])
    with pytest.raises(OmniNFTError, match=r"gone.txt cannot be read"):
        read_template(tmp_path / "gone.txt", [])


def test_where_a_template_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, weights = tmp_path / "cache", tmp_path / "weights"
    cache.mkdir()
    weights.mkdir()
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(cache))
    with pytest.raises(OmniNFTError, match=r"judge template: missing judge.py.*curl -L .*raw/judge.py.*`template`"):
        find_template(CARD, weights, None)
    in_cache = write(cache, "x")
    assert find_template(CARD, weights, None) == in_cache
    beside = write(weights, "x", "judge.txt")
    assert find_template(CARD, weights, None) == beside
    own = write(tmp_path, "x", "own.txt")
    assert find_template(CARD, weights, own) == own
    with pytest.raises(OmniNFTError, match=r"no file .*nowhere.txt; fetch by: curl"):
        find_template(CARD, weights, tmp_path / "nowhere.txt")
