from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from omninft.config import RewardConfig
from omninft.rewards.registry import ComponentSpec, WeighedReward, build_reward
from omninft.scorers.weights import JudgingModel
from omninft.service import server as server_module
from omninft.service.messages import CONTENT_TYPE, Limits, pack_message
from omninft.service.queue import ScoringQueue
from omninft.service.server import RewardService, create_app
from omninft.service.token import read_token
from omninft.types import Clip, OmniNFTError, ScoreTable
from tests.service.clips import clip, expected

TOKEN = "a-token"
AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}
BODY = pack_message([clip(0), clip(1)])


class Held:
    """Two components; scores when it is let go, and counts the clips it was asked for."""

    name = "held"
    components = (
        ComponentSpec("plain", "video", "what pixels gives", weight=2.0, range=(-np.inf, 5.0)),
        ComponentSpec("cost", "joint", "its negative", higher_is_better=False, unit="s"),
    )
    inputs = ("video", "prompt_v")
    licence = "CC-BY-NC-4.0"
    model = JudgingModel("judge", 7, "CC-BY-NC-4.0", commercial=False)

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Semaphore(0)
        self.asked: list[int] = []
        self.lacks: str | None = None

    def missing(self) -> str | None:
        return self.lacks

    def score(self, clips: list[Clip]) -> ScoreTable:
        self.asked += [c.sample for c in clips]
        self.begun.release()
        assert self.go.wait(20)
        if any(c.prompt.prompt_v == "break" for c in clips):
            raise RuntimeError("broken by the prompt")
        values = np.array([[expected(c), -expected(c)] for c in clips]).reshape(-1, 2)
        return ScoreTable(tuple(s.component for s in self.components), values)


class Service:
    """An application in this process, with a client of it."""

    def __init__(self, token: str | None = TOKEN, timeout: float = 20.0, **options: Any) -> None:
        self.reward = Held()
        self.queue = ScoringQueue([WeighedReward(self.reward, Held.components)], **{"limits": Limits()} | options)
        self.app = create_app(self.queue, token, timeout)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://test", headers=AUTHORISED if token else {}
        )

    async def post(self, body: bytes | AsyncIterator[bytes] = BODY, **headers: str) -> httpx.Response:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.post("/v1/score", content=body, headers={"Content-Type": CONTENT_TYPE} | names)

    async def begun(self) -> None:
        """Until the reward was called once more."""
        assert await asyncio.to_thread(self.reward.begun.acquire, True, 10)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def test_every_clip_gets_its_scores() -> None:
    async def work() -> None:
        name = str(uuid.uuid4())
        answer = await Service().post(x_request_id=name.upper())
        assert (answer.status_code, answer.headers["x-request-id"]) == (200, name)
        assert answer.headers["content-type"] == "application/json"
        reply = answer.json()
        assert reply["request_id"] == name
        assert reply["components"] == [
            {"name": "plain", "route": "video", "weight": 2.0},
            {"name": "cost", "route": "joint", "weight": -1.0},
        ]
        for n, row in enumerate(reply["clips"]):
            value = expected(clip(n))
            assert row == {"clip": n, "scores": {"plain": value, "cost": -value}, "reasons": {}}
        assert set(reply["seconds"]) == {"wait", "decode", "score"}

    run(work())


def test_what_fails_is_null_with_the_reason_and_costs_no_other_clip_its_score() -> None:
    async def work() -> None:
        answer = await Service().post(pack_message([clip(0), clip(1, "break"), clip(2)]))
        rows = answer.json()["clips"]
        assert [row["scores"]["plain"] for row in rows] == [expected(clip(0)), None, expected(clip(2))]
        assert rows[1]["scores"] == {"plain": None, "cost": None}
        assert rows[1]["reasons"] == dict.fromkeys(("plain", "cost"), "RuntimeError: broken by the prompt")

    run(work())


def test_media_that_cannot_be_decoded_cost_no_other_clip_its_score() -> None:
    async def work() -> None:
        good = pack_message([clip(0, size=32, frames=4), clip(1, size=32, frames=4)], "media")
        place = good.index(b"ftyp", good.index(b"ftyp") + 1)  # of the second file
        service = Service()
        rows = (await service.post(good[:place] + b"fypt" + good[place + 4 :])).json()["clips"]
        assert rows[0]["scores"]["plain"] is not None
        assert rows[1]["scores"]["plain"] is None
        assert "expected an mp4 or webm file" in rows[1]["reasons"]["plain"]
        assert service.reward.asked == [0]

    run(work())


