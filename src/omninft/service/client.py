"""The client of a reward service: every clip comes back with its scores, or without them and with the reason.

One deadline bounds a whole call. A request that failed is sent again under the same id, so the service does no work
twice; a service that is restarted meanwhile is waited for. Needs the extra "serve" (httpx).
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from omninft.service.messages import (
    CONTENT_TYPE,
    FORMAT,
    LONGEST_TIMEOUT,
    Encoding,
    Limits,
    pack_message,
    require_within,
)
from omninft.service.replies import ErrorReply, RewardsReply, ScoreReply
from omninft.types import Clip, Component, OmniNFTError, ScoreTable

try:
    import httpx
except ImportError as missing:
    raise OmniNFTError(
        f"reward 'remote' needs {missing.name}; install the extra: pip install 'omninft[serve]'"
    ) from missing

_LOG = logging.getLogger(__name__)
_BACKOFF = (0.25, 15.0)  # seconds before the second try and the longest, doubling
_CONNECT_SECONDS = 10.0
_DESCRIBE_SECONDS = 15.0  # a service that is being started is waited for that long
_PIECE = 1 << 20  # bytes of a body sent at a time
_REPLY_BYTES = 64 << 20
_BUSY = (429, 503)
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_NO_MEMORY = 507
_TOO_MUCH = (413, 422, _NO_MEMORY)  # said of a whole batch for what one clip may have
# A peer that vanished without a word is noticed by the system: idle 20 s, then 3 probes 5 s apart.
_KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), seconds)
    for name, seconds in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
]

Result = TypeVar("Result")


class _Failed(Exception):
    """A try that may succeed when it is repeated; `wait` seconds are asked for by a service that is merely busy."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Refused(Exception):
    """An answer that will be the same again."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class _Batch:
    """Clips of one request, and their places in the call."""

    places: list[int]
    clips: list[Clip]

    def halves(self) -> tuple[_Batch, _Batch]:
        middle = len(self.places) // 2
        return (
            _Batch(self.places[:middle], self.clips[:middle]),
            _Batch(self.places[middle:], self.clips[middle:]),
        )


class ServiceClient:
    """Talks to one service. `timeout`: seconds for a whole call of `score`; `retries`: failed tries of one request.

    An answer "busy, come again" is no failed try: it is obeyed until the deadline. At most `parallel` requests of at
    most `batch_clips` clips are under way. Threads may share a client.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout: float = 600.0,
        retries: int = 10,
        batch_clips: int = 8,
        parallel: int = 2,
        encoding: Encoding = "tensors",
    ) -> None:
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self.batch_clips, self.parallel, self.encoding = batch_clips, parallel, encoding
        self._headers = {"Authorization": f"Bearer {token}"} if token is not None else {}

    def describe(self) -> RewardsReply:
        """What the service serves.

        Raises:
            OmniNFTError: it cannot be reached, refuses the token, or is no reward service of this format.
        """
        return _run(self._describe())

    def score(self, clips: Sequence[Clip], components: tuple[Component, ...], limits: Limits) -> ScoreTable:
        """[len(clips), len(components)]; missing where network or service failed.

        Raises:
            MemoryError: a judge of the service ran out of memory on one clip.
        """
        return _run(self._score(list(clips), components, limits))

    def _http(self) -> httpx.AsyncClient:
        """With a transport of its own httpx ignores proxies of the environment: clips and token go straight there."""
        return httpx.AsyncClient(
            # Reading the certificates takes longer than a small request: only where they are used.
            transport=httpx.AsyncHTTPTransport(verify=self.url.startswith("https:"), socket_options=_KEEPALIVE),
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),  # the deadline bounds the rest
            headers=self._headers,
        )

    async def _describe(self) -> RewardsReply:
        last = "no answer"
        try:
            async with asyncio.timeout(_DESCRIBE_SECONDS), self._http() as http:
                for wait in _waits():
                    try:
                        content = await _exchange(http, "GET", f"{self.url}/v1/rewards")
                        break
                    except _Failed as error:
                        last = str(error)
                    await asyncio.sleep(wait)
        except TimeoutError as error:
            raise OmniNFTError(f"reward service {self.url}: {last}, for {_DESCRIBE_SECONDS:g} s") from error
        except _Refused as error:
            raise OmniNFTError(f"reward service {self.url}: {error}") from error
        try:
            reply = RewardsReply.model_validate_json(content)
        except ValidationError as error:
            raise OmniNFTError(
                f"reward service {self.url}: its /v1/rewards is not understood: {_first(error)}"
            ) from error
        if reply.format != FORMAT:
            raise OmniNFTError(f"reward service {self.url} reads {reply.format!r}, this client writes {FORMAT!r}")
        return reply

    async def _score(self, clips: list[Clip], components: tuple[Component, ...], limits: Limits) -> ScoreTable:
        values = np.full((len(clips), len(components)), np.nan)
        reasons: dict[int, str] = {}  # clip -> why all of it is missing
        parts: dict[tuple[int, int], str] = {}  # (clip, component) -> why, as the service says
        deadline = asyncio.get_running_loop().time() + self.timeout
        gate = asyncio.Semaphore(self.parallel)

        async def deliver(http: httpx.AsyncClient, batch: _Batch) -> None:
            last = ["no answer"]
            try:
                async with asyncio.timeout_at(deadline):
                    async with gate:
                        reply = await self._request(http, batch, components, deadline, last)
            except TimeoutError:
                why = f"not scored by {self.url} within {self.timeout:g} s ({last[0]})"
                reasons.update(dict.fromkeys(batch.places, why))
            except (_Refused, OmniNFTError) as error:
                if len(batch.clips) > 1 and (isinstance(error, OmniNFTError) or error.status in _TOO_MUCH):
                    await asyncio.gather(*(deliver(http, half) for half in batch.halves()))
                elif isinstance(error, _Refused) and error.status == _NO_MEMORY:
                    raise MemoryError(f"{self.url}: {error}") from error  # the next clip would fare no better
                else:
                    reasons.update(dict.fromkeys(batch.places, f"{self.url}: {error}"))
            except _Failed as error:
                why = f"{self.url}: {error} (gave up after {self.retries + 1} tries)"
                reasons.update(dict.fromkeys(batch.places, why))
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - one request must not cost the others their scores
                _LOG.exception("request to %s failed", self.url)
                reasons.update(dict.fromkeys(batch.places, f"{self.url}: {type(error).__name__}: {error}"))
            else:
                _fill(values, parts, batch.places, reply, components)

        async with self._http() as http:
            batches = _batches(clips, limits, self.batch_clips, reasons)
            await asyncio.gather(*(deliver(http, batch) for batch in batches))
        if reasons:
            _LOG.warning(
                "%d of %d clips not scored by %s: %s", len(reasons), len(clips), self.url, next(iter(reasons.values()))
            )
        missing = {(b, k): why for b, why in reasons.items() for k in range(len(components))}
        return ScoreTable(components, values, parts | missing)

    async def _request(
        self,
        http: httpx.AsyncClient,
        batch: _Batch,
        components: tuple[Component, ...],
        deadline: float,
        last: list[str],
    ) -> ScoreReply:
        """The checked reply; `last` holds the last failure, for the message should the deadline pass.

        Raises _Failed when the tries are used up, _Refused, OmniNFTError for clips that cannot be packed.
        """
        body = await asyncio.to_thread(pack_message, batch.clips, self.encoding)
        request_id = str(uuid.uuid4())
        loop = asyncio.get_running_loop()
        failures, waits = 0, _waits()
        while True:
            headers = {
                "Content-Type": CONTENT_TYPE,
                "Content-Length": str(len(body)),
                "X-Request-ID": request_id,
                "X-Timeout": f"{min(max(deadline - loop.time(), 0.001), LONGEST_TIMEOUT):.3f}",
            }
            try:
                content = await _exchange(http, "POST", f"{self.url}/v1/score", headers, body)
                return _checked(content, request_id, len(batch.clips), components)
            except _Failed as error:
                last[0] = str(error)
                if error.wait is None:
                    failures += 1
                    if failures > self.retries:
                        raise
                    pause = next(waits)
                else:
                    # Clients that were sent away together must not come back together.
                    pause = error.wait * random.uniform(1.0, 1.5)
                _LOG.debug("request %s: %s; again in %.1f s", request_id, error, pause)
                await asyncio.sleep(pause)


