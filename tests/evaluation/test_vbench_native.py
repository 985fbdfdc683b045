from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
import torch

from omninft.evaluation import vbench_native
from omninft.evaluation.results import EvaluationResult
from omninft.evaluation.vbench import consistency
from omninft.evaluation.vbench_native import MEASUREMENTS, Judges, evaluate_native, flow_speeds
from omninft.evaluation.vbench_suite import read_suite
from omninft.types import Clip, OmniNFTError, Prompt
from tests.evaluation.vbench_files import write_clips, write_suite
from tests.moving_clips import moving_clip

NO_MODEL = ["temporal_flickering", "flow_motion_smoothness", "flow_dynamic_degree"]


class Mean:
    """A judge whose feature or score of a frame is its mean colour."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, video: np.ndarray, budget: int) -> np.ndarray:
        self.calls += 1
        return video.astype(np.float64).mean(axis=(1, 2, 3))

    def embed_frames(self, video: np.ndarray, budget: int) -> torch.Tensor:
        self.calls += 1
        axes = (1, 2) if video.shape[-1] == 3 else (2, 3)
        return torch.from_numpy(video.astype(np.float32).mean(axis=axes))


@pytest.fixture
def judges(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "weights"))
    return Judges(dino=Mean(), clip=Mean(), aesthetic=Mean(), imaging=Mean())


def clip_of(video: np.ndarray, rate: float = 24.0) -> Clip:
    return Clip(video, rate, np.zeros((0, 0), np.float32), 0, Prompt("p", "", "", ""))


def moved(pixels: float, frames: int = 25, height: int = 128, width: int = 160) -> np.ndarray:
    """A texture of soft spots that moves to the right, `pixels` a frame."""
    rng = np.random.default_rng(1)
    coarse = rng.uniform(0, 255, (height // 8, width))
    rows = np.repeat(coarse, 8, axis=0)
    places = np.arange(width)[None] - pixels * np.arange(frames)[:, None]
    spots = np.sin(places[:, None, :] / 6 + rows[None, :, :1]) * np.cos(places[:, None, :] / 9.7)
    return np.repeat((127 + 100 * spots)[..., None], 3, axis=-1).astype(np.uint8)


def test_custom_clips_are_measured_in_everything(tmp_path, judges):
    write_clips(tmp_path / "clips", ["a ball-0.mp4", "a ball-1.mp4", "a dog.mp4"])
    result = evaluate_native(tmp_path / "clips", judges=judges)
    assert [c.prompt for c in result.clips] == ["a ball", "a ball", "a dog"]
    assert all(set(c.scores) == set(MEASUREMENTS) for c in result.clips)
    video = vbench_native.read_clip(tmp_path / "clips" / "a dog.mp4", require_audio=False).video.astype(np.float64)
    dog = result.clips[2].scores
    assert dog["temporal_flickering"] == pytest.approx(1 - np.abs(np.diff(video, axis=0)).mean() / 255)
    assert dog["subject_consistency"] == pytest.approx(consistency(video.mean(axis=(1, 2))))
    assert dog["background_consistency"] == pytest.approx(consistency(video[:, :, 8:56].mean(axis=(1, 2))), abs=2e-3)
    assert dog["aesthetic_quality"] == pytest.approx(video.mean() / 10)
    assert dog["imaging_quality"] == pytest.approx(video.mean() / 100)
    assert result.overall["temporal_flickering"].value == pytest.approx(
        np.mean([c.scores["temporal_flickering"] for c in result.clips])
    )
    assert result.protocol.settings["implementation"].startswith("omninft ")


def test_consistency_is_a_mean_over_frames_not_clips(tmp_path, judges):
    write_clips(tmp_path, ["a-0.mp4"], frames=3)
    write_clips(tmp_path, ["b-0.mp4"], frames=11)
    result = evaluate_native(tmp_path, ["subject_consistency", "temporal_flickering"], judges=judges)
    for name, weights in (("subject_consistency", [2, 10]), ("temporal_flickering", [1, 1])):
        scores = [c.scores[name] for c in result.clips]
        assert result.overall[name].value == pytest.approx(np.average(scores, weights=weights), abs=1e-12)


def test_clips_of_the_suite_are_measured_in_their_dimensions(tmp_path, judges):
    suite = read_suite(write_suite(tmp_path))
    folder = tmp_path / "clips"
    names = ["In a still frame, a stop sign-0.mp4", "alley-0.mp4", "alley-1.mp4", "The bund, oil painting-4.mp4"]
    write_clips(folder, [*names, "stranger-0.mp4"])
    result = evaluate_native(folder, suite=suite, judges=judges)
    by_file = {c.file: c for c in result.clips}
    assert set(by_file["alley-0.mp4"].scores) == {"background_consistency"}
    assert set(by_file[names[0]].scores) == {"temporal_flickering"}
    assert set(by_file[names[3]].scores) == {"aesthetic_quality", "imaging_quality"}
    assert "stranger-0.mp4" not in by_file
    assert any("1 files are no clips of the suite" in note for note in result.notes)
    # 5 prompts with 5 samples; what is not there is missing, with the reason.
    assert len(result.clips) == 25
    found = result.overall["background_consistency"]
    assert (found.count, found.missing) == (2, 3)
    assert "no such file" in by_file["alley-2.mp4"].reasons["background_consistency"]
    assert result.overall["flow_dynamic_degree"].value is None
    assert result.overall["flow_dynamic_degree"].missing == 5


def test_substitutes_never_enter_totals(tmp_path, judges):
    write_clips(tmp_path, ["a-0.mp4"])
    result = evaluate_native(tmp_path, judges=judges)
    assert result.overall["total_score"].value is None
    assert "motion_smoothness, dynamic_degree" in result.notes[-1]
    assert "flow" not in next(m for m in result.metrics if m.name == "quality_of_measured").description


def test_missing_weights_are_told_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    write_clips(tmp_path / "clips", ["a-0.mp4"])
    paths = dict.fromkeys(("dino", "clip", "aesthetic", "imaging"), tmp_path / "none")
    result = evaluate_native(tmp_path / "clips", judges=Judges(paths))
    assert [m.name for m in result.metrics][:3] == NO_MODEL
    told = [note for note in result.notes if "was left out" in note]
    assert len(told) == 4
    assert any("dino_vitbase16_pretrain.pth" in note and "curl" in note for note in told)
    with pytest.raises(OmniNFTError, match=r"imaging_quality: MUSIQ.*missing musiq_spaq_ckpt"):
        evaluate_native(tmp_path / "clips", ["imaging_quality"], judges=Judges(paths))
    with pytest.raises(OmniNFTError, match="not measured here: scene"):
        evaluate_native(tmp_path / "clips", ["scene"])
    with pytest.raises(OmniNFTError, match="no judge of VBench: raft"):
        Judges({"raft": tmp_path})


def test_checksums_of_weights_are_part_of_the_protocol(tmp_path, monkeypatch):
    file = tmp_path / "musiq_spaq_ckpt-358bb6af.pth"
    digests = []
    monkeypatch.setattr(Judges, "LOADERS", Judges.LOADERS | {"imaging": lambda *_: Mean()})
    write_clips(tmp_path / "clips", ["a-0.mp4"])
    for content in (b"abc", b"abd"):
        file.write_bytes(content)
        result = evaluate_native(tmp_path / "clips", ["imaging_quality"], judges=Judges({"imaging": file}))
        assert result.protocol.settings["weights"]["imaging"] == {file.name: hashlib.sha256(content).hexdigest()}
        assert "MUSIQ, SPAQ" in result.weights["imaging"]
        assert "revision not pinned" in result.weights["imaging"]
        digests.append(result.protocol.digest)
    assert digests[0] != digests[1]


def test_an_unreadable_clip_is_missing_and_the_others_count(tmp_path, judges):
    write_clips(tmp_path, ["a-0.mp4", "b-0.mp4"])
    (tmp_path / "a-0.mp4").write_bytes(b"not a video")
    write_clips(tmp_path, ["c-0.mp4"], frames=1)
    result = evaluate_native(tmp_path, NO_MODEL, judges=judges)
    first, _, third = result.clips
    assert first.scores == dict.fromkeys(first.scores)
    assert "a-0.mp4" in first.reasons["temporal_flickering"]
    assert "needs 2 frames, found 1" in third.reasons["flow_dynamic_degree"]
    assert (result.overall["temporal_flickering"].count, result.overall["temporal_flickering"].missing) == (1, 2)


def test_a_stopped_evaluation_goes_on(tmp_path, judges, monkeypatch):
    clips, output = tmp_path / "clips", tmp_path / "out"
    write_clips(clips, ["a-0.mp4", "b-0.mp4", "c-0.mp4"])
    whole = evaluate_native(clips, ["aesthetic_quality"], judges=judges)
    judge = judges["aesthetic"]

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_native(clips, ["aesthetic_quality"], judges=judges, output=output, progress=stop)
    with (output / "clips.partial.jsonl").open("a") as journal:
        journal.write('{"row": {"fi')  # torn by the power cut
    os.utime(clips / "a-0.mp4", (1, 1))  # changed since
    with pytest.raises(OmniNFTError, match="unfinished scores of other settings"):
        evaluate_native(clips, ["imaging_quality"], judges=judges, output=output)
    judge.calls = 0
    result = evaluate_native(clips, ["aesthetic_quality"], judges=judges, output=output)
    assert judge.calls == 2
    assert result == whole
    assert EvaluationResult.load(output) == whole
    assert os.listdir(output) == ["result.json"]
    assert json.loads((output / "result.json").read_text())["overall"]["aesthetic_quality"]["count"] == 3


def test_folders_without_clips(tmp_path, judges):
    with pytest.raises(OmniNFTError, match="no such folder"):
        evaluate_native(tmp_path / "none", judges=judges)
    with pytest.raises(OmniNFTError, match="no mp4 files"):
        evaluate_native(tmp_path, judges=judges)
    suite = read_suite(write_suite(tmp_path))
    write_clips(tmp_path / "clips", ["x-0.mp4"])
    with pytest.raises(OmniNFTError, match=r"no clip has a name of the suite.*found 'x-0\.mp4'"):
        evaluate_native(tmp_path / "clips", suite=suite, judges=judges)


@pytest.mark.parametrize(("pixels", "dynamic"), [(0.0, 0.0), (0.5, 0.0), (1.5, 1.0), (3.0, 1.0)])
def test_flow_dynamic_degree_of_known_speeds(pixels, dynamic):
    # Every third frame at 24 Hz: three times `pixels` a pair, against 6 / 256 of 128 pixels = 3.
    clip = clip_of(moved(pixels))
    assert MEASUREMENTS["flow_dynamic_degree"].score(clip, Judges()) == dynamic
    speeds, height, width = flow_speeds(clip)
    assert (len(speeds), height, width) == (8, 128, 160)
    if pixels < 3:
        np.testing.assert_allclose(speeds, 3 * pixels, atol=0.5)


def test_flow_frames_are_brought_to_a_size():
    for side, expected in ((32, 64), (100, 100), (300, 256)):
        clip = clip_of(moving_clip(0, 4, side, 2 * side).video)
        assert flow_speeds(clip)[1:] == (expected, 2 * expected)


def test_smoothness_tells_steady_from_jerky_motion():
    steady = MEASUREMENTS["flow_motion_smoothness"].score(clip_of(moved(1.0)), Judges())
    video = moved(1.0).copy()
    video[1::2] = video[::2][:12]  # every second frame stands still: the picture moves in steps
    jerky = MEASUREMENTS["flow_motion_smoothness"].score(clip_of(video), Judges())
    assert steady > 0.995
    assert jerky < steady - 0.02
