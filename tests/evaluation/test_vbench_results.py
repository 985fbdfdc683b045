from __future__ import annotations

import json

import numpy as np
import pytest

from omninft.evaluation.results import EvaluationResult, Protocol
from omninft.evaluation.vbench import BY_NAME
from omninft.evaluation.vbench_results import ClipRow, assemble, metric_of, read_official
from omninft.evaluation.vbench_suite import read_suite
from omninft.types import OmniNFTError
from tests.evaluation.vbench_files import write_suite


def entry(name: str, value: object, **more: object) -> dict[str, object]:
    return {"video_path": f"/clips/{name}", "video_results": value, **more}


def write(path, tree) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding="utf-8")


def test_official_files_become_a_result(tmp_path):
    write(
        tmp_path / "a" / "x_eval_results.json",
        {
            "imaging_quality": [0.65, [entry("a cat-0.mp4", 70.0), entry("a dog-0.mp4", 60.0)]],
            "dynamic_degree": [0.5, [entry("a cat-0.mp4", True), entry("a dog-0.mp4", False)]],
        },
    )
    write(
        tmp_path / "b" / "y_eval_results.json",
        {
            "background_consistency": [
                0.7,
                [entry("a dog-0.mp4", 0.9, cnt_per_video=1), entry("a cat-0.mp4", 0.6, cnt_per_video=2)],
            ]
        },
    )
    result = read_official([tmp_path], "mine", settings={"mode": "custom"}, notes=["a note"])
    assert result.system == "mine"
    assert result.protocol.benchmark == "vbench"
    assert result.protocol.settings["implementation"] == "vbench 0.1.5"
    assert result.protocol.settings["mode"] == "custom"
    names = ["background_consistency", "dynamic_degree", "imaging_quality"]
    assert [m.name for m in result.metrics][:3] == names
    by_file = {c.file: c for c in result.clips}
    # Clips of imaging_quality come as 0..100, the dimension as 0..1.
    assert by_file["a cat-0.mp4"].scores == {
        "imaging_quality": 0.7,
        "dynamic_degree": 1.0,
        "background_consistency": 0.6,
    }
    assert by_file["a dog-0.mp4"].scores["dynamic_degree"] == 0.0
    assert by_file["a cat-0.mp4"].prompt == "a cat"
    assert result.overall["imaging_quality"].value == 0.65
    assert result.overall["background_consistency"].value == 0.7
    assert result.overall["imaging_quality"].count == 2
    assert result.overall["total_score"].value is None
    expected = ((0.7 - 0.2615) / (1 - 0.2615) + 0.5 * 0.5 + 0.65) / 2.5
    assert result.overall["quality_of_measured"].value == pytest.approx(expected)
    assert result.notes[0] == "a note"
    assert result.notes[1].startswith("No VBench total: 13 of 16 dimensions are missing (subject_consistency, ")
    result.save(tmp_path / "out")
    assert EvaluationResult.load(tmp_path / "out") == result


def test_sixteen_official_dimensions_have_a_total(tmp_path):
    for name, dimension in BY_NAME.items():
        write(tmp_path / name / "v_eval_results.json", {name: [dimension.high, [entry("a-0.mp4", dimension.high)]]})
    result = read_official([tmp_path], "best")
    assert [result.overall[n].value for n in ("quality_score", "semantic_score", "total_score")] == pytest.approx(
        [1, 1, 1]
    )
    assert result.notes == ()


def test_clips_that_the_suite_asks_for_and_that_lack(tmp_path):
    suite = read_suite(write_suite(tmp_path))
    file = tmp_path / "x_eval_results.json"
    write(file, {"scene": [0.5, [entry(f"alley-{n}.mp4", 0.5, frame_count=16) for n in (0, 3)]]})
    result = read_official([file], "s", suite)
    assert result.overall["scene"].count == 2
    assert result.overall["scene"].missing == 3
    lacking = [c for c in result.clips if c.scores["scene"] is None]
    assert [c.file for c in lacking] == ["alley-1.mp4", "alley-2.mp4", "alley-4.mp4"]
    assert lacking[0].reasons == {"scene": "the official package gives this clip no score"}
    assert {c.index for c in result.clips} == {2}
    assert result.protocol.settings["suite"] == suite.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not results of VBench"),
        ("[]", "not results of VBench"),
        ('{"scene": 0.5}', "not results of VBench"),
        ('{"taste": [0.5, []]}', "not a dimension of VBench: taste"),
        ('{"scene": [NaN, []]}', "no finite score of scene"),
        ("{}", "no finite score of any dimension"),
        ('{"scene": [0.5, [{"video_path": "a.mp4"}]]}', "scene: an entry that cannot be read"),
        ('{"scene": [0.5, [{"video_path": "a.mp4", "video_results": [1]}]]}', "an entry that cannot be read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, message):
    file = tmp_path / "x_eval_results.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(OmniNFTError, match=message):
        read_official([file], "s")


def test_missing_and_repeated_results(tmp_path):
    with pytest.raises(OmniNFTError, match=r"no \*_eval_results\.json in it"):
        read_official([tmp_path], "s")
    with pytest.raises(OmniNFTError, match="cannot be read"):
        read_official([tmp_path / "x.json"], "s")
    for name in "ab":
        write(tmp_path / name / "x_eval_results.json", {"scene": [0.5, [entry("alley-0.mp4", 0.5)]]})
    with pytest.raises(OmniNFTError, match="scene is in another of the files too"):
        read_official([tmp_path], "s")
    write(tmp_path / "a" / "x_eval_results.json", {"scene": [0.5, [entry("alley-0.mp4", 0.5)] * 2]})
    with pytest.raises(OmniNFTError, match=r"scene: two results of 'alley-0\.mp4'"):
        read_official([tmp_path / "a"], "s")


def test_a_clip_without_a_number_is_missing_not_zero(tmp_path):
    file = tmp_path / "x_eval_results.json"
    write(file, {"color": [0.5, [entry("a red car-0.mp4", float("nan")), entry("a red car-1.mp4", 0.5)]]})
    result = read_official([file], "s")
    assert result.clips[0].scores == {"color": None}
    assert result.clips[0].reasons == {"color": "the official result is nan"}
    assert (result.overall["color"].count, result.overall["color"].missing) == (1, 1)


def test_means_are_weighted_and_have_an_interval():
    rng = np.random.default_rng(0)
    prompts = [f"p{n // 5}" for n in range(200)]
    effect = np.repeat(rng.normal(0, 0.1, 40), 5)
    values = 0.5 + effect + rng.normal(0, 0.01, 200)
    sizes = rng.integers(1, 9, 200)
    rows = [
        ClipRow(f"{n}.mp4", prompts[n], {"scene": float(values[n])}, {}, {"scene": float(sizes[n])}) for n in range(200)
    ]
    result = assemble("s", Protocol("vbench", "1"), [metric_of("scene")], rows)
    found = result.overall["scene"]
    assert found.value == pytest.approx((values * sizes).sum() / sizes.sum())
    assert found.low is not None
    assert found.high is not None
    # Prompts are the independent units: about 1.96 * 0.1 / sqrt(40) each way (more, for the weights), and not the
    # sqrt(5) times less of 200 independent clips.
    assert 0.5 * (found.high - found.low) == pytest.approx(1.96 * effect.std() / np.sqrt(40), rel=0.25)
    assert found.low < found.value < found.high
    one = assemble("s", Protocol("vbench", "1"), [metric_of("scene")], rows[:5]).overall["scene"]
    assert (one.low, one.high, one.count) == (None, None, 5)
