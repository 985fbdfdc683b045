from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from omninft.config import RewardConfig
from omninft.rewards.registry import ComponentSpec
from omninft.rewards.verification import is_verified, read_reference_clips, verify, write_reference_clips
from omninft.scorers.weights import JudgingModel
from omninft.types import Clip, OmniNFTError, ScoreTable


def brightness(clips: list[Clip]) -> list[float]:
    """Mean of the first frame."""
    return [float(c.video[0].mean()) for c in clips]


def drifting(clips: list[Clip]) -> list[float]:
    """Depends on how many clips it sees at once."""
    return [float(c.video[0].mean()) + len(clips) for c in clips]


def viewing(clips: list[Clip]) -> list[float]:
    """Leaves a derived view in every clip."""
    return [c.view("first mean", lambda clip: float(clip.video[0].mean())) for c in clips]


def failing(clips: list[Clip]) -> list[float | None]:
    """Cannot judge one of them."""
    return [None if c.prompt.id.endswith("2") else 1.0 for c in clips]


class Modelled:
    """A reward over a model that nobody compared with anything."""

    name, licence, inputs = "modelled", "MIT", ("video",)
    components = (ComponentSpec("modelled", "video", ""),)
    model = JudgingModel("Judge", 1, "MIT", True)

    def score(self, clips: list[Clip]) -> ScoreTable:
        return ScoreTable((self.components[0].component,), np.array([[float(c.video[0].mean())] for c in clips]))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    folder = tmp_path_factory.mktemp("reference")
    assert len(write_reference_clips(folder)) == 4
    return read_reference_clips(folder)


def findings(name: str, clips: list[Clip], official: Path | None = None) -> dict[str, tuple[bool, str]]:
    config = RewardConfig(name=f"{__name__}:{name}", route="video")
    return {f.subject: (f.ok, f.text) for f in verify(config, clips, official)}


def official_scores(path: Path, clips: list[Clip], error: float = 0.0, name: str = "brightness") -> Path:
    rows = [
        {"file": f"{c.prompt.id}.mp4", "scores": {name: float(c.video[0].mean()) + error * (i == 1)}}
        for i, c in enumerate(clips)
    ]
    path.write_text(json.dumps({"source": "theirs", "tolerance": 0.5, "clips": rows}))
    return path


def test_reference_clips_have_pictures_sound_and_prompts(clips: list[Clip]) -> None:
    assert [c.prompt.id for c in clips] == [f"reference-{i}" for i in range(4)]
    assert all(c.video.shape[1:] == (256, 256, 3) and c.waveform.size and c.prompt.prompt_a for c in clips)


def test_agreement_with_official_scores(clips: list[Clip], tmp_path: Path) -> None:
    found = findings("brightness", clips, official_scores(tmp_path / "o.json", clips))
    assert list(found) == ["files", "scores", "batch", "order", "official"]
    assert all(ok for ok, _ in found.values())
    assert found["official"][1] == "within 0 of theirs, tolerance 0.5"


def test_a_model_that_agrees_is_verified_from_then_on(clips, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path))
    assert not is_verified("modelled", Modelled.model)
    path = official_scores(tmp_path / "o.json", clips, name="modelled", error=2.0)
    config = RewardConfig(name=f"{__name__}:Modelled")
    assert not list(verify(config, clips, path))[-1].ok
    assert not is_verified("modelled", Modelled.model)
    path = official_scores(tmp_path / "o.json", clips, name="modelled")
    assert list(verify(config, clips, path))[-1].ok
    assert is_verified("modelled", Modelled.model)


def test_disagreement_names_the_worst_clip(clips: list[Clip], tmp_path: Path) -> None:
    ok, text = findings("brightness", clips, official_scores(tmp_path / "o.json", clips, error=2.0))["official"]
    assert not ok
    assert text.startswith("differs by 2, more than 0.5 (brightness of reference-1: ")


def test_a_measurement_needs_no_official_scores(clips: list[Clip]) -> None:
    assert findings("brightness", clips)["official"] == (True, "a measurement: nothing to compare with")


def test_without_official_scores_no_model_is_verified(clips: list[Clip]) -> None:
    found = {f.subject: (f.ok, f.text) for f in verify(RewardConfig(name=f"{__name__}:Modelled"), clips)}
    ok, text = found["official"]
    assert not ok
    assert "no official scores ship for this reward yet" in text


def test_official_scores_of_other_clips_are_refused(clips: list[Clip], tmp_path: Path) -> None:
    path = official_scores(tmp_path / "o.json", clips[:3])
    assert findings("brightness", clips, path)["official"] == (
        False,
        "official scores lack reference-3 or some of: brightness",
    )


def test_a_score_that_depends_on_the_batch_is_found(clips: list[Clip]) -> None:
    found = findings("drifting", clips)
    assert not found["batch"][0]
    mean = min(float(c.video[0].mean()) for c in clips)
    assert f"differ from single ones by {3 / (mean + 1):.2g}, expected at most 0.001" in found["batch"][1]


def test_a_missing_score_ends_the_checks(clips: list[Clip]) -> None:
    found = findings("failing", clips)
    assert list(found) == ["files", "scores"]
    assert found["scores"] == (False, "reference-2: returned None")


def test_clips_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(OmniNFTError, match="no reference clips in"):
        read_reference_clips(tmp_path)


def test_scores_are_computed_afresh(clips: list[Clip]) -> None:
    assert findings("viewing", clips)["batch"][0]
    assert all(c.views == {} for c in clips)  # each check had copies, and computed its views anew
