"""How processes of a run end: a reward that hangs, one process of two that fails, a signal to one of two."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
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
        print("asked again", flush=True)
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


def recipe(path: Path, config: Any) -> None:
    path.write_text(json.dumps(json.loads(config.model_dump_json())))


def saved(run: Path) -> list[str]:
    return [p.name for p in (run / "checkpoints").glob("step-*")]


# Forked before torch has any thread, so that all is imported once. First two processes of a run in which the second one
# fails alone, then of the command line with a signal to the second. Then one process whose reward hangs.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import omninft.runs.display
from omninft.cli import main
from omninft.rollout.sampler import RolloutSampler
from omninft.types import OmniNFTError
from tests.runs.test_endings import failing_config, train

model, folder, ports = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:5]
real, seen = RolloutSampler.sample, []

def start(name, act, **environment):
    if process := os.fork():
        return process
    os.environ.update(environment)
    out = os.open(folder / name, os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    act()
    sys.exit()

def sample(self, groups, seed, iteration, adapter):
    if iteration < 0:
        seen.append(iteration)
        if len(seen) == 3 and os.environ["RANK"] == "1":  # the first of two batches after the first iteration
            os.kill(os.getpid(), signal.SIGTERM)
    return real(self, groups, seed, iteration, adapter)

def command(recipe):
    sys.argv = ["omninft", "train", str(recipe)]
    main()

def two():
    os.environ["MASTER_PORT"] = ports[0]
    try:
        train(failing_config(model, folder / "failing"))
    except (OmniNFTError, RuntimeError) as error:
        print("ended:", type(error).__name__, error)
    RolloutSampler.sample = sample
    os.environ["MASTER_PORT"] = ports[1]
    command(folder / "cut.yaml")

def code(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "2"}
codes = [code(process) for process in [start(f"rank-{r}", two, RANK=str(r), **both) for r in range(2)]]
hung = start("hung", lambda: command(folder / "hung.yaml"))
deadline = time.monotonic() + 60
while "asked again" not in (folder / "hung").read_text() if (folder / "hung").exists() else True:
    assert time.monotonic() < deadline, "the reward was never asked"
    time.sleep(0.05)
os.kill(hung, signal.SIGINT)
time.sleep(0.3)
after_one = os.waitpid(hung, os.WNOHANG)[0]
os.kill(hung, signal.SIGINT)
begin = time.monotonic()
signal.alarm(20)
codes.append(code(hung))
print(json.dumps({"codes": codes, "after_one": after_one, "seconds": time.monotonic() - begin}))
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
def ended(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:  # noqa: F811
    """Where the processes worked and wrote, and how they ended."""
    folder = tmp_path_factory.mktemp("endings")
    # Two batches in each process.
    evaluation = TWO_BATCHES | {"sampling": TWO_BATCHES["sampling"] | {"batch_size": 2}}
    seldom: dict[str, Any] = {"run__checkpoint_every": 100}
    recipe(folder / "cut.yaml", small_config(model, folder / "cut", evaluation=evaluation, **seldom))
    recipe(folder / "hung.yaml", small_config(model, folder / "hanging", rewards=reward("hangs"), **seldom))
    script = folder / "endings.py"
    script.write_text(SCRIPT)
    ports = [str(free_port()) for _ in range(2)]
    process = subprocess.Popen(
        [sys.executable, str(script), str(model), str(folder), *ports],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        told, _ = process.communicate(timeout=150)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and those it started
    assert process.returncode == 0, told
    return folder, json.loads(told)


def test_the_second_interrupt_ends_a_run_whose_reward_hangs(ended: tuple[Path, dict[str, Any]]) -> None:
    folder, found = ended
    assert found["after_one"] == 0  # the first one waits for the iteration
    assert found["codes"][2] == 130, (folder / "hung").read_text()
    assert found["seconds"] < 10  # the reward would hang for ever
    assert saved(folder / "hanging" / "small") == ["step-000001"]


def test_a_process_that_fails_alone_ends_all_and_the_finished_iterations_are_saved(
    ended: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = ended
    told = [(folder / f"rank-{rank}").read_text() for rank in range(2)]
    assert all("ended:" in text for text in told), told
    assert "reward memory_ends ran out of memory on a batch of 4 clips (no room)" in told[1]
    run = folder / "failing" / "small"
    assert saved(run) == ["step-000001"]
    messages = [row["message"] for row in read_metrics(run) if row["kind"] == "event"]
    assert any("the state after iteration 1 is saved" in message for message in messages)


def test_a_signal_to_one_process_cuts_the_evaluation_of_all(ended: tuple[Path, dict[str, Any]]) -> None:
    folder, found = ended
    assert found["codes"][:2] == [143, 143], (folder / "rank-0").read_text()
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
