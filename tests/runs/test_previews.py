"""Clips of the user's own prompts while a run goes on: when, of which policy, and that the run is the same run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from omninft.clips.listing import read_listing
from omninft.clips.media import read_clip
from omninft.noise import Occasion
from omninft.runs.session import Session
from omninft.train import train
from omninft.types import Prompt
from tests.test_train import PLAIN, adapters, model, same, small_config  # noqa: F401

PLAINLY: dict[str, Any] = {
    "every": 0,
    "test_clips": 0,
    "sampling": {"num_steps": 2, "stg_blocks": [], "video_guidance": PLAIN, "audio_guidance": PLAIN},
}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text("a red ball falls on wood\na drum is hit twice\n")
    return path


def folders(run: Path) -> list[str]:
    return sorted(p.parent.name for p in (run / "samples").glob("preview-*/scores.json"))


def test_previews_show_the_way_and_change_nothing(model: Path, tmp_path: Path, mine: Path) -> None:  # noqa: F811
    samples = {"prompts": str(mine), "every": 2}
    changes = {"evaluation": PLAINLY, "run__iterations": 3, "run__loggers": ["tensorboard"]}
    run = train(small_config(model, tmp_path / "a", samples=samples, **changes)).folder
    plain = train(small_config(model, tmp_path / "b", **changes)).folder
    assert same(adapters(run, 3), adapters(plain, 3))
    assert not (plain / "samples").exists()

    assert folders(run) == ["preview-000000", "preview-000002", "preview-000003"]
    listed = read_listing(run / "samples" / "preview-000002")
    assert [(c.prompt.prompt_av, c.sample) for c in listed] == [(text, 0) for text in mine.read_text().splitlines()]
    assert all(not c.scores and not c.reasons for c in listed)
    pictures = [
        read_clip(run / "samples" / folder / listed[0].file, Prompt("p", "", "", "")).video.astype(float)
        for folder in folders(run)
    ]
    # The same noise, and policies that differ a little.
    assert 0 < np.abs(pictures[0] - pictures[2]).mean() < 20

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "audio": 0})
    events.Reload()
    tag = f"preview/{Path(listed[0].file).stem}"
    assert [e.step for e in events.Images(tag)] == [e.step for e in events.Audio(tag)] == [0, 2, 3]

    page = (run / "report.html").read_text()
    section = page[page.index('<section id="your-prompts">') :]
    section = section[: section.index("</section>")]
    assert section.count("<video ") == 2 * 3
    assert section.count("<article") == 2
    for label in ("Base", "After 2 iterations", "After 3 iterations"):
        assert section.count(f'"take-name" title="{listed[0].file}">{label}<') == 1
    assert "samples/preview-000002" in section
    assert 'id="own-2"' in section
    assert page.count('id="prompt-1"') == 0
    assert "your-prompts" not in (plain / "report.html").read_text()


def test_previews_have_noise_of_their_own(
    model: Path,  # noqa: F811
    tmp_path: Path,
    mine: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from omninft.rollout.sampler import RolloutSampler

    seen: list[tuple[str, int, int, int]] = []
    real = RolloutSampler.sample

    def spy(self: RolloutSampler, groups: Any, seed: int, iteration: int, adapter: str) -> Any:
        seen.append((adapter, seed, iteration, self.sampling.num_steps))
        return real(self, groups, seed, iteration, adapter)  # type: ignore[arg-type]

    monkeypatch.setattr(RolloutSampler, "sample", spy)
    config = small_config(
        model, tmp_path / "runs", samples={"prompts": str(mine)}, evaluation=PLAINLY, run__iterations=1
    )
    train(config)
    seed = config.evaluation.seed
    assert [c for c in seen if c[2] < 0] == [
        ("reference", seed, Occasion.PREVIEW, 2),
        ("current", seed, Occasion.PREVIEW, 2),
    ]
    assert len({*Occasion}) == 5


def test_a_signal_cuts_a_preview_which_is_made_on_resume(
    model: Path,  # noqa: F811
    tmp_path: Path,
    mine: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from omninft.rollout.sampler import RolloutSampler

    real, batches = RolloutSampler.sample, []

    def sample(self: RolloutSampler, groups: Any, seed: int, iteration: Any, adapter: Any) -> Any:
        if iteration == Occasion.PREVIEW:
            batches.append(len(groups))
            if len(batches) == 3:  # the first of two after the last iteration
                os.kill(os.getpid(), signal.SIGTERM)
        return real(self, groups, seed, iteration, adapter)

    monkeypatch.setattr(RolloutSampler, "sample", sample)
    evaluation = PLAINLY | {"sampling": PLAINLY["sampling"] | {"batch_size": 1}}
    config = small_config(
        model, tmp_path / "runs", samples={"prompts": str(mine)}, evaluation=evaluation, run__iterations=1
    )
    stopped = train(config)
    assert (stopped.finished, stopped.stopped_by) == (False, signal.SIGTERM)
    assert len(batches) == 3
    assert folders(stopped.folder) == ["preview-000000"]
    done = train(config, resume=stopped.folder)
    assert done.finished
    assert folders(done.folder) == ["preview-000000", "preview-000001"]
    assert len(batches) == 5
    with Session(config, resume=done.folder) as run:
        assert not run.preview_owed


def test_processes_share_a_preview(model: Path, tmp_path: Path, mine: Path) -> None:  # noqa: F811
    from omninft.distributed import Processes
    from omninft.runs.build import build

    class Half(Processes):
        """One of two, which hears of the other only what it says itself."""

        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank, self.world = rank, 2

        def gather(self, value: Any) -> list[Any]:
            return [value]

    made = []
    for rank in (0, 1):
        config = small_config(model, tmp_path, samples={"prompts": str(mine), "count": 2}, evaluation=PLAINLY)
        preview = build(config, Half(rank)).preview
        assert preview is not None
        shown = preview.run("reference", tmp_path / str(rank)).shown
        made.append([(clip.prompt.prompt_av, clip.sample) for _, clip in shown])
    assert made == [[(text, 0), (text, 1)] for text in ("a red ball falls on wood", "a drum is hit twice")]
