"""Clips for a benchmark from a model: what is missing in the folder is made, as JavisBench lays it out.

`sample_0000.mp4` and `sample_0000.wav` per prompt, and a scores.json that says which prompt each was made for. A folder
holds clips of one model with one setting: generation.json says which.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from huggingface_hub import try_to_load_from_cache

from omninft.clips.first_frame import read_first_frame
from omninft.clips.listing import ListedClip, write_listing
from omninft.clips.media import write_clip, write_wav
from omninft.config import EvaluationConfig, GuidanceConfig, SamplingConfig
from omninft.evaluation.clip_folder import sample_name
from omninft.evaluation.held_out import SHOWN_SIDE
from omninft.evaluation.sampling import load_policy
from omninft.files import read_json, write_text
from omninft.models.loading import CLIP_FILE, model_path
from omninft.noise import Occasion
from omninft.prompts.prompt_file import PromptRow
from omninft.rollout.clips import roll_out
from omninft.rollout.sampler import RolloutSampler
from omninft.scorers.views import fit_length
from omninft.scorers.weights import file_sha256
from omninft.types import Clip, OmniNFTError, PromptGroup

SETTINGS_FILE = "generation.json"
SMALL_STEPS = 16  # of a model that names its own clip size, as the bundled one does


@dataclass(frozen=True)
class Generation:
    """What clips are made by. None: the model's own, or LTX-2's published evaluation settings."""

    model: str = "tiny"
    lora: Path | None = None
    seed: int = 0
    steps: int | None = None
    video_guidance: float | None = None  # text guidance; 1 is off
    audio_guidance: float | None = None
    seconds: float | None = None  # clips are cut to this
    frame_rate: float | None = None  # Hz
    audio_rate: int | None = None  # Hz, of the WAV

    @property
    def is_small(self) -> bool:
        """Whether the model names its own clip size, which is then kept."""
        return (Path(model_path(self.model)) / CLIP_FILE).is_file()

    def sampling(self) -> SamplingConfig:
        """Steps, guidance and size. A clip of 8 k + 1 frames at least as long as `seconds` is asked for."""
        full = EvaluationConfig().sampling
        base = SamplingConfig(num_steps=SMALL_STEPS) if self.is_small else full.model_copy(update={"batch_size": 1})
        video, audio = (
            base_scale if given is None else base_scale.model_copy(update={"text": given})
            for base_scale, given in (
                (base.video_guidance, self.video_guidance),
                (base.audio_guidance, self.audio_guidance),
            )
        )
        changes: dict[str, Any] = {"video_guidance": video, "audio_guidance": audio}
        if self.steps is not None:
            changes["num_steps"] = self.steps
        if self.seconds is not None and self.frame_rate is not None and not self.is_small:
            frames = round(self.seconds * self.frame_rate)
            changes |= {"num_frames": -(-(frames - 1) // 8) * 8 + 1, "frame_rate": self.frame_rate}
        return base.model_copy(update=changes)

    def describe(self) -> dict[str, Any]:
        """What is stored and printed; equal for equal clips. Raises OmniNFTError when model or LoRA are not there."""
        sampling = self.sampling()
        size = {
            name: value
            for name in ("num_frames", "height", "width", "frame_rate")
            if (value := getattr(sampling, name)) is not None
        }
        return {
            "model": self.model,
            "model_files": _identity(self.model),
            "lora": str(self.lora) if self.lora is not None else None,
            "lora_sha256": _lora_digest(self.lora) if self.lora is not None else None,
            "seed": self.seed,
            "steps": sampling.num_steps,
            "video_guidance": _scales(sampling.video_guidance),
            "audio_guidance": _scales(sampling.audio_guidance),
            "stg_blocks": list(sampling.stg_blocks),
            "size": size or "the model's own",
            "seconds": self.seconds if not self.is_small else None,
        }


def generate_missing(
    rows: Sequence[PromptRow],
    folder: Path,
    generation: Generation,
    progress: Callable[[int, int], None] = lambda done, total: None,
    share: Callable[[Sequence[Any]], list[Any]] = list,
) -> None:
    """Make the clips of this process's `share` of the rows that `folder` lacks; the model is loaded only for that.

    A clip is there once its mp4 is, which is written last: whatever ends the work, the same call goes on.

    Raises:
        OmniNFTError: the folder holds clips of other settings; a model or LoRA that cannot be read.
    """
    check_settings(folder, generation.describe())
    mine = share(rows)
    todo = [row for row in mine if not (folder / f"{sample_name(row.index)}.mp4").is_file()]
    write_listing(folder, [ListedClip(f"{sample_name(row.index)}.mp4", row.prompt, row.repeat) for row in rows])
    progress(len(mine) - len(todo), len(mine))
    if not todo:
        return
    policy, adapter = load_policy(generation.model, generation.lora)
    sampling = generation.sampling()
    sampler = RolloutSampler(policy, sampling, read_frame=read_first_frame)
    groups = [PromptGroup(row.prompt, (row.repeat,)) for row in todo]
    done = 0
    for _, clips in roll_out(sampler, groups, generation.seed, Occasion.BENCHMARK, adapter):
        for clip in clips:
            _write(folder / sample_name(todo[done].index), clip, generation)
            done += 1
        progress(len(mine) - len(todo) + done, len(mine))


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note in `folder` what its clips are made by. Raises OmniNFTError when they are made by something else."""
    found = read_settings(folder)
    wanted = json.loads(json.dumps(settings))
    if found and found != wanted:
        different = [f"{k} {found.get(k)!r}, now {wanted.get(k)!r}" for k in wanted if found.get(k) != wanted[k]]
        raise OmniNFTError(
            f"{folder} holds clips that were made with {'; '.join(different)}; choose another output, or remove it"
        )
    if not found:
        write_text(folder / SETTINGS_FILE, json.dumps(wanted, indent=1) + "\n")


