from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omninft.clips.media import read_clip, read_wav
from omninft.config import EvaluationConfig
from omninft.evaluation import generation
from omninft.evaluation.benchmark import Shard
from omninft.evaluation.generation import Generation, generate_missing, trimmed
from omninft.evaluation.settings import read_settings
from omninft.prompts.prompt_file import PromptRow
from omninft.prompts.sources import open_rows
from omninft.types import Clip, OmniNFTError, Prompt
from tests.moving_clips import moving_clip
from tests.random_models import make_policy


def test_a_full_model_is_asked_for_97_frames_with_the_published_settings(tmp_path: Path) -> None:
    asked = Generation(str(tmp_path), seconds=4.0, frame_rate=24.0, audio_rate=16_000).sampling()
    full = EvaluationConfig().sampling
    assert (asked.num_frames, asked.frame_rate, asked.num_steps) == (97, 24.0, 40)
    assert (asked.video_guidance, asked.audio_guidance) == (full.video_guidance, full.audio_guidance)
    changed = Generation(str(tmp_path), steps=20, audio_guidance=5.0).sampling()
    assert (changed.num_steps, changed.audio_guidance.text, changed.audio_guidance.stg) == (20, 5.0, 1.0)
    assert changed.num_frames is None


def test_the_bundled_model_keeps_its_size_and_goes_without_guidance() -> None:
    asked = Generation("tiny", seconds=4.0, frame_rate=24.0).sampling()
    assert (asked.num_frames, asked.num_steps, asked.video_guidance.text) == (None, 16, 1.0)


def test_clips_are_cut_to_96_frames_and_exactly_4_s() -> None:
    clip = moving_clip(0, frames=97, height=4, width=4, sample_rate=24_000)
    cut = trimmed(clip, 4.0)
    assert (len(cut.video), cut.waveform.shape[1]) == (96, 96_000)
    short = trimmed(Clip(clip.video[:90], 24.0, clip.waveform[:, :90_000], 24_000, clip.prompt), 4.0)
    assert (len(short.video), short.waveform.shape[1]) == (90, 96_000)
    assert not short.waveform[:, 90_000:].any()


def test_files_are_javisbenchs(tmp_path: Path) -> None:
    made = Generation(str(tmp_path), seconds=4.0, frame_rate=24.0, audio_rate=16_000)
    clip = moving_clip(0, frames=97, sample_rate=24_000)
    generation._write(tmp_path / "sample_0007", clip, made)
    wave, rate = read_wav(tmp_path / "sample_0007.wav")
    assert (rate, wave.shape) == (16_000, (2, 64_000))
    (tmp_path / "sample_0007.wav").unlink()  # a WAV beside the video would be its sound
    video = read_clip(tmp_path / "sample_0007.mp4")
    assert (len(video.video), video.frame_rate, video.waveform.shape) == (96, 24.0, (2, 96_000))
    assert video.video.shape[1:3] == (48 * 4, 64 * 4)  # enlarged to be watched


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A small random model in place of the bundled one; what was loaded."""
    loaded: list[Any] = []

    def load(model: str, lora: Path | None) -> tuple[Any, str]:
        loaded.append((model, lora))
        return make_policy(), "reference"

    monkeypatch.setattr(generation, "load_policy", load)
    return loaded


ROWS = open_rows("world:test")[:50:10]


def test_what_is_missing_is_made_once_and_the_same_in_shards(tmp_path: Path, policy: list[Any]) -> None:
    made = Generation("tiny", steps=1, audio_rate=16_000)
    steps: list[tuple[int, int]] = []
    generate_missing(ROWS, tmp_path / "a", made, lambda d, t: steps.append((d, t)))
    names = [f"sample_{row.index:04d}" for row in ROWS]
    assert sorted(p.stem for p in (tmp_path / "a").glob("*.mp4")) == names
    assert steps[0] == (0, 5)
    assert steps[-1] == (5, 5)
    before = {name: (tmp_path / "a" / f"{name}.mp4").stat().st_mtime_ns for name in names}
    (tmp_path / "a" / f"{names[2]}.mp4").unlink()
    for rank in (0, 1):
        generate_missing(ROWS, tmp_path / "a", made, share=Shard(rank, 2).share)
        generate_missing(ROWS, tmp_path / "b", made, share=Shard(rank, 2).share)
    after = {name: (tmp_path / "a" / f"{name}.mp4").stat().st_mtime_ns for name in names}
    assert [n for n in names if before[n] != after[n]] == [names[2]]
    for name in names:
        one, two = (read_wav(tmp_path / folder / f"{name}.wav")[0] for folder in "ab")
        np.testing.assert_allclose(one, two, atol=2e-3)
    assert len(policy) == 1 + 1 + 2  # a shard with nothing to do loads nothing
    listed = json.loads((tmp_path / "a" / "scores.json").read_text())["clips"]
    assert [e["prompt_id"] for e in listed] == [row.prompt.id for row in ROWS]


def test_clips_of_other_settings_are_not_mixed_in(tmp_path: Path, policy: list[Any]) -> None:
    generate_missing(ROWS[:1], tmp_path, Generation("tiny", steps=1))
    assert read_settings(tmp_path)["seed"] == 0
    with pytest.raises(OmniNFTError, match=r"made with seed 0, now 1; steps 1, now 2; choose another output"):
        generate_missing(ROWS[:1], tmp_path, Generation("tiny", steps=2, seed=1))
    assert read_settings(tmp_path / "none") == {}


def test_settings_say_what_made_the_clips(tmp_path: Path) -> None:
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    lora.write_bytes(b"abc")
    told = Generation("tiny", lora, seed=4, steps=3).describe()
    assert told["lora_sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (told["seed"], told["steps"], told["model"]) == (4, 3, "tiny")
    assert told["model_files"].startswith("sha256 ")
    assert told["model_files"] == Generation("tiny").describe()["model_files"]
    with pytest.raises(OmniNFTError, match="no LoRA at"):
        Generation("tiny", tmp_path / "absent").describe()


def test_noise_is_of_the_prompt_and_not_of_its_place(tmp_path: Path, policy: list[Any]) -> None:
    made = Generation("tiny", steps=1)
    one = PromptRow(0, Prompt("x", "a red ball bounces once", "a low tone rings once", "a red ball"))
    generate_missing([one], tmp_path / "a", made)
    moved = PromptRow(8, one.prompt)
    generate_missing([ROWS[0], moved], tmp_path / "b", made)
    first, second = (read_wav(tmp_path / n)[0] for n in ("a/sample_0000.wav", "b/sample_0008.wav"))
    np.testing.assert_allclose(first, second, atol=2e-3)
