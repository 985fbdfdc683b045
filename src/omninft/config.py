"""The config tree: one frozen pydantic model per stage, and how a recipe becomes one.

`recipes/*.yaml` are the shipped instances. Unknown keys are errors that name the nearest known key. The defaults are
those of the OmniNFT paper and its reference code (arXiv:2605.12480) for LTX-2; what the bundled model needs
otherwise stands in its recipes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from omninft.files import parse_yaml
from omninft.naming import SAFE_NAME, did_you_mean, is_safe_name
from omninft.recipes import read_recipe
from omninft.recipes import recipe_names as recipe_names  # a name of this module for those who load recipes
from omninft.types import OmniNFTError, Route

Share = Annotated[float, Field(ge=0, le=1)]
# Bounds refuse what nobody can mean, such as 10**12 iterations; what is merely unwise is left to the user.
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Factor = Annotated[float, Field(ge=0, le=1e6)]  # of something that is about 1
PositiveFactor = Annotated[float, Field(gt=0, le=1e6)]
Warmup = Annotated[float, Field(ge=0, le=1e9)]  # a share of the run; above 1: iterations
Side = Annotated[int, Field(ge=1, le=2**14)]  # pixels
Steps = Annotated[int, Field(ge=1, le=10**4)]
Block = Annotated[int, Field(ge=0, le=9999)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Frozen(BaseModel):
    """A part of the tree: immutable, no unknown keys, no number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class LoraConfig(Frozen):
    """Low-rank adapter on the linears of all six attentions and both feed-forwards of a block."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 32
    """Rank of the low-rank matrices."""
    alpha: PositiveFactor = 64.0
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    targets: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    """Module names in a block, as PEFT matches them; None takes the 28 linears of the reference code."""
    init: str | None = None
    """A LoRA file or folder that current and old start from; the reference stays the base."""
    init_partial: bool = False
    """Take of it what this model has a place for; otherwise all of it must have one."""


class ModelConfig(Frozen):
    """The model to train."""

    path: str = "tiny"
    """The bundled model ("tiny"), a folder of a diffusers LTX-2 pipeline, a hub id, or original .safetensors files."""
    revision: str | None = None
    """Commit, tag or branch of a hub model."""
    transformer: str = "transformer"
    """Sub-folder of the pipeline; LTX-2.5's full model is "transformer_full"."""
    device: str = "auto"
    """Where it runs: auto, cpu, cuda, cuda:1, ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the frozen base; auto: float32 on cpu, else bfloat16."""
    quantise: Literal["int8", "float8", "nf4"] | None = None
    """What the frozen linears of the blocks are kept in; needs torchao (int8, float8) or bitsandbytes (nf4)."""
    old_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the old adapter; bfloat16 rounds what current was."""
    compile: bool = False
    """Compile the transformer's blocks by torch.compile."""
    offload: Literal["none", "blocks"] = "none"
    """blocks: their frozen weights wait in host memory and come one by one; needs gradient_checkpointing."""
    vae_tiling: bool = False
    """Decode in tiles of 512 pixels: less memory, seams blended."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward: less memory, more time."""
    first_frame_crf: Annotated[int, Field(ge=0, le=51)] | None = None
    """H.264 quality at which given first frames are compressed; 0: not at all.

    Null: as this version was trained (33; LTX-2.5: 18; the bundled model: none)."""
    weights: Literal["full", "distilled"] | None = None
    """What the recipe is made for, others are refused; null: what the files say. Original files do not say it."""
    mark_first_frame: bool = True
    """LTX-2.5 marks tokens that stand for a single frame; true, as in Lightricks' code: the first latent frame."""
    text_encoder: str | None = None
    """Pipeline folder or hub id with text_encoder/ and tokenizer/, for original files; null: those of `path`."""
    text_cache: str | None = None
    """Folder where text contexts are kept; the text encoder is then loaded for prompts that are not there alone."""
    max_text_tokens: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """Tokens of a prompt; null: what the tokenizer says, 1024 at most."""
    lora: LoraConfig = LoraConfig()
    """The adapter that is trained."""

    @model_validator(mode="after")
    def _offload_fits(self) -> ModelConfig:
        if self.offload == "blocks":
            if not self.gradient_checkpointing:
                raise ValueError("offload: blocks needs gradient_checkpointing: true, or a backward keeps all blocks")
            if self.compile or self.quantise == "nf4":
                raise ValueError("offload: blocks goes neither with compile nor with quantise: nf4")
        return self


