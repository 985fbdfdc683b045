"""What a reward is, and how one comes from its name in a recipe.

A reward of this package is one file with one class and one line in `REWARDS`; one of another package is an entry point
in the group "omninft.rewards"; one of the user's own is any callable, named in the recipe by its import path.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np

from omninft.config import RewardConfig, import_object
from omninft.hub import Need
from omninft.naming import did_you_mean
from omninft.scorers.weights import JudgingModel
from omninft.types import ROUTES, Clip, Component, OmniNFTError, Prompt, Route, ScoreTable

Input = Literal["video", "audio", "prompt_v", "prompt_a", "prompt_av"]
INPUTS: tuple[Input, ...] = ("video", "audio", "prompt_v", "prompt_a", "prompt_av")
ENTRY_POINTS = "omninft.rewards"

# Name in a recipe -> "module:factory"; imported when the reward is built. The factory takes the recipe's `options`.
REWARDS: dict[str, str] = {
    "videoalign": "omninft.rewards.videoalign:VideoAlignReward",
    "hpsv3": "omninft.rewards.hpsv3:HPSv3Reward",
    "audiobox": "omninft.rewards.audiobox:AudioBoxReward",
    "clap": "omninft.rewards.clap:CLAPReward",
    "desync": "omninft.rewards.desync:DeSyncReward",
    "imagebind": "omninft.rewards.imagebind:ImageBindReward",
    "clip": "omninft.rewards.clip:CLIPReward",
    "videoscore2": "omninft.rewards.videoscore2:VideoScore2Reward",
    "av_align": "omninft.rewards.av_align:AVAlignReward",
    "dnsmos": "omninft.rewards.dnsmos:DNSMOSReward",
    "speech": "omninft.rewards.speech:SpeechReward",
    "flicker": "omninft.rewards.flicker:FlickerReward",
    "motion": "omninft.rewards.motion:MotionReward",
    "remote": "omninft.service.reward:RemoteReward",
    "world": "omninft.rewards.world:WorldReward",
    "world_held_out": "omninft.rewards.world_held_out:WorldHeldOut",
}


@dataclass(frozen=True)
class ComponentSpec:
    """What a reward says about one of its numbers."""

    name: str
    route: Route
    description: str
    weight: float = 1.0  # default weight in training, a magnitude
    range: tuple[float, float] = (0.0, 1.0)  # lowest and highest possible score
    higher_is_better: bool = True
    unit: str = "1"

    @property
    def component(self) -> Component:
        """As it stands in score tables: where lower is better with a negative weight, so that training lowers it."""
        return Component(self.name, self.route, self.weight if self.higher_is_better else -self.weight)


@runtime_checkable
class Reward(Protocol):
    """A judge of clips. `score` may raise: the runner finds the clip that made it raise and marks that one missing.

    A reward that judges some prompts only may have a method `judges(prompt, components) -> str | None`: None where it
    can judge a clip of the prompt in the components of those names, else why not. A run asks it before it starts.
    """

    @property
    def name(self) -> str: ...

    @property
    def components(self) -> tuple[ComponentSpec, ...]: ...

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What of a clip it reads."""
        ...

    @property
    def licence(self) -> str:
        """Of the weights it loads, or of the measurement."""
        ...

    @property
    def model(self) -> JudgingModel | None:
        """What it loads; None for a measurement."""
        ...

    def score(self, clips: list[Clip]) -> ScoreTable:
        """[len(clips), len(components)], the components in the declared order; what cannot be judged is NaN."""
        ...


@dataclass(frozen=True)
class CallableReward:
    """A plain function `f(list[Clip]) -> sequence of float or None` as a reward with one component of its name."""

    name: str
    function: Callable[[list[Clip]], Sequence[float | None]]
    components: tuple[ComponentSpec, ...]
    inputs: tuple[Input, ...] = INPUTS
    licence: str = "the user's own"
    model: JudgingModel | None = None

    def score(self, clips: list[Clip]) -> ScoreTable:
        """None becomes missing. Raises ValueError when the function does not give one score per clip."""
        scores = list(self.function(clips))
        if len(scores) != len(clips):
            raise ValueError(f"{self.name} returned {len(scores)} scores for {len(clips)} clips")
        values = np.array([[np.nan if s is None else float(s)] for s in scores], dtype=np.float64).reshape(-1, 1)
        reasons = {(b, 0): "returned None" for b, s in enumerate(scores) if s is None}
        return ScoreTable(tuple(spec.component for spec in self.components), values, reasons)


