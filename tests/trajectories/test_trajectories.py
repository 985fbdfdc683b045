"""Runs of three iterations give the stored numbers: losses, gradient norms, scores, evaluations and adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trajectories.record import run
from tests.trajectories.runs import RUNS, STORED, WORLD

# Twice the largest spread seen over 1 and 2 threads, 1 and 2 processes, and processors emulated by
# ATEN_CPU_CAPABILITY=default|avx2, ONEDNN_MAX_CPU_ISA=SSE41 and MKL_CBWR=COMPATIBLE: 2.4e-3 of an adapter tensor's size
# (4e-3 of a score), mostly 1e-4. Faults in the wiring move some number by 2e-2 and more.
TOLERANCE = 5e-3
SCORE_SIZE = 0.25  # scores are compared against this at least: a correlation may be near 0


def differences(made: dict[str, Any], stored: dict[str, Any]) -> Iterator[tuple[float, str]]:
    """(difference over the size of the stored number, where) of every number; infinite where one side lacks it."""
    for part, (mine, theirs) in {k: (made.get(k), stored.get(k)) for k in made.keys() | stored.keys()}.items():
        if part == "adapters":
            yield from _adapter_differences(mine or {}, theirs or {})
            continue
        a, b = _flat(mine), _flat(theirs)
        for key in sorted(a.keys() | b.keys()):
            if key not in a or key not in b:
                yield float("inf"), f"{part}.{key} only {'stored' if key in b else 'now'}"
            else:
                is_score = part == "evaluations" or "reward/" in key
                size = max(abs(b[key]), SCORE_SIZE if is_score else 1e-3)
                yield abs(a[key] - b[key]) / size, f"{part}.{key}: {a[key]:.8g}, stored {b[key]:.8g}"


def _adapter_differences(mine: dict[str, Any], theirs: dict[str, Any]) -> Iterator[tuple[float, str]]:
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            yield float("inf"), f"adapter tensor {name} only {'stored' if name in theirs else 'now'}"
            continue
        # Against the tensor's own size: a projection may be near 0.
        (norm, *projections), (stored_norm, *stored_projections) = mine[name], theirs[name]
        size = max(stored_norm, 1e-6)
        rms = max(max(map(abs, stored_projections)), 1e-9)
        worst = max(abs(p - q) for p, q in zip(projections, stored_projections, strict=True)) / rms
        yield max(abs(norm - stored_norm) / size, worst), f"{name}: norm {norm:.8g}, stored {stored_norm:.8g}"


def _flat(tree: Any, prefix: str = "") -> dict[str, float]:
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {} if tree is None else {prefix.rstrip("."): float(tree)}


@pytest.mark.parametrize("name", RUNS)
def test_the_run_gives_the_stored_numbers(name: str, tmp_path: Path) -> None:
    stored = json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))
    made = run(name, tmp_path)
    off = sorted((d for d in differences(made, stored) if d[0] > TOLERANCE), reverse=True)
    listed = "\n".join(f"{ratio:.2g} {where}" for ratio, where in off[:12])
    assert not off, f"{len(off)} numbers differ by more than {TOLERANCE} of their size:\n{listed}"


def test_two_processes_give_the_numbers_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = json.loads((STORED / "two_processes.json").read_text(encoding="utf-8"))
    monkeypatch.delitem(WORLD, "two_processes")
    one = run("two_processes", tmp_path)
    # Measured on a sample of the clips, which is another one.
    sampled = ("old_deviation_sample/", "branch_gradient_sample/")
    off = sorted(d for d in differences(one, two) if d[0] > TOLERANCE and not any(s in d[1] for s in sampled))
    assert not off, "\n".join(f"{ratio:.2g} {where}" for ratio, where in off[:12])
