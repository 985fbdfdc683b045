from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from omninft.config import RewardConfig
from omninft.rewards.registry import build_reward
from omninft.rewards.runner import RewardRunner
from omninft.service import client as client_module
from omninft.service.messages import Limits, parse_message
from omninft.service.reward import RemoteReward
from omninft.types import Clip, Component, OmniNFTError, Prompt
from tests.service.clips import clip, expected

Reply = dict[str, Any]
Behaviour = Callable[["Handler", Reply], None]
SERVED = {
    "format": "omninft.clips/1",
    "version": "0",
    "rewards": [
        {
            "name": "fake",
            "inputs": ["video"],
            "licence": "none",
            "model": None,
            "missing": None,
            "components": [
                {
                    "name": name,
                    "route": route,
                    "description": "for tests",
                    "weight": weight,
                    "range": [None, 1.0],
                    "higher_is_better": better,
                    "unit": "1",
                }
                for name, route, weight, better in (("plain", "video", 2.0, True), ("cost", "joint", 3.0, False))
            ],
        }
    ],
    "limits": {
        "clips": 4,
        "bytes": 1 << 24,
        "header_bytes": 1 << 20,
        "frames": 100,
        "pixels": 1 << 20,
        "channels": 2,
        "seconds": 10.0,
        "prompt_chars": 1000,
        "id_chars": 100,
    },
}


class Fake(ThreadingHTTPServer):
    """A service written here, from the documented replies; `behaviours` are taken in turn, then it is well-behaved."""

    daemon_threads = True
    request_queue_size = 100

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviours: list[Behaviour] = []
        self.always: Behaviour | None = None
        self.served: Any = SERVED
        self.ids: list[str] = []
        self.sizes: list[int] = []
        self.headers: list[Any] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Fake

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.server.headers.append(self.headers)
        self.send(200, json.dumps(self.server.served).encode())

    def do_POST(self) -> None:
        fake = self.server
        clips = parse_message(self.rfile.read(int(self.headers["Content-Length"])), Limits())
        rows = []
        for n, one in enumerate(clips):
            assert isinstance(one, Clip)
            value = expected(one)
            scores: dict[str, float | None] = {"plain": value, "cost": -value}
            if one.prompt.prompt_v == "unscored":
                scores["cost"] = None
            reasons = {name: "as the prompt says" for name, score in scores.items() if score is None}
            rows.append({"clip": n, "scores": scores, "reasons": reasons})
        reply = {
            "request_id": self.headers["X-Request-ID"],
            "components": [
                {"name": "plain", "route": "video", "weight": 2.0},
                {"name": "cost", "route": "joint", "weight": -3.0},
            ],
            "clips": rows,
            "seconds": {"wait": 0.0, "decode": 0.0, "score": 0.0},
        }
        with fake.lock:
            fake.ids.append(reply["request_id"])
            fake.sizes.append(len(clips))
            behaviour = fake.behaviours.pop(0) if fake.behaviours else fake.always
        (behaviour or well)(self, reply)


def well(handler: Handler, reply: Reply) -> None:
    handler.send(200, json.dumps(reply).encode())


def status(code: int, **headers: str) -> Behaviour:
    content = json.dumps({"error": f"for test {code}", "request_id": "x"}).encode()
    return lambda handler, reply: handler.send(code, content, **headers)


def changed(change: Callable[[Reply], Any]) -> Behaviour:
    def behave(handler: Handler, reply: Reply) -> None:
        change(reply)
        well(handler, reply)

    return behave


def truncated(handler: Handler, reply: Reply) -> None:
    handler.send(200, json.dumps(reply).encode()[:-20])


def cut_off(handler: Handler, reply: Reply) -> None:
    content = json.dumps(reply).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[:10])
    handler.close_connection = True


def hung_up(handler: Handler, reply: Reply) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


