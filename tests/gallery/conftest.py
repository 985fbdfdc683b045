from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gallery.chromium import Chromium, Opener, Page, find_chromium


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = find_chromium()
    assert program is not None
    chromium = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture
def opened(browser: Chromium) -> Iterator[Opener]:
    """Opens pages that may not complain of anything."""
    pages: list[Page] = []

    def open_page(path: Path, **view: object) -> Page:
        pages.append(browser.open(path, **view))
        return pages[-1]

    yield open_page
    for page in pages:
        assert page.complaints == []
        page.close()
