"""`omninft export` of a run and of a LoRA file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from omninft.cli import app
from omninft.config import LoraConfig
from omninft.export.lora import write_common
from omninft.models.lora_file import read_lora
from omninft.types import OmniNFTError

NAME = "transformer_blocks.0.attn1.to_q"  # 96 x 96 in the bundled model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run folder holds that is exported."""
    folder = tmp_path / "run"
    torch.manual_seed(0)
    state = {f"{NAME}.lora_A": torch.randn(2, 96), f"{NAME}.lora_B": torch.randn(96, 2)}
    write_common(state, LoraConfig(rank=2, alpha=4, targets=(NAME,)), folder / "export")
    (folder / "config.yaml").write_text("base: omninft\nmodel: {lora: {rank: 2, alpha: 4}}\n")
    return folder


def call(*arguments: object, answer: str = "") -> tuple[int, str]:
    made = CliRunner().invoke(app, ["export", *(str(a) for a in arguments)], input=answer)
    if isinstance(made.exception, OmniNFTError):
        return 1, str(made.exception)
    return made.exit_code, made.output


@pytest.mark.parametrize("form", ["common", "peft"])
def test_a_run_becomes_a_folder_with_a_card(form: str, run: Path, tmp_path: Path) -> None:
    code, text = call(run, "--format", form, "-o", tmp_path / "out")
    assert (code, text) == (0, f"{form} in {tmp_path / 'out'}\n")
    one, other = read_lora(run), read_lora(tmp_path / "out")
    assert all(torch.equal(one[0][key], tensor) for key, tensor in other[0].items())
    assert (other[1].rank, other[1].alpha) == (2, 4)
    assert "rank 2, alpha 4" in (tmp_path / "out" / "README.md").read_text()


def test_merged_weights_of_a_lora_file(run: Path, tmp_path: Path) -> None:
    code, text = call(run / "export", "--format", "merged", "-o", tmp_path / "out", "--dtype", "float32")
    assert code == 0, text
    assert (tmp_path / "out" / "transformer" / "config.json").is_file()


def test_what_is_in_the_way_or_unknown_is_refused(run: Path, tmp_path: Path) -> None:
    assert call(run, "-o", run)[1].endswith("is there and not an empty folder; choose another --output")
    assert "expected one of common, peft, merged" in call(run, "--format", "gguf", "-o", tmp_path / "out")[1]
    assert "expected auto, float32 or bfloat16" in call(run, "--dtype", "int8", "-o", tmp_path / "out")[1]
    assert not (tmp_path / "out").exists()


def test_nothing_is_uploaded_without_a_yes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[tuple[Path, str]] = []
    monkeypatch.setattr("omninft.export.card.push", lambda folder, name: pushed.append((folder, name)) or "there")
    code, text = call(run, "-o", tmp_path / "a", "--push", "me/it", answer="\n")
    assert (code, pushed) == (0, [])
    assert "nothing was uploaded" in text
    code, text = call(run, "-o", tmp_path / "b", "--push", "me/it", answer="y\n")
    assert (code, pushed) == (0, [(tmp_path / "b", "me/it")])
    assert "uploaded to there" in text
