from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from omninft.scorers.weights import JudgingModel, load_strict, read_state, renamed
from omninft.types import OmniNFTError

HUB = JudgingModel(
    "Judge", 3, "MIT", True, ("a/model.safetensors", "config.json"), repo="them/judge", revision="abc123"
)
WEB = JudgingModel("Web", 3, "MIT", True, ("web model.pth",), url="https://example.org/v1/")


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def test_missing_files_come_with_the_command_that_fetches_them(caches: Path) -> None:
    assert HUB.missing() == (
        "Judge: missing a/model.safetensors, config.json; "
        "fetch by: hf download them/judge a/model.safetensors config.json --revision abc123"
    )
    fetched = f"curl -L --create-dirs -o '{caches}/web model.pth' 'https://example.org/v1/web model.pth'"
    assert WEB.missing() == f"Web: missing web model.pth; fetch by: {fetched}"
    with pytest.raises(OmniNFTError, match="hf download them/judge"):
        HUB.locate()


def test_files_are_found_under_a_path_by_full_or_bare_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert HUB.find("a/model.safetensors", tmp_path) == tmp_path / "model.safetensors"
    missing = HUB.missing(tmp_path)
    assert missing is not None
    assert missing.endswith(f"hf download them/judge config.json --revision abc123 --local-dir {tmp_path}")
    (tmp_path / "config.json").touch()
    assert HUB.missing(tmp_path) is None
    assert WEB.find("web model.pth", tmp_path / "model.safetensors") == tmp_path / "model.safetensors"


def test_files_of_the_web_are_found_in_the_weights_folder(caches: Path) -> None:
    caches.mkdir()
    (caches / "web model.pth").touch()
    assert WEB.locate() == {"web model.pth": caches / "web model.pth"}


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": {"state_dict": s}}]
)
def test_pickled_states_are_unwrapped_checked_and_kept_as_safetensors(tmp_path, caches, wrap) -> None:
    state = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    path = tmp_path / "m.pth"
    torch.save(wrap(state), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for _ in range(2):  # from the pickle, then from the copy
        read = read_state(path, digest)
        assert set(read) == {"w", "b"}
        assert torch.equal(read["w"], state["w"])
        assert read["b"].dtype == torch.bfloat16
    assert (caches / "converted" / f"{digest}.safetensors").is_file()


def test_tied_tensors_survive(tmp_path: Path) -> None:
    w = torch.arange(4.0)
    torch.save({"a": w, "b": w[1:]}, tmp_path / "m.pt")
    assert read_state(tmp_path / "m.pt")["b"].tolist() == [1, 2, 3]


class _Dangerous:
    def __reduce__(self):
        return (print, ("ran code",))


def test_what_needs_full_unpickling_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.ones(1), "x": _Dangerous()}, tmp_path / "evil.pth")
    with pytest.raises(OmniNFTError, match=r"evil\.pth: needs full unpickling, which could run code, and is refused"):
        read_state(tmp_path / "evil.pth")
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, pickle.dumps([1, 2])])
@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OmniNFTError, match=rf"{name}: "):
        read_state(tmp_path / name)


def test_another_checksum_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(OmniNFTError, match=r"sha256 is [0-9a-f]{64}, expected 00: damaged, or another release"):
        read_state(tmp_path / "m.safetensors", "00")


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "name": "x"}, tmp_path / "m.pt")
    with pytest.raises(OmniNFTError, match="holds no state dict; found the keys epoch, name"):
        read_state(tmp_path / "m.pt")


def test_strict_loading_names_what_does_not_fit() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = {k: v + 1 for k, v in model.state_dict().items()}
    load_strict(model, state, "here")
    assert torch.equal(model.state_dict()["0.weight"], state["0.weight"])
    del state["0.bias"]
    state |= {"2.bias": torch.ones(1), "1.weight": torch.ones(1, 4)}
    with pytest.raises(OmniNFTError) as caught:
        load_strict(model, state, "here")
    assert str(caught.value) == (
        "here does not fit the model: 1 missing: 0.bias; 1 unexpected: 2.bias; "
        "1 of another shape: 1.weight ([1, 4], expected [1, 3])"
    )


def test_renamed_drops_and_renames() -> None:
    state = {"model.a": torch.zeros(1), "junk.b": torch.ones(1)}
    assert list(renamed(state, lambda n: n.removeprefix("model.") if n.startswith("model.") else None)) == ["a"]
