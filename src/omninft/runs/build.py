"""From a config to the parts of a run. Nothing here writes anything."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from omninft.clips.first_frame import read_first_frame
from omninft.config import Config, MethodOptions, load_config
from omninft.credit.protocol import Credit, CreditContext, CreditOptions
from omninft.credit.surgery import GradientSurgery
from omninft.distributed import Processes, available_cores
from omninft.evaluation.held_out import Evaluator
from omninft.evaluation.paired import Group, Measure
from omninft.export.lora import export_lora
from omninft.hub import describe_missing
from omninft.learning.update import PolicyUpdate
from omninft.models.files import fetch_command, model_needs
from omninft.models.ltx2 import LTX2Policy
from omninft.models.protocol import JointPolicy
from omninft.naming import SAFE_NAME, is_safe_name
from omninft.noise import Occasion
from omninft.objectives.protocol import Objective, ObjectiveContext, ObjectiveOptions
from omninft.prompts.prompt_set import PromptSet, require_disjoint
from omninft.prompts.sampler import GroupSampler, evaluation_groups, spread
from omninft.prompts.sources import open_prompts
from omninft.rewards.failures import FailureLog
from omninft.rewards.registry import WeighedReward, build_reward
from omninft.rewards.runner import RewardRunner
from omninft.rollout.sampler import RolloutSampler
from omninft.runs.metrics import require_loggers
from omninft.types import OmniNFTError, PromptGroup

ASKED_PROMPTS = 8  # of each set, whether the rewards can judge them


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of."""

    config: Config
    processes: Processes
    prompts: dict[str, PromptSet]  # train, and dev, test and samples where there are some
    rewards: list[WeighedReward]
    held_out: list[WeighedReward]
    policy: JointPolicy
    groups: GroupSampler
    rollouts: RolloutSampler
    runner: RewardRunner
    credit: Credit
    surgery: GradientSurgery | None
    objective: Objective
    update: PolicyUpdate
    evaluators: dict[str, Evaluator]  # dev and test
    preview: Evaluator | None  # of the user's own prompts, judged by nothing
    export: Callable[[Path], Path]  # writes what was trained, for other programs, into a folder

    @property
    def measures(self) -> list[Measure]:
        """What an evaluation measures, in the order of its columns."""
        groups: tuple[tuple[Group, list[WeighedReward]], ...]
        groups = ("trained", self.rewards), ("held_out", self.held_out)
        return [
            Measure(c.name, group, c.route, c.higher_is_better, "" if c.unit == "1" else c.unit)
            for group, rewards in groups
            for reward in rewards
            for c in reward.components
        ]

    def close(self, wait: bool = True) -> None:
        """End what runs in the background; without `wait` what hangs there is left behind."""
        self.runner.close(wait)


def build(config: Config, processes: Processes) -> Parts:
    """Put a run together.

    Raises:
        OmniNFTError: whatever can be found wrong before the first iteration: prompts, rewards, model, sizes, sampling
            of training and of evaluations, methods that do not fit.
    """
    torch.set_num_threads(config.run.threads or available_cores())
    check_division(config, processes.world)
    require_loggers(config.run.loggers)
    prompts = open_all_prompts(config)
    rewards, held_out = build_rewards(config)
    require_judged(config, prompts, rewards)
    require_model(config)
    policy = LTX2Policy.load(config.model, config.seed)
    geometry = policy.geometry(config.sampling)
    blocks = len({site.block for site in policy.sites})
    context = CreditContext(blocks, geometry.latent_frames, config.run.iterations, config.seed, processes)
    credit = _credit_options(config.credit).build(context)
    objective = _objective_options(config.objective).build(ObjectiveContext(geometry, config.seed, config.sampling))
    rollouts = RolloutSampler(policy, config.sampling, credit.needs | objective.needs, read_first_frame)
    plan, ones = credit.surgery, (1.0,) * blocks
    failures = FailureLog()
    surgery = None if plan is None else GradientSurgery(policy.sites, ones, ones, plan.target)
    return Parts(
        config=config,
        processes=processes,
        prompts=prompts,
        rewards=rewards,
        held_out=held_out,
        policy=policy,
        groups=GroupSampler(
            prompts["train"].prompts, config.prompts.per_iteration, config.prompts.group_size, config.seed
        ),
        rollouts=rollouts,
        runner=RewardRunner(rewards, config.run.max_missing_share, failures),
        credit=credit,
        surgery=surgery,
        objective=objective,
        update=PolicyUpdate(
            policy,
            rollouts.geometry,
            objective,
            config.optimiser,
            rollouts.sigmas,
            processes,
            surgery,
            plan is not None and plan.video_loss_only,
        ),
        evaluators=_evaluators(config, policy, prompts, RewardRunner([*rewards, *held_out], 1.0, failures), processes),
        preview=_preview(config, policy, prompts, processes),
        export=partial(export_lora, policy.adapters),
    )


