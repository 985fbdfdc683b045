from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omninft.clips.first_frame import MOST_PIXELS, read_first_frame
from omninft.types import OmniNFTError


def test_a_picture_that_unfolds_to_gigabytes_is_refused_by_its_header(tmp_path: Path) -> None:
    side = 9000
    assert side**2 > MOST_PIXELS
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 20_000
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OmniNFTError, match=rf"bomb\.png cannot be read.*{side} x {side} pixels"):
        read_first_frame(str(tmp_path / "bomb.png"), 8, 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000  # kB


def test_a_picture_is_read(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_first_frame(str(tmp_path / "a.png"), 8, 8).numpy(), picture)
