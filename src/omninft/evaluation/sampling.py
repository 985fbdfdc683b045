"""`omninft sample`: prompts to mp4 files, with the base model or a LoRA on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omninft.clips.first_frame import read_first_frame
from omninft.clips.listing import ListedClip, write_listing
from omninft.clips.media import write_clip
from omninft.config import GuidanceConfig, ModelConfig, SamplingConfig
from omninft.evaluation.held_out import SHOWN_SIDE
from omninft.models.lora_file import read_lora
from omninft.models.ltx2 import LTX2Policy
from omninft.models.protocol import AdapterName
from omninft.noise import Occasion
from omninft.prompts.sampler import spread
from omninft.prompts.sources import WORLD, open_prompts
from omninft.rollout.clips import roll_out
from omninft.rollout.sampler import RolloutSampler
from omninft.types import Prompt, PromptGroup


def sample_clips(
    prompts: str,
    output: Path,
    *,
    model: str = "tiny",
    lora: Path | None = None,
    count: int = 1,
    limit: int = 8,
    steps: int = 16,
    seed: int = 0,
    guidance: tuple[float, float] = (1.0, 1.0),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write `count` clips a prompt to `output` as <prompt id>-<number>.mp4, and their prompts to scores.json.

    Raises:
        OmniNFTError: prompts, model or LoRA that cannot be read.
    """
    chosen = _prompts(prompts, limit)
    policy, adapter = load_policy(model, lora)
    sampling = SamplingConfig(
        num_steps=steps,
        video_guidance=GuidanceConfig(text=guidance[0]),
        audio_guidance=GuidanceConfig(text=guidance[1]),
    )
    sampler = RolloutSampler(policy, sampling, read_frame=read_first_frame)
    groups = [PromptGroup(p, tuple(range(count))) for p in chosen]
    total, written, entries = len(groups) * count, [], []
    for _, clips in roll_out(sampler, groups, seed, Occasion.SAMPLE, adapter):
        for clip in clips:
            path = output / f"{clip.prompt.id}-{clip.sample}.mp4"
            write_clip(path, clip, upscale=max(1, SHOWN_SIDE // max(clip.video.shape[1:3])))
            written.append(path)
            entries.append(ListedClip.of(clip, path.name))
        progress(len(written), total)
    write_listing(output, entries)
    return written


def load_policy(model: str = "tiny", lora: Path | None = None, strength: float = 1.0) -> tuple[LTX2Policy, AdapterName]:
    """A model, with a LoRA on it where one is given, and the name of the adapter to sample with.

    Args:
        model: path or hub id.
        lora: of any program (`models/lora_file.py`).
        strength: that the LoRA is multiplied by.

    Raises:
        OmniNFTError: model or LoRA that cannot be read, or a LoRA of another model.
    """
    if lora is None:
        return LTX2Policy.load(ModelConfig(path=model)), "reference"
    _, found = read_lora(lora)
    policy = LTX2Policy.load(ModelConfig(path=model, lora=found.model_copy(update={"init": str(lora)})))
    state = policy.adapters.state("current")
    policy.adapters.load_state("current", {n: t * strength if n.endswith(".lora_B") else t for n, t in state.items()})
    return policy, "current"


def _prompts(source: str, limit: int) -> list[Prompt]:
    """A file, a world split, or the text itself."""
    if source.startswith(WORLD) or Path(source).suffix in (".jsonl", ".csv", ".txt"):
        prompts = open_prompts(source).prompts
        return [prompts[i] for i in spread(limit or len(prompts), len(prompts))]
    return [Prompt("prompt", source, source, source)]
