"""A third benchmark, with all that one can have, is one value and one line that registers it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omninft.clips.media import write_clip
from omninft.evaluation import catalogue
from omninft.evaluation.catalogue import Choice, build_benchmark, metric_names
from omninft.evaluation.description import BenchmarkDescription, ClipForm, JudgeEntry, SetEntry
from omninft.evaluation.measured import MEASURED_METRICS, measured_judges
from omninft.evaluation.results import Metric
from omninft.evaluation.run import _generation, evaluate
from omninft.evaluation.set_metrics import video_distance
from omninft.rewards.formulas import score_table
from omninft.rewards.registry import ComponentSpec
from omninft.types import Clip, OmniNFTError, Prompt, ScoreTable


class Brightness:
    """Mean of the pixels in 0..1, times `gain`; remembers the device it was given."""

    name = "brightness"
    components = (ComponentSpec("light", "video", "mean of the pixels"), ComponentSpec("dark", "video", "the rest"))
    inputs = ("video",)
    licence = "this test's"
    model = None

    def __init__(self, gain: float = 1.0, device: str | None = None, wanted: tuple[str, ...] = ()) -> None:
        self.gain, self.device, self.wanted = gain, device, wanted

    def light(self, clip: Clip) -> float:
        return self.gain * float(clip.video.mean()) / 255

    def score(self, clips: list[Clip]) -> ScoreTable:
        return score_table(self.components, (self.light, lambda clip: 1 - self.light(clip)), clips)


BRIGHT = BenchmarkDescription(
    name="bright",
    version="7",
    metrics=(
        Metric("light", "Light", "mean of the pixels"),
        Metric("dark", "Dark", "the rest", higher_is_better=False),
        *MEASURED_METRICS,
    ),
    judges={
        "brightness": JudgeEntry(
            Brightness,
            ("light", "dark"),
            quirks={"doubled": {"gain": 2.0}},
            takes_device=True,
            takes_wanted=True,
            provenance="counted",
        ),
        **measured_judges(),
    },
    on_request=("dark", *(metric.name for metric in MEASURED_METRICS)),
    sets={"video": SetEntry(video_distance, ("fvd", "kvd"))},
    quirks=("doubled",),
    settings={"pixels": "all"},
    categories=lambda row: (f"words/{len(row.prompt.prompt_v.split())}",),
    form=ClipForm(0.5, 12.0, 8000),
    fetch_prompts="write them",
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalogue.BENCHMARKS, BRIGHT.name, BRIGHT)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    for i, level in enumerate((51, 102)):
        video = np.full((6, 32, 32, 3), level, np.uint8)
        clip = Clip(video, 12.0, np.zeros((1, 8000), np.float32), 16_000, Prompt("", "", "", ""))
        write_clip(folder / f"sample_{i:04d}.mp4", clip)
    (folder / "prompts.csv").write_text("text\nrain\nsome rain\n")
    return folder


def test_it_evaluates_a_folder_of_clips(clips: Path, tmp_path: Path) -> None:
    _, result = evaluate(clips, Choice("bright"), output=tmp_path / "out", name="mine")
    assert result is not None
    assert [m.name for m in result.metrics] == ["light"]
    assert result.overall["light"].value == pytest.approx(0.3, abs=0.01)
    assert {c: r["light"].count for c, r in result.categories.items()} == {"words/1": 1, "words/2": 1}
    assert (result.protocol.benchmark, result.protocol.version) == ("bright", "7")
    assert result.protocol.settings["pixels"] == "all"
    assert result.weights == {"brightness": "counted"}
    assert any(note.startswith("FVD, KVD: left out: no video features") for note in result.notes)
    assert not any("do not last" in note for note in result.notes)


def test_quirks_and_options_reach_the_judge_and_the_protocol() -> None:
    plain = build_benchmark(Choice("bright"))
    assert (plain.judges[0].gain, plain.judges[0].wanted, plain.seconds) == (1.0, ("light",), 0.5)
    quirky = build_benchmark(Choice("bright", compat=("bright",), device="cpu"))
    assert (quirky.judges[0].gain, quirky.judges[0].device) == (2.0, "cpu")
    own = build_benchmark(Choice("bright", compat=("doubled",), options=("brightness.gain=3",)))
    assert own.judges[0].gain == 3
    assert len({b.protocol([]).digest for b in (plain, quirky, own)}) == 3
    every = build_benchmark(Choice("bright", metrics=("light", "dark", "motion")))
    assert [m.name for m in every.metrics] == ["light", "dark", "motion"]
    assert metric_names("bright")[-2:] == ("fvd", "kvd")


def test_it_is_known_where_names_are_asked_for() -> None:
    with pytest.raises(OmniNFTError, match="expected one of: world, javisbench, bright"):
        build_benchmark(Choice("brigth"))
    with pytest.raises(OmniNFTError, match="unknown metric 'lihgt', did you mean 'light'"):
        build_benchmark(Choice("bright", metrics=("lihgt",)))
    with pytest.raises(OmniNFTError, match="unknown compat 'x', expected bright"):
        build_benchmark(Choice("bright", compat=("x",)))
    with pytest.raises(OmniNFTError, match="compat is of the benchmark javisbench, bright"):
        build_benchmark(Choice(compat=("doubled",)))
    with pytest.raises(OmniNFTError, match="bright needs its prompts: --prompts FILE; fetch them by: write them"):
        evaluate(None, Choice("bright"))
    made = _generation(Choice("bright"), "tiny", None, 0, None, (None, None))
    assert (made.seconds, made.frame_rate, made.audio_rate) == (0.5, 12.0, 8000)
