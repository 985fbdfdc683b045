"""HPSv3 (Ma et al. 2025): human preference for a picture given its prompt.

Qwen2-VL-7B with a small network (keys rm_head.0, .3, .5) read at one token; it gives mean and deviation of a score,
of which the mean is used.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from omninft.scorers.prompt_template import find_template, read_template
from omninft.scorers.qwen2_vl import (
    BASE_FILES,
    Example,
    Positions,
    RewardReader,
    build_network,
    current_names,
    load_tokens,
    smart_resize,
)
from omninft.scorers.weights import JudgingModel
from omninft.types import OmniNFTError

REWARD_TOKENS = ("<|Reward|>",)
AREA = 256 * 28 * 28  # pixels, smallest and largest
WIDTHS = (1024, 16, 2)  # of the head's layers

MODEL = JudgingModel(
    name="HPSv3",
    parameters=8_290_000_000,
    licence="uncertain for the weights; code MIT, base Apache-2.0",
    commercial=False,
    files=("HPSv3.safetensors",),
    repo="MizzenAI/HPSv3",
    revision="4f81e3e09edd82fe3c5f636444c721b592a735ca",
    sha256={"HPSv3.safetensors": "a13d7ff5a07b7ffa0f7824e60d62e6ae144541ceefd5224b4c08fda7ab39f353"},
)
BASE = JudgingModel(
    name="Qwen2-VL-7B-Instruct",
    parameters=8_290_000_000,
    licence="Apache-2.0",
    commercial=True,
    files=BASE_FILES,
    repo="Qwen/Qwen2-VL-7B-Instruct",
)
TEMPLATE = JudgingModel(
    name="HPSv3 prompt template",
    parameters=0,
    licence="MIT",
    commercial=True,
    files=("data_collator_qwen.py",),
    url="https://raw.githubusercontent.com/MizzenAI/HPSv3/master/hpsv3/dataset/",
)
# File and names as remembered from the official code; any file with the same wording can be given as `template`.
TEMPLATE_NAMES = ("INSTRUCTION", "prompt_with_special_token")  # joined; else what holds field and token


@dataclass(frozen=True)
class HPSv3:
    """Preference scores of pictures."""

    reader: RewardReader

    def prepare(self, frame: np.ndarray, text: str, jpeg_quality: int | None = None) -> Example:
        """One frame [H, W, 3] uint8, resized, with the text in the template.

        `jpeg_quality` encodes and decodes the frame as JPEG first, as the official server gets it (75).

        Raises:
            OmniNFTError: an extreme aspect ratio, or a text with tokens of the template.
        """
        picture = Image.fromarray(frame)
        if jpeg_quality is not None:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=jpeg_quality)
            picture = Image.open(file).convert("RGB")
        height, width = frame.shape[:2]
        rows, columns = smart_resize(height, width, AREA, AREA)
        small = np.array(picture.resize((columns, rows), Image.Resampling.BICUBIC))
        return self.reader.example(text, torch.from_numpy(small).permute(2, 0, 1)[None], "image")

    def judge(self, examples: Sequence[Example], budget: int) -> np.ndarray:
        """[n] float64: the mean of each picture's score, in forward passes of up to `budget` tokens."""
        return self.reader.outputs(examples, budget)[:, 0, 0].double().numpy()


def preference_head(width: int) -> nn.Sequential:
    """Hidden state [..., width] to (mean, deviation); built without memory, to be filled from a checkpoint."""
    first, second, outputs = WIDTHS
    with torch.device("meta"):
        return nn.Sequential(
            nn.Linear(width, first),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, outputs),
        )


def missing(
    path: str | Path | None = None, base: str | Path | None = None, template: str | Path | None = None
) -> str | None:
    """None when weights, base and template are there, else each that is not, with what fetches it."""
    problems = [MODEL.missing(path), BASE.missing(base)]
    try:
        find_template(TEMPLATE, path, template)
    except OmniNFTError as error:
        problems.append(str(error))
    return "; ".join(problem for problem in problems if problem) or None


def load_hpsv3(
    path: str | Path | None = None,
    base: str | Path | None = None,
    template: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    positions: Positions = "sequential",
) -> HPSv3:
    """The scorer from `path` (HPSv3.safetensors or its folder; default: the hub cache).

    `base` has configuration and tokenizer of Qwen2-VL-7B-Instruct, `template` the instruction and the line with the
    reward token (see prompt_template.py; default: beside the weights).

    Raises:
        OmniNFTError: something is missing (with what fetches it) or does not fit.
    """
    lacking = missing(path, base, template)
    if lacking is not None:
        raise OmniNFTError(lacking)
    tokens = load_tokens(BASE, base, REWARD_TOKENS)
    state = current_names(MODEL.state(MODEL.files[0], path))
    first = state.get("rm_head.0.weight")
    if first is None:
        raise OmniNFTError(f"{MODEL.name}: the checkpoint has no rm_head.0.weight")
    network = build_network(BASE, base, preference_head(first.shape[1]), state, dtype).to(device)
    prompt = read_template(find_template(TEMPLATE, path, template), REWARD_TOKENS, names=TEMPLATE_NAMES)
    return HPSv3(RewardReader(network, tokens, prompt, positions))
