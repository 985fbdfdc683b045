"""Shared by all tests: one thread where numbers are compared bit for bit, and a small model made once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))
