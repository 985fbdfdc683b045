"""`omninft vbench`: the suite's clips, scores here, scores by the official package, totals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omninft.commands.terminal import NotedProgress, Steps, console
from omninft.files import read_json
from omninft.types import OmniNFTError

vbench_app = typer.Typer(help="VBench: export clips under the official names, score, sum up.", no_args_is_help=True)

SuiteSource = Annotated[
    Path | None,
    typer.Option("--suite", help="VBench_full_info.json, or the vbench wheel or package that holds it."),
]
DimensionNames = Annotated[list[str] | None, typer.Option("--dimension", "-d", help="Repeatable; default: all.")]
System = Annotated[str | None, typer.Option(help="Name to show. Default: the folder's.")]
Clips = Annotated[Path, typer.Argument(help="Folder of <prompt>-<number>.mp4 files.")]


@vbench_app.command("export")
def export(
    output: Annotated[Path, typer.Argument(help="Folder to fill; nothing else may lie in it.")],
    clips: Annotated[
        Path | None, typer.Option(help='Your clips: a JSON file {"prompt": ["clip.mp4", ...]}, or a folder of samples.')
    ] = None,
    model: Annotated[str | None, typer.Option(help="Make the clips with this model instead.")] = None,
    lora: Annotated[Path | None, typer.Option(help="A LoRA folder or file that omninft exported.")] = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Keys the noise.")] = 0,
    limit: Annotated[int, typer.Option(help="Take at most this many prompts (0: all).", min=0)] = 0,
    samples: Annotated[int, typer.Option(help="Clips per prompt; 25 for the static filter.", min=1)] = 5,
    suite: SuiteSource = None,
    dimension: DimensionNames = None,
    copy: Annotated[bool, typer.Option(help="Copy files instead of linking them.")] = False,
) -> None:
    """Put clips under the names that VBench looks for, from files you have or from a model."""
    from omninft.evaluation.vbench_generate import generate_clips
    from omninft.evaluation.vbench_suite import export_clips, read_mapping, read_suite

    prompts = read_suite(suite)
    if (clips is None) == (model is None):
        raise OmniNFTError("give --clips (files you have) or --model (to make them), one of the two")
    if clips is not None:
        mapping = read_mapping(clips)
    else:
        assert model is not None
        wanted = list(prompts.prompts(dimension))[: limit or None]
        with NotedProgress(console) as progress:
            task = progress.add_task("sampling", total=None)
            mapping = generate_clips(
                wanted,
                output.with_name(f"{output.name}.samples"),
                model=model,
                lora=lora,
                samples=samples,
                steps=steps,
                seed=seed,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
    report = export_clips(prompts, mapping, output, dimension, samples, copy)
    console.print(f"{report.written} clips in {output}, {len(report.missing)} missing", highlight=False)
    for name in report.missing[:5]:
        console.print(f"[yellow]missing[/yellow] {name}", highlight=False, soft_wrap=True)
    for prompt in report.unknown[:5]:
        console.print(f"[yellow]not in the suite[/yellow] {prompt}", highlight=False, soft_wrap=True)


@vbench_app.command("score")
def score(
    clips: Clips,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for result.json; goes on.")] = None,
    suite: SuiteSource = None,
    custom: Annotated[bool, typer.Option(help="Clips of other prompts: every clip in every dimension.")] = False,
    dimension: DimensionNames = None,
    device: Annotated[str, typer.Option(help="Where the judging models run.")] = "cpu",
    system: System = None,
) -> None:
    """Measure here what needs only common models; the rest is `omninft vbench run`."""
    from omninft.evaluation.vbench_native import Judges, evaluate_native
    from omninft.evaluation.vbench_suite import read_suite

    with NotedProgress(console) as progress:
        task = progress.add_task("scoring", total=None)
        result = evaluate_native(
            clips,
            dimension,
            suite=None if custom else read_suite(suite),
            judges=Judges(device=device),
            output=output,
            system=system,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    _print_result(result)


@vbench_app.command("run")
def run(
    clips: Clips,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results and logs; goes on.")],
    python: Annotated[
        Path | None, typer.Option(help="Python that has the vbench package. Without it: how to make one.")
    ] = None,
    suite: SuiteSource = None,
    custom: Annotated[bool, typer.Option(help="Clips of other prompts.")] = False,
    prompts: Annotated[Path | None, typer.Option(help="JSON of custom prompts by file name.")] = None,
    dimension: DimensionNames = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, or cpu.")] = "cuda",
    cache: Annotated[Path | None, typer.Option(help="Folder for the package's weights.")] = None,
    local: Annotated[
        bool, typer.Option("--local", help="CLIP and DINO from the weights' folder too, not from their own downloads.")
    ] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds that a dimension may take.")] = None,
    static_filter: Annotated[
        bool, typer.Option("--static-filter", help="Measure temporal_flickering on still clips only.")
    ] = False,
    system: System = None,
) -> None:
    """Have the official package measure, in its own Python environment, dimension by dimension."""
    from omninft.evaluation.vbench import DIMENSIONS
    from omninft.evaluation.vbench_bridge import Job, environment_commands, official_result, probe
    from omninft.evaluation.vbench_suite import SUITE_FILE, read_suite

    if python is None:
        console.print("VBench's package needs an environment of its own. Make one, and give its Python by --python:")
        for line in environment_commands():
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        console.print(
            "Leave the last line out to do without "
            f"{', '.join(d.name for d in DIMENSIONS if d.detectron2)}, which alone need detectron2."
        )
        raise typer.Exit(1)
    texts = _prompts_by_file(prompts) if prompts is not None else None
    environment = probe(python)
    chosen = tuple(dimension or (d.name for d in DIMENSIONS if d.custom or not custom))
    job = Job(
        clips,
        output,
        chosen,
        "custom" if custom else "standard",
        texts,
        device,
        local=local,
        cache=cache,
        timeout=timeout,
    )
    result, failures = official_result(
        environment,
        job,
        None if custom else read_suite(suite or environment.folder / SUITE_FILE),
        system=system,
        static_filter=static_filter,
        progress=lambda name, done, total: console.print(f"{done}/{total} {name}") if name else None,
    )
    for name, reason in failures.items():
        console.print(f"[red]failed[/red] {name}: {reason}", highlight=False, markup=True, soft_wrap=True)
    if result is not None:
        result.save(output)
        _print_result(result)
    if failures:
        raise typer.Exit(1)


@vbench_app.command("totals")
def totals(
    results: Annotated[list[Path], typer.Argument(help="*_eval_results.json files, or folders of them.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for result.json.")] = None,
    suite: SuiteSource = None,
    system: Annotated[str, typer.Option(help="Name to show.")] = "system",
) -> None:
    """Read official results (of this or another machine), normalise them and sum them up as the leaderboard does."""
    from omninft.evaluation.vbench_results import read_official
    from omninft.evaluation.vbench_suite import read_suite

    result = read_official(results, system, read_suite(suite) if suite is not None else None)
    if output is not None:
        result.save(output)
    _print_result(result)


def _prompts_by_file(path: Path) -> dict[str, str]:
    expected = 'no prompts by file name, as {"clip.mp4": "prompt"}: '
    tree = read_json(path, expected)
    if not isinstance(tree, dict):
        raise OmniNFTError(f"{path}: {expected}found {tree!r:.60}")
    return {str(name): str(text) for name, text in tree.items()}


def _print_result(result: object) -> None:
    from rich.markup import escape
    from rich.table import Table

    from omninft.evaluation.results import EvaluationResult

    assert isinstance(result, EvaluationResult)
    table = Table("", "score", "95 % interval", "clips", "missing", box=None)
    for metric in result.metrics:
        found = result.overall[metric.name]
        interval = f"{found.low:.4f} to {found.high:.4f}" if found.low is not None and found.high is not None else ""
        value = f"{found.value:.4f}" if found.value is not None else "-"
        table.add_row(metric.label, value, interval, str(found.count or ""), str(found.missing or ""))
    console.print(table)
    for note in result.notes:
        console.print(f"[dim]{escape(note)}[/dim]", highlight=False, soft_wrap=True)
