from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

from omninft.evaluation.vbench_results import write_full_info
from omninft.evaluation.vbench_suite import (
    clip_name,
    clip_names,
    export_clips,
    prompt_of,
    read_mapping,
    read_suite,
    strangers,
)
from omninft.types import OmniNFTError
from tests.evaluation.vbench_files import ENTRIES, PROMPTS, write_suite

# Of vbench 0.1.5.
COUNTS = {
    "human_action": 100,
    "temporal_style": 100,
    "overall_consistency": 93,
    "aesthetic_quality": 93,
    "imaging_quality": 93,
    "appearance_style": 90,
    "scene": 86,
    "background_consistency": 86,
    "color": 85,
    "spatial_relationship": 84,
    "multiple_objects": 82,
    "object_class": 79,
    "temporal_flickering": 75,
    "subject_consistency": 72,
    "dynamic_degree": 72,
    "motion_smoothness": 72,
}


@pytest.fixture
def suite(tmp_path):
    return read_suite(write_suite(tmp_path))


def test_the_real_suite_where_it_is():
    source = os.environ.get("OMNINFT_VBENCH_SUITE")
    try:
        suite = read_suite(Path(source) if source else None)
    except OmniNFTError as error:
        pytest.skip(f"set OMNINFT_VBENCH_SUITE: {error}")
    assert len(suite.entries) == 946
    prompts = suite.prompts()
    assert len(prompts) == 944
    assert suite.counts() == COUNTS
    names = [name for prompt in prompts for name in clip_names(prompt)]
    assert len(set(names)) == 4720
    # No text has a slash, and all fit: what the exporter refuses does not happen.
    assert max(len(name.encode()) for name in names) == 216
    assert all(prompt_of(name) == name[:-6] for name in names)
    assert len(suite.prompts(["temporal_flickering"])) == 75


def test_entries_prompts_and_counts(suite):
    assert len(suite.entries) == 6
    assert list(suite.prompts()) == PROMPTS
    assert suite.counts()["overall_consistency"] == 2
    assert suite.counts()["scene"] == 1
    assert suite.prompts()["The bund, oil painting"] == (
        "appearance_style",
        "overall_consistency",
        "aesthetic_quality",
        "imaging_quality",
    )
    assert suite.prompts(["imaging_quality", "scene"]) == {
        "alley": ("scene",),
        "The bund, oil painting": ("imaging_quality",),
        "rock-carved façades.": ("imaging_quality",),
    }


def test_a_suite_is_found_in_folders_packages_and_wheels(tmp_path, suite):
    file = tmp_path / "VBench_full_info.json"
    package = tmp_path / "unpacked" / "vbench"
    package.mkdir(parents=True)
    (package / file.name).write_bytes(file.read_bytes())
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    with zipfile.ZipFile(downloads / "vbench-0.1.5-py3-none-any.whl", "w") as wheel:
        wheel.write(file, "vbench/VBench_full_info.json")
    for source in (tmp_path, package, package.parent, downloads, downloads / "vbench-0.1.5-py3-none-any.whl"):
        assert read_suite(source) == suite