class PromptsConfig(Frozen):
    """Prompt sets: a JSONL, CSV or TXT file, or "world:train" / "world:dev" / "world:test" of the bundled world.

    For real models there are "starter:train", "starter:dev" and "starter:test".
    """

    train: str = "world:train"
    """Prompts to train on."""
    dev: str | None = "world:dev"
    """Prompts of the evaluations during the run; null: none."""
    test: str | None = "world:test"
    """Prompts on which base and trained model are compared at the end; null: none."""
    per_iteration: Positive = 4
    """Prompts of an iteration."""
    group_size: Annotated[int, Field(ge=2, le=10**9)] = 8
    """Clips of each prompt, whose scores are compared with one another."""


# Beyond a hundred no clip is left to see; below 0 it would lead away from the prompt.
Guidance = Annotated[float, Field(ge=0, le=1000)]


class GuidanceConfig(Frozen):
    """Guidance of one stream. 1.0 switches classifier-free and modality guidance off, 0.0 spatio-temporal guidance."""

    text: Guidance = 1.0
    """Classifier-free guidance; 1 is off."""
    stg: Guidance = 0.0
    """Spatio-temporal guidance; 0 is off."""
    modality: Guidance = 1.0
    """Guidance away from the prediction without the other stream; 1 is off."""
    rescale: Share = 0.0
    """How far guided predictions are pulled back to the deviation of plain ones."""


class SamplingConfig(Frozen):
    """How clips are sampled. Sizes left out are the model's own."""

    num_frames: Annotated[int, Field(ge=1, le=10**5)] | None = None
    """Frames of a clip, 8 k + 1 for LTX-2; null: the model's own."""
    height: Side | None = None
    """Pixels, a multiple of 32; null: the model's own."""
    width: Side | None = None
    """Pixels, a multiple of 32; null: the model's own."""
    frame_rate: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Frames per second; null: the model's own."""
    num_steps: Steps = 20
    """Denoising steps."""
    sigmas: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    """Noise levels of the steps, falling, `num_steps` of them; null: the schedule of the model's scheduler."""
    shift_tokens: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """Video tokens that the schedule is shifted for, 4096 in the official code; null: the clip's own."""
    video_guidance: GuidanceConfig = GuidanceConfig()
    """Guidance of the video stream."""
    audio_guidance: GuidanceConfig = GuidanceConfig()
    """Guidance of the audio stream."""
    stg_blocks: tuple[Block, ...] = ()
    """Blocks whose self-attention spatio-temporal guidance perturbs; empty: 29 for LTX-2, 28 for 2.3 and 2.5."""
    negative_prompt: str = ""
    """What text guidance leads away from."""
    batch_size: Positive = 32
    """Clips sampled at a time."""

    @model_validator(mode="after")
    def _sigmas_are_the_steps(self) -> Self:
        if self.sigmas is not None:
            if len(self.sigmas) != self.num_steps:
                raise ValueError(f"num_steps is {self.num_steps} and there are {len(self.sigmas)} sigmas")
            if any(later >= earlier for earlier, later in pairwise(self.sigmas)):
                raise ValueError("sigmas must fall")
        return self


Weight = Annotated[float, Field(ge=-1e6, le=1e6)]


class RewardConfig(Frozen):
    """One reward: a registered name, or a Python callable by import path ("package.module:function")."""

    name: str
    """A registered name, or an import path."""
    route: Route | None = None
    """The branch it judges; required for a plain callable, registered rewards declare their own."""
    weight: Weight = 1.0
    """Factor of all components."""
    components: dict[str, Weight] = {}
    """Component name -> weight; empty takes all with the reward's own weights."""
    options: dict[str, Any] = {}
    """What the reward is made with."""
    time_limit: PositiveFactor | None = None
    """Seconds for one batch of clips; past it their scores are missing."""

    @field_validator("options")
    @classmethod
    def _options_are_finite(cls, options: dict[str, Any]) -> dict[str, Any]:
        odd = [key for key, value in options.items() if isinstance(value, float) and not math.isfinite(value)]
        if odd:
            raise ValueError(f"{', '.join(odd)} should be a finite number")
        return options


