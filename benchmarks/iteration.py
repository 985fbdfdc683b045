"""Seconds per stage of one training iteration of 64 clips on the bundled model, and ratios against plainer loops.

    python -m benchmarks.iteration [--clips 64] [--rounds 3]

Three loops do the same work (10 steps, V2A attention sums, decode, the world's rewards, 4 sigmas with three
predictions and a backward each, an optimiser step per sigma), in turn, in one process:

    ours       batches of 32; column sums only; adapters folded into weights; rotary embeddings kept between calls;
               rewards beside the next batch's sampling
    batched    the same batches without those: PEFT's own forward, rotary embeddings anew in every call, whole
               attention maps, rewards after all sampling
    reference  as the paper's reference code works: one clip at a time in every stage, whole attention maps copied to
               host memory, rewards one by one (measured on `--reference-clips` clips and scaled up)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor

from omninft.config import Config, load_config
from omninft.credit.protocol import CreditContext, CreditOptions
from omninft.credit.surgery import GradientSurgery
from omninft.distributed import Processes, available_cores
from omninft.learning.update import PolicyUpdate, TrainingBatch
from omninft.models.adapters import AdaptedLinear
from omninft.models.ltx2 import LTX2Policy
from omninft.models.recording import V2ARecorder
from omninft.objectives.protocol import ObjectiveContext, ObjectiveOptions
from omninft.prompts.sources import open_prompts
from omninft.rewards.registry import build_reward
from omninft.rewards.runner import RewardRunner
from omninft.rollout.clips import decode_clips
from omninft.rollout.sampler import RolloutSampler, batches, collection_steps
from omninft.runs.build import peak_memory_gb
from omninft.types import PromptGroup, Rollout, ScoreTable

STAGES = ("sampling", "decode", "rewards", "update")


def whole_maps(query: Tensor, key: Tensor, value: Tensor | None) -> Tensor:
    """Column sums by way of the whole map [B, H, Ta, Tv], which goes to host memory first."""
    maps = (query.float() @ key.float().transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
    return maps.to("cpu", copy=True).mean(1).sum(1)


class Loop:
    """One way of running an iteration."""

    def __init__(self, config: Config, plain: bool, batch_size: int) -> None:
        self.config, self.batch_size = config, batch_size
        self.policy = LTX2Policy.load(config.model, config.seed)
        if plain:
            take_off_optimisations(self.policy)
        assert isinstance(config.credit, CreditOptions)
        assert isinstance(config.objective, ObjectiveOptions)
        geometry = self.policy.geometry(config.sampling)
        blocks = len(self.policy.blocks)
        self.credit = config.credit.build(CreditContext(blocks, geometry.latent_frames, 1, config.seed, Processes()))
        objective = config.objective.build(ObjectiveContext(geometry, config.seed))
        (recording,) = self.credit.needs.recordings
        recorder = V2ARecorder(self.policy.blocks, whole_maps if plain else None)
        steps = collection_steps(config.sampling.num_steps, recording.window)
        self.sampler = RolloutSampler(self.policy, config.sampling, recorders=[(recorder, steps)])
        self.overlap = not plain
        self.runner = RewardRunner([build_reward(r) for r in config.rewards])
        self.surgery = GradientSurgery(self.policy.sites, (1.0,) * blocks)
        self.update = PolicyUpdate(
            self.policy,
            geometry,
            objective,
            config.optimiser.model_copy(update={"micro_batch": batch_size}),
            self.sampler.sigmas,
            Processes(),
            self.surgery,
        )

    def run(self, groups: list[PromptGroup], iteration: int) -> dict[str, float]:
        """Seconds per stage of one iteration."""
        seconds = dict.fromkeys(STAGES, 0.0)

        def timed(stage: str, call: Any, *args: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args)
            seconds[stage] += time.perf_counter() - begin
            return result

        rollouts, pending, waiting = [], [], []
        for batch in batches(groups, self.batch_size):
            rollout = timed("sampling", self.sampler.sample, batch, 0, iteration, "old")
            clips = timed("decode", decode_clips, self.policy, rollout, self.sampler.geometry)
            rollouts.append(rollout)
            pending.append(self.runner.submit(clips)) if self.overlap else waiting.append(clips)
        tables = [timed("rewards", future.result) for future in pending]
        tables += [timed("rewards", self.runner.score, clips) for clips in waiting]
        advantages = self.credit.assign(ScoreTable.cat(tables), groups, iteration)
        rollout = Rollout.cat(rollouts)
        scales = self.credit.gradient_scales(rollout)
        assert scales is not None
        self.surgery.set_schedules(scales.a2v, scales.v2a)
        branches = self.credit.combine(advantages, None, iteration)
        num_valid = int(branches.video_valid.sum()), int(branches.audio_valid.sum())
        lessons = TrainingBatch(rollout, branches, self.credit.weigh(rollout, iteration), num_valid)
        timed("update", self.update.run, lessons, iteration)
        self.policy.adapters.mix(0.0)
        return seconds


def take_off_optimisations(policy: LTX2Policy) -> None:
    """PEFT's own forward and diffusers' own rotary embeddings."""
    transformer = policy.transformer
    for name in ("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope"):
        setattr(transformer, name, getattr(transformer, name).rotary)

    def plain(layer: AdaptedLinear, x: Tensor) -> Tensor:
        layer._disable_adapters = layer.switch.active == "reference"
        layer._active_adapter = [layer.switch.active]
        return LoraLinear.forward(layer, x)

    for layer in policy.adapters.layers:
        layer.forward = partial(plain, layer)  # type: ignore[method-assign]


def prompt_groups(clips: int, size: int) -> list[PromptGroup]:
    prompts = open_prompts("world:train").prompts
    return [PromptGroup(prompts[i * 7], tuple(range(size))) for i in range(clips // size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference-clips", type=int, default=8)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(available_cores())
    config = load_config("omninft", [f"model.path={arguments.model}"])
    loops = {"ours": (Loop(config, False, 32), arguments.clips)}
    loops["ours"][0].run(prompt_groups(arguments.clips, 8), 0)  # warm-up, and the peak of this loop alone
    peak = peak_memory_gb()
    loops["batched"] = (Loop(config, True, 32), arguments.clips)
    loops["reference"] = (Loop(config, True, 1), arguments.reference_clips)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
    for number in range(arguments.rounds):
        for name, (loop, clips) in loops.items():
            seconds = loop.run(prompt_groups(clips, min(8, clips)), number + 1)
            scale = arguments.clips / clips
            measured[name].append({stage: s * scale for stage, s in seconds.items()})
    medians = {
        name: {stage: statistics.median(r[stage] for r in rounds) for stage in STAGES}
        for name, rounds in measured.items()
    }
    totals = {name: sum(stages.values()) for name, stages in medians.items()}
    print(f"{arguments.clips} clips, {torch.get_num_threads()} threads, median of {arguments.rounds} rounds, seconds")
    print(f"{'loop':10}" + "".join(f"{s:>10}" for s in STAGES) + f"{'total':>10}{'ratio':>8}")
    for name, stages in medians.items():
        row = "".join(f"{stages[s]:10.2f}" for s in STAGES)
        print(f"{name:10}{row}{totals[name]:10.2f}{totals[name] / totals['ours']:8.2f}")
    print(f"peak memory of our loop {peak:.2f} GB")
    if arguments.output:
        tree = {"medians": medians, "totals": totals, "peak_gb": peak, "clips": arguments.clips}
        arguments.output.write_text(json.dumps(tree, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
