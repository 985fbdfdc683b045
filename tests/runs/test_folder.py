"""What a run saves and restores: every part that carries state, to the bit."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from omninft.distributed import Processes
from omninft.runs.build import Parts, build
from omninft.runs.folder import Progress, RunFolder, make_run_folder, read_run_config, stateful_parts
from omninft.runs.metrics import MetricsLog, read_metrics
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
    folder.close()
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
    folder.close()
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
    folder.close()
    again = RunFolder(parts, folder.path)
    assert again.open(resume=True) == Progress(1, 1.0)
    again.save(Progress(2, 3.0))
    again.close()
    assert RunFolder(parts, folder.path).open(resume=True) == Progress(2, 3.0)


def test_what_was_logged_after_the_checkpoint_is_taken_back(parts: Parts) -> None:
    folder = RunFolder(parts, None)
    folder.open(resume=False)
    assert folder.log is not None
    for iteration in range(3):
        folder.log.iteration(iteration, {"loss": 0.5})
    folder.save(Progress(2, 1.0))
    folder.close()
    again = RunFolder(parts, folder.path)
    again.open(resume=True)
    again.close()
    assert [row["iteration"] for row in read_metrics(folder.path)] == [0, 1]


def written(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_one_process_at_a_time_works_on_a_run(parts: Parts) -> None:
    folder = RunFolder(parts, None)
    folder.open(resume=False)
    folder.save(Progress(1, 1.0))
    before = written(folder.path)
    with pytest.raises(OmniNFTError, match=rf"in use by another process \(pid {os.getpid()} on "):
        RunFolder(parts, folder.path).open(resume=True)
    with pytest.raises(OmniNFTError, match="in use"):
        RunFolder(parts, folder.path).open(resume=False)
    assert written(folder.path) == before
    folder.close()
    again = RunFolder(parts, folder.path)
    assert again.open(resume=True).iteration == 1
    again.close()


HOLD = """
import sys, time
from pathlib import Path
from omninft.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_free(parts: Parts, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, env=env)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    folder = RunFolder(parts, tmp_path / "run")
    with pytest.raises(OmniNFTError, match=f"pid {holder.pid} on "):
        folder.open(resume=False)
    assert [p.name for p in folder.path.iterdir()] == [".lock"]
    holder.kill()
    holder.wait(10)
    holder.stdout.close()
    folder.open(resume=False)
    folder.close()


