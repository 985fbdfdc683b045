"""Whole evaluations of folders of clips with known defects, through files and the command line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from omninft.cli import app
from omninft.clips.media import write_clip, write_wav
from omninft.evaluation import run as run_module
from omninft.evaluation.catalogue import Choice
from omninft.evaluation.results import EvaluationResult
from omninft.evaluation.run import evaluate
from omninft.evaluation.world_benchmark import METRICS
from omninft.types import Clip, OmniNFTError
from omninft.worlds.dataset import world_batch, world_clips

Change = Callable[[Clip, Clip], Clip]


def late(clip: Clip, other: Clip) -> Clip:
    return replace(clip, waveform=np.pad(clip.waveform, ((0, 0), (2400, 0)))[:, :-2400], views={})  # 150 ms


CHANGES: dict[str, Change] = {
    "true": lambda clip, other: clip,
    "late": late,
    "swapped": lambda clip, other: replace(clip, waveform=other.waveform, views={}),
    "black": lambda clip, other: replace(clip, video=np.zeros_like(clip.video), views={}),
    "silent": lambda clip, other: replace(clip, waveform=np.zeros_like(clip.waveform), views={}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per defect, of eight clips: mp4 enlarged fourfold with AAC alone; and their prompts."""
    base = tmp_path_factory.mktemp("systems")
    batch = world_batch(8, seed=11)
    clips = world_clips(batch, batch.video, batch.waveforms[:, None])
    for name, change in CHANGES.items():
        for i, clip in enumerate(clips):
            write_clip(base / name / f"sample_{i:04d}.mp4", change(clip, clips[i - 1]), upscale=4)
    for name, shift in (("prompts", 0), ("wrong", 1)):
        with (base / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "audio_text", "cat0_ind"])
            for i in range(len(clips)):
                p = clips[i - shift].prompt
                writer.writerow([p.prompt_v, p.prompt_a, i % 2])
    return base


@pytest.fixture(scope="module")
def results(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, EvaluationResult]:
    found = {}
    for name in (*CHANGES, "wrong"):
        clips, prompts = (folders / "true", "wrong.csv") if name == "wrong" else (folders / name, "prompts.csv")
        choice = Choice(metrics=(*(m.name for m in METRICS), "av_align", "flicker", "motion"))
        output = tmp_path_factory.mktemp("out")
        _, result = evaluate(clips, choice, prompts=str(folders / prompts), name=name, output=output)
        assert result is not None
        found[name] = result
    return found


# Defect -> columns that must be worse by more than 0.05 than those of the true clips; the rest must not be.
WORSE = {
    "late": {"javis_score", "desync", "av_align"},
    "swapped": {"ta_ib", "clap", "av_ib", "avh_score", "javis_score", "desync", "av_align"},
    "black": {"vq", "tv_ib", "clip", "av_ib", "avh_score", "javis_score", "desync", "av_align"},
    "silent": {"aq", "ta_ib", "clap", "av_ib", "avh_score", "javis_score", "desync", "av_align"},
    "wrong": {"tv_ib", "ta_ib", "clip", "clap"},
}


@pytest.mark.parametrize("defect", WORSE)
def test_defects_rank_where_they_must(results: dict[str, EvaluationResult], defect: str) -> None:
    true, found = results["true"], results[defect]
    assert true.protocol.digest == found.protocol.digest or defect == "wrong"
    worse = set()
    for metric in true.metrics:
        if metric.name in ("flicker", "motion"):
            continue  # more is not always better; see below
        a, b = true.overall[metric.name].value, found.overall[metric.name].value
        assert a is not None
        assert b is not None
        if (a - b if metric.higher_is_better else b - a) > 0.05:
            worse.add(metric.name)
    assert worse == WORSE[defect]


def test_offsets_are_read_in_seconds_through_files(results: dict[str, EvaluationResult]) -> None:
    values = {name: results[name].overall["desync"].value for name in ("true", "late")}
    assert values["true"] == pytest.approx(0.0, abs=0.01)
    assert values["late"] == pytest.approx(0.15, abs=0.015)


def test_flicker_and_motion_see_a_black_picture(results: dict[str, EvaluationResult]) -> None:
    true, black = (results[name].overall for name in ("true", "black"))
    assert black["motion"].value == pytest.approx(0, abs=1e-6)
    assert true["motion"].value > 0.05  # type: ignore[operator]
    assert black["flicker"].value == 1.0
    assert 0.8 < true["flicker"].value < 1.0  # type: ignore[operator]


