"""What scoring clips costs: decoded once, views shared, batched, in workers - against one clip at a time.

    python -m benchmarks.scoring [--clips 32] [--rounds 3] [--rewards dnsmos av_align ...]
    python -m benchmarks.scoring --rewards clap clip --random-weights [--device cuda]

Clips are synthetic (moving discs, bursts of noise), written as mp4 before the clock starts; eight share a prompt. Three
loops score the same files by the same rewards in the same process, in turn:

    ours        every clip decoded once, views shared by the rewards, all clips at once, CPU work in threads
    single      every clip decoded once, scored alone by one reward after another
    reference   as the reference code works: every reward opens every file by itself, one clip at a time

Scores of all loops must agree. Ratios are of medians over the rounds. With --random-weights the models have the
released sizes and random values: their scores mean nothing, their cost is that of the real ones.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import ClapConfig, ClapModel, CLIPConfig, CLIPModel

from omninft.clips.media import read_clip, write_clip
from omninft.clips.workers import in_workers
from omninft.config import RewardConfig
from omninft.distributed import available_cores
from omninft.rewards.registry import build_reward
from omninft.rewards.runner import RewardRunner
from omninft.runs.build import peak_memory_gb
from omninft.scorers.clap import CLAPScorer
from omninft.scorers.clip import CLIPScorer
from omninft.scorers.synchformer import DeSyncScorer, Synchformer, SynchformerConfig
from omninft.types import Clip, Prompt

OFFLINE = ("dnsmos", "av_align", "flicker", "motion", "speech")
RATE = 24.0  # Hz
SOUND = 48_000  # Hz


def synthetic_clip(number: int, frames: int, height: int, width: int) -> Clip:
    """Two discs on a noisy background, and a burst of noise about twice a second."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    background = rng.integers(60, 120, (height, width, 3))
    phase, speed = rng.uniform(0, 6.28, 4), rng.uniform(1, 4, 4)
    video = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        frame = background.copy()
        for k in (0, 2):
            centre_x = width / 2 * (1 + 0.7 * np.sin(speed[k] * t / RATE + phase[k]))
            centre_y = height / 2 * (1 + 0.7 * np.sin(speed[k + 1] * t / RATE + phase[k + 1]))
            frame[(x - centre_x) ** 2 + (y - centre_y) ** 2 < (height / 8) ** 2] = (220, 60 + 80 * k, 90)
        video[t] = frame
    seconds = frames / RATE
    time_axis = np.arange(round(seconds * SOUND)) / SOUND
    wave = 0.02 * rng.standard_normal(len(time_axis))
    for start in np.sort(rng.uniform(0, seconds, max(1, int(2 * seconds)))):
        age = time_axis - start
        wave += np.where(age >= 0, np.exp(-8 * np.maximum(age, 0)), 0) * rng.standard_normal(len(age)) * 0.3
    text = ("a man talks while a disc turns", "two discs drift and something hisses")[number // 8 % 2]
    prompt = Prompt(f"{number // 8}", text, text, f"{text} {text}")
    return Clip(video, RATE, np.clip(wave, -1, 1)[None].astype(np.float32), SOUND, prompt, number % 8)


def random_scorer(name: str, device: str) -> object:
    """The judging model of a reward at its released size, with random weights."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(WordLevel({"[UNK]": 3}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    if name == "clap":
        return CLAPScorer(ClapModel(ClapConfig()), tokenizer, device)
    if name == "clip":
        return CLIPScorer(CLIPModel(CLIPConfig()), tokenizer, device)
    if name == "desync":
        return DeSyncScorer(Synchformer(SynchformerConfig()).to(device))
    raise SystemExit(f"no random weights for {name!r}; there are: clap, clip, desync")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--frames", type=int, default=121)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 384), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rewards", nargs="+", default=OFFLINE)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(available_cores())
    rewards = {
        name: build_reward(
            RewardConfig(
                name=name,
                options={"scorer": random_scorer(name, arguments.device), "device": arguments.device}
                if arguments.random_weights
                else {},
            )
        )
        for name in arguments.rewards
    }
    with tempfile.TemporaryDirectory() as folder:
        files: dict[Path, Prompt] = {}
        for number in range(arguments.clips):
            clip = synthetic_clip(number, arguments.frames, *arguments.size)
            path = Path(folder) / f"{number}.mp4"
            write_clip(path, clip)
            files[path] = clip.prompt
        paths = list(files)

        def read(path: Path) -> Clip:
            return read_clip(path, files[path])

        def ours() -> np.ndarray:
            clips = [clip for clip in in_workers(read, paths, available_cores()) if isinstance(clip, Clip)]
            return RewardRunner(list(rewards.values())).score(clips).values

        def single() -> np.ndarray:
            rows = []
            for path in paths:
                clip = read(path)
                rows.append([r.score([clip]).values[0] for r in rewards.values()])
            return np.array([np.concatenate(row) for row in rows])

        def reference() -> np.ndarray:
            columns = [np.stack([r.score([read(path)]).values[0] for path in paths]) for r in rewards.values()]
            return np.concatenate(columns, axis=1)

        loops = {"ours": ours, "single": single, "reference": reference}
        for reward in rewards.values():
            reward.score([read(paths[0])])  # models loaded, kernels compiled
        report(loops, arguments.rounds)
        print(
            f"{arguments.clips} clips of {arguments.frames} frames {arguments.size[0]} x {arguments.size[1]}; "
            f"{', '.join(rewards)}; {available_cores()} cores, {arguments.device}; "
            f"peak memory {peak_memory_gb():.1f} GB"
        )
        print("single clips, decoded, seconds a clip by reward:")
        for name, reward in rewards.items():
            clips = [read(path) for path in paths[:4]]
            begin = time.perf_counter()
            for clip in clips:
                reward.score([clip])
            print(f"  {name:10} {(time.perf_counter() - begin) / len(clips):.3f}")


def report(loops: dict[str, Callable[[], np.ndarray]], rounds: int) -> None:
    """Run the loops in turn and print their median seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    scores: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for name, loop in loops.items():
            begin = time.perf_counter()
            scores[name] = loop()
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{'loop':10}{'seconds':>9}{'ratio':>7}   median of {rounds} rounds")
    for name, median in medians.items():
        worst = float(np.nanmax(np.abs(scores[name] - scores["ours"])))
        if worst > 1e-3 or (np.isnan(scores[name]) != np.isnan(scores["ours"])).any():
            raise SystemExit(f"{name} gives other scores, by up to {worst}")
        print(f"{name:10}{median:9.2f}{median / medians['ours']:7.2f}   scores within {worst:.0e}")


if __name__ == "__main__":
    main()
