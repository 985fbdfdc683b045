"""Commands that show what a recipe says, and what it may say."""

from __future__ import annotations

from typing import Annotated

import typer

from omninft.commands.terminal import Overrides, RecipeArgument, chosen_config, console
from omninft.types import OmniNFTError

config_app = typer.Typer(help="Show a recipe as it is resolved, the recipes and keys there are, or their schema.")


@config_app.command("show")
def show(recipe: RecipeArgument = "omninft", overrides: Overrides = None) -> None:
    """Print a recipe as YAML with everything that it leaves out."""
    import yaml

    tree = chosen_config(recipe, overrides).model_dump(mode="json")
    typer.echo(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), nl=False)


@config_app.command("recipes")
def recipes() -> None:
    """List the recipes, and the parts that are joined by +, as in ltx2.3+gdpo+24gb; a line each."""
    from rich.markup import escape
    from rich.table import Table

    from omninft.recipes import PARTS, read_file, recipe_names

    found = [read_file(name) for name in recipe_names()]
    table = Table("recipe", "part", "what it is", box=None, padding=(0, 2, 0, 0))
    for kind in ("whole", *PARTS):
        for recipe in found:
            if recipe.kind == kind:
                table.add_row(recipe.name, kind, escape(recipe.summary))
    console.print(table)


@config_app.command("keys")
def keys(
    prefix: Annotated[str, typer.Argument(help="Only keys that begin so, e.g. sampling.")] = "",
) -> None:
    """List the keys of a recipe: type, default (a recipe may say otherwise), meaning."""
    from rich.markup import escape
    from rich.table import Table

    from omninft.commands.keys import config_keys
    from omninft.naming import did_you_mean

    found = config_keys(prefix)
    if not found:
        raise OmniNFTError(f"no key begins with {prefix!r}{did_you_mean(prefix, [k.name for k in config_keys()])}")
    table = Table("key", "type", "default", "meaning", box=None, padding=(0, 2, 0, 0))
    for key in found:
        meaning = f"({', '.join(key.kinds)}) {key.meaning}" if key.kinds else key.meaning
        table.add_row(*map(escape, (key.name, key.type, key.default, meaning)))
    console.print(table)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of recipe files; editors complete and check by it."""
    import json

    from omninft.commands.keys import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=1))
