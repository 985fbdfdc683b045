"""Every key of a recipe with its type, default and meaning, and the same as a JSON schema for editors."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo

from omninft.config import DEFAULT_KINDS, METHODS, Config, MethodOptions, model_in, options_class
from omninft.recipes import PARTS

_NAMES = {str: "text", int: "int", float: "number", bool: "true | false", type(None): "null", Any: "any"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class ConfigKey:
    """One key that a recipe or a command line may give."""

    name: str  # dotted; `[]` stands for an entry of a list
    type: str
    default: str  # as YAML
    meaning: str  # one line
    kinds: tuple[str, ...] = ()  # methods that have it; empty: it is always there


def config_keys(prefix: str = "") -> list[ConfigKey]:
    """The keys that begin with `prefix`, in the order of the tree; credit and objective with those of every kind."""
    found: list[ConfigKey] = []
    for name, field in Config.model_fields.items():
        found += _method_keys(name, field) if name in METHODS else _keys(name, field, ())
    return [key for key in found if key.name.startswith(prefix)]


def _method_keys(part: str, field: FieldInfo) -> list[ConfigKey]:
    """Keys of every kind of credit or objective; what kinds have alike is one key."""
    everyone = tuple(METHODS[part])
    kinds: dict[ConfigKey, list[str]] = {}
    for kind in everyone:
        for key in _fields(part, options_class(part, kind), ()):
            kinds.setdefault(key, []).append(kind)
    named = ConfigKey(
        f"{part}.kind",
        " | ".join([*everyone, "package.module:Options"]),
        json.dumps(DEFAULT_KINDS[part]),
        field.description or "",
    )
    return [named] + [
        replace(key, kinds=() if len(having) == len(everyone) else tuple(having))
        for key, having in kinds.items()
        if key.name != named.name
    ]


def _fields(prefix: str, model: type[BaseModel], kinds: tuple[str, ...]) -> Iterator[ConfigKey]:
    for name, field in model.model_fields.items():
        yield from _keys(f"{prefix}.{name}", field, kinds)


def _keys(name: str, field: FieldInfo, kinds: tuple[str, ...]) -> Iterator[ConfigKey]:
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        yield from _fields(name, field.annotation, kinds)
        return
    part = model_in(field.annotation)
    meaning = " ".join((field.description or "").split())
    yield ConfigKey(name, _type(field.annotation, field.metadata), _default(field), meaning, kinds)
    if part is not None:
        yield from _fields(f"{name}[]", part, kinds)


def _type(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """A type as one would say it, e.g. "int >= 1 | null"."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        base, *more = members
        text = _type(base, more)
    elif origin is Literal:
        text = " | ".join(map(str, members))
    elif origin in (Union, types.UnionType):
        text = " | ".join(dict.fromkeys(_type(m) for m in members))
    elif origin is tuple:
        text = f"[{', '.join('...' if m is Ellipsis else _type(m) for m in members)}]"
    elif origin is dict:
        text = f"{{{_type(members[0])}: {_type(members[1])}}}"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        text = "{...}"
    else:
        text = _NAMES.get(annotation, str(annotation))
    bounds = [
        f"{sign} {getattr(item, name):g}"
        for found in metadata
        for item in getattr(found, "metadata", [found])
        for name, sign in _BOUNDS.items()
        if getattr(item, name, None) is not None
    ]
    return f"{text} {', '.join(bounds)}" if bounds else text


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return json.dumps(field.get_default(call_default_factory=True), default=_plain)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_defaults=True) if isinstance(value, BaseModel) else str(value)


class OwnMethod(MethodOptions):
    """A method of one's own: its keys are known where it lies."""

    model_config = ConfigDict(extra="allow")

    kind: Annotated[str, Field(pattern=":")]


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file: the config, every part of it optional, `base` and `part`."""
    fields: dict[str, Any] = {
        "base": (str, Field("", description="A shipped recipe, or a YAML file, that this one starts from.")),
        "part": (
            Literal[tuple(PARTS)],
            Field("", description="What it is a part of; it sets keys of that kind alone."),
        ),
    }
    for part, kinds in METHODS.items():
        classes = tuple(dict.fromkeys(options_class(part, kind) for kind in kinds))
        meaning = Config.model_fields[part].description
        fields[part] = (Union[(*classes, OwnMethod)], Field(None, description=meaning))
    model: type[BaseModel] = create_model("Recipe", __base__=Config, **fields)
    schema = model.model_json_schema()
    for name in ("base", "part"):
        schema["properties"][name].pop("default")
    for part in METHODS:
        schema["properties"][part].pop("default", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "OmniNFT recipe"}
