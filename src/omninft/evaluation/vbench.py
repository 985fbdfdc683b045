"""VBench (Huang et al. 2024): its 16 dimensions, the formulas of a clip, the official normalisation and totals.

Only arithmetic on numbers and features: which network gave them is no matter here. Facts are those of the released
package, version 0.1.5, and of the leaderboard's script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from omninft.types import OmniNFTError

Part = Literal["quality", "semantic"]
TOTALS = ("quality_score", "semantic_score", "total_score")
PARTIALS = ("quality_of_measured", "semantic_of_measured")


@dataclass(frozen=True)
class Dimension:
    """One of the 16: `low` and `high` are the scores that normalise to 0 and 1; `judge` is the official network."""

    name: str
    label: str
    part: Part
    judge: str
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    custom: bool = True  # whether the official package takes clips of other prompts than its suite
    detectron2: bool = False  # whether the official package needs detectron2 for it


DIMENSIONS: tuple[Dimension, ...] = (
    Dimension("subject_consistency", "Subject consistency", "quality", "DINO ViT-B/16", 0.1462),
    Dimension("background_consistency", "Background consistency", "quality", "CLIP ViT-B/32", 0.2615),
    Dimension("temporal_flickering", "Temporal flickering", "quality", "none", 0.6293),
    Dimension("motion_smoothness", "Motion smoothness", "quality", "AMT-S", 0.706, 0.9975),
    Dimension("dynamic_degree", "Dynamic degree", "quality", "RAFT", weight=0.5),
    Dimension("aesthetic_quality", "Aesthetic quality", "quality", "CLIP ViT-L/14 and LAION's linear layer"),
    Dimension("imaging_quality", "Imaging quality", "quality", "MUSIQ (SPAQ)"),
    Dimension("object_class", "Object class", "semantic", "GRiT-B", custom=False, detectron2=True),
    Dimension("multiple_objects", "Multiple objects", "semantic", "GRiT-B", custom=False, detectron2=True),
    Dimension("human_action", "Human action", "semantic", "UMT-L/16"),
    Dimension("color", "Colour", "semantic", "GRiT-B", custom=False, detectron2=True),
    Dimension("spatial_relationship", "Spatial relationship", "semantic", "GRiT-B", custom=False, detectron2=True),
    Dimension("scene", "Scene", "semantic", "Tag2Text Swin-B", 0.0, 0.8222, custom=False),
    Dimension("appearance_style", "Appearance style", "semantic", "CLIP ViT-B/32", 0.0009, 0.2855, custom=False),
    Dimension("temporal_style", "Temporal style", "semantic", "ViCLIP", 0.0, 0.364),
    Dimension("overall_consistency", "Overall consistency", "semantic", "ViCLIP", 0.0, 0.364),
)
BY_NAME: dict[str, Dimension] = {d.name: d for d in DIMENSIONS}


def chosen_dimensions(names: Sequence[str]) -> tuple[Dimension, ...]:
    """In the official order, each once. Raises OmniNFTError: a name that is none of the 16."""
    unknown = sorted(set(names) - set(BY_NAME))
    if unknown:
        raise OmniNFTError(f"not a dimension of VBench: {', '.join(unknown)}; expected some of {', '.join(BY_NAME)}")
    return tuple(d for d in DIMENSIONS if d.name in names)


def consistency(features: np.ndarray) -> float:
    """Subject and background consistency of a clip: features of its frames [T, D], of any length.

    Mean over the frames from the second of (max(0, cos to the frame before) + max(0, cos to the first)) / 2. Over many
    clips the official mean is over all frames: weigh a clip by T - 1.

    Raises:
        OmniNFTError: fewer than two frames.
    """
    if len(features) < 2:
        raise OmniNFTError(f"consistency needs 2 frames, found {len(features)}")
    unit = np.asarray(features, dtype=np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    to_previous = (unit[1:] * unit[:-1]).sum(axis=1)
    to_first = unit[1:] @ unit[0]
    return float((np.maximum(0, to_previous) + np.maximum(0, to_first)).mean() / 2)


def likeness(errors: np.ndarray) -> float:
    """Temporal flickering and motion smoothness of a clip from mean absolute errors in 0..255: (255 - mean) / 255."""
    return float((255.0 - np.mean(errors)) / 255.0)


def sampled_frames(total: int, frame_rate: float) -> np.ndarray:
    """Frame numbers that dynamic_degree compares: about 8 a second, every max(1, round(frame_rate / 8))-th."""
    return np.arange(0, total, max(1, round(frame_rate / 8)))


def top_speed(flow: np.ndarray, share: float = 0.05) -> float:
    """Mean length of the int(share * H * W) longest vectors of a flow field [H, W, 2], pixels.

    VBench takes 5 % for dynamic_degree and 2 % for its static filter.

    Raises:
        OmniNFTError: the share is less than one pixel.
    """
    lengths = np.hypot(flow[..., 0], flow[..., 1]).ravel()
    count = int(share * lengths.size)
    if count < 1:
        raise OmniNFTError(f"a flow field of {flow.shape[0]} x {flow.shape[1]} has no {share:.0%} of its pixels")
    return float(np.partition(lengths, lengths.size - count)[-count:].mean(dtype=np.float64))


def is_dynamic(speeds: Sequence[float], height: int, width: int) -> bool:
    """dynamic_degree of a clip from `top_speed` of its P pairs of sampled frames [P], in pixels of a frame.

    Moving where at least round(4 * (P + 1) / 16) pairs are faster than 6 * min(height, width) / 256, rounded half to
    even. As in the released code two sampled frames round to no pair at all and always count as moving, one as still.
    """
    threshold = 6.0 * (min(height, width) / 256.0)
    needed = round(4 * ((len(speeds) + 1) / 16.0))
    return len(speeds) > 0 and sum(speed > threshold for speed in speeds) >= needed


def is_static(speeds: Sequence[float], to_and_fro: tuple[float, float], height: int, width: int) -> bool:
    """The static filter before temporal_flickering, from `top_speed(share=0.02)` of a clip of T frames.

    `speeds` [T - 1] are of consecutive frames, `to_and_fro` of first to last and last to first. Still where at most
    round(2 * T / 16) pairs are faster than 3 * min(height, width) / 256 =: v, and neither of the two is faster than
    2 * round(2 * T / 16) * v.
    """
    threshold = 3.0 * (min(height, width) / 256.0)
    allowed = round(2 * ((len(speeds) + 1) / 16.0))
    if sum(speed > threshold for speed in speeds) > allowed:
        return False
    return all(speed <= threshold * allowed * 2 for speed in to_and_fro)


@dataclass(frozen=True)
class Totals:
    """The official summary. A total that lacks a dimension is None; `of_measured` are means of what is there."""

    normalised: dict[str, float]  # dimension -> 0..1 where the score is between low and high
    quality: float | None
    semantic: float | None
    total: float | None
    quality_of_measured: float | None
    semantic_of_measured: float | None
    missing: tuple[str, ...]  # dimensions that lack, in the official order

    @property
    def by_name(self) -> dict[str, float | None]:
        """Under the names of TOTALS and PARTIALS."""
        values = (self.quality, self.semantic, self.total, self.quality_of_measured, self.semantic_of_measured)
        return dict(zip((*TOTALS, *PARTIALS), values, strict=True))


def totals(scores: Mapping[str, float | None]) -> Totals:
    """Scores per dimension to Quality, Semantic and Total = (4 Quality + Semantic) / 5.

    Each score becomes (score - low) / (high - low), not clipped; the parts are means with the dimensions' weights.

    Raises:
        OmniNFTError: a name that is none of the 16.
    """
    chosen = chosen_dimensions(list(scores))
    known = {d.name: value for d in chosen if (value := scores[d.name]) is not None and math.isfinite(value)}
    normalised = {n: (v - BY_NAME[n].low) / (BY_NAME[n].high - BY_NAME[n].low) for n, v in known.items()}
    measured: dict[Part, float | None] = {}
    whole: dict[Part, float | None] = {}
    for part in ("quality", "semantic"):
        members = [d for d in DIMENSIONS if d.part == part]
        present = [d for d in members if d.name in normalised]
        weight = sum(d.weight for d in present)
        measured[part] = sum(d.weight * normalised[d.name] for d in present) / weight if present else None
        whole[part] = measured[part] if len(present) == len(members) else None
    quality, semantic = whole["quality"], whole["semantic"]
    total = None if quality is None or semantic is None else (4 * quality + semantic) / 5
    missing = tuple(d.name for d in DIMENSIONS if d.name not in normalised)
    return Totals(normalised, quality, semantic, total, measured["quality"], measured["semantic"], missing)