def test_a_file_system_without_locks_is_said(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = RunFolder(parts, None)
    folder.open(resume=False)
    ((level, message),) = folder.notes
    assert level == "warning"
    assert "cannot be locked here (No locks available)" in message
    folder.close()


def stopped_run(parts: Parts, *iterations: int) -> Path:
    folder = RunFolder(parts, None)
    folder.open(resume=False)
    assert folder.log is not None
    for iteration in range(max(iterations, default=1)):
        folder.log.iteration(iteration, {"a": iteration})
    for iteration in iterations:
        folder.save(Progress(iteration, 1.0))
    folder.close()
    return folder.path


def damage(run: Path, iteration: int) -> None:
    (run / "checkpoints" / f"step-{iteration:06d}" / "old.safetensors").write_bytes(b"x")


def test_a_damaged_checkpoint_is_said_and_replaced(parts: Parts) -> None:
    run = stopped_run(parts, 1, 2)
    damage(run, 2)
    folder = RunFolder(parts, run)
    assert folder.open(resume=True).iteration == 1
    ((level, message),) = folder.notes
    assert level == "warning"
    assert "step-000002/old.safetensors: truncated" in message
    folder.save(Progress(2, 2.0))
    assert folder.store.latest() == run / "checkpoints" / "step-000002"
    folder.close()


def test_a_run_without_a_whole_checkpoint_is_refused_untouched(parts: Parts) -> None:
    run = stopped_run(parts, 1, 2)
    damage(run, 1)
    damage(run, 2)
    before = written(run)
    with pytest.raises(OmniNFTError, match=r"found no whole checkpoint.*step-000002/old.*step-000001/old"):
        RunFolder(parts, run).open(resume=True)
    assert written(run) == before
    assert len(read_metrics(run)) == 2


def test_a_run_that_stopped_before_its_first_checkpoint_starts_anew(parts: Parts) -> None:
    folder = RunFolder(parts, stopped_run(parts))
    assert folder.open(resume=True) == Progress()
    ((level, message),) = folder.notes
    assert level == "info"
    assert "starts anew" in message
    folder.close()


def test_a_damaged_row_is_kept_aside_and_said(parts: Parts) -> None:
    run = stopped_run(parts, 2)
    first, second = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(first + b'{"kind": \x00\n' + second)
    folder = RunFolder(parts, run)
    folder.open(resume=True)
    assert ["line 2: expected a JSON object" in message for _, message in folder.notes] == [True]
    assert [row["iteration"] for row in read_metrics(run)] == [0, 1]
    assert (run / "metrics.damaged").read_bytes() == b'{"kind": \x00\n'
    folder.close()


def test_leftovers_of_killed_processes_go(parts: Parts) -> None:
    run = stopped_run(parts, 1)
    before = sorted(written(run))
    (run / "samples" / ".12-0123abcd.part").mkdir(parents=True)
    (run / "samples" / ".12-0123abcd.part" / "a.mp4").write_bytes(b"x")
    (run / ".13-0123abcd.part").write_bytes(b"x")
    (run / ".tmp-probe-0123abcd").write_bytes(b"x")
    (run / "checkpoints" / ".tmp-step-000002-0123abcd").mkdir()
    (run / "checkpoints" / ".tmp-step-000002-0123abcd" / "state.json").write_bytes(b"x")
    folder = RunFolder(parts, run)
    folder.open(resume=True)
    folder.close()
    assert sorted(written(run)) == before
    assert not (run / "samples" / ".12-0123abcd.part").exists()


def test_an_empty_config_is_no_recipe(parts: Parts) -> None:
    run = stopped_run(parts, 1)
    (run / "config.yaml").write_text("\n")
    with pytest.raises(OmniNFTError, match=r"config\.yaml is empty: expected the recipe"):
        read_run_config(run)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("# only a remark\n", "is empty: expected the recipe"),
        ("{}\n", "is empty: expected the recipe"),
        ("[]\n", "found a list, expected a mapping"),
        ("just words\n", "found a str, expected a mapping"),
        ("\0" * 20, "cannot be read: .*; expected the recipe"),
    ],
)
def test_what_is_no_mapping_is_no_config_of_a_run(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(OmniNFTError, match=rf"(?s)config\.yaml:? {told}"):
        read_run_config(tmp_path)


def test_runs_that_start_at_the_same_moment_get_a_folder_each(model: Path, tmp_path: Path) -> None:  # noqa: F811
    config = small_config(model, tmp_path / "runs")
    together = threading.Barrier(8)

    def make() -> Path:
        together.wait(5)
        return make_run_folder(config)

    with ThreadPoolExecutor(8) as pool:
        made = [future.result() for future in [pool.submit(make) for _ in range(8)]]
    assert sorted(path.name for path in made) == ["small", *(f"small-{n}" for n in range(2, 9))]
    assert all(path.is_dir() for path in made)


def test_a_run_that_lost_the_name_takes_the_next(parts: Parts) -> None:
    first, second = RunFolder(parts, None), RunFolder(parts, None)
    assert first.path == second.path
    first.open(resume=False)
    second.open(resume=False)
    assert [first.path.name, second.path.name] == ["small", "small-2"]
    assert second.store.folder.parent == second.lock.path.parent == second.path
    for folder in (first, second):
        assert (folder.path / "config.yaml").is_file()
        folder.close()


def test_a_folder_that_cannot_be_made_is_said(model: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OmniNFTError, match="cannot be made"):
        make_run_folder(small_config(model, tmp_path / "runs"))


def test_a_row_of_an_iteration_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with MetricsLog(tmp_path) as log:
        log.iteration(0, {"a": 1})
        assert len(synced) == 1
        log.evaluation("dev", 1, {})
        assert len(synced) == 2
