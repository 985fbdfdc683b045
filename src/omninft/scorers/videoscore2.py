"""VideoScore2 (TIGER-Lab): a Qwen2.5-VL-7B that reasons about a video and ends with three digits from 1 to 5.

It is decoded greedily, so that a clip has one score; a digit is read together with the probabilities of all five at
its step. Frames per second are the specification's; the area of a frame is that of qwen-vl-utils' videos, unconfirmed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, LogitsProcessor, LogitsProcessorList

from omninft.scorers.batching import micro_batches
from omninft.scorers.prompt_template import PromptTemplate, find_template, read_template
from omninft.scorers.qwen2_vl import (
    BASE_FILES,
    PLACEHOLDERS,
    TEMPORAL,
    VISION_END,
    Example,
    Tokens,
    load_tokens,
    normalised,
    patchify,
    resized,
    smart_resize,
    video_frame_count,
)
from omninft.scorers.views import uniform_indices
from omninft.scorers.weights import JudgingModel
from omninft.types import Clip, OmniNFTError

Reading = Literal["expected", "soft", "hard"]
READINGS: tuple[Reading, ...] = ("expected", "soft", "hard")
FPS = 2.0
SMALLEST_AREA, LARGEST_AREA = 128 * 28 * 28, 768 * 28 * 28  # pixels of a frame
LONGEST_ANSWER = 1024  # tokens
# Visual quality, text alignment, physical consistency: as the model names them in its answer.
DIMENSIONS = ("visual quality", "text-to-video alignment", "physical/common-sense consistency")
DIGITS = ("1", "2", "3", "4", "5")

MODEL = JudgingModel(
    name="VideoScore2",
    parameters=8_290_000_000,
    licence="uncertain",
    commercial=False,
    files=BASE_FILES,  # and the weights: see `missing`
    repo="TIGER-Lab/VideoScore2",
)
# The file as remembered from the official code; any file with the wording can be given as `template`.
TEMPLATE = JudgingModel(
    name="VideoScore2 prompt template",
    parameters=0,
    licence="uncertain",
    commercial=False,
    files=("vs2_inference.py",),
    url="https://raw.githubusercontent.com/TIGER-AI-Lab/VideoScore2/main/",
)
TEMPLATE_FIELD = "t2v_prompt"


def read_scores(pieces: Sequence[str], digit_logits: np.ndarray, reading: Reading = "expected") -> np.ndarray:
    """[3] scores of an answer: the text of each generated token, and the logits of "1".."5" at each step [steps, 5].

    Of several mentions of a dimension with a digit the last counts: reasoning comes before the verdict. "hard" is the
    digit; "soft" the likeliest digit times its share among the five; "expected" the sum of digits times shares.
    NaN for a dimension without a digit, or with one that is not a token of its own (except "hard").
    """
    ends = np.cumsum([len(piece) for piece in pieces])
    text = "".join(pieces)
    scores = np.full(len(DIMENSIONS), np.nan)
    for k, name in enumerate(DIMENSIONS):
        found = list(re.finditer(rf"{re.escape(name)}[\s:*]*([1-5])(?!\d|\.\d)", text, re.IGNORECASE))
        if not found:
            continue
        step = int(np.searchsorted(ends, found[-1].start(1), side="right"))
        if reading == "hard":
            scores[k] = int(found[-1][1])
        elif pieces[step] in DIGITS:
            logits = digit_logits[step].astype(np.float64)
            shares = np.exp(logits - logits.max())
            shares /= shares.sum()
            likeliest = int(shares.argmax())
            scores[k] = (likeliest + 1) * shares[likeliest] if reading == "soft" else float(shares @ np.arange(1, 6))
    return scores


class _DigitLogits(LogitsProcessor):
    """Keeps the logits of the five digits of every step; those of the whole vocabulary would fill the memory."""

    def __init__(self, digit_ids: list[int]) -> None:
        self.digit_ids, self.steps = digit_ids, list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores[:, self.digit_ids].float().cpu())
        return scores


@dataclass(frozen=True)
class VideoScore2:
    """Scores of clips by greedily decoded answers."""

    network: Any  # Qwen2_5_VLForConditionalGeneration
    tokens: Tokens
    template: PromptTemplate
    longest_answer: int = LONGEST_ANSWER

    def prepare(self, clip: Clip, text: str) -> Example:
        """Frames at 2 a second, resized, with the text in the template. Raises OmniNFTError: not judgeable."""
        total = len(clip.video)
        chosen = uniform_indices(total, video_frame_count(total, clip.frame_rate, FPS))
        height, width = clip.video.shape[1:3]
        size = smart_resize(height, width, SMALLEST_AREA, LARGEST_AREA)
        return self.tokens.example(self.template.fill(text), resized(clip.video[chosen], *size), "video")

    def judge(self, examples: Sequence[Example], budget: int, reading: Reading = "expected") -> np.ndarray:
        """[n, 3] float64 in 1..5 (as DIMENSIONS), NaN where an answer lacks a digit; `budget` in tokens."""
        scores = np.full((len(examples), len(DIMENSIONS)), np.nan)
        for batch in micro_batches([len(example) + self.longest_answer for example in examples], budget):
            for number, (pieces, logits) in zip(batch, self.answers([examples[i] for i in batch]), strict=True):
                scores[number] = read_scores(pieces, logits, reading)
        return scores

    @torch.inference_mode()
    def answers(self, examples: Sequence[Example]) -> list[tuple[list[str], np.ndarray]]:
        """Per example the text of each generated token and the digits' logits [steps, 5]; one batch, padded left.

        No repetition penalty, whatever the checkpoint's defaults: it would bend the digits' probabilities.
        """
        device = next(self.network.parameters()).device
        longest = max(len(example) for example in examples)
        padding, video = self.tokens.id(VISION_END), self.tokens.id(PLACEHOLDERS["video"])
        ids = torch.full((len(examples), longest), padding)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            ids[row, longest - len(example) :] = example.ids
            mask[row, longest - len(example) :] = 1
        cut = [patchify(normalised(example.frames.to(device))) for example in examples]
        recorder = _DigitLogits([self.tokens.id(digit) for digit in DIGITS])
        generated = self.network.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            mm_token_type_ids=((ids == video).int() * 2).to(device),
            pixel_values_videos=torch.cat([patches for patches, _ in cut]),
            video_grid_thw=torch.tensor([grid for _, grid in cut], device=device),
            second_per_grid_ts=torch.full((len(examples),), TEMPORAL / FPS, device=device),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            max_new_tokens=self.longest_answer,
            pad_token_id=padding,
            logits_processor=LogitsProcessorList([recorder]),
        )
        decode = self.tokens.tokenizer.decode
        texts = [[decode([token]) for token in row] for row in generated[:, longest:].tolist()]
        logits = torch.stack(recorder.steps, dim=1).numpy()
        return [(pieces, logits[row]) for row, pieces in enumerate(texts)]


def missing(path: str | Path | None = None, template: str | Path | None = None) -> str | None:
    """None when configuration, tokenizer, all weight files and the template are there, else what is not."""
    problems = [MODEL.missing(path)]
    if problems[0] is None:
        folder = MODEL.locate(path)["config.json"].parent
        index = folder / "model.safetensors.index.json"
        wanted = (
            set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if index.is_file()
            else {"model.safetensors"}
        )
        lacking = sorted(name for name in wanted if not (folder / name).is_file())
        if lacking:
            command = f"hf download {MODEL.repo}" + (f" --local-dir {path}" if path is not None else "")
            problems.append(f"{MODEL.name}: missing {', '.join(lacking)} in {folder}; fetch by: {command}")
    try:
        find_template(TEMPLATE, path, template)
    except OmniNFTError as error:
        problems.append(str(error))
    return "; ".join(problem for problem in problems if problem) or None


def load_videoscore2(
    path: str | Path | None = None,
    template: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> VideoScore2:
    """The scorer from the folder `path` (default: the hub cache), the template with the field `t2v_prompt`.

    Raises:
        OmniNFTError: something is missing, with what fetches it.
    """
    lacking = missing(path, template)
    if lacking is not None:
        raise OmniNFTError(lacking)
    folder = MODEL.locate(path)["config.json"].parent
    network = AutoModelForImageTextToText.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
    prompt = read_template(find_template(TEMPLATE, path, template), (), field=TEMPLATE_FIELD)
    return VideoScore2(network.to(device).eval(), load_tokens(MODEL, path), prompt)