def test_dnsmos_judges_sound_where_its_packages_are(folders: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("speechmos")
    choice, prompts = Choice(metrics=("dnsmos",)), str(folders / "prompts.csv")
    _, result = evaluate(folders / "true", choice, prompts=prompts, limit=1, output=tmp_path)
    assert result is not None
    assert 1.0 <= result.overall["dnsmos"].value <= 2.5  # type: ignore[operator]  # no speech
    assert "speechmos" in result.weights["dnsmos"]


def test_world_prompts_make_categories(results: dict[str, EvaluationResult]) -> None:
    assert {"kind/ball", "kind/lamp", "square/with"} <= set(results["true"].categories)


def test_the_command_with_holes_stereo_and_another_rate(folders: Path, tmp_path: Path) -> None:
    """As a person uses it: one file damaged, one without sound, one stereo at 48 kHz beside a WAV, one not there."""
    clips = tmp_path / "mine"
    clips.mkdir()
    for i in range(7):
        (clips / f"sample_{i:04d}.mp4").write_bytes((folders / "true" / f"sample_{i:04d}.mp4").read_bytes())
    (clips / "sample_0001.mp4").write_bytes(b"\x00" * 100)
    batch = world_batch(8, seed=11)
    write_clip(clips / "sample_0002.mp4", world_clips(batch, batch.video, batch.waveforms[:, None, :0])[2], upscale=2)
    wave = np.repeat(batch.waveforms[3], 3)[None].repeat(2, axis=0)
    write_wav(clips / "sample_0003.wav", wave, 48_000)
    arguments = ["evaluate", str(clips), "--prompts", str(folders / "prompts.csv"), "--metrics", "vq,aq,desync"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out"), "--name", "mine"])
    assert done.exit_code == 0, done.output
    assert "mine on world" in done.output
    result = EvaluationResult.load(tmp_path / "out")
    assert {n: (r.count, r.missing) for n, r in result.overall.items()} == {
        "vq": (6, 2),
        "aq": (5, 3),
        "desync": (5, 3),
    }
    assert result.clips[3].scores["desync"] == pytest.approx(0, abs=0.01)
    assert "the clip has no sound" in result.clips[2].reasons["aq"]
    assert any("2 of 8 clips could not be read" in note for note in result.notes)
    assert (tmp_path / "out" / "table.md").read_text().startswith("# mine on world")
    assert (tmp_path / "out" / result.clips[0].file).resolve() == (clips / "sample_0000.mp4").resolve()


def test_javisbench_on_a_folder_leaves_out_what_it_cannot(folders: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setattr("omninft.scorers.weights.try_to_load_from_cache", lambda *a, **k: None)
    _, result = evaluate(
        folders / "true", Choice("javisbench"), prompts=str(folders / "prompts.csv"), output=tmp_path, limit=4
    )
    assert result is not None
    assert [m.name for m in result.metrics] == ["av_align"]
    assert [c.index for c in result.clips] == [0, 2, 4, 6]
    assert set(result.categories) == {"event_scenario/0"}
    assert "4 of 4 clips do not last 4 s (2.08 to 2.08 s)" in result.notes
    assert result.system == "true"
    with pytest.raises(OmniNFTError, match="hf download laion/clap"):
        evaluate(
            folders / "true", Choice("javisbench", metrics=("clap",), strict=True), prompts=str(folders / "prompts.csv")
        )


def test_prompts_are_asked_for_where_nothing_tells_them(folders: Path) -> None:
    with pytest.raises(OmniNFTError, match="give a prompt file"):
        evaluate(folders / "true", Choice())
    with pytest.raises(OmniNFTError, match=r"hf download JavisDiT/JavisBench JavisBench\.csv --repo-type dataset"):
        evaluate(None, Choice("javisbench"))


def test_a_model_is_evaluated_with_no_argument(tmp_path: Path, monkeypatch) -> None:
    """Made, scored, summed; again from its own folder of clips, with the same numbers and protocol."""
    monkeypatch.chdir(tmp_path)
    steps: list[tuple[str, int, int]] = []
    folder, result = evaluate(steps=2, limit=3, progress=lambda *step: steps.append(step))
    assert folder == Path("evaluations/tiny")
    assert result is not None
    assert len(result.clips) == 3
    assert all(r.count == 3 for r in result.overall.values())
    assert result.generation["steps"] == 2
    assert {stage for stage, _, _ in steps} == {"sampling", "scoring"}
    assert sorted(p.name for p in folder.iterdir()) == ["clips", "result.json", "table.csv", "table.md"]
    assert all((folder / "clips" / c.file).is_file() for c in result.clips)
    _, again = evaluate(folder / "clips", output=tmp_path / "again")
    assert again is not None
    assert again.system == "tiny"
    assert again.protocol == result.protocol
    assert again.overall == result.overall
    assert again.generation["seed"] == 0
    assert json.loads((folder / "result.json").read_text())["protocol"]["benchmark"] == "world"


def test_a_prompt_file_in_the_folder_of_clips_is_found(folders: Path, tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "sample_0001.mp4").write_bytes((folders / "true" / "sample_0001.mp4").read_bytes())
    (clips / "prompts.csv").write_text((folders / "prompts.csv").read_text())
    _, result = evaluate(clips, Choice(metrics=("tv_ib",)), output=tmp_path / "out")
    assert result is not None
    assert result.clips[1].scores["tv_ib"] > 0.95  # type: ignore[operator]
    assert result.overall["tv_ib"].missing == 7


def test_torchruns_variables_make_shards(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run_module._shard(None) == run_module.Shard(1, 4)
    assert run_module._shard("0/2") == run_module.Shard(0, 2)
