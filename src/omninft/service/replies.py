"""What a reward service answers: one definition for the server, its OpenAPI description and the client's checks."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from omninft.rewards.registry import ComponentSpec, Input, WeighedReward
from omninft.scorers.weights import JudgingModel
from omninft.service.messages import FORMAT, Limits
from omninft.types import Component, Route

Number = Annotated[float, Field(allow_inf_nan=False)]


class Reply(BaseModel):
    """Answers are read strictly; keys that a later server may add are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)


class ErrorReply(Reply):
    """Every answer that is not 2xx."""

    error: str
    request_id: str


class StateReply(Reply):
    """Of /health and /ready."""

    status: str


class ScoredComponent(Reply):
    """A column; where lower is better the weight is negative."""

    name: str
    route: Route
    weight: Number

    @property
    def component(self) -> Component:
        return Component(self.name, self.route, self.weight)


class ClipScores(Reply):
    """A row: `clip` is the clip's place in the request; a missing score is null and has a reason."""

    clip: Annotated[int, Field(ge=0)]
    scores: dict[str, Number | None]
    reasons: dict[str, str]


class Timings(Reply):
    """Seconds a request spent waiting for its turn, being decoded, being scored."""

    wait: Number
    decode: Number
    score: Number


class ScoreReply(Reply):
    request_id: str
    components: list[ScoredComponent]
    clips: list[ClipScores]
    seconds: Timings


class ModelDescription(Reply):
    name: str
    parameters: int
    licence: str
    commercial: bool
    verified: bool


class ComponentDescription(Reply):
    """A ComponentSpec; an end of `range` is null where there is no bound."""

    name: str
    route: Route
    description: str
    weight: Number
    range: Annotated[list[Number | None], Field(min_length=2, max_length=2)]
    higher_is_better: bool
    unit: str

    @property
    def spec(self) -> ComponentSpec:
        low, high = self.range
        ends = (-math.inf if low is None else low, math.inf if high is None else high)
        return ComponentSpec(
            self.name, self.route, self.description, self.weight, ends, self.higher_is_better, self.unit
        )


class RewardDescription(Reply):
    name: str
    inputs: list[Input]
    licence: str
    model: ModelDescription | None
    missing: str | None  # None when ready, else what is missing and what fetches it
    components: list[ComponentDescription]


class LimitsDescription(Reply):
    """Limits of one request."""

    clips: Annotated[int, Field(ge=1)]
    bytes: Annotated[int, Field(ge=1)]
    header_bytes: Annotated[int, Field(ge=1)]
    frames: Annotated[int, Field(ge=1)]
    pixels: Annotated[int, Field(ge=1)]
    channels: Annotated[int, Field(ge=1)]
    seconds: Number
    prompt_chars: int
    id_chars: int

    @property
    def limits(self) -> Limits:
        return Limits(**self.model_dump())


class RewardsReply(Reply):
    format: str
    version: str
    rewards: list[RewardDescription]
    limits: LimitsDescription


def describe(rewards: tuple[WeighedReward, ...], limits: Limits, version: str) -> RewardsReply:
    """What /v1/rewards answers; asks every reward whether its weights are there."""
    return RewardsReply(
        format=FORMAT,
        version=version,
        rewards=[_reward(reward) for reward in rewards],
        limits=LimitsDescription(**{name: getattr(limits, name) for name in LimitsDescription.model_fields}),
    )


def judging_model(rewards: list[RewardDescription]) -> JudgingModel | None:
    """One card for all models behind a service; commercial only if all of them are."""
    models = [reward.model for reward in rewards if reward.model is not None]
    if not models:
        return None
    return JudgingModel(
        name=" + ".join(model.name for model in models),
        parameters=sum(model.parameters for model in models),
        licence="; ".join(dict.fromkeys(model.licence for model in models)),
        commercial=all(model.commercial for model in models),
        verified=all(model.verified for model in models),
    )


def _reward(reward: WeighedReward) -> RewardDescription:
    model = reward.model
    card = None
    if model is not None:
        card = ModelDescription(
            name=model.name,
            parameters=model.parameters,
            licence=model.licence,
            commercial=model.commercial,
            verified=model.verified,
        )
    components = [
        ComponentDescription(
            name=spec.name,
            route=spec.route,
            description=spec.description,
            weight=spec.weight,
            range=[float(end) if math.isfinite(end) else None for end in spec.range],
            higher_is_better=spec.higher_is_better,
            unit=spec.unit,
        )
        for spec in reward.components
    ]
    return RewardDescription(
        name=reward.name,
        inputs=list(reward.inputs),
        licence=reward.licence,
        model=card,
        missing=reward.missing(),
        components=components,
    )
