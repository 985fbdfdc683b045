"""What a new user types: the README's lines, overrides alone, help, version, completion, and the config's keys."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from omninft import __version__
from omninft.cli import app
from omninft.commands.keys import config_keys, recipe_schema
from omninft.commands.terminal import chosen_config, complete_key, complete_recipe, complete_reward
from omninft.config import METHODS, load_config, recipe_names
from omninft.evaluation.wording import known_words, open_tokenizer
from omninft.runs.check import check_run
from omninft.types import OmniNFTError

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*arguments: str, ok: bool = True) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert (result.exit_code == 0) == ok, result.output
    return result.output


def lines() -> list[str]:
    """Every `omninft ...` of the README: lines of code, and code within text."""
    found = re.findall(r"^    (omninft .*?)(?:\s{2,}#.*)?$", README, re.MULTILINE)
    found += re.findall(r"`(omninft [^`]*)`", README)
    return sorted({re.sub(r"[\[\]]|\.\.\.", "", line) for line in found if "," not in line.partition('"')[0]})


@pytest.mark.parametrize("line", lines())
def test_the_command_line_takes_what_the_readme_says(line: str) -> None:
    command: Any = typer.main.get_command(app)
    arguments = shlex.split(line)[1:]
    context = None
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        context = command.make_context(arguments[0], [], parent=context, resilient_parsing=True)
        assert arguments[0] in command.commands, line
        command = command.commands[arguments.pop(0)]
    if arguments in (["--install-completion"], ["-h"]):  # these end the process
        return
    command.make_context(
        "omninft", arguments, parent=context
    )  # raises for an unknown option or a value of another type


def test_the_readme_has_lines_and_a_wrong_one_is_noticed() -> None:
    assert len(lines()) > 15
    with pytest.raises(Exception, match="No such option"):
        test_the_command_line_takes_what_the_readme_says("omninft sample --stepps 3")


def test_the_readme_lists_the_words_of_the_bundled_model() -> None:
    tokenizer = open_tokenizer("tiny")
    listed = re.search(r"It knows (\d+) words and no others \(.*?\): (.*?)\.\n\n", README, re.DOTALL)
    assert listed is not None
    words = listed[2].replace("\n", " ").split(", ")
    assert [word.strip() for word in words] == known_words(tokenizer)
    assert int(listed[1]) == len(words)


def test_the_readmes_own_prompts_pass_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (line,) = [line for line in lines() if "examples/prompts" in line]
    recipe, *overrides = shlex.split(line)[2:]
    findings = list(check_run(chosen_config(recipe, overrides), trial=False))
    assert {f.subject: f.ok for f in findings} == dict.fromkeys(
        ("clips", "prompts", "rewards", "loggers", "disk", "model"), True
    )


def test_overrides_alone_are_of_the_recipe_omninft(tmp_path: Path) -> None:
    assert chosen_config("run.iterations=3", ["seed=4"]) == load_config("omninft", ["run.iterations=3", "seed=4"])
    assert chosen_config("gdpo", ["seed=4"]).recipe == "gdpo"
    # An equals sign in a path is none of an override.
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1" / "mine.yaml").write_text("base: gdpo\n")
    assert chosen_config(str(tmp_path / "lr=1" / "mine.yaml"), None).recipe == "mine"
    assert "error rewards" in run("check", "--quick", "rewards=[{name: wrld}]", ok=False)


def test_a_prompt_of_unknown_words_is_a_warning(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    texts = [{"prompt_v": f"a purple ball bounces {n}", "prompt_a": "a low tone rings"} for n in ("once", "twice")]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    arguments = ("prompts.per_iteration=2", "prompts.group_size=4", "optimiser.micro_batch=8")
    said = run("check", "--quick", f"prompts.train={rows}", *arguments)
    assert "warning words: tiny does not know purple: its text encoder has" in said


def test_sample_takes_sizes_and_says_what_it_will_not_do(tmp_path: Path) -> None:
    prompt, out = "a red ball bounces once in purple", str(tmp_path / "out")
    said = run("sample", prompt, "-o", out, "--steps", "1", "--size", "64x32", "--frames", "9", "--rate", "8")
    assert "warning: tiny does not know in, purple" in said
    assert "1 clips in" in said
    assert "1 of them there already" in run(
        "sample", prompt, "-o", out, "--steps", "1", "--size", "64x32", "--frames", "9", "--rate", "8"
    )
    for arguments, why in (
        (("--size", "64"), "expected WIDTHxHEIGHT"),
        (("--stg", "1", "--stg-blocks", "x"), "expected numbers of blocks"),
        (("--stg", "1", "--stg-blocks", "9", "--force"), r"stg_blocks: found \[9\], expected blocks 0 to 7"),
        (("--frames", "24", "--force"), r"found 24, expected .*k \+ 1 frames, e\.g\. "),
        (("--steps", "2"), "another output, or replace them by --force"),
    ):
        with pytest.raises(OmniNFTError, match=why):
            run("sample", prompt, "-o", out, *arguments)
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1


def test_version_and_both_forms_of_help() -> None:
    assert run("--version") == f"omninft {__version__}\n"
    for command in ("train", "config", "config keys", "vbench score", "rewards"):
        assert run(*command.split(), "-h") == run(*command.split(), "--help")
    assert all(name in run("train", "-h") for name in recipe_names())


def test_completion_knows_recipes_rewards_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("base: omninft\n")
    assert complete_recipe("g") == ["gdpo"]
    assert complete_recipe("mi") == ["mine.yaml"]
    assert complete_recipe("ltx2.3+g") == ["ltx2.3+gdpo"]
    assert complete_recipe("ltx2+m") == ["ltx2+marble", "ltx2+mine.yaml"]
    assert "run.iterations=" in complete_recipe("run.")
    assert complete_key("optimiser.learn") == ["optimiser.learning_rate="]
    assert complete_reward("world") == ["world", "world_held_out"]
    assert "--install-completion" in run("-h")
    monkeypatch.setenv("_OMNINFT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "omninft train gd")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert CliRunner().invoke(app, [], prog_name="omninft").output.split() == ["gdpo"]


def test_every_key_has_a_meaning_and_can_be_set() -> None:
    keys = config_keys()
    assert [key.name for key in keys if not key.meaning] == []
    assert [key.name for key in keys if not key.meaning.endswith(".")] == []
    by_name = {key.name: key for key in keys}
    rate = by_name["optimiser.learning_rate"]
    assert (rate.type, rate.default) == ("number > 0, <= 1", "3e-05")
    assert by_name["run.name"].type == "text | null"
    assert by_name["credit.layers.temperature"].kinds == ("arr",)
    assert by_name["credit.std"].kinds == ()
    for key in keys:
        part = key.name.split(".")[0]
        if "[]" in key.name or key.default == "required" or key.name == "recipe":
            continue
        kind = [f"{part}.kind={key.kinds[0]}"] if key.kinds else []
        load_config("omninft", [*kind, f"{key.name}={key.default}"])


def test_config_shows_keys_and_recipes() -> None:
    shown = yaml.safe_load(run("config", "show", "gdpo", "run.name=2026"))
    assert (shown["credit"]["kind"], shown["run"]["name"]) == ("gdpo", "2026")
    listed = run("config", "keys", "evaluation.dev")
    assert "evaluation.dev_clips" in listed
    assert "Clips of a dev evaluation" in listed
    assert "model.path" not in listed
    with pytest.raises(OmniNFTError, match=r"no key begins with 'run\.iteratoins', did you mean 'run\.iterations'"):
        run("config", "keys", "run.iteratoins")


def test_the_recipes_are_listed_with_a_line_each() -> None:
    listed = {
        words[0]: " ".join(words[1:]) for line in run("config", "recipes").splitlines() if (words := line.split())
    }
    assert set(recipe_names()) <= set(listed)
    assert listed["1gpu"] == "machine One GPU of 80 GB for a day."
    assert listed["gdpo"].startswith("method The paper's")
    assert run("config", "show", "ltx2+gdpo").startswith("recipe: ltx2+gdpo\n")


def test_the_schema_describes_recipes() -> None:
    schema = json.loads(run("config", "schema"))
    assert schema == recipe_schema()
    assert "required" not in schema
    assert "base" in schema["properties"]
    assert schema["properties"]["part"]["enum"] == ["model", "rewards", "method", "machine"]
    rate = schema["$defs"]["OptimiserConfig"]["properties"]["learning_rate"]
    assert (rate["exclusiveMinimum"], rate["description"]) == (0, "Step size, after the warm-up.")
    for part, kinds in METHODS.items():
        choices = [schema["$defs"][c["$ref"].rpartition("/")[2]] for c in schema["properties"][part]["anyOf"]]
        named: set[str] = set()
        for choice in choices:
            kind = choice["properties"]["kind"]
            named |= set(kind.get("enum", [kind["const"]] if "const" in kind else []))
        assert named == set(kinds)
