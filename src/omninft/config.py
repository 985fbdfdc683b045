"""The config tree: one frozen pydantic model per stage, and how a recipe becomes one.

`recipes/*.yaml` are the shipped instances. Unknown keys are errors that name the nearest known key. The defaults are
those of the OmniNFT paper and its reference code (arXiv:2605.12480) for LTX-2; what the bundled model needs
otherwise stands in its recipes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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


class ModelConfig(Frozen):
    """The model to train."""

    path: str = "tiny"  # "tiny", a folder of a diffusers LTX-2 pipeline, or a hub id
    revision: str | None = None
    transformer: str = "transformer"  # sub-folder; LTX-2.5's full model is "transformer_full"
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1", ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the frozen base; auto: float32 on cpu, else bfloat16
    gradient_checkpointing: bool = False
    # Cross-attention modulation reads the other stream's sigma; None reads it from the checkpoint's version.
    use_cross_timestep: bool | None = None
    max_text_tokens: Positive | None = None  # None: what the tokenizer says, 1024 at most
    lora: LoraConfig = LoraConfig()


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
    video_guidance: GuidanceConfig = GuidanceConfig()
    audio_guidance: GuidanceConfig = GuidanceConfig()
    stg_blocks: tuple[int, ...] = ()
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


class AdvantageConfig(Frozen):
    """Scores to branch advantages (METHOD: modality-wise routing)."""

    method: Literal["omninft", "gdpo", "global"] = "omninft"
    std: Literal["global", "group"] = "global"
    final_batch_norm: bool = False
    shuffle: bool = False  # placebo control: advantages permuted inside their group


class SurgeryRangeConfig(Frozen):
    """Blocks from `start` to `stop` (exclusive), numbers or shares of the depth, and their gradient scale."""

    start: int | float
    stop: int | float
    scale: Annotated[float, Field(ge=0)]


class SurgeryConfig(Frozen):
    """Layer-wise gradient surgery on what the video loss sends into the audio stream."""

    enabled: bool = True
    schedule: tuple[SurgeryRangeConfig, ...] | None = None  # None: the reference schedule as shares of the depth
    audio_schedule: tuple[SurgeryRangeConfig, ...] | None = None  # V2A, off in the paper
    target: Literal["input", "projection"] = "input"
    scope: Literal["all", "video_loss_only"] = "all"


class RegionsConfig(Frozen):
    """Region-wise weights of the video loss from V2A attention."""

    enabled: bool = True
    method: Literal["minmax", "zscore_sigmoid", "top_share"] = "minmax"
    strength: float = 1.5  # lambda of minmax, w_max of the other two
    warmup: float = 0.1  # share of the run over which the strength rises; above 1: iterations
    window: tuple[Share, Share] = (0.5, 0.9)  # of the denoising steps
    first_block: int | float = 0  # blocks from here on; a float is a share of the depth
    rope: bool = True
    value_weighted: bool = False

    @model_validator(mode="after")
    def _window_is_ordered(self) -> RegionsConfig:
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window must rise, found {list(self.window)}, expected something like [0.5, 0.9]")
        return self


class CreditConfig(Frozen):
    """The three levels at which credit is assigned."""

    advantage: AdvantageConfig = AdvantageConfig()
    surgery: SurgeryConfig = SurgeryConfig()
    regions: RegionsConfig = RegionsConfig()


class SigmasConfig(Frozen):
    """Which of the sampling sigmas the loss is taken at."""

    choice: Literal["first_fraction", "spread", "list"] = "first_fraction"
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.4  # first_fraction
    count: Positive = 4  # spread: evenly spaced over the sampling schedule
    values: tuple[float, ...] = ()  # list

    @model_validator(mode="after")
    def _list_has_values(self) -> SigmasConfig:
        if self.choice == "list" and (not self.values or any(not 0 < s <= 1 for s in self.values)):
            raise ValueError(f"choice: list needs values in (0, 1], found {list(self.values)}")
        return self


class ObjectiveConfig(Frozen):
    """Negative-aware loss (DiffusionNFT) of both branches."""

    beta: Annotated[float, Field(gt=0)] = 1.0
    advantage_clip: Annotated[float, Field(gt=0)] = 5.0
    detach_weight: bool = True
    reference_weight: Annotated[float, Field(ge=0)] = 1e-4
    reference_space: Literal["x0", "velocity"] = "x0"
    video_weight: Annotated[float, Field(ge=0)] = 1.0
    audio_weight: Annotated[float, Field(ge=0)] = 1.0
    sigmas: SigmasConfig = SigmasConfig()
    # "sigma": one optimiser step per sigma over all clips; "iteration": one for everything (reference code).
    step_per: Literal["sigma", "iteration"] = "iteration"
    micro_batch: Positive = 32  # clips


class OptimiserConfig(Frozen):
    """AdamW."""

    learning_rate: Annotated[float, Field(gt=0)] = 3e-5
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0


class EvaluationConfig(Frozen):
    """Paired evaluation: the same prompts and noise at every evaluation, base and trained."""

    every: Annotated[int, Field(ge=0)] = 50  # iterations between dev evaluations; 0: none
    dev_clips: Annotated[int, Field(ge=0)] = 64
    test_clips: Annotated[int, Field(ge=0)] = 256  # base against trained, at the end
    shown_clips: Annotated[int, Field(ge=0)] = 8  # written as mp4 for the report
    seed: int = 1_000_003  # keys the evaluation noise, apart from the training seed
    sampling: SamplingConfig = SamplingConfig(
        num_steps=40,
        video_guidance=GuidanceConfig(text=3.0, stg=1.0, modality=3.0, rescale=0.7),
        audio_guidance=GuidanceConfig(text=7.0, stg=1.0, modality=3.0, rescale=0.7),
        stg_blocks=(29,),
    )


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
    credit: CreditConfig = CreditConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()
    distributed: DistributedConfig = DistributedConfig()

    @property
    def clips_per_iteration(self) -> int:
        return self.prompts.per_iteration * self.prompts.group_size

    def fingerprint(self) -> dict[str, str]:
        """What must agree for a checkpoint to continue this run: everything but length, place and logging."""
        tree = json.loads(self.model_dump_json(exclude={"run", "evaluation", "recipe", "held_out", "distributed"}))
        tree["run.old_schedule"] = self.run.old_schedule
        return {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in _flatten(tree).items()}

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
        _apply(tree, override)
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


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise OmniNFTError(f"override {override!r}: expected key=value, e.g. optimiser.learning_rate=1e-4")
    *path, last = key.split(".")
    node = tree
    for part in path:
        child = node.setdefault(part, {})
        if isinstance(child, list) and part != last:
            raise OmniNFTError(f"override {override!r}: {part} is a list; override it whole, as {part}=[...]")
        node = child
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise OmniNFTError(f"override {override!r}: the value is not valid YAML: {error}") from error
    if isinstance(parsed, str):
        # YAML 1.1 reads 1e-4 as text; people mean a number.
        with suppress(ValueError):
            parsed = float(parsed)
    node[last] = parsed


def build_config(tree: dict[str, Any], where: str = "config") -> Config:
    """Validate a plain mapping. Errors name the key, what was found and what was expected."""
    try:
        return Config.model_validate(_numbers(tree))
    except ValidationError as error:
        lines = []
        for e in error.errors():
            key = ".".join(str(p) for p in e["loc"])
            if e["type"] == "extra_forbidden":
                lines.append(f"unknown key {key!r}{_nearest(str(e['loc'][-1]), _known_keys(e['loc'][:-1]))}")
            else:
                lines.append(f"{key}: {e['msg']}; found {e['input']!r}")
        raise OmniNFTError(f"{where}: " + "; ".join(lines)) from error


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


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    node: type[BaseModel] = Config
    for part in location:
        if isinstance(part, int):
            continue
        annotation = node.model_fields[str(part)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        candidates += [a for c in list(candidates) for a in getattr(c, "__args__", ())]
        node = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(node.model_fields)


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f" (known: {', '.join(known)})" if known else ""