WRONG: dict[str, tuple[Behaviour, str]] = {
    "500": (status(500), "HTTP 500: for test 500"),
    "502 of a proxy": (lambda h, _: h.send(502, b"<html>bad gateway"), "HTTP 502: <html>bad gateway"),
    "504": (status(504), "HTTP 504"),
    "429 that says no time": (status(429), "HTTP 429"),
    "truncated JSON": (truncated, "the answer is not understood"),
    "cut off": (cut_off, "RemoteProtocolError"),
    "hung up": (hung_up, "(RemoteProtocolError|ReadError|WriteError)"),
    "another request's answer": (
        changed(lambda r: r.update(request_id="0" * 8)),
        "the answer is to request '00000000', expected '",
    ),
    "a row too few": (changed(lambda r: r["clips"].pop()), r"rows for the clips \[0\], expected each of 0 to 1 once"),
    "a row too many": (
        changed(lambda r: r["clips"].append(r["clips"][0] | {"clip": 2})),
        r"rows for the clips \[0, 1, 2\]",
    ),
    "a row twice": (changed(lambda r: r["clips"].__setitem__(1, r["clips"][0])), r"rows for the clips \[0, 0\]"),
    "no rows": (changed(lambda r: r["clips"].clear()), r"rows for the clips \[\]"),
    "NaN": (changed(lambda r: r["clips"][0]["scores"].update(plain=float("nan"))), "not understood"),
    "infinite": (changed(lambda r: r["clips"][0]["scores"].update(plain=float("inf"))), "not understood"),
    "text for a score": (changed(lambda r: r["clips"][0]["scores"].update(plain="0.5")), "not understood"),
    "a score too few": (
        changed(lambda r: r["clips"][0]["scores"].pop("cost")),
        r"clip 0 of the answer has scores for \['plain'\], expected \['cost', 'plain'\]",
    ),
    "another component": (
        changed(lambda r: r["components"][0].update(name="other")),
        r"components other \(video, 2\), cost \(joint, -3\); expected plain",
    ),
    "another sign": (changed(lambda r: r["components"][1].update(weight=3.0)), r"cost \(joint, 3\); expected"),
    "a list": (lambda h, _: h.send(200, b"[]"), "not understood"),
    "nothing": (lambda h, _: h.send(200, b""), "not understood"),
}


@pytest.fixture
def fake(monkeypatch) -> Iterator[Fake]:
    monkeypatch.setattr(client_module, "_BACKOFF", (0.001, 0.002))
    monkeypatch.delenv("OMNINFT_TOKEN", raising=False)
    server = Fake()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def remote(fake: Fake, **options: Any) -> RemoteReward:
    return RemoteReward(fake.url, **{"timeout": 20.0, "retries": 2} | options)


def values(clips: list[Clip]) -> np.ndarray:
    return np.array([[expected(c), -expected(c)] for c in clips])


def test_every_clip_gets_its_own_scores_in_any_order(fake: Fake) -> None:
    fake.always = changed(lambda r: r["clips"].reverse())
    clips = [clip(n) for n in range(11)]
    reward = remote(fake, batch_clips=3, parallel=3)
    table = reward.score(clips)
    np.testing.assert_array_equal(table.values, values(clips))
    assert table.reasons == {}
    assert sorted(fake.sizes) == [2, 3, 3, 3]
    assert len(set(fake.ids)) == 4
    assert table.components == (Component("plain", "video", 2.0), Component("cost", "joint", -3.0))
    assert reward.components[0].range == (-np.inf, 1.0)
    np.testing.assert_array_equal(reward.score(clips[::-1]).values, table.values[::-1])
    assert reward.score([]).values.shape == (0, 2)


