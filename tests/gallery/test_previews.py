from __future__ import annotations

from pathlib import Path

import pytest

from omninft.gallery.previews import preview_sets
from omninft.gallery.run_folder import ClipSet, RunFolder, shown_sets


def run_with(*names: str) -> RunFolder:
    return RunFolder(Path("run"), {}, "", (), None, {name: ClipSet(name, {}) for name in names}, (), ())


@pytest.mark.parametrize(
    ("iterations", "shown"),
    [
        ([], []),
        ([0], [0]),
        ([6, 0], [0, 6]),
        (range(0, 30, 6), [0, 6, 12, 18, 24]),
        (range(0, 54, 6), [0, 12, 24, 36, 48]),
    ],
)
def test_columns_are_in_the_order_of_iterations_first_and_last_among_them(
    iterations: list[int], shown: list[int]
) -> None:
    run = run_with("dev-000000", *(f"preview-{i:06d}" for i in iterations))
    assert [clips.name for _, clips in preview_sets(run)] == [f"preview-{i:06d}" for i in shown]
    assert [label for label, _ in preview_sets(run)][:1] == ["Base"] * bool(shown)


def test_previews_are_no_clips_to_compare_policies_by() -> None:
    assert shown_sets(run_with("preview-000000")) == []
    assert [name for name, _ in shown_sets(run_with("preview-000000", "others"))] == ["others"]
