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
import os
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, create_model, model_validator

from omninft.naming import did_you_mean
from omninft.types import OmniNFTError, Route

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class Frozen(BaseModel):
    """A part of the tree: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraConfig(Frozen):
    """Low-rank adapter on the linears of all six attentions and both feed-forwards of a block."""

    rank: Positive = 32
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 64.0
    # Module names within a block, as PEFT matches them; None takes the 28 linears of the reference code.
    targets: tuple[str, ...] | None = None
    init: str | None = None  # a LoRA file or folder that current and old start from; the reference stays the base
    init_partial: bool = False  # take of it what this model has a place for; otherwise all must have one


class ModelConfig(Frozen):
    """The model to train."""

    # "tiny", a folder of a diffusers LTX-2 pipeline, a hub id, or original files: a .safetensors or a folder of them.
    path: str = "tiny"
    revision: str | None = None
    transformer: str = "transformer"  # sub-folder; LTX-2.5's full model is "transformer_full"
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1", ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the frozen base; auto: float32 on cpu, else bfloat16
    # What the frozen linears of the blocks are kept in; needs torchao (int8, float8) or bitsandbytes (nf4).
    quantise: Literal["int8", "float8", "nf4"] | None = None
    old_dtype: Literal["float32", "bfloat16"] = "float32"  # of the old adapter; bfloat16 rounds what current was
    compile: bool = False  # the transformer's blocks, by torch.compile
    # blocks: frozen weights of the blocks wait in host memory and come one by one; needs gradient_checkpointing.
    offload: Literal["none", "blocks"] = "none"
    vae_tiling: bool = False  # decode in tiles of 512 pixels: less memory, seams blended
    gradient_checkpointing: bool = False
    # H.264 quality at which given first frames are compressed, as LTX models were trained; None: as this version was
    # (33; LTX-2.5: 18; the bundled model: none), 0: not at all.
    first_frame_crf: Annotated[int, Field(ge=0, le=51)] | None = None
    # What the recipe is made for: others are refused. None: what the files say; original files do not say it.
    weights: Literal["full", "distilled"] | None = None
    # LTX-2.5 marks tokens that stand for a single frame; true, as in Lightricks' code: the first latent frame.
    mark_first_frame: bool = True
    # A pipeline folder or hub id with text_encoder/ and tokenizer/, for original files; None: those of `path`.
    text_encoder: str | None = None
    # Folder where text contexts are kept; the text encoder is then loaded for prompts that are not there alone.
    text_cache: str | None = None
    max_text_tokens: Positive | None = None  # None: what the tokenizer says, 1024 at most
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _offload_fits(self) -> ModelConfig:
        if self.offload == "blocks":
            if not self.gradient_checkpointing:
                raise ValueError("offload: blocks needs gradient_checkpointing: true, or a backward keeps all blocks")
            if self.compile or self.quantise == "nf4":
                raise ValueError("offload: blocks goes neither with compile nor with quantise: nf4")
        return self


class PromptsConfig(Frozen):
    """Prompt sets: a JSONL, CSV or TXT file, or "world:train" / "world:dev" / "world:test" of the bundled world."""

    train: str = "world:train"
    dev: str | None = "world:dev"
    test: str | None = "world:test"
    per_iteration: Positive = 4
    group_size: Annotated[int, Field(ge=2)] = 8


class GuidanceConfig(Frozen):
    """Guidance of one stream. 1.0 switches classifier-free and modality guidance off, 0.0 spatio-temporal guidance."""

    text: float = 1.0
    stg: float = 0.0
    modality: float = 1.0
    rescale: Share = 0.0


class SamplingConfig(Frozen):
    """How clips are sampled. Sizes left out are the model's own."""

    num_frames: Positive | None = None
    height: Positive | None = None
    width: Positive | None = None
    frame_rate: float | None = None
    num_steps: Positive = 20
    # Video tokens that the schedule is shifted for: 4096 in the official code, whatever the size; None: the clip's own.
    shift_tokens: Positive | None = None
    video_guidance: GuidanceConfig = GuidanceConfig()
    audio_guidance: GuidanceConfig = GuidanceConfig()
    stg_blocks: tuple[int, ...] = ()  # empty: the version's own (29 for LTX-2, 28 for 2.3 and 2.5)
    negative_prompt: str = ""
    batch_size: Positive = 32  # clips


