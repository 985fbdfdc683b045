from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from omninft.evaluation.catalogue import Choice, build_benchmark, metric_names
from omninft.types import OmniNFTError


@pytest.fixture(autouse=True)
def _no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setattr("omninft.scorers.weights.try_to_load_from_cache", lambda *a, **k: None)


def test_the_world_has_its_ten_columns_and_av_align() -> None:
    made = build_benchmark(Choice())
    ten = ["vq", "aq", "tv_ib", "ta_ib", "clip", "clap", "av_ib", "avh_score", "javis_score", "desync"]
    assert [m.name for m in made.all_metrics] == [*ten, "av_align"]
    assert made.notes == ()
    assert "librosa" in made.weights["av_align"]
    assert [m.name for m in build_benchmark(Choice(metrics=("motion", "vq"))).metrics] == ["vq", "motion"]


def test_what_lacks_weights_is_left_out_with_the_command_that_fetches_it() -> None:
    made = build_benchmark(Choice("javisbench"))
    assert [m.name for m in made.all_metrics] == ["av_align"]
    text = "\n".join(made.notes)
    for labels, command in (
        ("VQ, MQ", "hf download KlingTeam/VideoReward"),
        ("AQ", "hf download facebook/audiobox-aesthetics"),
        ("TV-IB, TA-IB, AV-IB, AVHScore, JavisScore", "imagebind_huge.pth"),
        ("CLIP", "hf download openai/clip-vit-base-patch32"),
        ("CLAP", "hf download laion/clap-htsat-unfused"),
        ("DeSync", "synchformer_state_dict.pth"),
        ("FVD, KVD", "--real"),
        ("FAD", "--real"),
    ):
        assert any(note.startswith(f"{labels}: left out:") and command in note for note in made.notes), (labels, text)
    with pytest.raises(OmniNFTError, match="hf download laion/clap-htsat-unfused"):
        build_benchmark(Choice("javisbench", metrics=("clap", "av_align"), strict=True))
    assert build_benchmark(Choice("javisbench", metrics=("av_align",), strict=True)).notes == ()


def test_features_in_files_do_without_networks(tmp_path: Path) -> None:
    save_file({"video": torch.randn(5, 3), "audio": torch.randn(5, 2)}, tmp_path / "real.safetensors")
    save_file({"video": torch.randn(4, 3)}, tmp_path / "own.safetensors")
    choice = Choice("javisbench", real=tmp_path / "real.safetensors", features=tmp_path / "own.safetensors")
    made = build_benchmark(choice)
    assert [m.name for one in made.sets for m in one.metrics] == ["fvd", "kvd"]
    assert any(note.startswith("FAD: left out") and "--audioclip" in note for note in made.notes)
    only = build_benchmark(Choice("javisbench", metrics=("kvd",), real=choice.real, features=choice.features))
    assert [m.name for m in only.all_metrics] == ["kvd"]
    assert made.settings["sets"].keys() == {"real"}


def test_quirks_are_part_of_the_protocol_and_off_by_default() -> None:
    plain = build_benchmark(Choice("javisbench"))
    assert plain.settings["compat"] == []
    every = build_benchmark(Choice("javisbench", compat=("javisbench",)))
    assert every.settings["compat"] == ["aq_no_resample", "bgr_clip", "unscaled_fvd"]
    one = build_benchmark(Choice("javisbench", compat=("bgr_clip",)))
    assert len({b.protocol([]).digest for b in (plain, every, one)}) == 3


def test_speed_and_place_do_not_change_the_protocol_but_options_do() -> None:
    plain, fast, other = (
        build_benchmark(Choice("javisbench", options=o)).protocol([]).digest
        for o in ((), ("av_align.workers=2",), ("av_align.shrink=2",))
    )
    assert plain == fast != other


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice("vbenhc"), "unknown benchmark 'vbenhc', expected one of: world, javisbench"),
        (Choice(metrics=("desinc",)), "unknown metric 'desinc', did you mean 'desync'"),
        (Choice(metrics=("fvd",)), "unknown metric 'fvd'"),
        (Choice(compat=("javisbench",)), "compat is of the benchmark javisbench"),
        (Choice("javisbench", compat=("rgb",)), "unknown compat 'rgb'"),
        (Choice("javisbench", options=("av_align.speed=2",)), "av_align does not take the options"),
        (Choice("javisbench", options=("hpsv3.path=x",)), "'hpsv3' is not among"),
        (Choice("javisbench", real=Path("absent.pt")), "no such file of features"),
    ],
)
def test_what_is_unknown_is_refused(choice: Choice, message: str) -> None:
    with pytest.raises(OmniNFTError, match=message):
        build_benchmark(choice)


def test_all_metrics() -> None:
    names = metric_names("javisbench")
    assert names[:11] == (
        *("vq", "aq", "tv_ib", "ta_ib", "clip", "clap", "av_ib", "avh_score", "javis_score", "desync"),
        "mq",
    )
    assert set(names[11:]) == {"av_align", "dnsmos", "flicker", "motion", "fvd", "kvd", "fad"}
    made = build_benchmark(Choice(metrics=("all",)))
    assert {m.name for m in made.metrics} >= {"vq", "av_align", "flicker", "motion"}
