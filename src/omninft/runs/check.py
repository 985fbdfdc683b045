"""`omninft check`: everything that can be found wrong before a run, and what the run will cost."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator

from omninft.checkpoint.store import ensure_writable
from omninft.config import Config
from omninft.distributed import Processes
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
)
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


def _loggers(config: Config) -> str:
    require_loggers(config.run.loggers)
    return ", ".join(config.run.loggers) or "none"


def _rewards(config: Config) -> str:
    trained, held_out = build_rewards(config)
    if not trained:
        raise OmniNFTError("rewards is empty: nothing to learn from; `omninft rewards` lists what there is")
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
    config, credit = parts.config, parts.credit
    begin = time.monotonic()
    groups = parts.groups.groups(0)
    rollout, clips = next(roll_out(parts.rollouts, groups, config.seed, 0, "old"))
    table = parts.runner.score(clips)
    rollout_seconds = time.monotonic() - begin
    begin = time.monotonic()
    branches = credit.combine(credit.assign(table, rollout.groups, 0), None, 0).to(parts.policy.device)
    num_valid = int(branches.video_valid.sum()), int(branches.audio_valid.sum())
    parts.update.run(TrainingBatch(rollout, branches, credit.weigh(rollout, 0), num_valid), 0)
    update_seconds = time.monotonic() - begin
    share = config.clips_per_iteration / len(clips)
    iteration = (rollout_seconds + update_seconds) * share
    evaluation = config.evaluation
    dev_times = config.run.iterations // evaluation.every + 1 if evaluation.every and "dev" in parts.prompts else 0
    evaluated = dev_times * evaluation.dev_clips + (2 * evaluation.test_clips if "test" in parts.prompts else 0)
    if parts.preview is not None:
        evaluated += parts.preview.shown * (config.run.iterations // config.samples.every + 1)
    steps = evaluation.sampling.num_steps / config.sampling.num_steps
    total = iteration * config.run.iterations + evaluated * rollout_seconds / len(clips) * steps
    return (
        f"about {iteration:.1f} s an iteration, {_duration(total)} in all with evaluation (measured on "
        f"{len(clips)} clips); peak memory {peak_memory_gb():.1f} GB"
    )


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
