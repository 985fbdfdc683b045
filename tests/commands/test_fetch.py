"""`omninft fetch` against a hub of a few files: listing, resuming, checksums, and every way in which it may fail."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from omninft.cli import app
from omninft.config import load_config
from omninft.hub import Need, RemoteFile, describe_missing, fetch, is_loaded, size_text
from omninft.models.files import local_pipeline, model_needs
from omninft.models.loading import load_pipeline
from omninft.runs.build import require_model
from omninft.runs.check import check_run
from omninft.scorers.synchformer import SYNCHFORMER
from omninft.scorers.weights import JudgingModel
from omninft.types import OmniNFTError
from tests.fake_hub import COMMIT, FakeHub, small_pipeline

MODEL = "some/ltx"
SYNC = "https://example.org/weights/"
CONFIG = "model.path=some/ltx"
ALL = 17  # files of the pipeline that are loaded


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "weights"))
    return FakeHub(monkeypatch, tmp_path / "hub", {MODEL: small_pipeline()})


def run(*arguments: str, answer: str | None = None) -> str:
    result = CliRunner().invoke(app, ["fetch", *arguments], input=answer)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_a_listing_names_every_component_and_fetches_nothing(hub: FakeHub) -> None:
    shown = run(CONFIG, "--list")
    for name in ("transformer", "text encoder", "connectors", "vocoder", "tokenizer", "scheduler", "model index"):
        assert name in shown
    assert "to fetch" in shown
    assert str(hub.cache) in shown
    assert hub.sent == []


def test_without_network_the_published_sizes_are_listed(hub: FakeHub) -> None:
    hub.offline = True
    shown = run("ltx2", "--list")
    assert "cannot be reached" in shown
    for text in ("about 37.8 GB", "about 24.4 GB", "about 16.6 GB", "CC-BY-4.0", "Synchformer", "90.7 GB to fetch"):
        assert text in shown, text
    with pytest.raises(
        OmniNFTError, match=r"Lightricks/LTX-2: the hub cannot be reached \(Name or service not known\)"
    ):
        run("ltx2", "--yes")


def test_a_fetched_model_is_loaded_from_the_cache_and_never_asked_for_again(hub: FakeHub) -> None:
    config = load_config("omninft", [CONFIG])
    with pytest.raises(OmniNFTError, match=r"some/ltx is not on this machine: .*`omninft fetch model\.path=some/ltx`"):
        require_model(config)
    shown = run(CONFIG, "--yes")
    assert len(hub.sent) == ALL
    assert not any("README" in name or "19b" in name or "fp16" in name for name in hub.sent)
    assert "all of it is here; next: omninft check model.path=some/ltx" in shown
    snapshot = hub.cache / "models--some--ltx" / "snapshots" / COMMIT
    assert local_pipeline(MODEL, config.model) == str(snapshot)
    require_model(config)
    hub.offline = True
    hub.sent.clear()
    assert "all of it is here" in run(CONFIG)
    assert hub.sent == []


def test_what_was_broken_off_goes_on_and_is_not_taken_for_whole(hub: FakeHub) -> None:
    hub.budget = len(hub.files[MODEL]["model_index.json"]) + 150
    with pytest.raises(OmniNFTError, match="cannot be reached"):
        run(CONFIG, "--yes")
    first = list(hub.sent)
    assert 0 < len(first) < ALL
    config = load_config("omninft", [CONFIG])
    missing = [need.name for need in model_needs(config.model) if need.missing]
    assert 0 < len(missing) < len(model_needs(config.model))
    with pytest.raises(OmniNFTError, match="not on this machine"):
        require_model(config)
    hub.budget = 10**9
    hub.sent.clear()
    run(CONFIG, "--yes")
    assert set(first).isdisjoint(hub.sent)
    assert len(first) + len(hub.sent) == ALL
    require_model(config)
    # A shard that the index names and that is not there: the text encoder is not whole.
    shard = hub.cache / "models--some--ltx" / "snapshots" / COMMIT / "text_encoder" / "model-00002-of-00002.safetensors"
    shard.unlink()
    with pytest.raises(OmniNFTError, match=r"not on this machine: text encoder \(about 35 MB\); `omninft fetch"):
        require_model(config)


def test_a_file_of_another_checksum_is_deleted(hub: FakeHub) -> None:
    name = "vocoder/diffusion_pytorch_model.safetensors"
    hub.wrong = {name}
    with pytest.raises(
        OmniNFTError, match=rf"some/ltx/{name}: sha256 is [0-9a-f]{{64}}, expected [0-9a-f]{{64}}: damaged"
    ):
        run(CONFIG, "--yes")
    assert not (hub.cache / "models--some--ltx" / "snapshots" / COMMIT / name).exists()
    hub.wrong = set()
    assert "all of it is here" in run(CONFIG, "--yes")


def test_a_gated_model_says_what_to_do(hub: FakeHub) -> None:
    hub.gated = {MODEL}
    assert "accept its terms at https://huggingface.co/some/ltx, then run `hf auth login`" in run(CONFIG, "--list")
    with pytest.raises(
        OmniNFTError, match=r"some/ltx is gated: accept its terms .* run `hf auth login`, and fetch again"
    ):
        run(CONFIG, "--yes")


def test_no_room_no_yes_no_such_model(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OmniNFTError, match="nothing was fetched"):
        run(CONFIG, answer="n\n")
    with pytest.raises(OmniNFTError, match=r"the hub has no model some/lxt, or shows it to its members alone"):
        run("model.path=some/lxt", "--yes")
    with pytest.raises(OmniNFTError, match=r"some/ltx holds no transformer_full/\* \(revision main\)"):
        run(CONFIG, "model.transformer=transformer_full", "--yes")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**29))
    with pytest.raises(OmniNFTError, match=r"1 MB to fetch and 1\.1 GB to spare, 0\.5 GB free; HF_HOME"):
        run(CONFIG, "--yes")
    assert hub.sent == []
    assert "all of it is here" not in run(CONFIG, "--list")


def test_a_file_of_a_web_address_goes_on_where_it_stopped(hub: FakeHub, tmp_path: Path) -> None:
    content = b"state of a judge"
    hub.files[SYNC] = {"judge.pth": content}
    card = JudgingModel(
        "Judge", 1, "MIT", True, ("judge.pth",), url=SYNC, sha256={"judge.pth": hashlib.sha256(content).hexdigest()}
    )
    need = card.need()
    assert (need.missing, need.place) == (("judge.pth",), tmp_path / "weights")
    file = RemoteFile(need, "judge.pth", len(content), need.sha256["judge.pth"])
    hub.budget = 7
    with pytest.raises(
        OmniNFTError, match=r"weights/judge\.pth: the hub cannot be reached \(the connection was lost\)"
    ):
        fetch(file)
    assert card.need().missing
    hub.budget = 100
    assert fetch(file).read_bytes() == content
    assert hub.sent == [f"{SYNC}judge.pth from 7"]
    assert card.need().missing == ()
    # Without a checksum nobody could tell whether both halves are of one file: it begins anew.
    (tmp_path / "weights" / "judge.pth").rename(tmp_path / "weights" / "judge.pth.part")
    fetch(replace(file, sha256=None))
    assert hub.sent[-1] == f"{SYNC}judge.pth from 0"


def test_check_and_loading_name_the_command_and_download_nothing(hub: FakeHub) -> None:
    found = {f.subject: f for f in check_run(load_config("ltx2.3+24gb"), trial=False)}
    assert not found["rewards"].ok
    assert "`omninft fetch ltx2.3+24gb` gets what can be downloaded" in found["rewards"].text
    assert not found["model files"].ok
    assert "transformer (about 38.0 GB), text encoder (about 24.4 GB)" in found["model files"].text
    assert found["model files"].text.endswith("`omninft fetch ltx2.3+24gb` fetches them")
    for path, why in (
        (
            "Lightricks/LTX-2",
            r"as a hub model it is not on this machine: .*`omninft fetch model\.path=Lightricks/LTX-2`",
        ),
        ("no/such/folder", "no LTX-2 pipeline could be loaded from 'no/such/folder'"),
        ("a b/c", r"model\.path is 'a b/c': Repo id must"),
    ):
        with pytest.raises(OmniNFTError, match=why):
            load_pipeline(load_config("omninft", [f"model.path={path}"]).model)
    assert hub.sent == []


def test_the_five_rewards_of_the_paper_list_their_files() -> None:
    from omninft.rewards.registry import build_reward

    needs = [need for reward in load_config("paper").rewards for need in build_reward(reward).needs]
    assert [need.name for need in needs] == [
        "VideoAlign", "Qwen2-VL-2B-Instruct", "VideoAlign prompt template", "HPSv3", "Qwen2-VL-7B-Instruct",
        "HPSv3 prompt template", "AudioBox Aesthetics", "CLAP (laion/clap-htsat-unfused)", "Synchformer",
    ]  # fmt: skip
    sizes = [need.about / 1e9 for need in needs if need.about > 1e8]
    assert sizes == pytest.approx([4.42, 16.58, 0.377, 0.613, 0.950], abs=0.01)
    assert SYNCHFORMER.need().sha256 == SYNCHFORMER.sha256


def test_sizes_and_what_is_loaded_of_a_folder() -> None:
    assert [size_text(n) for n in (37_750_000_000, 99_000_000, 1)] == ["37.8 GB", "99 MB", "1 MB"]
    assert describe_missing([Need("a", "MIT", ("f",), (), 1)], "x") is None
    assert is_loaded("tokenizer/chat_template.jinja")
    assert is_loaded("vae/diffusion_pytorch_model.safetensors")
    assert not is_loaded("vae/diffusion_pytorch_model.fp16.safetensors")
    assert not is_loaded("text_encoder/pytorch_model.bin")
