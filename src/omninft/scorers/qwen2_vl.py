"""Qwen2-VL as a reader of clips: frames to patches, prompts to tokens, hidden states at reward tokens.

What VideoAlign and HPSv3 (and, for its inputs, VideoScore2) share. The vision processors of transformers need
torchvision; resizing, normalising and cutting patches are written here. The network is transformers' Qwen2VLModel
without its language head, of which no score is read.

Shape letters: T frames, H W pixels, P patches of one clip (gt * gh * gw), B clips, L tokens, K reward tokens, D width.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

from omninft.scorers.batching import micro_batches
from omninft.scorers.prompt_template import PromptTemplate
from omninft.scorers.views import resize, to_tensor, to_uint8
from omninft.scorers.weights import JudgingModel, load_strict, read_state, renamed
from omninft.types import OmniNFTError

Kind = Literal["image", "video"]
Positions = Literal["sequential", "mrope"]

PATCH = 14  # pixels
MERGE = 2  # patches per side that become one token
TEMPORAL = 2  # frames per patch
FACTOR = PATCH * MERGE  # pixels: sides are multiples of it
LARGEST_RATIO = 200
FRAME_LIMITS = (4, 768)  # frames a video is shown with, where it has as many
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
PLACEHOLDERS: dict[Kind, str] = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
BASE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


# Frames


def smart_resize(height: int, width: int, smallest: int, largest: int) -> tuple[int, int]:
    """Height and width in pixels, multiples of 28 near the given ones, of an area within `smallest`..`largest`.

    Halves round to even, as Python's round does. An enlarged picture may exceed `largest` where the limits meet.

    Raises:
        OmniNFTError: one side is more than 200 times the other.
    """
    if max(height, width) > LARGEST_RATIO * min(height, width):
        raise OmniNFTError(f"a frame of {height}x{width} pixels; one side may be {LARGEST_RATIO} times the other")
    rows = max(FACTOR, round(height / FACTOR) * FACTOR)
    columns = max(FACTOR, round(width / FACTOR) * FACTOR)
    if rows * columns > largest:
        beta = math.sqrt(height * width / largest)
        rows = max(FACTOR, math.floor(height / beta / FACTOR) * FACTOR)
        columns = max(FACTOR, math.floor(width / beta / FACTOR) * FACTOR)
    elif rows * columns < smallest:
        beta = math.sqrt(smallest / (height * width))
        rows = math.ceil(height * beta / FACTOR) * FACTOR
        columns = math.ceil(width * beta / FACTOR) * FACTOR
    return rows, columns


def video_frame_count(total: int, rate: float, fps: float) -> int:
    """Number of frames, even, that show a video of `total` frames at `rate` Hz with `fps` frames a second.

    At least 4 and at most 768, as far as the video has them.

    Raises:
        OmniNFTError: the video has fewer than 2 frames.
    """
    if total < TEMPORAL:
        raise OmniNFTError(f"a video of at least {TEMPORAL} frames is needed, found {total}")
    lowest, highest = FRAME_LIMITS
    highest = TEMPORAL * (min(highest, total) // TEMPORAL)
    wanted = min(max(total / rate * fps, lowest), highest)
    return TEMPORAL * round(wanted / TEMPORAL)


def resized(frames: np.ndarray, height: int, width: int, rounded: bool = True) -> Tensor:
    """[T, H, W, 3] uint8 to [T, 3, height, width]: bicubic with antialiasing on 0..255.

    `rounded` gives uint8, as the reference leaves resized uint8 frames; otherwise float32 that may leave 0..255.
    """
    small = [resize(to_tensor(frame[None]), height, width, "bicubic") for frame in frames]  # one at a time: memory
    return torch.cat([to_uint8(frame) if rounded else frame for frame in small])


def normalised(frames: Tensor) -> Tensor:
    """[T, 3, H, W] of 0..255 to float32 with CLIP's mean and deviation."""
    mean = torch.tensor(MEAN, device=frames.device)[:, None, None]
    std = torch.tensor(STD, device=frames.device)[:, None, None]
    return (frames.float() / 255 - mean) / std


