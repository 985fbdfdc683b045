from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from omninft.cli import app
from omninft.evaluation import vbench_generate
from omninft.evaluation.results import EvaluationResult
from omninft.evaluation.vbench import BY_NAME
from omninft.evaluation.vbench_generate import generate_clips, prompt_id
from omninft.types import OmniNFTError
from tests.evaluation.vbench_files import PROMPTS, write_clips, write_suite


def run(*arguments: object, ok: bool = True) -> str:
    result = CliRunner().invoke(app, ["vbench", *map(str, arguments)], catch_exceptions=False)
    assert (result.exit_code == 0) == ok, result.output
    return result.output


def test_export_from_files(tmp_path):
    suite = write_suite(tmp_path)
    write_clips(tmp_path, ["x.mp4"], frames=2)
    (tmp_path / "map.json").write_text(json.dumps({"alley": ["x.mp4"], "a cat": []}), encoding="utf-8")
    output = run("export", tmp_path / "out", "--clips", tmp_path / "map.json", "--suite", suite, "-d", "scene")
    assert "1 clips" in output
    assert "4 missing" in output
    assert "not in the suite a cat" in output
    assert os.listdir(tmp_path / "out") == ["alley-0.mp4"]
    with pytest.raises(OmniNFTError, match="one of the two"):
        run("export", tmp_path / "out", "--suite", suite)


def test_export_from_the_bundled_model(tmp_path):
    suite = write_suite(tmp_path)
    arguments = (
        "export",
        tmp_path / "out",
        "--model",
        "tiny",
        "--suite",
        suite,
        "--steps",
        1,
        "-d",
        "temporal_flickering",
    )
    assert "2 clips" in run(*arguments, "--samples", 2)
    names = [f"{PROMPTS[0]}-{n}.mp4" for n in range(2)]
    assert sorted(os.listdir(tmp_path / "out")) == names
    first = (tmp_path / "out" / names[0]).read_bytes()
    assert first != (tmp_path / "out" / names[1]).read_bytes()
    output = run("score", tmp_path / "out", "--suite", suite, "-d", "temporal_flickering", "-o", tmp_path / "result")
    assert "Temporal flickering" in output
    assert EvaluationResult.load(tmp_path / "result").overall["temporal_flickering"].count == 2


def test_prompts_whose_clips_are_there_are_not_made_again(tmp_path, monkeypatch):
    asked = []

    def sample(prompts, output, *, count, **_):
        for line in Path(prompts).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            asked.append(row["prompt_av"])
            for n in range(count):
                (output / f"{row['id']}-{n}.mp4").touch()
            if len(asked) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(vbench_generate, "sample_clips", sample)
    settings = dict(model="m", samples=2)
    with pytest.raises(KeyboardInterrupt):
        generate_clips(PROMPTS[:3], tmp_path, **settings)
    (tmp_path / f"{prompt_id(PROMPTS[1])}-1.mp4").unlink()
    clips = generate_clips(PROMPTS[:3], tmp_path, **settings)
    assert asked == [PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[2]]
    assert all(file.is_file() for files in clips.values() for file in files)
    with pytest.raises(OmniNFTError, match="holds clips of other settings"):
        generate_clips(PROMPTS[:3], tmp_path, **(settings | {"model": "another"}))


def test_score_of_custom_clips(tmp_path):
    write_clips(tmp_path, ["a ball-0.mp4", "a ball-1.mp4"])
    output = run("score", tmp_path, "--custom", "-d", "temporal_flickering", "-d", "flow_dynamic_degree")
    assert "Dynamic (flow)" in output
    assert "No VBench total: 15 of 16 dimensions are missing" in output


def test_a_prompt_file_that_cannot_be_read(tmp_path):
    write_clips(tmp_path / "clips", ["a-0.mp4"], frames=2)
    for text in ("{", "[]"):
        (tmp_path / "prompts.json").write_text(text)
        with pytest.raises(OmniNFTError, match=r'prompts\.json: no prompts by file name.*"clip\.mp4": "prompt"'):
            run(
                "run",
                tmp_path / "clips",
                "-o",
                tmp_path / "o",
                "--custom",
                "--python",
                "p",
                "--prompts",
                tmp_path / "prompts.json",
            )


def test_totals_of_official_files(tmp_path):
    for name, dimension in BY_NAME.items():
        score = [
            dimension.low + 0.5 * (dimension.high - dimension.low),
            [{"video_path": "a-0.mp4", "video_results": 1}],
        ]
        (tmp_path / f"{name}_eval_results.json").write_text(json.dumps({name: score}), encoding="utf-8")
    output = run("totals", tmp_path, "-o", tmp_path / "out", "--system", "half")
    assert [line.split()[1] for line in output.splitlines() if line.strip().startswith("Total")] == ["0.5000"]
    assert EvaluationResult.load(tmp_path / "out").system == "half"


def test_run_says_how_to_make_an_environment(tmp_path):
    output = run("run", tmp_path, "-o", tmp_path / "out", ok=False)
    assert "transformers==4.33.2" in output
    assert "object_class, multiple_objects, color, spatial_relationship, which alone need detectron2" in output.replace(
        "\n", " "
    )