def test_missing_scores_stay_missing_with_the_services_reason(fake: Fake) -> None:
    table = remote(fake).score([clip(0), clip(1, "unscored")])
    np.testing.assert_array_equal(table.values, [[expected(clip(0)), -expected(clip(0))], [expected(clip(1)), np.nan]])
    assert table.reasons == {(1, 1): "as the prompt says"}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_is_asked_again_under_the_same_id(fake: Fake, case: str) -> None:
    fake.behaviours = [WRONG[case][0]] * 2
    clips = [clip(0), clip(1)]
    table = remote(fake).score(clips)
    np.testing.assert_array_equal(table.values, values(clips))
    assert len(fake.ids) == 3
    assert len(set(fake.ids)) == 1


@pytest.mark.parametrize("case", WRONG)
def test_answers_that_stay_wrong_leave_the_scores_missing(fake: Fake, case: str) -> None:
    behaviour, message = WRONG[case]
    fake.always = behaviour
    reward = build_reward(RewardConfig(name="remote", options={"url": fake.url, "retries": 2, "timeout": 20}))
    table = RewardRunner([reward]).score([clip(0), clip(1)])
    assert np.isnan(table.values).all()
    assert set(table.reasons) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(why.startswith(f"{fake.url}: ") for why in table.reasons.values())
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(table.reasons[0, 0])
    assert "gave up after 3 tries" in table.reasons[0, 0]
    # Three tries and no more: the runner does not split what it got a table for.
    assert len(fake.ids) == 3


def test_one_dead_request_costs_the_others_nothing(fake: Fake) -> None:
    fake.always = lambda h, r: (
        well(h, r) if r["clips"][0]["scores"]["plain"] < 2 else h.connection.shutdown(socket.SHUT_RDWR)
    )
    clips = [clip(n) for n in range(4)]
    table = remote(fake, batch_clips=2).score(clips)
    np.testing.assert_array_equal(table.values[:2], values(clips[:2]))
    assert np.isnan(table.values[2:]).all()


def test_a_busy_service_is_obeyed_and_is_no_failure(fake: Fake) -> None:
    fake.behaviours = [status(429, Retry_After="0.01"), status(503, Retry_After="0")] * 4
    table = remote(fake, retries=0).score([clip(0)])
    np.testing.assert_array_equal(table.values, values([clip(0)]))
    assert len(fake.ids) == 9
    assert len(set(fake.ids)) == 1


@pytest.mark.parametrize("kind", ["silent", "drips of the head", "drips of the body", "always busy"])
def test_the_deadline_holds_whatever_the_service_does(fake: Fake, kind: str) -> None:
    over = threading.Event()

    def drip(handler: Handler, reply: Reply) -> None:
        if kind == "drips of the body":
            handler.send_response(200)
            handler.send_header("Content-Length", "100000")
            handler.end_headers()
        elif kind == "drips of the head":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not over.wait(0.02):
            if kind != "silent":
                handler.wfile.write(b"x")

    fake.always = status(429, Retry_After="0.05") if kind == "always busy" else drip
    start = time.monotonic()
    table = remote(fake, timeout=0.5, batch_clips=1).score([clip(n) for n in range(5)])
    elapsed = time.monotonic() - start
    over.set()
    assert 0.5 <= elapsed < 2.5
    assert np.isnan(table.values).all()
    assert len(table.reasons) == 10
    assert f"not scored by {fake.url} within 0.5 s" in table.reasons[0, 0]
    assert ("HTTP 429" in table.reasons[0, 0]) == (kind == "always busy")


def test_answers_without_end_are_not_read_to_the_end(fake: Fake, monkeypatch) -> None:
    monkeypatch.setattr(client_module, "_REPLY_BYTES", 1000)
    fake.behaviours = [lambda h, r: h.send(200, b" " * 5000)]
    table = remote(fake, retries=0).score([clip(0)])
    assert "the answer is larger than 1000 bytes" in table.reasons[0, 0]


