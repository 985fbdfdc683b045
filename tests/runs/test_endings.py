"""How processes of a run end: a reward that hangs, one process of two that fails, a signal to one of two."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from omninft.runs.metrics import read_metrics
from omninft.types import Clip, OmniNFTError
from tests.test_train import TWO_BATCHES, brightness, model, small_config  # noqa: F401

SCORED = {"clips": 0}


def hangs(clips: list[Clip]) -> list[float]:
    """As brightness on the 8 clips of the first iteration, then never."""
    SCORED["clips"] += len(clips)
    if SCORED["clips"] > 8:
        print("hanging", flush=True)
        time.sleep(1e9)
    return brightness(clips)


def memory_ends(clips: list[Clip]) -> list[float]:
    """As brightness on the first iteration's clips of one process of two; then the second one runs out of memory."""
    SCORED["clips"] += len(clips)
    if SCORED["clips"] > 4 and os.environ.get("RANK") == "1":
        raise MemoryError("no room")
    return brightness(clips)


def reward(name: str) -> list[dict[str, str]]:
    return [{"name": f"tests.runs.test_endings:{name}", "route": "joint"}]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | more


def recipe(folder: Path, config: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(json.dumps(json.loads(config.model_dump_json())))
    return path


def saved(run: Path) -> list[str]:
    return [p.name for p in (run / "checkpoints").glob("step-*")]


def test_the_second_interrupt_ends_a_run_whose_reward_hangs(model: Path, tmp_path: Path) -> None:  # noqa: F811
    changes: dict[str, Any] = {"rewards": reward("hangs"), "run__checkpoint_every": 100}
    config = small_config(model, tmp_path / "runs", **changes)
    process = subprocess.Popen(
        [sys.executable, "-m", "omninft", "train", str(recipe(tmp_path, config))],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "hanging" in line:
                break
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        assert process.wait(10) == 130
        assert time.monotonic() - begin < 2
    finally:
        process.kill()
    assert saved(tmp_path / "runs" / "small") == ["step-000001"]


# In one process: first a run whose second process fails alone, then the command line with a signal to that process.
PAIR = """
import os, signal, sys, time
from pathlib import Path
from omninft.cli import main
from omninft.rollout.sampler import RolloutSampler
from omninft.types import OmniNFTError
from tests.runs.test_endings import failing_config, train

model, folder, ports = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:5]
os.environ["MASTER_PORT"] = ports[0]
try:
    train(failing_config(model, folder / "failing"))
except (OmniNFTError, RuntimeError) as error:
    print("ended:", type(error).__name__, error)

real, seen = RolloutSampler.sample, []
def sample(self, groups, seed, iteration, adapter):
    if iteration < 0:
        seen.append(iteration)
        if len(seen) == 2 and os.environ["RANK"] == "1":  # in the evaluation after the first iteration
            os.kill(os.getpid(), signal.SIGTERM)
    return real(self, groups, seed, iteration, adapter)
RolloutSampler.sample = sample
os.environ["MASTER_PORT"] = ports[1]
sys.argv = ["omninft", "train", str(folder / "mine.yaml")]
main()
"""


def failing_config(model: Path, runs: Path) -> Any:  # noqa: F811
    return small_config(model, runs, rewards=reward("memory_ends"), run__checkpoint_every=100)


def train(config: Any) -> Any:
    from omninft.train import train

    return train(config)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], list[str]]:  # noqa: F811
    """The folder, exit codes and output of both processes."""
    folder = tmp_path_factory.mktemp("pair")
    recipe(folder, small_config(model, folder / "cut", evaluation=TWO_BATCHES, run__checkpoint_every=100))
    script = folder / "pair.py"
    script.write_text(PAIR)
    ports = [str(free_port()) for _ in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(model), str(folder), *ports],
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE="2"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return folder, [process.returncode for process in processes], told


def test_a_process_that_fails_alone_ends_all_and_the_finished_iterations_are_saved(
    pair: tuple[Path, list[int], list[str]],
) -> None:
    folder, _, told = pair
    assert all("ended:" in text for text in told), told
    assert "reward memory_ends ran out of memory on a batch of 4 clips (no room)" in told[1]
    run = folder / "failing" / "small"
    assert saved(run) == ["step-000001"]
    messages = [row["message"] for row in read_metrics(run) if row["kind"] == "event"]
    assert any("the state after iteration 1 is saved" in message for message in messages)


def test_a_signal_to_one_process_cuts_the_evaluation_of_all(pair: tuple[Path, list[int], list[str]]) -> None:
    folder, codes, told = pair
    assert codes == [143, 143], told
    run = folder / "cut" / "small"
    assert saved(run) == ["step-000001"]
    evaluated = [row["iteration"] for row in read_metrics(run) if row["kind"] == "evaluation"]
    assert evaluated == [0]


def test_out_of_memory_in_training_is_told_at_once(model: Path, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: F811
    monkeypatch.setenv("RANK", "0")
    SCORED["clips"] = 0

    monkeypatch.setattr("tests.runs.test_endings.brightness", _no_room)
    config = small_config(model, tmp_path, rewards=reward("memory_ends"), run__max_missing_share=1.0)
    with pytest.raises(OmniNFTError, match="ran out of memory on a batch of 4 clips"):
        train(config)


def _no_room(clips: list[Clip]) -> list[float]:
    raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
