"""The benchmarks by name: which of their metrics can be computed here, and how."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omninft.distributed import default_device
from omninft.evaluation.benchmark import Benchmark
from omninft.evaluation.description import BenchmarkDescription, JudgeEntry, Options
from omninft.evaluation.javisbench import JAVISBENCH
from omninft.evaluation.set_metrics import FeatureDistance, read_features
from omninft.evaluation.world_benchmark import WORLD
from omninft.naming import did_you_mean
from omninft.rewards.presets import options_by_name
from omninft.scorers.weights import file_sha256
from omninft.types import OmniNFTError

# A benchmark is a value; adding one is its file and its place here.
BENCHMARKS: dict[str, BenchmarkDescription] = {one.name: one for one in (WORLD, JAVISBENCH)}


@dataclass(frozen=True)
class Choice:
    """What of a benchmark is wanted, and with what."""

    benchmark: str = "world"
    metrics: tuple[str, ...] = ()  # empty: the default ones; "all": every one
    compat: tuple[str, ...] = ()  # quirks by name, or the name of the benchmark: all
    options: tuple[str, ...] = ()  # judge.key=value
    device: str | None = None  # of judging models; None: CUDA where there is one
    strict: bool = False  # what cannot be computed is an error
    real: Path | None = None
    features: Path | None = None
    networks: Mapping[str, Path | None] = field(default_factory=dict)  # "video" (I3D), "audio" (AudioCLIP)


def described(name: str) -> BenchmarkDescription:
    """A benchmark by name. Raises OmniNFTError for an unknown one."""
    if name not in BENCHMARKS:
        raise OmniNFTError(f"unknown benchmark {name!r}, expected one of: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def metric_names(benchmark: str) -> tuple[str, ...]:
    """All metrics of a benchmark, those of its table first. Raises OmniNFTError for an unknown benchmark."""
    return described(benchmark).metric_names


def build_benchmark(choice: Choice) -> Benchmark:
    """The benchmark with the metrics that can be computed; notes say which cannot, and what would help.

    Raises:
        OmniNFTError: an unknown benchmark, metric, quirk or option; with `strict`, anything that is missing.
    """
    about = described(choice.benchmark)
    wanted = _wanted(about, choice.metrics)
    quirks = _quirks(about, choice.compat)
    chosen = {name: entry for name, entry in about.judges.items() if set(entry.metrics) & set(wanted)}
    options = options_by_name(tuple(chosen), choice.options)
    labels = {metric.name: metric.label for metric in about.metrics}
    judges: list[Any] = []
    lacking: dict[str, list[str]] = {}  # why -> labels
    weights: dict[str, str] = {}
    unpinned: dict[str, str] = {}
    computed: set[str] = set()
    for name, entry in chosen.items():
        judge = _judge(name, entry, options[name], choice, wanted, quirks)
        why = judge.missing() if hasattr(judge, "missing") else None
        if why is not None:
            lacking.setdefault(why, []).extend(labels[m] for m in entry.metrics if m in wanted)
            continue
        judges.append(judge)
        computed |= set(entry.metrics)
        weights[name], loose = (entry.provenance, {}) if entry.provenance else _provenance(judge)
        unpinned |= {f"{name}/{file}": digest for file, digest in loose.items()}
    sets = []
    for one in _set_metrics(about, choice, quirks, wanted):
        if (why := one.missing()) is not None:
            lacking.setdefault(why, []).extend(m.label for m in one.metrics)
        else:
            sets.append(one)
    notes = [f"{', '.join(named)}: left out: {why}" for why, named in lacking.items()]
    if choice.strict and notes:
        raise OmniNFTError("; ".join(notes))
    return Benchmark(
        name=about.name,
        version=about.version,
        metrics=tuple(metric for metric in about.metrics if metric.name in wanted and metric.name in computed),
        judges=tuple(judges),
        settings=_settings(about, choice, quirks, unpinned, sets),
        sets=tuple(sets),
        categories=about.categories,
        seconds=about.form.seconds if about.form is not None else None,
        weights=weights,
        notes=tuple(notes),
    )


def _wanted(about: BenchmarkDescription, metrics: Sequence[str]) -> tuple[str, ...]:
    known = about.metric_names
    if not metrics:
        return tuple(name for name in known if name not in about.on_request)
    if "all" in metrics:
        return known
    for name in metrics:
        if name not in known:
            hint = did_you_mean(name, known)
            raise OmniNFTError(f"unknown metric {name!r}{hint}; {about.name} has: {', '.join(known)}, or all")
    return tuple(name for name in known if name in metrics)


def _quirks(about: BenchmarkDescription, compat: Sequence[str]) -> frozenset[str]:
    if compat and not about.quirks:
        having = ", ".join(one.name for one in BENCHMARKS.values() if one.quirks)
        raise OmniNFTError(f"compat is of the benchmark {having}, found benchmark {about.name!r}")
    for name in compat:
        if name not in (*about.quirks, about.name):
            raise OmniNFTError(
                f"unknown compat {name!r}, expected {about.name} (all), or of: {', '.join(about.quirks)}"
            )
    return frozenset(about.quirks if about.name in compat else compat)


def _judge(
    name: str,
    entry: JudgeEntry,
    own: Mapping[str, object],
    choice: Choice,
    wanted: Sequence[str],
    quirks: frozenset[str],
) -> Any:
    options: dict[str, Any] = {"device": choice.device} if entry.takes_device else {}
    if entry.takes_wanted:
        options["wanted"] = tuple(metric for metric in entry.metrics if metric in wanted)
    options |= {**entry.options, **_changes(entry.quirks, quirks)}
    try:
        judge = entry.make(**(options | dict(own)))
    except TypeError as error:
        raise OmniNFTError(f"{name} does not take the options {dict(own)}: {error}") from error
    return entry.wrap(judge)


def _changes(known: Mapping[str, Options], quirks: frozenset[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for quirk, options in known.items():
        if quirk in quirks:
            changes |= options
    return changes


def _set_metrics(
    about: BenchmarkDescription, choice: Choice, quirks: frozenset[str], wanted: Sequence[str]
) -> list[FeatureDistance]:
    entries = {name: entry for name, entry in about.sets.items() if set(entry.metrics) & set(wanted)}
    if not entries:
        return []
    real, _ = read_features(choice.real)
    given, _ = read_features(choice.features)
    made = [
        entry.make(
            network=choice.networks.get(name),
            real=real.get(name),
            given=given.get(name),
            device=choice.device or default_device(),
            **_changes(entry.quirks, quirks),
        )
        for name, entry in entries.items()
    ]
    return [replace(one, distances={m: d for m, d in one.distances.items() if m.name in wanted}) for one in made]


def _settings(
    about: BenchmarkDescription,
    choice: Choice,
    quirks: frozenset[str],
    unpinned: dict[str, str],
    sets: Sequence[FeatureDistance],
) -> dict[str, Any]:
    """What changes numbers and is not in the version."""
    # Weights of a published checksum are as the version says; others may be anything.
    settings: dict[str, Any] = {
        "options": sorted(o for o in choice.options if not _harmless(o)),
        "weights": unpinned,
        **about.settings,
    }
    if about.quirks:
        settings["compat"] = sorted(quirks)
    if about.sets:
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
