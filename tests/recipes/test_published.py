"""The recipes of real models against the published settings, key by key, and against the time they may take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omninft.config import Config, load_config
from omninft.objectives.negative_aware import NegativeAwareOptions, training_sigmas
from omninft.rewards.registry import build_reward
from omninft.rollout.sampler import num_passes
from omninft.runs.cost import evaluation_clips

# The run from which the published numbers come, as its released code has it (arXiv:2605.12480).
PUBLISHED: dict[str, Any] = {
    "model.path": "Lightricks/LTX-2",
    "model.transformer": "transformer",
    "model.dtype": "auto",
    "model.quantise": None,
    "model.old_dtype": "float32",
    "model.lora": {"rank": 32, "alpha": 64.0, "targets": None, "init": None, "init_partial": False},
    "prompts.per_iteration": 4,
    "prompts.group_size": 8,
    "sampling.num_frames": 121,
    "sampling.height": 512,
    "sampling.width": 768,
    "sampling.frame_rate": 24.0,
    "sampling.num_steps": 20,
    "sampling.shift_tokens": 4096,
    "sampling.video_guidance": {"text": 1.5, "stg": 0.0, "modality": 1.0, "rescale": 0.0},
    "sampling.audio_guidance": {"text": 3.0, "stg": 0.0, "modality": 1.0, "rescale": 0.0},
    "sampling.stg_blocks": [],
    "credit.kind": "omninft",
    "credit.std": "global",
    "credit.final_batch_norm": False,
    "credit.shuffle": False,
    "credit.surgery.enabled": True,
    "credit.surgery.target": "input",
    "credit.surgery.scope": "all",
    "credit.surgery.schedule": [
        {"start": 0, "stop": 1, "scale": 0.0},
        {"start": 1, "stop": 11, "scale": 0.1},
        {"start": 40, "stop": 48, "scale": 0.3},
    ],
    "credit.surgery.audio_schedule": None,
    "credit.regions.enabled": True,
    "credit.regions.method": "zscore_sigmoid",
    "credit.regions.strength": 1.5,
    "credit.regions.warmup": 400.0,
    "credit.regions.window": [0.5, 0.9],
    "credit.regions.first_block": 0,
    "credit.regions.rope": False,
    "objective.kind": "negative_aware",
    "objective.beta": 1.0,
    "objective.advantage_clip": 5.0,
    "objective.detach_weight": False,
    "objective.reference_weight": 1e-4,
    "objective.reference_share": 1.0,
    "objective.reference_space": "x0",
    "objective.video_weight": 1.0,
    "objective.audio_weight": 1.0,
    "objective.sigmas": {"choice": "first_fraction", "fraction": 0.4, "count": 4, "values": []},
    "optimiser.kind": "adamw",
    "optimiser.learning_rate": 3e-5,
    "optimiser.betas": [0.9, 0.999],
    "optimiser.epsilon": 1e-8,
    "optimiser.weight_decay": 1e-4,
    "optimiser.clip_norm": 1.0,
    "optimiser.warmup_steps": 0,
    "optimiser.step_per": "iteration",
    "evaluation.sampling.num_steps": 40,
    "evaluation.sampling.video_guidance": {"text": 3.0, "stg": 1.0, "modality": 3.0, "rescale": 0.7},
    "evaluation.sampling.audio_guidance": {"text": 7.0, "stg": 1.0, "modality": 3.0, "rescale": 0.7},
    "evaluation.sampling.stg_blocks": [],
    "run.old_schedule": 1,
}
PUBLISHED_SIGMAS = [1.0, 0.9915, 0.9821, 0.9718, 0.9605, 0.9478, 0.9337, 0.9178]
LESS = {"sampling.num_steps": 10, "objective.reference_share": 0.25, "evaluation.sampling.num_steps": 20}
VERSION: dict[str, dict[str, Any]] = {
    "ltx2": {},
    "ltx2.3": {"model.path": "diffusers/LTX-2.3-Diffusers"},
    "ltx2.5": {
        "model.path": "Lightricks/LTX-2.5-Diffusers",
        "model.transformer": "transformer_full",
    },
}
MACHINE: dict[str, dict[str, Any]] = {
    "": {},
    "+8gpu": {},
    "+1gpu": LESS,
    "+24gb": LESS
    | {
        "model.quantise": "nf4",
        "model.old_dtype": "bfloat16",
        "prompts.per_iteration": 2,
        "sampling.height": 256,
        "sampling.width": 384,
        "optimiser.kind": "adamw8bit",
    },
}


def at(config: Config, key: str) -> Any:
    node: Any = config.model_dump(mode="json")
    for part in key.split("."):
        node = node[part]
    return node


@pytest.mark.parametrize("machine", list(MACHINE))
@pytest.mark.parametrize("version", list(VERSION))
def test_every_value_is_the_published_one_but_for_what_gives_way(version: str, machine: str) -> None:
    config = load_config(version + machine)
    expected = PUBLISHED | VERSION[version] | MACHINE[machine]
    assert {key: at(config, key) for key in expected} == expected
    weights = [c.weight for r in config.rewards for c in build_reward(r).components]
    assert [r.name for r in config.rewards] == ["videoalign", "hpsv3", "audiobox", "clap", "desync"]
    assert weights == [1.0, 1.5, 0.5, 1.0, 1.0]
    assert config.model.gradient_checkpointing
    assert config.optimiser.micro_batch == config.sampling.batch_size == 2


def test_the_distilled_weights_take_their_own_steps() -> None:
    config = load_config("ltx2.3-distilled")
    for sampling in (config.sampling, config.evaluation_sampling):
        assert (sampling.num_steps, num_passes(sampling), sampling.shift_tokens) == (8, 8, None)
        assert (sampling.num_frames, sampling.height, sampling.width) == (121, 512, 768)
        assert sampling.sigmas == (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875)
    assert config.model.weights == "distilled"
    same = {key: value for key, value in PUBLISHED.items() if key.startswith(("credit", "objective", "optimiser"))}
    assert {key: at(config, key) for key in same} == same


def test_the_sigmas_of_a_full_schedule_are_the_published_ones() -> None:
    steps = load_config("ltx2").sampling.num_steps
    # Shifted by exp(2.05), the last but one stretched to .1, as the published scheduler's config says.
    t = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    shift = torch.exp(torch.tensor(2.05, dtype=torch.float64))
    sigmas = shift / (shift + 1 / t - 1)
    sigmas = 1 - (1 - sigmas) * (1 - 0.1) / (1 - sigmas[-1])
    objective = load_config("ltx2").objective
    assert isinstance(objective, NegativeAwareOptions)
    found = training_sigmas(objective.sigmas, torch.cat([sigmas, sigmas.new_zeros(1)]))
    assert found == pytest.approx(PUBLISHED_SIGMAS, abs=6e-5)


# Time. TFLOP of a forward of LTX-2 for one clip of 121 frames, counted on the meta device; of a backward with what it
# computes again, in forwards; of the five judges for a clip of 512x768, computed.
FORWARD = {(256, 384): 48.0, (512, 768): 199.0}
BACKWARD = 3.27
JUDGES = 215.0
HOURS, H100, RTX_4090 = 3600.0, 798 * 0.55, 165 * 0.55  # seconds; TFLOP/s reached


def tflop(config: Config) -> tuple[float, float]:
    """Of one iteration, and of all evaluations."""
    assert isinstance(config.objective, NegativeAwareOptions)
    forward = FORWARD[int(config.sampling.height or 0), int(config.sampling.width or 0)]
    schedule = torch.linspace(1, 0, config.sampling.num_steps + 1)
    sigmas = len(training_sigmas(config.objective.sigmas, schedule))
    rollout = num_passes(config.sampling)
    learning = sigmas * (1 + config.objective.reference_share + BACKWARD)
    clip = forward * num_passes(config.evaluation_sampling) + JUDGES
    iteration = config.clips_per_iteration * (forward * (rollout + learning) + JUDGES)
    return iteration, evaluation_clips(config, ("dev", "test")) * clip


@pytest.mark.parametrize(
    ("recipe", "rate", "hours"),
    [("ltx2+24gb", RTX_4090, 12), ("ltx2+1gpu", H100, 24), ("ltx2+8gpu", 8 * H100, 20)],
)
def test_a_recipe_takes_the_time_it_was_sized_for(recipe: str, rate: float, hours: float) -> None:
    config = load_config(recipe)
    iteration, evaluations = tflop(config)
    training = config.run.iterations * iteration
    assert 0.9 * hours <= (training + evaluations) / rate / HOURS <= hours
    assert 0.05 <= evaluations / (training + evaluations) <= 0.1
    assert config.run.iterations % config.evaluation.every == 0  # the last evaluation is of the end
    share = config.clips_per_iteration // (8 if "8gpu" in recipe else 1)
    assert share % config.optimiser.micro_batch == 0


def test_the_papers_iteration_is_522_petaflop_without_judges() -> None:
    iteration, _ = tflop(load_config("paper"))
    assert iteration / 1000 - 32 * JUDGES / 1000 == pytest.approx(522, rel=0.005)
