"""Shared by all tests: two threads at most, or as many as OMP_NUM_THREADS says, and a small model made once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from omninft.models.ltx2 import LTX2Policy
from tests.random_models import make_policy

# Beside other workers one thread each: more threads than cores slow everything many times over.
ALONE = "PYTEST_XDIST_WORKER" not in os.environ
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or (min(2, os.cpu_count() or 1) if ALONE else 1)))


@pytest.fixture
def moved_policy() -> LTX2Policy:
    """A small random policy whose current adapter (rank 2, alpha 4: a scaling of 2) differs from old and reference."""
    policy = make_policy()
    torch.manual_seed(1)
    for key, tensor in policy.adapters.state("current").items():
        if key.endswith("lora_B"):
            tensor.normal_(0, 0.1)
    return policy
