"""The service as a process of its own, and what can go wrong with one."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from omninft.cli import main
from omninft.config import RewardConfig
from omninft.rewards.registry import build_reward
from omninft.rewards.runner import RewardRunner
from omninft.service.messages import CONTENT_TYPE, pack_message
from omninft.service.reward import RemoteReward
from tests.service.clips import clip, expected

ROOT = Path(__file__).parents[2]
START_SECONDS = 120.0  # of an interpreter on a machine that is busy


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Process:
    """`omninft serve` on a port; `url` is known before it serves."""

    def __init__(self, *arguments: str, port: int | None = None, token: str | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {k: v for k, v in os.environ.items() if k != "OMNINFT_TOKEN"}
        if token is not None:
            environment["OMNINFT_TOKEN"] = token
        command = [sys.executable, "-m", "omninft", "serve", "-r", "tests.service.clips:pixels"]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), *arguments],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output: queue.Queue[str] = queue.Queue()
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            self.output.put(line)

    def wait_started(self) -> Process:
        with contextlib.suppress(queue.Empty):
            end = time.monotonic() + START_SECONDS
            while "serving on" not in self.output.get(timeout=max(end - time.monotonic(), 0.01)):
                pass
            return self
        raise AssertionError("".join(self.lines))

    def kill(self) -> None:
        """As the kernel does when memory runs out: nothing is finished, nothing is said."""
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def service() -> Iterator[Process]:
    running = Process("--max-clips", "16", "--max-mb", "1", "--queue", "64", token="secret").wait_started()
    yield running
    running.kill()


HTTP = httpx.Client(trust_env=False, verify=False, timeout=60)


def metrics(service: Process) -> str:
    return HTTP.get(f"{service.url}/metrics").text


def ask(service: Process, body: bytes) -> httpx.Response:
    headers = {"Content-Type": CONTENT_TYPE}
    return HTTP.post(f"{service.url}/v1/score", content=body, headers=headers)


def remote(service: Process, **options: Any) -> RemoteReward:
    return RemoteReward(service.url, **{"token": "secret", "timeout": 60.0} | options)


def test_it_says_what_it_serves(service: Process) -> None:
    said = "".join(service.lines)
    assert f"serving on {service.url} (with a token)" in said
    assert "pixels" in said
    answer = HTTP.get(f"{service.url}/v1/rewards", headers={"Authorization": "Bearer secret"}).json()
    assert [c["name"] for r in answer["rewards"] for c in r["components"]] == ["pixels"]
    assert (answer["limits"]["clips"], answer["limits"]["bytes"]) == (16, 1 << 20)


def test_tensors_are_scored_as_here_and_media_within_the_codecs_tolerance(service: Process) -> None:
    clips = [clip(n, size=32, frames=4) for n in range(5)]
    here = RewardRunner([build_reward(RewardConfig(name="tests.service.clips:pixels"))]).score(clips)
    there = RewardRunner([remote(service, batch_clips=2)]).score(clips)
    assert there.components == here.components
    np.testing.assert_array_equal(there.values, here.values)
    np.testing.assert_allclose(remote(service, encoding="media").score(clips).values, here.values, atol=0.08)


def test_64_clients_at_once_all_get_their_own_scores(service: Process) -> None:
    results: dict[int, np.ndarray] = {}

    def one(client: int) -> None:
        clips = [clip(10 * client + n) for n in range(3)]
        results[client] = remote(service, batch_clips=2).score(clips).values

    threads = [threading.Thread(target=one, args=(n,)) for n in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for client in range(64):
        wanted = [[expected(clip(10 * client + n))] for n in range(3)]
        np.testing.assert_array_equal(results[client], wanted)


def test_a_wrong_token_is_an_error_before_the_run(service: Process) -> None:
    for token, message in (("wrong", "HTTP 401: wrong token"), (None, "HTTP 401: no token")):
        reward = RemoteReward(service.url, token=token, token_env="NO_SUCH_VARIABLE")
        with pytest.raises(Exception, match=message):
            _ = reward.components


def test_bodies_that_are_oversized_or_malformed_leave_it_serving(service: Process) -> None:
    headers = {"Authorization": "Bearer secret", "Content-Type": CONTENT_TYPE}
    good = pack_message([clip(0)])
    with httpx.Client(base_url=service.url, headers=headers, trust_env=False, timeout=30) as http:
        for body, status in ((b"\0" * (2 << 20), 413), (good[:-1], 422), (b"", 422), (b"\x80\x04pickle", 422)):
            answer = http.post("/v1/score", content=body)
            assert (answer.status_code, set(answer.json())) == (status, {"error", "request_id"})
        endless = (b"\0" * 65536 for _ in range(64))
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):
            assert http.post("/v1/score", content=endless).status_code == 413
        assert http.post("/v1/score", content=good).status_code == 200
    # What is no HTTP at all, and a body that is never sent.
    with socket.create_connection(("127.0.0.1", service.port)) as raw:
        raw.sendall(os.urandom(2000) + b"\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    lingering = socket.create_connection(("127.0.0.1", service.port))
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Type: {CONTENT_TYPE}\r\n"
    lingering.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
    np.testing.assert_array_equal(remote(service).score([clip(1)]).values, [[expected(clip(1))]])
    lingering.close()


def test_a_slow_service_costs_the_scores_not_the_run(service: Process) -> None:
    reward = remote(service, timeout=2.0, batch_clips=1, parallel=1)
    assert reward.components
    clips = [clip(0), clip(1, "sleep 4"), clip(2)]
    start = time.monotonic()
    table = RewardRunner([reward]).score(clips)
    assert time.monotonic() - start < 8
    assert np.isnan(table.values[1, 0])
    assert f"not scored by {service.url} within 2 s" in table.reasons[1, 0]
    assert table.values[0, 0] == expected(clips[0])
    assert np.isnan(table.values[2, 0])  # its turn never came
    np.testing.assert_array_equal(remote(service).score([clip(3)]).values, [[expected(clip(3))]])


def test_killed_and_restarted_in_mid_run_nothing_is_lost() -> None:
    first = Process("--max-clips", "8").wait_started()
    reward = RemoteReward(first.url, timeout=START_SECONDS, retries=1000, batch_clips=4, parallel=2)
    assert reward.components
    clips = [clip(n, "sleep 0.02") for n in range(40)]
    tables: list[Any] = []
    run = threading.Thread(target=lambda: tables.append(RewardRunner([reward]).score(clips)))
    run.start()
    while True:  # until some clips are scored and others are not
        text = metrics(first)
        scored = int(text.split("\nomninft_clips_scored_total ")[1].split()[0])
        if scored:
            break
        time.sleep(0.01)
    first.kill()
    assert run.is_alive()
    assert scored < 40
    second = Process("--max-clips", "8", port=first.port).wait_started()
    try:
        run.join(START_SECONDS)
        (table,) = tables
        assert table.reasons == {}
        np.testing.assert_array_equal(table.values[:, 0], [expected(c) for c in clips])
        # Died of a clip, and not started again: that one and those after it are missing, with the reason.
        reward = RemoteReward(second.url, timeout=30, retries=2, batch_clips=1, parallel=1)
        table = RewardRunner([reward]).score([clip(0), clip(1, "exit"), clip(2)])
        assert second.process.wait(10) == 3
        assert table.values[0, 0] == expected(clip(0))
        assert np.isnan(table.values[1:, 0]).all()
        assert all("gave up after 3 tries" in why for why in table.reasons.values())
    finally:
        second.kill()


def test_sigterm_finishes_what_was_admitted() -> None:
    running = Process("--grace", "30").wait_started()
    body = pack_message([clip(0, "sleep 1"), clip(1)])
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(ask(running, body)))
    asking.start()
    end = time.monotonic() + 20
    while "omninft_queue_clips 2" not in metrics(running):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert running.stop() == 0
    asking.join(10)
    rows = json.loads(answers[0].content)["clips"]
    assert [row["scores"]["pixels"] for row in rows] == [expected(clip(0)), expected(clip(1))]
    with pytest.raises(httpx.ConnectError):
        HTTP.get(f"{running.url}/health")


def test_a_reward_that_never_ends_does_not_outlive_the_grace_time() -> None:
    running = Process("--grace", "1").wait_started()
    body = pack_message([clip(0, "sleep 600")])
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(ask(running, body)))
    asking.start()
    while "omninft_queue_clips 1" not in metrics(running):
        time.sleep(0.01)
    start = time.monotonic()
    assert running.stop() == 1
    assert time.monotonic() - start < 15
    running.reader.join(10)
    said = "".join(running.lines)
    assert "stopped with 1 clips not scored after the grace time of 1 s" in said
    assert "Traceback" not in said
    asking.join(10)
    assert answers[0].status_code == 503


def test_errors_of_the_command_are_one_line(monkeypatch, capsys) -> None:
    monkeypatch.delenv("OMNINFT_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["--port", port], f"error: cannot serve on 127.0.0.1 port {port}"),
            (["--host", "0.0.0.0", "--port", "0"], "error: --host is 0.0.0.0, which others can reach"),
            (["--queue", "3"], "error: the queue holds 3 clips, expected at least the 32"),
            (["--recipe", "omninft"], "error: --recipe serves the recipe's rewards"),
            (["--token-file", "/nowhere"], "error: token file /nowhere: cannot be read"),
        ):
            monkeypatch.setattr(sys, "argv", ["omninft", "serve", "-r", "tests.service.clips:pixels", *arguments])
            with pytest.raises(SystemExit, match="1"):
                main()
            assert capsys.readouterr().err.startswith(message)


def test_without_the_extra_the_command_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "omninft.service.server", raising=False)
    monkeypatch.setattr(sys, "argv", ["omninft", "serve"])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "install the extra: pip install 'omninft[serve]'" in capsys.readouterr().err
