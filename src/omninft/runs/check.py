"""`omninft check`: everything that can be found wrong before a run, and what the run will cost."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from omninft.checkpoint.store import ensure_writable
from omninft.config import Config
from omninft.distributed import Processes
from omninft.evaluation.wording import word_warning
from omninft.learning.update import TrainingBatch
from omninft.rollout.clips import roll_out
from omninft.runs.build import (
    Parts,
    build,
    build_rewards,
    check_division,
    new_run_folder,
    open_all_prompts,
    peak_memory_gb,
    require_judged,
    require_model,
)
from omninft.runs.cost import StageSeconds, run_seconds
from omninft.runs.folder import RUN_BYTES
from omninft.runs.metrics import require_loggers
from omninft.types import Finding, OmniNFTError


def check_run(config: Config, trial: bool = True) -> Iterator[Finding]:
    """Look at prompts, rewards, disk and model in turn; with `trial`, measure one small iteration and extrapolate.

    Nothing is written. What depends on something broken is left out.
    """
    ok = True
    for subject, look in (
        ("clips", lambda: _division(config)),
        ("prompts", lambda: _prompts(config)),
        ("loggers", lambda: _loggers(config)),
        ("rewards", lambda: _rewards(config)),
        ("disk", lambda: _disk(config)),
    ):
        finding = _look(subject, look)
        ok &= finding.ok
        yield finding
        if subject == "rewards" and not (files := _look("model files", lambda: _files(config))).ok:
            ok = False
            yield files
        if subject == "prompts" and finding.ok and (unknown := _words(config)) is not None:
            yield Finding("words", True, unknown, doubtful=True)
    if not ok:
        return
    try:
        parts = build(config, Processes(config.distributed.backend))
    except OmniNFTError as error:
        yield Finding("model", False, str(error))
        return
    facts, g = parts.policy.facts, parts.rollouts.geometry
    yield Finding(
        "model",
        True,
        f"{config.model.path}: {facts['blocks']} blocks, LoRA on {facts['lora_modules']} linears "
        f"({facts['lora_parameters']:,} parameters), credit {config.credit.kind}, objective {config.objective.kind}, "
        f"clips of {g.num_frames} frames {g.height} x {g.width}, {g.video_tokens} video and {g.audio_tokens} audio "
        "tokens",
    )
    if trial:
        yield _look("cost", lambda: _trial(parts))
    parts.close()


def _look(subject: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, True, look())
    except OmniNFTError as error:
        return Finding(subject, False, str(error))


def _division(config: Config) -> str:
    check_division(config, 1)
    steps = "an optimiser step per sigma" if config.optimiser.step_per == "sigma" else "one optimiser step"
    return f"{config.clips_per_iteration} an iteration, {config.run.iterations} iterations, {steps}"


def _prompts(config: Config) -> str:
    sets = open_all_prompts(config)
    if len(sets["train"]) < config.prompts.per_iteration:
        raise OmniNFTError(
            f"{config.prompts.train} holds {len(sets['train'])} prompts, an iteration needs "
            f"{config.prompts.per_iteration} (prompts.per_iteration)"
        )
    own = sets.pop("samples", None)
    listed = ", ".join(f"{len(s)} {split}" for split, s in sets.items()) + "; disjoint"
    return listed + (f"; {len(own)} of your own (samples)" if own is not None else "")


def _files(config: Config) -> str:
    require_model(config)
    return "there"


def _loggers(config: Config) -> str:
    require_loggers(config.run.loggers)
    return ", ".join(config.run.loggers) or "none"


def _words(config: Config) -> str | None:
    """What the model cannot read of the prompts."""
    sets = open_all_prompts(config)
    return word_warning(config.model.path, [prompt for found in sets.values() for prompt in found.prompts])


def _rewards(config: Config) -> str:
    trained, held_out = build_rewards(config)
    if not trained:
        raise OmniNFTError("rewards is empty: nothing to learn from; `omninft rewards` lists what there is")
    try:
        prompts = open_all_prompts(config)
    except OmniNFTError:
        prompts = {}  # what is wrong with them is a finding of its own
    require_judged(config, prompts, trained)
    listed = ", ".join(f"{c.name} -> {c.route}" for r in trained for c in r.components)
    watched = ", ".join(c.name for r in held_out for c in r.components)
    return listed + (f"; held out: {watched}" if watched else "")


def _disk(config: Config) -> str:
    folder = new_run_folder(config)
    # Asks the nearest folder that exists, so that a check leaves nothing behind.
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    ensure_writable(existing, RUN_BYTES)
    return f"{folder} can be written, {shutil.disk_usage(existing).free / 2**30:.1f} GB free"


def _trial(parts: Parts) -> str:
    """One iteration of one batch of clips, the seconds of each stage scaled to the whole run."""
    config, credit, update = parts.config, parts.credit, parts.update
    clock = _Clock()
    groups = parts.groups.groups(0)
    rollout, clips = next(roll_out(parts.rollouts, groups, config.seed, 0, "old", stage=clock))
    with clock("rewards"):
        table = parts.runner.score(clips)
    device = parts.policy.device
    advantages = credit.assign(table, rollout.groups, 0)
    tokens = credit.weigh(rollout, 0)
    probed = sum(credit.probes(i) for i in range(config.run.iterations)) / config.run.iterations
    gradients = None
    if probed:
        with clock("probe"):
            alone = [credit.alone(advantages, k).to(device) for k in range(len(advantages.components))]
            gradients = update.reward_gradients(rollout, tokens, alone, 0)
    branches = credit.combine(advantages, gradients, 0).to(device)
    num_valid = int(branches.video_valid.sum()), int(branches.audio_valid.sum())
    with clock("update"):
        update.run(TrainingBatch(rollout, branches, tokens, num_valid), 0)
    each = {name: seconds / len(clips) for name, seconds in clock.seconds.items()}
    iteration, total = run_seconds(
        config,
        parts.evaluators,
        StageSeconds(each["sampling"], each["decode"] + each["rewards"], each["update"], each.get("probe", 0.0)),
        parts.rollouts.geometry,
        parts.policy.geometry(config.evaluation_sampling),
        probed,
        parts.preview.shown if parts.preview is not None else 0,
    )
    return (
        f"about {iteration:.1f} s an iteration, {_duration(total)} in all with evaluation (measured on "
        f"{len(clips)} clips); peak memory {peak_memory_gb():.1f} GB"
    )


class _Clock:
    """Adds up the seconds of stages by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
