"""The whole loop on small random models: exact resume, processes, model versions, signals, and failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from omninft.config import Config, build_config, load_config
from omninft.models.loading import CLIP_FILE
from omninft.runs.build import build_rewards
from omninft.runs.check import check_run
from omninft.runs.metrics import read_metrics
from omninft.train import train
from omninft.types import Clip, OmniNFTError
from tests.random_models import random_pipeline


def brightness(clips: list[Clip]) -> list[float]:
    """Mean pixel, 0..1: cheap and different for every clip."""
    return [float(c.video.mean()) / 255 for c in clips]


def loudness(clips: list[Clip]) -> list[float | None]:
    """Root mean square of the sound."""
    return [float(np.sqrt(np.mean(c.waveform**2))) for c in clips]


def save_model(folder: Path, version: str = "ltx-2") -> Path:
    # Three blocks, so that the surgery schedule has a shallow, a middle and a deep one.
    random_pipeline(version, num_layers=3).save_pretrained(folder)
    size = {"num_frames": 9, "height": 32, "width": 32, "frame_rate": 12.0}
    (folder / CLIP_FILE).write_text(json.dumps(size))
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "ltx-2")


def small_config(model: Path, runs: Path, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "recipe": "small",
        "model": {"path": str(model), "lora": {"rank": 2, "alpha": 4}},
        "prompts": {"per_iteration": 2, "group_size": 4},
        "sampling": {"num_steps": 3, "batch_size": 4},
        "rewards": [
            {"name": "tests.test_train:brightness", "route": "video"},
            {"name": "tests.test_train:loudness", "route": "audio"},
        ],
        "objective": {"sigmas": {"choice": "spread", "count": 2}},
        "optimiser": {"learning_rate": 1e-3, "step_per": "sigma", "micro_batch": 4},
        # A warm-up that is a share of the run would differ between a run of 4 and one of 8.
        "credit": {"regions": {"warmup": 3.0}},
        "evaluation": {"every": 0, "test_clips": 0},
        "run": {"iterations": 2, "folder": str(runs), "checkpoint_every": 1, "loggers": [], "threads": 1},
    }
    for key, value in changes.items():
        node = tree
        *path, last = key.split("__")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return build_config(tree)


def adapters(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{iteration:06d}"
    return {
        f"{name}.{key}": tensor
        for name in ("current", "old")
        for key, tensor in load_file(folder / f"{name}.safetensors").items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rewards_of(run: Path) -> list[tuple[int, float, float]]:
    rows = [r for r in read_metrics(run) if r["kind"] == "iteration"]
    return [(r["iteration"], r["reward/brightness"], r["reward/loudness"]) for r in rows]


class TestResume:
    def test_four_and_four_iterations_are_eight_bit_for_bit(self, model: Path, tmp_path: Path) -> None:
        whole = train(small_config(model, tmp_path / "whole", run__iterations=8))
        first = train(small_config(model, tmp_path / "parts", run__iterations=4))
        second = train(small_config(model, tmp_path / "parts", run__iterations=8), resume=first.folder)
        assert second.folder == first.folder
        assert same(adapters(whole.folder, 8), adapters(second.folder, 8))
        assert rewards_of(whole.folder) == rewards_of(second.folder)
        # The runs did something: the adapters of iterations 4 and 8 differ.
        assert not same(adapters(whole.folder, 8), adapters(first.folder, 6))

    def test_a_checkpoint_of_another_config_is_refused_with_the_field(self, model: Path, tmp_path: Path) -> None:
        done = train(small_config(model, tmp_path))
        other = small_config(model, tmp_path, optimiser__learning_rate=2e-3, run__iterations=3)
        with pytest.raises(OmniNFTError, match=r"optimiser\.learning_rate"):
            train(other, resume=done.folder)

    def test_resumes_from_the_one_before_a_truncated_checkpoint(self, model: Path, tmp_path: Path) -> None:
        done = train(small_config(model, tmp_path, run__iterations=3))
        newest = done.folder / "checkpoints" / "step-000003" / "current.safetensors"
        newest.write_bytes(newest.read_bytes()[:100])
        again = train(small_config(model, tmp_path, run__iterations=4), resume=done.folder)
        whole = train(small_config(model, tmp_path / "whole", run__iterations=4))
        assert same(adapters(again.folder, 4), adapters(whole.folder, 4))


@pytest.mark.parametrize("version", ["ltx-2", "ltx-2.3", "ltx-2.5"])
def test_every_version_goes_through_an_iteration(version: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", version)
    result = train(small_config(folder, tmp_path / "runs", run__iterations=1))
    row = next(r for r in read_metrics(result.folder) if r["kind"] == "iteration")
    assert row["gradient_norm/video"] > 0
    assert row["gradient_norm/audio"] > 0
    assert row["old_deviation_sample/video"] > 0
    assert (result.folder / "export" / "pytorch_lora_weights.safetensors").is_file()
    assert (result.folder / "report.html").is_file()


RUN_TWO = """
import sys
import threading
from pathlib import Path
from tests.test_train import small_config, train
train(small_config(Path(sys.argv[1]), Path(sys.argv[2]), run__iterations=2, credit__regions__warmup=0))
"""


def test_two_processes_equal_one(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(RUN_TWO)
    for world in (1, 2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        subprocess.run(
            [*launcher, str(script), str(model), str(tmp_path / str(world))],
            check=True,
            env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            timeout=300,
        )
    one, two = (tmp_path / str(w) / "small" for w in (1, 2))
    np.testing.assert_allclose(np.array(rewards_of(two)), np.array(rewards_of(one)), rtol=1e-3)
    a, b = adapters(one, 2), adapters(two, 2)
    moved = max(float(t.abs().max()) for k, t in a.items() if "lora_B" in k)
    assert moved > 1e-4
    # The first Adam steps have the size of the learning rate whatever the gradient: compare directions, too.
    flat_a, flat_b = (torch.cat([t.flatten() for k, t in s.items() if "lora_B" in k]) for s in (a, b))
    assert float(torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=0)) > 0.999


LONG = """
import sys
import threading
from pathlib import Path
from omninft.runs.display import ConsoleDisplay
from tests.test_train import small_config, train
config = small_config(Path(sys.argv[1]), Path(sys.argv[2]), run__iterations=500, run__keep_last=2)
resume = Path(sys.argv[2]) / "small"
result = train(config, resume=resume if resume.exists() else None, display=ConsoleDisplay())
print("finished", result.finished, result.iterations)
"""


def start_long(model: Path, runs: Path, log: Path) -> subprocess.Popen[bytes]:
    script = runs.parent / "long.py"
    script.write_text(LONG)
    return subprocess.Popen(
        [sys.executable, str(script), str(model), str(runs)],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
    )


def wait_for_checkpoint(run: Path, process: subprocess.Popen[bytes], newer_than: str = "") -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        names = sorted(p.name for p in (run / "checkpoints").glob("step-*"))
        if names and names[-1] > newer_than:
            return names[-1]
        time.sleep(0.05)
    raise AssertionError("no checkpoint was written in time")


class TestSignals:
    def test_sigterm_saves_and_exits_0_and_kill_leaves_a_run_that_resumes(self, model: Path, tmp_path: Path) -> None:
        runs, log = tmp_path / "runs", tmp_path / "log"
        process = start_long(model, runs, log)
        wait_for_checkpoint(runs / "small", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert b"finished False" in log.read_bytes()
        stopped_at = len(rewards_of(runs / "small"))
        newest = sorted((runs / "small" / "checkpoints").glob("step-*"))[-1]
        assert newest.name == f"step-{stopped_at:06d}"

        process = start_long(model, runs, log)
        killed_after = wait_for_checkpoint(runs / "small", process, newer_than=newest.name)
        process.kill()
        process.wait(10)

        process = start_long(model, runs, log)
        wait_for_checkpoint(runs / "small", process, newer_than=killed_after)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        iterations = [i for i, *_ in rewards_of(runs / "small")]
        assert iterations == list(range(len(iterations)))
        assert len(iterations) > int(killed_after[5:])


def nan_for_one(clips: list[Clip]) -> list[float]:
    """NaN for sample 1 of every group."""
    return [float("nan") if c.sample == 1 else float(c.video.mean()) for c in clips]


def raises_for_one(clips: list[Clip]) -> list[float]:
    """Raises if sample 2 is in the batch."""
    if any(c.sample == 2 for c in clips):
        raise RuntimeError("sample 2 is cursed")
    return [float(c.waveform.std()) for c in clips]


class TestRewardsThatFail:
    def test_the_culprit_is_missing_and_the_run_goes_on(self, model: Path, tmp_path: Path) -> None:
        rewards = [
            {"name": "tests.test_train:nan_for_one", "route": "video"},
            {"name": "tests.test_train:raises_for_one", "route": "audio"},
        ]
        result = train(small_config(model, tmp_path, rewards=rewards))
        rows = [r for r in read_metrics(result.folder) if r["kind"] == "iteration"]
        assert result.finished
        assert [r["missing/nan_for_one"] for r in rows] == [2, 2]
        assert [r["missing/raises_for_one"] for r in rows] == [2, 2]
        told = (result.folder / "rewards.log").read_text()
        assert told.count("reward raises_for_one failed on") == 4
        assert told.count("Traceback") == 1
        assert "reward raises_for_one failed 4 times in all" in told

    def test_too_many_missing_scores_stop_the_run(self, model: Path, tmp_path: Path) -> None:
        rewards = [{"name": "tests.test_train:nan_for_one", "route": "joint"}]
        config = small_config(model, tmp_path, rewards=rewards, run__max_missing_share=0.1)
        with pytest.raises(OmniNFTError, match="nan_for_one"):
            train(config)


FAILING: dict[str, Any] = {"scored": 0, "error": None}


def fails_in_the_second_iteration(clips: list[Clip]) -> list[float]:
    """As `brightness` on the first 8 clips, then raises."""
    FAILING["scored"] += len(clips)
    if FAILING["scored"] > 8:
        raise FAILING["error"]
    return brightness(clips)


class TestErrorsBetweenUpdates:
    @pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(3), KeyboardInterrupt()])
    def test_finished_iterations_are_kept(self, model: Path, tmp_path: Path, error: BaseException) -> None:
        FAILING.update(scored=0, error=error)
        rewards = [{"name": "tests.test_train:fails_in_the_second_iteration", "route": "joint"}]
        config = small_config(model, tmp_path, rewards=rewards, run__checkpoint_every=100)
        with pytest.raises(OmniNFTError if isinstance(error, Exception) else type(error)):
            train(config)
        assert [p.name for p in (tmp_path / "small" / "checkpoints").iterdir()] == ["step-000001"]
        messages = [r["message"] for r in read_metrics(tmp_path / "small") if r["kind"] == "event"]
        assert any("the state after iteration 1 is saved" in m for m in messages)
        FAILING["scored"] = -100
        again = train(config, resume=tmp_path / "small")
        assert again.finished
        whole = train(small_config(model, tmp_path / "whole", rewards=rewards))
        assert same(adapters(again.folder, 2), adapters(whole.folder, 2))

    def test_the_credit_that_is_saved_is_that_of_the_boundary(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from omninft.credit.marble import MarbleCredit

        real = MarbleCredit.combine

        def combine(self: MarbleCredit, advantages: Any, gradients: Any, iteration: int) -> Any:
            made = real(self, advantages, gradients, iteration)
            if iteration == 1:
                self.shares = torch.full((2,), 0.5, dtype=torch.float64)
                raise RuntimeError("after the shares moved")
            return made

        changes: dict[str, Any] = {"credit": {"kind": "marble"}}
        whole = train(small_config(model, tmp_path / "whole", **changes))
        monkeypatch.setattr(MarbleCredit, "combine", combine)
        with pytest.raises(RuntimeError, match="moved"):
            train(small_config(model, tmp_path, run__checkpoint_every=100, **changes))
        kept = [
            load_file(run / "checkpoints" / "step-000001" / "credit.safetensors")
            for run in (whole.folder, tmp_path / "small")
        ]
        assert same(*kept)

    def test_an_update_that_fails_is_not_saved(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from omninft.learning.update import PolicyUpdate

        real = PolicyUpdate.run

        def run(self: PolicyUpdate, batch: Any, iteration: int) -> dict[str, float]:
            metrics = real(self, batch, iteration)
            if iteration == 1:
                raise RuntimeError("after the steps")
            return metrics

        monkeypatch.setattr(PolicyUpdate, "run", run)
        with pytest.raises(RuntimeError, match="after the steps"):
            train(small_config(model, tmp_path, run__checkpoint_every=100))
        assert not list((tmp_path / "small").glob("checkpoints/step-*"))
        assert (
            "inside the update of iteration 1, which is not saved; there is no checkpoint yet"
            in (tmp_path / "small" / "metrics.jsonl").read_text()
        )


PLAIN = {"text": 1.0, "stg": 0.0, "modality": 1.0, "rescale": 0.0}
TWO_BATCHES: dict[str, Any] = {
    "every": 1,
    "dev_clips": 8,
    "test_clips": 8,
    "shown_clips": 0,
    "sampling": {"num_steps": 2, "stg_blocks": [], "video_guidance": PLAIN, "audio_guidance": PLAIN},
}


class TestSignalsInEvaluations:
    @pytest.fixture
    def kill_at(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """Sends `signal` to this process in batch number `batch` of all evaluations."""
        from omninft.rollout.sampler import RolloutSampler

        plan: dict[str, Any] = {"batch": None, "signal": signal.SIGTERM, "seen": 0}
        real = RolloutSampler.sample

        def sample(self: RolloutSampler, groups: Any, seed: int, iteration: Any, adapter: Any) -> Any:
            if iteration < 0:
                plan["seen"] += 1
                if plan["seen"] == plan["batch"]:
                    os.kill(os.getpid(), plan["signal"])
            return real(self, groups, seed, iteration, adapter)

        monkeypatch.setattr(RolloutSampler, "sample", sample)
        return plan

    def test_a_cut_evaluation_is_not_logged_and_repeated(
        self, model: Path, tmp_path: Path, kill_at: dict[str, Any]
    ) -> None:
        kill_at["batch"] = 3  # the first of two after iteration 1
        config = small_config(model, tmp_path, evaluation=TWO_BATCHES, run__checkpoint_every=100)
        stopped = train(config)
        assert (stopped.finished, stopped.iterations, stopped.stopped_by) == (False, 1, signal.SIGTERM)
        assert kill_at["seen"] == 3
        assert evaluated(stopped.folder) == [0]
        done = train(config, resume=stopped.folder)
        assert evaluated(done.folder) == [0, 1, 2]
        assert done.table is not None

    def test_the_last_comparison_is_cut_too(self, model: Path, tmp_path: Path, kill_at: dict[str, Any]) -> None:
        kill_at["batch"] = 1
        evaluation = TWO_BATCHES | {"every": 0}
        config = small_config(model, tmp_path, evaluation=evaluation, run__iterations=1)
        stopped = train(config)
        assert (stopped.finished, stopped.iterations, stopped.table) == (False, 1, None)
        done = train(config, resume=stopped.folder)
        assert done.finished
        assert done.stopped_by is None
        assert done.table is not None

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_the_command_line_says_how_to_go_on_and_exits_with_the_signal(
        self, model: Path, tmp_path: Path, kill_at: dict[str, Any], number: int, code: int
    ) -> None:
        from typer.testing import CliRunner

        from omninft.cli import app

        kill_at.update(batch=1, signal=number)
        config = small_config(model, tmp_path / "runs", evaluation=TWO_BATCHES)
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(json.dumps(json.loads(config.model_dump_json())))
        result = CliRunner().invoke(app, ["train", str(recipe)])
        assert result.exit_code == code
        assert "omninft train --resume" in result.output
        assert (tmp_path / "runs" / "small" / "checkpoints" / "step-000000").is_dir()


def evaluated(run: Path) -> list[int]:
    return [r["iteration"] for r in read_metrics(run) if r["kind"] == "evaluation"]


def test_a_loss_that_is_not_finite_stops_before_the_update(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omninft.models.ltx2 import LTX2Policy

    real = LTX2Policy.velocity

    def spoiled(self: LTX2Policy, *args: Any, **kwargs: Any) -> Any:
        made = real(self, *args, **kwargs)
        if torch.is_grad_enabled() and len(list((tmp_path / "small" / "checkpoints").glob("step-*"))) == 2:
            made.audio.mul_(float("inf"))
        return made

    monkeypatch.setattr(LTX2Policy, "velocity", spoiled)
    with pytest.raises(OmniNFTError, match=r"iteration 2, sigma 1: the audio loss is .*nothing was updated"):
        train(small_config(model, tmp_path, run__iterations=4))
    names = sorted(p.name for p in (tmp_path / "small" / "checkpoints").glob("step-*"))
    assert names == ["step-000001", "step-000002"]


def test_a_given_first_frame_is_kept_and_the_rest_learns(model: Path, tmp_path: Path) -> None:
    from omninft.clips.media import write_png

    frame = np.full((32, 32, 3), 200, dtype=np.uint8)
    write_png(tmp_path / "first.png", frame)
    prompts = [
        {"prompt_v": f"a red ball {i}", "prompt_a": "a low tone", "first_frame_path": "first.png"} for i in range(2)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(p) for p in prompts))
    sets = {"train": str(tmp_path / "p.jsonl"), "dev": None, "test": None, "per_iteration": 2, "group_size": 4}
    result = train(small_config(model, tmp_path / "runs", prompts=sets, run__iterations=1))
    row = next(r for r in read_metrics(result.folder) if r["kind"] == "iteration")
    assert row["gradient_norm/video"] > 0


def test_division_errors_name_what_would_do(model: Path, tmp_path: Path) -> None:
    with pytest.raises(OmniNFTError, match=r"8 clips .*micro_batch 3 does not divide; 2 would"):
        train(small_config(model, tmp_path, optimiser__micro_batch=3))


def test_rewards_whose_weights_are_missing_stop_a_run_before_it_begins() -> None:
    with pytest.raises(OmniNFTError) as caught:
        build_rewards(load_config("paper"))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == [
        f"reward {name!r}" for name in ("videoalign", "hpsv3", "audiobox", "clap", "desync")
    ]
    assert "curl -L --create-dirs" in lines[-1]


def test_evaluation_sampling_is_checked_before_the_first_iteration(model: Path, tmp_path: Path) -> None:
    # A test set and no dev set: the evaluation would come after the last iteration, before export and report.
    bad = {"every": 0, "test_clips": 2, "sampling": {"stg_blocks": [9], "video_guidance": {"stg": 1.0}}}
    config = small_config(model, tmp_path, evaluation=bad)
    with pytest.raises(OmniNFTError, match=r"stg_blocks: found \[9\], expected blocks 0 to 2"):
        train(config)
    assert not (tmp_path / "small").exists()
    findings = {f.subject: f for f in check_run(config, trial=False)}
    assert not findings["model"].ok
    assert "stg_blocks" in findings["model"].text


class TestCallback:
    def test_it_is_told_of_every_iteration_and_stops_the_run_saved(self, model: Path, tmp_path: Path) -> None:
        told: list[tuple[int, dict[str, float]]] = []

        def watch(iteration: int, metrics: dict[str, float]) -> bool:
            told.append((iteration, metrics))
            return iteration < 1

        stopped = train(small_config(model, tmp_path, run__iterations=3, run__checkpoint_every=100), callback=watch)
        assert (stopped.finished, stopped.iterations, stopped.stopped_by) == (False, 2, None)
        assert [iteration for iteration, _ in told] == [0, 1]
        logged = [row for row in read_metrics(stopped.folder) if row["kind"] == "iteration"]
        for (_, metrics), row in zip(told, logged, strict=True):
            assert metrics["reward/brightness"] == row["reward/brightness"]
            assert metrics["seconds"] == row["seconds"]
        done = train(resume=str(stopped.folder))
        assert (done.finished, done.iterations) == (True, 3)
        whole = train(small_config(model, tmp_path / "whole", run__iterations=3))
        assert same(adapters(done.folder, 3), adapters(whole.folder, 3))

    def test_after_the_last_iteration_there_is_nothing_to_stop(self, model: Path, tmp_path: Path) -> None:
        evaluation = TWO_BATCHES | {"every": 0}
        config = small_config(model, tmp_path, evaluation=evaluation, run__iterations=1)
        result = train(config, callback=lambda *_: False)
        assert result.finished
        assert result.table is not None

    def test_what_it_raises_loses_no_iteration(self, model: Path, tmp_path: Path) -> None:
        def fail(iteration: int, metrics: dict[str, float]) -> None:
            raise ZeroDivisionError

        config = small_config(model, tmp_path, run__iterations=2, run__checkpoint_every=100)
        with pytest.raises(ZeroDivisionError):
            train(config, callback=fail)
        assert adapters(tmp_path / "small", 1)

    def test_another_thread_leaves_signals_alone(self, model: Path, tmp_path: Path) -> None:
        before = signal.getsignal(signal.SIGINT)
        config, seen = small_config(model, tmp_path, run__iterations=1), []
        thread = threading.Thread(
            target=lambda: seen.append(train(config, callback=lambda *_: seen.append(signal.getsignal(signal.SIGINT))))
        )
        thread.start()
        thread.join()
        assert seen[0] == before
        assert seen[1].finished


def test_prompts_that_a_reward_cannot_judge_are_refused_before_the_run(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "cats.jsonl"
    rows.write_text("".join(f'{{"prompt_v": "cat {i}", "prompt_a": "it meows {i}"}}\n' for i in range(9)))
    config = small_config(model, tmp_path / "runs", rewards=[{"name": "world"}], prompts__train=str(rows))
    with pytest.raises(OmniNFTError, match=r"'world' cannot judge 8 of 8 prompts of .*cats\.jsonl \(prompts\.train\)"):
        train(config)
    assert not (tmp_path / "runs").exists()
    findings = {f.subject: f for f in check_run(config)}
    assert not findings["rewards"].ok
    assert "prompt_v asks for nothing of the bounce world: 'cat 0'" in findings["rewards"].text
    # What it can say of any clip is no reason to refuse.
    judged = small_config(
        model, tmp_path, rewards=[{"name": "world", "components": {"sync": 1}}], prompts__train=str(rows)
    )
    assert {f.subject: f for f in check_run(judged, trial=False)}["rewards"].ok