class MethodOptions(Frozen):
    """Options of a credit or an objective. The class lies in the method's own file, and `kind` names it."""

    kind: str
    """Name of the method, or "package.module:Options"."""


# What `kind` stands for: the options class, which is imported when a config names it. "package.module:Options" names
# one of the user's own. A kind that shares its class with another differs from it in the value of `kind` alone.
METHODS: dict[str, dict[str, str]] = {
    "credit": {
        "omninft": "omninft.credit.combine:CombineOptions",
        "gdpo": "omninft.credit.combine:CombineOptions",
        "global": "omninft.credit.combine:CombineOptions",
        "marble": "omninft.credit.marble:MarbleOptions",
        "arr": "omninft.credit.responses:ResponseOptions",
    },
    "objective": {
        "negative_aware": "omninft.objectives.negative_aware:NegativeAwareOptions",
        "flow_grpo": "omninft.objectives.flow_grpo:FlowGRPOOptions",
    },
}
DEFAULT_KINDS = {"credit": "omninft", "objective": "negative_aware"}


class OptimiserConfig(Frozen):
    """AdamW."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the moments in 8 bits and needs bitsandbytes."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-5
    """Step size, after the warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the moments."""
    epsilon: Share = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 1e-4
    """Decoupled decay of the trained parameters."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    warmup_steps: Count = 0
    """Optimiser steps over which the learning rate rises."""
    step_per: Literal["sigma", "iteration"] = "iteration"
    """One optimiser step per sigma over all clips, or one for everything in the iteration (reference code)."""
    micro_batch: Positive = 32
    """Clips of one backward."""


class EvaluationSamplingConfig(SamplingConfig):
    """How evaluations sample. Sizes and batch left out are those of `sampling`."""

    num_steps: Steps = 40
    """Denoising steps."""
    video_guidance: GuidanceConfig = GuidanceConfig(text=3.0, stg=1.0, modality=3.0, rescale=0.7)
    """Guidance of the video stream."""
    audio_guidance: GuidanceConfig = GuidanceConfig(text=7.0, stg=1.0, modality=3.0, rescale=0.7)
    """Guidance of the audio stream."""
    batch_size: Positive | None = None  # type: ignore[assignment]
    """Clips sampled at a time; null: as in `sampling`."""


class EvaluationConfig(Frozen):
    """Paired evaluation: the same prompts and noise at every evaluation, base and trained."""

    every: Count = 50
    """Iterations between dev evaluations; 0: none."""
    dev_clips: Count = 64
    """Clips of a dev evaluation; 0: none."""
    test_clips: Count = 256
    """Clips of the comparison of base and trained model at the end; 0: none."""
    shown_clips: Count = 8
    """Clips of an evaluation that are written as mp4 for the report."""
    seed: Seed = 1_000_003
    """Keys the evaluation noise, apart from the training seed."""
    sampling: EvaluationSamplingConfig = EvaluationSamplingConfig()
    """How evaluations sample."""


class SamplesConfig(Frozen):
    """Clips of your own prompts while a run goes on: of the base, every so many iterations, and of the end.

    They are sampled as evaluations are, on the same noise every time; no reward judges them.
    """

    prompts: str | None = None
    """A prompt file, as in `prompts`; null: no such clips."""
    every: Positive = 25
    """Iterations between them."""
    count: Positive = 1
    """Clips of each prompt."""


class WandbConfig(Frozen):
    """What W&B is told about the run. Of these, trackio takes `project`, `group` and `media`."""

    project: str = "omninft"
    """Where the run is filed."""
    entity: str | None = None
    """User or team; null: the account's default."""
    group: str | None = None
    """What runs are shown together under."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Null: what WANDB_MODE says, else online."""
    media: bool = True
    """Upload the clips of evaluations and of `samples`."""


class RunConfig(Frozen):
    """Length, place and safety of the run."""

    iterations: Positive = 400
    """Iterations of the whole run."""
    name: str | None = None
    """Folder under `folder`; null: the recipe's name."""
    folder: str = "runs"
    """Where run folders lie."""
    old_schedule: Literal[0, 1, 2] = 1
    """Decay of the old policy: 0 none, 1 min(0.001 i, 0.5), 2 delayed."""
    checkpoint_every: Positive = 25
    """Iterations between checkpoints."""
    keep_last: Positive = 3
    """Checkpoints that are kept."""
    max_missing_share: Share = 0.5
    """Share of one reward component's scores that may be missing in an iteration."""
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl."""
    wandb: WandbConfig = WandbConfig()
    """What W&B is told."""
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Threads of the CPU; null: what OMP_NUM_THREADS says, else the cores there are."""

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str | None) -> str | None:
        if name is not None and not is_safe_name(name):
            raise ValueError(f"a run's folder is named by it: expected {SAFE_NAME}")
        return name