def test_clips_of_a_request_are_too_large_together_once_decoded() -> None:
    async def work() -> None:
        still = [dataclasses.replace(clip(n), video=np.full((16, 64, 64, 3), 40, np.uint8)) for n in range(2)]
        body = pack_message(still, "media")
        size = still[0].video.nbytes + still[0].waveform.nbytes
        assert len(body) < size
        rows = (await Service(limits=Limits(bytes=2 * size - 1)).post(body)).json()["clips"]
        assert rows[0]["scores"]["plain"] is not None
        assert "bytes of clip, more than the" in rows[1]["reasons"]["plain"]
        rows = (await Service(limits=Limits(bytes=2 * size + 50_000)).post(body)).json()["clips"]
        assert None not in [row["scores"]["plain"] for row in rows]

    run(work())


def test_the_description_of_what_is_served() -> None:
    async def work() -> None:
        service = Service(limits=Limits(clips=5))
        service.reward.lacks = "judge: missing a.bin"
        served = (await service.http.get("/v1/rewards")).json()
        (reward,) = served["rewards"]
        assert (reward["name"], reward["inputs"], reward["licence"]) == ("held", ["video", "prompt_v"], "CC-BY-NC-4.0")
        assert reward["missing"] == "judge: missing a.bin"
        assert reward["model"]["commercial"] is False
        plain, cost = reward["components"]
        assert (plain["range"], plain["weight"], plain["higher_is_better"]) == ([None, 5.0], 2.0, True)
        assert (cost["route"], cost["weight"], cost["higher_is_better"], cost["unit"]) == ("joint", 1.0, False, "s")
        assert (served["limits"]["clips"], served["limits"]["bytes"]) == (5, 1 << 30)
        answer = await service.http.get("/ready")
        assert (answer.status_code, answer.json()["error"]) == (503, "judge: missing a.bin")
        service.reward.lacks = None
        assert (await service.http.get("/ready")).json() == {"status": "ready"}
        assert (await service.http.get("/health")).json() == {"status": "ok"}

    run(work())


async def pieces(body: bytes, size: int = 100) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


def test_refusals_name_what_was_found_and_expected() -> None:
    async def work() -> None:
        service = Service(limits=Limits(bytes=len(BODY)))
        for answer, status, message in (
            (await service.post(Authorization="Bearer other"), 401, "wrong token"),
            (await service.post(Authorization="Basic abc"), 401, "no token"),
            (await service.post(Content_Type="application/json"), 415, f"'application/json', expected {CONTENT_TYPE}"),
            (await service.post(BODY + b"x"), 413, f"{len(BODY) + 1} bytes, expected at most {len(BODY)}"),
            (await service.post(pieces(BODY + b"x")), 413, f"more than {len(BODY)} bytes"),
            (await service.post(b""), 422, "the body is not safetensors"),
            (await service.post(BODY[:-1]), 422, "the body is not safetensors"),
            (await service.post(x_request_id="17"), 422, "header x-request-id is '17', expected"),
            (await service.post(x_timeout="-1"), 422, "header x-timeout is '-1', expected"),
            (await service.post(x_timeout="nan"), 422, "header x-timeout is"),
            (await service.http.post("/v1/rewards"), 405, "Method Not Allowed"),
            (await service.http.get("/v2/score"), 404, "Not Found"),
        ):
            assert answer.status_code == status, answer.text
            assert set(answer.json()) == {"error", "request_id"}
            assert message in answer.json()["error"]
            assert answer.headers["x-request-id"] == answer.json()["request_id"]
            assert ("www-authenticate" in answer.headers) == (status == 401)
        assert (await service.post(pieces(BODY))).status_code == 200
        assert service.reward.asked == [0, 1]
        assert (service.queue.clips, service.queue.held_bytes) == (0, 0)
        for path in ("/v1/rewards", "/metrics"):
            assert (await service.http.get(path, headers={"Authorization": ""})).status_code == 401
        assert (await Service(token=None).post()).status_code == 200

    run(work())


def test_a_body_that_stops_coming_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(server_module, "_IDLE_SECONDS", 0.05)

    async def stalled() -> AsyncIterator[bytes]:
        yield BODY[:100]
        await asyncio.sleep(10)
        yield BODY[100:]

    async def work() -> None:
        service = Service()
        answer = await service.post(stalled())
        assert (answer.status_code, answer.json()["error"]) == (408, "no byte of the body came for 0.05 s")
        assert service.queue.held_bytes == 0

    run(work())


def test_the_same_id_is_the_same_work() -> None:
    async def work() -> None:
        service = Service()
        name = str(uuid.uuid4())
        service.reward.go.clear()
        first = asyncio.create_task(service.post(x_request_id=name))
        await service.begun()
        second = asyncio.create_task(service.post(x_request_id=name))
        other = await service.post(pack_message([clip(9)]), x_request_id=name)
        assert (other.status_code, "another body" in other.json()["error"]) == (409, True)
        # A client that is cut off takes nothing with it.
        first.cancel()
        service.reward.go.set()
        third = await service.post(x_request_id=name)
        assert (await second).content == third.content
        assert service.reward.asked == [0, 1]
        assert service.queue.counts.repeated == 2
        assert (await service.post()).json()["request_id"] != name
        assert service.reward.asked == [0, 1, 0, 1]

    run(work())


