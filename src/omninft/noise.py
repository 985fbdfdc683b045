"""Noise that belongs to a clip, not to a place in a batch."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Sequence
from enum import IntEnum, StrEnum
from typing import SupportsIndex

import torch
from torch import Tensor


class Purpose(StrEnum):
    """What noise is for: no two purposes share it."""

    SAMPLE_VIDEO = "sample_video"  # initial latents of a clip
    SAMPLE_AUDIO = "sample_audio"
    TRAIN_VIDEO = "train_video"  # noise on clean latents, numbered by the round it is for
    TRAIN_AUDIO = "train_audio"
    SDE_VIDEO = "sde_video"  # of a stochastic solver, numbered by its step
    SDE_AUDIO = "sde_audio"
    REFERENCE_ROUNDS = "reference_rounds"  # which rounds of an iteration take the reference term, no clip's own


class Occasion(IntEnum):
    """Stands where the iteration stands for clips that no iteration trains on: nothing shares noise with training."""

    DEV = -1
    TEST = -2
    SAMPLE = -3
    BENCHMARK = -4
    PREVIEW = -5


def noise_seed(
    seed: SupportsIndex, iteration: SupportsIndex, prompt_id: str, sample: SupportsIndex, purpose: str
) -> int:
    """A 63-bit seed in [0, 2^63) for one clip's noise of one `purpose` (such as "video_latents").

    The first eight bytes of SHA-256 over a JSON list of the five parts: JSON quotes and escapes, so no two different
    keys have the same encoding. The same on every machine and in every version.
    """
    # numpy integers are the same key as Python ones.
    key = [operator.index(seed), operator.index(iteration), prompt_id, operator.index(sample), purpose]
    digest = hashlib.sha256(json.dumps(key).encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def keyed_normal(
    keys: Sequence[tuple[str, int]],
    shape: tuple[int, ...],
    seed: int,
    iteration: int,
    purpose: Purpose,
    number: int | None = None,
) -> Tensor:
    """Standard normal noise [len(keys), *shape], float32 on the CPU, one row per (prompt id, sample).

    `number` tells apart the rounds or steps of one purpose. Each row is drawn by a generator of its own, seeded with
    `noise_seed`: it depends on its key, on `shape` and on nothing else, so neither the order or size of a batch nor the
    rank or number of processes changes a clip. Drawn on the CPU because device generators differ between devices;
    between CPU models the last bit can differ.

    PyTorch's CPU generator reads the low 32 bits of a seed. Two given keys thus share their noise with probability
    2^-32, about 1e-7 for some pair among the 32 clips of an iteration.
    """
    name = str(purpose) if number is None else f"{purpose}_{number}"
    rows = torch.empty((len(keys), *shape), dtype=torch.float32)
    for row, (prompt_id, sample) in zip(rows, keys, strict=True):
        generator = torch.Generator().manual_seed(noise_seed(seed, iteration, prompt_id, sample, name))
        row.copy_(torch.randn(shape, generator=generator, dtype=torch.float32))
    return rows
