"""`omninft serve`: rewards behind HTTP.

POST /v1/score takes clips (see messages.py) and answers their scores, GET /v1/rewards says what is served; /health,
/ready and /metrics are for those who run it. Clips come in the body and never as paths. Every error is
`{"error", "request_id"}`. It speaks plain HTTP: beyond a trusted network, put a proxy that speaks TLS before it. Needs
the extra "serve" (fastapi, uvicorn).
"""

# FastAPI reads the annotations of its end points while they are defined: they are not postponed in this file.
import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import logging
import math
import os
import signal
import socket
import sys
import uuid
from collections.abc import Generator, Sequence
from types import FrameType
from typing import Annotated, Any

from omninft.rewards.registry import WeighedReward
from omninft.service.messages import CONTENT_TYPE, LONGEST_TIMEOUT, Limits
from omninft.service.queue import RequestRefused, ScoringQueue, Share, Upload, metrics_text
from omninft.service.replies import ErrorReply, RewardsReply, ScoreReply, StateReply, describe
from omninft.service.token import TOKEN_VARIABLE
from omninft.types import OmniNFTError

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Header, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
    from starlette.datastructures import MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as missing:
    raise OmniNFTError(
        f"omninft serve needs {missing.name}; install the extra: pip install 'omninft[serve]'"
    ) from missing

_LOG = logging.getLogger(__name__)
_IDLE_SECONDS = 60.0  # of a body that stops coming
_PARTING_SECONDS = 5
_UUID = "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"
_PATHS = ("/v1/score", "/v1/rewards", "/health", "/ready", "/metrics", "/openapi.json")
_BINARY = {"schema": {"type": "string", "format": "binary", "contentMediaType": CONTENT_TYPE}}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
_ERRORS: dict[int, str] = {
    400: "The body did not arrive whole.",
    401: "No token, or a wrong one.",
    408: "The body stopped coming.",
    409: "The request id was used before, with another body.",
    413: "The body is larger than the service accepts.",
    415: f"The body is not {CONTENT_TYPE}.",
    422: "A header or the body is not valid; `error` names field, found and expected.",
    429: "The queue is full; come again after `Retry-After` seconds.",
    503: "The service is shutting down.",
    504: "Not scored in time; asked again with the same id, the work is not begun anew.",
    507: "A judge ran out of memory on these clips.",
}
_BUSY = (429, 503, 504)


