"""Clips prepared and decoded by several threads, in chunks that fit the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from omninft.types import Clip, OmniNFTError

VIDEO_ENDINGS = (".mp4", ".webm", ".mov", ".mkv", ".m4v", ".avi")
CHUNK_CLIPS = 32  # scored together
CHUNK_BYTES = 2**30  # of decoded frames held at a time

Item = TypeVar("Item")
Result = TypeVar("Result")


def decoded_chunks(
    items: Sequence[Item],
    read: Callable[[Item], Clip],
    workers: int,
    max_clips: int = CHUNK_CLIPS,
    max_bytes: int = CHUNK_BYTES,
) -> Iterator[list[tuple[Item, Clip | OmniNFTError]]]:
    """Items with their clips, or with why there is none, decoded by up to `workers` threads.

    The first is decoded alone; from then on as many at a time as fit `max_bytes`, if they are like the largest so far.
    """
    chunk: list[tuple[Item, Clip | OmniNFTError]] = []
    held, start, width, largest = 0, 0, 1, 0
    while start < len(items):
        some = items[start : start + width]
        for item, clip in zip(some, in_workers(read, some, workers), strict=True):
            chunk.append((item, clip))
            size = clip.video.nbytes if isinstance(clip, Clip) else 0
            held, largest = held + size, max(largest, size)
        start += len(some)
        width = min(workers, max(1, max_bytes // largest)) if largest else 1
        if len(chunk) >= max_clips or held >= max_bytes:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def in_workers(work: Callable[[Item], Result], items: Sequence[Item], workers: int) -> list[Result | OmniNFTError]:
    """`work` on every item, in order, by threads (decoders, resizers and numpy let go of the interpreter).

    An OmniNFTError is a result, so that one item fails alone; anything else is raised.
    """

    def one(item: Item) -> Result | OmniNFTError:
        try:
            return work(item)
        except OmniNFTError as error:
            return error

    if workers <= 1 or len(items) <= 1:
        return [one(item) for item in items]
    with ThreadPoolExecutor(min(workers, len(items)), thread_name_prefix="prepare") as pool:
        return list(pool.map(one, items))
