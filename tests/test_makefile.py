"""`make setup` on machines with and without an NVIDIA driver, and out of the CPU builds' reach."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None or sys.platform != "linux", reason="needs make on Linux")


def pip_calls(tmp_path: Path, *variables: str, driver: bool = False, reachable: bool = True) -> list[str]:
    """What setup asks pip for, with a Python that notes it and does nothing."""
    tools, log, venv = tmp_path / "tools", tmp_path / "log", tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    tools.mkdir()
    failure = "" if reachable else 'case "$*" in *whl/cpu*) exit 1;; esac'
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{failure}\n')
    for name in ("uname", "grep", "test", "touch", "sh", "echo"):
        (tools / name).symlink_to(shutil.which(name) or name)
    if driver:
        (tools / "nvidia-smi").write_text("#!/bin/sh\n")
    for made in (python, *tools.glob("nvidia-smi")):
        made.chmod(0o755)
    subprocess.run(
        [shutil.which("make") or "make", "setup", f"VENV={venv}", f"PYTHON={sys.executable}", *variables],
        cwd=ROOT,
        env={"PATH": str(tools)},
        check=True,
        capture_output=True,
    )
    return [line.split("--disable-pip-version-check ")[1] for line in log.read_text().splitlines()]


def torch_line() -> str:
    return next(line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("torch=="))


def test_without_a_driver_the_cpu_build_of_the_locked_torch_comes_first(tmp_path: Path) -> None:
    calls = pip_calls(tmp_path)
    assert len(calls) == 3
    assert "--index-url https://download.pytorch.org/whl/cpu" in calls[0]
    assert calls[0].endswith(torch_line())
    assert calls[1] == "-r requirements.lock"
    assert calls[2].endswith("-e .")


def test_out_of_reach_setup_goes_on_with_what_the_index_offers(tmp_path: Path) -> None:
    assert pip_calls(tmp_path, reachable=False)[1:] == pip_calls(tmp_path / "reachable")[1:]


def test_with_a_driver_or_on_demand_torch_is_the_indexs(tmp_path: Path) -> None:
    assert [call.split()[0] for call in pip_calls(tmp_path / "a", driver=True)] == ["-r", "--no-deps"]
    assert len(pip_calls(tmp_path / "b", "TORCH=pypi")) == 2
    assert "whl/cpu" in pip_calls(tmp_path / "c", "TORCH=cpu", driver=True)[0]
