"""Sets of rewards under one name, and how the command line names rewards."""

from __future__ import annotations

from collections.abc import Sequence

from omninft.config import RewardConfig
from omninft.files import parse_yaml
from omninft.naming import did_you_mean
from omninft.rewards.registry import reward_names
from omninft.types import OmniNFTError

PRESETS: dict[str, tuple[str, ...]] = {
    # What the paper trains on (OmniNFT, reward table of the released configurations).
    "paper": ("videoalign", "hpsv3", "audiobox", "clap", "desync"),
    # No model, or one whose licence allows commercial use beyond doubt: what is uncertain stays out.
    "commercial": ("audiobox", "dnsmos", "av_align", "flicker", "motion", "speech"),
    # Runs from installed packages alone.
    "offline": ("dnsmos", "av_align", "flicker", "motion", "speech"),
}


def chosen_rewards(
    names: Sequence[str] = (), preset: str | None = None, options: Sequence[str] = ()
) -> tuple[RewardConfig, ...]:
    """Rewards by name and by preset, each once, with options as "reward.key=value" (the value is YAML).

    Raises:
        OmniNFTError: unknown preset, or an option of another form or for a reward that is not among the chosen.
    """
    if preset is not None and preset not in PRESETS:
        raise OmniNFTError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    chosen = list(dict.fromkeys([*(PRESETS[preset] if preset else ()), *names]))
    values = options_by_name(chosen, options)
    for name in chosen:
        if ":" not in name and name not in reward_names():
            hint = did_you_mean(name, [*reward_names(), *PRESETS])
            raise OmniNFTError(f"unknown reward {name!r}{hint}; `omninft rewards` lists them")
    return tuple(RewardConfig(name=name, options=values[name]) for name in chosen)


def options_by_name(names: Sequence[str], options: Sequence[str]) -> dict[str, dict[str, object]]:
    """Options "name.key=value" (the value is YAML) of every name.

    Raises:
        OmniNFTError: an option of another form, or for a name that is not among them.
    """
    values: dict[str, dict[str, object]] = {name: {} for name in names}
    for option in options:
        left, equals, value = option.partition("=")
        reward, dot, key = left.rpartition(".")
        if not (equals and dot and key):
            raise OmniNFTError(f"option {option!r}: expected reward.key=value, e.g. clap.device=cuda")
        if reward not in values:
            hint = did_you_mean(reward, names)
            raise OmniNFTError(f"option {option!r}: {reward!r} is not among the rewards {', '.join(names)}{hint}")
        values[reward][key] = parse_yaml(value, f"option {option!r:.200}: the value")
    return values