@pytest.mark.parametrize("code", [401, 403, 404, 409, 307])
def test_a_refusal_is_not_repeated(fake: Fake, code: int) -> None:
    fake.always = status(code)
    table = remote(fake).score([clip(0), clip(1)])
    assert np.isnan(table.values).all()
    assert table.reasons[1, 0] == f"{fake.url}: HTTP {code}: for test {code}"
    assert len(fake.ids) == 1


@pytest.mark.parametrize("code", [413, 422])
def test_a_refused_batch_is_halved_down_to_the_culprit(fake: Fake, code: int) -> None:
    def behave(handler: Handler, reply: Reply) -> None:
        culprit = any(row["scores"]["plain"] >= 2 and row["scores"]["plain"] < 3 for row in reply["clips"])
        (status(code) if culprit else well)(handler, reply)

    fake.always = behave
    clips = [clip(n) for n in range(4)]
    table = remote(fake).score(clips)
    assert np.isnan(table.values[2]).all()
    np.testing.assert_array_equal(table.values[[0, 1, 3]], values(clips)[[0, 1, 3]])
    assert fake.sizes.count(4) == 1
    assert sorted(fake.sizes) == [1, 1, 2, 2, 4]


def test_a_service_without_memory_is_asked_for_less_and_then_ends_the_work(fake: Fake) -> None:
    fake.always = lambda handler, reply: (status(507) if len(reply["clips"]) > 1 else well)(handler, reply)
    clips = [clip(n) for n in range(4)]
    np.testing.assert_array_equal(remote(fake).score(clips).values, values(clips))
    fake.always = status(507)
    with pytest.raises(MemoryError, match="HTTP 507: for test 507"):
        remote(fake).score(clips[:1])


def test_clips_that_no_request_may_hold_are_not_sent(fake: Fake) -> None:
    bad = dataclasses.replace(clip(1), waveform=np.full((1, 10), np.nan, np.float32))
    surrogate = dataclasses.replace(clip(2), prompt=Prompt("p", "\ud800", "", ""))
    clips = [clip(0), bad, surrogate, clip(3, frames=101), clip(4)]
    table = remote(fake).score(clips)
    np.testing.assert_array_equal(table.valid[:, 0], [True, False, False, False, True])
    assert table.reasons[1, 0].startswith("waveform is not finite in 10 of 10 samples")
    assert "expected at most 100 frames" in table.reasons[3, 0]
    assert fake.sizes == [2]