def test_what_is_no_suite_is_refused(tmp_path):
    with pytest.raises(OmniNFTError, match=r"fetch it by: pip download --no-deps vbench==0\.1\.5"):
        read_suite(tmp_path)
    file = tmp_path / "VBench_full_info.json"
    for text, message in (
        ("{", "not VBench's prompt suite"),
        ("[]", "no prompts"),
        ('[{"prompt": "a"}]', "KeyError"),
        ('[{"prompt_en": " ", "dimension": []}]', "an empty one"),
        ('[{"prompt_en": "a", "dimension": ["taste"]}]', "has not: taste"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(OmniNFTError, match=message):
            read_suite(file)
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("other/__init__.py", "")
    with pytest.raises(OmniNFTError, match=r"no vbench/VBench_full_info\.json in it"):
        read_suite(tmp_path / "other.whl")


def test_names_and_prompts_of_names():
    assert clip_names("alley") == [f"alley-{n}.mp4" for n in range(5)]
    assert prompt_of("/some/where/a rock-carved city.-3.mp4") == "a rock-carved city."
    assert prompt_of("top-10.mp4") == "top"
    assert prompt_of("no number.gif") == "no number"
    assert clip_name("x" * 249, 4) == "x" * 249 + "-4.mp4"
    with pytest.raises(OmniNFTError, match="has 256 bytes, file systems store at most 255"):
        clip_name("x" * 250, 4)
    with pytest.raises(OmniNFTError, match="has 256 bytes"):
        clip_name("ç" * 125, 4)
    with pytest.raises(OmniNFTError, match="holds a slash"):
        clip_name("day/night", 0)


def test_export_links_clips_and_reports_the_rest(tmp_path, suite):
    source = tmp_path / "mine"
    source.mkdir()
    for n in range(7):
        (source / f"{n}.mp4").write_bytes(bytes([n]))
    clips = {"alley": [source / f"{n}.mp4" for n in range(6)], PROMPTS[-1]: [source / "6.mp4"], "a cat": []}
    target = tmp_path / "folder"
    for _ in range(2):  # a second time changes nothing
        report = export_clips(suite, clips, target)
        assert report.written == 6
        assert len(report.missing) == 5 * 5 - 6
        assert "rock-carved façades.-1.mp4" in report.missing
        assert report.unknown == ("a cat",)
        assert sorted(os.listdir(target)) == [*clip_names("alley"), "rock-carved façades.-0.mp4"]
        assert (target / "alley-3.mp4").read_bytes() == b"\3"
        assert (target / "alley-3.mp4").samefile(source / "3.mp4")
    report = export_clips(suite, clips, tmp_path / "copies", ["scene"], copy=True)
    assert (report.written, report.missing) == (5, ())
    assert not (tmp_path / "copies" / "alley-3.mp4").samefile(source / "3.mp4")
    assert strangers(tmp_path / "copies") == []
    (tmp_path / "copies" / "scores.json").touch()
    assert strangers(tmp_path / "copies") == ["scores.json"]


def test_a_clip_that_changed_is_exported_again(tmp_path, suite):
    (tmp_path / "old.mp4").write_bytes(b"old")
    (tmp_path / "new.mp4").write_bytes(b"new")
    for name in ("old", "new"):
        export_clips(suite, {"alley": [tmp_path / f"{name}.mp4"]}, tmp_path / "out")
        assert (tmp_path / "out" / "alley-0.mp4").read_text() == name
    assert (tmp_path / "old.mp4").read_text() == "old"


def test_export_refuses_what_is_no_clip(tmp_path, suite):
    with pytest.raises(OmniNFTError, match=r"gone\.mp4: no such mp4 file; it is to be sample 0 of 'alley'"):
        export_clips(suite, {"alley": [tmp_path / "gone.mp4"]}, tmp_path / "out")
    (tmp_path / "a.webm").touch()
    with pytest.raises(OmniNFTError, match=r"a\.webm: no such mp4 file"):
        export_clips(suite, {"alley": [tmp_path / "a.webm"]}, tmp_path / "out")


def test_mappings_are_files_or_folders_of_samples(tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"alley": ["a.mp4", "/b.mp4"]}), encoding="utf-8")
    assert read_mapping(tmp_path / "map.json") == {"alley": [tmp_path / "a.mp4", Path("/b.mp4")]}
    entries = [{"file": f"p-{n}.mp4", "prompt_id": "p", "prompt_av": "alley", "sample": n} for n in (1, 0)]
    (tmp_path / "scores.json").write_text(json.dumps({"clips": entries}), encoding="utf-8")
    assert read_mapping(tmp_path) == {"alley": [tmp_path / "p-0.mp4", tmp_path / "p-1.mp4"]}
    (tmp_path / "map.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(OmniNFTError, match="not a mapping"):
        read_mapping(tmp_path / "map.json")
    with pytest.raises(OmniNFTError, match="cannot be read"):
        read_mapping(tmp_path / "none.json")


def test_full_info_has_the_entries_with_their_clips(tmp_path, suite):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("alley-0.mp4", "alley-4.mp4", "alley-5.mp4"):
        (folder / name).touch()
    path = write_full_info(tmp_path / "out" / "mine_full_info.json", suite, folder, ["scene", "imaging_quality"])
    tree = json.loads(path.read_text(encoding="utf-8"))
    assert [e["prompt_en"] for e in tree] == ["alley", "The bund, oil painting", "rock-carved façades."]
    alley = ENTRIES[2] | {"video_list": [str(folder / "alley-0.mp4"), str(folder / "alley-4.mp4")]}
    assert tree[0] == alley
    assert tree[1]["video_list"] == []
    assert tree[1]["dimension"] == ENTRIES[4]["dimension"]
