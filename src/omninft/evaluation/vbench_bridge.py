"""Drives the official `vbench` package in a Python environment of its own, one dimension at a time.

The package pins transformers 4.33.2 and numpy 1 and cannot live beside this one; its own command neither reports a
failed run nor names its output predictably. So a few lines of Python (`_DRIVER`) run in its environment and call its
class, on one device, for one dimension each: what finished stays, and one crash costs one dimension.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from omninft.evaluation.results import EvaluationResult
from omninft.evaluation.vbench import chosen_dimensions
from omninft.evaluation.vbench_results import read_official
from omninft.evaluation.vbench_suite import WHEEL, Suite, strangers
from omninft.types import OmniNFTError

Mode = Literal["standard", "custom"]
NAME = "vbench"  # of the official output files: vbench_eval_results.json, vbench_full_info.json
STATIC_FOLDER = "filtered_videos"  # what the official static filter calls its result
_PROBE = (
    "import importlib.metadata as m, json, os, vbench\n"
    "names = ('vbench', 'torch', 'torchvision', 'transformers', 'numpy', 'detectron2')\n"
    "def version(name):\n"
    "    try:\n        return m.version(name)\n    except m.PackageNotFoundError:\n        return None\n"
    "print('OMNINFT ' + json.dumps({n: version(n) for n in names} | {'folder': os.path.dirname(vbench.__file__)}))\n"
)
_DRIVER = (
    "import json, sys, torch\n"
    "from vbench import VBench\n"
    "with open(sys.argv[1], encoding='utf-8') as file:\n    job = json.load(file)\n"
    "judge = VBench(torch.device(job['device']), job['full_info'], job['output'])\n"
    "judge.evaluate(videos_path=job['videos'], name=job['name'], prompt_list=job['prompts'],\n"
    "               dimension_list=[job['dimension']], local=job['local'], mode=job['mode'], **job['options'])\n"
)
_STATIC_DRIVER = "from vbench.cli.vbench import main; main()"


@dataclass(frozen=True)
class Environment:
    """A Python that has the official package."""

    python: Path
    folder: Path  # of the installed package
    versions: dict[str, str | None]


@dataclass(frozen=True)
class Job:
    """What to have measured. In custom mode `prompts` may hold the text of a clip by its file name."""

    videos: Path
    output: Path
    dimensions: tuple[str, ...]
    mode: Mode = "standard"
    prompts: Mapping[str, str] | None = None
    device: str = "cuda"
    local: bool = False  # CLIP and DINO from the cache folder instead of their own downloads
    cache: Path | None = None  # $VBENCH_CACHE_DIR: weights, fetched there by the package
    timeout: float | None = None  # seconds a dimension may take
    options: Mapping[str, Any] = field(default_factory=lambda: {"imaging_quality_preprocessing_mode": "longer"})


@dataclass(frozen=True)
class Outcome:
    """What came of a job."""

    results: dict[str, Path]  # dimension -> its *_eval_results.json
    failures: dict[str, str]  # dimension -> why there is no result
    resumed: tuple[str, ...]  # dimensions that were finished before


def environment_commands(folder: str = "vbench-env", detectron2: bool = True) -> list[str]:
    """Shell lines that make the environment. detectron2 is built from source and needs a compiler (and nvcc)."""
    python = f"{folder}/bin/python"
    lines = [
        f"python3.10 -m venv {shlex.quote(folder)}",
        # Neither is declared by the package. The pair must belong together; 2.2.2 is of its time.
        f"{python} -m pip install 'torch==2.2.2' 'torchvision==0.17.2'",
        f"{python} -m pip install '{WHEEL}' 'transformers==4.33.2' 'numpy<2' 'setuptools<70'",
    ]
    if detectron2:
        source = "git+https://github.com/facebookresearch/detectron2.git"
        lines.append(f"{python} -m pip install --no-build-isolation 'detectron2 @ {source}'")
    return lines


def probe(python: Path, timeout: float = 300.0) -> Environment:
    """Whether that Python has the official package, and which versions.

    Raises:
        OmniNFTError: it has not, or does not run; with the commands that make such an environment.
    """
    commands = "\n  ".join(environment_commands())
    try:
        done = subprocess.run(
            [str(python), "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=_environment(None),
            check=False,
        )
        line = next((x for x in done.stdout.splitlines() if x.startswith("OMNINFT ")), None)
        reason = _last_words(done.stderr) or f"exit status {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        line, reason = None, str(error)
    if line is None:
        raise OmniNFTError(
            f"{python}: VBench's package does not run there ({reason}). Make an environment for it by\n  {commands}"
        )
    versions = json.loads(line.removeprefix("OMNINFT "))
    return Environment(python, Path(versions.pop("folder")), versions)


def run_official(
    environment: Environment, job: Job, progress: Callable[[str, int, int], None] = lambda name, done, total: None
) -> Outcome:
    """Every dimension of the job that is not finished yet; `progress(dimension, done, total)` before each.

    Under `job.output` a dimension has a folder with the official files, log.txt (all that the package says) and
    finished.json, which stands for "these clips, these settings": with others the dimension is run again.

    Raises:
        OmniNFTError: before anything runs, what would make the package fail or measure something else.
    """
    dimensions = _checked(environment, job)
    results: dict[str, Path] = {}
    failures: dict[str, str] = {}
    resumed = []
    stamp = _stamp(environment, job)
    for done, name in enumerate(dimensions):
        progress(name, done, len(dimensions))
        folder = job.output / name
        file = folder / f"{NAME}_eval_results.json"
        finished = folder / "finished.json"
        if _read_json(finished) == {"stamp": stamp} and _flaw(file, name) is None:
            results[name] = file
            resumed.append(name)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for old in (file, finished):
            old.unlink(missing_ok=True)
        reason = _run(environment, job, name, folder) or _flaw(file, name)
        if reason is None:
            finished.write_text(json.dumps({"stamp": stamp}), encoding="utf-8")
            results[name] = file
        else:
            failures[name] = f"{reason}; log in {folder / 'log.txt'}"
    progress("", len(dimensions), len(dimensions))
    return Outcome(results, failures, tuple(resumed))


def run_static_filter(environment: Environment, job: Job) -> Path:
    """The official static filter for temporal_flickering: the folder with up to 5 still clips of a prompt.

    It reads `{prompt}-{number}.mp4` of any number (25 of a prompt are made for it), needs CUDA, and writes the first 5
    still ones as `{prompt}-{0..4}.mp4`. temporal_flickering is then to be measured on that folder.

    Raises:
        OmniNFTError: it failed, or found no still clip.
    """
    _checked(environment, replace(job, dimensions=("temporal_flickering",)))
    target = job.output / "static_filter"
    kept, finished = target / STATIC_FOLDER, target / "finished.json"
    stamp = _stamp(environment, job)
    if _read_json(finished) == {"stamp": stamp} and any(kept.glob("*.mp4")):
        return kept
    target.mkdir(parents=True, exist_ok=True)
    finished.unlink(missing_ok=True)
    for old in kept.glob("*.mp4"):
        old.unlink()
    command = [str(environment.python), "-c", _STATIC_DRIVER, "static_filter"]
    command += ["--videos_path", str(job.videos.resolve()), "--result_path", str(target.resolve())]
    reason = _run_logged(command, target / "log.txt", job)
    if reason is None and not any(kept.glob("*.mp4")):
        reason = "it found no still clip"
    if reason is not None:
        raise OmniNFTError(f"VBench's static filter: {reason}; log in {target / 'log.txt'}")
    finished.write_text(json.dumps({"stamp": stamp}), encoding="utf-8")
    return kept


def official_result(
    environment: Environment,
    job: Job,
    suite: Suite | None,
    *,
    system: str | None = None,
    static_filter: bool = False,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> tuple[EvaluationResult | None, dict[str, str]]:
    """Run the job and read what came of it: the result (None when every dimension failed), and failures by dimension.

    With `suite` (standard mode) clips that lack are rows with a reason. With `static_filter` temporal_flickering is
    measured on the clips that the official filter keeps.
    """
    filtered = static_filter and "temporal_flickering" in job.dimensions
    outcomes = []
    failures: dict[str, str] = {}
    if filtered:
        try:
            still = replace(job, videos=run_static_filter(environment, job), dimensions=("temporal_flickering",))
            outcomes.append(run_official(environment, still, progress))
        except OmniNFTError as error:
            failures["temporal_flickering"] = str(error)
    others = tuple(name for name in job.dimensions if not (filtered and name == "temporal_flickering"))
    if others:
        outcomes.append(run_official(environment, replace(job, dimensions=others), progress))
    files = [file for outcome in outcomes for file in outcome.results.values()]
    for outcome in outcomes:
        failures |= outcome.failures
    if not files:
        return None, failures
    known = {name: version for name, version in environment.versions.items() if version is not None}
    result = read_official(
        files,
        system or job.videos.resolve().name,
        suite if job.mode == "standard" else None,
        known.get("vbench", "unknown"),
        {"mode": job.mode, "static_filter": filtered, **job.options},
        weights={"vbench": ", ".join(f"{name} {version}" for name, version in known.items()) + f", on {job.device}"},
        notes=[f"{name} failed: {reason}" for name, reason in failures.items()],
    )
    return result, failures


def _checked(environment: Environment, job: Job) -> list[str]:
    """The dimensions in the official order, after all that can be known before."""
    chosen = chosen_dimensions(job.dimensions)
    if not job.videos.is_dir():
        raise OmniNFTError(f"{job.videos}: no such folder of clips")
    others = strangers(job.videos)
    if others:
        raise OmniNFTError(
            f"{job.videos} holds {others[0]!r}{f' and {len(others) - 1} more' if len(others) > 1 else ''} beside the "
            "clips; VBench takes the ending of all clips from any entry, so only .mp4 files may lie there"
        )
    if not any(job.videos.iterdir()):
        raise OmniNFTError(f"{job.videos}: no clips in it")
    refused = [d.name for d in chosen if job.mode == "custom" and not d.custom]
    if refused:
        raise OmniNFTError(f"VBench measures {', '.join(refused)} on its own prompt suite only, not on custom clips")
    lacking = [d.name for d in chosen if d.detectron2]
    if lacking and environment.versions.get("detectron2") is None:
        raise OmniNFTError(
            f"{', '.join(lacking)} need detectron2, which {environment.python} has not; install it by\n  "
            f"{environment_commands(str(environment.python.parent.parent))[-1]}\nor leave these dimensions out"
        )
    if job.prompts is not None and job.mode != "custom":
        raise OmniNFTError("prompts by file name are for custom clips; the suite's clips have theirs in their names")
    nameless = sorted({p.name for p in job.videos.iterdir()} - set(job.prompts)) if job.prompts is not None else []
    if nameless:
        raise OmniNFTError(
            f"no prompt is given for {nameless[0]!r}{f' and {len(nameless) - 1} more' if nameless[1:] else ''}"
        )
    return [d.name for d in chosen]


def _run(environment: Environment, job: Job, name: str, folder: Path) -> str | None:
    """One dimension; None when the package ended well, else why not."""
    task = {
        "device": job.device,
        "full_info": str(environment.folder / "VBench_full_info.json"),
        "output": str(folder.resolve()),
        "videos": str(job.videos.resolve()),
        "name": NAME,
        "prompts": dict(job.prompts) if job.prompts is not None else [],
        "dimension": name,
        "local": job.local,
        "mode": {"standard": "vbench_standard", "custom": "custom_input"}[job.mode],
        "options": dict(job.options),
    }
    # A file: the prompts of many clips are longer than an argument may be.
    file = folder / "job.json"
    file.write_text(json.dumps(task, indent=1), encoding="utf-8")
    command = [str(environment.python), "-c", _DRIVER, str(file.resolve())]
    return _run_logged(command, folder / "log.txt", job)


def _run_logged(command: Sequence[str], log: Path, job: Job) -> str | None:
    """Run with all output in `log`; None after exit status 0, else what happened, with the last line of the log."""
    with log.open("wb") as sink:
        # Its own session, so that whatever it started ends with it.
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=_environment(job.cache), start_new_session=True
        )
        try:
            status = process.wait(job.timeout)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"not done in {job.timeout:g} s, and ended"
        except BaseException:
            _end(process)
            raise
    if status == 0:
        return None
    what = f"ended by signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    words = _last_words(log.read_text(encoding="utf-8", errors="replace"))
    return f"{what}{f' ({words})' if words else ''}"


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(cache: Path | None) -> dict[str, str]:
    """Ours without what would make the other Python read our packages."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return {
        **kept,
        "PYTHONUNBUFFERED": "1",
        **({"VBENCH_CACHE_DIR": str(cache.resolve())} if cache is not None else {}),
    }


def _flaw(file: Path, name: str) -> str | None:
    """Why that is no result of the dimension; None when it is one."""
    tree = _read_json(file)
    if tree is None:
        return "it wrote no result" if not file.is_file() else f"{file} is damaged"
    try:
        score, clips = tree[name]
        if not abs(float(score)) < float("inf"):
            return f"the score is {score}"
    except (KeyError, TypeError, ValueError):
        return f"{file} holds no result of {name}"
    return None if clips else "it measured no clip"


def _stamp(environment: Environment, job: Job) -> str:
    """Changes with the clips and with every setting that a score depends on."""
    files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in job.videos.iterdir())
    prompts = dict(job.prompts) if job.prompts is not None else None
    tree = [files, job.mode, prompts, job.device, dict(job.options), environment.versions]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _last_words(text: str) -> str:
    """The last line that says something: of a Python traceback, the error."""
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "")
