"""What `omninft check` says of loggers and of the user's own prompts, and that it leaves nothing behind."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from omninft.runs.check import check_run
from omninft.train import train
from omninft.types import OmniNFTError
from tests.test_train import model, small_config  # noqa: F401


def test_a_check_opens_no_tracker(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    before = set(threading.enumerate())
    config = small_config(model, tmp_path / "runs", run__loggers=["tensorboard"])
    findings = {f.subject: f for f in check_run(config)}
    assert all(f.ok for f in findings.values())
    assert findings["loggers"].text == "tensorboard"
    assert list(findings)[-1] == "cost"
    assert set(threading.enumerate()) <= before
    assert list(tmp_path.iterdir()) == []


def test_a_missing_logger_is_told_before_the_model_is_loaded(
    model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("omninft.models.ltx2.LTX2Policy.load", lambda *args: pytest.fail("the model was loaded"))
    config = small_config(model, tmp_path / "runs", run__loggers=["wandb"])
    findings = {f.subject: f for f in check_run(config)}
    assert not findings["loggers"].ok
    assert findings["loggers"].text == ("run.loggers names wandb, which is not installed: pip install 'omninft[wandb]'")
    assert "model" not in findings
    with pytest.raises(OmniNFTError, match=r"run\.loggers names wandb"):
        train(config)


def test_the_users_own_prompts_are_looked_at(model: Path, tmp_path: Path) -> None:  # noqa: F811
    mine = tmp_path / "mine.txt"
    config = small_config(model, tmp_path / "runs", samples={"prompts": str(mine)})
    found = {f.subject: f for f in check_run(config, trial=False)}["prompts"]
    assert not found.ok
    assert "mine.txt" in found.text
    mine.write_text("a red ball\na drum\n")
    found = {f.subject: f for f in check_run(config, trial=False)}["prompts"]
    assert found.text.endswith("; disjoint; 2 of your own (samples)")