def test_kept_answers_are_bounded_in_number_and_age() -> None:
    async def work() -> None:
        service = Service(keep=2, keep_seconds=1000.0)
        names = [str(uuid.uuid4()) for _ in range(4)]
        for name in names:
            await service.post(pack_message([clip(0)]), x_request_id=name)
        assert list(service.queue._answers) == names[-2:]
        aged = Service(keep=100, keep_seconds=0.0)
        for name in names:
            await aged.post(pack_message([clip(0)]), x_request_id=name)
        assert list(aged.queue._answers) == names[-1:]

    run(work())


def test_a_full_queue_refuses_at_once_and_takes_again_when_it_has_room() -> None:
    async def work() -> None:
        service = Service(limits=Limits(clips=2), most_clips=4)
        service.reward.go.clear()
        waiting = [asyncio.create_task(service.post()) for _ in range(2)]
        await service.begun()
        while service.queue.clips < 4:
            await asyncio.sleep(0.01)
        refused = await service.post()
        assert (refused.status_code, refused.json()["error"]) == (429, "the queue is full: 4 clips wait, at most 4 may")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        service.reward.go.set()
        assert [(await task).status_code for task in waiting] == [200, 200]
        assert (await service.post()).status_code == 200
        assert service.reward.asked == [0, 1] * 3

    run(work())


def test_the_memory_of_waiting_requests_is_bounded() -> None:
    async def work() -> None:
        service = Service(limits=Limits(bytes=len(BODY)))
        service.reward.go.clear()
        waiting = [asyncio.create_task(service.post()) for _ in range(4)]
        while service.queue.held_bytes < 4 * len(BODY) or service.queue.clips < 8:
            await asyncio.sleep(0.01)
        refused = await service.post()
        assert (refused.status_code, refused.json()["error"]) == (429, "the memory for waiting requests is full")
        service.reward.go.set()
        assert [(await task).status_code for task in waiting] == [200] * 4
        assert service.queue.held_bytes == 0

    run(work())


def test_late_work_is_answered_504_and_its_answer_kept() -> None:
    async def work() -> None:
        service = Service(timeout=0.2)
        name = str(uuid.uuid4())
        service.reward.go.clear()
        answer = await service.post(x_request_id=name)
        assert (answer.status_code, "0.2 s" in answer.json()["error"]) == (504, True)
        assert int(answer.headers["retry-after"]) >= 1
        service.reward.go.set()
        while service.queue.clips:
            await asyncio.sleep(0.01)
        assert (await service.post(x_request_id=name)).json()["request_id"] == name
        assert service.reward.asked == [0, 1]

    run(work())


def test_a_judge_without_memory_is_told_as_that() -> None:
    async def work() -> None:
        service = Service()
        with patch.object(service.reward, "score", side_effect=MemoryError("no 3 GB left")):
            answer = await service.post()
        assert answer.status_code == 507
        assert "reward held ran out of memory on a batch of 2 clips (no 3 GB left)" in answer.json()["error"]
        assert (await service.post()).status_code == 200

    run(work())


def test_work_that_nobody_waits_for_any_more_is_not_begun() -> None:
    async def work() -> None:
        service = Service()
        service.reward.go.clear()
        first = asyncio.create_task(service.post(pack_message([clip(1)])))
        second = asyncio.create_task(service.post(pack_message([clip(2)])))
        await service.begun()
        late, name = pack_message([clip(3)]), str(uuid.uuid4())
        assert (await service.post(late, x_timeout="0.05", x_request_id=name)).status_code == 504
        service.reward.go.set()
        assert [(await task).status_code for task in (first, second)] == [200, 200]
        while service.queue.clips:
            await asyncio.sleep(0.01)
        assert service.reward.asked == [1, 2]
        # Nothing was kept of it: asked again it is scored.
        assert (await service.post(late, x_request_id=name)).status_code == 200
        assert service.reward.asked == [1, 2, 3]

    run(work())


def test_counts() -> None:
    async def work() -> None:
        service = Service()
        await service.post(pack_message([clip(0), clip(1, "break")]))
        await service.post(b"")
        await service.http.get("/elsewhere")
        text = (await service.http.get("/metrics")).text
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert lines['omninft_requests_total{path="/v1/score",status="200"}'] == "1"
        assert lines['omninft_requests_total{path="/v1/score",status="422"}'] == "1"
        assert lines['omninft_requests_total{path="other",status="404"}'] == "1"
        assert lines["omninft_clips_scored_total"] == "2"
        assert lines['omninft_scores_missing_total{component="plain"}'] == "1"
        assert lines["omninft_queue_clips"] == "0"
        assert float(lines['omninft_seconds_total{stage="score"}']) > 0

    run(work())


