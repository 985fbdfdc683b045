"""The commands as functions: `omninft sample` is `omninft.sample`, with the same names and defaults.

Nothing here installs signal handlers, ends the process or prints, unless `progress` asks for bars. What a user can
cause is an `OmniNFTError` that says what was found and what was expected.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omninft.config import RewardConfig
    from omninft.evaluation.run import Evaluated
    from omninft.evaluation.sampling import SampledClip
    from omninft.evaluation.scoring import ScoreResult
    from omninft.gallery.compare import Comparison

Place = str | os.PathLike[str]


def sample(
    prompts: str | Place = "world:test",
    output: Place = "samples",
    *,
    model: str | Place = "tiny",
    lora: Place | None = None,
    strength: float = 1.0,
    count: int = 1,
    limit: int = 8,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    rate: float | None = None,
    steps: int | None = None,
    video_guidance: float | None = None,
    audio_guidance: float | None = None,
    stg: float | None = None,
    stg_blocks: Sequence[int] | None = None,
    modality: float | None = None,
    rescale: float | None = None,
    negative: str | None = None,
    force: bool = False,
    progress: bool = False,
) -> list[SampledClip]:
    """Make clips (mp4 with sound) from prompts, with the base model or with a LoRA on it.

    What is left out is the model's own: 16 steps without guidance for the bundled one, the published evaluation
    settings for LTX-2 (40 steps, text guidance 3 and 7, spatio-temporal 1, modality 3, rescale 0.7). The same call goes
    on where it stopped; one with other prompts adds to the folder. Words that the model's text encoder does not know
    are a warning.

    Args:
        prompts: a text, a JSONL, CSV or TXT file, or "world:test".
        output: folder for <prompt id>-<number>.mp4, scores.json (their prompts) and generation.json (what made them).
        model: "tiny", a pipeline folder, or a hub id.
        lora: a folder or file that omninft exported.
        strength: multiplies what the LoRA adds; 0 is the base, 1 the LoRA as it was trained.
        count: clips per prompt.
        limit: at most so many prompts, evenly spaced; 0: all.
        seed: keys the noise, with the prompt's id and the clip's number.
        size: width and height in pixels.
        frames: a multiple of the model's temporal factor, and one: 8 k + 1 for LTX-2.
        rate: frames per second.
        steps: of denoising, from 1.
        video_guidance, audio_guidance: text guidance of a stream; 1 is off.
        stg: spatio-temporal guidance of both streams, 0 is off; `stg_blocks` are the blocks that it perturbs.
        modality: modality guidance of both streams; 1 is off.
        rescale: 0..1, how far guided predictions are pulled back to the deviation of plain ones.
        negative: prompt that text guidance leads away from.
        force: replace the clips of the folder, whatever made them.
        progress: show a bar.

    Raises:
        OmniNFTError: prompts, model or LoRA that cannot be read; a strength without a LoRA; a size or guidance that the
            model cannot do, with the nearest that it can; an output that holds clips of other settings.
    """
    from omninft.evaluation.sampling import read_prompts, sample_clips
    from omninft.evaluation.settings import SamplingChoice
    from omninft.evaluation.wording import word_warning

    source, model = os.fspath(prompts), os.fspath(model)
    choice = SamplingChoice(
        size=size,
        frames=frames,
        rate=rate,
        steps=steps,
        video_guidance=video_guidance,
        audio_guidance=audio_guidance,
        stg=stg,
        stg_blocks=None if stg_blocks is None else tuple(stg_blocks),
        modality=modality,
        rescale=rescale,
        negative=negative,
    )
    if (unknown := word_warning(model, read_prompts(source, limit))) is not None:
        _warn(unknown, progress)
    with _bar("sampling", progress) as bar:
        return sample_clips(
            source,
            Path(output),
            model=model,
            lora=_path(lora),
            strength=strength,
            count=count,
            limit=limit,
            seed=seed,
            choice=choice,
            force=force,
            progress=bar,
        )


def score(
    folder: Place,
    rewards: str | Sequence[str | RewardConfig] = (),
    *,
    preset: str | None = None,
    options: Sequence[str] = (),
    prompts: Place | None = None,
    output: Place | None = None,
    progress: bool = False,
) -> ScoreResult:
    """Score existing clips with rewards; what cannot be scored has its reason, and is never 0.

    Args:
        folder: of clips (mp4, webm, mov, mkv), or one file.
        rewards: names, "package.module:function", or `RewardConfig`; without any and without `preset`: "world".
        preset: "paper", "commercial" or "offline".
        options: "reward.key=value", as "clap.device=cuda".
        prompts: prompt file; default: scores.json or prompts.csv beside the clips.
        output: a .csv, .json or .parquet table to write; an interrupted call goes on.
        progress: show a bar.

    Returns:
        `names`, `rows` (a file's scores, None where missing, and the reasons) and `means()`.

    Raises:
        OmniNFTError: no clips, an unknown reward or option, weights that are missing.
    """
    from omninft.evaluation.scoring import score_files
    from omninft.rewards.presets import chosen_rewards

    given = [rewards] if isinstance(rewards, str) else list(rewards)
    named = [reward for reward in given if isinstance(reward, str)]
    chosen = chosen_rewards(named if given or preset else ["world"], preset, options)
    whole = [reward for reward in given if not isinstance(reward, str)]
    with _bar("scoring", progress) as bar:
        return score_files(Path(folder), [*chosen, *whole], _path(prompts), _path(output), bar)


def evaluate(
    clips: Place | None = None,
    benchmark: str = "world",
    *,
    prompts: str | Place | None = None,
    model: str | Place = "tiny",
    lora: Place | None = None,
    name: str | None = None,
    metrics: Sequence[str] = (),
    compat: Sequence[str] = (),
    steps: int | None = None,
    seed: int = 0,
    video_guidance: float | None = None,
    audio_guidance: float | None = None,
    limit: int | None = None,
    shard: str | None = None,
    device: str | None = None,
    options: Sequence[str] = (),
    real: Place | None = None,
    features: Place | None = None,
    networks: Mapping[str, Place | None] | None = None,
    strict: bool = False,
    output: Place | None = None,
    progress: bool = False,
) -> Evaluated:
    """Measure a model, or clips of any system, on a benchmark; goes on where it was stopped.

    Args:
        clips: a folder of clips of any system; None: clips of `model` (with `lora`) are made first.
        benchmark: "world" (the bundled model's), "javisbench" or another there is.
        prompts: CSV, JSONL or TXT file, or "world:test"; row 0 is sample_0000.mp4.
        name: what the system is called in tables.
        metrics: some of the metrics by name, or ["all"].
        compat: quirks of the official code by name.
        steps, video_guidance, audio_guidance: as in `sample`, with the same defaults.
        limit: at most so many prompts, evenly spaced (0: all); None: 64 of the world's.
        shard: "RANK/COUNT", as "0/4": one of several processes; None: as torchrun says.
        device: of judging models; None: CUDA where there is one.
        options: "judge.key=value".
        real, features: features of real clips, and of the clips themselves, for FVD, KVD and FAD.
        networks: TorchScript files: "video" (I3D) and "audio" (AudioCLIP's sound tower).
        strict: a metric that cannot be computed is an error.
        output: folder of the result; None: evaluations/NAME.
        progress: show a bar for every stage.

    Returns:
        `folder` (result.json, table.md, table.csv) and `result`, which is None while other shards are not done.

    Raises:
        OmniNFTError: whatever is missing or wrong.
    """
    from omninft.evaluation.catalogue import Choice
    from omninft.evaluation.run import evaluate as run_evaluation

    choice = Choice(
        benchmark=benchmark,
        metrics=tuple(metrics),
        compat=tuple(compat),
        options=tuple(options),
        device=device,
        strict=strict,
        real=_path(real),
        features=_path(features),
        networks={name: _path(place) for name, place in (networks or {}).items()},
    )
    with _bars(progress) as show:
        return run_evaluation(
            _path(clips),
            choice,
            prompts=None if prompts is None else os.fspath(prompts),
            model=os.fspath(model),
            lora=_path(lora),
            seed=seed,
            steps=steps,
            guidance=(video_guidance, audio_guidance),
            limit=limit,
            name=name,
            output=_path(output),
            shard=shard,
            progress=show,
        )


def compare(
    systems: Sequence[Place],
    output: Place = "comparison",
    *,
    single_file: bool = False,
    seed: int | None = None,
    progress: bool = False,
) -> Comparison:
    """Write a page that plays the clips of several systems side by side, with scores and a blind test.

    Args:
        systems: folders, or "NAME=FOLDER": an evaluation, clips with scores.json, a run, or just clips.
        output: folder for the page.
        single_file: put the clips into index.html.
        seed: fixes the shuffle of the blind test; None: every rater draws one.
        progress: show a bar.

    Returns:
        `page` (the path of index.html), `labels`, `num_prompts`, `num_clips`, `notes`.

    Raises:
        OmniNFTError: folders without clips, clips that do not match, an output that holds something else.
    """
    from omninft.gallery.compare import write_comparison

    inputs = [os.fspath(system) for system in systems]
    with _bar("comparing", progress) as bar:
        return write_comparison(inputs, Path(output), single_file=single_file, seed=seed, progress=bar)


def _path(place: Place | None) -> Path | None:
    return None if place is None else Path(place)


def _warn(message: str, shown: bool) -> None:
    """On the terminal where progress is shown there, else as a Python warning at the caller's line."""
    if shown:
        from rich.markup import escape

        from omninft.commands.terminal import console

        console.print(f"[yellow]warning:[/yellow] {escape(message)}", highlight=False)
    else:
        warnings.warn(message, UserWarning, stacklevel=3)


@contextmanager
def _bars(shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Shows (stage, done, total) as a bar for every stage that reports."""
    if not shown:
        yield lambda stage, done, total: None
        return
    from omninft.commands.terminal import NotedProgress, console

    tasks: dict[str, Any] = {}
    with NotedProgress(console) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


@contextmanager
def _bar(stage: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    with _bars(shown) as show:
        yield lambda done, total: show(stage, done, total)
