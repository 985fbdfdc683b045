"""What is published of LTX-2, 2.3 and 2.5: configurations of all parts, schedulers, and where the versions differ.

`versions.json` has the configurations as diffusers' classes take them; of 2.3 and 2.5 only what differs from the
version before. Versions are told apart by a transformer's configuration, never by a name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal

from diffusers import FlowMatchEulerDiscreteScheduler

Version = Literal["2", "2.3", "2.5"]
Weights = Literal["full", "distilled"]

VERSIONS: tuple[Version, ...] = ("2", "2.3", "2.5")
COMPONENTS = ("transformer", "connectors", "vae", "audio_vae", "vocoder")
STG_BLOCK: dict[Version, int] = {"2": 29, "2.3": 28, "2.5": 28}  # that spatio-temporal guidance perturbs
FIRST_FRAME_CRF: dict[Version, int] = {"2": 33, "2.3": 33, "2.5": 18}  # of H.264, in training


@functools.cache
def _facts() -> dict[str, Any]:
    text = (resources.files("omninft.models") / "versions.json").read_text(encoding="utf-8")
    facts: dict[str, Any] = json.loads(text)
    return facts


def published(version: Version) -> dict[str, dict[str, Any]]:
    """Arguments of diffusers' classes by component (`COMPONENTS`)."""
    found: dict[str, dict[str, Any]] = {name: {} for name in COMPONENTS}
    for earlier in VERSIONS[: VERSIONS.index(version) + 1]:
        for name, changed in _facts()[earlier].items():
            found[name] |= changed
    return found


def version_of(transformer: Mapping[str, Any]) -> Version:
    """The version whose transformer has this configuration, of any width and depth."""
    if transformer.get("use_keyframes_abs_pos_embedding") or not transformer.get("ff_bias", True):
        return "2.5"
    return "2.3" if transformer.get("gated_attn") else "2"


def scheduler_of(weights: Weights) -> FlowMatchEulerDiscreteScheduler:
    """The published scheduler of full or distilled weights, the same for all versions."""
    return FlowMatchEulerDiscreteScheduler(**_facts()["schedulers"][weights])


def weights_of(scheduler: Mapping[str, Any]) -> Weights | None:
    """The weights that a repository's scheduler was published with; None: no published one."""
    for weights, expected in _facts()["schedulers"].items():
        if all(scheduler.get(key) == value for key, value in expected.items()):
            return "full" if weights == "full" else "distilled"
    return None
