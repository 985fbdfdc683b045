from __future__ import annotations

import math
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from omninft.config import WandbConfig
from omninft.runs.metrics import LoggerName, MetricsLog, frame_strip, read_metrics, require_loggers
from omninft.types import Clip, OmniNFTError, Prompt


def make_clip(num_frames: int = 4) -> Clip:
    video = np.arange(num_frames, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    sound = np.sin(np.arange(1600) / 5).astype(np.float32)[None].repeat(2, axis=0)
    return Clip(video, 4.0, sound, 1600, Prompt("p", "v", "a", "av"))


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.iteration(0, {"reward/sync": np.float32(0.5), "loss/video": torch.tensor(2.0), "optimiser_step": 4})
        log.evaluation("dev", 1, {"sync": {"mean": 0.6, "low": math.nan, "high": 0.7, "n": 64}})
        log.event(1, "warning", "späte Töne\nsecond line")
    rows = read_metrics(tmp_path)
    assert rows[0] == {"kind": "iteration", "iteration": 0, "reward/sync": 0.5, "loss/video": 2.0, "optimiser_step": 4}
    assert rows[1] == {
        "kind": "evaluation",
        "split": "dev",
        "iteration": 1,
        "measures": {"sync": {"mean": 0.6, "low": None, "high": 0.7, "n": 64}},
    }
    assert rows[2] == {"kind": "event", "iteration": 1, "level": "warning", "message": "späte Töne\nsecond line"}
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 3


def test_values_that_are_not_finite_become_null_so_that_any_reader_can_read_them(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.iteration(0, {"a": math.nan, "b": np.float64("inf"), "c": torch.tensor(-math.inf)})
    assert read_metrics(tmp_path) == [{"kind": "iteration", "iteration": 0, "a": None, "b": None, "c": None}]


def test_no_file_yet_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for i in range(3):
        log.iteration(i, {"a": i})
        # Not closed: what a process that is killed now leaves behind.
        assert [row["a"] for row in read_metrics(tmp_path)] == list(range(i + 1))
    log.close()


def test_a_cut_last_line_is_left_out_and_mended_before_going_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "iteration", "iteration": 0, "a": 1}\n{"kind": "iteration", "iter', encoding="utf-8")
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0]
    with MetricsLog(tmp_path) as log:
        log.iteration(1, {"a": 2})
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "iteration", "iteration": 0, "a": 1}', encoding="utf-8")
    assert len(read_metrics(tmp_path)) == 1
    with MetricsLog(tmp_path) as log:
        log.iteration(1, {"a": 2})
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1]


@pytest.mark.parametrize("bad", ['{"kind": ', "[1, 2]", "\udcff"])
def test_a_damaged_line_inside_the_file_is_an_error_with_its_number(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"kind": "event"}}\n{bad}\n{{"kind": "event"}}\n', encoding="utf-8", errors="surrogateescape")
    with pytest.raises(OmniNFTError, match="line 2: expected a JSON object"):
        read_metrics(tmp_path)


def test_rewind_forgets_what_is_done_again_and_keeps_events(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.evaluation("dev", 0, {"sync": {"mean": 0.1}})
        for i in range(4):
            log.iteration(i, {"a": i})
            if i == 2:
                log.event(2, "warning", "after the checkpoint")
            if i % 2 == 1:
                log.evaluation("dev", i + 1, {"sync": {"mean": 0.2}})
        removed = log.rewind(2)
        log.iteration(2, {"a": 20})
    rows = read_metrics(tmp_path)
    assert removed == 3  # iterations 2 and 3, and the evaluation after iteration 3
    assert [(r["kind"], r["iteration"]) for r in rows] == [
        ("evaluation", 0),
        ("iteration", 0),
        ("iteration", 1),
        ("evaluation", 2),
        ("event", 2),
        ("iteration", 2),
    ]
    assert rows[-1]["a"] == 20
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewind_with_nothing_to_forget_leaves_the_file_alone(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.iteration(0, {"a": 1})
        before = (tmp_path / "metrics.jsonl").stat()
        assert log.rewind(1) == 0
        assert (tmp_path / "metrics.jsonl").stat().st_ino == before.st_ino
        log.iteration(1, {"a": 2})
    assert [row["a"] for row in read_metrics(tmp_path)] == [1, 2]


def read_tensorboard(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "audio": 0, "scalars": 0})
    events.Reload()
    return events


def test_tensorboard_shows_scalars_config_strips_and_sound(tmp_path: Path) -> None:
    config = {"seed": 7, "sigmas": (1.0, 0.5)}
    with MetricsLog(tmp_path, ["tensorboard"], config) as log:
        log.iteration(0, {"reward/sync": 0.25, "note": "text is no scalar", "gone": math.nan})
        log.evaluation("dev", 1, {"sync": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 8}})
        log.event(1, "warning", "look here")
        log.clips("dev", 1, [(tmp_path / "samples" / "p-0.mp4", make_clip())])
    events = read_tensorboard(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("reward/sync")] == [(0, 0.25)]
    assert [events.Scalars(f"dev/sync{s}")[0].value for s in ("", "_low", "_high")] == pytest.approx([0.5, 0.4, 0.6])
    assert set(events.Tags()["scalars"]) == {"reward/sync", "dev/sync", "dev/sync_low", "dev/sync_high"}
    image = events.Images("dev/p-0")[0]
    assert (image.height, image.width) == (2, 12)
    sound = events.Audio("dev/p-0")[0]
    assert (sound.sample_rate, sound.length_frames) == (1600, 1600)
    texts = {t: events.Tensors(t)[0].tensor_proto.string_val[0].decode() for t in events.Tags()["tensors"]}
    assert "    seed: 7\n" in texts["config/text_summary"]
    assert "- 0.5" in texts["config/text_summary"]
    assert texts["event/warning/text_summary"] == "look here"


