from __future__ import annotations

import json
import os
import signal
import time
import venv
from dataclasses import replace
from pathlib import Path

import pytest

from omninft.evaluation.vbench_bridge import Job, environment_commands, official_result, probe, run_official
from omninft.evaluation.vbench_suite import read_suite
from omninft.types import OmniNFTError
from tests.evaluation.vbench_files import ENTRIES

# Stands in for the official package: the same class and files, scores from the number in the clips' names. What each
# dimension does is set by $VBENCH_CACHE_DIR/behaviour.json; every call adds a line to calls.txt there.
FAKE = """
import json, os, signal, sys, time

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        assert device == "device cpu", device
        assert "omninft" not in sys.modules
        self.full_info, self.output = full_info_dir, output_path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, mode="x", **kwargs):
        cache = os.environ["VBENCH_CACHE_DIR"]
        (dimension,) = dimension_list
        with open(os.path.join(cache, "calls.txt"), "a") as file:
            file.write(json.dumps([dimension, mode, local, prompt_list, kwargs]) + "\\n")
        print("measuring", dimension, flush=True)
        with open(os.path.join(cache, "behaviour.json")) as file:
            behaviour = json.load(file).get(dimension, "well")
        if behaviour == "raise":
            raise RuntimeError("CUDA out of memory")
        if behaviour == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if behaviour == "hang":
            with open(os.path.join(cache, "pid"), "w") as file:
                file.write(str(os.getpid()))
            time.sleep(60)
        if behaviour == "nothing":
            return
        clips = sorted(os.listdir(videos_path))
        if mode == "vbench_standard":
            with open(self.full_info) as file:
                wanted = [e["prompt_en"] for e in json.load(file) if dimension in e["dimension"]]
            clips = [f"{p}-{n}.mp4" for p in wanted for n in range(5) if f"{p}-{n}.mp4" in clips]
        scores = [int(clip[-5]) / 10 for clip in clips]
        results = [
            {"video_path": os.path.join(videos_path, clip), "video_results": score}
            for clip, score in zip(clips, scores)
        ]
        mean = sum(scores) / len(scores) if scores and behaviour != "nan" else float("nan")
        tree = {dimension: [mean, [] if behaviour == "empty" else results]}
        text = json.dumps(tree)
        with open(os.path.join(self.output, name + "_eval_results.json"), "w") as file:
            file.write(text[:20] if behaviour == "torn" else text)
"""
FAKE_CLI = """
import os, shutil, sys

def main():
    command, *rest = sys.argv[1:]
    options = dict(zip(rest[::2], rest[1::2]))
    assert command == "static_filter"
    target = os.path.join(options["--result_path"], "filtered_videos")
    os.makedirs(target, exist_ok=True)
    for clip in os.listdir(options["--videos_path"]):
        if clip[-5] in "135":
            prompt, number = clip[:-6], int(clip[-5])
            source = os.path.join(options["--videos_path"], clip)
            shutil.copy(source, os.path.join(target, f"{prompt}-{number // 2}.mp4"))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """A Python of another environment, with the stand-in installed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "vbench" / "cli").mkdir(parents=True)
    (site / "vbench" / "__init__.py").write_text(FAKE)
    (site / "vbench" / "cli" / "__init__.py").touch()
    (site / "vbench" / "cli" / "vbench.py").write_text(FAKE_CLI)
    (site / "vbench" / "VBench_full_info.json").write_text(json.dumps(ENTRIES), encoding="utf-8")
    (site / "torch.py").write_text("def device(name): return 'device ' + name\n")
    for name, version in (("vbench", "0.1.5"), ("torch", "2.2.2")):
        (site / f"{name}-{version}.dist-info").mkdir()
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    return folder / "bin" / "python"


@pytest.fixture
def job(tmp_path) -> Job:
    clips, cache = tmp_path / "clips", tmp_path / "cache"
    clips.mkdir()
    cache.mkdir()
    for name in (
        "alley-1.mp4",
        "alley-3.mp4",
        "In a still frame, a stop sign-2.mp4",
        "a person swimming in ocean-4.mp4",
    ):
        (clips / name).write_bytes(b"clip")
    (cache / "behaviour.json").write_text("{}")
    dimensions = ("background_consistency", "temporal_flickering", "dynamic_degree")
    return Job(clips, tmp_path / "out", dimensions, device="cpu", cache=cache, timeout=30)


