"""Does it learn, and is it the rewards that teach it? Fresh training seeds, a fixed test set, a placebo control.

    python -m benchmarks.learning --seeds 11 12 13 [--recipes omninft placebo] [--folder runs/learning]

Runs every recipe with every seed on the bundled model, unless its folder already holds a finished run, and writes
results.md (tables) and curves.svg (dev curves) there. All runs are evaluated on the same test prompts with the same
noise, so any two of them are paired clip by clip. Intervals are 95 %, by a bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import numpy as np

from omninft.config import load_config
from omninft.evaluation.held_out import load_scores
from omninft.evaluation.paired import Estimate, Measure, compare_paired, difference_of_differences
from omninft.gallery.figures import Series, line_chart
from omninft.runs.build import build_rewards
from omninft.runs.display import ConsoleDisplay
from omninft.runs.metrics import read_metrics
from omninft.train import train

CURVES = ("video_quality", "video_text", "audio_quality", "audio_text", "sync")
STYLE = """<style>svg{overflow:visible}
text{font:11px sans-serif;fill:#555}.grid{stroke:#ddd}.title{font-weight:600;fill:#222}
.line{fill:none;stroke-width:1.6;stroke:#1d6fa5}.line.tone-faint{stroke:#999}.band{fill:#1d6fa5;opacity:.12}
.band.tone-faint{fill:#999}circle{fill:#1d6fa5}.bar{stroke:#1d6fa5}</style>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--recipes", nargs="+", default=["omninft", "placebo"])
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"))
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    arguments = parser.parse_intermixed_args()
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            name = f"{recipe}-{seed}"
            if (arguments.folder / name / "evaluation.json").is_file():
                continue
            changes = [f"seed={seed}", f"run.folder={arguments.folder}", f"run.name={name}", *arguments.overrides]
            config = load_config(recipe, changes)
            started = arguments.folder / name / "config.yaml"
            train(config, resume=started.parent if started.is_file() else None, display=ConsoleDisplay())
    write_results(arguments.folder, arguments.recipes, arguments.seeds)


def measures_of(recipe: str) -> list[Measure]:
    trained, held_out = build_rewards(load_config(recipe))
    return [
        Measure(c.name, group, c.route, c.higher_is_better, "" if c.unit == "1" else c.unit)
        for group, rewards in (("trained", trained), ("held_out", held_out))
        for reward in rewards
        for c in reward.components
    ]


def values(folder: Path, name: str, which: str) -> np.ndarray:
    return load_scores(folder / name / "samples" / f"test-{which}" / "values.json").values


def write_results(folder: Path, recipes: list[str], seeds: list[int]) -> None:
    """Tables of every run against base, and of every recipe against the placebo of the same seed."""
    measures = measures_of(recipes[0])
    ids = load_scores(folder / f"{recipes[0]}-{seeds[0]}" / "samples" / "test-base" / "values.json").prompt_ids
    lines = [
        f"{len(ids)} test clips, seeds {', '.join(map(str, seeds))}, {platform.processor() or platform.machine()}",
        "",
    ]
    for recipe in recipes:
        lines += [f"## {recipe}: trained minus base", "", *_table(folder, recipe, seeds, measures, ids), ""]
    if "placebo" in recipes:
        for recipe in recipes:
            if recipe != "placebo":
                lines += [f"## {recipe} minus placebo", "", *_against_placebo(folder, recipe, seeds, measures, ids), ""]
    lines += ["## Time", ""]
    for recipe in recipes:
        for seed in seeds:
            rows = [r for r in read_metrics(folder / f"{recipe}-{seed}") if r["kind"] == "iteration"]
            lines.append(
                f"* {recipe}-{seed}: {len(rows)} iterations, {rows[-1]['elapsed'] / 60:.1f} minutes of training"
            )
    (folder / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "curves.svg").write_text(_curves(folder, recipes, seeds), encoding="utf-8")
    print((folder / "results.md").read_text(encoding="utf-8"))


def _table(folder: Path, recipe: str, seeds: list[int], measures: list[Measure], ids: tuple[str, ...]) -> list[str]:
    """A column a seed, and one of the mean over the seeds, clip by clip: what the recipe does, whatever the seed."""
    bases = [values(folder, f"{recipe}-{s}", "base") for s in seeds]
    ends = [values(folder, f"{recipe}-{s}", "trained") for s in seeds]
    pairs = [*zip(bases, ends, strict=True), (np.mean(bases, axis=0), np.mean(ends, axis=0))]
    tables = [compare_paired(measures, base, trained, ids) for base, trained in pairs]
    heads = [*(f"seed {s}" for s in seeds), "mean of the seeds"]
    lines = ["| measure | base | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for rows in zip(*(t.rows for t in tables), strict=True):
        cells = [f"{r.trained.mean:.3f} ({_interval(r.difference)}, {r.verdict})" for r in rows]
        m = rows[0].measure
        lines.append(f"| {m.name} ({m.group}; {m.hint}) | {rows[0].base.mean:.3f} | " + " | ".join(cells) + " |")
    return lines


def _interval(estimate: Estimate) -> str:
    return f"{estimate.mean:+.3f}, {estimate.low:+.3f} .. {estimate.high:+.3f}"


def _against_placebo(
    folder: Path, recipe: str, seeds: list[int], measures: list[Measure], ids: tuple[str, ...]
) -> list[str]:
    lines = ["| measure | " + " | ".join(f"seed {s}" for s in seeds) + " |", "|---" * (1 + len(seeds)) + "|"]
    tables = [
        difference_of_differences(
            measures,
            values(folder, f"{recipe}-{s}", "trained"),
            values(folder, f"placebo-{s}", "trained"),
            values(folder, f"{recipe}-{s}", "base"),
            ids,
        )
        for s in seeds
    ]
    for rows in zip(*tables, strict=True):
        cells = [
            f"{r.difference.mean:+.3f} ({r.difference.low:+.3f} .. {r.difference.high:+.3f}, {r.verdict})" for r in rows
        ]
        lines.append(f"| {rows[0].measure.name} | " + " | ".join(cells) + " |")
    return lines


def _curves(folder: Path, recipes: list[str], seeds: list[int]) -> str:
    """Dev means over iterations, one panel a reward, one line a run; the placebo in grey."""
    width, height, panels = 270, 190, []
    for number, name in enumerate(CURVES):
        series = []
        for recipe in recipes:
            for seed in seeds:
                if not (folder / f"{recipe}-{seed}").is_dir():
                    continue  # a placebo is not run with every seed
                rows = [r for r in read_metrics(folder / f"{recipe}-{seed}") if r["kind"] == "evaluation"]
                x = [float(r["iteration"]) for r in rows]
                y = [float(r["measures"][name]["mean"]) for r in rows]
                series.append(Series(f"{recipe} {seed}", x, y, tone="faint" if recipe == "placebo" else "accent"))
        chart = line_chart(series, label=name)
        panels.append(
            f'<svg x="{number * width + 14}" y="18" width="{width - 10}" height="{height - 20}" '
            f'{chart[chart.index("<svg") + 4 :]}<text class="title" x="{number * width + 40}" y="12">{name}</text>'
        )
    body = "".join(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * len(CURVES)} {height}">{STYLE}'
        f'<rect width="100%" height="100%" fill="#fff"/>{body}</svg>'
    )


if __name__ == "__main__":
    main()