async def _exchange(
    http: httpx.AsyncClient, method: str, url: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> bytes:
    """The content of a 200 answer.

    Raises _Failed for what may pass, _Refused for what will not.
    """
    try:
        content = None if body is None else _pieces(body)
        async with http.stream(method, url, headers=headers, content=content) as response:
            received = bytearray()
            async for piece in response.aiter_bytes():
                received += piece
                if len(received) > _REPLY_BYTES:
                    raise _Failed(f"the answer is larger than {_REPLY_BYTES} bytes")
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise _Refused(0, f"not an address: {error}") from error
    except httpx.HTTPError as error:
        raise _Failed(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
    if response.status_code == 200:
        return bytes(received)
    reason = f"HTTP {response.status_code}: {_message(bytes(received))}"
    if response.status_code not in _PASSING:
        raise _Refused(response.status_code, reason)
    raise _Failed(reason, _retry_after(response) if response.status_code in _BUSY else None)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _PIECE):
        yield body[start : start + _PIECE]


def _message(content: bytes) -> str:
    try:
        return ErrorReply.model_validate_json(content).error[:500]
    except ValidationError:
        return content[:200].decode("utf-8", "replace")


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds, at least a tenth; None where the header is absent or no number: then it counts as a failed try."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return max(seconds, 0.1) if math.isfinite(seconds) else None


def _checked(content: bytes, request_id: str, num_clips: int, components: tuple[Component, ...]) -> ScoreReply:
    """Raises _Failed where the answer is not, in every respect, one to this request."""
    try:
        reply = ScoreReply.model_validate_json(content)
    except ValidationError as error:
        raise _Failed(f"the answer is not understood: {_first(error)}") from error
    if reply.request_id != request_id:
        raise _Failed(f"the answer is to request {reply.request_id[:60]!r}, expected {request_id!r}")
    found = tuple(column.component for column in reply.components)
    if found != components:
        raise _Failed(f"the answer has the components {_listed(found)}; expected {_listed(components)}")
    rows = sorted(row.clip for row in reply.clips)
    if rows != list(range(num_clips)):
        raise _Failed(f"the answer has rows for the clips {rows[:40]}, expected each of 0 to {num_clips - 1} once")
    names = {component.name for component in components}
    for row in reply.clips:
        if set(row.scores) != names:
            raise _Failed(
                f"clip {row.clip} of the answer has scores for {sorted(row.scores)}, expected {sorted(names)}"
            )
    return reply


def _listed(components: Sequence[Component]) -> str:
    return ", ".join(f"{c.name} ({c.route}, {c.weight:g})" for c in components)


def _fill(
    values: np.ndarray,
    reasons: dict[tuple[int, int], str],
    places: list[int],
    reply: ScoreReply,
    components: tuple[Component, ...],
) -> None:
    """Put the rows where their clips are, in whatever order they came."""
    for row in reply.clips:
        b = places[row.clip]
        for k, component in enumerate(components):
            score = row.scores[component.name]
            if score is None:
                reasons[b, k] = row.reasons.get(component.name, "missing without a reason")
            else:
                values[b, k] = score


def _batches(clips: list[Clip], limits: Limits, most_clips: int, reasons: dict[int, str]) -> list[_Batch]:
    """Batches within the service's limits, in order; clips that no request may hold are missing with the reason."""
    most = min(most_clips, limits.clips)
    room = limits.bytes - min(limits.header_bytes, limits.bytes // 8)
    batches: list[_Batch] = []
    size = 0
    for b, clip in enumerate(clips):
        try:
            require_within(clip, limits)
        except OmniNFTError as error:
            reasons[b] = str(error)
            continue
        num_bytes = clip.video.nbytes + clip.waveform.nbytes
        if not batches or len(batches[-1].places) >= most or size + num_bytes > room:
            batches.append(_Batch([], []))
            size = 0
        batches[-1].places.append(b)
        batches[-1].clips.append(clip)
        size += num_bytes
    return batches


def _waits() -> Iterator[float]:
    """Seconds to wait before each further try, without end: doubling, each shortened at random by up to a half."""
    first, longest = _BACKOFF
    n = 0
    while True:
        yield min(first * 2 ** min(n, 30), longest) * random.uniform(0.5, 1.0)
        n += 1


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "JSON"
    return f"{place}: {first['msg']}"


def _run(work: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine from code that may itself be called inside a running event loop (notebooks are)."""
    result: Future[Result] = Future()
    started: Future[Callable[[], object]] = Future()

    async def main() -> Result:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        started.set_result(lambda: loop.call_soon_threadsafe(task.cancel))
        return await work

    def target() -> None:
        try:
            result.set_result(asyncio.run(main()))
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            result.set_exception(error)

    threading.Thread(target=target, name="reward-service", daemon=True).start()
    try:
        return result.result()
    except KeyboardInterrupt:
        started.result()()
        raise
