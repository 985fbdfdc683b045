"""What stands between requests and the rewards: admission, one answer per request id, one thread that scores.

A request is refused at once where it cannot be held, not made to wait without end. What was admitted is scored even if
its client is cut off: the answer is kept for the retry.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from omninft.rewards.registry import WeighedReward
from omninft.rewards.runner import RewardRunner, missing_counts
from omninft.service.messages import Limits, MediaClip, MessageError, parse_message
from omninft.service.replies import ClipScores, ScoredComponent, ScoreReply, Timings
from omninft.types import Clip, OmniNFTError, ScoreTable

_REASON_CHARS = 1000
_RETRY_AFTER = (1, 60)  # seconds, least and most
_HELD_REQUESTS = 4  # requests of the largest size that fit into memory while they wait


class RequestRefused(Exception):
    """A request that gets no scores: HTTP status, what to tell, and after how many seconds to come again."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


@dataclass
class Counts:
    """What /metrics tells, since the start."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # by path and status
    clips: int = 0
    missing: Counter[str] = field(default_factory=Counter)  # missing scores by component
    repeated: int = 0  # requests answered from what another with the same id had begun
    seconds: Counter[str] = field(default_factory=Counter)  # by stage: wait, decode, score


@dataclass
class _Answer:
    """The one answer of a request id, still in the making or kept."""

    digest: bytes
    expires: float  # monotonic seconds until which somebody waits for it
    task: asyncio.Task[bytes]
    since: float


class Share:
    """The part of the memory for waiting requests that one request holds."""

    def __init__(self, queue: ScoringQueue) -> None:
        self._queue = queue
        self.num_bytes = 0

    def grow_to(self, num_bytes: int) -> None:
        """Raises RequestRefused when there is no room."""
        more = max(0, num_bytes - self.num_bytes)
        if self._queue.held_bytes + more > self._queue.most_bytes:
            raise RequestRefused(429, "the memory for waiting requests is full", self._queue.retry_after())
        self._queue.held_bytes += more
        self.num_bytes += more

    def release(self) -> None:
        self._queue.held_bytes -= self.num_bytes
        self.num_bytes = 0

    def hand_over(self) -> Share:
        """A share that holds what this one held; this one holds nothing from then on."""
        other = Share(self._queue)
        other.num_bytes, self.num_bytes = self.num_bytes, 0
        return other


@dataclass
class Upload:
    """A body as it came, and the memory it holds; `body` is dropped once it is read."""

    body: bytes
    digest: bytes
    share: Share


class ScoringQueue:
    """Scores requests in the order of their admission.

    At most `most_clips` clips wait or are being scored. One batch is scored while the next is decoded. Answers are
    kept for `keep_seconds`, the latest `keep` of them.
    """

    def __init__(
        self,
        rewards: Sequence[WeighedReward],
        limits: Limits,
        most_clips: int = 128,
        keep: int = 1024,
        keep_seconds: float = 900.0,
    ) -> None:
        if most_clips < limits.clips:
            raise OmniNFTError(
                f"the queue holds {most_clips} clips, expected at least the {limits.clips} that one request may have"
            )
        self.rewards, self.limits, self.most_clips = tuple(rewards), limits, most_clips
        self.most_bytes = _HELD_REQUESTS * limits.bytes
        self.runner = RewardRunner(rewards, max_missing_share=1.0)
        self.counts = Counts()
        self.clips = 0  # waiting or being scored
        self.held_bytes = 0
        self.closing = False
        self._closing_since = 0.0
        self._keep, self._keep_seconds = keep, keep_seconds
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        self._turns = asyncio.Semaphore(2)
        self._parsers = ThreadPoolExecutor(2, thread_name_prefix="parse")
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")

    def share(self) -> Share:
        return Share(self)

    def refuse_if_full(self, num_clips: int = 1) -> None:
        """Raises RequestRefused: shutting down, or no room for so many clips more."""
        if self.closing:
            raise RequestRefused(503, "the service is shutting down", _RETRY_AFTER[0])
        if self.clips + num_clips > self.most_clips:
            message = f"the queue is full: {self.clips} clips wait, at most {self.most_clips} may"
            raise RequestRefused(429, message, self.retry_after())

    def retry_after(self) -> int:
        """Whole seconds after which half of what waits now should be scored."""
        per_clip = self.counts.seconds["score"] / self.counts.clips if self.counts.clips else 1.0
        least, most = _RETRY_AFTER
        return min(max(math.ceil(self.clips * per_clip / 2), least), most)

    async def answer(self, request_id: str, upload: Upload, timeout: float) -> bytes:
        """The reply to a request, as JSON.

        The same id with the same digest joins the work that is under way, or gets the kept answer. Work that begins
        takes over the upload's memory.

        Raises:
            RequestRefused: 409 the id was used with another body, 422 no valid message, 429 full, 503 shutting down,
                504 not done within `timeout` seconds (the work goes on, and its answer is kept), 507 a judge ran out of
                memory.
        """
        expires = time.monotonic() + timeout
        answer = self._known(request_id, upload.digest)
        if answer is None:
            loop = asyncio.get_running_loop()
            try:
                clips = await loop.run_in_executor(self._parsers, parse_message, upload.body, self.limits)
            except MessageError as error:
                raise RequestRefused(422, str(error)) from error
            # Another request with this id may have come in the meantime.
            answer = self._known(request_id, upload.digest)
            if answer is None:
                answer = self._begin(request_id, upload, clips, expires)
            del clips
        upload.body = b""
        upload.share.release()
        answer.expires = max(answer.expires, expires)
        done, _ = await asyncio.wait([answer.task], timeout=expires - time.monotonic())
        if not done:
            message = f"not scored within {timeout:g} s; ask again with the same X-Request-ID"
            raise RequestRefused(504, message, self.retry_after())
        if answer.task.cancelled():
            raise RequestRefused(503, "the service is shutting down", _RETRY_AFTER[0])
        return answer.task.result()

    def stop_admitting(self) -> None:
        """Refuse new requests from now on; may be called from a signal handler."""
        if not self.closing:
            self.closing, self._closing_since = True, time.monotonic()

    async def close(self, grace: float = 0.0) -> int:
        """Finish what is admitted within `grace` seconds of `stop_admitting`; the clips that were left undone."""
        self.stop_admitting()
        tasks = [a.task for a in self._answers.values() if not a.task.done()]
        if tasks:
            await asyncio.wait(tasks, timeout=max(0.0, self._closing_since + grace - time.monotonic()))
        undone = self.clips
        for task in tasks:
            task.cancel()
        self._parsers.shutdown(wait=False, cancel_futures=True)
        self._decoder.shutdown(wait=False, cancel_futures=True)
        return undone

    def _known(self, request_id: str, digest: bytes) -> _Answer | None:
        answer = self._answers.get(request_id)
        if answer is None:
            return None
        if answer.digest != digest:
            raise RequestRefused(409, f"request id {request_id} was used before, with another body")
        self.counts.repeated += 1
        return answer

    def _begin(self, request_id: str, upload: Upload, clips: list[Clip | MediaClip], expires: float) -> _Answer:
        self.refuse_if_full(len(clips))
        self.clips += len(clips)
        now = time.monotonic()
        task = asyncio.get_running_loop().create_task(self._work(request_id, clips, upload.share.hand_over()))
        answer = self._answers[request_id] = _Answer(upload.digest, expires, task, now)

        def settle(task: asyncio.Task[bytes]) -> None:
            # Only scores are kept; after anything else a retry starts anew.
            if (task.cancelled() or task.exception() is not None) and self._answers.get(request_id) is answer:
                del self._answers[request_id]

        task.add_done_callback(settle)
        for old in [i for i, a in self._answers.items() if a.task.done() and now - a.since > self._keep_seconds]:
            del self._answers[old]
        kept = [i for i, a in self._answers.items() if a.task.done()]
        for old in kept[: max(0, len(self._answers) - self._keep)]:
            del self._answers[old]
        return answer

    async def _work(self, request_id: str, clips: list[Clip | MediaClip], share: Share) -> bytes:
        loop, start = asyncio.get_running_loop(), time.monotonic()
        try:
            async with self._turns:
                turn = time.monotonic()
                if turn > self._answers[request_id].expires:
                    raise RequestRefused(504, "nobody waits for this request any more")
                decoded = await loop.run_in_executor(self._decoder, _decode_all, clips, self.limits.bytes)
                ready = time.monotonic()
                good = [clip for clip in decoded if isinstance(clip, Clip)]
                try:
                    table = await asyncio.wrap_future(self.runner.submit(good))
                except OmniNFTError as error:  # a judge ran out of memory
                    raise RequestRefused(507, str(error)) from error
                seconds = Timings(wait=turn - start, decode=ready - turn, score=time.monotonic() - ready)
        finally:
            self.clips -= len(clips)
            share.release()
        table = _with_failures(table, decoded)
        self._count(table, seconds)
        return _reply(request_id, table, seconds).model_dump_json().encode()

    def _count(self, table: ScoreTable, seconds: Timings) -> None:
        self.counts.clips += len(table.values)
        self.counts.missing.update(missing_counts(table))
        for stage, value in seconds.model_dump().items():
            self.counts.seconds[stage] += value


def metrics_text(queue: ScoringQueue) -> str:
    """The counts in the text format of Prometheus, version 0.0.4."""
    counts = queue.counts
    requests = [(f'{{path="{path}",status="{status}"}}', n) for (path, status), n in sorted(counts.requests.items())]
    names = [component.name for component in queue.runner.components]
    missing = [(f'{{component="{_escaped(name)}"}}', counts.missing[name]) for name in names]
    seconds = [(f'{{stage="{stage}"}}', counts.seconds[stage]) for stage in Timings.model_fields]
    families = [
        ("omninft_requests_total", "counter", "Requests answered.", requests),
        (
            "omninft_requests_repeated_total",
            "counter",
            "Requests that joined or got an earlier one's answer.",
            [("", counts.repeated)],
        ),
        ("omninft_clips_scored_total", "counter", "Clips scored, missing scores included.", [("", counts.clips)]),
        ("omninft_scores_missing_total", "counter", "Scores that could not be computed.", missing),
        ("omninft_seconds_total", "counter", "Seconds requests spent in each stage, summed.", seconds),
        ("omninft_queue_clips", "gauge", "Clips waiting or being scored.", [("", queue.clips)]),
        ("omninft_queue_bytes", "gauge", "Bytes of the requests held.", [("", queue.held_bytes)]),
    ]
    lines: list[str] = []
    for name, kind, text, samples in families:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{labels} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _decode_all(clips: list[Clip | MediaClip], most_bytes: int) -> list[Clip | OmniNFTError]:
    """A file that cannot be decoded costs no other clip its scores. All together take at most `most_bytes`."""
    decoded: list[Clip | OmniNFTError] = []
    for item in clips:
        try:
            clip = item.decode(most_bytes) if isinstance(item, MediaClip) else item
        except OmniNFTError as error:
            decoded.append(error)
        else:
            most_bytes -= clip.video.nbytes + clip.waveform.nbytes
            decoded.append(clip)
    return decoded


def _with_failures(table: ScoreTable, decoded: list[Clip | OmniNFTError]) -> ScoreTable:
    """The scores of the clips that were decoded, in their places among those that were not."""
    places = [b for b, clip in enumerate(decoded) if isinstance(clip, Clip)]
    columns = range(len(table.components))
    values = np.full((len(decoded), len(columns)), np.nan)
    values[places] = table.values
    reasons = {(places[b], k): why for (b, k), why in table.reasons.items()}
    for b, clip in enumerate(decoded):
        if isinstance(clip, OmniNFTError):
            reasons |= {(b, k): str(clip) for k in columns}
    return ScoreTable(table.components, values, reasons)


def _reply(request_id: str, table: ScoreTable, seconds: Timings) -> ScoreReply:
    rows = []
    for b, row in enumerate(table.values):
        pairs = list(zip(table.names, row.tolist(), strict=True))
        reasons = {
            name: table.reasons.get((b, k), "missing without a reason")[:_REASON_CHARS]
            for k, (name, value) in enumerate(pairs)
            if not math.isfinite(value)
        }
        rows.append(ClipScores(clip=b, scores={n: v if math.isfinite(v) else None for n, v in pairs}, reasons=reasons))
    components = [ScoredComponent(name=c.name, route=c.route, weight=c.weight) for c in table.components]
    return ScoreReply(request_id=request_id, components=components, clips=rows, seconds=seconds)


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