class RewardConfig(Frozen):
    """One reward: a registered name, or a Python callable by import path ("package.module:function")."""

    name: str
    route: Route | None = None  # required for a plain callable; registered rewards declare their own
    weight: float = 1.0
    components: dict[str, float] = {}  # component name -> weight; empty takes all with the reward's own weights
    options: dict[str, Any] = {}
    time_limit: Annotated[float, Field(gt=0)] | None = None  # s for one batch of clips; past it they are missing


class MethodOptions(Frozen):
    """Options of a credit or an objective. The class lies in the method's own file, and `kind` names it."""

    kind: str


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

    kind: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: moments in 8 bits, needs bitsandbytes
    learning_rate: Annotated[float, Field(gt=0)] = 3e-5
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    # "sigma": one optimiser step per sigma over all clips; "iteration": one for everything (reference code).
    step_per: Literal["sigma", "iteration"] = "iteration"
    micro_batch: Positive = 32  # clips


class EvaluationSamplingConfig(SamplingConfig):
    """How evaluations sample. Sizes and batch left out are those of `sampling`."""

    num_steps: Positive = 40
    video_guidance: GuidanceConfig = GuidanceConfig(text=3.0, stg=1.0, modality=3.0, rescale=0.7)
    audio_guidance: GuidanceConfig = GuidanceConfig(text=7.0, stg=1.0, modality=3.0, rescale=0.7)
    batch_size: Positive | None = None  # type: ignore[assignment]


class EvaluationConfig(Frozen):
    """Paired evaluation: the same prompts and noise at every evaluation, base and trained."""

    every: Annotated[int, Field(ge=0)] = 50  # iterations between dev evaluations; 0: none
    dev_clips: Annotated[int, Field(ge=0)] = 64
    test_clips: Annotated[int, Field(ge=0)] = 256  # base against trained, at the end
    shown_clips: Annotated[int, Field(ge=0)] = 8  # written as mp4 for the report
    seed: int = 1_000_003  # keys the evaluation noise, apart from the training seed
    sampling: EvaluationSamplingConfig = EvaluationSamplingConfig()


class RunConfig(Frozen):
    """Length, place and safety of the run."""

    iterations: Positive = 400
    name: str | None = None  # folder under `folder`; None: the recipe's name
    folder: str = "runs"
    old_schedule: Literal[0, 1, 2] = 1  # decay of the old policy: 0 none, 1 min(0.001 i, 0.5), 2 delayed
    checkpoint_every: Positive = 25
    keep_last: Positive = 3
    max_missing_share: Share = 0.5  # of one component's scores in one iteration
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    threads: Positive | None = None  # None: the cores there are


class DistributedConfig(Frozen):
    """Processes of one run."""

    backend: Literal["auto", "gloo", "nccl"] = "auto"


class Config(Frozen):
    """A whole run."""

    recipe: str = "custom"
    seed: int = 0
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    sampling: SamplingConfig = SamplingConfig(
        video_guidance=GuidanceConfig(text=1.5), audio_guidance=GuidanceConfig(text=3.0)
    )
    rewards: tuple[RewardConfig, ...] = (RewardConfig(name="world"),)
    held_out: tuple[RewardConfig, ...] = ()  # measured at evaluations, never trained on
    credit: SerializeAsAny[MethodOptions] = Field(default_factory=lambda: default_options("credit"))
    objective: SerializeAsAny[MethodOptions] = Field(default_factory=lambda: default_options("objective"))
    optimiser: OptimiserConfig = OptimiserConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()
    distributed: DistributedConfig = DistributedConfig()

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
        tree = json.loads(self.model_dump_json(exclude={"run", "evaluation", "recipe", "held_out", "distributed"}))
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


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(p.name[:-5] for p in resources.files("omninft.recipes").iterdir() if p.name.endswith(".yaml"))


