"""Short fixed-seed runs of the bundled model, and what is stored of them.

`python -m tests.trajectories.record [NAME ...]` records anew; a commit that does so says why the numbers move.

AdamW's epsilon is far above the gradients here, so that a step is proportional to its gradient: with the usual 1e-8 a
step has the size of the learning rate whatever the gradient, faults of scale would not show, and rounding would decide
the sign of small entries.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from omninft.clips.media import write_png
from omninft.config import Config, build_config
from omninft.runs.metrics import read_metrics
from omninft.types import Clip

STORED = Path(__file__).parent / "stored"
ITERATIONS = 3
# One linear of every kind of module in both streams, so that the files stay small.
TARGETS = (
    "attn1.to_q",
    "audio_attn1.to_out.0",
    "audio_to_video_attn.to_k",
    "audio_to_video_attn.to_q",
    "video_to_audio_attn.to_v",
    "ff.net.2",
    "audio_ff.net.0.proj",
)
OFF = {"text": 1.0, "stg": 0.0, "modality": 1.0, "rescale": 0.0}
PLAIN = {"num_steps": 4, "batch_size": 4, "video_guidance": OFF, "audio_guidance": OFF, "stg_blocks": []}
GUIDED = {
    "num_steps": 4,
    "batch_size": 4,
    "video_guidance": {"text": 1.5, "stg": 0.5, "modality": 1.3, "rescale": 0.5},
    "audio_guidance": {"text": 2.0, "stg": 0.7, "modality": 1.6, "rescale": 0.0},
    "stg_blocks": [5],
}


def redness(clips: Sequence[Clip]) -> list[float]:
    """Mean of red over mean of all colours: differs between the clips of a prompt."""
    return [float(c.video[..., 0].mean() / c.video.mean()) for c in clips]


def loudness(clips: Sequence[Clip]) -> list[float | None]:
    """Root mean square of the sound, in dB / 10; None for sample 1 of one prompt in three."""
    return [
        None
        if c.sample == 1 and sum(map(ord, c.prompt.id)) % 3 == 0
        else float(2 * np.log10(np.sqrt(np.mean(c.waveform**2)) + 1e-3))
        for c in clips
    ]


def together(clips: Sequence[Clip]) -> list[float]:
    """Correlation of what moves in the picture and the energy of the sound, frame by frame."""
    scores = []
    for c in clips:
        motion = np.abs(np.diff(c.video.astype(np.float64), axis=0)).mean(axis=(1, 2, 3))
        pieces = np.array_split(c.waveform.astype(np.float64).mean(axis=0) ** 2, len(c.video))[1:]
        energy = np.array([p.mean() for p in pieces])
        scores.append(float(np.corrcoef(motion, energy)[0, 1]))
    return scores


def watched(clips: Sequence[Clip]) -> list[float]:
    """Mean of blue: held out."""
    return [float(c.video[..., 2].mean()) for c in clips]


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {k: merged(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | over | both


BASE: dict[str, Any] = {
    "seed": 7,
    "model": {"path": "tiny", "device": "cpu", "lora": {"rank": 4, "alpha": 8, "targets": list(TARGETS)}},
    "prompts": {"per_iteration": 2, "group_size": 4},
    "sampling": PLAIN,
    "rewards": [
        {"name": "tests.trajectories.runs:redness", "route": "video", "weight": 1.5},
        {"name": "tests.trajectories.runs:loudness", "route": "audio", "weight": 0.5},
        {"name": "tests.trajectories.runs:together", "route": "joint"},
    ],
    "objective": {
        "reference_weight": 0.01,
        "sigmas": {"choice": "spread", "count": 2},
    },
    "optimiser": {
        "step_per": "sigma",
        "micro_batch": 4,
        "learning_rate": 3e-2,
        "epsilon": 0.03,
        "clip_norm": 1.0,
        "betas": [0.8, 0.95],
        "weight_decay": 0.3,
    },
    "evaluation": {"every": 0, "dev_clips": 0, "test_clips": 0, "shown_clips": 0},
    "run": {"iterations": ITERATIONS, "checkpoint_every": 1, "loggers": [], "threads": 1},
}

RUNS: dict[str, dict[str, Any]] = {
    "omninft": {
        "held_out": [{"name": "tests.trajectories.runs:watched", "route": "video"}],
        "evaluation": {
            "every": 2,
            "dev_clips": 3,
            "test_clips": 5,
            "shown_clips": 2,
            "sampling": PLAIN | {"num_steps": 3},
        },
    },
    "gdpo": {
        "credit": {
            "kind": "gdpo",
            "final_batch_norm": True,
            "surgery": {"enabled": False},
            "regions": {"enabled": False},
        },
        "objective": {"beta": 0.8, "advantage_clip": 1.5, "reference_space": "velocity"},
        "optimiser": {"clip_norm": 0.4, "step_per": "iteration"},
    },
    "branches": {
        "credit": {"surgery": {"scope": "video_loss_only", "target": "projection"}, "regions": {"enabled": False}},
        "objective": {
            "video_weight": 0.6,
            "audio_weight": 1.7,
            "detach_weight": False,
            "sigmas": {"choice": "first_fraction", "fraction": 0.75},
        },
        "optimiser": {"warmup_steps": 5},
    },
    "first_frame": {
        "prompts": {"train": "{folder}/prompts.jsonl", "dev": None, "test": None},
        "credit": {"regions": {"warmup": 0}},
    },
    "regions": {
        "credit": {
            "std": "group",
            "regions": {"warmup": 2.0, "window": [0.25, 1.0], "first_block": 3, "value_weighted": True},
            "surgery": {
                "schedule": [{"start": 0.0, "stop": 0.5, "scale": 0.2}],
                "audio_schedule": [{"start": 2, "stop": 5, "scale": 0.4}],
            },
        },
        "run": {"old_schedule": 2},
    },
    "guidance": {"sampling": GUIDED, "credit": {"regions": {"warmup": 0, "method": "zscore_sigmoid"}}},
    "two_processes": {"optimiser": {"step_per": "iteration", "micro_batch": 2}},
}
WORLD = {"two_processes": 2}  # processes of a run; 1 of the others


def make_config(name: str, folder: Path, threads: int = 1) -> Config:
    """The config of a run that writes to `folder`/`name`; its prompt file is written there."""
    if name == "first_frame":
        _write_prompts(folder)
    tree = merged(BASE, RUNS[name] | {"recipe": name})
    tree = merged(tree, {"run": {"folder": str(folder), "name": name, "threads": threads}})
    return build_config(json.loads(json.dumps(tree).replace("{folder}", str(folder))))


def _write_prompts(folder: Path) -> None:
    """Two prompts in three with a first frame."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:64, :64]
    picture = np.stack([x * 3, y * 3, (x + y) % 256], axis=-1).astype(np.uint8)
    write_png(folder / "first.png", picture)
    rows = [
        {
            "id": f"row-{i}",
            "prompt_v": f"a red ball bounces {word}",
            "prompt_a": f"a low tone rings {word}",
            **({"first_frame_path": "first.png"} if i % 3 else {}),
        }
        for i, word in enumerate(("once", "twice", "three times"))
    ]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def summarise(folder: Path) -> dict[str, Any]:
    """The numbers of a finished run: logged ones, evaluations, and the adapters after the last iteration."""
    rows = read_metrics(folder)
    logged = [
        {k: v for k, v in row.items() if isinstance(v, float | int) and not _varies(k)}
        for row in rows
        if row["kind"] == "iteration"
    ]
    values = folder / "samples" / "test-trained" / "values.json"
    evaluations = {
        f"{row['split']}-{row['iteration']}": {n: m["mean"] for n, m in row["measures"].items()}
        for row in rows
        if row["kind"] == "evaluation"
    }
    for which in ("base", "trained"):
        values = folder / "samples" / f"test-{which}" / "values.json"
        if values.is_file():
            tree = json.loads(values.read_text(encoding="utf-8"))
            evaluations[f"test-{which}"] = dict(zip(tree["names"], np.mean(tree["values"], axis=0), strict=True))
    checkpoint = folder / "checkpoints" / f"step-{ITERATIONS:06d}"
    adapters = {
        f"{name}.{key}": [float(tensor.double().norm()), *_projections(tensor)]
        for name in ("current", "old")
        for key, tensor in sorted(load_file(checkpoint / f"{name}.safetensors").items())
    }
    return {"iterations": logged, "evaluations": evaluations, "adapters": adapters}


def _varies(key: str) -> bool:
    return key.startswith("time/") or key in ("seconds", "elapsed", "memory_gb")


def _projections(tensor: torch.Tensor, count: int = 8) -> list[float]:
    """Inner products with fixed random directions, over sqrt(n): each about norm / sqrt(n) in size."""
    directions = np.random.default_rng(20260512).standard_normal((count, tensor.numel()))
    return (directions @ tensor.double().numpy().ravel() / tensor.numel() ** 0.5).tolist()
