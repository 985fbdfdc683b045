"""Base and trained model side by side, prompt by prompt: what a click on the page of `omninft demo` does.

Both clips start from the same noise, so that what differs is what the LoRA does. `gallery/demo_page.py` is the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from omninft.clips.media import write_clip
from omninft.config import LoraConfig, ModelConfig
from omninft.evaluation.held_out import SHOWN_SIDE
from omninft.evaluation.sampling import at_strength, text_prompt
from omninft.evaluation.settings import SamplingChoice, is_small
from omninft.evaluation.wording import word_warning
from omninft.export.lora import read_lora
from omninft.models.ltx2 import LTX2Policy
from omninft.models.protocol import AdapterName
from omninft.noise import Occasion
from omninft.rollout.clips import roll_out
from omninft.rollout.sampler import RolloutSampler
from omninft.types import PromptGroup

# In the words of the bundled model, which knows no others.
EXAMPLES = (
    "a red ball bounces twice two low notes ring out",
    "a blue lamp flashes once while a square drifts by a high buzz sounds once",
    "a yellow ball touches the ground thrice the sound of three mid tones",
    "a green lamp blinks twice two high buzzes are heard",
)


@dataclass(frozen=True)
class Pair:
    """Two mp4 files of one prompt and one noise, and a line about them."""

    base: Path
    trained: Path | None  # None without a LoRA
    message: str


class SideBySide:
    """A model that is loaded once and makes pairs of clips, one call at a time whoever calls.

    A LoRA of the same rank, alpha and targets as the last takes its place; one of other ones loads the model again.

    Args:
        model: "tiny", a pipeline folder, or a hub id.
        folder: where the clips are written, numbered.
    """

    def __init__(self, model: str, folder: Path) -> None:
        self.model, self.folder = model, folder
        self._lock = Lock()
        self._policy: LTX2Policy | None = None
        self._calls = 0

    @property
    def examples(self) -> tuple[str, ...]:
        """Prompts to begin with, where the model's words are known: those of a model of the bundled kind."""
        return EXAMPLES if is_small(self.model) else ()

    def load(self, lora: str = "") -> None:
        """Load the model now, with room for this LoRA; otherwise the first call does.

        Raises:
            OmniNFTError: model or LoRA that cannot be read.
        """
        shape = read_lora(Path(lora))[1] if lora else None
        with self._lock:
            self._loaded(shape)

    def generate(
        self,
        prompt: str,
        lora: str = "",
        strength: float = 1.0,
        seed: int = 0,
        choice: SamplingChoice | None = None,
        progress: Callable[[int, int, str], None] = lambda done, total, stage: None,
    ) -> Pair:
        """Make the base's clip of a prompt, and the trained one where a LoRA is named.

        Args:
            lora: a folder or file that omninft exported; blank: none.
            strength: multiplies what the LoRA adds.
            seed: keys the noise, as in `omninft sample`.
            choice: steps and sizes otherwise than the model's own.
            progress: told (steps done, steps in all, what comes now).

        Raises:
            OmniNFTError: an empty prompt; model or LoRA that cannot be read; a strength, size or steps that cannot be.
        """
        asked = text_prompt(prompt)
        sampling = (choice or SamplingChoice()).of(self.model)
        place = lora.strip()
        state, shape = read_lora(Path(place)) if place else ({}, None)
        state = at_strength(state, strength)
        adapters: tuple[AdapterName, ...] = ("reference", "current") if place else ("reference",)
        with self._lock:
            progress(0, len(adapters) + 1, "loading the model")
            policy = self._loaded(shape)
            if place:
                policy.adapters.load_state("current", state)
            sampler = RolloutSampler(policy, sampling)
            self._calls += 1
            files = []
            for done, adapter in enumerate(adapters, 1):
                label = "base" if adapter == "reference" else "trained"
                progress(done, len(adapters) + 1, f"sampling, {label}")
                _, (clip,) = next(roll_out(sampler, [PromptGroup(asked, (0,))], seed, Occasion.SAMPLE, adapter))
                files.append(self.folder / f"{self._calls:04d}-{label}.mp4")
                write_clip(files[-1], clip, upscale=max(1, SHOWN_SIDE // max(clip.video.shape[1:3])))
        made = f"{place} at strength {strength:g}" if place else "no LoRA: the base alone"
        message = f"{made}, seed {seed}, {sampling.num_steps} steps"
        if (unknown := word_warning(self.model, [asked])) is not None:
            message += f". {unknown}"
        return Pair(files[0], files[1] if place else None, message)

    def _loaded(self, shape: LoraConfig | None) -> LTX2Policy:
        """The model with adapters of this shape; None: whatever it has."""
        if self._policy is None or shape not in (None, self._policy.config.lora):
            # Let go of the old one first: two large models have no room beside each other.
            self._policy = None
            self._policy = LTX2Policy.load(ModelConfig(path=self.model, lora=shape or LoraConfig()))
        return self._policy


def exported_loras(runs: Path) -> list[str]:
    """Folders with the LoRA of every run under `runs`, the newest first."""
    files = sorted(runs.glob("*/export/*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    return list(dict.fromkeys(str(file.parent) for file in files))
