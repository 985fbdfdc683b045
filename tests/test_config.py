"""Recipes and overrides: defaults, inheritance, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from omninft.config import Config, build_config, load_config, recipe_names
from omninft.types import OmniNFTError


def test_every_shipped_recipe_loads() -> None:
    assert {"omninft", "gdpo", "diffusion_nft", "placebo", "paper"} <= set(recipe_names())
    for name in recipe_names():
        assert load_config(name).recipe == name


def test_defaults_are_the_papers() -> None:
    config = Config()
    assert (config.prompts.per_iteration, config.prompts.group_size, config.sampling.num_steps) == (4, 8, 20)
    assert (config.optimiser.learning_rate, config.optimiser.weight_decay) == (3e-5, 1e-4)
    assert (config.model.lora.rank, config.model.lora.alpha) == (32, 64)
    assert (config.sampling.video_guidance.text, config.sampling.audio_guidance.text) == (1.5, 3.0)
    assert (config.objective.beta, config.objective.advantage_clip, config.objective.reference_weight) == (1, 5, 1e-4)
    assert config.objective.sigmas.fraction == 0.4


def test_a_recipe_differs_from_its_base_in_its_own_keys_only() -> None:
    ours, gdpo = load_config("omninft"), load_config("gdpo")
    changed = {k for k, v in gdpo.fingerprint().items() if v != ours.fingerprint()[k]}
    assert changed == {"credit.advantage.method", "credit.surgery.enabled", "credit.regions.enabled"}


def test_overrides_are_typed() -> None:
    config = load_config("omninft", ["optimiser.learning_rate=1e-4", "run.iterations=3", "credit.regions.rope=false"])
    assert config.optimiser.learning_rate == 1e-4
    assert config.run.iterations == 3
    assert config.credit.regions.rope is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.learning_rat=1", r"unknown key 'optimiser\.learning_rat', did you mean 'learning_rate'"),
        ("optimizer.learning_rate=1", r"unknown key 'optimizer', did you mean 'optimiser'"),
        ("run.iterations=0", r"run\.iterations: .*greater than or equal to 1; found 0"),
        ("run.iterations", r"expected key=value"),
        ("model.lora.alpha=0", r"model\.lora\.alpha: .*greater than 0; found 0"),
        ("credit.advantage.method=grpo", r"credit\.advantage\.method: .*'omninft', 'gdpo' or 'global'; found 'grpo'"),
        ("objective.sigmas.choice=list", r"needs values in \(0, 1\]"),
        ("credit.regions.window=[0.9, 0.5]", r"window must rise"),
    ],
)
def test_errors_name_the_key_and_what_was_expected(override: str, message: str) -> None:
    with pytest.raises(OmniNFTError, match=message):
        load_config("omninft", [override])


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(OmniNFTError, match="did you mean 'omninft'"):
        load_config("omnnft")


def test_files(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: gdpo\nrun: {iterations: 7}\n")
    config = load_config(str(tmp_path / "mine.yaml"))
    assert (config.recipe, config.run.iterations, config.credit.advantage.method) == ("mine", 7, "gdpo")
    (tmp_path / "bad.yaml").write_text("a: [1,\n")
    with pytest.raises(OmniNFTError, match="not valid YAML"):
        load_config(str(tmp_path / "bad.yaml"))
    with pytest.raises(OmniNFTError, match="no recipe file at"):
        load_config(str(tmp_path / "none.yaml"))
    (tmp_path / "a.yaml").write_text(f"base: {tmp_path / 'a.yaml'}\n")
    with pytest.raises(OmniNFTError, match="in a circle"):
        load_config(str(tmp_path / "a.yaml"))


def test_the_tree_is_frozen_and_survives_its_own_yaml() -> None:
    config = load_config("omninft")
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]
    assert build_config(config.model_dump(mode="json")) == config


def test_length_and_place_do_not_change_the_fingerprint_but_the_method_does() -> None:
    base = load_config("omninft")
    longer = load_config("omninft", ["run.iterations=99", "run.folder=elsewhere", "evaluation.every=1"])
    other = load_config("omninft", ["objective.beta=0.5"])
    assert longer.digest() == base.digest()
    assert other.digest() != base.digest()
