"""Prompt templates of judging models, read as data.

A judge scores as published only with the exact wording it was trained on. That wording belongs to its authors: it is
read from their own source file (parsed, never run) or from a text file, and nowhere retyped here.

Accepted files:
    *.py    module-level assignments of a string literal, of a dict of string literals, or of `Template("...")`, each
            possibly followed by `.strip()`. Other statements are passed over.
    others  the file is the template, to the last character, in the syntax of str.format.

The prompt stands at `{field}` (str.format: doubled braces are single ones) or, within `Template`, at `$field`.
"""

from __future__ import annotations

import ast
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omninft.hub import Need
from omninft.scorers.weights import JudgingModel, weights_folder
from omninft.types import OmniNFTError

_MARK = "\0"  # stands for the prompt while a template is taken apart


@dataclass(frozen=True)
class PromptTemplate:
    """The fixed text around the prompt: `fill(text)` puts it between the pieces."""

    pieces: tuple[str, ...]

    def fill(self, text: str) -> str:
        return text.join(self.pieces)


def find_template(card: JudgingModel, path: str | Path | None, template: str | Path | None) -> Path:
    """The file `template`, else the card's file, or a .txt of its name, in the folder `path` or the weights folder.

    Raises:
        OmniNFTError: there is none, with the command that fetches it.
    """
    (file,) = card.files
    if template is not None:
        found = Path(template).expanduser()
        if not found.is_file():
            raise OmniNFTError(f"{card.name}: no file {found}; fetch by: {card.fetch_command()}")
        return found
    folders = [weights_folder()]
    if path is not None:
        weights = Path(path).expanduser()
        folders.insert(0, weights.parent if weights.is_file() else weights)
    for place in (folder / name for folder in folders for name in (file, str(Path(file).with_suffix(".txt")))):
        if place.is_file():
            return place
    raise OmniNFTError(f"{card.missing()}; or name a copy in the option `template`")


def template_need(card: JudgingModel, path: str | Path | None, template: str | Path | None) -> Need:
    """What `omninft fetch` fetches of a template: nothing where `find_template` has one."""
    try:
        find_template(card, path, template)
    except OmniNFTError:
        return card.need()
    return replace(card.need(), missing=())


def read_template(
    path: str | Path, tokens: Sequence[str], field: str = "text_prompt", names: Sequence[str] = ()
) -> PromptTemplate:
    """The template in a file that holds the prompt's `field` and each of `tokens` exactly once, in this order.

    Of a Python file the strings assigned to `names` are joined; without them, the only string that holds field and
    tokens is taken, or the only one with the field followed by the only one with the tokens.

    Raises:
        OmniNFTError: no such file, not readable as described, or no or more than one string that fits.
    """
    path = Path(path).expanduser()
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OmniNFTError(f"prompt template {path} cannot be read: {error}") from error
    if path.suffix != ".py":
        template = PromptTemplate(_pieces(source, "format", field, str(path)))
        _check(template, tokens, field, str(path))
        return template
    strings = _strings(source, path)
    chosen = [name for name in names if name in strings]
    if not names or len(chosen) < len(names):
        chosen = _search(strings, tokens, field, path)
    pieces: tuple[str, ...] = ("",)
    for name in chosen:
        more = _pieces(*strings[name], field, f"{path}: {name}")
        pieces = (*pieces[:-1], pieces[-1] + more[0], *more[1:])
    template = PromptTemplate(pieces)
    _check(template, tokens, field, f"{path}: {' + '.join(chosen)}")
    return template


def _search(strings: dict[str, tuple[str, str]], tokens: Sequence[str], field: str, path: Path) -> list[str]:
    def has_field(name: str) -> bool:
        text, syntax = strings[name]
        return (f"{{{field}}}" if syntax == "format" else f"${field}") in text

    def has_tokens(name: str) -> bool:
        return all(token in strings[name][0] for token in tokens)

    whole = [name for name in strings if has_field(name) and has_tokens(name)]
    if tokens and not whole:
        before = [name for name in strings if has_field(name)]
        after = [name for name in strings if has_tokens(name)]
        if len(before) == 1 and len(after) == 1:
            return before + after
    if len(whole) != 1:
        wanted = " and ".join([f"the field {field!r}", *tokens])
        raise OmniNFTError(
            f"{path}: expected one string with {wanted}, found {len(whole)}"
            f"{': ' + ', '.join(whole) if whole else ''}; its strings: {', '.join(strings) or 'none'}. "
            "Copy the right one into a .txt file and give that as `template`"
        )
    return whole


def _check(template: PromptTemplate, tokens: Sequence[str], field: str, where: str) -> None:
    if len(template.pieces) < 2:
        raise OmniNFTError(f"{where}: has no place for the prompt; expected the field {field!r}")
    fixed = template.fill("")
    counts = {token: fixed.count(token) for token in tokens}
    places = [fixed.find(token) for token in tokens]
    if any(count != 1 for count in counts.values()) or places != sorted(places):
        raise OmniNFTError(f"{where}: expected each of {', '.join(tokens)} once and in this order, found {counts}")


def _pieces(text: str, syntax: str, field: str, where: str) -> tuple[str, ...]:
    try:
        if syntax == "format":
            filled = text.format(**{field: _MARK})
        else:
            filled = string.Template(text).substitute({field: _MARK})
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise OmniNFTError(
            f"{where}: expected no other field than {field!r} ({type(error).__name__}: {error})"
        ) from error
    return tuple(filled.split(_MARK))


def _strings(source: str, path: Path) -> dict[str, tuple[str, str]]:
    """Name -> (text, "format" or "dollar") of the string assignments of a Python file."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise OmniNFTError(f"{path}:{error.lineno}: not Python: {error.msg}") from error
    found: dict[str, tuple[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        for name in (target.id for target in targets if isinstance(target, ast.Name)):
            if isinstance(value, ast.Dict):
                for key, item in zip(value.keys, value.values, strict=True):
                    text = _text(item)
                    if isinstance(key, ast.Constant) and text is not None:
                        found[f"{name}[{key.value!r}]"] = text
            else:
                text = _text(value)
                if text is not None:
                    found[name] = text
    return found


def _text(node: ast.expr) -> tuple[str, str] | None:
    """A string literal, `Template(literal)` or either with `.strip()`; None for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "strip":
        inner = _text(node.func.value)
        return None if inner is None or node.args else (inner[0].strip(), inner[1])
    if isinstance(node, ast.Call) and len(node.args) == 1:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        inner = _text(node.args[0]) if called == "Template" else None
        return None if inner is None else (inner[0], "dollar")
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        return None
    return (value, "format") if isinstance(value, str) else None
