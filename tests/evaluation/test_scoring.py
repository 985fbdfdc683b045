from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from omninft.clips.media import write_clip
from omninft.config import RewardConfig
from omninft.evaluation import sampling
from omninft.evaluation.sampling import sample_clips
from omninft.evaluation.scoring import FileScores, ScoreResult, score_files
from omninft.evaluation.settings import SamplingChoice
from omninft.prompts.prompt_set import load_prompts
from omninft.rewards.model_reward import prompt_text
from omninft.types import Clip, OmniNFTError, Prompt
from tests.random_models import make_policy

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
    ids = [prompt.id for prompt in load_prompts(tmp_path / "prompts.csv").prompts]
    result = score_files(tmp_path, [REWARD])
    assert [r.prompt_id for r in result.rows] == ids
    assert result.without_prompts() == {}
    assert [r.file for r in score_files(tmp_path, [REWARD]).rows] == ["sample_0000.MP4", "sample_0001.mp4"]


def test_clips_made_from_a_file_are_scored_with_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sampling, "load_policy", lambda model, lora, strength: (make_policy(), "reference"))
    prompts = tmp_path / "prompts.csv"
    prompts.write_text('prompt_v,prompt_a,id\na cat,it meows,\n"a dog, brown",it barks,\nrain,rain falls,wet-1\n')
    sample_clips(str(prompts), tmp_path / "out", count=2, choice=SamplingChoice(steps=1))
    (tmp_path / "out" / "scores.json").unlink()
    result = score_files(tmp_path / "out", [REWARD], prompts)
    assert result.without_prompts() == {}
    ids = [prompt.id for prompt in load_prompts(prompts).prompts]
    assert sorted(r.prompt_id for r in result.rows) == sorted(2 * ids)
    assert sorted(r.file for r in result.rows) == sorted(f"{i}-{n}.mp4" for i in ids for n in (0, 1))


def wordy(clips: list[Clip]) -> list[float]:
    for clip in clips:
        prompt_text(clip, "prompt_v")
    return [1.0] * len(clips)


def test_files_of_unknown_prompts_are_named_with_the_reason(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "scores.json").write_text('{"clips": []}')
    words = RewardConfig(name=f"{__name__}:wordy", route="video")
    result = score_files(folder, [REWARD, words])
    beside = f"{folder / 'b'} has no scores.json and no prompts.csv, and no --prompts is given"
    listed = f"{folder / 'a' / 'scores.json'} does not list it"
    found = result.without_prompts()
    assert found[listed] == ["a/0.mp4", "a/1.mp4", "a/2.mp4"]
    assert found[beside] == ["b/silent.mp4"]
    assert result.rows[0].scores["brightness"] is not None
    assert result.rows[0].reasons == {"wordy": f"its prompt is not known: {listed}"}
    prompts = tmp_path / "p.txt"
    prompts.write_text("rain\nwind\n")
    (folder / "a" / "2.mp4").rename(folder / "a" / "sample_0002.mp4")
    (folder / "a" / "1.mp4").rename(folder / "a" / "sample_0001.mp4")
    found = score_files(folder / "a", [REWARD], prompts).without_prompts()
    assert found == {
        f"{prompts} has no prompt of the file's name as id, with or without a sample's number": ["0.mp4"],
        f"{prompts} has 2 rows, from sample_0000 to sample_0001": ["sample_0002.mp4"],
    }


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


def writes(clips: list[Clip]) -> list[float]:
    """Normalises in place, which clips do not allow."""
    for clip in clips:
        clip.waveform[:] = 0
    return [0.0] * len(clips)


def test_what_a_reward_raises_is_kept_beside_the_table(folder: Path, tmp_path: Path) -> None:
    spoiler = RewardConfig(name=f"{__name__}:writes", route="audio")
    result = score_files(folder / "a", [spoiler, REWARD], output=tmp_path / "scores.csv")
    assert [row.scores["writes"] for row in result.rows] == [None] * 3
    assert all("clips are read-only: copy the array first" in row.reasons["writes"] for row in result.rows)
    assert [row.scores["brightness"] for row in result.rows] == pytest.approx([40, 80, 120], abs=2)
    told = (tmp_path / "scores.csv.rewards.log").read_text()
    assert told.count("Traceback") == 1
    assert told.count("reward writes failed on") == 3
