from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from omninft.gallery.posters import SIDE, poster, poster_frame
from omninft.gallery.run_folder import ClipRecord
from omninft.types import Clip, Prompt

PROMPT = Prompt("p", "", "", "")


def clip_of(num_frames: int, height: int = 32, width: int = 32) -> Clip:
    """Every frame is brighter by 20 than the one before."""
    video = (
        np.zeros((num_frames, height, width, 3), np.uint8)
        + 20 * np.arange(num_frames, dtype=np.uint8)[:, None, None, None]
    )
    return Clip(video, 10.0, np.zeros((1, 0), np.float32), 16000, PROMPT)


def record(seen: tuple[float, ...] = (), heard: tuple[float, ...] = ()) -> ClipRecord:
    return ClipRecord(Path("c.mp4"), PROMPT, 0, {}, {}, seen, heard)


@pytest.mark.parametrize(
    ("seen", "heard", "frame"),
    [
        ((), (), 4),  # the middle
        ((0.7, 0.3), (0.1,), 3),  # what is seen goes before what is heard
        ((), (0.2,), 2),
        ((9.0,), (), 4),  # beside the clip
        ((0.0,), (), 0),
    ],
)
def test_shows_the_first_event_else_the_middle(seen: tuple[float, ...], heard: tuple[float, ...], frame: int) -> None:
    clip = clip_of(10)
    assert poster_frame(record(seen, heard), clip) == frame
    shown = cv2.imdecode(np.frombuffer(poster(record(seen, heard), clip), np.uint8), cv2.IMREAD_COLOR)
    assert abs(float(shown.mean()) - 20 * frame) < 4


def test_is_small_in_size_and_in_bytes() -> None:
    clip = clip_of(3, 512, 768)
    clip.video[:] += np.random.default_rng(0).integers(0, 30, clip.video.shape, dtype=np.uint8)
    still = poster(record(), clip)
    shown = cv2.imdecode(np.frombuffer(still, np.uint8), cv2.IMREAD_COLOR)
    assert max(shown.shape) == SIDE
    assert shown.shape[:2] == (214, 320)
    assert len(still) < 20_000
