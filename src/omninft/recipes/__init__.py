"""Recipes: YAML instances of the config tree, and how parts of one are put together.

`ltx2.3+gdpo+24gb` is one recipe of three parts: a model (or a whole recipe), a method and a machine. Each part sets the
keys of its own kind and no others (`PARTS`). They are laid over one another in one order, whatever the order they are
named in: what the model stands on, the machine, the model, the rewards, the method, files of the user's own. So what a
version of the model needs (the steps of a distilled one) stands above what a small machine gives up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from omninft.files import parse_yaml, read_text
from omninft.naming import did_you_mean
from omninft.types import OmniNFTError

_MODEL_KEYS = (
    "path",
    "revision",
    "transformer",
    "weights",
    "text_encoder",
    "dtype",
    "first_frame_crf",
    "mark_first_frame",
    "max_text_tokens",
    "lora",
)
_MACHINE_KEYS = (
    "device",
    "dtype",
    "quantise",
    "old_dtype",
    "compile",
    "offload",
    "vae_tiling",
    "text_cache",
    "gradient_checkpointing",
)
# Kind of part -> the keys it may set, in the order of a combined name. A method says how rollouts are guided and how
# old follows where its loss is right for nothing else (Flow-GRPO's).
PARTS: dict[str, tuple[str, ...]] = {
    "model": (*(f"model.{key}" for key in _MODEL_KEYS), "prompts", "sampling", "evaluation"),
    "rewards": ("rewards", "held_out"),
    "method": ("credit", "objective", "sampling.video_guidance", "sampling.audio_guidance", "run.old_schedule"),
    "machine": (
        *(f"model.{key}" for key in _MACHINE_KEYS),
        "prompts.per_iteration",
        "sampling",
        "objective.sigmas",
        "objective.reference_share",
        "optimiser.kind",
        "optimiser.micro_batch",
        "evaluation",
        "run.iterations",
        "run.checkpoint_every",
        "run.keep_last",
        "distributed",
    ),
}
# What a part stands on where no model is named beside it. A machine says nothing without one.
STANDS_ON = {"rewards": "paper", "method": "omninft"}
_ORDER = ("whole", *PARTS, "own")
_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class Recipe:
    """One file."""

    name: str  # a shipped recipe's, or the path
    kind: str  # a key of PARTS; "whole"; "own": a user's file that names neither a model nor a base
    base: str | None
    tree: dict[str, Any]
    summary: str = ""  # first sentence of its comment

    @property
    def title(self) -> str:
        """What a run is named by."""
        return Path(self.name).stem if self.name.endswith(_ENDINGS) else self.name

    @property
    def brings_model(self) -> bool:
        return self.kind in ("whole", "model")


def recipe_names() -> list[str]:
    """Names of the shipped recipes and parts."""
    return sorted(p.name[:-5] for p in resources.files(__name__).iterdir() if p.name.endswith(".yaml"))


def read_recipe(recipe: str) -> tuple[str, list[dict[str, Any]]]:
    """The combined name of a recipe ("ltx2+gdpo+8gpu"), and its trees, each to be laid over those before it.

    Raises:
        OmniNFTError: unknown recipe, malformed YAML, parts that do not go together, a part with a key of another kind.
    """
    parts = _parts(recipe)
    return "+".join(part.title for part in parts), _layers(parts, ())


def read_file(recipe: str) -> Recipe:
    """One recipe by shipped name or YAML path.

    Raises:
        OmniNFTError: as `read_recipe`.
    """
    path, shipped = Path(recipe), False
    if path.suffix in _ENDINGS:
        if not path.exists():
            raise OmniNFTError(f"no recipe file at {path.absolute()}")
        text = read_text(path)
    elif recipe in recipe_names():
        shipped = True
        text = (resources.files(__name__) / f"{recipe}.yaml").read_text(encoding="utf-8")
    else:
        known = recipe_names()
        raise OmniNFTError(
            f"unknown recipe {recipe!r}{did_you_mean(recipe, known)}; expected a YAML file or some of these, "
            f"joined by +: {', '.join(known)}"
        )
    tree = parse_yaml(text, f"recipe {recipe}") or {}
    if not isinstance(tree, dict):
        raise OmniNFTError(f"recipe {recipe}: found a {type(tree).__name__}, expected a mapping of keys")
    base, kind = tree.pop("base", None), tree.pop("part", None)
    if not isinstance(base, str | None):
        raise OmniNFTError(f"recipe {recipe}: base: found {base!r:.60}, expected a recipe's name or file")
    if kind is None:
        model = tree.get("model")
        names_model = isinstance(model, dict) and "path" in model
        kind = "whole" if shipped or base is not None or names_model else "own"
    elif isinstance(kind, str) and kind in PARTS:
        _require_own_keys(recipe, kind, tree)
    else:
        raise OmniNFTError(f"recipe {recipe}: part is {kind!r:.60}, expected one of {', '.join(PARTS)}, or no such key")
    return Recipe(recipe, kind, base, tree, _first_sentence(text))


def _parts(recipe: str) -> list[Recipe]:
    """The files that a recipe names, in the order of its combined name."""
    # A path may hold a plus sign itself.
    names = [recipe] if Path(recipe).is_file() else recipe.split("+")
    parts = sorted((read_file(name) for name in names), key=lambda part: _ORDER.index(part.kind))
    for kinds, what in ((("whole", "model"), "a model"), *(((kind,), f"the {kind}") for kind in PARTS)):
        alike = [part.name for part in parts if part.kind in kinds]
        if len(alike) > 1:
            raise OmniNFTError(f"recipe {recipe}: {' and '.join(alike)} each name {what}; expected one of them")
    return parts


def _layers(parts: Sequence[Recipe], seen: tuple[str, ...]) -> list[dict[str, Any]]:
    by_kind = {kind: [part for part in parts if part.kind == kind] for kind in _ORDER}
    below: list[dict[str, Any]] = []
    model: list[dict[str, Any]] = []
    if not any(part.brings_model for part in parts):
        below = _stand(parts, seen)
    for part in (*by_kind["whole"], *by_kind["model"]):
        below, model = _of_model(part, seen)
    above = [tree for kind in ("rewards", "method", "own") for part in by_kind[kind] for tree in _own(part, seen)]
    machine = [tree for part in by_kind["machine"] for tree in _own(part, seen)]
    return [*below, *machine, *model, *above]


def _stand(parts: Sequence[Recipe], seen: tuple[str, ...]) -> list[dict[str, Any]]:
    """What parts without a model are laid on."""
    for part in parts:
        if part.kind == "machine":
            raise OmniNFTError(f"recipe {part.name} is for a machine; name the model too, e.g. ltx2+{part.name}")
    base = next((STANDS_ON[part.kind] for part in parts if part.kind in STANDS_ON), None)
    return _layers(_parts(base), seen) if base is not None else []


def _of_model(part: Recipe, seen: tuple[str, ...]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a model or a whole recipe stands on, and what must stand above machines: nothing of a whole one."""
    _require_no_circle(part, seen)
    seen = (*seen, part.name)
    if part.kind == "whole":
        return [*(_layers(_parts(part.base), seen) if part.base else []), part.tree], []
    if part.base is None:
        return [], [part.tree]
    bases = _parts(part.base)
    if len(bases) == 1 and bases[0].brings_model:
        below, model = _of_model(bases[0], seen)
        return below, [*model, part.tree]
    return _layers(bases, seen), [part.tree]


