"""Running: batches, journal, resume, shards, holes, sums, set metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from omninft.clips.media import write_clip
from omninft.evaluation.benchmark import Benchmark, Shard, aggregate, parse_shard, run_benchmark
from omninft.evaluation.clip_folder import ClipFile, find_clips
from omninft.evaluation.results import ClipScores, EvaluationResult, Metric
from omninft.prompts.prompt_file import PromptRow
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers.weights import JudgingModel
from omninft.types import Clip, OmniNFTError, Prompt, ScoreTable

BRIGHT, LOUD = Metric("bright", "Bright", "mean of the pixels"), Metric("loud", "Loud", "peak", False, "FS")


@dataclass
class Judge:
    """Brightness 0..255 and peak; `fail_on` a prompt, or end the process there."""

    name: str = "judge"
    inputs: tuple[Input, ...] = ("video", "audio")
    licence: str = "none"
    model: JudgingModel | None = None
    components: tuple[ComponentSpec, ...] = (
        ComponentSpec("bright", "video", ""),
        ComponentSpec("loud", "audio", "", higher_is_better=False),
        ComponentSpec("extra", "video", "not a metric"),
    )
    seen: list[str] = field(default_factory=list)
    end_at: str = ""
    fail_on: str = ""

    def score(self, clips: list[Clip]) -> ScoreTable:
        rows = []
        for clip in clips:
            if clip.prompt.id == self.end_at:
                raise KeyboardInterrupt
            if clip.prompt.id == self.fail_on:
                raise RuntimeError("cannot judge this")
            self.seen.append(clip.prompt.id)
            peak = float(np.abs(clip.waveform).max()) if clip.waveform.size else np.nan
            rows.append([float(clip.video.mean()), peak, 0.0])
        return ScoreTable(tuple(s.component for s in self.components), np.array(rows).reshape(-1, 3))


@dataclass(frozen=True)
class Levels:
    """A set metric: the spread of the brightness."""

    name: str = "levels"
    metrics: tuple[Metric, ...] = (Metric("spread", "Spread", "of brightness"),)
    given: np.ndarray | None = None

    def missing(self) -> str | None:
        return None

    def features(self, clips: list[Clip]) -> list[np.ndarray | OmniNFTError]:
        return [
            np.array([c.video.mean(), 1.0]) if c.waveform.size else OmniNFTError("the clip has no sound") for c in clips
        ]

    def values(self, features: np.ndarray) -> dict[str, float]:
        if len(features) < 2:
            raise OmniNFTError("one clip has no spread")
        return {"spread": float(np.ptp(features[:, 0]))}


def put(folder: Path, index: int, level: int, silent: bool = False) -> None:
    wave = np.zeros((1, 0)) if silent else np.full((1, 8000), 0.5)
    clip = Clip(np.full((6, 32, 32, 3), level, np.uint8), 12.0, wave.astype(np.float32), 16_000, Prompt("", "", "", ""))
    write_clip(folder / f"sample_{index:04d}.mp4", clip)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Brightness 40, 80, 120, 160, 200; the third silent, the fourth damaged, the sixth not there."""
    for i in range(5):
        put(tmp_path / "in", i, 40 * (i + 1), silent=i == 2)
    (tmp_path / "in" / "sample_0003.mp4").write_bytes(b"no video")
    return tmp_path / "in"


def rows(count: int = 6) -> list[PromptRow]:
    return [PromptRow(i, Prompt(f"p{i}", "v", "a", f"text {i}"), ("odd" if i % 2 else "even",)) for i in range(count)]


def benchmark(judge: Judge, sets: Sequence[Any] = (), **changes: Any) -> Benchmark:
    return replace(Benchmark("test", "1", (BRIGHT, LOUD), (judge,), {"window": 2}, tuple(sets)), **changes)


def run(judge: Judge, clips: list[ClipFile], output: Path, **options: Any) -> EvaluationResult | None:
    sets = options.pop("sets", ())
    return run_benchmark(benchmark(judge, sets), clips, output, system="s", chunk_clips=1, **options)


