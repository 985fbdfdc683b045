"""The run report: one self-contained `report.html` that explains a run, finished or not.

The page loads nothing but the run's own clips, by relative path; it can be opened from disk, served, or sent along
with `samples/`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from omninft.evaluation.paired import EQUIVALENCE, GROUP_TITLES, JUDGED_ON, Estimate, PairedRow, PairedTable
from omninft.files import write_text
from omninft.gallery import curves, figures
from omninft.gallery.players import player_groups, score_names
from omninft.gallery.previews import preview_groups
from omninft.gallery.run_folder import RunFolder, after, read_run_folder, shown_sets

FILE_NAME = "report.html"
_TONES = {"better": "better", "worse": "worse", "no difference": "same", "unclear": "same"}


@dataclass(frozen=True)
class TableRow:
    """One measure of the final table, as text and picture."""

    name: str
    judged_on: str
    hint: str
    base: str
    base_interval: str
    trained: str
    trained_interval: str
    difference: str
    difference_interval: str
    change: str
    plot: Markup
    tone: str
    verdict: str
    dropped: int


@dataclass(frozen=True)
class FirstLook:
    """A measure at the first and the latest evaluation on dev, for runs without a final table."""

    name: str
    first: str
    latest: str
    difference: str


@dataclass(frozen=True)
class Command:
    """Something to do with the run next."""

    purpose: str
    text: str


def write_report(run_dir: str | Path, *, running: bool = False, refresh: int = 0) -> Path:
    """Write `report.html` into the run folder from whatever is in it, and return its path.

    The page says how far a `running` run is, and loads itself again every `refresh` seconds (0: never).

    Raises OmniNFTError when `run_dir` is not a folder. Anything damaged inside is named in the report instead.
    """
    run = read_run_folder(run_dir)
    page = render_report(run, running=running, refresh=refresh)
    path = run.path / FILE_NAME
    write_text(path, page)
    return path


def render_report(run: RunFolder, *, running: bool = False, refresh: int = 0) -> str:
    """The page as text."""
    measures = {row.measure.name: row.measure for row in run.table.rows} if run.table is not None else {}
    sets = shown_sets(run)
    groups = player_groups(sets, run.path, measures)
    names = score_names(groups)
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            name=run.path.absolute().name,
            sentence=headline(run, running),
            facts=facts(run, running),
            refresh=refresh,
            outlook=outlook(run),
            is_evaluated=bool(run.evaluations()),
            self_check=self_check(run),
            tables=final_tables(run.table),
            table_heading=_plot_heading(run.table),
            table_axis=_axis(run.table),
            table_caption=run.table.caption if run.table is not None else "",
            chance=_by_chance(run.table),
            compares=_compares(run),
            first_look=first_look(run),
            first_look_at=_dev_span(run),
            groups=groups,
            previews=preview_groups(run),
            set_names=[clips.name for _, clips in sets],
            sorts=[(n, n in measures) for n in names],
            has_seen=any(c.seen for _, s in sets for c in s.clips.values()),
            has_heard=any(c.heard for _, s in sets for c in s.clips.values()),
            rewards=curves.reward_panels(run, measures),
            health=curves.health_panels(run),
            others=curves.other_panels(run),
            missing_nothing=bool(run.iterations) and not curves.missing_scores(run),
            stages=curves.stage_times(run),
            events=run.events,
            problems=run.problems,
            config_text=run.config_text,
            settings_text=_settings(run.table),
            commands=commands(run, groups[0].prompt.prompt_av if groups else ""),
            css=page_asset("report.css"),
            scripts=[page_asset(f"{name}.js") for name in ("players", "report", *(["live"] if refresh else []))],
        )
    )


def headline(run: RunFolder, running: bool = False) -> str:
    """What happened, in a few sentences made from the numbers."""
    placebo = "This is a placebo: its advantages were shuffled, so it must not learn."
    sentences = [f"{progress(run, running)}." if running else "", _outcome(run, running)]
    return " ".join(s for s in [*sentences, placebo if run.setting("credit.shuffle") else ""] if s)


def progress(run: RunFolder, running: bool = False) -> str:
    """How far the run is, e.g. "Running: 3 of 10 iterations done, about 4 min of training left"."""
    done, planned = len(run.iterations), run.setting("run.iterations")
    text = f"{done} of {planned} iterations done" if planned else f"{done} iterations done"
    left = _time_left(run)
    if running and done == planned and run.table is None and _compares(run):
        return f"Running: {text}, the final evaluation goes on"
    return f"Running: {text}{f', about {left} of training left' if left else ''}" if running else text


def _time_left(run: RunFolder) -> str:
    """By the latest iterations, without evaluations; empty where that is not known."""
    recent = [r["seconds"] for r in run.iterations[-5:] if isinstance(r.get("seconds"), int | float)]
    left = (run.setting("run.iterations") or 0) - len(run.iterations)
    return duration(left * sum(recent) / len(recent)) if recent and left > 0 else ""


def outlook(run: RunFolder) -> str:
    """What a run without a final table, and without two evaluations on dev, has for a result."""
    if run.evaluations().get("dev"):
        so_far = "Only one evaluation was made so far, on the dev prompts: there is nothing to compare it with."
    else:
        so_far = "There is no evaluation yet." if _evaluates(run) else "This run makes no evaluations."
    later = "A finished run compares base and trained clips on the test prompts here."
    return f"{so_far} {later}" if _compares(run) else so_far


def _compares(run: RunFolder) -> bool:
    """Whether the run is to end with base against trained on the test prompts."""
    return bool(run.setting("evaluation.test_clips", True))


def _evaluates(run: RunFolder) -> bool:
    dev = run.setting("evaluation.every", True) and run.setting("evaluation.dev_clips", True)
    return bool(dev) or _compares(run)


def self_check(run: RunFolder) -> str:
    """What the check of the first iteration found, "" before it."""
    messages = [str(e.get("message", "")) for e in run.events]
    return next((m for m in reversed(messages) if m.startswith("self-check")), "")


def _outcome(run: RunFolder, running: bool) -> str:
    if run.table is not None and run.table.rows:
        phrases = [
            _group_phrase(run.table.group("trained"), "trained reward"),
            _group_phrase(run.table.group("held_out"), "held-out measure"),
        ]
        sentence = "; ".join(p for p in phrases if p)
        return f"{sentence[0].upper()}{sentence[1:]}."
    if not run.metrics:
        return "Nothing has been recorded yet."
    final = "no final evaluation yet" if _compares(run) else "without a final evaluation"
    told = "" if running else f"{progress(run)}; {final}."
    return f"{told} {_dev_sentence(run)}".strip()


def _group_phrase(rows: Sequence[PairedRow], noun: str) -> str:
    if not rows:
        return ""
    plural = noun if len(rows) == 1 else f"{noun}s"
    better = sum(row.verdict == "better" for row in rows)
    worse = sum(row.verdict == "worse" for row in rows)
    if not better and not worse:
        clear = all(row.verdict == "no difference" for row in rows)
        return (
            f"no {'' if clear else 'clear '}difference in the {plural if len(rows) == 1 else f'{len(rows)} {plural}'}"
        )
    return f"{better} of {len(rows)} {plural} better" + (f", {worse} worse" if worse else "")


def _dev_sentence(run: RunFolder) -> str:
    looks = first_look(run)
    if not looks:
        return ""
    rose = sum(look.difference.startswith("+") for look in looks)
    first, latest = _dev_span(run)
    return f"On the dev prompts {rose} of {len(looks)} means rose from {first} to {latest} iterations."


def facts(run: RunFolder, running: bool = False) -> list[tuple[str, str]]:
    """The run at a glance: label and value, those that are known."""
    rows = run.iterations
    planned = run.setting("run.iterations")
    elapsed = next((r["elapsed"] for r in reversed(rows) if isinstance(r.get("elapsed"), int | float)), None)
    if elapsed is None:
        elapsed = sum(r["seconds"] for r in rows if isinstance(r.get("seconds"), int | float)) or None
    done = f"{len(rows)} of {planned}" if planned else str(len(rows))
    pairs = max((r.num_pairs for r in run.table.rows), default=0) if run.table is not None else 0
    known = [
        ("Recipe", run.setting("recipe")),
        ("Model", run.setting("model.path")),
        ("Seed", run.setting("seed")),
        ("Iterations", done),
        ("Time", None if elapsed is None else duration(elapsed)),
        ("Left", (_time_left(run) or None) if running else None),
        ("Test clips", f"{pairs} pairs" if pairs else None),
    ]
    return [(label, str(value)) for label, value in known if value is not None]


def duration(seconds: float) -> str:
    """Seconds as a person says them: "8 s", "12 min", "3 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def final_tables(table: PairedTable | None) -> list[tuple[str, list[TableRow]]]:
    """The rows of the final table by group, with the groups' titles."""
    if table is None:
        return []
    domain = _domain(table)
    return [
        (title, [_table_row(row, domain) for row in table.group(name)])
        for name, title in GROUP_TITLES.items()
        if table.group(name)
    ]