class DistributedConfig(Frozen):
    """Processes of one run."""

    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Of torch.distributed; auto: nccl with CUDA, else gloo."""


class Config(Frozen):
    """A whole run."""

    recipe: str = "custom"
    """Name of the recipe, which names the run."""
    seed: Seed = 0
    """Keys all noise of training."""
    model: ModelConfig = ModelConfig()
    """The model to train."""
    prompts: PromptsConfig = PromptsConfig()
    """Prompt sets, and how many prompts an iteration takes."""
    sampling: SamplingConfig = SamplingConfig(
        video_guidance=GuidanceConfig(text=1.5), audio_guidance=GuidanceConfig(text=3.0)
    )
    """How clips are sampled in training."""
    rewards: tuple[RewardConfig, ...] = (RewardConfig(name="world"),)
    """What is trained on."""
    held_out: tuple[RewardConfig, ...] = ()
    """Measured at evaluations, never trained on."""
    credit: SerializeAsAny[MethodOptions] = Field(default_factory=lambda: default_options("credit"))
    """Who learns from which score, and how much."""
    objective: SerializeAsAny[MethodOptions] = Field(default_factory=lambda: default_options("objective"))
    """The loss of both branches."""
    optimiser: OptimiserConfig = OptimiserConfig()
    """AdamW, and how its steps are cut."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluations, base against trained."""
    samples: SamplesConfig = SamplesConfig()
    """Clips of your own prompts, for looking at."""
    run: RunConfig = RunConfig()
    """Length, place and safety of the run."""
    distributed: DistributedConfig = DistributedConfig()
    """Processes of one run."""

    @property
    def evaluation_sampling(self) -> SamplingConfig:
        """How evaluations sample, with what they leave out taken from `sampling`."""
        own = self.evaluation.sampling
        names = ("num_frames", "height", "width", "frame_rate", "shift_tokens", "batch_size")
        taken = {n: getattr(self.sampling, n) for n in names if getattr(own, n) is None}
        return SamplingConfig(**{n: getattr(own, n) for n in SamplingConfig.model_fields} | taken)

    @property
    def clips_per_iteration(self) -> int:
        return self.prompts.per_iteration * self.prompts.group_size

    def fingerprint(self) -> dict[str, str]:
        """What must agree for a checkpoint to continue this run: everything but length, place and logging."""
        tree = json.loads(
            self.model_dump_json(exclude={"run", "evaluation", "samples", "recipe", "held_out", "distributed"})
        )
        tree["run.old_schedule"] = self.run.old_schedule
        tree["model"].pop("text_cache")  # a place
        flat = {k: v for k, v in _flatten(tree).items() if k not in ADDED or v != ADDED[k]}
        return {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in flat.items()}

    def digest(self) -> str:
        """Twelve hex digits of the fingerprint."""
        return hashlib.sha256(json.dumps(self.fingerprint(), sort_keys=True).encode()).hexdigest()[:12]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# Keys that checkpoints of earlier versions do not have, and the value that says what was so then.
ADDED = {
    "sampling.sigmas": None,
    "model.quantise": None,
    "model.old_dtype": "float32",
    "model.compile": False,
    "model.offload": "none",
    "model.vae_tiling": False,
    "model.weights": None,
    "model.mark_first_frame": True,
    "model.text_encoder": None,
    "model.lora.init": None,
    "model.lora.init_partial": False,
    "optimiser.kind": "adamw",
    "objective.reference_share": 1.0,
}

# Keys of earlier versions, and where what they said is said now.
RENAMED = {
    "credit.advantage": "its method is credit.kind now; std, final_batch_norm and shuffle stand in credit itself",
    "objective.micro_batch": "it is optimiser.micro_batch now",
    "objective.step_per": "it is optimiser.step_per now",
    "model.use_cross_timestep": "it is always on now, as in every LTX-2 pipeline",
}