def test_every_clip_counts_where_it_has_a_score_and_every_hole_has_its_reason(folder: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    result = run(
        Judge(),
        find_clips(folder, rows()),
        tmp_path / "out",
        progress=lambda d, t: steps.append((d, t)),
        sets=[Levels()],
    )
    assert result is not None
    bright, loud = result.overall["bright"], result.overall["loud"]
    assert bright.value == pytest.approx((40 + 80 + 120 + 200) / 4, abs=2)
    assert (bright.count, bright.missing) == (4, 2)
    assert bright.low is not None
    assert bright.high is not None
    assert bright.low < bright.value < bright.high
    assert loud.value == pytest.approx(0.5, abs=0.1)
    assert (loud.count, loud.missing) == (3, 3)
    even, odd = result.categories["even"], result.categories["odd"]
    assert even["bright"].value == pytest.approx(120, abs=2)
    assert (odd["bright"].count, odd["bright"].missing) == (1, 2)
    assert odd["bright"].low is None  # one prompt says nothing about others
    by_file = {c.file: c for c in result.clips}
    assert by_file["../in/sample_0002.mp4"].reasons == {
        "loud": "judge returned nan",
        "levels": "the clip has no sound",
    }
    assert "not a video" in by_file["../in/sample_0003.mp4"].reasons["bright"]
    assert "no such file" in by_file["../in/sample_0005.mp4"].reasons["loud"]
    assert by_file["../in/sample_0000.mp4"].prompt == "text 0"
    spread = result.overall["spread"]
    assert spread.value == pytest.approx(160, abs=3)
    assert (spread.count, spread.missing, spread.low) == (3, 3, None)
    assert any("2 of 6 clips could not be read" in note for note in result.notes)
    assert "Loud: missing on 1 of 6 clips: judge returned nan (1)" in result.notes
    assert steps[0] == (0, 6)
    assert steps[-1] == (6, 6)


def test_what_is_written(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run(Judge(), find_clips(folder, rows()), output, sets=[Levels()], generation={"seed": 3})
    assert EvaluationResult.load(output) == result
    assert sorted(p.name for p in output.iterdir()) == [
        "features.safetensors",
        "result.json",
        "table.csv",
        "table.md",
    ]
    assert load_file(output / "features.safetensors")["levels"].shape == (3, 2)
    lines = (output / "table.csv").read_text().splitlines()
    assert lines[0].startswith("system,benchmark,protocol,scope,metric")
    assert len(lines) == 1 + 3 + 2 * 2
    text = (output / "table.md").read_text()
    assert "| Loud ↓ | 0.5" in text
    assert "seed: 3" in text
    assert "window: 2" in text


def test_ended_at_any_moment_it_goes_on(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("omninft.evaluation.benchmark.available_cores", lambda: 1)
    output, clips = tmp_path / "out", find_clips(folder, rows())
    with pytest.raises(KeyboardInterrupt):
        run(Judge(end_at="p2"), clips, output)
    assert not (output / "result.json").exists()
    with (output / "journal-0-of-1.jsonl").open("a") as journal:
        journal.write('{"row": 2, "fi')
    put(folder, 0, 60)  # changed since
    again = Judge()
    result = run(again, find_clips(folder, rows()), output)
    assert again.seen == ["p0", "p2", "p4"]
    assert result is not None
    assert result.overall["bright"].value == pytest.approx((60 + 80 + 120 + 200) / 4, abs=2)
    whole = run(Judge(), find_clips(folder, rows()), tmp_path / "whole")
    assert whole is not None
    assert whole.overall == result.overall


def test_a_judge_that_failed_is_asked_again_after_an_end(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("omninft.evaluation.benchmark.available_cores", lambda: 1)
    clips = find_clips(folder, rows(5))
    with pytest.raises(KeyboardInterrupt):
        run(Judge(fail_on="p0", end_at="p4"), clips, tmp_path / "out")
    judge = Judge()
    result = run(judge, clips, tmp_path / "out")
    assert judge.seen == ["p0", "p2", "p4"]
    assert result is not None
    assert result.overall["bright"].count == 4


def test_unfinished_work_of_other_settings_is_refused(folder: Path, tmp_path: Path) -> None:
    clips = find_clips(folder, rows())
    with pytest.raises(KeyboardInterrupt):
        run(Judge(end_at="p2"), clips, tmp_path / "out")
    other = benchmark(Judge(), settings={"window": 3})
    with pytest.raises(OmniNFTError, match="unfinished scores of other settings, metrics or prompts"):
        run_benchmark(other, clips, tmp_path / "out", system="s")
    with pytest.raises(OmniNFTError, match="unfinished scores"):
        run(Judge(), clips[:3], tmp_path / "out")


def test_shards_give_what_one_process_gives(folder: Path, tmp_path: Path) -> None:
    output, clips = tmp_path / "out", find_clips(folder, rows())
    judges = [Judge() for _ in range(3)]
    assert run(judges[2], clips, output, shard=Shard(2, 3), sets=[Levels()]) is None
    assert run(judges[0], clips, output, shard=Shard(0, 3), sets=[Levels()]) is None
    assert (output / "journal-2-of-3.jsonl").is_file()
    merged = run(judges[1], clips, output, shard=Shard(1, 3), sets=[Levels()])
    assert [sorted(j.seen) for j in judges] == [["p0"], ["p1", "p4"], ["p2"]]
    alone = run(Judge(), clips, tmp_path / "alone", sets=[Levels()])
    assert merged == alone
    assert not list(output.glob("journal-*"))


def test_a_later_call_without_a_shard_does_the_rest(folder: Path, tmp_path: Path) -> None:
    clips = find_clips(folder, rows())
    assert run(Judge(), clips, tmp_path / "out", shard=Shard(0, 2)) is None
    judge = Judge()
    result = run(judge, clips, tmp_path / "out")
    assert sorted(judge.seen) == ["p1"]  # rows 3 and 5 cannot be read
    assert result is not None
    assert len(result.clips) == 6


def test_shards_as_text() -> None:
    assert parse_shard("1/4") == Shard(1, 4)
    assert [Shard(r, 3).share(range(7)) for r in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    for text in ("4/4", "1", "a/b", "-1/2"):
        with pytest.raises(OmniNFTError, match="expected RANK/COUNT"):
            parse_shard(text)


def test_features_that_are_given_are_taken_and_few_ones_are_said(folder: Path, tmp_path: Path) -> None:
    clips = find_clips(folder, rows(1))
    given = Levels(given=np.array([[1.0, 0], [4.0, 0]]))
    result = run(Judge(), clips, tmp_path / "a", sets=[given])
    assert result is not None
    assert (result.overall["spread"].value, result.overall["spread"].count) == (3.0, 2)
    assert not (tmp_path / "a" / "features.safetensors").exists()
    few = run(Judge(), clips, tmp_path / "b", sets=[Levels()])
    assert few is not None
    assert few.overall["spread"].value is None
    assert "Spread: not computed: one clip has no spread" in few.notes


def test_the_protocol_is_of_settings_and_prompts_not_of_the_system(folder: Path, tmp_path: Path) -> None:
    clips = find_clips(folder, rows())
    one = benchmark(Judge())
    assert one.protocol(clips).digest == replace(one, judges=(), weights={"a": "b"}).protocol(clips).digest
    assert one.protocol(clips).digest != one.protocol(clips[:4]).digest
    assert one.protocol(clips).digest != replace(one, settings={"window": 3}).protocol(clips).digest
    json.dumps(one.protocol(clips).settings, allow_nan=False)


def test_clips_of_another_length_are_told(folder: Path, tmp_path: Path) -> None:
    made = benchmark(Judge(), seconds=4.0)
    result = run_benchmark(made, find_clips(folder, rows(3)), tmp_path / "out", system="s")
    assert result is not None
    assert "3 of 3 clips do not last 4 s (0.50 to 0.50 s)" in result.notes


def test_a_judge_that_cannot_be_loaded_ends_the_work_before_it_begins(folder: Path, tmp_path: Path) -> None:
    class Unloadable(Judge):
        @property
        def scorer(self) -> Any:
            raise OmniNFTError("weights.pth: sha256 is 1, expected 2")

    with pytest.raises(OmniNFTError, match="sha256 is 1"):
        run(Unloadable(), find_clips(folder, rows()), tmp_path / "out")


def test_nothing_to_measure(folder: Path, tmp_path: Path) -> None:
    empty = Benchmark("test", "1", (), (), notes=("VQ: left out: no weights",))
    with pytest.raises(OmniNFTError, match="none of the metrics can be computed: VQ: left out"):
        run_benchmark(empty, find_clips(folder, rows()), tmp_path / "out", system="s")


def test_means_weigh_clips_and_intervals_draw_prompts() -> None:
    clips = [ClipScores(i, f"{i}", f"p{i // 4}", "", (), {"x": float(i // 4) if i != 5 else None}) for i in range(40)]
    found = aggregate(["x"], clips)["x"]
    assert found.value == pytest.approx((sum(i // 4 for i in range(40)) - 1) / 39)
    assert (found.count, found.missing) == (39, 1)
    # Ten prompts of equal clips: the standard error is that of ten numbers 0..9, about 0.96.
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * 2.26 * 0.957, rel=0.12)


def test_what_is_finished_is_not_done_again_unless_a_clip_changed(folder: Path, tmp_path: Path) -> None:
    judge, wanted = Judge(), rows(2)
    for index in (0, 1):
        put(folder, index, 40 + index)
    first = run(judge, find_clips(folder, wanted), tmp_path / "out")
    asked = len(judge.seen)
    again = run(judge, find_clips(folder, wanted), tmp_path / "out", shard=Shard(0, 2))
    assert again == first
    assert len(judge.seen) == asked
    assert sorted(p.name for p in (tmp_path / "out").glob("journal*")) == []
    put(folder, 0, 90)
    changed = run(judge, find_clips(folder, wanted), tmp_path / "out")
    assert changed is not None
    assert first is not None
    assert changed.overall != first.overall


def test_a_refused_call_leaves_no_journal_behind(folder: Path, tmp_path: Path) -> None:
    for index in range(4):
        put(folder, index, 40)
    run(Judge(), find_clips(folder, rows(4)), tmp_path / "out", shard=Shard(0, 2))
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    with pytest.raises(OmniNFTError, match="unfinished scores of other settings"):
        run(Judge(), find_clips(folder, rows(3)), tmp_path / "out", shard=Shard(1, 3))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before


def test_no_clip_that_can_be_read_is_no_result(folder: Path, tmp_path: Path) -> None:
    for index in range(2):
        (folder / f"sample_{index:04d}.mp4").write_bytes(b"no video")
    with pytest.raises(OmniNFTError, match=r"none of the 2 clips could be read: .*not a video"):
        run(Judge(), find_clips(folder, rows(2)), tmp_path / "out")


def test_the_result_of_another_system_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    put(folder, 0, 40)
    run(Judge(), find_clips(folder, rows(1)), tmp_path / "out")
    with pytest.raises(OmniNFTError, match=r"holds the result of '.*', not of 'other': choose another output"):
        run_benchmark(benchmark(Judge()), find_clips(folder, rows(1)), tmp_path / "out", system="other")
