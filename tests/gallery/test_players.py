from __future__ import annotations

import re
from pathlib import Path

import pytest

from omninft.clips.media import write_clip
from omninft.gallery.players import Place, player_group
from omninft.gallery.run_folder import ClipRecord
from omninft.types import Prompt
from tests.gallery.clip_folders import beeping_clip


@pytest.mark.parametrize(
    ("times", "places"),
    [
        ((0.5,), ["500.0"]),
        ((-0.004, 1.03), ["0.0", "1000.0"]),  # measured just beside the clip, and counted
        ((9.0,), []),
        ((), []),
    ],
)
def test_every_counted_event_has_a_tick(tmp_path: Path, times: tuple[float, ...], places: list[str]) -> None:
    write_clip(tmp_path / "c.mp4", beeping_clip(seconds=1.0))
    record = ClipRecord(tmp_path / "c.mp4", Prompt("p", "", "", ""), 0, {}, {}, seen=times, heard=times)
    wave = player_group([("A", record)], {}, lambda record, clip: Place("c.mp4"), find_onsets=True).takes[0].wave
    for kind in ("seen", "heard"):
        assert re.findall(rf'class="mark {kind}" x1="([^"]*)"', wave) == places
