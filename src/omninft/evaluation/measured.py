"""Metrics that any benchmark can have: measurements, and a model in a wheel; all but the first on request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from omninft.evaluation.description import JudgeEntry, Options
from omninft.evaluation.results import Metric
from omninft.rewards.av_align import AVAlignReward
from omninft.rewards.dnsmos import DNSMOSReward
from omninft.rewards.flicker import FlickerReward
from omninft.rewards.motion import MotionReward

MEASURED_METRICS = (
    Metric("av_align", "AV-Align", "peaks of optical flow and of sound coincide"),
    Metric("dnsmos", "DNSMOS", "clean speech, P.835 overall", unit="MOS"),
    Metric("flicker", "Flicker", "consecutive frames alike (VBench temporal_flickering)"),
    Metric("motion", "Motion", "speed of the fastest 5 % of the pixels", unit="frame sides/s"),
)
ON_REQUEST = ("dnsmos", "flicker", "motion")
_MAKE: Mapping[str, Callable[..., Any]] = {
    "av_align": AVAlignReward,
    "dnsmos": DNSMOSReward,
    "flicker": FlickerReward,
    "motion": MotionReward,
}


def measured_judges(
    options: Mapping[str, Options] | None = None, wrap: Callable[[Any], Any] = lambda judge: judge
) -> dict[str, JudgeEntry]:
    """Their judges, with a benchmark's own options by metric."""
    own = options or {}
    return {name: JudgeEntry(make, (name,), options=own.get(name, {}), wrap=wrap) for name, make in _MAKE.items()}