def create_app(queue: ScoringQueue, token: str | None = None, timeout: float = 600.0) -> FastAPI:
    """The ASGI application; `timeout`: seconds after which a request is answered 504."""
    from omninft import __version__

    app = FastAPI(
        title="omninft reward service",
        version=__version__,
        description="Scores of video clips with sound. A score that could not be computed is null and has a reason.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(_Frame, queue=queue)
    _answer_errors(app)
    scheme = HTTPBearer(auto_error=False, description=f"The token of --token-file or ${TOKEN_VARIABLE}.")

    async def authorised(given: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)]) -> None:
        if token is None:
            return
        if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
            raise RequestRefused(401, "no token" if given is None else "wrong token")

    guarded: dict[str, Any] = {"dependencies": [Depends(authorised)]} if token is not None else {}

    @app.post(
        "/v1/score",
        summary="Score clips",
        response_model=ScoreReply,
        responses=_error_replies(400, 401, 408, 409, 413, 415, 422, 429, 503, 504, 507),
        openapi_extra={"requestBody": {"required": True, "content": {CONTENT_TYPE: _BINARY}}},
        **guarded,
    )
    async def score(
        request: Request,
        x_request_id: Annotated[
            str | None, Header(pattern=_UUID, description="A UUID; the same again gets the same answer.")
        ] = None,
        x_timeout: Annotated[
            float | None, Header(gt=0, le=LONGEST_TIMEOUT, allow_inf_nan=False, description="Seconds the client waits.")
        ] = None,
    ) -> Response:
        upload = await _upload(request, queue)
        try:
            seconds = timeout if x_timeout is None else min(timeout, x_timeout)
            request_id: str = request.scope["omninft_request_id"]
            reply = await queue.answer(request_id, upload, seconds)
        finally:
            upload.share.release()
        return Response(reply, media_type="application/json")

    @app.get("/v1/rewards", summary="What is served", responses=_error_replies(401), **guarded)
    async def rewards() -> RewardsReply:
        return await asyncio.to_thread(describe, queue.rewards, queue.limits, __version__)

    _add_probes(app, queue)

    @app.get(
        "/metrics",
        summary="Counts for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_error_replies(401)},
        **guarded,
    )
    async def metrics() -> Response:
        return Response(metrics_text(queue), headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    return app


def _add_probes(app: FastAPI, queue: ScoringQueue) -> None:
    """What a supervisor asks; needs no token."""

    @app.get("/health", summary="The process answers")
    async def health() -> StateReply:
        return StateReply(status="ok")

    @app.get("/ready", summary="Requests are taken and nothing is missing", responses=_error_replies(503))
    async def ready() -> StateReply:
        if queue.closing:
            raise RequestRefused(503, "the service is shutting down", 1)
        missing = [m for m in await asyncio.to_thread(lambda: [r.missing() for r in queue.rewards]) if m is not None]
        if missing:
            raise RequestRefused(503, "; ".join(missing), 60)
        return StateReply(status="ready")


async def _upload(request: Request, queue: ScoringQueue) -> Upload:
    """Read the body; what is refused is refused before it takes memory.

    Raises RequestRefused: 400, 408, 413, 415, 429, 503.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != CONTENT_TYPE:
        raise RequestRefused(415, f"Content-Type is {kind[:100] or 'missing'!r}, expected {CONTENT_TYPE}")
    declared, most = request.headers.get("content-length"), queue.limits.bytes
    if declared is not None and (not declared.isdecimal() or len(declared) > 18 or int(declared) > most):
        raise RequestRefused(413, f"the body has {declared[:30]} bytes, expected at most {most}")
    queue.refuse_if_full()
    share = queue.share()
    try:
        share.grow_to(int(declared or 0))
        chunks, digest = await _chunks(request, share, most)
        return Upload(b"".join(chunks), digest, share)
    except BaseException:
        share.release()
        raise


async def _chunks(request: Request, share: Share, most: int) -> tuple[list[bytes], bytes]:
    """The pieces of the body, and the digest of the whole."""
    chunks: list[bytes] = []
    size, digest, stream = 0, hashlib.sha256(), request.stream()
    while True:
        try:
            async with asyncio.timeout(_IDLE_SECONDS):
                chunk = await anext(stream, None)
        except TimeoutError as error:
            raise RequestRefused(408, f"no byte of the body came for {_IDLE_SECONDS:g} s") from error
        except ClientDisconnect as error:
            raise RequestRefused(400, f"the connection ended after {size} bytes of the body") from error
        if chunk is None:
            return chunks, digest.digest()
        size += len(chunk)
        if size > most:
            raise RequestRefused(413, f"the body has more than {most} bytes, expected at most {most}")
        share.grow_to(size)
        digest.update(chunk)
        chunks.append(chunk)


class _Frame:
    """Around every request: its id, which goes out with every answer, the count by status, the last resort."""

    def __init__(self, app: ASGIApp, queue: ScoringQueue) -> None:
        self.app, self.counts = app, queue.counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in _PATHS else "other"
        request_id = _request_id(scope)
        scope["omninft_request_id"] = request_id
        begun = False

        async def framed(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
                self.counts.requests[path, message["status"]] += 1
            await send(message)

        try:
            await self.app(scope, receive, framed)
        except Exception as error:
            _LOG.exception("request %s failed", request_id)
            if begun:
                raise
            message = f"internal error ({type(error).__name__}); the service's log has the rest"
            await _error(scope, 500, message)(scope, receive, framed)


def _request_id(scope: Scope) -> str:
    """The client's, in canonical form, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            with contextlib.suppress(ValueError):
                return str(uuid.UUID(value.decode("latin-1")))
    return str(uuid.uuid4())


def _error(scope: Scope, status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    content = ErrorReply(error=message, request_id=scope["omninft_request_id"]).model_dump()
    return JSONResponse(content, status, headers)


def _answer_errors(app: FastAPI) -> None:
    """One form for all errors, those of the framework included."""

    def reply(request: Request, status: int, message: str, headers: dict[str, str] | None = None) -> Response:
        return _error(request.scope, status, message, headers)

    @app.exception_handler(RequestRefused)
    async def refused(request: Request, error: RequestRefused) -> Response:
        headers = {"Retry-After": str(error.retry_after or 1)} if error.status in _BUSY else {}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return reply(request, error.status, error.message, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = " ".join(str(part) for part in first["loc"])
        return reply(request, 422, f"{place} is {ascii(first.get('input'))[:100]}, expected: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> Response:
        return reply(request, error.status_code, str(error.detail), dict(error.headers or {}))


def _error_replies(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Their OpenAPI descriptions."""
    return {
        status: {
            "model": ErrorReply,
            "description": _ERRORS[status],
            **({"headers": _RETRY_AFTER} if status in _BUSY else {}),
        }
        for status in statuses
    }


class _Server(uvicorn.Server):
    """Ends with the process' own exit status after SIGTERM, where uvicorn would raise the signal again."""

    def __init__(self, config: uvicorn.Config, queue: ScoringQueue, grace: float) -> None:
        super().__init__(config)
        self._queue, self._grace = queue, grace
        self.undone = 0  # clips

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._queue.stop_admitting()  # connections that stay open bring nothing new
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(self._queue.close(self._grace))
        await super().shutdown(sockets)
        self.undone = await closing


class RewardService:
    """A service that is bound to its address; `run` serves until SIGTERM or SIGINT.

    Without a token only a loopback address is allowed. `port` 0 takes a free one. After the signal no request is
    taken, and what was admitted is finished within `grace` seconds.

    Raises:
        OmniNFTError: another address without a token, a port that is taken, a host that is none.
    """

    def __init__(
        self,
        rewards: Sequence[WeighedReward],
        host: str = "127.0.0.1",
        port: int = 8765,
        token: str | None = None,
        limits: Limits | None = None,
        queue_clips: int = 128,
        timeout: float = 600.0,
        grace: float = 30.0,
    ) -> None:
        if token is None and not _is_loopback(host):
            raise OmniNFTError(
                f"--host is {host}, which others can reach, and there is no token: give --token-file or "
                f"${TOKEN_VARIABLE}, or serve on 127.0.0.1"
            )
        self.queue = ScoringQueue(rewards, limits or Limits(), queue_clips)
        self.grace = grace
        self.app = create_app(self.queue, token, timeout)
        self._socket = _bound(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"

    def run(self) -> None:
        """Ends the process at once where a reward still computes after the grace time: threads cannot be stopped."""
        config = uvicorn.Config(
            self.app,
            log_level="warning",
            access_log=False,
            # The queue keeps the grace time; what is left after it are answers on their way.
            timeout_graceful_shutdown=math.ceil(self.grace) + _PARTING_SECONDS,
            server_header=False,
            lifespan="off",
            ws="none",
        )
        server = _Server(config, self.queue, self.grace)
        server.run(sockets=[self._socket])
        if server.undone:
            _LOG.error("stopped with %d clips not scored after the grace time of %g s", server.undone, self.grace)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        self.queue.runner.close()


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OmniNFTError(
            f"cannot serve on {host} port {port}: {error.strerror or error}; is another one running?"
        ) from error
