"""What a run saves and restores: every part that carries state, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from omninft.distributed import Processes
from omninft.runs.build import Parts, build
from omninft.runs.folder import Progress, RunFolder, stateful_parts
from omninft.runs.metrics import read_metrics
from omninft.types import OmniNFTError
from tests.test_train import model, small_config  # noqa: F401


@pytest.fixture
def parts(model: Path, tmp_path: Path) -> Parts:  # noqa: F811
    return build(small_config(model, tmp_path / "runs"), Processes())


def disturb(parts: Parts, seed: int) -> None:
    """Give every part a state that no fresh one has."""
    generator = torch.Generator().manual_seed(seed)
    for name in ("current", "old"):
        for tensor in parts.policy.trainables.state(name).values():  # type: ignore[arg-type]
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    update = parts.update
    for parameter in update.parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    update.optimiser.step()
    update.optimiser_step = 17 + seed


def snapshot(parts: Parts) -> dict[str, Any]:
    """Copies of all state, by its path."""
    found: dict[str, Any] = {}
    for name, part in stateful_parts(parts).items():
        tensors, values = part.state()
        found |= {f"{name}.{key}": tensor.clone() for key, tensor in tensors.items()}
        found[f"{name} values"] = repr(values)
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())


def test_all_that_carries_state_is_listed(parts: Parts) -> None:
    assert list(stateful_parts(parts)) == ["current", "old", "optimiser", "credit", "objective"]
    _, values = stateful_parts(parts)["optimiser"].state()
    assert "optimiser_step" in values
    disturb(parts, 1)
    current, old = (stateful_parts(parts)[name].state()[0] for name in ("current", "old"))
    assert current.keys() == old.keys()
    assert not any(torch.equal(current[k], old[k]) for k in current)


def test_a_fresh_run_restores_it_to_the_bit(parts: Parts, model: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = RunFolder(parts, None)
    assert folder.open(resume=False) == Progress(0, 0.0)
    disturb(parts, 1)
    saved = snapshot(parts)
    folder.save(Progress(6, 12.5))
    fresh = build(small_config(model, tmp_path / "runs"), Processes())
    assert not same(snapshot(fresh), saved)
    assert RunFolder(fresh, folder.path).open(resume=True) == Progress(6, 12.5)
    assert same(snapshot(fresh), saved)
    assert fresh.update.optimiser_step == 18
    # The optimiser goes on as the other would.
    for made in (parts, fresh):
        for parameter in made.update.parameters:
            parameter.grad = torch.ones_like(parameter)
        made.update.optimiser.step()
    assert same(snapshot(fresh), snapshot(parts))


def test_a_checkpoint_of_the_same_iteration_is_not_written_twice(parts: Parts) -> None:
    folder = RunFolder(parts, None)
    folder.open(resume=False)
    folder.save(Progress(1, 1.0))
    (first,) = folder.store.list_checkpoints()
    before = (first / "manifest.json").read_bytes()
    folder.save(Progress(1, 99.0))
    assert (first / "manifest.json").read_bytes() == before


def test_only_the_first_process_writes(parts: Parts) -> None:
    folder = RunFolder(parts, None)

    class Second(Processes):
        def __init__(self) -> None:
            super().__init__()
            self.rank = 1

    folder.processes = Second()
    folder.open(resume=False)
    folder.save(Progress(1, 1.0))
    assert folder.log is None
    assert not folder.path.exists()


def test_another_method_is_another_run(parts: Parts, model: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = RunFolder(parts, None)
    folder.open(resume=False)
    folder.save(Progress(1, 1.0))
    other = build(small_config(model, tmp_path / "runs", credit__kind="gdpo"), Processes())
    with pytest.raises(OmniNFTError, match=r"credit\.kind \(checkpoint: omninft, now: gdpo\)"):
        RunFolder(other, folder.path).open(resume=True)


def test_a_damaged_checkpoint_is_written_again(parts: Parts) -> None:
    folder = RunFolder(parts, None)
    folder.open(resume=False)
    for iteration in (1, 2):
        folder.save(Progress(iteration, float(iteration)))
    newest = folder.store.list_checkpoints()[-1] / "current.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    again = RunFolder(parts, folder.path)
    assert again.open(resume=True) == Progress(1, 1.0)
    again.save(Progress(2, 3.0))
    assert RunFolder(parts, folder.path).open(resume=True) == Progress(2, 3.0)


def test_what_was_logged_after_the_checkpoint_is_taken_back(parts: Parts) -> None:
    folder = RunFolder(parts, None)
    folder.open(resume=False)
    assert folder.log is not None
    for iteration in range(3):
        folder.log.iteration(iteration, {"loss": 0.5})
    folder.save(Progress(2, 1.0))
    folder.log.close()
    again = RunFolder(parts, folder.path)
    again.open(resume=True)
    assert again.log is not None
    again.log.close()
    assert [row["iteration"] for row in read_metrics(folder.path)] == [0, 1]
