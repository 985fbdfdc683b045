"""`omninft sample`: prompts to mp4 files, with the base model or a LoRA on it."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from omninft.clips.first_frame import read_first_frame
from omninft.clips.listing import LISTING, ListedClip, read_listing, write_listing
from omninft.clips.media import write_clip
from omninft.config import ModelConfig
from omninft.evaluation.held_out import SHOWN_SIDE
from omninft.evaluation.settings import SETTINGS_FILE, SamplingChoice, check_settings, describe
from omninft.models.lora_file import read_lora
from omninft.models.ltx2 import LTX2Policy
from omninft.models.protocol import AdapterName
from omninft.naming import clip_file
from omninft.noise import Occasion
from omninft.prompts.prompt_file import PROMPT_ENDINGS
from omninft.prompts.sampler import spread
from omninft.prompts.sources import STARTER, WORLD, open_prompts
from omninft.rollout.clips import roll_out
from omninft.rollout.sampler import RolloutSampler
from omninft.types import OmniNFTError, Prompt, PromptGroup

# Endings of files that people keep prompts in: what ends so is never the text of a prompt.
FILE_ENDINGS = (*PROMPT_ENDINGS, ".json", ".tsv", ".yaml", ".yml", ".md", ".xlsx", ".parquet")
FORCE = "choose another output, or replace them by --force"


@dataclass(frozen=True)
class SampledClip:
    """One clip of `sample_clips`."""

    path: Path
    prompt: Prompt
    sample: int  # number among the clips of its prompt, from 0
    seed: int  # keys its noise, with the prompt's id and the number
    made: bool  # by this call; False: it was there


def sample_clips(
    prompts: str,
    output: Path,
    *,
    model: str = "tiny",
    lora: Path | None = None,
    strength: float = 1.0,
    count: int = 1,
    limit: int = 8,
    seed: int = 0,
    choice: SamplingChoice | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[SampledClip]:
    """Write `count` clips a prompt to `output` as <prompt id>-<number>.mp4, and their prompts to scores.json.

    The same call goes on where it stopped, and one with other prompts adds to the folder. With `force` the clips that
    the folder's listing names are removed first. `strength` multiplies what the LoRA adds; 0 is the base.

    Raises:
        OmniNFTError: prompts, model or LoRA that cannot be read, a strength without a LoRA, a size or guidance that the
            model cannot do, or an output that holds clips of other settings, or others of these names.
    """
    chosen = read_prompts(prompts, limit)
    sampling = (choice or SamplingChoice()).of(model)
    if lora is None and strength != 1:
        raise OmniNFTError(f"a strength of {strength:g} is that of a LoRA, and none is given")
    settings = describe(model, lora, seed, sampling, strength)
    place = {(p.id, n): output / clip_file(p.id, n) for p in chosen for n in range(count)}
    listed = {c.file: c for c in read_listing(output)} if (output / LISTING).is_file() else {}
    there = set() if force else {key for key, path in place.items() if path.is_file()}
    if not force:
        _require_same(output, settings, listed, [(place[p.id, n], p) for p in chosen for n in range(count)])
    groups = [PromptGroup(p, numbers) for p in chosen if (numbers := _lacking(p, count, there))]
    progress(len(there), len(place))
    if groups:
        policy, adapter = load_policy(model, lora, strength)
        sampler = RolloutSampler(policy, sampling, read_frame=read_first_frame)
        # Only here, where the model has taken the settings, is anything of the folder touched.
        if force:
            _clear(output, [*listed, *(path.name for path in place.values())])
        check_settings(output, settings, FORCE)
        entries = {name: clip for name, clip in listed.items() if (output / name).is_file()}
        for p, n in ((p, n) for p in chosen for n in range(count) if (p.id, n) in there):
            # Of a call that ended between a clip and its listing.
            entries.setdefault(place[p.id, n].name, ListedClip(place[p.id, n].name, p, n))
        done = len(there)
        for _, clips in roll_out(sampler, groups, seed, Occasion.SAMPLE, adapter):
            for clip in clips:
                path = place[clip.prompt.id, clip.sample]
                write_clip(path, clip, upscale=max(1, SHOWN_SIDE // max(clip.video.shape[1:3])))
                entries[path.name] = ListedClip.of(clip, path.name)
            write_listing(output, list(entries.values()))
            done += len(clips)
            progress(done, len(place))
    return [SampledClip(place[p.id, n], p, n, seed, (p.id, n) not in there) for p in chosen for n in range(count)]


def _lacking(prompt: Prompt, count: int, there: set[tuple[str, int]]) -> tuple[int, ...]:
    return tuple(n for n in range(count) if (prompt.id, n) not in there)


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
    policy.adapters.load_state("current", at_strength(state, strength))
    return policy, "current"


def at_strength(state: dict[str, Tensor], strength: float) -> dict[str, Tensor]:
    """A LoRA that adds `strength` times what `state` adds: its B multiplied, its A as it is.

    Raises:
        OmniNFTError: a strength that is not a finite number.
    """
    if not math.isfinite(strength):
        raise OmniNFTError(
            f"strength: found {strength}, expected a finite number; 0 is the base, 1 the LoRA as trained"
        )
    return {name: tensor * strength if name.endswith(".lora_B") else tensor for name, tensor in state.items()}


def read_prompts(source: str, limit: int = 0) -> list[Prompt]:
    """The prompts of a file or a world split, at most `limit` of them, evenly spaced (0: all); or the text itself.

    Raises:
        OmniNFTError: what looks like a file and is none, or no file of prompts; an empty text.
    """
    if source.startswith((WORLD, STARTER)) or _names_file(source):
        prompts = open_prompts(source).prompts
        return [prompts[i] for i in spread(limit or len(prompts), len(prompts))]
    return [text_prompt(source)]


def text_prompt(text: str) -> Prompt:
    """The prompt of a text that a user typed, with an id of its first words and a digest of the whole.

    Raises:
        OmniNFTError: an empty text.
    """
    text = text.strip()
    if not text:
        raise OmniNFTError("the prompt is empty: expected a text, a prompt file, or world:test")
    words = re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return Prompt(f"{words}-{digest}" if words else digest, text, text, text)


def _names_file(source: str) -> bool:
    """Whether an argument means a file, there or not: by its ending, or as one word with a separator of folders."""
    if os.path.isfile(source) or Path(source).suffix.lower() in FILE_ENDINGS:
        return True
    return len(source.split()) == 1 and any(mark in source for mark in ("/", "\\"))


def _require_same(
    output: Path, settings: dict[str, Any], listed: Mapping[str, ListedClip], wanted: Sequence[tuple[Path, Prompt]]
) -> None:
    """Refuse to mix clips of other settings, or made for other prompts of the same names.

    Raises:
        OmniNFTError: saying what differs.
    """
    there = [(path, prompt) for path, prompt in wanted if path.is_file()]
    if (output / SETTINGS_FILE).is_file():
        check_settings(output, settings, FORCE)
    elif listed or there:
        raise OmniNFTError(f"{output} holds clips and no {SETTINGS_FILE} that says what made them; {FORCE}")
    for path, prompt in there:
        found = listed.get(path.name)
        if found is not None and _texts(found.prompt) != _texts(prompt):
            raise OmniNFTError(
                f"{path} was made for another prompt, {found.prompt.prompt_av!r}, now {prompt.prompt_av!r}; {FORCE}"
            )


def _clear(output: Path, names: Iterable[str]) -> None:
    for name in (*names, LISTING, SETTINGS_FILE):
        if Path(name).name == name:  # a listing from elsewhere must not reach out of its folder
            (output / name).unlink(missing_ok=True)


def _texts(prompt: Prompt) -> tuple[str, str, str]:
    return prompt.prompt_v, prompt.prompt_a, prompt.prompt_av
