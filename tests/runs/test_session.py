"""How a run's parts are joined: who samples, who is evaluated, on what noise, and which clip gets which credit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omninft.distributed import Processes
from omninft.models.ltx2 import LTX2Policy
from omninft.noise import Occasion
from omninft.rewards.runner import RewardRunner
from omninft.runs.build import build
from omninft.runs.session import Session
from omninft.train import train
from omninft.types import Clip, Rollout, ScoreTable
from tests.test_train import model, small_config  # noqa: F401

HELD_OUT = [{"name": "tests.runs.test_session:greenness", "route": "video"}]
EVALUATED: dict[str, Any] = {"every": 1, "dev_clips": 2, "test_clips": 2, "shown_clips": 0}


def greenness(clips: list[Clip]) -> list[float]:
    return [float(c.video[..., 1].mean()) for c in clips]


def plain_evaluation() -> dict[str, Any]:
    off = {"text": 1.0, "stg": 0.0, "modality": 1.0, "rescale": 0.0}
    sampling = {"num_steps": 2, "stg_blocks": [], "video_guidance": off, "audio_guidance": off}
    return EVALUATED | {"sampling": sampling}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(adapter, seed, iteration or occasion) of every sampling, in order."""
    from omninft.rollout.sampler import RolloutSampler

    seen: list[tuple[str, int, int]] = []
    real = RolloutSampler.sample

    def spy(self: RolloutSampler, groups: Any, seed: int, iteration: int, adapter: str) -> Rollout:
        seen.append((adapter, seed, iteration))
        return real(self, groups, seed, iteration, adapter)  # type: ignore[arg-type]

    monkeypatch.setattr(RolloutSampler, "sample", spy)
    return seen


def test_old_samples_base_and_current_are_evaluated_each_on_noise_of_its_own(
    model: Path,  # noqa: F811
    tmp_path: Path,
    calls: list[tuple[str, int, int]],
) -> None:
    config = small_config(model, tmp_path, evaluation=plain_evaluation(), held_out=HELD_OUT, seed=9, run__iterations=1)
    result = train(config)
    evaluation_seed = config.evaluation.seed
    assert calls == [
        ("reference", evaluation_seed, Occasion.DEV),
        ("old", 9, 0),
        ("old", 9, 0),
        ("current", evaluation_seed, Occasion.DEV),
        ("reference", evaluation_seed, Occasion.TEST),
        ("current", evaluation_seed, Occasion.TEST),
    ]
    base, trained = (
        json.loads((result.folder / "samples" / f"test-{which}" / "values.json").read_text())
        for which in ("base", "trained")
    )
    assert base["prompt_ids"] == trained["prompt_ids"]
    assert base["names"] == ["brightness", "loudness", "greenness"]
    assert result.table is not None
    (row,) = [m for m in result.table.rows if m.measure.name == "greenness"]
    assert row.measure.group == "held_out"
    assert row.base.mean == pytest.approx(np.mean([v[2] for v in base["values"]]))
    assert row.trained.mean == pytest.approx(np.mean([v[2] for v in trained["values"]]))
    assert base["values"] != trained["values"]


def test_held_out_rewards_are_measured_and_never_trained_on(model: Path, tmp_path: Path) -> None:  # noqa: F811
    parts = build(small_config(model, tmp_path, evaluation=plain_evaluation(), held_out=HELD_OUT), Processes())
    assert [c.name for c in parts.runner.components] == ["brightness", "loudness"]
    for evaluator in parts.evaluators.values():
        assert evaluator.score([]).names == ("brightness", "loudness", "greenness")
    assert [(m.name, m.group) for m in parts.measures] == [
        ("brightness", "trained"), ("loudness", "trained"), ("greenness", "held_out"),
    ]  # fmt: skip
    # The numbers of a run are the same with and without a held-out reward.
    with_it = train(small_config(model, tmp_path / "a", held_out=HELD_OUT))
    without = train(small_config(model, tmp_path / "b"))
    saved = Path("checkpoints") / "step-000002" / "current.safetensors"
    assert (with_it.folder / saved).read_bytes() == (without.folder / saved).read_bytes()


def test_dev_and_test_are_of_their_own_prompts_and_counts(model: Path, tmp_path: Path) -> None:  # noqa: F811
    evaluation = plain_evaluation() | {"dev_clips": 3, "test_clips": 4}
    parts = build(small_config(model, tmp_path, evaluation=evaluation), Processes())
    for split, clips in (("dev", 3), ("test", 4)):
        evaluator = parts.evaluators[split]
        assert sum(len(g.samples) for g in evaluator.groups) == clips
        assert {g.prompt.id for g in evaluator.groups} <= {p.id for p in parts.prompts[split].prompts}
    assert parts.evaluators["dev"].occasion != parts.evaluators["test"].occasion