def _table_row(row: PairedRow, domain: tuple[float, float]) -> TableRow:
    digits, effect = row.decimals, row.standardised
    tone = _TONES[row.verdict]
    # The arrow says where the number went, the word whether that is good.
    arrow = "" if tone == "same" else "\u2191" if row.difference.mean > 0 else "\u2193"

    def interval(estimate: Estimate, signed: bool = False) -> str:
        low, high = (figures.format_number(v, digits, signed) for v in (estimate.low, estimate.high))
        return f"[{low}, {high}]"

    label = (
        f"Difference in standard deviations of the base clips, positive is better: "
        f"{figures.format_number(effect.mean, 2)} "
        f"from {figures.format_number(effect.low, 2)} to {figures.format_number(effect.high, 2)}"
    )
    return TableRow(
        name=row.measure.name,
        judged_on=JUDGED_ON[row.measure.route],
        hint=row.measure.hint,
        base=figures.format_number(row.base.mean, digits),
        base_interval=interval(row.base),
        trained=figures.format_number(row.trained.mean, digits),
        trained_interval=interval(row.trained),
        difference=figures.format_number(row.difference.mean, digits, signed=True),
        difference_interval=interval(row.difference, signed=True),
        change=_percent(row.relative_change),
        plot=Markup(
            figures.dot_plot(
                effect.mean, effect.low, effect.high, domain=domain, tone=f"is-{tone}", label=label, margin=EQUIVALENCE
            )
        ),
        tone=tone,
        verdict=f"{arrow} {row.verdict}".strip(),
        dropped=row.num_dropped,
    )


