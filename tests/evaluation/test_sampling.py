from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from omninft.clips.listing import read_listing
from omninft.clips.media import read_clip
from omninft.config import EvaluationConfig
from omninft.evaluation import sampling
from omninft.evaluation.generation import Generation
from omninft.evaluation.sampling import SampledClip, read_prompts, sample_clips
from omninft.evaluation.settings import SamplingChoice, model_sampling
from omninft.types import OmniNFTError
from tests.random_models import make_policy

ONE_STEP = SamplingChoice(steps=1)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A small random model in place of the bundled one; what was loaded."""
    found: list[Any] = []

    def load(model: str, lora: Path | None, strength: float) -> tuple[Any, str]:
        found.append(model)
        return make_policy(), "reference"

    monkeypatch.setattr(sampling, "load_policy", load)
    return found


def made(clips: list[SampledClip]) -> list[bool]:
    return [clip.made for clip in clips]


@pytest.mark.parametrize("source", ["prompts.json", "none.jsonl", "my prompts.txt", "folder/prompts", "a\\b", "x.csv"])
def test_what_looks_like_a_file_is_never_a_prompt(source: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.json").write_text("[]")
    with pytest.raises(OmniNFTError, match=r"no such file|unknown extension"):
        read_prompts(source)


def test_texts_are_prompts_of_ids_of_their_own() -> None:
    (one,), (two,) = read_prompts("A man and/or a dog"), read_prompts("A man and/or a cat")
    assert one.prompt_av == "A man and/or a dog"
    assert one.id.startswith("a-man-and-or-a-dog-")
    assert one.id != two.id
    assert len(read_prompts("x" * 5000)[0].id) <= 100
    with pytest.raises(OmniNFTError, match="the prompt is empty"):
        read_prompts(" ")


def test_the_same_call_goes_on_and_other_prompts_are_added(tmp_path: Path, loaded: list[Any]) -> None:
    first = sample_clips("a red ball", tmp_path, count=2, choice=ONE_STEP)
    assert made(first) == [True, True]
    first[1].path.unlink()
    assert made(sample_clips("a red ball", tmp_path, count=2, choice=ONE_STEP)) == [False, True]
    assert made(sample_clips("a red ball", tmp_path, count=2, choice=ONE_STEP)) == [False, False]
    other = sample_clips("a blue lamp", tmp_path, choice=ONE_STEP)
    assert len(loaded) == 3  # a call with nothing to do loads nothing
    assert {c.file for c in read_listing(tmp_path)} == {c.path.name for c in [*first, *other]}


def test_other_settings_are_refused_and_replace_by_force(tmp_path: Path, loaded: list[Any]) -> None:
    (old,) = sample_clips("a red ball", tmp_path, choice=ONE_STEP)
    before = old.path.read_bytes()
    with pytest.raises(OmniNFTError, match=r"made with seed 0, now 1; .* replace them by --force"):
        sample_clips("a blue lamp", tmp_path, seed=1, choice=ONE_STEP)
    with pytest.raises(OmniNFTError, match=r"found 24, expected \dk \+ 1 frames"):
        sample_clips("a blue lamp", tmp_path, choice=SamplingChoice(steps=1, frames=24), force=True)
    assert old.path.read_bytes() == before
    (new,) = sample_clips("a blue lamp", tmp_path, seed=1, choice=ONE_STEP, force=True)
    assert [p.name for p in tmp_path.glob("*.mp4")] == [new.path.name]
    assert made(sample_clips("a blue lamp", tmp_path, seed=1, choice=ONE_STEP)) == [False]


def test_an_id_that_now_means_another_prompt_is_refused(tmp_path: Path, loaded: list[Any]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "x", "prompt_av": "a red ball"}')
    sample_clips(str(rows), tmp_path / "out", choice=ONE_STEP)
    rows.write_text('{"id": "x", "prompt_av": "a blue lamp"}')
    with pytest.raises(OmniNFTError, match=r"x-0\.mp4 was made for another prompt, 'a red ball', now 'a blue lamp'"):
        sample_clips(str(rows), tmp_path / "out", choice=ONE_STEP)


def test_clips_of_unknown_making_are_left_alone(tmp_path: Path, loaded: list[Any]) -> None:
    (old,) = sample_clips("a red ball", tmp_path, choice=ONE_STEP)
    (tmp_path / "generation.json").unlink()
    with pytest.raises(OmniNFTError, match=r"no generation\.json"):
        sample_clips("a blue lamp", tmp_path, choice=ONE_STEP)
    assert old.path.is_file()


def test_a_call_that_ended_before_its_listing_lists_the_clip(tmp_path: Path, loaded: list[Any]) -> None:
    sample_clips("a red ball", tmp_path, choice=ONE_STEP)
    (tmp_path / "scores.json").unlink()
    sample_clips("a red ball", tmp_path, count=2, choice=ONE_STEP)
    assert [c.sample for c in read_listing(tmp_path)] == [0, 1]


def test_sizes_rate_and_frames_are_as_asked(tmp_path: Path, loaded: list[Any]) -> None:
    choice = SamplingChoice(size=(64, 32), frames=17, rate=8.0, steps=1)
    (clip,) = sample_clips("a red ball", tmp_path, choice=choice)
    read = read_clip(clip.path)
    scale = read.video.shape[1] // 32
    assert read.video.shape == (17, 32 * scale, 64 * scale, 3)
    assert read.frame_rate == 8.0
    with pytest.raises(OmniNFTError, match=r"found 40 pixels, expected a multiple of 32, e\.g\. 32 or 64"):
        sample_clips("a red ball", tmp_path / "b", choice=SamplingChoice(size=(40, 32), steps=1))
    assert not (tmp_path / "b").exists()


def test_a_first_frame_is_kept(tmp_path: Path) -> None:
    settings = SamplingChoice(steps=4)
    (lamp,) = sample_clips("a blue lamp flashes once a low buzz sounds once", tmp_path / "lamp", choice=settings)
    given = read_clip(lamp.path).video[0]
    cv2.imwrite(str(tmp_path / "first.png"), given[..., ::-1])
    row = {"id": "i2v", "prompt_av": "a red ball bounces once a low tone rings once", "first_frame_path": "first.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (kept,) = sample_clips(str(tmp_path / "rows.jsonl"), tmp_path / "out", choice=settings)
    (free,) = sample_clips(row["prompt_av"], tmp_path / "free", choice=settings)
    errors = [np.abs(read_clip(c.path).video[0].astype(float) - given).mean() for c in (kept, free)]
    assert errors[0] < 0.5 * errors[1]


def test_settings_are_the_models_own_and_shared_with_evaluate(tmp_path: Path) -> None:
    full = EvaluationConfig().sampling
    large, small = model_sampling(str(tmp_path)), model_sampling("tiny")
    assert (large.num_steps, large.video_guidance, large.audio_guidance, large.stg_blocks) == (
        40,
        full.video_guidance,
        full.audio_guidance,
        (),
    )
    assert (small.num_steps, small.video_guidance.text, small.video_guidance.stg) == (16, 1.0, 0.0)
    for model, own in ((str(tmp_path), large), ("tiny", small)):
        assert Generation(model).sampling() == SamplingChoice().of(model) == own


def test_each_choice_changes_its_own(tmp_path: Path) -> None:
    choice = SamplingChoice(stg=0.5, modality=2.0, rescale=0.1, video_guidance=4.0, negative="blur", stg_blocks=(3,))
    got = choice.of(str(tmp_path))
    assert got.video_guidance.model_dump() == {"text": 4.0, "stg": 0.5, "modality": 2.0, "rescale": 0.1}
    assert got.audio_guidance.text == 7.0
    assert (got.negative_prompt, got.stg_blocks, got.num_steps) == ("blur", (3,), 40)
    for wrong, said in (
        (SamplingChoice(negative="blur"), "off"),
        (SamplingChoice(rescale=2.0), r"rescale.*found 2\.0"),
    ):
        with pytest.raises(OmniNFTError, match=said):
            wrong.of("tiny")


def test_strength_scales_what_a_lora_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"")  # only its checksum is asked for

    def load(model: str, lora: Path | None, strength: float) -> tuple[Any, str]:
        policy = make_policy()
        torch.manual_seed(1)
        for key, tensor in policy.adapters.state("current").items():
            if key.endswith("lora_B"):
                tensor.normal_(0, 0.1)
        policy.adapters.load_state("current", sampling.at_strength(policy.adapters.state("current"), strength))
        return policy, "reference" if lora is None else "current"

    monkeypatch.setattr(sampling, "load_policy", load)

    def clip(name: str, lora: Path | None, strength: float = 1.0) -> bytes:
        return sample_clips("x", tmp_path / name, lora=lora, strength=strength, choice=ONE_STEP)[0].path.read_bytes()

    base, trained, half = clip("base", None), clip("trained", lora), clip("half", lora, 0.5)
    assert clip("off", lora, 0.0) == base
    assert len({base, trained, half}) == 3
    assert "strength" not in json.loads((tmp_path / "trained" / "generation.json").read_text())
    assert json.loads((tmp_path / "half" / "generation.json").read_text())["strength"] == 0.5
    with pytest.raises(OmniNFTError, match=r"made with strength 0\.5, now None"):
        clip("half", lora)
    with pytest.raises(OmniNFTError, match="a strength of 2 is that of a LoRA, and none is given"):
        clip("none", None, 2.0)
    with pytest.raises(OmniNFTError, match="found nan, expected a finite number"):
        clip("nan", lora, float("nan"))


def test_half_a_lora_adds_half() -> None:
    a, b, x = torch.randn(2, 6), torch.randn(5, 2), torch.randn(3, 6)
    state = sampling.at_strength({"m.lora_A": a, "m.lora_B": b}, 0.5)
    torch.testing.assert_close(x @ state["m.lora_A"].T @ state["m.lora_B"].T, 0.5 * (x @ a.T @ b.T))