def patchify(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """[T, 3, H, W] normalised to patches [P, 1176] and the grid (gt, gh, gw).

    An odd T is completed with the last frame. Patches of one 28 x 28 square follow one another, squares row by row,
    then in time; within a patch: channel, frame, row, column.
    """
    if len(frames) % TEMPORAL:
        frames = torch.cat([frames, frames[-1:]])
    total, channels, height, width = frames.shape
    gt, gh, gw = total // TEMPORAL, height // PATCH, width // PATCH
    split = frames.reshape(gt, TEMPORAL, channels, gh // MERGE, MERGE, PATCH, gw // MERGE, MERGE, PATCH)
    return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(gt * gh * gw, -1), (gt, gh, gw)


def grid_of(frames: Tensor) -> tuple[int, int, int]:
    """(gt, gh, gw) of [T, 3, H, W] without cutting it."""
    total, _, height, width = frames.shape
    return -(-total // TEMPORAL), height // PATCH, width // PATCH


def token_count(grid: tuple[int, int, int]) -> int:
    """Placeholders in the text: one for each 2 x 2 patches."""
    return math.prod(grid) // MERGE**2


# Tokens


@dataclass(frozen=True)
class Example:
    """One text with its picture or video, ready for a forward pass."""

    ids: Tensor  # [L] int64
    frames: Tensor  # [T, 3, H, W] uint8 (or float32) of 0..255, sides multiples of 28
    kind: Kind

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Tokens:
    """The tokenizer with the model's own chat template, and the reward tokens in the order they are read."""

    tokenizer: Any
    rewards: tuple[str, ...] = ()

    @functools.cached_property
    def reward_ids(self) -> tuple[int, ...]:
        return tuple(self.id(token) for token in self.rewards)

    def id(self, token: str) -> int:
        """Raises OmniNFTError when the vocabulary lacks the token."""
        found = self.tokenizer.convert_tokens_to_ids(token)
        if found is None or found == getattr(self.tokenizer, "unk_token_id", None):
            raise OmniNFTError(f"the tokenizer has no token {token!r}")
        return int(found)

    def example(self, text: str, frames: Tensor, kind: Kind) -> Example:
        """The chat of one user turn, vision before text, the placeholder repeated once per vision token.

        Raises:
            OmniNFTError: the text itself holds a reward token or placeholder, so that what belongs to the prompt and
                what to the template cannot be told apart.
        """
        turn = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": text}]}
        chat = self.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        ids = list(self.tokenizer(chat, add_special_tokens=False)["input_ids"])
        pads = {self.id(token) for token in PLACEHOLDERS.values()}
        places = [i for i, token in enumerate(ids) if token in pads]
        pad, start, end = self.id(PLACEHOLDERS[kind]), self.id(VISION_START), self.id(VISION_END)
        if len(places) != 1 or ids[places[0] - 1 : places[0] + 2] != [start, pad, end]:
            raise OmniNFTError(
                f"expected one {PLACEHOLDERS[kind]} in the chat, found {len(places)} placeholders: "
                "does the prompt hold one, or the chat template none?"
            )
        found = tuple(token for token in ids if token in self.reward_ids)
        if found != self.reward_ids:
            names = {self.id(token): token for token in self.rewards}
            raise OmniNFTError(
                f"expected the reward tokens {' '.join(self.rewards)} once each, found "
                f"{' '.join(names[i] for i in found) or 'none'}: does the prompt hold one?"
            )
        at = places[0]
        ids[at : at + 1] = [pad] * token_count(grid_of(frames))
        return Example(torch.tensor(ids), frames, kind)


def load_tokens(
    base: JudgingModel, path: str | Path | None, rewards: tuple[str, ...] = (), trained: Path | None = None
) -> Tokens:
    """The tokenizer of the base model; reward tokens it lacks are added behind its vocabulary, in order.

    `trained` is the folder of a tokenizer that was saved with the checkpoint: read instead, where it exists.

    Raises:
        OmniNFTError: files are missing, or there is no chat template.
    """
    folder = base.locate(path)[BASE_FILES[0]].parent
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if trained is not None and (trained / "tokenizer.json").is_file():
        chat = tokenizer.chat_template
        tokenizer = AutoTokenizer.from_pretrained(str(trained), local_files_only=True)
        tokenizer.chat_template = tokenizer.chat_template or chat
    if tokenizer.chat_template is None:
        file = base.find("chat_template.json", path)
        if file is None:
            raise OmniNFTError(
                f"{folder}: no chat template in tokenizer_config.json nor in chat_template.json; "
                f"fetch by: {base.fetch_command(['chat_template.json'], path)}"
            )
        tokenizer.chat_template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    if rewards:
        tokenizer.add_tokens(list(rewards), special_tokens=True)
    return Tokens(tokenizer, rewards)


# The network


class RewardNetwork(nn.Module):
    """Qwen2-VL and a head on the last hidden states at the reward tokens. The head stays in float32."""

    def __init__(self, config: Qwen2VLConfig, head: nn.Module) -> None:
        super().__init__()
        self.model = Qwen2VLModel(config)
        self.rm_head = head

    def forward(self, ids: Tensor, patches: Tensor, grids: Tensor, kind: Kind, positions: Tensor, at: Tensor) -> Tensor:
        """[B, K, outputs] float32 of ids [B, L] (padded right), patches [sum P, 1176], grids [B, 3], positions
        [3, B, L] and the places of the reward tokens `at` [B, L] bool, K in every row.

        No attention mask: padding stands behind every token that is read, and attention is causal.
        """
        vision = (
            {"pixel_values": patches, "image_grid_thw": grids}
            if kind == "image"
            else {"pixel_values_videos": patches, "video_grid_thw": grids}
        )
        hidden = self.model(input_ids=ids, position_ids=positions, use_cache=False, **vision).last_hidden_state
        picked = hidden[at].reshape(len(ids), -1, hidden.shape[-1])
        return self.rm_head(picked.float())


def build_network(
    base: JudgingModel, path: str | Path | None, head: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype
) -> RewardNetwork:
    """The network with the tensors of `state` (current names), all of them, on their device, in eval mode.

    The number of embedding rows is the checkpoint's: it shrank to the tokenizer's length when tokens were added.

    Raises:
        OmniNFTError: the state is not that of this architecture.
    """
    config = Qwen2VLConfig.from_pretrained(str(base.locate(path)["config.json"].parent))
    embedding = state.get("model.language_model.embed_tokens.weight")
    if embedding is None:
        raise OmniNFTError(f"{base.name}: the checkpoint holds no embed_tokens.weight; its first: {sorted(state)[:3]}")
    config.text_config.vocab_size = len(embedding)
    # Only parameters are left empty: rotary frequencies are buffers that no checkpoint holds, and stay float32.
    with init_empty_weights(include_buffers=False):
        network = RewardNetwork(config, head)
    cast = {k: v.to(torch.float32 if k.startswith("rm_head.") else dtype) for k, v in state.items()}
    load_strict(network, cast, f"the checkpoint of {base.name} with a reward head", assign=True)
    return network.eval().requires_grad_(False)


def current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of Qwen2VLForConditionalGeneration under the names since transformers 4.52, without `lm_head`.

    `visual.` became `model.visual.`, `model.` became `model.language_model.`; a state that has them is left alone.
    """
    is_current = any(name.startswith("model.language_model.") for name in state)

    def rename(name: str) -> str | None:
        if name.startswith("lm_head."):
            return None
        if is_current:
            return name
        if name.startswith("visual."):
            return f"model.{name}"
        if name.startswith("model."):
            return f"model.language_model.{name.removeprefix('model.')}"
        return name

    return renamed(state, rename)


def read_shards(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a model folder."""
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        state |= read_state(file)
    return state


@dataclass(frozen=True)
class RewardReader:
    """Examples in, head outputs out: what a scorer of this family is made of."""

    network: RewardNetwork
    tokens: Tokens
    template: PromptTemplate
    positions: Positions = "sequential"

    def __post_init__(self) -> None:
        if self.positions not in ("sequential", "mrope"):
            raise OmniNFTError(f"positions is {self.positions!r}, expected 'sequential' or 'mrope'")
        rows = self.network.model.config.text_config.vocab_size
        beyond = [t for t, i in zip(self.tokens.rewards, self.tokens.reward_ids, strict=True) if i >= rows]
        if beyond:
            raise OmniNFTError(
                f"the checkpoint has {rows} embedding rows, the tokenizer puts {', '.join(beyond)} behind them: "
                "the tokenizer is another model's"
            )

    def example(self, prompt: str, frames: Tensor, kind: Kind) -> Example:
        """Raises OmniNFTError for a prompt with a token of the template, or more tokens than the model has places."""
        example = self.tokens.example(self.template.fill(prompt), frames, kind)
        places = self.network.model.config.text_config.max_position_embeddings
        if len(example) > places:
            raise OmniNFTError(
                f"{len(frames)} frames make {len(example)} tokens, the model reads up to {places}: "
                "score a shorter clip, or look at fewer frames a second"
            )
        return example

    @torch.inference_mode()
    def outputs(self, examples: Sequence[Example], budget: int) -> Tensor:
        """[len(examples), K, outputs] float32 on the CPU, in forward passes of up to `budget` tokens."""
        results: dict[int, Tensor] = {}
        for batch in micro_batches([len(example) for example in examples], budget):
            for number, row in zip(batch, self._forward([examples[i] for i in batch]), strict=True):
                results[number] = row
        return torch.stack([results[i] for i in range(len(examples))])

    def _forward(self, examples: list[Example]) -> Tensor:
        device = next(self.network.parameters()).device
        kind = examples[0].kind
        cut = [patchify(normalised(example.frames.to(device))) for example in examples]
        grids = torch.tensor([grid for _, grid in cut], device=device)
        ids = nn.utils.rnn.pad_sequence([e.ids for e in examples], batch_first=True, padding_value=self._padding)
        at = torch.isin(ids, torch.tensor(self.tokens.reward_ids))
        if (at.sum(dim=1) != len(self.tokens.rewards)).any():
            raise ValueError(f"reward tokens per row: {at.sum(dim=1).tolist()}, expected {len(self.tokens.rewards)}")
        ids, at = ids.to(device), at.to(device)
        positions = self._position_ids(ids, grids, kind)
        patches = torch.cat([patches for patches, _ in cut])
        return self.network(ids, patches, grids, kind, positions, at).cpu()

    @property
    def _padding(self) -> int:
        """Any token that is neither vision nor reward."""
        return self.tokens.id(VISION_END)

    def _position_ids(self, ids: Tensor, grids: Tensor, kind: Kind) -> Tensor:
        """[3, B, L]: 0..L-1 on all three axes, as both reward models were trained (transformers 4.45 with
        position_ids=None), or the temporal, vertical and horizontal positions of Qwen2-VL."""
        if self.positions == "sequential":
            return torch.arange(ids.shape[1], device=ids.device).expand(3, len(ids), -1)
        types = (ids == self.tokens.id(PLACEHOLDERS[kind])).int() * (1 if kind == "image" else 2)
        found, _ = self.network.model.get_rope_index(ids, types, **{f"{kind}_grid_thw": grids})
        return found
