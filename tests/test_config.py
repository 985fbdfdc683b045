"""Recipes and overrides: defaults, inheritance, and errors that name the key."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from omninft.config import ADDED, Config, build_config, load_config, override_config, recipe_names
from omninft.credit.combine import CombineOptions
from omninft.credit.surgery import REFERENCE_SCHEDULE_48
from omninft.objectives.negative_aware import NegativeAwareOptions
from omninft.objectives.protocol import ObjectiveOptions
from omninft.recipes import read_file
from omninft.rewards.registry import build_reward
from omninft.types import OmniNFTError


def test_every_shipped_recipe_loads() -> None:
    assert {"omninft", "gdpo", "diffusion_nft", "placebo", "paper"} <= set(recipe_names())
    for name in recipe_names():
        whole = f"ltx2+{name}" if read_file(name).kind == "machine" else name
        assert load_config(whole).recipe == whole


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
    assert changed == {"credit.kind", "credit.surgery.enabled", "credit.regions.enabled"}


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
        ("credit.kind=grpo", r"credit\.kind: found 'grpo', did you mean 'gdpo'\?; expected one of omninft, gdpo"),
        (
            "credit.advantage.method=gdpo",
            r"credit\.advantage is a key of earlier .*its method is credit\.kind now",
        ),
        (
            "objective.micro_batch=2",
            r"objective\.micro_batch is a key .*it is optimiser\.micro_batch now",
        ),
        ("objective.beta_=2", r"unknown key 'objective\.beta_', did you mean 'beta'"),
        ("model.lora.alpha=0", r"model\.lora\.alpha: .*greater than 0; found 0"),
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
    assert (config.recipe, config.run.iterations, config.credit.kind) == ("mine", 7, "gdpo")
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


def test_paper_is_the_released_codes_run() -> None:
    config = load_config("paper")
    credit, objective = config.credit, config.objective
    assert isinstance(credit, CombineOptions)
    assert isinstance(objective, NegativeAwareOptions)
    assert (config.prompts.per_iteration, config.prompts.group_size, config.sampling.num_steps) == (4, 8, 20)
    assert (config.sampling.video_guidance.text, config.sampling.audio_guidance.text) == (1.5, 3.0)
    evaluation = config.evaluation_sampling
    assert (evaluation.num_steps, evaluation.video_guidance.text, evaluation.audio_guidance.text) == (40, 3.0, 7.0)
    assert (evaluation.video_guidance.stg, evaluation.video_guidance.rescale, evaluation.stg_blocks) == (
        1.0,
        0.7,
        (),  # the version's own, 29
    )
    assert (evaluation.height, evaluation.width, evaluation.num_frames, evaluation.batch_size) == (512, 768, 121, 2)
    assert (config.sampling.shift_tokens, evaluation.shift_tokens) == (4096, 4096)
    regions = credit.regions
    assert (regions.method, regions.first_block, regions.rope, regions.strength) == ("zscore_sigmoid", 0, False, 1.5)
    assert [regions.scale(i, 10_000) for i in (0, 100, 400, 500)] == [0, 0.25, 1, 1]
    assert credit.surgery.scales(48).a2v == REFERENCE_SCHEDULE_48
    assert credit.surgery.scales(48).v2a == (1.0,) * 48
    assert (objective.detach_weight, objective.reference_weight, objective.sigmas.fraction) == (False, 1e-4, 0.4)
    rewards = [build_reward(r) for r in config.rewards]
    assert [c.weight for r in rewards for c in r.components] == [1.0, 1.5, 0.5, 1.0, 1.0]
    assert config.rewards[1].options == {"jpeg_quality": 75}
    assert config.rewards[4].options == {"seconds": 8.0}


def leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def another(key: str, value: Any) -> Any:
    """A valid value that differs; None where the key has none to try."""
    choices = {
        "recipe": "other", "model.device": "cpu", "model.dtype": "float32", "distributed.backend": "gloo",
        "run.loggers": [], "credit.std": "group", "credit.surgery.target": "projection", "run.old_schedule": 2,
        "credit.surgery.scope": "video_loss_only", "credit.regions.method": "top_share",
        "objective.reference_space": "velocity", "optimiser.step_per": "sigma", "optimiser.betas": [0.8, 0.9],
        "credit.regions.window": [0.1, 0.7], "credit.kind": "gdpo", "objective.sigmas.choice": "spread",
        "objective.sigmas.values": [0.5], "sampling.stg_blocks": [1], "evaluation.sampling.stg_blocks": [1],
        "credit.surgery.schedule": [{"start": 0, "stop": 1, "scale": 0.5}],
        "credit.surgery.audio_schedule": [{"start": 0, "stop": 1, "scale": 0.5}], "model.lora.targets": ["attn1.to_q"],
        "model.quantise": "int8", "model.old_dtype": "bfloat16", "optimiser.kind": "adamw8bit",
        "model.offload": None, "model.weights": "distilled",
        "sampling.sigmas": None, "evaluation.sampling.sigmas": None,
        "samples.prompts": "mine.txt", "run.wandb.entity": "us", "run.wandb.group": "a", "run.wandb.mode": "offline",
        "run.wandb.tags": ["a"],
    }  # fmt: skip
    if key in choices:
        return choices[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value / 2 + 0.125
    if isinstance(value, str):
        return f"{value}2"
    if value is None:
        return (
            "x"
            if key.split(".")[-1] in ("revision", "dev", "test", "name", "init", "text_encoder", "text_cache")
            else 7
        )
    return None


@pytest.mark.parametrize("recipe", ["paper", "omninft", "gdpo"])
def test_a_one_key_override_changes_one_key(recipe: str) -> None:
    before = dict(leaves(load_config(recipe).model_dump(mode="json")))
    tried = 0
    for key, value in before.items():
        new = another(key, value)
        if key.startswith(("rewards", "held_out")) or key == "objective.kind" or new is None or new == value:
            continue
        after = dict(leaves(load_config(recipe, [f"{key}={json.dumps(new)}"]).model_dump(mode="json")))
        assert {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)} == {key}, key
        tried += 1
    assert tried > 80


def test_another_options_class_takes_the_place_of_the_base() -> None:
    flow = load_config("omninft", ["objective.kind=negative_aware", "objective.beta=0.5"])
    assert dict(leaves(flow.model_dump()))["objective.beta"] == 0.5
    tree = {"base": "omninft", "objective": {"kind": "tests.test_config:OtherObjective", "depth": 3}}
    del tree["base"]
    made = build_config(tree)
    assert made.objective.model_dump() == {
        "kind": "tests.test_config:OtherObjective", "video_weight": 1.0, "audio_weight": 1.0, "depth": 3,
    }  # fmt: skip
    with pytest.raises(OmniNFTError, match=r"unknown key 'objective\.dept', did you mean 'depth'"):
        build_config({"objective": {"kind": "tests.test_config:OtherObjective", "dept": 3}})
    with pytest.raises(OmniNFTError, match="is no options class"):
        build_config({"credit": {"kind": "tests.test_config:leaves"}})


class OtherObjective(ObjectiveOptions):
    """A user's own."""

    depth: int = 1


