"""The model card of a rebuilt model: measured numbers only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import LTX2Pipeline

from omninft.config import EvaluationConfig, GuidanceConfig, ModelConfig, RewardConfig, SamplingConfig
from omninft.files import write_text
from omninft.models.ltx2 import LTX2Policy
from omninft.noise import Occasion
from omninft.pretrain import autoencoders
from omninft.pretrain.run import DEFECTS
from omninft.pretrain.sizes import SIZES
from omninft.prompts.sampler import evaluation_groups
from omninft.prompts.sources import open_prompts
from omninft.rewards.registry import build_reward
from omninft.rewards.runner import RewardRunner
from omninft.rollout.clips import roll_out
from omninft.rollout.sampler import RolloutSampler
from omninft.types import Clip, ScoreTable
from omninft.worlds import bounce
from omninft.worlds.dataset import WorldBatch, world_batch, world_clips

FLOOR_SEED = 77_000_001  # apart from the seeds of training clips
CHUNK = 32
PLAIN = GuidanceConfig()

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# The bundled model ({size})

A complete `LTX2Pipeline` (LTX-2's own diffusers classes at small dimensions: {blocks} transformer blocks,
{parameters:.2f} M parameters in all) trained on the bounce world of OmniNFT: {frames} frames of {side} x {side} pixels
at {rate:g} Hz with {seconds:.2f} s of mono sound at 16 kHz. It is there to try and test post-training on a laptop.

    from diffusers import LTX2Pipeline
    pipe = LTX2Pipeline.from_pretrained("{size}")

## What it learnt from, and what is wrong with it on purpose

{clips} procedural clips, {steps} steps of batch {batch}. As in web video, part of the sound is at fault:
in {late:.0%} of the training clips all of it is shifted by {low:.0f} to {high:.0f} ms early or late,
and in up to {wrong:.0%} one sound is missing or added. Pictures and captions are right. So the model has
room in sync, and, being small and briefly trained, in counts, text agreement and cleanliness.

## Measured

*Real* are rendered clips. *Round trip* are the same through autoencoders and vocoder: what post-training can reach
at best. *Model* are {evaluated} test prompts, {sampling} Euler steps, no guidance.

| measure | real | round trip | model |
|---|---|---|---|
{table}

Made by `omninft pretrain --size {size}`; mean over {floor} clips (real, round trip) and {evaluated} clips (model).
"""


def write_card(
    folder: Path, size_name: str, progress: Callable[[int, int], None], floor_clips: int = 256, evaluated: int = 256
) -> dict[str, dict[str, float]]:
    """Measure the model in `folder`, write README.md and measured.json there, and return the numbers."""
    runner = RewardRunner(
        [build_reward(RewardConfig(name=n)) for n in ("world", "world_held_out")], max_missing_share=1.0
    )
    policy = LTX2Policy.load(ModelConfig(path=str(folder)))
    truth = world_batch(floor_clips, FLOOR_SEED)
    real = runner.score(world_clips(truth, truth.video, truth.waveforms[:, None]))
    floor = runner.score(round_trip(policy.pipeline, truth))
    sampler = RolloutSampler(policy, SamplingConfig(num_steps=16, video_guidance=PLAIN, audio_guidance=PLAIN))
    groups = evaluation_groups(open_prompts("world:test").prompts, evaluated)
    tables: list[ScoreTable] = []
    for _, clips in roll_out(sampler, groups, EvaluationConfig().seed, Occasion.TEST, "reference"):
        tables.append(runner.score(clips))
        progress(sum(len(t.values) for t in tables), evaluated)
    model = ScoreTable.cat(tables)
    runner.close()
    measured = {
        "real": _means(real.names, real.values),
        "round trip": _means(floor.names, floor.values),
        "model": _means(model.names, model.values),
    }
    write_text(folder / "measured.json", json.dumps(measured, indent=1))
    write_text(folder / "README.md", _card(policy.pipeline, size_name, measured, floor_clips, evaluated))
    return measured


@torch.no_grad()
def round_trip(pipe: LTX2Pipeline, truth: WorldBatch) -> list[Clip]:
    """The clips through both autoencoders and the vocoder."""
    video, waveforms = [], []
    for start in range(0, len(truth.video), CHUNK):
        frames = pipe.vae.decode(autoencoders.encode_video(pipe.vae, truth.video[start : start + CHUNK])).sample
        video.append(((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).numpy())
        latents = autoencoders.encode_audio(pipe.audio_vae, truth.waveforms[start : start + CHUNK])
        bins = pipe.audio_vae.config.mel_bins // pipe.audio_vae_mel_compression_ratio
        mel = pipe.audio_vae.decode(latents.unflatten(2, (-1, bins)).transpose(1, 2)).sample
        waveforms.append(pipe.vocoder(mel).clamp(-1, 1).numpy())
    return world_clips(truth, np.concatenate(video), np.concatenate(waveforms))


def _means(names: tuple[str, ...], values: np.ndarray) -> dict[str, float]:
    return {name: float(np.nanmean(column)) for name, column in zip(names, values.T, strict=True)}


def _card(
    pipe: LTX2Pipeline, size_name: str, measured: dict[str, dict[str, float]], floor_clips: int, evaluated: int
) -> str:
    size = SIZES[size_name]
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    base = sum(p.numel() for m in modules for n, p in m.named_parameters() if ".lora_" not in n)
    rows = [
        f"| {name} | {measured['real'][name]:.3f} | {measured['round trip'][name]:.3f} | {value:.3f} |"
        for name, value in measured["model"].items()
    ]
    return CARD.format(
        size=size_name,
        blocks=size.transformer["num_layers"],
        parameters=base / 1e6,
        frames=bounce.NUM_FRAMES,
        side=bounce.HEIGHT,
        rate=bounce.FRAME_RATE,
        seconds=bounce.NUM_SAMPLES / bounce.SAMPLE_RATE,
        clips=size.clips,
        steps=size.transformer_steps,
        batch=size.transformer_batch,
        late=DEFECTS.out_of_time,
        low=1000 * DEFECTS.min_shift,
        high=1000 * DEFECTS.max_shift,
        wrong=DEFECTS.miscounted,
        evaluated=evaluated,
        sampling=16,
        table="\n".join(rows),
        floor=floor_clips,
    )
