"""The local page of `omninft demo`, drawn by gradio, which the extra `demo` brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omninft.evaluation.settings import SamplingChoice, clip_size, model_sampling
from omninft.gallery.demo import SideBySide, exported_loras
from omninft.models.loading import read_clip_defaults
from omninft.types import OmniNFTError

HOST = "127.0.0.1"


def require_gradio() -> Any:
    """The module gradio. Raises OmniNFTError: it is not installed, or cannot be imported."""
    try:
        import gradio
    except ImportError as error:
        raise OmniNFTError(f"the demo needs gradio ({error}): pip install 'omninft[demo]'") from error
    return gradio


def build_page(side_by_side: SideBySide, lora: str = "", runs: Path = Path("runs")) -> Any:
    """The page as a `gradio.Blocks`: what may be asked for, a button, two players and a line of text.

    Args:
        lora: chosen at first; blank: that of the newest run under `runs`, if there is one.
    """
    gr = require_gradio()
    steps_of_model = model_sampling(side_by_side.model).num_steps
    clip = read_clip_defaults(side_by_side.model)

    def choices() -> list[str]:
        return list(dict.fromkeys([*([lora] if lora else []), *exported_loras(runs)]))

    def make(
        prompt: str,
        lora: str | None,
        strength: float,
        seed: float | None,
        steps: float | None,
        size: str,
        frames: float | None,
        progress: Any = gr.Progress(),  # noqa: B008 (how gradio hands a bar to a function)
    ) -> tuple[str | None, str | None, str]:
        def tell(done: int, total: int, stage: str) -> None:
            progress((done, total), desc=stage)

        try:
            choice = SamplingChoice(clip_size(size), _whole(frames), steps=_whole(steps))
            pair = side_by_side.generate(prompt, lora or "", strength, _whole(seed) or 0, choice, tell)
        except OmniNFTError as error:
            return None, None, f"error: {error}"
        return str(pair.base), str(pair.trained) if pair.trained else None, pair.message

    with gr.Blocks(title="OmniNFT: base and trained", analytics_enabled=False) as page:
        gr.Markdown(f"# Base and trained\nBoth clips of {side_by_side.model} begin with the same noise.")
        prompt = gr.Textbox(label="Prompt", value=next(iter(side_by_side.examples), ""), elem_id="prompt")
        if side_by_side.examples:
            gr.Examples([[example] for example in side_by_side.examples], prompt, label="In the model's own words")
        with gr.Row():
            chosen = gr.Dropdown(
                choices(),
                value=next(iter(choices()), None),
                label="LoRA",
                info="of a run under ./runs, or a path",
                allow_custom_value=True,
                elem_id="lora",
            )
            strength = gr.Slider(0, 2, 1, step=0.05, label="Strength", info="0 is the base")
            seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
        with gr.Accordion("Steps and size", open=False):
            steps = gr.Number(None, label="Steps", placeholder=str(steps_of_model), precision=0)
            size = gr.Textbox("", label="Size", placeholder=f"{clip.width}x{clip.height}")
            frames = gr.Number(None, label="Frames", placeholder=str(clip.num_frames), precision=0)
        button = gr.Button("Make both", variant="primary", elem_id="make")
        with gr.Row():
            base = gr.Video(label="Base", interactive=False, elem_id="base")
            trained = gr.Video(label="Trained", interactive=False, elem_id="trained")
        said = gr.Textbox(label="What was made", interactive=False, elem_id="said")
        inputs = [prompt, chosen, strength, seed, steps, size, frames]
        gr.on([button.click, prompt.submit], make, inputs, [base, trained, said], concurrency_limit=1)
        page.load(lambda: gr.Dropdown(choices()), outputs=chosen)  # runs that ended since the page was built
    return page


def serve(side_by_side: SideBySide, port: int, lora: str = "") -> None:
    """Serve the page on this machine alone until Ctrl-C; clicks wait for one another.

    Raises:
        OmniNFTError: the port is taken, or gradio is missing.
    """
    page = build_page(side_by_side, lora)
    try:
        page.queue(default_concurrency_limit=1).launch(
            server_name=HOST, server_port=port, share=False, quiet=True, allowed_paths=[str(side_by_side.folder)]
        )
    except OSError as error:
        raise OmniNFTError(f"the demo cannot be served at {HOST}:{port} ({error}); choose another --port") from error


def _whole(value: float | None) -> int | None:
    """What a number field holds; None where it was left empty."""
    return None if value is None else int(value)