def _own(part: Recipe, seen: tuple[str, ...]) -> list[dict[str, Any]]:
    """A part that may stand on another of its kind, and on nothing else: it must not bring a model."""
    _require_no_circle(part, seen)
    if part.base is None:
        return [part.tree]
    base = read_file(part.base)
    if base.kind != part.kind:
        raise OmniNFTError(
            f"recipe {part.name} is a {part.kind} part whose base {part.base} is not; expected one of its kind, or none"
        )
    return [*_own(base, (*seen, part.name)), part.tree]


def _require_no_circle(part: Recipe, seen: tuple[str, ...]) -> None:
    if part.name in seen:
        raise OmniNFTError(f"recipes start from one another in a circle: {' -> '.join([*seen, part.name])}")


def _require_own_keys(recipe: str, kind: str, tree: dict[str, Any]) -> None:
    for key in _keys(tree):
        if key == "recipe" or _among(key, PARTS[kind]):
            continue
        others = [other for other, keys in PARTS.items() if _among(key, keys)]
        belongs = (
            f"that is for a {' or '.join(others)} part" if others else "that is for no part, only for a whole recipe"
        )
        raise OmniNFTError(
            f"recipe {recipe} is a {kind} part and sets {key}: {belongs}; it may set {', '.join(PARTS[kind])}"
        )


def _among(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _keys(tree: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _first_sentence(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    sentence, stop, _ = " ".join(lines).partition(". ")
    return sentence + stop.strip()
