"""Checks that a run learns what it should: once after the first iteration, and alarms from then on.

Runs that silently learn nothing have been reported: hooks that never bound, adapters that were frozen, rewards that
do not tell clips apart. Each of these has its check here.
"""

from __future__ import annotations

import torch

from omninft.credit.surgery import GradientSurgery
from omninft.models.protocol import JointPolicy
from omninft.types import OmniNFTError

STREAMS = ("video", "audio")


class HealthCheck:
    """Watches a run. `facts` holds what the first iteration established, for the display and the report."""

    def __init__(self, policy: JointPolicy, surgery: GradientSurgery | None) -> None:
        self.policy, self.surgery = policy, surgery
        self.facts: dict[str, float] = dict(policy.facts)
        self.checked = False

    def after_iteration(self, iteration: int, metrics: dict[str, float], num_clips: int) -> list[str]:
        """Warnings about this iteration; the first call also checks that training took hold at all.

        Raises:
            OmniNFTError: the self-check failed: surgery hooks did not fire, or the adapters did not move.
        """
        if not self.checked:
            self._self_check(iteration, metrics)
            self.checked = True
        warnings = []
        for stream in STREAMS:
            if metrics.get(f"gradient_norm/{stream}", 1.0) == 0.0:
                warnings.append(f"the {stream} stream's adapters got a gradient of exactly 0")
        if metrics["advantage/zero_variance_groups"] > 0:
            warnings.append(
                f"{int(metrics['advantage/zero_variance_groups'])} prompt groups got equal scores for all their "
                "clips and taught nothing"
            )
        missing = {k.split("/", 1)[1]: int(v) for k, v in metrics.items() if k.startswith("missing/") and v}
        if missing:
            listed = ", ".join(f"{name} {count} of {num_clips}" for name, count in missing.items())
            warnings.append(f"scores are missing: {listed}")
        return warnings

    def summary(self) -> str:
        """What the self-check found, in a line."""
        f = self.facts
        idle = [stream for stream in STREAMS if f[f"gradient_norm_{stream}"] == 0]
        if idle:
            found = f"not passed, {' and '.join(idle)} got a gradient of exactly 0"
        elif f["moved_from_old"] == 0:
            found = "not passed, the adapters did not move"
        else:
            found = "passed"
        fired = f"fired in {f['surgery_fired']} of {f['surgery_blocks']} blocks" if "surgery_fired" in f else "off"
        return (
            f"self-check {found}: {f['lora_modules']} LoRA modules, surgery {fired}, current moved by up to "
            f"{f['moved_from_old']:.2g} from old, gradient norms video {f['gradient_norm_video']:.2g} and "
            f"audio {f['gradient_norm_audio']:.2g}"
        )

    def _self_check(self, iteration: int, metrics: dict[str, float]) -> None:
        if self.surgery is not None:
            self.surgery.check_fired()
            self.facts |= {"surgery_fired": len(self.surgery.fired), "surgery_blocks": self.surgery.bound}
        adapters = self.policy.trainables
        current, old = adapters.state("current"), adapters.state("old")
        moved = max(float((current[k] - old[k]).abs().max()) for k in current)
        self.facts["moved_from_old"] = moved
        learns = metrics["advantage/mean_abs_video"] + metrics["advantage/mean_abs_audio"] > 0
        if learns and moved == 0.0:
            raise OmniNFTError(
                f"iteration {iteration + 1}: the current adapter equals the old one after the optimiser step; "
                "nothing was learnt. Expected gradients in its parameters"
            )
        if learns and not any(bool(torch.any(v)) for k, v in current.items() if k.endswith("lora_B")):
            raise OmniNFTError(
                f"iteration {iteration + 1}: every B of the current adapter is still 0, so it equals the reference"
            )
        for stream in STREAMS:
            self.facts[f"gradient_norm_{stream}"] = metrics.get(f"gradient_norm/{stream}", 0.0)
