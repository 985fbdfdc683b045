"""What the tests of MARBLE and ARR share: a table, a setting with its gradients, and runs to compare."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from omninft.config import build_config
from omninft.distributed import Processes
from omninft.objectives.protocol import LossWeights
from omninft.runs.metrics import read_metrics
from omninft.train import train
from omninft.types import BranchAdvantages, Component, RewardAdvantages, TokenWeights
from tests.learning.test_update import Setting
from tests.test_train import adapters, same, small_config
from tests.trajectories.runs import BASE, merged


def advantages_of(components: tuple[Component, ...], clips: int = 4, seed: int = 1) -> RewardAdvantages:
    """Random ones, of size about 1, all valid."""
    values = torch.randn(clips, len(components), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return RewardAdvantages(values, torch.ones_like(values, dtype=torch.bool), components)


def moved_setting(**options: Any) -> Setting:
    """A setting at one sigma whose current policy has left the old one."""
    setting = Setting(step_per="iteration", **options)
    setting.update.rounds = setting.update.rounds[:1]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in setting.update.parameters:
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return setting


def branch_gradients(
    setting: Setting, advantages: BranchAdvantages, tokens: TokenWeights | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[P] float64 of the video and of the audio loss over all clips at the first sigma, a forward each."""
    update, found = setting.update, []
    for branch in (0, 1):
        prepared = update._prepare(setting.rollout, update.rounds[0], 0)
        with setting.policy.trainables.using("current"):
            current = update._predict(setting.rollout, "current", prepared.noisy, prepared.sigma)
            count = len(setting.rollout)
            weights = LossWeights(advantages, tokens or TokenWeights(), (count, count))
            loss = update.objective.loss(current, prepared, weights)[branch].loss
            gradients = torch.autograd.grad(loss, update.parameters, allow_unused=True)
        pairs = zip(gradients, update.parameters, strict=True)
        found.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]).double())
    return found[0], found[1]


def grid(size: int, steps: int) -> torch.Tensor:
    """Points [N, size] of the simplex, 1 / steps apart."""
    points = [p for p in itertools.product(range(steps + 1), repeat=size - 1) if sum(p) <= steps]
    return torch.tensor([[*p, steps - sum(p)] for p in points], dtype=torch.float64) / steps


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The logged iterations."""
    return [r for r in read_metrics(folder) if r["kind"] == "iteration"]


def check_three_are_two_and_one(tree: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Three iterations in a row equal two and, resumed, one, bit for bit; returns the rows of the three."""
    runs = {}
    for name, iterations in (("whole", 3), ("parts", 2)):
        config = build_config(merged(tree, {"run": {"folder": str(folder / name), "iterations": iterations}}))
        runs[name] = train(config)
    longer = build_config(merged(tree, {"run": {"folder": str(folder / "parts"), "iterations": 3}}))
    again = train(longer, resume=runs["parts"].folder)
    assert same(adapters(runs["whole"].folder, 3), adapters(again.folder, 3))
    rows, resumed = rows_of(runs["whole"].folder), rows_of(again.folder)
    ours = [k for k in rows[-1] if k.startswith(("marble/", "arr/"))]
    assert ours
    assert {k: rows[-1][k] for k in ours} == {k: resumed[-1][k] for k in ours}
    before, after = adapters(again.folder, 1), adapters(again.folder, 3)
    assert max(float((after[k] - before[k]).abs().max()) for k in after) > 1e-5
    for row in rows:
        assert all(torch.isfinite(torch.tensor(row[f"loss/{branch}"])) for branch in ("video", "audio"))
        assert row["gradient_norm/video"] > 0
        assert row["gradient_norm/audio"] > 0
    return rows


def small_tree(model: Path, credit: dict[str, Any]) -> dict[str, Any]:
    """A run on a small random model."""
    return small_config(model, Path()).model_dump(mode="json", exclude={"credit"}) | {"credit": credit}


def tiny_tree(credit: dict[str, Any]) -> dict[str, Any]:
    """A run on the bundled model with few clips and steps."""
    tree = merged(BASE, {"recipe": "small", "optimiser": {"epsilon": 1e-8, "learning_rate": 1e-3}})
    return tree | {"credit": credit}


class TwoProcesses(Processes):
    """One of two processes whose other one adds `theirs` to every sum."""

    def __init__(self, theirs: list[torch.Tensor]) -> None:
        super().__init__()
        self.theirs = theirs

    def sum_(self, tensors: Any) -> None:
        for tensor, other in zip(tensors, self.theirs, strict=True):
            tensor += other
