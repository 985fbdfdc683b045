"""VideoAlign (VideoReward, Liu et al. 2025): visual quality, motion quality and text alignment of a video.

Qwen2-VL-2B with a bias-free linear head read at three tokens that close the three criteria of its prompt. Released
with LoRA weights apart; here they are merged into the base weights at load.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omninft.scorers.prompt_template import find_template, read_template
from omninft.scorers.qwen2_vl import (
    BASE_FILES,
    Example,
    Positions,
    RewardReader,
    build_network,
    current_names,
    load_tokens,
    read_shards,
    resized,
    smart_resize,
    video_frame_count,
)
from omninft.scorers.views import uniform_indices
from omninft.scorers.weights import JudgingModel, read_state, renamed
from omninft.types import Clip, OmniNFTError

DIMENSIONS = ("VQ", "MQ", "TA")
REWARD_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
SMALLEST_AREA = 128 * 28 * 28  # pixels
LARGEST_AREA = 256 * 28 * 28  # pixels, `max_frame_pixels` of the checkpoint
OWN_FPS = 2.0  # of the checkpoint
# Mean and deviation of each dimension, `inference_config` of the checkpoint.
NORMALISATION = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}
TEMPLATE_TYPE = "detailed_special"

MODEL = JudgingModel(
    name="VideoAlign",
    parameters=2_209_000_000,
    licence="uncertain for the weights; code MIT, base Apache-2.0",
    commercial=False,
    files=("model_config.json", "checkpoint-11352/model.pth"),
    repo="KlingTeam/VideoReward",
    revision="4f26600130683e6f1de9f5d463887f28e8ef995c",
    sha256={"checkpoint-11352/model.pth": "48375908e6112de9f0248402db156a23b480709a6960b091c598c6f4c88d21b9"},
)
BASE = JudgingModel(
    name="Qwen2-VL-2B-Instruct",
    parameters=2_209_000_000,
    licence="Apache-2.0",
    commercial=True,
    files=BASE_FILES,
    repo="Qwen/Qwen2-VL-2B-Instruct",
)
TEMPLATE = JudgingModel(
    name="VideoAlign prompt template",
    parameters=0,
    licence="MIT",
    commercial=True,
    files=("prompt_template.py",),
    url="https://raw.githubusercontent.com/KlingTeam/VideoAlign/main/",
)
TEMPLATE_NAMES = ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",)  # preferred; any one string with the three tokens will do


@dataclass(frozen=True)
class VideoAlign:
    """Raw scores of clips, as JavisBench reports them (at the checkpoint's own rate), and their normalised form."""

    reader: RewardReader
    normalisation: Mapping[str, tuple[float, float]] = field(default_factory=lambda: NORMALISATION)
    own_fps: float = OWN_FPS
    largest_area: int = LARGEST_AREA

    def prepare(self, clip: Clip, text: str, fps: float | None = None, rounded: bool = False) -> Example:
        """Frames chosen uniformly at `fps` (None: the checkpoint's own), resized, with the text in the template.

        Raises:
            OmniNFTError: fewer than 2 frames, an extreme aspect ratio, or a text with tokens of the template.
        """
        total = len(clip.video)
        count = video_frame_count(total, clip.frame_rate, self.own_fps if fps is None else fps)
        height, width = clip.video.shape[1:3]
        size = smart_resize(height, width, SMALLEST_AREA, self.largest_area)
        frames = resized(clip.video[uniform_indices(total, count)], *size, rounded)
        return self.reader.example(text, frames, "video")

    def judge(self, examples: Sequence[Example], budget: int) -> np.ndarray:
        """[n, 3] float64: VQ, MQ, TA as the head gives them, in forward passes of up to `budget` tokens."""
        outputs = self.reader.outputs(examples, budget)  # [n, 3 tokens, 1 or 3]
        shared = outputs.shape[-1] == 1
        return (outputs[..., 0] if shared else outputs.diagonal(dim1=1, dim2=2)).double().numpy()

    def normalised(self, raw: np.ndarray) -> np.ndarray:
        """(x - mean) / deviation of each of VQ, MQ, TA [n, 3]."""
        mean, deviation = np.array([self.normalisation[d] for d in DIMENSIONS]).T
        return (raw - mean) / deviation


def missing(
    path: str | Path | None = None, base: str | Path | None = None, template: str | Path | None = None
) -> str | None:
    """None when weights, base and template are there, else each that is not, with what fetches it."""
    problems = [BASE.missing(base)]
    try:
        _, _, adapter = _checkpoint(path)
        if adapter and not list(_base_folder(base).glob("model*.safetensors")):
            problems.append(_base_weights_missing(base))
    except OmniNFTError as error:
        problems.insert(0, str(error))
    try:
        find_template(TEMPLATE, path, template)
    except OmniNFTError as error:
        problems.append(str(error))
    return "; ".join(dict.fromkeys(problem for problem in problems if problem)) or None


def load_videoalign(
    path: str | Path | None = None,
    base: str | Path | None = None,
    template: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    positions: Positions = "sequential",
) -> VideoAlign:
    """The scorer from `path` (a folder with model_config.json and checkpoint-N; default: the hub cache).

    The highest checkpoint-N is taken: its model.pth, else its adapter_model.safetensors with
    non_lora_state_dict.pth over the base weights. `base` has configuration and tokenizer of Qwen2-VL-2B-Instruct,
    `template` the prompt template (see prompt_template.py; default: beside the weights).

    Raises:
        OmniNFTError: something is missing (with what fetches it) or does not fit.
    """
    lacking = missing(path, base, template)
    if lacking is not None:
        raise OmniNFTError(lacking)
    folder, checkpoint, adapter = _checkpoint(path)
    config = _read_config(folder / "model_config.json")
    lora = config.get("peft_lora_config") or {}
    tokens = load_tokens(BASE, base, REWARD_TOKENS, checkpoint / "tokenizer")
    if adapter:
        state = current_names(read_shards(_base_folder(base)))
        embedding = "model.language_model.embed_tokens.weight"
        if embedding in state:  # if not, build_network says so
            state[embedding] = state[embedding][: len(tokens.tokenizer)]
        trained = merged_lora(
            read_state(checkpoint / "adapter_model.safetensors") | read_state(checkpoint / "non_lora_state_dict.pth"),
            lora,
            state,
        )
        state |= trained
    else:
        file = checkpoint / "model.pth"
        state = merged_lora(read_state(file, (MODEL.sha256 or {}).get(f"{checkpoint.name}/model.pth")), lora)
    weight = state.get("rm_head.weight")
    if weight is None or len(weight) not in (1, 3):
        found = "none" if weight is None else list(weight.shape)
        raise OmniNFTError(f"{checkpoint}: rm_head.weight is {found}, expected 1 row (shared) or 3 (one a dimension)")
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    network = build_network(BASE, base, head, state, dtype).to(device)
    prompt = read_template(find_template(TEMPLATE, path, template), REWARD_TOKENS, names=TEMPLATE_NAMES)
    data = config.get("data_config") or {}
    return VideoAlign(
        RewardReader(network, tokens, prompt, positions),
        _normalisation(config),
        float(data.get("fps") or OWN_FPS),
        int(data.get("max_frame_pixels") or LARGEST_AREA),
    )


def merged_lora(
    state: Mapping[str, Tensor], config: Mapping[str, Any], base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A PEFT-wrapped state as plain weights under current names: W + alpha / r * B A wherever there is a pair A, B.

    `base` has the weights (current names) that the state itself does not; only changed ones are returned then.

    Raises:
        OmniNFTError: half a pair, a pair without a weight, or no `lora_alpha` in the configuration.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in renamed(state, _without_peft).items():
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match:
            pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
        else:
            plain[name] = tensor
    weights = current_names(plain)
    factors = current_names({f"{name}|{letter}": t for name, pair in pairs.items() for letter, t in pair.items()})
    for name in {key.rpartition("|")[0] for key in factors}:
        a, b = factors.get(f"{name}|A"), factors.get(f"{name}|B")
        if a is None or b is None:
            raise OmniNFTError(f"the adapter has only one of lora_A and lora_B for {name}")
        weight = weights.get(name, (base or {}).get(name))
        if weight is None:
            raise OmniNFTError(f"the adapter changes {name}, which neither checkpoint nor base holds")
        weights[name] = (weight.float() + _lora_scale(config, len(a)) * (b.float() @ a.float())).to(weight.dtype)
    return weights


def _lora_scale(config: Mapping[str, Any], rank: int) -> float:
    alpha = config.get("lora_alpha")
    if alpha is None:
        raise OmniNFTError("model_config.json: peft_lora_config has no lora_alpha, and the checkpoint has LoRA weights")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _without_peft(name: str) -> str | None:
    if ".original_module." in name:
        return None
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")


def _checkpoint(path: str | Path | None) -> tuple[Path, Path, bool]:
    """Folder of model_config.json, folder of the highest checkpoint-N, and whether that one is an adapter.

    Raises:
        OmniNFTError: what is missing, and the command that fetches it.
    """
    config = MODEL.find("model_config.json", path)
    if config is None:
        raise OmniNFTError(MODEL.missing(path) or f"{MODEL.name}: missing model_config.json in {path}")
    numbered = {
        int(place.name.rpartition("-")[2]): place
        for place in config.parent.glob("checkpoint-*")
        if place.is_dir() and place.name.rpartition("-")[2].isdigit()
    }
    if numbered:
        place = numbered[max(numbered)]
        if (place / "model.pth").is_file():
            return config.parent, place, False
        if all((place / name).is_file() for name in ("adapter_model.safetensors", "non_lora_state_dict.pth")):
            return config.parent, place, True
    raise OmniNFTError(
        f"{MODEL.name}: no checkpoint-N in {config.parent} holds model.pth, or adapter_model.safetensors with "
        f"non_lora_state_dict.pth; fetch by: {MODEL.fetch_command(path=path)}"
    )


def _base_folder(base: str | Path | None) -> Path:
    return BASE.locate(base)["config.json"].parent


def _base_weights_missing(base: str | Path | None) -> str:
    command = f"hf download {BASE.repo} --include 'model*.safetensors'" + (f" --local-dir {base}" if base else "")
    return f"{BASE.name}: an adapter needs the base weights, and there is no model*.safetensors; fetch by: {command}"


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OmniNFTError(f"{file}: not JSON ({error})") from error
    found = (config.get("data_config") or {}).get("prompt_template_type", TEMPLATE_TYPE)
    if found != TEMPLATE_TYPE:
        raise OmniNFTError(f"{file}: prompt_template_type is {found!r}, expected {TEMPLATE_TYPE!r}")
    return dict(config)


def _normalisation(config: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """`{VQ,MQ,TA}_mean` and `_std` of inference_config, the published values where it has none."""
    given = config.get("inference_config") or {}
    return {
        name: (float(given.get(f"{name}_mean", mean)), float(given.get(f"{name}_std", std)))
        for name, (mean, std) in NORMALISATION.items()
    }
