from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from omninft.clips.media import write_clip
from omninft.config import RewardConfig
from omninft.evaluation.scoring import FileScores, ScoreResult, score_files
from omninft.types import Clip, OmniNFTError, Prompt

seen: list[str] = []
fail_on: set[str] = set()


def brightness(clips: list[Clip]) -> list[float | None]:
    """Mean of the pixels, 0..255; remembers what it saw."""
    seen.extend(c.prompt.id for c in clips)
    if any(c.prompt.id in fail_on for c in clips):
        raise KeyboardInterrupt
    return [None if c.waveform.size == 0 else float(c.video.mean()) for c in clips]


REWARD = RewardConfig(name=f"{__name__}:brightness", route="video")


@pytest.fixture(autouse=True)
def fresh() -> None:
    seen.clear()
    fail_on.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a/0.mp4 .. a/2.mp4 of brightness 40, 80, 120; b/silent.mp4; broken.webm; and what is no clip."""
    wave = np.zeros((1, 8000), np.float32)
    for i in range(3):
        video = np.full((6, 32, 32, 3), 40 * (i + 1), np.uint8)
        write_clip(tmp_path / "clips" / "a" / f"{i}.mp4", Clip(video, 12.0, wave, 16_000, Prompt("", "", "", "")))
    silent = Clip(np.full((6, 32, 32, 3), 200, np.uint8), 12.0, wave[:, :0], 16_000, Prompt("", "", "", ""))
    write_clip(tmp_path / "clips" / "b" / "silent.mp4", silent)
    (tmp_path / "clips" / "broken.webm").write_bytes(b"no video")
    (tmp_path / "clips" / "notes.txt").write_text("no clip")
    return tmp_path / "clips"


def test_every_clip_is_scored_and_every_failure_has_its_reason(folder: Path) -> None:
    steps = []
    result = score_files(folder, [REWARD], progress=lambda done, total: steps.append((done, total)))
    assert [r.file for r in result.rows] == ["a/0.mp4", "a/1.mp4", "a/2.mp4", "b/silent.mp4", "broken.webm"]
    values = [r.scores["brightness"] for r in result.rows]
    assert values[:3] == pytest.approx([40, 80, 120], abs=2)
    assert values[3:] == [None, None]
    assert result.rows[3].reasons == {"brightness": "returned None"}
    assert "not a video" in result.rows[4].reasons["brightness"]
    assert result.means()["brightness"] == pytest.approx(80, abs=2)
    assert steps[0] == (0, 5)
    assert steps[-1] == (5, 5)


def test_prompts_come_from_a_file_or_from_the_listing_beside_the_clips(folder: Path, tmp_path: Path) -> None:
    row = {"file": "1.mp4", "prompt_id": "listed", "prompt_v": "v", "prompt_a": "a", "prompt_av": "v a"}
    (folder / "a" / "scores.json").write_text(json.dumps({"clips": [row]}))
    ids = {r.file: r.prompt_id for r in score_files(folder, [REWARD]).rows}
    assert ids == {
        "a/0.mp4": "0",
        "a/1.mp4": "listed",
        "a/2.mp4": "2",
        "b/silent.mp4": "silent",
        "broken.webm": "broken",
    }
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"idx": 2, "prompt_v": "v", "prompt_a": "a", "prompt_av": "v a"}\n')
    given = {r.file: r.prompt_id for r in score_files(folder, [REWARD], prompts).rows}
    assert given["a/1.mp4"] == "1"


def test_prompts_of_a_benchmark_go_by_row(tmp_path: Path) -> None:
    wave = np.zeros((1, 8000), np.float32)
    for name in ("sample_0000.MP4", "sample_0001.mp4"):
        video = np.full((6, 32, 32, 3), 90, np.uint8)
        write_clip(tmp_path / "clip.mp4", Clip(video, 12.0, wave, 16_000, Prompt("", "", "", "")))
        (tmp_path / "clip.mp4").rename(tmp_path / name)
    (tmp_path / "prompts.csv").write_text("text,audio_text\na cat,it meows\na dog,it barks\n")
    assert [r.prompt_id for r in score_files(tmp_path, [REWARD]).rows] == ["00000", "00001"]
    assert [r.file for r in score_files(tmp_path, [REWARD]).rows] == ["sample_0000.MP4", "sample_0001.mp4"]


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_tables_hold_the_same_numbers(ending: str, tmp_path: Path) -> None:
    rows = (
        FileScores("a.mp4", "a", {"x": 0.25, "y": None}, {"y": "no sound"}),
        FileScores("b.mp4", "b", {"x": 0.75, "y": 2.0}, {}),
    )
    path = tmp_path / f"new/table.{ending}"
    ScoreResult(("x", "y"), rows).write(path)
    if ending == "csv":
        assert path.read_text().splitlines() == [
            "file,prompt_id,x,y,missing",
            "a.mp4,a,0.25,,y: no sound",
            "b.mp4,b,0.75,2.0,",
        ]
    elif ending == "json":
        tree = json.loads(path.read_text())
        assert tree["means"] == {"x": 0.5, "y": 2.0}
        assert tree["clips"][0]["scores"] == {"x": 0.25, "y": None}
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        assert parquet.read_table(path).to_pydict() == {
            "file": ["a.mp4", "b.mp4"],
            "prompt_id": ["a", "b"],
            "x": [0.25, 0.75],
            "y": [None, 2.0],
            "missing": ["y: no sound", ""],
        }


def test_an_interrupted_table_goes_on_where_it_stopped(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("omninft.evaluation.scoring.CHUNK_CLIPS", 1)
    monkeypatch.setattr("omninft.evaluation.scoring.available_cores", lambda: 1)
    output = tmp_path / "scores.csv"
    fail_on.add("2")
    with pytest.raises(KeyboardInterrupt):
        score_files(folder, [REWARD], output=output)
    assert seen == ["0", "1", "2"]
    assert not output.exists()
    with (tmp_path / "scores.csv.partial.jsonl").open("a") as journal:
        journal.write('{"file": "a/2.mp4", "sco')  # a torn line, as kill -9 leaves it
    write_clip(  # changed since: its score is not kept
        folder / "a" / "0.mp4",
        Clip(
            np.full((6, 32, 32, 3), 10, np.uint8), 12.0, np.zeros((1, 8000), np.float32), 16_000, Prompt("", "", "", "")
        ),
    )
    seen.clear()
    fail_on.clear()
    result = score_files(folder, [REWARD], output=output)
    assert seen == ["0", "2", "silent"]
    assert [r.scores["brightness"] for r in result.rows[:3]] == pytest.approx([10, 80, 120], abs=2)
    assert len(output.read_text().splitlines()) == 6
    assert not (tmp_path / "scores.csv.partial.jsonl").exists()


def test_unfinished_scores_of_other_rewards_are_not_mixed_in(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.csv"
    fail_on.add("0")
    with pytest.raises(KeyboardInterrupt):
        score_files(folder, [REWARD], output=output)
    other = REWARD.model_copy(update={"weight": 2.0})
    with pytest.raises(OmniNFTError, match="unfinished scores of other rewards, options or prompts"):
        score_files(folder, [other], output=output)


@pytest.mark.parametrize(
    ("name", "message"),
    [("table.xlsx", r"found ending '\.xlsx', expected \.csv, \.json, \.parquet"), ("table", "found ending ''")],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(folder, tmp_path, name, message) -> None:
    with pytest.raises(OmniNFTError, match=message):
        score_files(folder, [REWARD], output=tmp_path / name)
    assert seen == []


def test_missing_weights_are_said_before_the_work(folder: Path) -> None:
    with pytest.raises(OmniNFTError, match="fetch by: hf download laion/clap-htsat-unfused"):
        score_files(folder, [RewardConfig(name="clap")])


def test_no_clips(tmp_path: Path) -> None:
    with pytest.raises(OmniNFTError, match=r"no clips in .*; looked for \.mp4"):
        score_files(tmp_path, [REWARD])
