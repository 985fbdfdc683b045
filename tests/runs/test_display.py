"""What is shown while a run goes on, with a clock of the test's own."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from omninft.config import load_config
from omninft.runs import display
from omninft.runs.display import ConsoleDisplay
from tests.runs.test_cost import SIZE


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(display.time, "monotonic", lambda: now.time)
    return now


def started(*overrides: str, terminal: bool = False) -> tuple[ConsoleDisplay, io.StringIO]:
    config = load_config("omninft", ["run.iterations=4", "evaluation.every=2", *overrides])
    text = io.StringIO()
    shown = ConsoleDisplay(Console(file=text, width=160, force_terminal=terminal))
    parts: Any = SimpleNamespace(
        policy=SimpleNamespace(
            facts={"blocks": 8, "lora_modules": 1, "lora_parameters": 1}, geometry=lambda sampling: SIZE
        ),
        rollouts=SimpleNamespace(geometry=SIZE),
        update=SimpleNamespace(rounds=[]),
        prompts={},
        evaluators={"dev": None, "test": None},
        preview=None,
        processes=SimpleNamespace(world=1),
    )
    shown.loading(config)
    shown.start(SimpleNamespace(config=config, parts=parts, folder=Path("runs/x"), iteration=0))  # type: ignore[arg-type]
    return shown, text


def iteration(number: int) -> tuple[int, dict[str, float]]:
    times = {"time/sampling": 16.0, "time/decode": 3.2, "time/rewards": 3.2}
    return number, {"seconds": 60.0, "reward/sync": 0.5, **times}


def test_the_time_left_counts_evaluations_as_they_were_measured(clock: SimpleNamespace) -> None:
    shown, text = started()
    label = "evaluating dev-000000"
    shown.progress(label, 0, 64)
    clock.time = 32.0
    shown.progress(label, 32, 64)
    shown.evaluation("dev", 0, {})
    shown.iteration(*iteration(0))
    # 3 iterations, dev after 2 and 4, base and trained on 256 clips; a clip takes a second.
    left = 3 * 60 + 2 * 64 + 2 * 256
    assert f"left {left // 60}:{left % 60:02d}" in text.getvalue().splitlines()[-1]
    shown.iteration(*iteration(1))
    assert shown._left() == f"{(left - 60) // 60}:{(left - 60) % 60:02d}"  # the one that is due is still to come
    shown.progress("evaluating dev-000002", 0, 64)
    clock.time = 64.0
    shown.progress("evaluating dev-000002", 32, 64)
    assert shown._left() == f"{(left - 92) // 60}:{(left - 92) % 60:02d}"


def test_without_an_evaluation_to_measure_it_goes_by_passes(clock: SimpleNamespace) -> None:
    shown, _ = started("evaluation.sampling.num_steps=40", "evaluation.every=0")
    shown.iteration(*iteration(0))
    each = 16 / 64 * 4 + 6.4 / 64
    assert shown._left() == f"{int(180 + 512 * each) // 60}:{int(180 + 512 * each) % 60:02d}"


def test_the_first_minutes_say_what_goes_on(clock: SimpleNamespace) -> None:
    shown, text = started()
    assert "loading tiny, prompts and rewards" in text.getvalue()
    shown.progress("sampling", 0, 64)
    clock.time = 25.0
    shown.progress("sampling", 32, 64)
    assert text.getvalue().splitlines()[-1].strip() == "sampling: 32/64 clips"
    clock.time = 26.0
    shown.progress("sampling", 64, 64)  # soon done: no line for it
    assert text.getvalue().splitlines()[-1].strip() == "sampling: 32/64 clips"


def test_a_terminal_has_a_bar_of_the_clips(clock: SimpleNamespace) -> None:
    shown, text = started(terminal=True)
    shown.progress("evaluating dev-000000", 16, 64)
    shown.close()
    assert "evaluating dev-000000" in text.getvalue()
    assert "16/64" in text.getvalue()
