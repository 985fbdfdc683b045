"""Pairs of clips for the demo page, without a browser."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from omninft.clips.media import read_clip
from omninft.config import LoraConfig, ModelConfig
from omninft.evaluation.sampling import sample_clips
from omninft.evaluation.settings import SamplingChoice, clip_size
from omninft.evaluation.wording import word_warning
from omninft.export.lora import export_lora
from omninft.gallery import demo
from omninft.gallery.demo import EXAMPLES, SideBySide, exported_loras
from omninft.models.ltx2 import LTX2Policy
from omninft.types import OmniNFTError, Prompt
from tests.random_models import SMALL, random_pipeline

PROMPT = EXAMPLES[0]
ONE_STEP = SamplingChoice(steps=1)


def policy_of(rank: int) -> LTX2Policy:
    config = ModelConfig(lora=LoraConfig(rank=rank, alpha=4))
    return LTX2Policy(random_pipeline("ltx-2"), config, clip_defaults=SMALL)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A small random model in place of the bundled one; what was loaded."""
    found: list[Any] = []

    def load(config: Any, seed: int = 0) -> LTX2Policy:
        found.append(config)
        return LTX2Policy(random_pipeline("ltx-2"), config, clip_defaults=SMALL)

    monkeypatch.setattr(demo.LTX2Policy, "load", load)
    return found


def test_base_and_trained_begin_with_one_noise_and_strength_0_is_the_base(
    tmp_path: Path, loaded: list[Any], moved_policy: LTX2Policy
) -> None:
    lora = str(export_lora(moved_policy.adapters, tmp_path / "export").parent)
    told: list[tuple[int, int, str]] = []
    made = SideBySide("tiny", tmp_path)
    pair = made.generate(PROMPT, lora, seed=3, choice=ONE_STEP, progress=lambda *now: told.append(now))
    off = made.generate(PROMPT, lora, 0.0, seed=3, choice=ONE_STEP)
    half = made.generate(PROMPT, lora, 0.5, seed=3, choice=ONE_STEP)
    other = made.generate(PROMPT, "", seed=4, choice=ONE_STEP)
    assert pair.trained is not None
    assert off.trained is not None
    assert half.trained is not None
    base = pair.base.read_bytes()
    assert off.base.read_bytes() == off.trained.read_bytes() == half.base.read_bytes() == base
    assert len({base, pair.trained.read_bytes(), half.trained.read_bytes(), other.base.read_bytes()}) == 4
    assert other.trained is None
    assert len(loaded) == 1
    assert told == [(0, 3, "loading the model"), (1, 3, "sampling, base"), (2, 3, "sampling, trained")]
    assert f"{lora} at strength 0.5, seed 3, 1 steps" in half.message
    assert "no LoRA" in other.message


def test_the_base_is_what_sample_makes(tmp_path: Path) -> None:
    pair = SideBySide("tiny", tmp_path).generate(PROMPT, seed=5, choice=ONE_STEP)
    (clip,) = sample_clips(PROMPT, tmp_path / "out", seed=5, choice=ONE_STEP)
    assert pair.base.read_bytes() == clip.path.read_bytes()
    assert read_clip(pair.base).waveform.any()


def test_a_lora_of_another_rank_loads_the_model_again(tmp_path: Path, loaded: list[Any]) -> None:
    loras = [str(export_lora(policy_of(rank).adapters, tmp_path / str(rank)).parent) for rank in (2, 3)]
    made = SideBySide("tiny", tmp_path)
    made.load(loras[0])
    for lora in (loras[0], "", loras[1], ""):
        made.generate(PROMPT, lora, choice=ONE_STEP)
    assert [config.lora.rank for config in loaded] == [2, 3]


def test_calls_at_one_time_do_not_collide(tmp_path: Path, loaded: list[Any], moved_policy: LTX2Policy) -> None:
    lora = str(export_lora(moved_policy.adapters, tmp_path / "export").parent)
    made = SideBySide("tiny", tmp_path)
    alone = {s: made.generate(PROMPT, lora, s, choice=ONE_STEP).trained.read_bytes() for s in (0.5, 1.0, 2.0)}  # type: ignore[union-attr]
    found: dict[float, bytes] = {}

    def ask(strength: float) -> None:
        pair = made.generate(PROMPT, lora, strength, choice=ONE_STEP)
        assert pair.trained is not None
        found[strength] = pair.trained.read_bytes()

    threads = [threading.Thread(target=ask, args=(s,)) for s in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone
    assert len(list(tmp_path.glob("*.mp4"))) == 12


def test_unknown_words_are_named_and_errors_are_one_line(tmp_path: Path, loaded: list[Any]) -> None:
    made = SideBySide("tiny", tmp_path)
    assert "tiny does not know violin, plays" in made.generate("a violin plays", choice=ONE_STEP).message
    for asked, said in (
        (dict(prompt=" "), "the prompt is empty"),
        (dict(prompt=PROMPT, lora=str(tmp_path / "none")), "no LoRA at"),
        (dict(prompt=PROMPT, strength=float("inf")), "expected a finite number"),
        (dict(prompt=PROMPT, choice=SamplingChoice(frames=24)), r"found 24, expected \dk \+ 1 frames"),
    ):
        with pytest.raises(OmniNFTError, match=said) as caught:
            made.generate(**asked)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    # A text is never a file: the page reads none.
    (tmp_path / "rows.txt").write_text(PROMPT)
    assert "does not know" in made.generate(str(tmp_path / "rows.txt"), choice=ONE_STEP).message


def test_examples_are_in_the_models_words() -> None:
    assert word_warning("tiny", [Prompt("x", text, text, text) for text in EXAMPLES]) is None


def test_runs_are_found_the_newest_first(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old")):
        file = tmp_path / name / "export" / "pytorch_lora_weights.safetensors"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
        os.utime(file, (1000 - age, 1000 - age))
    (tmp_path / "unfinished").mkdir()
    assert exported_loras(tmp_path) == [str(tmp_path / "new" / "export"), str(tmp_path / "old" / "export")]


def test_sizes_are_read() -> None:
    assert clip_size("768x512") == clip_size(" 768X512 ") == (768, 512)
    assert clip_size("") is None
    with pytest.raises(OmniNFTError, match="expected WIDTHxHEIGHT"):
        clip_size("768")