def test_tensorboard_forgets_on_rewind_but_keeps_the_checkpoints_evaluation(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, ["tensorboard"]) as log:
        for i in range(3):
            log.iteration(i, {"a": float(i)})
            log.evaluation("dev", i + 1, {"sync": {"mean": float(i)}})
        log.rewind(1)
        log.iteration(1, {"a": 10.0})
    events = read_tensorboard(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("a")] == [(0, 0.0), (1, 10.0)]
    assert [(e.step, e.value) for e in events.Scalars("dev/sync")] == [(1, 0.0)]


@dataclass(frozen=True)
class FakeVideo:
    """The signature that W&B and trackio document for videos."""

    data_or_path: str
    caption: str | None = None
    fps: int | None = None
    format: str | None = None


class FakeRun:
    """Records what a W&B or trackio run is told."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.logged: list[dict[str, Any]] = []
        self.calls: list[tuple[str, ...]] = []

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append(("define_metric", name, step_metric))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_loggers_get_numbers_events_and_clips(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[FakeRun] = []
    module = types.ModuleType(name)

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(**options))
        return runs[-1]

    module.init = init  # type: ignore[attr-defined]
    module.Video = FakeVideo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    folder = tmp_path / "run-a"
    with MetricsLog(folder, [name], {"betas": (0.9, 0.999)}) as log:  # type: ignore[list-item]
        log.iteration(3, {"reward/sync": 0.5, "gone": math.nan})
        log.evaluation("dev", 4, {"sync": {"mean": 0.6, "low": 0.5, "high": 0.7}})
        log.clips("dev", 4, [(folder / "p-0.mp4", make_clip())])
        log.rewind(4)
    (run,) = runs
    assert run.options["project"] == "omninft"
    run_id = (folder / "tracker_id.txt").read_text().strip()
    assert len(run_id) == 8
    assert run.options["name"] == ("run-a" if name == "wandb" else f"run-a-{run_id}")
    assert "entity" not in run.options
    assert "mode" not in run.options
    assert run.options["config"] == {"betas": [0.9, 0.999]}
    assert run.options["resume"] == "allow"
    assert run.logged == [
        {"iteration": 3, "reward/sync": 0.5},
        {"iteration": 4, "dev/sync": 0.6, "dev/sync_low": 0.5, "dev/sync_high": 0.7},
        {"iteration": 4, "dev/p-0": FakeVideo(str(folder / "p-0.mp4"), caption="av", format="mp4")},
        {"iteration": 4, "event/info": "resumed from the checkpoint after 4 iterations"},
    ]
    assert run.calls[-1] == ("finish",)
    if name == "wandb":
        assert run.options["id"] == run_id
        assert Path(run.options["dir"]).is_absolute()
        assert ("define_metric", "*", "iteration") in run.calls


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """Runs that modules in the place of W&B and trackio were asked for."""
    runs: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(**options))
        return runs[-1]

    for name in ("wandb", "trackio"):
        module = types.ModuleType(name)
        module.init, module.Video = init, FakeVideo  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    return runs


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_run_goes_on_as_the_same_and_is_no_other_of_its_name(
    name: LoggerName, key: str, tmp_path: Path, hosted: list[FakeRun]
) -> None:
    for folder in (tmp_path / "here" / "omninft", tmp_path / "there" / "omninft", tmp_path / "here" / "omninft"):
        MetricsLog(folder, [name]).close()
    here, there, again = (run.options[key] for run in hosted)
    assert here == again != there


def test_settings_go_to_the_services(tmp_path: Path, hosted: list[FakeRun]) -> None:
    settings = WandbConfig(project="balls", entity="us", group="first", tags=("a", "b"), mode="offline", media=False)
    with MetricsLog(tmp_path, ["wandb", "trackio"], wandb=settings) as log:
        log.clips("dev", 1, [(tmp_path / "p-0.mp4", make_clip())])
    for run in hosted:
        assert (run.options["project"], run.options["group"]) == ("balls", "first")
        assert run.logged == []
    assert [hosted[0].options[key] for key in ("entity", "tags", "mode")] == ["us", ["a", "b"], "offline"]
    assert not {"entity", "tags", "mode", "id", "dir"} & hosted[1].options.keys()


def test_a_logger_that_is_there_and_broken_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackio.py").write_text("import a_part_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(OmniNFTError, match=r"names trackio, which cannot be imported: .*a_part_that_is_missing"):
        require_loggers(["trackio"])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_logger_that_is_not_installed_says_how_to_get_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    told = rf"run\.loggers names {name}, which is not installed: pip install 'omninft\[{name}\]'"
    with pytest.raises(OmniNFTError, match=told):
        MetricsLog(tmp_path, [name])  # type: ignore[list-item]


def test_an_unknown_logger_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OmniNFTError, match="unknown logger 'mlflow', expected one of"):
        MetricsLog(tmp_path, ["mlflow"])  # type: ignore[list-item]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_strip_takes_first_and_last_frame_and_at_most_all() -> None:
    clip = make_clip(num_frames=9)
    strip = frame_strip(clip, num_frames=3)
    assert strip.shape == (2, 9, 3)
    assert strip[0, ::3, 0].tolist() == [0, 4, 8]
    assert frame_strip(make_clip(num_frames=2), num_frames=8).shape == (2, 6, 3)
