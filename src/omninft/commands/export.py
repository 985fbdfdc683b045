"""The command that hands a trained adapter to other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omninft.commands.terminal import console
from omninft.types import OmniNFTError

FORMS = ("common", "peft", "merged")


def export(
    source: Annotated[Path, typer.Argument(help="A run folder, or a LoRA file or folder of any program.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")],
    form: Annotated[
        str, typer.Option("--format", help="common (one file for all programs), peft or merged.")
    ] = "common",
    model: Annotated[
        str | None, typer.Option(help="Base model; default: the run's, for a LoRA the bundled one.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of merged weights: auto (the base's), float32 or bfloat16.")] = "auto",
    alpha: Annotated[float | None, typer.Option(help="Of a LoRA that does not say it.", min=0)] = None,
    push: Annotated[str | None, typer.Option(help="Upload to this private repository of the hub, after a yes.")] = None,
) -> None:
    """Write a trained LoRA for other programs, with a model card: one common file, a PEFT folder, or merged weights."""
    from omninft.config import ModelConfig
    from omninft.evaluation.paired import PairedTable
    from omninft.export.card import push as upload
    from omninft.export.card import write_card
    from omninft.export.forms import write_merged, write_peft
    from omninft.export.lora import write_common
    from omninft.files import replacing_folder
    from omninft.models.lora_file import read_lora
    from omninft.runs.folder import read_run_config

    if form not in FORMS:
        raise OmniNFTError(f"--format: found {form!r}, expected one of {', '.join(FORMS)}")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise OmniNFTError(f"--dtype: found {dtype!r}, expected auto, float32 or bfloat16")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OmniNFTError(f"{output} is there and not an empty folder; choose another --output")
    is_run = (source / "config.yaml").is_file()
    base = read_run_config(source).model if is_run else ModelConfig()
    if model is not None:
        base = base.model_copy(update={"path": model})
    state, lora = read_lora(source, alpha)
    table = source / "evaluation.json"
    measured = PairedTable.from_json(table.read_text("utf-8")).to_markdown() if is_run and table.is_file() else None
    with replacing_folder(output) as made:
        if form == "common":
            write_common(state, lora, made)
        elif form == "peft":
            write_peft(state, lora, made, base.path)
        else:
            write_merged(state, lora, base, made, dtype)
        write_card(made, form, base.path, lora, measured)  # type: ignore[arg-type]
    console.print(f"{form} in {output}", highlight=False)
    if push is not None:
        if not typer.confirm(f"Upload {output} to {push}?", default=False):
            console.print("nothing was uploaded", highlight=False)
            return
        console.print(f"uploaded to {upload(output, push)}", highlight=False)
