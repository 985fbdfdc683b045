"""Gathering, adding up and agreeing, in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from omninft.distributed import Processes, available_cores

SCRIPT = """
import torch
import torch.distributed as dist
from omninft.distributed import TIMEOUT, Processes

# A machine with GPUs, as far as starting goes: gloo takes NCCL's place, and the calls are kept in order.
calls = []
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 3
torch.cuda.set_device = lambda device: calls.append(("device", str(device)))
start = dist.init_process_group
def started(backend, device_id, **rest):
    calls.append(("group", backend, str(device_id), rest["timeout"]))
    start(backend.replace("nccl", "gloo"), **rest)
dist.init_process_group = started
p = Processes()
own = f"cuda:{p.rank}"
assert calls == [("device", own), ("group", "cpu:gloo,cuda:nccl", own, TIMEOUT)], calls
torch.cuda.is_available = lambda: False
assert p.world == 3 and p.is_main == (p.rank == 0)
assert p.gather(("row", p.rank)) == [("row", 0), ("row", 1), ("row", 2)]      # in rank order, on every process
tensors = [torch.full((2, 3), float(p.rank + 1)), torch.tensor([10.0 ** p.rank])]
kept = tensors[0]
p.sum_(tensors)
assert tensors[0] is kept and torch.equal(kept, torch.full((2, 3), 6.0))          # in place: 1 + 2 + 3
assert tensors[1].tolist() == [111.0]
double = [torch.tensor([1e-12 * (p.rank + 1)], dtype=torch.float64)]
p.sum_(double)
assert abs(double[0].item() - 6e-12) < 1e-24
p.sum_([])
assert p.any(p.rank == 2) and not p.any(False)
p.wait()
if p.is_main:
    print("fine")
p.close()
"""


def test_three_processes_each_on_its_gpu_with_two_backends(tmp_path: Path) -> None:
    script = tmp_path / "three.py"
    script.write_text(SCRIPT)
    made = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "fine" in made.stdout, made.stderr[-3000:]


def test_one_process_needs_no_group() -> None:
    p = Processes()
    assert (p.rank, p.world, p.is_main) == (0, 1, True)
    assert p.gather(3) == [3]
    tensor = torch.tensor([2.0])
    p.sum_([tensor])
    assert tensor.item() == 2.0
    assert p.any(True)
    assert not p.any(False)
    p.wait()
    p.close()


def test_cores_are_shared_among_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert available_cores() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert available_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert available_cores() == 1