def behave(job: Job, **dimensions: str) -> None:
    assert job.cache is not None
    (job.cache / "behaviour.json").write_text(json.dumps(dimensions))


def calls(job: Job) -> list[list]:
    assert job.cache is not None
    file = job.cache / "calls.txt"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def test_dimensions_are_run_read_and_not_run_again(python, job, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    environment = probe(python)
    assert environment.versions["vbench"] == "0.1.5"
    assert environment.versions["detectron2"] is None
    suite = read_suite(environment.folder)
    seen = []
    result, failures = official_result(environment, job, suite, progress=lambda *step: seen.append(step))
    assert failures == {}
    assert result is not None
    assert seen == [
        ("background_consistency", 0, 3),
        ("temporal_flickering", 1, 3),
        ("dynamic_degree", 2, 3),
        ("", 3, 3),
    ]
    options = {"imaging_quality_preprocessing_mode": "longer"}
    assert calls(job)[0] == ["background_consistency", "vbench_standard", False, [], options]
    assert {n: result.overall[n].value for n in job.dimensions} == {
        "background_consistency": 0.2,
        "temporal_flickering": 0.2,
        "dynamic_degree": 0.4,
    }
    assert (result.overall["background_consistency"].count, result.overall["background_consistency"].missing) == (2, 3)
    assert result.system == "clips"
    assert result.weights == {"vbench": "vbench 0.1.5, torch 2.2.2, on cpu"}
    assert "measuring dynamic_degree" in (job.output / "dynamic_degree" / "log.txt").read_text()
    again, _ = official_result(environment, job, suite)
    assert again == result
    assert len(calls(job)) == 3
    # Another setting or another clip is another measurement.
    official_result(environment, replace(job, options={}), suite)
    assert len(calls(job)) == 6
    (job.videos / "alley-3.mp4").write_bytes(b"another clip")
    official_result(environment, replace(job, options={}, dimensions=("dynamic_degree",)), suite)
    assert len(calls(job)) == 7


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("raise", r"exit status 1 \(RuntimeError: CUDA out of memory\); log in .*log\.txt"),
        ("crash", r"ended by signal SIGSEGV"),
        ("nothing", r"it wrote no result"),
        ("torn", r"is damaged"),
        ("nan", r"the score is nan"),
        ("empty", r"it measured no clip"),
    ],
)
def test_one_failure_costs_one_dimension(python, job, behaviour, reason):
    environment = probe(python)
    behave(job, temporal_flickering=behaviour)
    outcome = run_official(environment, job)
    assert set(outcome.results) == {"background_consistency", "dynamic_degree"}
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(outcome.failures["temporal_flickering"])
    result, failures = official_result(environment, job, read_suite(environment.folder))
    assert result is not None
    assert list(failures) == ["temporal_flickering"]
    assert "temporal_flickering" not in result.overall
    assert result.notes[0].startswith("temporal_flickering failed: ")
    assert result.overall["total_score"].value is None
    # Mended, only what failed is run.
    behave(job)
    before = len(calls(job))
    outcome = run_official(environment, job)
    assert outcome.failures == {}
    assert set(outcome.resumed) == {"background_consistency", "dynamic_degree"}
    assert [call[0] for call in calls(job)[before:]] == ["temporal_flickering"]


def test_nothing_but_failures_is_no_result(python, job):
    behave(job, temporal_flickering="raise")
    result, failures = official_result(probe(python), replace(job, dimensions=("temporal_flickering",)), None)
    assert result is None
    assert list(failures) == ["temporal_flickering"]


