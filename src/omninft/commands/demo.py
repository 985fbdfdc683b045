"""The command that serves the demo page."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from omninft.commands.terminal import console


def demo(
    model: Annotated[str, typer.Option(help='"tiny", a pipeline folder, or a hub id.')] = "tiny",
    lora: Annotated[
        Path | None, typer.Option(help="A LoRA folder or file; default: that of the newest run under runs/.")
    ] = None,
    port: Annotated[int, typer.Option(help="On 127.0.0.1.", min=1, max=65535)] = 7860,
) -> None:
    """Open a local page that plays base and trained model side by side, with sound, for prompts that you type."""
    from omninft.gallery.demo import SideBySide, exported_loras
    from omninft.gallery.demo_page import HOST, require_gradio, serve

    require_gradio()  # before the model is loaded
    chosen = str(lora) if lora else next(iter(exported_loras(Path("runs"))), "")
    with TemporaryDirectory(prefix="omninft-demo-") as folder:
        side_by_side = SideBySide(model, Path(folder))
        console.print(f"loading {model}", highlight=False, markup=False)
        side_by_side.load(chosen)
        console.print(f"demo on http://{HOST}:{port}; Ctrl-C stops", highlight=False)
        serve(side_by_side, port, chosen)