def _credit_options(options: MethodOptions) -> CreditOptions:
    if not isinstance(options, CreditOptions):
        raise OmniNFTError(f"credit.kind {options.kind!r} is a {type(options).__name__}, expected CreditOptions")
    return options


def _objective_options(options: MethodOptions) -> ObjectiveOptions:
    if not isinstance(options, ObjectiveOptions):
        raise OmniNFTError(f"objective.kind {options.kind!r} is a {type(options).__name__}, expected ObjectiveOptions")
    return options


def _evaluators(
    config: Config,
    policy: JointPolicy,
    prompts: dict[str, PromptSet],
    runner: RewardRunner,
    processes: Processes,
) -> dict[str, Evaluator]:
    """Of the splits that are evaluated."""
    evaluation = config.evaluation
    wanted = {
        "dev": (evaluation.dev_clips if evaluation.every else 0, Occasion.DEV),
        "test": (evaluation.test_clips, Occasion.TEST),
    }
    wanted = {split: found for split, found in wanted.items() if found[0] and split in prompts}
    if not wanted:
        return {}
    sampler = RolloutSampler(policy, config.evaluation_sampling, read_frame=read_first_frame)
    return {
        split: Evaluator(
            sampler,
            evaluation_groups(prompts[split].prompts, clips),
            evaluation.seed,
            occasion,
            runner.score,
            processes,
            evaluation.shown_clips,
        )
        for split, (clips, occasion) in wanted.items()
    }


def _preview(
    config: Config, policy: JointPolicy, prompts: dict[str, PromptSet], processes: Processes
) -> Evaluator | None:
    """Every clip of `samples` is shown, none is scored."""
    if "samples" not in prompts:
        return None
    samples = tuple(range(config.samples.count))
    groups = [PromptGroup(prompt, samples) for prompt in prompts["samples"].prompts]
    sampler = RolloutSampler(policy, config.evaluation_sampling, read_frame=read_first_frame)
    shown = len(groups) * len(samples)
    return Evaluator(
        sampler, groups, config.evaluation.seed, Occasion.PREVIEW, RewardRunner(()).score, processes, shown
    )


def check_division(config: Config, processes: int) -> None:
    """Refuse an iteration whose clips do not divide into processes and micro-batches.

    Raises:
        OmniNFTError: with the numbers found and ones that would do.
    """
    clips, micro = config.clips_per_iteration, config.optimiser.micro_batch
    if clips % processes:
        raise OmniNFTError(
            f"{config.prompts.per_iteration} prompts x {config.prompts.group_size} clips = {clips} clips an iteration "
            f"do not divide by {processes} processes; change prompts.per_iteration or prompts.group_size"
        )
    share = clips // processes
    if share > micro and share % micro:
        raise OmniNFTError(
            f"{clips} clips an iteration over {processes} processes are {share} each, which optimiser.micro_batch "
            f"{micro} does not divide; {max(m for m in range(1, micro + 1) if share % m == 0)} would"
        )


