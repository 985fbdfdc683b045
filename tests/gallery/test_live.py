"""A report that follows its run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from omninft.gallery.live import watch_report
from omninft.gallery.report import write_report
from omninft.runs.metrics import MetricsLog
from omninft.types import OmniNFTError
from tests.gallery.chromium import Opener, find_chromium


def begun(run: Path, planned: int = 4) -> Path:
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"run": {"iterations": planned}}), encoding="utf-8")
    return run


def one_more(run: Path, iteration: int) -> None:
    with MetricsLog(run) as log:
        log.iteration(iteration, {"seconds": 30.0, "reward/sync": 0.1 * iteration})


def test_is_written_when_the_run_has_written_and_once_more_at_its_end(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")

    def life() -> Iterator[bool]:
        yield True  # nothing yet
        one_more(run, 0)
        yield True
        yield True  # nothing new
        one_more(run, 1)
        yield True
        yield False

    alive, pages = life(), []
    page = watch_report(run, lambda: next(alive), lambda path: pages.append(path.read_text(encoding="utf-8")), every=0)
    assert len(pages) == 3
    assert "Running: 1 of 4 iterations done, about 2 min of training left." in pages[1]
    assert "Running: 2 of 4 iterations done, about 60 s of training left." in pages[2]
    assert all('http-equiv="refresh"' in text and "location.reload()" in text for text in pages)
    last = page.read_text(encoding="utf-8")
    assert "refresh" not in last
    assert "location.reload" not in last
    assert "2 of 4 iterations done; no final evaluation yet." in last
    assert not list(run.glob("*.tmp*"))


def test_ctrl_c_leaves_a_page_that_stays_as_it_is(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    one_more(run, 0)
    looks = iter([True, KeyboardInterrupt, True])

    def is_running() -> bool:
        look = next(looks)
        if look is KeyboardInterrupt:
            raise KeyboardInterrupt
        return bool(look)

    text = watch_report(run, is_running, every=0).read_text(encoding="utf-8")
    assert "Running: 1 of 4 iterations done" in text
    assert "location.reload" not in text


def test_a_run_that_is_over_is_written_once(tmp_path: Path) -> None:
    pages: list[Path] = []
    watch_report(begun(tmp_path / "run"), lambda: False, pages.append)
    assert pages == []
    with pytest.raises(OmniNFTError, match="no such run folder"):
        watch_report(tmp_path / "nowhere", lambda: False)


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here; install one or set OMNINFT_CHROMIUM")
def test_the_page_loads_itself_again_where_it_was(tmp_path: Path, opened: Opener) -> None:
    run = begun(tmp_path / "run")
    one_more(run, 0)
    page = opened(write_report(run, running=True, refresh=1), height=300)
    page.js("document.querySelector('details').open = true; window.scrollTo(0, 200); window.old = true")
    one_more(run, 1)
    write_report(run, running=True, refresh=1)
    page.until("!window.old && document.readyState === 'complete'", seconds=5)
    assert "2 of 4 iterations" in page.js("document.querySelector('.lead').textContent")
    page.until("window.scrollY === 200", seconds=2)
    assert page.js("document.querySelector('details').open")
    write_report(run)
    page.until("!document.querySelector('[data-refresh]')", seconds=5)