def test_batches_keep_within_the_services_limits(fake: Fake) -> None:
    remote(fake, batch_clips=50).score([clip(n) for n in range(9)])
    assert sorted(fake.sizes) == [1, 4, 4]
    fake.sizes.clear()
    one = clip(0).video.nbytes + clip(0).waveform.nbytes
    room = int(2.5 * one)
    fake.served = SERVED | {"limits": SERVED["limits"] | {"bytes": room * 8 // 7 + 8}}  # type: ignore[operator]
    remote(fake).score([clip(n) for n in range(5)])
    assert sorted(fake.sizes) == [1, 2, 2]


def test_a_clip_that_cannot_be_written_as_media_is_missing_alone(fake: Fake) -> None:
    clips = [clip(0), dataclasses.replace(clip(1), waveform=np.zeros((1, 100), np.float32), sample_rate=12_345)]
    fake.always = lambda h, r: well(h, r)
    table = remote(fake, encoding="media").score(clips[1:])
    assert "as media: sample_rate is 12345 Hz" in table.reasons[0, 0]
    assert fake.sizes == []


def test_it_works_inside_a_running_event_loop(fake: Fake) -> None:
    async def notebook() -> np.ndarray:
        return remote(fake).score([clip(0)]).values

    np.testing.assert_array_equal(asyncio.run(notebook()), values([clip(0)]))


def test_a_recipe_selects_and_weighs_components(fake: Fake) -> None:
    config = RewardConfig(name="remote", weight=10.0, components={"cost": 0.5}, options={"url": fake.url})
    reward = build_reward(config)
    table = RewardRunner([reward]).score([clip(3)])
    assert table.components == (Component("cost", "joint", -5.0),)
    np.testing.assert_array_equal(table.values, [[-expected(clip(3))]])
    assert (reward.inputs, reward.licence, reward.model, reward.missing()) == (("video",), "fake: none", None, None)
    assert reward.device == f"service {fake.url}"


def test_models_of_a_service_are_commercial_only_if_all_are(fake: Fake) -> None:
    card = {"name": "a", "parameters": 3, "licence": "MIT", "commercial": True, "verified": True}
    two = [
        SERVED["rewards"][0] | {"model": card},  # type: ignore[index]
        SERVED["rewards"][0]  # type: ignore[index]
        | {"name": "b", "model": card | {"name": "b", "commercial": False}, "missing": "b: no file", "components": []},
    ]
    fake.served = SERVED | {"rewards": two}
    reward = remote(fake)
    assert reward.model is not None
    assert (reward.model.name, reward.model.parameters, reward.model.commercial) == ("a + b", 6, False)
    assert reward.missing() == f"{fake.url}: b: no file"


def test_nobody_is_asked_before_the_components_are_used(fake: Fake, monkeypatch) -> None:
    monkeypatch.setattr(client_module, "_DESCRIBE_SECONDS", 0.3)
    dead = RemoteReward("http://127.0.0.1:9", timeout=1)
    with pytest.raises(OmniNFTError, match=r"reward service http://127\.0\.0\.1:9: ConnectError: .*, for 0\.3 s"):
        _ = dead.components
    assert "ConnectError" in (dead.missing() or "")
    with pytest.raises(OmniNFTError, match="ConnectError"):
        build_reward(RewardConfig(name="remote", options={"url": "http://127.0.0.1:9"}))
    reward = remote(fake)
    assert fake.headers == []
    assert len(reward.components) == len(reward.components) == 2
    assert len(fake.headers) == 1


@pytest.mark.parametrize(
    ("served", "message"),
    [
        ([], "its /v1/rewards is not understood"),
        (SERVED | {"format": "omninft.clips/9"}, "reads 'omninft.clips/9', this client writes 'omninft.clips/1'"),
        (SERVED | {"limits": {}}, r"limits\.clips"),
        (SERVED | {"rewards": [{"name": "x"}]}, r"rewards\.0\.inputs"),
    ],
)
def test_what_is_no_reward_service_is_refused(fake: Fake, served: Any, message: str) -> None:
    fake.served = served
    with pytest.raises(OmniNFTError, match=message):
        _ = remote(fake).components


def test_the_token_is_sent(fake: Fake, monkeypatch, tmp_path) -> None:
    (tmp_path / "token").write_text("of-the-file\n")
    monkeypatch.setenv("OMNINFT_TOKEN", "of-the-environment")
    monkeypatch.setenv("OTHER", "of-another")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    for options in ({}, {"token_env": "OTHER"}, {"token_file": tmp_path / "token"}, {"token": "given"}):
        _ = remote(fake, **options).components
    found = [headers["Authorization"] for headers in fake.headers]
    assert found == [f"Bearer {t}" for t in ("of-the-environment", "of-another", "of-the-file", "given")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8765"}, "url is '127.0.0.1:8765', expected http://host:port"),
        ({"url": None}, "needs the option url"),
        ({"url": 8765}, "url is 8765"),
        ({"url": "http://"}, "url is 'http://'"),
        ({"encoding": "jpeg"}, "encoding is 'jpeg', expected one of: tensors, media"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": "soon"}, "timeout is 'soon'"),
        ({"retries": -1}, "retries is -1, expected a whole number from 0"),
        ({"batch_clips": 0}, "batch_clips is 0"),
        ({"parallel": 1.5}, "parallel is 1.5"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OmniNFTError, match=message):
        RemoteReward(**{"url": "http://127.0.0.1:1"} | options)