def test_what_takes_too_long_is_ended(python, job):
    behave(job, temporal_flickering="hang")
    start = time.monotonic()
    outcome = run_official(probe(python), replace(job, timeout=1.5, dimensions=("temporal_flickering",)))
    assert time.monotonic() - start < 20
    assert outcome.failures["temporal_flickering"].startswith("not done in 1.5 s, and ended")
    assert job.cache is not None
    with pytest.raises(ProcessLookupError):
        os.kill(int((job.cache / "pid").read_text()), signal.SIGCONT)


def test_custom_clips_with_prompts(python, job):
    environment = probe(python)
    texts = {p.name: f"text of {p.name}" for p in job.videos.iterdir()}
    custom = replace(job, mode="custom", prompts=texts, dimensions=("temporal_style",), local=True)
    result, failures = official_result(environment, custom, None)
    assert failures == {}
    assert result is not None
    assert result.overall["temporal_style"].count == 4
    assert calls(job)[0][:4] == ["temporal_style", "custom_input", True, texts]
    assert result.protocol.settings["mode"] == "custom"
    with pytest.raises(OmniNFTError, match="no prompt is given for 'alley-1"):
        run_official(environment, replace(custom, prompts={k: v for k, v in texts.items() if "alley-1" not in k}))
    with pytest.raises(OmniNFTError, match="prompts by file name are for custom clips"):
        run_official(environment, replace(custom, mode="standard"))
    with pytest.raises(OmniNFTError, match="measures scene on its own prompt suite only"):
        run_official(environment, replace(custom, dimensions=("scene",)))


def test_what_the_package_would_trip_over_is_refused_before(python, job):
    environment = probe(python)
    with pytest.raises(OmniNFTError, match=r"(?s)color need detectron2.*pip install --no-build-isolation 'detectron2"):
        run_official(environment, replace(job, dimensions=("color", "dynamic_degree")))
    with pytest.raises(OmniNFTError, match="not a dimension of VBench: taste"):
        run_official(environment, replace(job, dimensions=("taste",)))
    (job.videos / "scores.json").touch()
    with pytest.raises(OmniNFTError, match=r"holds 'scores\.json' beside the clips"):
        run_official(environment, job)
    with pytest.raises(OmniNFTError, match="no such folder"):
        run_official(environment, replace(job, videos=job.videos / "none"))
    (job.videos.parent / "empty").mkdir()
    with pytest.raises(OmniNFTError, match="no clips in it"):
        run_official(environment, replace(job, videos=job.videos.parent / "empty"))
    assert calls(job) == []


def test_the_static_filter_decides_what_flickering_is_measured_on(python, job):
    environment = probe(python)
    (job.videos / "In a still frame, a stop sign-5.mp4").write_bytes(b"clip")
    result, failures = official_result(environment, job, read_suite(environment.folder), static_filter=True)
    assert failures == {}
    assert result is not None
    # Of samples 2 and 5 the stand-in keeps 5, as number 2.
    scores = [c.scores.get("temporal_flickering") for c in result.clips if "stop sign" in c.file]
    assert scores == [None, None, 0.2, None, None]
    assert result.protocol.settings["static_filter"] is True
    assert result.overall["background_consistency"].count == 2
    os.remove(job.videos / "In a still frame, a stop sign-5.mp4")
    for name in ("alley-1.mp4", "alley-3.mp4"):
        os.rename(job.videos / name, job.videos / name.replace("1", "0").replace("3", "2"))
    result, failures = official_result(environment, job, read_suite(environment.folder), static_filter=True)
    assert "it found no still clip" in failures["temporal_flickering"]
    assert result is not None
    assert result.overall["dynamic_degree"].value == 0.4


def test_an_environment_without_the_package(tmp_path):
    commands = environment_commands()
    assert "'vbench==0.1.5' 'transformers==4.33.2' 'numpy<2'" in commands[2]
    assert len(environment_commands(detectron2=False)) == len(commands) - 1
    with pytest.raises(OmniNFTError, match=r"(?s)does not run there \(.*No such file.*python3\.10 -m venv vbench-env"):
        probe(tmp_path / "python")
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False, symlinks=True)
    with pytest.raises(OmniNFTError, match=r"ModuleNotFoundError: No module named 'vbench'"):
        probe(bare / "bin" / "python")