def test_closing_finishes_what_was_admitted_and_takes_nothing_new() -> None:
    async def work() -> None:
        service = Service()
        service.reward.go.clear()
        waiting = asyncio.create_task(service.post())
        await service.begun()
        service.queue.stop_admitting()
        refused = await service.post()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert (await service.http.get("/ready")).status_code == 503
        assert await service.queue.close(grace=0.05) == 2
        assert (await waiting).status_code == 503
        service.reward.go.set()
        assert await Service().queue.close(grace=10) == 0

    run(work())


def test_an_error_of_the_service_itself_is_told_as_such(monkeypatch) -> None:
    async def work() -> None:
        service = Service()

        async def broken(*_: Any) -> bytes:
            raise KeyError("x")

        monkeypatch.setattr(service.queue, "answer", broken)
        answer = await service.post()
        assert (answer.status_code, answer.json()["error"][:25]) == (500, "internal error (KeyError)")
        assert service.queue.held_bytes == 0

    run(work())


def rewards() -> list[WeighedReward]:
    return [build_reward(RewardConfig(name="tests.service.clips:pixels"))]


def test_without_a_token_only_this_machine_is_served() -> None:
    for host in ("0.0.0.0", "10.1.2.3", "::", "example.org"):
        with pytest.raises(OmniNFTError, match=r"--host is .* no token: give --token-file"):
            RewardService(rewards(), host, 0)
    for host in ("127.0.0.1", "localhost"):
        service = RewardService(rewards(), host, 0)
        assert service.url.startswith(f"http://{host}:")
        service._socket.close()
    RewardService(rewards(), "0.0.0.0", 0, token="secret")._socket.close()


def test_a_port_that_is_taken_and_a_queue_that_is_too_small() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OmniNFTError, match=f"cannot serve on 127.0.0.1 port {port}: .*in use"):
            RewardService(rewards(), "127.0.0.1", port)
    with pytest.raises(OmniNFTError, match="the queue holds 8 clips, expected at least the 32"):
        RewardService(rewards(), port=0, queue_clips=8)


def test_tokens(tmp_path, monkeypatch) -> None:
    file = tmp_path / "token"
    file.write_text(" secret-1\n")
    assert read_token(file) == "secret-1"
    monkeypatch.delenv("OMNINFT_TOKEN", raising=False)
    assert read_token() is None
    monkeypatch.setenv("OMNINFT_TOKEN", "secret-2")
    assert (read_token(), read_token(file)) == ("secret-2", "secret-1")
    for text, message in (("\n", "empty"), ("two words", "blanks"), ("tökén", "characters")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(OmniNFTError, match=message):
            read_token(file)
    with pytest.raises(OmniNFTError, match="cannot be read"):
        read_token(tmp_path / "none")


SCHEMA = schemathesis.openapi.from_dict(create_app(Service().queue, TOKEN).openapi())
schemathesis.openapi.media_type(CONTENT_TYPE, st.sampled_from([BODY, BODY[:-3], b""]) | st.binary(max_size=200))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A service on loopback, in a thread of this process."""
    service = RewardService(rewards(), port=0, token=TOKEN, limits=Limits(clips=2, bytes=1 << 20))
    server = uvicorn.Server(uvicorn.Config(service.app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [service._socket]})
    thread.start()
    yield service.url
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def no_failure_within(ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case) -> None:
    """504 is what an X-Timeout of no time asks for."""
    assert response.status_code < 500 or (response.status_code == 504 and "X-Timeout" in str(case.headers).title())


@SCHEMA.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_service_does_what_its_description_says(address: str, case: schemathesis.Case) -> None:
    case.call_and_validate(
        base_url=address,
        headers=AUTHORISED,
        checks=[
            no_failure_within,
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
            response_headers_conformance,
            unsupported_method,
            ignored_auth,
        ],
    )


def test_the_description_tells_of_body_errors_and_token() -> None:
    operation = SCHEMA.raw_schema["paths"]["/v1/score"]["post"]
    assert operation["requestBody"]["content"][CONTENT_TYPE]["schema"]["format"] == "binary"
    assert set(operation["responses"]) == {"200", *map(str, (400, 401, 408, 409, 413, 415, 422, 429, 503, 504, 507))}
    assert all("Retry-After" in operation["responses"][s]["headers"] for s in ("429", "503", "504"))
    assert operation["security"] == [{"HTTPBearer": []}]
    assert sorted(SCHEMA.raw_schema["paths"]) == ["/health", "/metrics", "/ready", "/v1/rewards", "/v1/score"]
