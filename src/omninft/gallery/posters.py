"""The still that a player shows before its clip is loaded."""

from __future__ import annotations

import base64
from fractions import Fraction

import av
import numpy as np

from omninft.gallery.run_folder import ClipRecord
from omninft.types import Clip

SIDE = 320  # pixels, at most
_QUALITY = 6  # quantiser scale of the JPEG, 1 is best


def poster(record: ClipRecord, clip: Clip) -> bytes:
    """JPEG of the frame in which something first happens, else of the middle one, at most SIDE pixels a side."""
    return _jpeg(clip.video[poster_frame(record, clip)])


def poster_frame(record: ClipRecord, clip: Clip) -> int:
    """Index of the frame of the first event that is seen in the clip, else heard, else of the middle one."""
    last = len(clip.video) - 1
    for times in (record.seen, record.heard or ()):
        frames = [round(t * clip.frame_rate) for t in times]
        if inside := [f for f in frames if 0 <= f <= last]:
            return min(inside)
    return last // 2


def data_uri(kind: str, data: bytes) -> str:
    """`data` inside a page; `kind` is its media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _jpeg(frame: np.ndarray) -> bytes:
    """`frame` is uint8 [H, W, 3]."""
    height, width = frame.shape[:2]
    shrink = min(1.0, SIDE / max(height, width))
    encoder = av.VideoCodecContext.create("mjpeg", "w")
    encoder.width, encoder.height = (max(2, round(size * shrink / 2) * 2) for size in (width, height))
    encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1)
    encoder.qmin = encoder.qmax = _QUALITY
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    picture = picture.reformat(encoder.width, encoder.height, "yuvj420p")
    return b"".join(bytes(packet) for packet in [*encoder.encode(picture), *encoder.encode(None)])