def _percent(share: float) -> str:
    return f"{figures.format_number(100 * share, 1, signed=True)} %" if abs(share) < 100 else ""


def _domain(table: PairedTable) -> tuple[float, float]:
    """One scale for the dot plots of all rows, with zero inside."""
    effects = [row.standardised for row in table.rows]
    ends = [v for e in effects for v in (e.mean, e.low, e.high) if math.isfinite(v)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    # Both sides of zero keep room enough to be named.
    room = 0.3 * (high - low) or 1.0
    return min(low, -room), max(high, room)


def _plot_heading(table: PairedTable | None) -> Markup:
    return Markup("") if table is None or not table.rows else Markup(figures.dot_heading(_domain(table)))


def _axis(table: PairedTable | None) -> Markup:
    return Markup("") if table is None or not table.rows else Markup(figures.dot_axis(_domain(table)))


def _by_chance(table: PairedTable | None) -> str:
    """How many measures of a table of this size are called better or worse when nothing changed at all."""
    if table is None or not table.rows:
        return ""
    expected = len(table.rows) * (1 - table.confidence)
    return f"{figures.format_number(expected, 1)} of {len(table.rows)}"


def first_look(run: RunFolder) -> list[FirstLook]:
    """Means of the first and the latest dev evaluation; none when there are not two of them."""
    rows = run.evaluations().get("dev", [])
    if len(rows) < 2:
        return []
    looks = []
    for name, latest in (rows[-1].get("measures") or {}).items():
        before, after = (rows[0].get("measures") or {}).get(name, {}).get("mean"), latest.get("mean")
        if before is None or after is None:
            continue
        looks.append(
            FirstLook(
                name,
                figures.format_number(before),
                figures.format_number(after),
                figures.format_number(after - before, signed=True),
            )
        )
    return looks


def _dev_span(run: RunFolder) -> tuple[int, int]:
    rows = run.evaluations().get("dev", [])
    return (rows[0]["iteration"], rows[-1]["iteration"]) if rows else (0, 0)


def commands(run: RunFolder, prompt: str) -> list[Command]:
    """How to go on with the run, to make clips of `prompt` with it and to load what it trained."""
    folder = "/".join(run.path.absolute().parts[-2:])
    model = str(run.setting("model.path", "MODEL"))
    file = Path("export") / (run.exports[0] if run.exports else "pytorch_lora_weights.safetensors")
    lora = shlex.quote(f"{folder}/{file.parent.as_posix()}")
    source, opening = f'"{model}"', "from diffusers import LTX2Pipeline\n"
    if model == "tiny":
        source, opening = f'model_path("{model}")', f"{opening}from omninft.models.loading import model_path\n"
    return [
        Command("Go on from the last checkpoint", f"omninft train --resume {shlex.quote(folder)}"),
        Command(
            "Make clips" if run.exports else "Make clips, once the run has written its LoRA",
            f"omninft sample {shlex.quote(prompt or 'PROMPT')} --model {shlex.quote(model)} --lora {lora}",
        ),
        Command(
            "Load the LoRA in diffusers",
            f"{opening}pipe = LTX2Pipeline.from_pretrained({source})\n"
            f'pipe.load_lora_weights("{folder}/{file.parent.as_posix()}", weight_name="{file.name}")',
        ),
    ]


def _settings(table: PairedTable | None) -> str:
    if table is None or not table.settings:
        return ""
    settings: dict[str, Any] = table.settings
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def page_environment() -> jinja2.Environment:
    """Where the templates of pages come from."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("omninft.gallery", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["after"] = after
    return environment


def page_asset(name: str) -> Markup:
    """A style sheet or script, verbatim: as a template its braces would be read as Jinja's."""
    return Markup(resources.files("omninft.gallery").joinpath("templates", name).read_text(encoding="utf-8"))