def load_config(recipe: str, overrides: list[str] | None = None) -> Config:
    """A recipe by shipped name or YAML path, with dotted `key=value` overrides on top.

    A recipe may start from another by `base: name`; its own keys then replace the base's, mapping by mapping.

    Raises:
        OmniNFTError: unknown recipe, malformed YAML, unknown key (with the nearest one), or a value out of range.
    """
    tree = _read_recipe(recipe, seen=())
    tree.setdefault("recipe", Path(recipe).stem)
    for override in overrides or []:
        tree = _merge(tree, _parse_override(override))
    return build_config(tree, where=f"recipe {recipe}")


def _read_recipe(recipe: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if recipe in seen:
        raise OmniNFTError(f"recipes start from one another in a circle: {' -> '.join([*seen, recipe])}")
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise OmniNFTError(f"no recipe file at {path.absolute()}")
        text = path.read_text(encoding="utf-8")
    elif recipe in recipe_names():
        text = (resources.files("omninft.recipes") / f"{recipe}.yaml").read_text(encoding="utf-8")
    else:
        raise OmniNFTError(
            f"unknown recipe {recipe!r}{_nearest(recipe, recipe_names())}; "
            f"expected a YAML file or one of: {', '.join(recipe_names())}"
        )
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise OmniNFTError(f"recipe {recipe} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise OmniNFTError(f"recipe {recipe}: found a {type(tree).__name__}, expected a mapping of keys")
    base = tree.pop("base", None)
    return _merge(_read_recipe(base, (*seen, recipe)), tree) if base else tree


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
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise OmniNFTError(f"override {override!r}: the value is not valid YAML: {error}") from error
    path = key.split(".")
    for part in ("rewards", "held_out"):
        if path[0] == part and len(path) > 1:
            raise OmniNFTError(f"override {override!r}: {part} is a list; override it whole, as {part}=[...]")
    for part in reversed(path):
        parsed = {part: parsed}
    return parsed


def build_config(tree: dict[str, Any], where: str = "config") -> Config:
    """Validate a plain mapping; what it leaves out is as in the defaults, key by key.

    Raises:
        OmniNFTError: it names the key, what was found and what was expected.
    """
    tree = _numbers(tree)
    kinds = {part: _kind_of(tree, part) for part in METHODS}
    classes = {part: options_class(part, kind) for part, kind in kinds.items()}
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
                lines.append(f"{key}: {e['msg']}; found {e['input']!r}")
        raise OmniNFTError(f"{where}: " + "; ".join(lines)) from error


def _kind_of(tree: dict[str, Any], part: str) -> Any:
    given = tree.get(part)
    return given.get("kind", DEFAULT_KINDS[part]) if isinstance(given, dict) else DEFAULT_KINDS[part]


def _numbers(tree: Any) -> Any:
    """Text like "3e-4", which YAML 1.1 does not read as a number, as a float."""
    if isinstance(tree, dict):
        return {k: _numbers(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_numbers(v) for v in tree]
    if isinstance(tree, str) and "e" in tree.lower() and tree[:1] in "+-.0123456789":
        try:
            return float(tree)
        except ValueError:
            return tree
    return tree


def _known_keys(location: tuple[int | str, ...], classes: dict[str, type[MethodOptions]]) -> list[str]:
    node: type[BaseModel] = Config
    for depth, part in enumerate(location):
        if isinstance(part, int):
            continue
        if depth == 0 and part in classes:
            node = classes[str(part)]
            continue
        annotation = node.model_fields[str(part)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        candidates += [a for c in list(candidates) for a in getattr(c, "__args__", ())]
        node = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(node.model_fields)


def _nearest(word: str, known: list[str]) -> str:
    return did_you_mean(word, known) or (f" (known: {', '.join(known)})" if known else "")
