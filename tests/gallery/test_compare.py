from __future__ import annotations

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import av
import numpy as np
import pytest
from typer.testing import CliRunner

from omninft.cli import app
from omninft.clips.media import read_clip, write_clip, write_wav
from omninft.evaluation.paired import Measure, compare_paired
from omninft.evaluation.results import ClipScores, EvaluationResult, Protocol
from omninft.gallery import placing
from omninft.gallery.compare import Comparison, disagreement, mean_rows, write_comparison
from omninft.gallery.placing import playable, plays_in_browsers
from omninft.gallery.systems import match_clips, matching_notes, open_systems
from omninft.types import Clip, OmniNFTError, Prompt
from tests.gallery.clip_folders import beeping_clip, evaluation_folder, scored_folder
from tests.gallery.test_report import Element, parse

SCORES_A: dict[str, list[float | None]] = {"av_ib": [0.1, 0.2, 0.3, None], "desync": [0.9, 0.4, 0.5, 0.6]}
SCORES_B: dict[str, list[float | None]] = {"av_ib": [0.4, 0.2, 0.1, 0.3], "desync": [0.2, 0.4, 0.6, 0.1]}
PROMPTS = [
    Prompt("ball", "a ball bounces", "a tone", "a ball bounces a tone"),
    Prompt("evil", "", "", '</script><script>alert(1)</script><b>&"'),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("systems")
    clip = beeping_clip()
    a = evaluation_folder(root / "one", "Cascade", SCORES_A, clip)
    return a, evaluation_folder(root / "two", "Joint", SCORES_B, beeping_clip(beep=0.2, brightness=20))


@pytest.fixture(scope="module")
def made(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return write_comparison([str(f) for f in folders], tmp_path_factory.mktemp("pages") / "page")


@pytest.fixture(scope="module")
def page(made: Comparison) -> Element:
    return parse(made.page)


def data_of(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_every_kind_of_input_becomes_a_system(folders: tuple[Path, Path], tmp_path: Path) -> None:
    clip = beeping_clip()
    run = tmp_path / "my-run"
    for name in ("test-base", "test-trained"):
        scored_folder(run / "samples" / name, clip, PROMPTS, [{"sync": 0.1}, {"sync": 0.2}])
    table = compare_paired(
        [Measure("sync", "trained", higher_is_better=False)], np.ones((2, 1)), np.ones((2, 1)), ["a", "b"]
    )
    (run / "evaluation.json").write_text(table.to_json(), encoding="utf-8")
    bare = tmp_path / "bare"
    write_clip(bare / "evil-0.mp4", clip)
    (bare / "notes.txt").write_text("not a clip", encoding="utf-8")
    systems = open_systems([str(folders[0]), f"Mine={run}", str(run / "samples" / "test-base"), f"Bare={bare}"])
    found = [(s.label, s.source, len(s.records)) for s in systems]
    assert found == [
        ("Cascade", "result.json", 4),
        ("Mine Base", "scores.json", 2),
        ("Mine Trained", "scores.json", 2),
        ("test-base", "scores.json", 2),
        ("Bare", "files", 1),
    ]
    assert systems[0].measures["desync"].name == "DeSync"
    assert [s.measures["sync"].higher_is_better for s in systems[1:4]] == [False] * 3
    assert systems[0].records[3].scores == {"desync": 0.6}
    assert systems[0].records[3].reasons == {"av_ib": "nothing was heard"}
    assert systems[0].records[1].categories == ("waterfall", "indoors")
    assert systems[1].records[0].seen == (0.25,)


def test_labels_differ(folders: tuple[Path, Path]) -> None:
    a = str(folders[0])
    assert [s.label for s in open_systems([a, a])] == [
        f"{folders[0].parent.name}/one",
        f"{folders[0].parent.name}/one (2)",
    ]


@pytest.mark.parametrize(("given", "message"), [("nowhere", "no such folder"), ("", "nothing to show")])
def test_what_cannot_be_compared_is_refused(
    given: str, message: str, tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    with pytest.raises(OmniNFTError, match=message):
        open_systems([str(folders[0]), str(tmp_path / given)])
    with pytest.raises(OmniNFTError, match="at least two systems"):
        open_systems([str(folders[0])])
    (tmp_path / "scores.json").write_text('{"clips": [{"file": 1}]}', encoding="utf-8")
    with pytest.raises(OmniNFTError, match=r"scores.json: entry 1: file: found 1, expected text"):
        open_systems([str(tmp_path), str(folders[0])])


def test_clips_are_matched_by_prompt_else_by_file(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    clip = beeping_clip()
    scored = scored_folder(tmp_path / "scored", clip, PROMPTS, [{}, {}])
    other = [PROMPTS[1], Prompt("new", "", "", "something else")]
    systems = open_systems([f"A={scored}", f"B={scored_folder(tmp_path / 'other', clip, other, [{}, {}])}"])
    matches = match_clips(systems)
    assert [m.key for m in matches] == ["ball#0", "evil#0", "new#0"]
    assert [m.is_complete for m in matches] == [False, True, False]
    assert matches[0].records[1] == "B has no clip of this prompt."
    assert matching_notes(systems, matches) == [
        "Matched by prompt and sample: 1 of 3 have a clip of every system.",
        f"A: 2 clips from {scored} (scores.json).",
        "A lacks 1: new.",
        f"B: 2 clips from {tmp_path / 'other'} (scores.json).",
        "B lacks 1: ball.",
    ]
    # A bare folder knows no prompts, so all go by the names of the files.
    write_clip(tmp_path / "bare" / "evil-0.mp4", clip)
    systems = open_systems([str(scored), str(tmp_path / "bare")])
    matches = match_clips(systems)
    assert [(m.key, m.is_complete) for m in matches] == [("ball-0", False), ("evil-0", True)]
    assert matches[0].records[1] == "bare has no file of this name."
    with pytest.raises(OmniNFTError, match=r"share no prompt ids \(.*Cascade has p000#0"):
        match_clips(open_systems([str(folders[0]), str(scored)]))


def test_another_text_for_the_same_prompt_is_told(tmp_path: Path) -> None:
    clip = beeping_clip()
    scored_folder(tmp_path / "a", clip, [PROMPTS[1]], [{}])
    scored_folder(tmp_path / "b", clip, [Prompt("evil", "", "", "a lamp")], [{}])
    systems = open_systems([str(tmp_path / "a"), str(tmp_path / "b")])
    assert matching_notes(systems, match_clips(systems))[-1] == "The systems give different prompt texts for 1: evil."


def test_samples_of_a_prompt_that_a_table_does_not_number_stay_apart(tmp_path: Path) -> None:
    clip = beeping_clip()
    folder = scored_folder(tmp_path / "a", clip, PROMPTS[:1], [{"x": 1.0}])
    entry = {"file": "ball-0.mp4", "prompt_id": "ball", "scores": {"x": 1.0}, "reasons": {}}
    (folder / "scores.json").write_text(json.dumps({"clips": [entry, entry], "means": {}}), encoding="utf-8")
    assert [m.key for m in match_clips(open_systems([str(folder), str(folder)]))] == ["ball#0", "ball#1"]


def test_the_page_is_one_folder_whose_names_tell_nothing(made: Comparison, page: Element) -> None:
    folder = made.page.parent
    assert sorted(p.name for p in folder.iterdir()) == ["clips", "clips.csv", "index.html", "posters"]
    videos = page.all("video")
    assert len(videos) == 8
    for video in videos:
        assert "src" not in video.attributes
        assert "poster" not in video.attributes
        assert re.fullmatch(r"clips/[0-9a-f]{12}\.mp4", video.attributes["data-src"])
        assert (folder / unquote(video.attributes["data-src"])).is_file()
        assert (folder / video.attributes["data-poster"]).read_bytes()[:3] == b"\xff\xd8\xff"
    rows = list(csv.DictReader((folder / "clips.csv").open(encoding="utf-8")))
    assert {(r["system"], r["prompt_id"], r["made"]) for r in rows} == {
        (s, f"p00{i}", "copied") for s in ("Cascade", "Joint") for i in range(4)
    }
    first = next(r for r in rows if r["system"] == "Joint" and r["prompt_id"] == "p002")
    assert (folder / first["file"]).read_bytes() == Path(first["source"]).read_bytes()


def test_the_page_loads_nothing_from_elsewhere(made: Comparison, page: Element) -> None:
    text = made.page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|@import|url\(|fetch\(|XMLHttpRequest|import\(|WebSocket", text)
    assert all("src" not in script.attributes for script in page.all("script"))
    assert [e.attributes["href"] for tag in ("a", "link") for e in page.all(tag)] == ["#clips", "data:,"]


def test_text_from_prompts_cannot_become_markup(tmp_path: Path) -> None:
    folder = scored_folder(tmp_path / "a", beeping_clip(), PROMPTS, [{"<b>": 1.0}, {}])
    made = write_comparison([f"<i>={folder}", str(folder)], tmp_path / "page")
    text = made.page.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<i>" not in text
    page = parse(made.page)
    assert PROMPTS[1].prompt_av in [e.words() for e in page.by_class("prompt")]
    assert data_of(made.page)["prompts"][1]["prompt"] == PROMPTS[1].prompt_av


def test_a_clip_in_which_no_sound_was_counted_gets_no_tick(tmp_path: Path) -> None:
    folders = [scored_folder(tmp_path / n, beeping_clip(), [Prompt("p", "", "", "")], [{"s": 1.0}]) for n in "ab"]
    listing = folders[1] / "scores.json"
    listing.write_text(listing.read_text(encoding="utf-8").replace('"audio": [0.5]', '"audio": []'), encoding="utf-8")
    page = parse(write_comparison([str(f) for f in folders], tmp_path / "page").page)
    assert [len(wave.by_class("heard")) for wave in page.by_class("wave")] == [1, 0]
    assert "has looked for the sounds itself" not in page.words()


def test_onsets_are_found_where_they_are_not_known(page: Element, tmp_path: Path) -> None:
    assert "has looked for the sounds itself" in page.words()
    waves = page.by_class("group")[0].by_class("wave")
    times = [[float(m.attributes["x1"]) / 1000 for m in wave.by_class("heard")] for wave in waves]
    assert times[0][0] == pytest.approx(0.5, abs=0.05)  # of a clip of 1 s
    assert times[1][0] == pytest.approx(0.2, abs=0.05)
    folder = scored_folder(tmp_path / "a", beeping_clip(beep=0.8), PROMPTS[:1], [{}])
    known = parse(write_comparison([str(folder), str(folder)], tmp_path / "page").page)
    wave = known.by_class("wave")[0]
    assert [m.attributes["x1"] for m in wave.by_class("heard")] == ["500.0"]
    assert [m.attributes["x1"] for m in wave.by_class("seen")] == ["250.0"]


def test_scores_differences_and_categories(made: Comparison, page: Element) -> None:
    groups = page.by_class("group")
    rows = {r.all("th")[0].words(): r for r in groups[0].by_class("scores")[0].all("tr")[1:]}
    assert [c.words() for c in rows["AV-IB"].all("td")] == ["0.10", "0.40", "+0.30"]
    assert [c.words() for c in rows["DeSync"].all("td")] == ["0.90", "0.20", "\u22120.70"]
    assert "is-better" in rows["DeSync"].all("td")[-1].attributes["class"]
    (missing,) = groups[3].by_class("why")
    assert missing.attributes["title"] == "nothing was heard"
    assert groups[1].by_class("categories")[0].words() == "waterfall, indoors"
    data = data_of(made.page)
    assert data["systems"] == ["Cascade", "Joint"]
    assert data["prompts"][3]["scores"] == [[None, 0.3], [0.6, 0.1]]
    assert data["measures"] == [{"name": "av_ib", "label": "AV-IB"}, {"name": "desync", "label": "DeSync"}]


def test_three_systems_are_each_set_against_the_first(folders: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = folders
    page = parse(write_comparison([str(a), str(b), f"C={b}"], tmp_path / "page").page)
    row = page.by_class("scores")[0].all("tr")[1]
    assert [c.words() for c in row.all("td")] == ["0.10", "0.40 +0.30", "0.40 +0.30"]
    assert [th.words() for th in page.by_class("means")[0].all("th")[:7]] == [
        "Score", "Cascade", "Joint", "C", "Joint \u2212 Cascade", "C \u2212 Cascade", "Prompts",
    ]  # fmt: skip


def test_disagreement_is_in_standard_deviations() -> None:
    nan = math.nan
    scores = np.array(
        [[[1.0, 5.0, 0.0], [3.0, 5.0, 0.0]], [[2.0, nan, 0.0], [2.0, 7.0, 0.0]], [[nan] * 3, [4.0, nan, 0]]]
    )
    first, second = np.std([1, 3, 2, 2, 4]), np.std([5, 5, 7])
    # The second score agrees on prompt 0, is missing on prompt 1; the third never varies.
    assert disagreement(scores) == pytest.approx([(2 / first + 0 / second) / 2, 0.0, nan], nan_ok=True)


def test_means_are_over_prompts_that_all_systems_share() -> None:
    scores = np.array([[[0.1], [0.4]], [[0.2], [0.2]], [[0.3], [0.1]], [[np.nan], [0.9]]])
    known = {"d": Measure("DeSync", "held_out", higher_is_better=False)}
    (row,) = mean_rows(scores, ["d"], known, ["a", "b", "c", "d"])
    assert (row.name, row.counts) == ("DeSync", "3 of 4")
    assert [float(v) for v in row.values] == pytest.approx([0.2, 0.7 / 3], abs=0.05)
    (difference, interval, tone) = row.differences[0]
    assert float(difference) == pytest.approx(0.1 / 3, abs=0.05)
    assert interval.startswith("[")
    assert tone == ""


def test_clips_that_browsers_refuse_are_made_again(tmp_path: Path) -> None:
    clip = beeping_clip()
    silent = Clip(clip.video, clip.frame_rate, np.zeros((0, 0), np.float32), 0, clip.prompt)
    a, b = tmp_path / "a", tmp_path / "b"
    write_clip(a / "sample_0000.mp4", silent)
    write_wav(a / "sample_0000.wav", clip.waveform, 16000)
    b.mkdir()
    _write_mov(b / "sample_0000.mov", clip)
    assert not plays_in_browsers(b / "sample_0000.mov")
    made = write_comparison([str(a), str(b)], tmp_path / "page")
    rows = list(csv.DictReader((made.page.parent / "clips.csv").open(encoding="utf-8")))
    assert [r["made"] for r in rows] == ["encoded for browsers"] * 2
    for row in rows:
        file = made.page.parent / row["file"]
        assert plays_in_browsers(file)
        sound = read_clip(file).waveform.mean(axis=0)
        assert np.abs(sound).argmax() / 16000 == pytest.approx(0.53, abs=0.06)


def test_the_sound_beside_a_clip_is_what_is_played(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, beep in ((a, 0.5), (b, 0.2)):
        write_clip(folder / "sample_0000.mp4", beeping_clip(beep=0.5))
        write_wav(folder / "sample_0000.wav", beeping_clip(beep=beep).waveform, 16000)
    made = write_comparison([str(a), str(b)], tmp_path / "page")
    rows = list(csv.DictReader((made.page.parent / "clips.csv").open(encoding="utf-8")))
    # The same sound needs no new encoding, another one does.
    assert [r["made"] for r in rows] == ["copied", "encoded for browsers"]
    sound = read_clip(made.page.parent / rows[1]["file"]).waveform[0]
    assert np.abs(sound).argmax() / 16000 == pytest.approx(0.23, abs=0.06)
    waves = parse(made.page).by_class("wave")
    times = [float(w.by_class("heard")[0].attributes["x1"]) / 1000 for w in waves]
    assert times == pytest.approx([0.5, 0.2], abs=0.05)


@pytest.mark.parametrize(("inside", "beside"), [(0.0, 1.0), (1.0, 0.0), (1.0, 0.1)])
def test_a_silent_or_quiet_track_is_not_the_same_sound(tmp_path: Path, inside: float, beside: float) -> None:
    clip = beeping_clip(beep=0.5)
    for name in ("a", "b"):
        write_clip(tmp_path / name / "sample_0000.mp4", replace(clip, waveform=inside * clip.waveform))
        write_wav(tmp_path / name / "sample_0000.wav", beside * clip.waveform, 16000)
    made = write_comparison([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "page")
    rows = list(csv.DictReader((made.page.parent / "clips.csv").open(encoding="utf-8")))
    peak = np.abs(read_clip(made.page.parent / rows[0]["file"]).waveform).max()
    assert peak == pytest.approx(beside * np.abs(clip.waveform).max(), abs=0.05)


def _write_mov(path: Path, clip: Clip) -> None:
    """MPEG-4 part 2 with PCM sound, as cameras wrote it."""
    with av.open(str(path), "w", format="mov") as container:
        video = container.add_stream("mpeg4", rate=int(clip.frame_rate))
        video.height, video.width = clip.video.shape[1:3]
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=clip.sample_rate)
        audio.layout = "mono"
        for pixels in clip.video:
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        pcm = (clip.waveform * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
        frame.sample_rate = clip.sample_rate
        container.mux(audio.encode(frame))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))


def test_odd_sizes_many_channels_and_strange_rates_become_playable() -> None:
    video = np.arange(2 * 5 * 7 * 3, dtype=np.uint8).reshape(2, 5, 7, 3)
    time = np.arange(11000) / 22000
    sound = np.stack([np.sin(2 * np.pi * 440 * time)] * 3).astype(np.float32)
    fixed = playable(Clip(video, 24.0, sound, 22000, Prompt("x", "", "", "")))
    assert fixed.video.shape == (2, 6, 8, 3)
    assert (fixed.video[:, 5] == fixed.video[:, 4]).all()
    assert fixed.waveform.shape == (1, 24000)
    assert fixed.sample_rate == 48000
    peak = np.abs(np.fft.rfft(fixed.waveform[0])).argmax() * 48000 / 24000
    assert peak == pytest.approx(440, abs=2)


def test_an_output_folder_of_something_else_is_left_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    inputs = [str(f) for f in folders]
    copy = shutil.copytree(folders[0], tmp_path / "copy")
    with pytest.raises(OmniNFTError, match="holds something else"):
        write_comparison(inputs, copy)
    assert (copy / "clips" / "sample_0000.mp4").is_file()
    out = tmp_path / "page"
    first = write_comparison(inputs, out)
    (out / "votes.csv").write_text("kept", encoding="utf-8")
    smaller = scored_folder(tmp_path / "small", beeping_clip(), PROMPTS[:1], [{}])
    write_comparison([str(smaller), f"B={smaller}"], out)
    assert (out / "votes.csv").read_text(encoding="utf-8") == "kept"
    assert len(list((out / "clips").iterdir())) == 1  # one file seen by both; none is left of before
    assert first.page == out / "index.html"
    assert not list(out.glob(".part-*"))


def test_a_single_file_carries_its_clips_up_to_a_limit(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [str(f) for f in folders]
    made = write_comparison(inputs, tmp_path / "page", single_file=True)
    assert [p.name for p in made.page.parent.iterdir()] == ["index.html"]
    sources = [v.attributes["data-src"] for v in parse(made.page).all("video")]
    assert all(s.startswith("data:video/mp4;base64,") for s in sources)
    monkeypatch.setattr("omninft.gallery.compare.SINGLE_FILE_BYTES", 1000)
    with pytest.raises(OmniNFTError, match="leave --single-file out"):
        write_comparison(inputs, tmp_path / "other", single_file=True)
    assert placing.SINGLE_FILE_BYTES > 2**20


def test_what_cannot_be_shown_says_why(folders: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders[0], tmp_path / "copy")
    (copy / "clips" / "sample_0001.mp4").unlink()
    (copy / "clips" / "sample_0002.mp4").write_bytes(b"not a video")
    made = write_comparison([str(copy), str(folders[1])], tmp_path / "page")
    assert made.num_clips == 6
    told = next(n for n in made.notes if "cannot be shown" in n)
    assert told.startswith("Cascade p001 cannot be shown: sample_0001.mp4:")
    page = parse(made.page)
    absent = [e.words() for e in page.all("main")[0].by_class("take") for e in e.by_class("absent")]
    assert len(absent) == 2
    assert "not a video" in absent[1]
    assert data_of(made.page)["prompts"][1]["shown"] == [False, True]
    assert "2 with every clip" in page.by_class("facts")[0].words()


def test_a_sound_of_no_length_or_no_onset_is_drawn_without_marks(tmp_path: Path) -> None:
    clip = beeping_clip()
    silent = Clip(clip.video, clip.frame_rate, np.zeros((0, 0), np.float32), 0, clip.prompt)
    still = Clip(clip.video, clip.frame_rate, np.zeros((1, 16000), np.float32), 16000, clip.prompt)
    write_clip(tmp_path / "a" / "x.mp4", silent)
    write_clip(tmp_path / "b" / "x.mp4", still)
    page = parse(write_comparison([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "page").page)
    assert [w.attributes["aria-label"] for w in page.by_class("wave")] == ["No sound", "Sound of 1.00 s"]
    assert not page.by_class("mark")


def test_controls_landmarks_and_headings_have_names(page: Element) -> None:
    buttons = page.all("button")
    assert buttons
    assert all(b.words() or b.attributes["aria-label"] for b in buttons)
    labels = page.all("label")
    for tag in ("select", "input"):
        inside = [e for label in labels if label.words() for e in label.all(tag)]
        bare = [e for e in page.all(tag) if not any(e is i for i in inside)]
        assert all(e.attributes.get("aria-label") for e in bare), [e.attributes for e in bare]
    assert all(s.attributes.get("aria-label") or s.attributes.get("aria-hidden") for s in page.all("svg"))
    assert all(a.attributes["aria-label"] for a in page.all("article"))
    assert all(s.attributes.get("aria-label") or s.attributes.get("aria-labelledby") for s in page.all("section"))
    assert all(v.attributes["aria-label"] for v in page.all("video"))
    assert len(page.all("main")) == 1
    assert len(page.all("h1")) == 2  # of the list and of the blind test, of which one is shown
    assert all("scope" in th.attributes for th in page.all("th"))
    ids = [e for e in _everything(page) if "id" in e.attributes]
    assert len({e.attributes["id"] for e in ids}) == len(ids)


def _everything(element: Element) -> list[Element]:
    return [element, *(e for child in element.children for e in _everything(child))]


def _luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_colours_have_contrast_in_light_and_dark(made: Comparison) -> None:
    text = made.page.read_text(encoding="utf-8")
    schemes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", text, re.S)
    ]
    schemes = [s for s in schemes if s]
    assert len(schemes) == 2  # light, then dark

    def contrast(a: str, b: str) -> float:
        light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for scheme in schemes:
        for ink in ("ink", "muted", "accent"):
            for ground in ("paper", "wash"):
                assert contrast(scheme[ink], scheme[ground]) >= 4.5, (ink, ground)
        # Borders of fields and the waveform are no text: 3 is asked for.
        assert contrast(scheme["faint"], scheme["paper"]) >= 3
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_the_command_says_what_matched(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "page"
    result = CliRunner().invoke(app, ["compare", *map(str, folders), "-o", str(out), "--seed", "7"])
    assert result.exit_code == 0, result.output
    assert "4 of 4 have a clip of every system" in result.output
    assert data_of(out / "index.html")["seed"] == 7


def test_an_evaluation_takes_no_clips_from_elsewhere(folders: tuple[Path, Path], tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (tmp_path / "secret.mp4").write_bytes(next(folders[0].rglob("*.mp4")).read_bytes())
    clip = ClipScores(0, "../secret.mp4", "a", "a", (), {})
    EvaluationResult("s", Protocol("world", "1"), (), {}, {}, (clip,)).save(stranger)
    with pytest.raises(OmniNFTError, match=r"result\.json: clip 0: file: found '\.\./secret\.mp4', which lies outside"):
        write_comparison([str(folders[0]), str(stranger)], tmp_path / "page")
    assert not (tmp_path / "page").exists()
