"""`python -m tests.trajectories.record [--compare] [NAME ...]`: runs, and stores their numbers or shows how far off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from omninft.train import train
from tests.trajectories.runs import RUNS, STORED, WORLD, make_config, summarise


def run(name: str, folder: Path, threads: int = 1) -> dict[str, Any]:
    """Run `name` here, or in processes of its own where there are several, and return its numbers."""
    world = WORLD.get(name, 1)
    if world == 1:
        before = torch.get_num_threads()
        train(make_config(name, folder, threads))
        torch.set_num_threads(before)
        return summarise(folder / name)
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    made = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "tests.trajectories.record", "--child", name, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if made.returncode:
        raise AssertionError(f"run {name} failed:\n{made.stdout[-2000:]}\n{made.stderr[-4000:]}")
    return summarise(folder / name)


def rounded(tree: Any) -> Any:
    """Ten significant digits: far below any tolerance."""
    if isinstance(tree, dict):
        return {k: rounded(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [rounded(v) for v in tree]
    return float(f"{tree:.10g}") if isinstance(tree, float) else tree


def dumped(tree: dict[str, Any]) -> str:
    """A line for every iteration, evaluation and tensor, so that differences can be read."""
    lines = []
    for part, values in rounded(tree).items():
        items = [json.dumps(v) for v in values] if isinstance(values, list) else []
        items = items or [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in values.items()]
        marks = "[]" if isinstance(values, list) else "{}"
        lines.append(f'"{part}": {marks[0]}\n' + ",\n".join(items) + f"\n{marks[1]}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--child"]:
        train(make_config(arguments[1], Path(arguments[2])))
        return
    compare = arguments[:1] == ["--compare"]
    STORED.mkdir(exist_ok=True)
    for name in arguments[compare:] or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            made = run(name, Path(folder), int(os.environ.get("THREADS", "1")))
        if compare:
            from tests.trajectories.test_trajectories import differences

            stored = json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))
            worst = sorted(differences(made, stored), reverse=True)[:4]
            print(name, *(f"{ratio:.3g} {where}" for ratio, where in worst), sep="\n    ")
        else:
            (STORED / f"{name}.json").write_text(dumped(made), encoding="utf-8")
            print(name, "stored")


if __name__ == "__main__":
    main(sys.argv[1:])