@dataclass(frozen=True)
class WeighedReward:
    """A reward with the components a recipe takes, weighed as it says."""

    reward: Reward
    components: tuple[ComponentSpec, ...]
    time_limit: float | None = None  # seconds for one batch

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def device(self) -> str:
        """Rewards of one device run in turn, those of different devices at the same time."""
        return str(getattr(self.reward, "device", "cpu"))

    @property
    def inputs(self) -> tuple[Input, ...]:
        return self.reward.inputs

    @property
    def licence(self) -> str:
        return self.reward.licence

    @property
    def model(self) -> JudgingModel | None:
        return self.reward.model

    def missing(self) -> str | None:
        """None when it can be used, else what is missing and what fetches it."""
        look: Callable[[], str | None] = getattr(self.reward, "missing", lambda: None)
        return look()

    @property
    def needs(self) -> tuple[Need, ...]:
        """The files it loads and the package does not hold, as far as it says."""
        found: tuple[Need, ...] = getattr(self.reward, "needs", ())
        return found if self.missing() is not None else tuple(replace(need, missing=()) for need in found)

    def judges(self, prompt: Prompt) -> str | None:
        """None when it can judge clips of the prompt, as far as it says, else why not."""
        ask: Callable[[Prompt, Sequence[str]], str | None] = getattr(self.reward, "judges", lambda *_: None)
        return ask(prompt, [spec.name for spec in self.components])

    def score(self, clips: list[Clip]) -> ScoreTable:
        """Raises ValueError when the reward's table is not of the declared shape."""
        table = self.reward.score(clips)
        declared = [spec.name for spec in self.reward.components]
        if table.values.shape != (len(clips), len(declared)):
            raise ValueError(
                f"{self.name} returned scores of shape {list(table.values.shape)}, "
                f"expected {[len(clips), len(declared)]}"
            )
        columns = [declared.index(spec.name) for spec in self.components]
        return replace(table.select(columns), components=tuple(spec.component for spec in self.components))


def reward_names() -> list[str]:
    """Names of the shipped rewards and of those that installed packages add."""
    added = (point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS))
    return sorted({*REWARDS, *added})


def build_reward(config: RewardConfig) -> WeighedReward:
    """The reward a recipe names: registered ("world"), or a callable by import path ("package.module:function").

    `components` of the config selects components and gives their weights; empty takes all with their own. `weight`
    multiplies them. A callable gets its route from the config or from its attribute `route`, and `options` as keyword
    arguments. The working directory is on the import path. An import path may also name a class or an object that
    follows `Reward`.

    Raises:
        OmniNFTError: unknown name or component (with the nearest one), failed import, refused options, a callable
            without a route, or a route that contradicts the reward's own.
    """
    where = f"reward {config.name!r}"
    if ":" in config.name:
        reward = _from_path(config, where)
    else:
        if config.name not in reward_names():
            raise OmniNFTError(
                f"unknown {where}{did_you_mean(config.name, reward_names())}; known: {', '.join(reward_names())}; "
                "a callable of your own is named as package.module:function"
            )
        reward = _construct(_registered(config.name), config, where)
    for spec in reward.components:
        if config.route is not None and spec.route != config.route and spec.name in (config.components or {spec.name}):
            raise OmniNFTError(
                f"{where}: its component {spec.name!r} has the route {spec.route!r}, the config says {config.route!r}; "
                "leave `route` out of the config"
            )
    return WeighedReward(reward, _select(reward.components, config, where), config.time_limit)


def _select(specs: tuple[ComponentSpec, ...], config: RewardConfig, where: str) -> tuple[ComponentSpec, ...]:
    known = {spec.name: spec for spec in specs}
    for name in config.components:
        if name not in known:
            raise OmniNFTError(
                f"{where} has no component {name!r}{did_you_mean(name, known)}; it has: {', '.join(known)}"
            )
    weights = config.components or {spec.name: spec.weight for spec in specs}
    return tuple(replace(spec, weight=config.weight * weights[spec.name]) for spec in specs if spec.name in weights)


def _registered(name: str) -> Any:
    if name in REWARDS:
        return import_object(REWARDS[name], f"reward {name!r}")
    point = next(p for p in importlib.metadata.entry_points(group=ENTRY_POINTS) if p.name == name)
    return point.load()


def _construct(factory: Any, config: RewardConfig, where: str) -> Reward:
    try:
        return cast(Reward, factory(**config.options))
    except TypeError as error:
        raise OmniNFTError(f"{where} does not take the options {config.options}: {error}") from error


def _from_path(config: RewardConfig, where: str) -> Reward:
    found = import_object(config.name, where)
    if isinstance(found, type) and hasattr(found, "score"):
        return _construct(found, config, where)
    if isinstance(found, Reward):
        return found
    if not callable(found):
        raise OmniNFTError(f"{where} is a {type(found).__name__}, expected a callable f(list of clips)")
    own = getattr(found, "route", None)
    if own is not None and config.route is not None and own != config.route:
        raise OmniNFTError(f"{where}: its attribute `route` is {own!r}, the config says {config.route!r}")
    route = config.route or own
    if route not in ROUTES:
        problem = "needs a route" if route is None else f"has the route {route!r}"
        raise OmniNFTError(f"{where} {problem}; expected `route` to be one of: {', '.join(ROUTES)}")
    function = functools.partial(found, **config.options) if config.options else found
    name = config.name.rpartition(":")[2]
    doc = (getattr(found, "__doc__", None) or f"scores of {config.name}").strip().splitlines()[0]
    spec = ComponentSpec(name, route, doc, range=(-np.inf, np.inf))
    return CallableReward(name, function, (spec,))
