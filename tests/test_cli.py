"""The commands as a user types them, on the bundled model."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from omninft import cli


def omninft(*arguments: str, cwd: Path, expect: int = 0) -> str:
    """Run the command line; its output, stdout and stderr in one."""
    process = subprocess.run(
        [sys.executable, "-m", "omninft", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=os.environ | {"COLUMNS": "160"},
        check=False,
    )
    assert process.returncode == expect, process.stdout
    return process.stdout


def test_help_lists_the_commands(tmp_path: Path) -> None:
    text = omninft("--help", cwd=tmp_path)
    for command in ("train", "sample", "score", "pretrain", "check", "report", "rewards", "serve"):
        assert command in text


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    text = omninft("sample", "--limit", "3", "--steps", "4", cwd=folder)
    assert "3 clips in samples" in text
    return folder / "samples"


def test_sample_writes_clips_with_sound(clips: Path) -> None:
    import av

    files = sorted(clips.glob("*.mp4"))
    assert len(files) == 3
    with av.open(str(files[0])) as container:
        assert [s.type for s in container.streams] == ["video", "audio"]


def test_score_reads_them_back_and_reports_a_broken_file(clips: Path, tmp_path: Path) -> None:
    broken = clips / "zz-0.mp4"
    broken.write_bytes(b"no video")
    text = omninft("score", str(clips), "-o", str(tmp_path / "scores.csv"), cwd=tmp_path)
    broken.unlink()
    assert "missing zz-0.mp4" in text
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert len(rows) == 4
    assert [r["sync"] == "" for r in rows] == [False, False, False, True]
    assert all(0 <= float(r["video_quality"]) <= 1 for r in rows[:3])


def test_a_prompt_of_ones_own(tmp_path: Path) -> None:
    omninft("sample", "a red lamp flashes twice two low buzzes are heard", "--steps", "2", "-o", "out", cwd=tmp_path)
    listing = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert listing["clips"][0]["prompt_v"].startswith("a red lamp")


def test_check_says_what_is_wrong_in_one_go(tmp_path: Path) -> None:
    text = omninft("check", "omninft", "prompts.train=none.jsonl", "rewards=[{name: wrld}]", cwd=tmp_path, expect=1)
    assert "error prompts" in text
    assert "none.jsonl" in text
    assert "did you mean 'world'" in text
    assert "Traceback" not in text


def test_check_passes_and_tells_the_cost(tmp_path: Path) -> None:
    text = omninft("check", "omninft", "prompts.per_iteration=1", "sampling.num_steps=2", cwd=tmp_path)
    assert "ok   model: tiny: 8 blocks" in text
    assert "s an iteration" in text
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_line(tmp_path: Path) -> None:
    text = omninft("train", "omninft", "run.iteration=3", cwd=tmp_path, expect=1)
    assert "error: recipe omninft: unknown key 'run.iteration', did you mean 'iterations'" in text
    assert "Traceback" not in text


def test_train_with_ones_own_reward_and_report(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def brightness(clips):\n    return [c.video.mean() / 255 for c in clips]\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "base: omninft\n"
        "rewards:\n  - {name: world}\n  - {name: 'my_rewards:brightness', route: video, weight: 0.5}\n"
        "prompts: {per_iteration: 2, group_size: 2}\n"
        "sampling: {num_steps: 2}\n"
        "objective: {sigmas: {count: 1}}\n"
        "run: {iterations: 1, checkpoint_every: 1}\n"
        "evaluation: {every: 1, dev_clips: 2, test_clips: 4, shown_clips: 1, sampling: {num_steps: 2}}\n"
    )
    text = omninft("train", "mine.yaml", cwd=tmp_path)
    run = tmp_path / "runs" / "mine"
    for part in ("report.html", "config.yaml", "metrics.jsonl", "evaluation.json", "tensorboard"):
        assert (run / part).exists(), text
    assert "brightness" in text
    (run / "report.html").unlink()
    omninft("report", cwd=tmp_path)
    assert (run / "report.html").is_file()
    # A second run gets a folder of its own.
    omninft("train", "mine.yaml", "evaluation.every=0", "evaluation.test_clips=0", cwd=tmp_path)
    assert (tmp_path / "runs" / "mine-2" / "report.html").is_file()


def test_rewards_says_what_is_there_and_what_fetches_the_rest(tmp_path: Path) -> None:
    text = omninft("rewards", cwd=tmp_path)
    for fact in ("desync (joint, 0.333 .. 1)", "videoalign", "CC-BY-NC-SA 4.0", "preset commercial: audiobox, dnsmos"):
        assert fact in text
    command = "hf download laion/clap-htsat-unfused config.json pytorch_model.bin tokenizer.json --revision 8fa0f1c6"
    assert command in text


def test_verify_checks_a_reward_that_runs_and_names_what_another_lacks(tmp_path: Path) -> None:
    text = omninft("rewards", "verify", "flicker", cwd=tmp_path)
    assert [line.split()[:2] for line in text.splitlines()] == [
        ["ok", f"{subject}:"] for subject in ("files", "scores", "batch", "order", "official")
    ]
    text = omninft("rewards", "verify", "desync", cwd=tmp_path, expect=1)
    assert "synchformer_state_dict.pth" in text
    assert "curl -L" in text


def test_a_preset_scores_what_it_can_and_says_what_it_cannot(clips: Path, tmp_path: Path) -> None:
    text = omninft("score", str(clips), "--preset", "offline", "-o", "scores.parquet", cwd=tmp_path)
    assert "table in scores.parquet" in text
    assert (tmp_path / "scores.parquet").is_file()
    listing = omninft("score", str(clips), "--preset", "offlin", cwd=tmp_path, expect=1)
    assert "unknown preset 'offlin'" in listing


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "out of memory: lower sampling.batch_size, optimiser.micro_batch"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nto"),
            "out of memory (CUDA out of memory. Tried to): lower",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory ([enforce fail]"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "runs/a: No space left on device"),
        (OSError("a library's\nown words"), "a library's own words"),
        (UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "why"), "found b'\\xe9' in a file, expected UTF-8 text (why)"),
    ],
)
def test_what_a_person_can_change_is_told_on_one_line(
    error: Exception, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.main(run)
    text = capsys.readouterr().err
    assert ended.value.code == 1
    assert text.startswith(f"error: {told}")
    assert text.count("\n") == 1


def test_faults_of_the_program_keep_their_traceback() -> None:
    def run() -> None:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(run)