def test_evaluation_takes_size_and_batch_from_sampling_unless_told() -> None:
    config = load_config(
        "paper", ["sampling.height=256", "evaluation.sampling.width=512", "evaluation.sampling.batch_size=4"]
    )
    made = config.evaluation_sampling
    assert (made.height, made.width, made.batch_size, made.num_steps) == (256, 512, 4, 40)
    assert load_config("paper", ["evaluation.sampling.num_steps=9"]).evaluation_sampling.video_guidance.stg == 1.0


@pytest.mark.parametrize(
    "override",
    [
        "seed=1", "model.lora.rank=3", "prompts.group_size=4", "sampling.num_steps=7", "rewards=[{name: clap}]",
        "credit.std=group", "objective.beta=0.5", "optimiser.weight_decay=0.5", "run.old_schedule=2",
    ],
)  # fmt: skip
def test_what_a_run_learns_by_changes_the_fingerprint_in_its_key(override: str) -> None:
    base, other = load_config("paper").fingerprint(), load_config("paper", [override]).fingerprint()
    key = override.partition("=")[0]
    assert {k for k in base.keys() | other.keys() if base.get(k) != other.get(k)} == {key}


def test_evaluation_takes_every_size_from_sampling() -> None:
    given = {"num_frames": 17, "height": 64, "width": 96, "frame_rate": 8.0, "shift_tokens": 77, "batch_size": 3}
    made = load_config("paper", [f"sampling.{k}={v}" for k, v in given.items()]).evaluation_sampling
    assert {k: getattr(made, k) for k in given} == given


def test_checkpoints_from_before_a_key_was_added_still_fit() -> None:
    plain = load_config("omninft").fingerprint()
    assert not ADDED.keys() & plain.keys()
    changed = load_config("omninft", ["model.quantise=int8"]).fingerprint()
    assert changed == plain | {"model.quantise": "int8"}


@pytest.mark.parametrize("name", ["2026", "007", "2026-11-25", "1e5", "2026_01", "1.50", "true"])
def test_a_name_is_text_as_it_was_typed_and_stays_it(name: str, tmp_path: Path) -> None:
    config = load_config("omninft", [f"run.name={name}"])
    assert config.run.name == name
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(str(file)).run.name == name
    assert load_config("omninft", ["run.name=null"]).run.name is None


def test_numbers_in_a_file_are_names_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: omninft\nrun: {name: 2026, iterations: 3}\noptimiser: {learning_rate: 3e-4}\n")
    config = load_config(str(file))
    assert (config.run.name, config.run.iterations, config.optimiser.learning_rate) == ("2026", 3, 3e-4)


def test_a_config_is_changed_by_dotted_keys() -> None:
    config = load_config("omninft")
    changed = override_config(config, {"run.iterations": 3, "run.name": "2026", "credit.regions.enabled": False})
    assert (changed.run.iterations, changed.run.name, changed.credit.regions.enabled) == (3, "2026", False)
    assert override_config(config, ["run.iterations=3"]).run.iterations == 3
    assert override_config(config, ()) is config
    with pytest.raises(OmniNFTError, match=r"unknown key 'run\.iteration', did you mean 'iterations'"):
        override_config(config, {"run.iteration": 3})