def read_settings(folder: Path) -> dict[str, Any]:
    """What the folder's clips were made by; {} where it does not say.

    Raises:
        OmniNFTError: the file is damaged.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return {}
    tree = read_json(path, "not the settings of a generation: ")
    if not isinstance(tree, dict):
        raise OmniNFTError(f"{path}: not the settings of a generation: found {tree!r:.60}")
    return tree


def _write(stem: Path, clip: Clip, generation: Generation) -> None:
    """The WAV, then the mp4."""
    if generation.seconds is not None and not generation.is_small:
        clip = trimmed(clip, generation.seconds)
    wave, rate = clip.waveform, clip.sample_rate
    if generation.audio_rate is not None and rate != generation.audio_rate:
        made = np.asarray(soxr.resample(wave.T, rate, generation.audio_rate), dtype=np.float32).T
        wave = fit_length(made, round(wave.shape[1] / rate * generation.audio_rate))
        rate = generation.audio_rate
    write_wav(stem.with_suffix(".wav"), wave, rate)
    write_clip(stem.with_suffix(".mp4"), clip, upscale=max(1, SHOWN_SIDE // max(clip.video.shape[1:3])))


def trimmed(clip: Clip, seconds: float) -> Clip:
    """The first `seconds`: at most as many frames, exactly as many samples (zeros where there are fewer)."""
    frames, samples = round(seconds * clip.frame_rate), round(seconds * clip.sample_rate)
    return replace(clip, video=clip.video[:frames], waveform=fit_length(clip.waveform, samples), views={})


def _scales(guidance: GuidanceConfig) -> dict[str, float]:
    return dict(guidance.model_dump())


def _identity(model: str) -> str:
    """Checksum of a local pipeline's files; of a hub model the commit in the cache."""
    folder = Path(model_path(model))
    if not folder.is_dir():
        cached = try_to_load_from_cache(model, "model_index.json")
        return f"commit {Path(cached).parent.name}" if isinstance(cached, str) else "not in the cache"
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json") and p.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()} {file_sha256(file)}\n".encode())
    return f"sha256 {digest.hexdigest()[:16]}"


def _lora_digest(lora: Path) -> str:
    files = sorted(lora.glob("*.safetensors")) if lora.is_dir() else [lora]
    if not files or not files[0].is_file():
        raise OmniNFTError(f"no LoRA at {lora}; expected a .safetensors file, or a folder with one")
    return file_sha256(files[0])