def import_object(path: str, where: str) -> Any:
    """The object at "package.module:name"; the working directory is on the import path.

    Raises:
        OmniNFTError: the import fails, or the module has no such name (with the nearest one).
    """
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise OmniNFTError(
            f"{where}: cannot import {module_name!r} from {os.getcwd()} or the installed packages: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise OmniNFTError(f"{where}: {module_name} has no {name!r}{_nearest(name, public)}")
    return getattr(module, name)


def options_class(part: str, kind: object) -> type[MethodOptions]:
    """The options class that `kind` stands for in "credit" or "objective".

    Raises:
        OmniNFTError: an unknown kind (with the nearest one), or a path to something else than an options class.
    """
    known = METHODS[part]
    if not isinstance(kind, str) or not (kind in known or ":" in kind):
        near = _nearest(str(kind), list(known))
        raise OmniNFTError(
            f"{part}.kind: found {kind!r}{near}; expected one of {', '.join(known)}, or package.module:Options"
        )
    found = import_object(known.get(kind, kind), f"{part}.kind {kind!r}")
    if not (isinstance(found, type) and issubclass(found, MethodOptions)):
        raise OmniNFTError(f"{part}.kind {kind!r} is no options class: expected a subclass of MethodOptions")
    return found


def default_options(part: str, kind: str | None = None) -> MethodOptions:
    """The options of a kind as they are when nothing is given."""
    kind = kind or DEFAULT_KINDS[part]
    return options_class(part, kind)(kind=kind)


@functools.cache
def _config_class(credit: type[MethodOptions], objective: type[MethodOptions]) -> type[Config]:
    """`Config` whose methods are of these classes, so that errors name their keys."""
    return create_model("Config", __base__=Config, credit=(credit, ...), objective=(objective, ...))


def load_config(recipe: str, overrides: list[str] | None = None) -> Config:
    """A recipe by shipped name or YAML path, or several joined by +, with dotted `key=value` overrides on top.

    A recipe may start from another by `base: name`; its own keys then replace the base's, mapping by mapping.

    Raises:
        OmniNFTError: unknown recipe, malformed YAML, parts that do not go together, unknown key (with the nearest one),
            or a value out of range.
    """
    name, layers = read_recipe(recipe)
    tree: dict[str, Any] = {}
    for layer in layers:
        tree = _merge(tree, layer)
    tree.setdefault("recipe", name)
    for override in overrides or []:
        tree = _merge(tree, _parse_override(override))
    return build_config(tree, where=f"recipe {recipe}")


def override_config(config: Config, overrides: Sequence[str] | Mapping[str, Any]) -> Config:
    """A config with dotted keys changed: "key=value" lines, or key -> value.

    Raises:
        OmniNFTError: as `load_config`.
    """
    if not overrides:
        return config
    tree = config.model_dump(mode="json")
    if isinstance(overrides, Mapping):
        parts = [_nested(key, value) for key, value in overrides.items()]
    else:
        parts = [_parse_override(override) for override in overrides]
    for part in parts:
        tree = _merge(tree, part)
    return build_config(tree, where="overrides")


def _merge(base: dict[str, Any], over: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """`base` with what `over` names changed, mapping by mapping, and nothing else.

    A method of another options class takes the place of the base's: their keys mean different things.
    """
    merged = dict(base)
    for key, value in over.items():
        here = (*path, key)
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        if both and len(here) == 1 and key in METHODS and "kind" in value:
            was = merged[key].get("kind", DEFAULT_KINDS[key])
            both = options_class(key, was) is options_class(key, value["kind"])
        merged[key] = _merge(merged[key], value, here) if both else value
    return merged


def _parse_override(override: str) -> dict[str, Any]:
    """The tree that `key.key=value` names."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise OmniNFTError(f"override {override!r}: expected key=value, e.g. optimiser.learning_rate=1e-4")
    parsed = parse_yaml(value, f"override {override!r:.200}: the value")
    if parsed is not None and not isinstance(parsed, str | dict | list) and _takes_text(_annotation(key.split("."))):
        parsed = value.strip()  # as it was typed: 007 and 2026-11-25 are names
    return _nested(key, parsed)


def _nested(key: str, value: Any) -> dict[str, Any]:
    path = key.split(".")
    for part in ("rewards", "held_out"):
        if path[0] == part and len(path) > 1:
            raise OmniNFTError(f"override {key!r}: {part} is a list; override it whole, as {part}=[...]")
    for part in reversed(path):
        value = {part: value}
    return dict(value)


def build_config(tree: dict[str, Any], where: str = "config") -> Config:
    """Validate a plain mapping; what it leaves out is as in the defaults, key by key.

    Raises:
        OmniNFTError: it names the key, what was found and what was expected.
    """
    try:
        _require_text_keys(tree)
    except OmniNFTError as error:
        raise OmniNFTError(f"{where}: {error}") from error
    kinds = {part: _kind_of(tree, part) for part in METHODS}
    classes = {part: options_class(part, kind) for part, kind in kinds.items()}
    tree = _scalars(tree, classes)
    defaults = Config().model_dump(mode="json") | {
        part: default_options(part, kind).model_dump(mode="json") for part, kind in kinds.items()
    }
    try:
        return _config_class(classes["credit"], classes["objective"]).model_validate(_merge(defaults, tree))
    except ValidationError as error:
        lines = []
        for e in error.errors():
            key = ".".join(str(p) for p in e["loc"])
            if key in RENAMED:
                lines.append(f"{key} is a key of earlier versions: {RENAMED[key]}")
            elif e["type"] == "extra_forbidden":
                known = _known_keys(e["loc"][:-1], classes)
                lines.append(f"unknown key {key!r}{_nearest(str(e['loc'][-1]), known)}")
            else:
                lines.append(f"{key}: {e['msg']}; found {e['input']!r:.200}")
        raise OmniNFTError(f"{where}: " + "; ".join(lines)) from error


def _kind_of(tree: dict[str, Any], part: str) -> Any:
    given = tree.get(part)
    return given.get("kind", DEFAULT_KINDS[part]) if isinstance(given, dict) else DEFAULT_KINDS[part]


def _require_text_keys(tree: Any) -> None:
    """Raises OmniNFTError where a mapping has a key that is no text."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree if isinstance(tree, list) else ()):
        if isinstance(tree, dict) and not isinstance(key, str):
            raise OmniNFTError(f"found the key {key!r:.60}, expected keys that are text")
        _require_text_keys(value)


def _scalars(tree: Any, classes: Mapping[str, type[MethodOptions]], path: tuple[str, ...] = ()) -> Any:
    """Scalars as the fields want them, where YAML 1.1 reads them otherwise.

    Text like "3e-4" becomes a float; a number or a date becomes text where the field takes nothing but text.
    """
    if isinstance(tree, dict):
        return {k: _scalars(v, classes, (*path, k)) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_scalars(v, classes, path) for v in tree]
    if _takes_text(_annotation(path, classes)):
        return str(tree) if isinstance(tree, int | float | date) and not isinstance(tree, bool) else tree
    if isinstance(tree, str) and "e" in tree.lower() and tree[:1] in "+-.0123456789":
        try:
            return float(tree)
        except ValueError:
            return tree
    return tree


def _annotation(path: Sequence[str], classes: Mapping[str, type[MethodOptions]] | None = None) -> Any:
    """The type of the field at `path`, a model class for a part of the tree; None where there is no such field."""
    node: Any = Config
    for depth, part in enumerate(path):
        if not (isinstance(node, type) and issubclass(node, BaseModel)):
            return None
        if depth == 0 and part in METHODS:
            node = (classes or {}).get(part)
        elif part in node.model_fields:
            annotation = node.model_fields[part].annotation
            node = model_in(annotation) or annotation
        else:
            return None
    return node


def _takes_text(annotation: Any) -> bool:
    """Whether text is the only scalar of a field's type."""
    members = {annotation, *get_args(annotation)}
    return str in members and not members & {int, float, bool}


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The part of the tree that a field's type names, itself or as an element; None for other types."""
    candidates = [annotation, *get_args(annotation)]
    candidates += [a for c in list(candidates) for a in get_args(c)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _known_keys(location: tuple[int | str, ...], classes: Mapping[str, type[MethodOptions]]) -> list[str]:
    node = _annotation([part for part in location if isinstance(part, str)], classes)
    return list(node.model_fields) if node is not None else []


def _nearest(word: str, known: list[str]) -> str:
    return did_you_mean(word, known) or (f" (known: {', '.join(known)})" if known else "")
