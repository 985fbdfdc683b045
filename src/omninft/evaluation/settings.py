"""How clips of a model are sampled where nothing else is said, and the note in a folder of what made its clips.

`omninft sample`, `evaluate` and `vbench export --model` share these settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from omninft.config import EvaluationConfig, GuidanceConfig, SamplingConfig
from omninft.files import read_json, write_text
from omninft.models.loading import CLIP_FILE, model_path
from omninft.scorers.weights import file_sha256
from omninft.types import OmniNFTError

SETTINGS_FILE = "generation.json"
SMALL_STEPS = 16  # of a model that names its own clip size, as the bundled one does


def is_small(model: str) -> bool:
    """Whether the model names its own clip size, as the bundled one does."""
    return (Path(model_path(model)) / CLIP_FILE).is_file()


def model_sampling(model: str) -> SamplingConfig:
    """Steps and guidance of a model: 16 steps without guidance for one that names its own clip size.

    Others get LTX-2's published evaluation settings, one clip at a time.
    """
    if is_small(model):
        return SamplingConfig(num_steps=SMALL_STEPS)
    return SamplingConfig(**EvaluationConfig().sampling.model_dump(exclude={"batch_size"}), batch_size=1)


def clip_size(text: str | None) -> tuple[int, int] | None:
    """Width and height in pixels of "768x512"; None where nothing is said.

    Raises:
        OmniNFTError: another form.
    """
    if text is None or not text.strip():
        return None
    width, _, height = text.strip().lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise OmniNFTError(f"size: found {text!r}, expected WIDTHxHEIGHT in pixels, e.g. 768x512")
    return int(width), int(height)


@dataclass(frozen=True)
class SamplingChoice:
    """What is wanted otherwise than a model's own settings; None: as they are.

    `stg`, `modality` and `rescale` are of both streams.
    """

    size: tuple[int, int] | None = None  # width, height in pixels
    frames: int | None = None
    rate: float | None = None  # Hz
    steps: int | None = None
    video_guidance: float | None = None  # text guidance; 1 is off
    audio_guidance: float | None = None
    stg: float | None = None  # spatio-temporal guidance; 0 is off
    stg_blocks: tuple[int, ...] | None = None  # whose self-attention it perturbs
    modality: float | None = None  # modality guidance; 1 is off
    rescale: float | None = None  # 0..1
    negative: str | None = None  # prompt that text guidance leads away from

    def of(self, model: str) -> SamplingConfig:
        """The settings of `model` with these changes.

        Raises:
            OmniNFTError: spatio-temporal guidance without blocks, a negative prompt without text guidance, or a value
                out of range.
        """
        base = model_sampling(model)
        shared = {"stg": self.stg, "modality": self.modality, "rescale": self.rescale}
        changes = {
            "num_frames": self.frames,
            "width": self.size[0] if self.size else None,
            "height": self.size[1] if self.size else None,
            "frame_rate": self.rate,
            "num_steps": self.steps,
            "stg_blocks": self.stg_blocks,
            "negative_prompt": self.negative,
            "video_guidance": _guidance(base.video_guidance, text=self.video_guidance, **shared),
            "audio_guidance": _guidance(base.audio_guidance, text=self.audio_guidance, **shared),
        }
        try:
            made = SamplingConfig.model_validate(base.model_dump() | _given(changes))
        except ValueError as error:
            raise OmniNFTError(f"sampling: {_first_line(error)}") from error
        scales = (made.video_guidance, made.audio_guidance)
        if self.negative and all(g.text == 1.0 for g in scales):
            raise OmniNFTError(
                "a negative prompt acts by text guidance, which is off (1): give --video-guidance or --audio-guidance"
            )
        return made


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _guidance(base: GuidanceConfig, **scales: float | None) -> dict[str, float]:
    return base.model_dump() | _given(dict(scales))


def _first_line(error: ValueError) -> str:
    """Of pydantic's findings: the field, what was wrong, what was found."""
    found: list[Any] = getattr(error, "errors", lambda: [])()
    if not found:
        return str(error)
    return f"{'.'.join(map(str, found[0]['loc']))}: {found[0]['msg']}; found {found[0]['input']!r}"


def describe(
    model: str, lora: Path | None, seed: int, sampling: SamplingConfig, strength: float = 1.0
) -> dict[str, Any]:
    """What makes clips, as it is stored and printed; equal for equal clips.

    Raises:
        OmniNFTError: model or LoRA are not there.
    """
    size = _given({name: getattr(sampling, name) for name in ("num_frames", "height", "width", "frame_rate")})
    return {
        "model": model,
        "model_files": _identity(model),
        "lora": str(lora) if lora is not None else None,
        "lora_sha256": _lora_digest(lora) if lora is not None else None,
        **({"strength": strength} if strength != 1 else {}),
        "seed": seed,
        "steps": sampling.num_steps,
        "video_guidance": sampling.video_guidance.model_dump(),
        "audio_guidance": sampling.audio_guidance.model_dump(),
        "stg_blocks": list(sampling.stg_blocks),
        "size": size or "the model's own",
        **({"negative_prompt": sampling.negative_prompt} if sampling.negative_prompt else {}),
    }


def check_settings(folder: Path, settings: dict[str, Any], advice: str = "choose another output, or remove it") -> None:
    """Note in `folder` what its clips are made by. Raises OmniNFTError when they are made by something else."""
    found = read_settings(folder)
    wanted = json.loads(json.dumps(settings))
    if found and found != wanted:
        names = dict.fromkeys((*wanted, *found))
        different = [f"{k} {found.get(k)!r}, now {wanted.get(k)!r}" for k in names if found.get(k) != wanted.get(k)]
        raise OmniNFTError(f"{folder} holds clips that were made with {'; '.join(different)}; {advice}")
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
    files: Iterable[Path] = sorted(lora.glob("*.safetensors")) if lora.is_dir() else [lora]
    first = next(iter(files), None)
    if first is None or not first.is_file():
        raise OmniNFTError(f"no LoRA at {lora}; expected a .safetensors file, or a folder with one")
    return file_sha256(first)