def open_all_prompts(config: Config) -> dict[str, PromptSet]:
    """Train, dev and test prompts, checked to be disjoint, and those of `samples`, which may be any."""
    sources = {"train": config.prompts.train, "dev": config.prompts.dev, "test": config.prompts.test}
    sources["samples"] = config.samples.prompts
    sets = {split: open_prompts(source) for split, source in sources.items() if source}
    require_disjoint(sets["train"], sets.get("dev"), sets.get("test"))
    return sets


def build_rewards(config: Config) -> tuple[list[WeighedReward], list[WeighedReward]]:
    """Trained and held-out rewards, with all they load in place; no component may be in both."""
    trained = [build_reward(r) for r in config.rewards]
    held_out = [build_reward(r) for r in config.held_out]
    missing = [f"reward {r.name!r}: {why}" for r in (*trained, *held_out) if (why := r.missing()) is not None]
    if missing:
        way = f"`omninft fetch {config.recipe}` gets what can be downloaded, `omninft rewards` has every command"
        raise OmniNFTError(f"not ready ({way}):\n" + "\n".join(missing))
    names = [c.name for r in (*trained, *held_out) for c in r.components]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise OmniNFTError(f"rewards and held_out give components of the same name: {', '.join(twice)}")
    return trained, held_out


def require_model(config: Config) -> None:
    """Refuse a hub model that is not on this machine: nothing is downloaded here.

    Raises:
        OmniNFTError: what is missing, with sizes and the command that fetches it.
    """
    try:
        same = load_config(config.recipe).model == config.model
    except OmniNFTError:  # the recipe was a file
        same = False
    command = f"omninft fetch {config.recipe}" if same else fetch_command(config.model)
    if (why := describe_missing(model_needs(config.model), command)) is not None:
        raise OmniNFTError(f"{config.model.path} is {why}")


def require_judged(config: Config, prompts: Mapping[str, PromptSet], rewards: Sequence[WeighedReward]) -> None:
    """Refuse prompts that a trained reward cannot judge, as far as it says so: a few of each set are put to it.

    Raises:
        OmniNFTError: more of them than may be missing (run.max_missing_share), with the reward, the prompts and why.
    """
    unused = {"samples"} | ({"dev"} if not config.evaluation.every else set())
    unused |= {"test"} if not config.evaluation.test_clips else set()
    for reward in rewards:
        for split, found in prompts.items():
            if split in unused:
                continue
            asked = [found.prompts[i] for i in spread(ASKED_PROMPTS, len(found.prompts))]
            refused = [(prompt, why) for prompt in asked if (why := reward.judges(prompt)) is not None]
            if len(refused) <= config.run.max_missing_share * len(asked):
                continue
            prompt, why = refused[0]
            raise OmniNFTError(
                f"reward {reward.name!r} cannot judge {len(refused)} of {len(asked)} prompts of {found.source} "
                f"(prompts.{split}), e.g. {prompt.id}: {why}; give rewards that can, or prompts of its kind"
            )


def new_run_folder(config: Config) -> Path:
    """runs/NAME, or NAME-2, NAME-3, ... if there is one already; a name the user gave must be free."""
    parent = Path(config.run.folder)
    if config.run.name is not None:
        folder = parent / config.run.name
        if folder.exists() and any(folder.iterdir()):
            raise OmniNFTError(
                f"{folder} already holds a run; go on with it by `omninft train --resume {folder}`, "
                "or choose another run.name"
            )
        return folder
    name = config.recipe.replace("+", "-")  # as names of files are
    if not is_safe_name(name):
        raise OmniNFTError(
            f"the recipe's name {name!r:.120} cannot name the run's folder: expected {SAFE_NAME}; set run.name"
        )
    folder, number = parent / name, 1
    while folder.exists():  # an empty one may be another run's, which made it a moment ago
        number += 1
        folder = parent / f"{name}-{number}"
    return folder


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far; on CUDA the largest allocation."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    # Bytes on macOS, KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