NUMBERS = (-1, 0, math.inf, math.nan, 1e30, 10**12)
# What of these means something, by key: a weight of -1 prefers less, a beta of 0 has no memory, and so on.
ACCEPTED: dict[str, tuple[float, ...]] = {
    "credit.first_block": (0,),
    "credit.regions.first_block": (0,),
    "credit.regions.strength": (0,),
    "credit.regions.warmup": (0,),
    "credit.rewards.kappa": (0,),
    "credit.rewards.smoothing": (0,),
    "credit.rewards.warmup": (0,),
    "credit.smoothing": (0,),
    "evaluation.dev_clips": (0,),
    "evaluation.every": (0,),
    "evaluation.seed": (-1, 0, 10**12),
    "evaluation.shown_clips": (0,),
    "evaluation.test_clips": (0,),
    "model.first_frame_crf": (0,),
    "objective.audio_weight": (0,),
    "objective.reference_weight": (0,),
    "objective.video_weight": (0,),
    "optimiser.clip_norm": (1e30, 10**12),
    "optimiser.epsilon": (0,),
    "optimiser.warmup_steps": (0,),
    "optimiser.weight_decay": (0,),
    "run.max_missing_share": (0,),
    "run.old_schedule": (0,),
    "seed": (-1, 0, 10**12),
    **{
        f"{part}.{stream}_guidance.{name}": (0,)
        for part in ("sampling", "evaluation.sampling")
        for stream in ("video", "audio")
        for name in ("text", "stg", "modality", "rescale")
    },
}


def _numeric(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all numbers below a part of the tree, optional ones too."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _numeric(field.annotation, f"{prefix}{name}.")
        elif re.search("int|float|Literal.0", text := str(field.annotation)) and not re.search("tuple|dict", text):
            yield f"{prefix}{name}"


@pytest.mark.parametrize("recipe", ["omninft", "marble", "arr", "flow_grpo"])
def test_numbers_that_mean_nothing_are_refused(recipe: str) -> None:
    config = load_config(recipe)
    keys = list(_numeric(Config)) if recipe == "omninft" else []
    keys += [f"credit.{key}" for key in _numeric(type(config.credit))]
    keys += [f"objective.{key}" for key in _numeric(type(config.objective))]
    assert len(keys) >= (50 if recipe == "omninft" else 8)
    for key in keys:
        for number in NUMBERS:
            override = f"{key}={yaml.safe_dump(number)}"
            if number in ACCEPTED.get(key, ()):
                load_config(recipe, [override])
                continue
            with pytest.raises(OmniNFTError, match=rf": {re.escape(key)}\b.*found"):
                load_config(recipe, [override])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimiser.betas=[2, 3]", "optimiser.betas.0"),
        ("optimiser.betas=[0.9, .nan]", "optimiser.betas.1"),
        ("optimiser.betas=[]", "optimiser.betas"),
        ("sampling.frame_rate=-24", "sampling.frame_rate"),
        ("model.lora.rank=100000", "model.lora.rank"),
        ("model.lora.targets=[]", "model.lora.targets"),
        ('model.lora.targets=[""]', "model.lora.targets.0"),
        ("optimiser.epsilon=-1e-8", "optimiser.epsilon"),
        ("optimiser.weight_decay=-1e-4", "optimiser.weight_decay"),
        ("optimiser.learning_rate=1e6", "optimiser.learning_rate"),
        ("seed=9223372036854775808", "seed"),
        ("sampling.height=1000000000", "sampling.height"),
        ("sampling.stg_blocks=[-1]", "sampling.stg_blocks.0"),
        ("objective.sigmas={choice: list, values: [0.5, 1.5]}", "objective.sigmas"),
        ("objective.sigmas={choice: list, values: [.nan]}", "objective.sigmas.values.0"),
        ("objective.sigmas={choice: list, values: []}", "objective.sigmas"),
        ("credit.surgery.schedule=[{start: -1, stop: 2, scale: 1}]", "credit.surgery.schedule.0.start"),
        ("credit.surgery.schedule=[{start: 0, stop: 2, scale: .inf}]", "credit.surgery.schedule.0.scale"),
        ("credit.regions.window=[0, 1e30]", "credit.regions.window.1"),
        ("rewards=[{name: world, weight: .inf}]", "rewards.0.weight"),
        ("rewards=[{name: world, components: {sync: .nan}}]", "rewards.0.components.sync"),
        ("rewards=[{name: world, options: {a: .inf}}]", "rewards.0.options"),
        ("rewards=[{name: world, time_limit: 1e30}]", "rewards.0.time_limit"),
        *((f"run.name={name}", "run.name") for name in ("../../x", "/tmp/x", ".hidden", "x" * 300, "a b")),
        ('run.name="a\\0b"', "run.name"),
    ],
)
def test_values_that_mean_nothing_are_refused_by_their_key(override: str, key: str) -> None:
    with pytest.raises(OmniNFTError, match=rf"(: |; ){re.escape(key)}\b.*found"):
        load_config("omninft", [override])
