"""OmniNFT: online reinforcement learning for joint audio-video diffusion models.

    import omninft
    result = omninft.train("omninft", {"run.iterations": 24})
    clips = omninft.sample("a red ball bounces twice two low notes ring out", lora=result.export)

docs/python.md shows all of it. Heavy imports happen on first use, so that `import omninft` and `omninft --help` are
quick.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omninft.api import compare, evaluate, sample, score
    from omninft.config import Config, load_config
    from omninft.train import TrainResult, train
    from omninft.types import Clip, OmniNFTError, Prompt, ScoreTable

__version__ = "0.1.0"

# OpenMP's threads spin while they wait for one another. On a machine that does something else as well, the one they
# wait for is then not running: an iteration took fifty times as long beside two busy neighbours. Asleep, they cost
# little on an idle machine (benchmarks/busy_machine.py). The runtime reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = [
    "Clip",
    "Config",
    "OmniNFTError",
    "Prompt",
    "ScoreTable",
    "TrainResult",
    "compare",
    "evaluate",
    "load_config",
    "sample",
    "score",
    "train",
]

_HOMES = {
    "Clip": "omninft.types",
    "Config": "omninft.config",
    "OmniNFTError": "omninft.types",
    "Prompt": "omninft.types",
    "ScoreTable": "omninft.types",
    "TrainResult": "omninft.train",
    "compare": "omninft.api",
    "evaluate": "omninft.api",
    "load_config": "omninft.config",
    "sample": "omninft.api",
    "score": "omninft.api",
    "train": "omninft.train",
}


class _Package(ModuleType):
    """Keeps the public names: importing the module omninft.train would put itself in the place of the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'omninft' has no attribute {name!r}")