class Second(Processes):
    """The second of two processes, as far as shares go."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.world = 1, 2

    def gather(self, value: Any) -> list[Any]:
        return [value, value]

    def sum_(self, tensors: Any) -> None:
        """Alone all the same."""

    def wait(self) -> None:
        """For nobody."""


def test_each_process_trains_its_own_clips_with_their_own_credit(
    model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("omninft.runs.session.Processes", lambda backend: Second())
    with Session(small_config(model, tmp_path)) as run:
        groups = run.parts.groups.groups(0)
        rollouts, clips = zip(*run.roll_out(groups), strict=True)
        rollout = Rollout.cat(rollouts)
        keys = [(g.prompt.id, s) for g in groups for s in g.samples]
        assert rollout.clip_keys == keys[4:]
        assert [(c.prompt.id, c.sample) for batch in clips for c in batch] == keys[4:]
        values = np.arange(16, dtype=float).reshape(8, 2) ** 2
        values[6, :] = np.nan  # a clip of this process that nobody could score
        table = ScoreTable(run.parts.runner.components, values)
        advantages = run.parts.credit.assign(table, groups, 0)
        lessons = run.lessons(rollout, advantages)
        whole = run.parts.credit.combine(advantages, None, 0)
        assert torch.equal(lessons.advantages.video, whole.video[4:])
        assert torch.equal(lessons.advantages.audio, whole.audio[4:])
        assert lessons.advantages.video_valid.tolist() == [True, True, False, True]
        assert lessons.num_valid == (7, 7)  # of all processes
        assert lessons.tokens.video is not None
        assert lessons.tokens.video.shape == rollout.latents.video.shape[:2]
        assert run.parts.surgery is not None
        scales = run.parts.credit.gradient_scales(rollout)
        assert scales is not None
        assert run.parts.surgery.bound == sum(scale != 1 for scale in scales.a2v) > 0


def test_moving_old_takes_the_schedules_share(model: Path, tmp_path: Path) -> None:  # noqa: F811
    with Session(small_config(model, tmp_path)) as run:
        adapters = run.parts.policy.trainables
        torch.manual_seed(0)
        for name in ("current", "old"):
            for tensor in adapters.state(name).values():  # type: ignore[arg-type]
                tensor.normal_()
        current = {k: v.clone() for k, v in adapters.state("current").items()}
        old = {k: v.clone() for k, v in adapters.state("old").items()}
        run.iteration = 300  # schedule 1 keeps 0.001 of old an iteration
        run.move_old()
        assert run.iteration == 301
        for key, tensor in adapters.state("old").items():
            torch.testing.assert_close(tensor, 0.3 * old[key] + 0.7 * current[key])
            assert torch.equal(adapters.state("current")[key], current[key])


def test_too_many_missing_scores_are_looked_for_in_all_processes(model: Path, tmp_path: Path) -> None:  # noqa: F811
    from concurrent.futures import Future

    with Session(small_config(model, tmp_path, run__max_missing_share=0.4)) as run:
        future: Future[ScoreTable] = Future()
        future.set_result(ScoreTable(run.parts.runner.components, np.array([[1.0, np.nan], [2.0, 3.0]])))
        with pytest.raises(Exception, match="loudness on 1 of 2 clips"):
            run.gather_scores([future])


def test_the_runner_of_training_has_the_runs_limit(model: Path, tmp_path: Path) -> None:  # noqa: F811
    parts = build(small_config(model, tmp_path, run__max_missing_share=0.125), Processes())
    assert isinstance(parts.runner, RewardRunner)
    assert parts.runner.max_missing_share == 0.125
    assert isinstance(parts.policy, LTX2Policy)


def test_probes_see_each_processs_own_rows(
    model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("omninft.runs.session.Processes", lambda backend: Second())
    with Session(small_config(model, tmp_path, credit={"kind": "marble", "regions": {"warmup": 0}})) as run:
        groups = run.parts.groups.groups(0)
        rollout = Rollout.cat([made for made, _ in run.roll_out(groups)])
        values = np.random.default_rng(0).random((8, 2))
        advantages = run.parts.credit.assign(ScoreTable(run.parts.runner.components, values), groups, 0)
        seen: list[Any] = []
        real = run.parts.update.reward_gradients

        def spy(clips: Rollout, tokens: Any, alone: Any, iteration: int) -> Any:
            seen.append((clips.clip_keys, tokens, list(alone), iteration))
            return real(clips, tokens, alone, iteration)

        run.parts.update.reward_gradients = spy  # type: ignore[method-assign]
        lessons = run.lessons(rollout, advantages)
        ((keys, tokens, alone, iteration),) = seen
        assert (keys, iteration) == (rollout.clip_keys, 0)
        assert tokens is lessons.tokens
        for k, made in enumerate(alone):
            torch.testing.assert_close(made.video, advantages.values[4:, k].float())


def test_seconds_add_up_over_sessions(model: Path, tmp_path: Path) -> None:  # noqa: F811
    with Session(small_config(model, tmp_path)) as first:
        first._elapsed_before = 1000.0
        first.save()
    with Session(small_config(model, tmp_path), resume=first.folder) as second:
        assert 1000 < second.progress.elapsed < 1900
        second._begun -= 500
        assert 1500 < second.progress.elapsed < 2400


def test_every_part_is_built_from_its_own_settings(model: Path, tmp_path: Path) -> None:  # noqa: F811
    evaluation = plain_evaluation() | {"seed": 4, "shown_clips": 1}
    surgery = {"scope": "video_loss_only", "target": "projection"}
    parts = build(small_config(model, tmp_path, evaluation=evaluation, seed=9, credit__surgery=surgery), Processes())
    assert parts.groups.seed == 9
    assert parts.credit.context.seed == 9  # type: ignore[attr-defined]
    assert parts.objective.seed == 9  # type: ignore[attr-defined]
    drawn, others = (LTX2Policy.load(parts.config.model, seed).adapters.state("current") for seed in (9, 8))
    for key, tensor in parts.policy.trainables.state("current").items():
        assert torch.equal(tensor, drawn[key])
        assert torch.equal(tensor, others[key]) == key.endswith("lora_B")
    assert parts.update.video_loss_only
    assert parts.update.surgery is parts.surgery
    assert parts.surgery is not None
    assert {hook.path.rpartition(".")[2] for hook in parts.surgery._hooks} == {"to_k", "to_v"}
    assert parts.rollouts.sampling == parts.config.sampling
    assert parts.rollouts.needs == parts.credit.needs | parts.objective.needs
    for evaluator in parts.evaluators.values():
        assert evaluator.sampler.sampling == parts.config.evaluation_sampling
        assert evaluator.sampler.sampling.num_steps == 2
        assert evaluator.sampler.needs.recordings == ()
        assert (evaluator.seed, evaluator.shown) == (4, 1)
    assert (parts.evaluators["dev"].occasion, parts.evaluators["test"].occasion) == (Occasion.DEV, Occasion.TEST)


def test_counts_and_schedules_of_an_iteration_go_to_their_own_branch(model: Path, tmp_path: Path) -> None:  # noqa: F811
    surgery = {
        "schedule": [{"start": 0, "stop": 1, "scale": 0.25}],
        "audio_schedule": [{"start": 2, "stop": 3, "scale": 0.75}],
    }
    with Session(small_config(model, tmp_path, credit__surgery=surgery)) as run:
        groups = run.parts.groups.groups(0)
        rollout = Rollout.cat([made for made, _ in run.roll_out(groups)])
        values = np.random.default_rng(0).random((8, 2))
        values[[1, 5], 0] = np.nan  # brightness judges the picture,
        values[[0, 2, 6], 1] = np.nan  # loudness the sound
        advantages = run.parts.credit.assign(ScoreTable(run.parts.runner.components, values), groups, 0)
        assert run.lessons(rollout, advantages).num_valid == (6, 5)
        assert run.parts.surgery is not None
        scales = {(hook.site.direction, hook.site.block): hook.scale for hook in run.parts.surgery._hooks}
        assert {key: scale for key, scale in scales.items() if scale != 1} == {("a2v", 0): 0.25, ("v2a", 2): 0.75}


def test_dev_evaluates_what_was_trained_and_old_follows_before(
    model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    for name in ("learn", "record", "move_old", "evaluate_dev", "save"):
        real = getattr(Session, name)

        def spy(self: Session, *args: Any, real: Any = real, name: str = name) -> Any:
            done.append(f"{name} {self.iteration}")
            return real(self, *args)

        monkeypatch.setattr(Session, name, spy)
    train(small_config(model, tmp_path, evaluation=plain_evaluation() | {"test_clips": 0}))
    iteration = ("learn 0", "record 0", "move_old 0", "evaluate_dev 1", "save 1")
    assert done == ["evaluate_dev 0", *iteration, *(d[:-1] + str(int(d[-1]) + 1) for d in iteration), "save 2"]


def test_scores_are_those_of_all_processes(
    model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from concurrent.futures import Future

    monkeypatch.setattr("omninft.runs.session.Processes", lambda backend: Second())
    with Session(small_config(model, tmp_path)) as run:
        pending: list[Future[ScoreTable]] = []
        for first in (0.0, 10.0):
            pending.append(Future())
            pending[-1].set_result(ScoreTable(run.parts.runner.components, np.array([[first, first + 1]])))
        table = run.gather_scores(pending)
    # Both batches of this process, after those of the other (which gave the same here).
    assert table.values.tolist() == [[0, 1], [10, 11], [0, 1], [10, 11]]
