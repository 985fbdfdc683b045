"""The benchmarks by name: which metrics they have, which of them can be computed here, and how."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omninft.config import RewardConfig
from omninft.distributed import default_device
from omninft.evaluation import javisbench, world_benchmark
from omninft.evaluation.benchmark import Benchmark
from omninft.evaluation.results import Metric
from omninft.evaluation.set_metrics import FeatureDistance, audio_distance, read_features, video_distance
from omninft.naming import did_you_mean
from omninft.prompts.prompt_file import PromptRow
from omninft.rewards.av_align import AVAlignReward
from omninft.rewards.dnsmos import DNSMOSReward
from omninft.rewards.flicker import FlickerReward
from omninft.rewards.model_reward import ModelReward
from omninft.rewards.motion import MotionReward
from omninft.rewards.presets import chosen_rewards
from omninft.scorers.weights import file_sha256
from omninft.types import OmniNFTError

BENCHMARKS = ("world", "javisbench")
ALL_COMPAT = "javisbench"  # every quirk at once
JAVISBENCH_FILES = "hf download JavisDiT/JavisBench JavisBench.csv --repo-type dataset --local-dir javisbench"

# Measurements and a model in a wheel: the same for every benchmark, the first by default, the others on request.
COMMON_METRICS = (
    Metric("av_align", "AV-Align", "peaks of optical flow and of sound coincide"),
    Metric("dnsmos", "DNSMOS", "clean speech, P.835 overall", unit="MOS"),
    Metric("flicker", "Flicker", "consecutive frames alike (VBench temporal_flickering)"),
    Metric("motion", "Motion", "speed of the fastest 5 % of the pixels", unit="frame sides/s"),
)
ON_REQUEST = ("dnsmos", "flicker", "motion")
_COMMON = {
    "av_align": javisbench.JudgeEntry(AVAlignReward, ("av_align",), {}),
    "dnsmos": javisbench.JudgeEntry(DNSMOSReward, ("dnsmos",), {}),
    "flicker": javisbench.JudgeEntry(FlickerReward, ("flicker",), {}),
    "motion": javisbench.JudgeEntry(MotionReward, ("motion",), {}),
}


@dataclass(frozen=True)
class Choice:
    """What of a benchmark is wanted, and with what."""

    benchmark: str = "world"
    metrics: tuple[str, ...] = ()  # empty: the default ones; "all": every one
    compat: tuple[str, ...] = ()  # quirks by name, or "javisbench"
    options: tuple[str, ...] = ()  # judge.key=value
    device: str | None = None  # of judging models; None: CUDA where there is one
    strict: bool = False  # what cannot be computed is an error
    real: Path | None = None
    features: Path | None = None
    networks: Mapping[str, Path | None] = field(default_factory=dict)  # "video" (I3D), "audio" (AudioCLIP)


def metric_names(benchmark: str) -> tuple[str, ...]:
    """All metrics of a benchmark, the ten columns first. Raises OmniNFTError for an unknown benchmark."""
    return tuple(m.name for m in (*_own_metrics(benchmark), *COMMON_METRICS)) + (
        ("fvd", "kvd", "fad") if benchmark == "javisbench" else ()
    )


def build_benchmark(choice: Choice) -> Benchmark:
    """The benchmark with the metrics that can be computed; notes say which cannot, and what would help.

    Raises:
        OmniNFTError: an unknown benchmark, metric, quirk or option; with `strict`, anything that is missing.
    """
    wanted = _wanted(choice)
    quirks = _quirks(choice)
    entries = {**(javisbench.JUDGES if choice.benchmark == "javisbench" else {}), **_COMMON}
    chosen = {name: e for name, e in entries.items() if set(e.metrics) & set(wanted)}
    configs = {c.name: c for c in chosen_rewards(tuple(chosen), None, choice.options)}
    judges: list[Any] = []
    lacking: dict[str, list[str]] = {}  # why -> labels
    weights: dict[str, str] = {}
    unpinned: dict[str, str] = {}
    own = {m.name: m for m in (*_own_metrics(choice.benchmark), *COMMON_METRICS)}
    computed: set[str] = set()
    if choice.benchmark == "world" and set(wanted) & {m.name for m in world_benchmark.METRICS}:
        judges.append(world_benchmark.WorldAnalogues())
        computed |= {m.name for m in world_benchmark.METRICS}
        weights["world analogues"] = f"measured, version {world_benchmark.VERSION}"
    for name, entry in chosen.items():
        judge = _judge(entry, configs[name], choice, wanted, quirks)
        why = judge.missing() if hasattr(judge, "missing") else None
        if why is not None:
            lacking.setdefault(why, []).extend(own[m].label for m in entry.metrics if m in wanted)
            continue
        judges.append(judge)
        computed |= set(entry.metrics)
        weights[name], loose = _provenance(judge)
        unpinned |= {f"{name}/{file}": digest for file, digest in loose.items()}
    sets = []
    for one in _set_metrics(choice, quirks, wanted):
        if (why := one.missing()) is not None:
            lacking.setdefault(why, []).extend(m.label for m in one.metrics)
        else:
            sets.append(one)
    notes = [f"{', '.join(labels)}: left out: {why}" for why, labels in lacking.items()]
    if choice.strict and notes:
        raise OmniNFTError("; ".join(notes))
    world = choice.benchmark == "world"
    settings = _settings(choice, quirks, unpinned, sets)
    return Benchmark(
        name=choice.benchmark,
        version=world_benchmark.VERSION if world else javisbench.VERSION,
        metrics=tuple(own[name] for name in wanted if name in own and name in computed),
        judges=tuple(judges),
        settings=settings,
        sets=tuple(sets),
        categories=_world_categories if world else _row_categories,
        seconds=None if world else javisbench.SECONDS,
        weights=weights,
        notes=tuple(notes),
    )


def _own_metrics(benchmark: str) -> tuple[Metric, ...]:
    if benchmark not in BENCHMARKS:
        raise OmniNFTError(f"unknown benchmark {benchmark!r}, expected one of: {', '.join(BENCHMARKS)}")
    return world_benchmark.METRICS if benchmark == "world" else javisbench.METRICS


def _wanted(choice: Choice) -> tuple[str, ...]:
    known = metric_names(choice.benchmark)
    if not choice.metrics:
        return tuple(name for name in known if name not in ON_REQUEST)
    if "all" in choice.metrics:
        return known
    for name in choice.metrics:
        if name not in known:
            hint = did_you_mean(name, known)
            raise OmniNFTError(f"unknown metric {name!r}{hint}; {choice.benchmark} has: {', '.join(known)}, or all")
    return tuple(name for name in known if name in choice.metrics)


def _quirks(choice: Choice) -> frozenset[str]:
    if choice.compat and choice.benchmark != "javisbench":
        raise OmniNFTError(f"compat is of the benchmark javisbench, found benchmark {choice.benchmark!r}")
    for name in choice.compat:
        if name not in (*javisbench.COMPAT, ALL_COMPAT):
            raise OmniNFTError(
                f"unknown compat {name!r}, expected {ALL_COMPAT} (all), or of: {', '.join(javisbench.COMPAT)}"
            )
    return frozenset(javisbench.COMPAT if ALL_COMPAT in choice.compat else choice.compat)


def _judge(
    entry: javisbench.JudgeEntry,
    config: RewardConfig,
    choice: Choice,
    wanted: Sequence[str],
    quirks: frozenset[str],
) -> Any:
    options: dict[str, Any] = {}
    on_device = isinstance(entry.make, type) and issubclass(entry.make, ModelReward)
    if on_device and entry.make is not DNSMOSReward:
        options["device"] = choice.device
    if entry.make is javisbench.BindScores:
        options["wanted"] = tuple(name for name in entry.metrics if name in wanted)
    if entry.make is AVAlignReward and choice.benchmark == "world":
        options["enlarge"] = True  # the world's frames are too small for optical flow
    for quirk, changes in entry.quirks.items():
        if quirk in quirks:
            options |= changes
    try:
        judge = entry.make(**(options | config.options))
    except TypeError as error:
        raise OmniNFTError(f"{config.name} does not take the options {config.options}: {error}") from error
    return world_benchmark.Conformed(judge) if choice.benchmark == "world" else judge


def _set_metrics(choice: Choice, quirks: frozenset[str], wanted: Sequence[str]) -> list[FeatureDistance]:
    if not {"fvd", "kvd", "fad"} & set(wanted):
        return []
    real, _ = read_features(choice.real)
    given, _ = read_features(choice.features)
    device = choice.device or default_device()

    def options(name: str) -> dict[str, Any]:
        return {
            "network": choice.networks.get(name),
            "real": real.get(name),
            "given": given.get(name),
            "device": device,
        }

    video = video_distance(unscaled="unscaled_fvd" in quirks, **options("video"))
    audio = audio_distance(**options("audio"))
    return [
        FeatureDistance(**{**vars(one), "distances": {m: d for m, d in one.distances.items() if m.name in wanted}})
        for one in (video, audio)
        if {m.name for m in one.metrics} & set(wanted)
    ]


def _settings(
    choice: Choice, quirks: frozenset[str], unpinned: dict[str, str], sets: Sequence[FeatureDistance]
) -> dict[str, Any]:
    """What changes numbers and is not in the version."""
    settings: dict[str, Any] = {"options": sorted(o for o in choice.options if not _harmless(o))}
    if choice.benchmark == "javisbench":
        settings |= javisbench.SETTINGS
        settings["compat"] = sorted(quirks)
        # Weights of a published checksum are as the version says; others may be anything.
        settings["weights"] = unpinned
        files = {"real": choice.real, **{f"network_{name}": path for name, path in choice.networks.items()}}
        settings["sets"] = {n: file_sha256(p)[:16] for n, p in files.items() if sets and p is not None and p.is_file()}
    return settings


def _harmless(option: str) -> bool:
    """Options of speed and place: the checksums say what lies there."""
    return option.partition("=")[0].rpartition(".")[2] in ("device", "workers", "budget", "path", "base", "tokenizer")


def _provenance(judge: Any) -> tuple[str, dict[str, str]]:
    """What a judge is, for readers, and the checksums of its files that no publication pins."""
    model = judge.model
    if model is None:
        versions = [f"{p} {importlib.metadata.version(p)}" for p in ("librosa", "opencv-python-headless")]
        return f"measured ({', '.join(versions)})", {}
    if model.package is not None:
        try:
            return f"{model.name}, package version {importlib.metadata.version(model.package)}", {}
        except importlib.metadata.PackageNotFoundError:
            return model.name, {}
    path = getattr(judge, "path", None)  # None of the world's judges has one
    parts = [model.name] + ([f"revision {model.revision}"] if model.revision else [])
    loose: dict[str, str] = {}
    for file in model.files:
        digest = (model.sha256 or {}).get(file)  # the loader refuses others
        place = model.find(file, path)
        if digest is None and place is not None:
            digest = loose[file] = file_sha256(place)
        if digest is not None:
            parts.append(f"{Path(file).name} sha256 {digest[:16]}")
    return ", ".join(parts), loose


def _world_categories(row: PromptRow) -> tuple[str, ...]:
    return world_benchmark.categories(row.prompt)


def _row_categories(row: PromptRow) -> tuple[str, ...]:
    return row.categories
