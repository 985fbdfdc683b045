"""Flow-GRPO: ratios, clipping and gradients against other computations, and whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from omninft.config import Config, OptimiserConfig, SamplingConfig, build_config, load_config
from omninft.distributed import Processes
from omninft.learning.update import PolicyUpdate, TrainingBatch
from omninft.objectives.flow_grpo import (
    FlowGRPO,
    FlowGRPOOptions,
    StepsOptions,
    branch_loss,
    ratio_loss,
    token_mean,
    training_steps,
)
from omninft.objectives.protocol import LossWeights, ObjectiveContext, Round
from omninft.rollout.sampler import RolloutSampler
from omninft.rollout.solvers import sde_step, step_log_prob
from omninft.runs.build import build
from omninft.runs.metrics import read_metrics
from omninft.train import train
from omninft.types import BranchAdvantages, Latents, Needs, OmniNFTError, Prompt, PromptGroup, TokenWeights
from tests.random_models import make_policy
from tests.test_train import model, small_config

__all__ = ["model"]  # a fixture

B, T, C = 4, 6, 3
STD = torch.full((B, 1, 1), 0.3)
ADVANTAGE = torch.tensor([2.0, -1.5, 0.0, 0.5])
VALID = torch.ones(B, dtype=torch.bool)
WIDE = FlowGRPOOptions(clip_range=0.9)


def case(seed: int = 0, far: float = 0.02) -> dict[str, torch.Tensor]:
    """Means of current (near by `far`) and of the rollout's policy, and the state that it drew."""
    g = torch.Generator().manual_seed(seed)
    rollout = torch.randn(B, T, C, generator=g)
    after = rollout + STD * torch.randn(B, T, C, generator=g)
    return {"rollout": rollout, "after": after, "mean": rollout + far * torch.randn(B, T, C, generator=g)}


def loss_of(mean: torch.Tensor, made: dict[str, torch.Tensor], **changes: Any) -> Any:
    arguments: dict[str, Any] = dict(
        mean=mean,
        std=STD,
        after=made["after"],
        rollout_log_prob=step_log_prob(made["after"], made["rollout"], STD),
        reference_mean=None,
        advantage=ADVANTAGE,
        valid=VALID,
        num_valid=float(B),
        options=WIDE,
    )
    return branch_loss(**(arguments | changes))


class TestRatio:
    def test_the_loss_from_densities_of_torch(self) -> None:
        made = case()
        expected = 0.0
        for i in range(B):
            now = Normal(made["mean"][i].double(), 0.3).log_prob(made["after"][i].double()).mean()
            then = Normal(made["rollout"][i].double(), 0.3).log_prob(made["after"][i].double()).mean()
            expected -= float(torch.exp(now - then) * ADVANTAGE[i]) / B
        found = loss_of(made["mean"], made)
        assert float(found.loss) == pytest.approx(expected, rel=1e-5)
        assert not found.parts["clipped"].any()

    def test_at_the_start_the_ratio_is_1_and_the_gradient_that_of_the_log_density(self) -> None:
        made = case()
        mean = made["rollout"].clone().requires_grad_()
        found = loss_of(mean, made)
        assert torch.equal(found.parts["ratio"], torch.ones(B))
        assert float(found.loss.detach()) == pytest.approx(-float(ADVANTAGE.mean()), rel=1e-6)
        found.loss.backward()
        assert mean.grad is not None
        # d log N / d mean = (x' - mean) / std^2, a mean over T C numbers and B clips.
        expected = -ADVANTAGE[:, None, None] * (made["after"] - made["rollout"]) / 0.3**2 / (T * C * B)
        torch.testing.assert_close(mean.grad, expected, atol=1e-6, rtol=1e-4)

    def test_the_gradient_by_finite_differences(self) -> None:
        made = case()
        mean = made["mean"].clone().requires_grad_()
        loss_of(mean, made).loss.backward()
        assert mean.grad is not None

        def exact(value: torch.Tensor) -> float:
            """The same loss in float64, from torch's densities."""
            now, then = (Normal(m.double(), 0.3).log_prob(made["after"].double()) for m in (value, made["rollout"]))
            return float(-(torch.exp((now - then).mean(dim=(1, 2))) * ADVANTAGE).mean())

        for place in ((0, 0, 0), (1, 3, 2), (3, 5, 1)):
            step = torch.zeros(B, T, C, dtype=torch.float64)
            step[place] = 1e-4
            slope = (exact(made["mean"] + step) - exact(made["mean"] - step)) / 2e-4
            assert float(mean.grad[place]) == pytest.approx(slope, rel=1e-3)

    @pytest.mark.parametrize(
        ("ratio", "advantage", "expected", "clipped"),
        [
            (1.3, 2.0, -2.2, True),  # good enough already
            (0.7, 2.0, -1.4, False),  # good, but less likely than it was: pulled back
            (0.7, -2.0, 1.8, True),  # bad, and unlikely enough already
            (1.3, -2.0, 2.6, False),
            (1.05, 2.0, -2.1, False),
            (0.95, -2.0, 1.9, False),
            (1.3, 0.0, 0.0, False),
        ],
    )
    def test_clipping_on_both_sides(self, ratio: float, advantage: float, expected: float, clipped: bool) -> None:
        log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
        loss, cut = ratio_loss(log_ratio, torch.tensor([advantage]), 0.1)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
        assert bool(cut) is clipped
        loss.sum().backward()
        assert log_ratio.grad is not None
        assert float(log_ratio.grad) == pytest.approx(0.0 if clipped else -ratio * advantage, rel=1e-5)

    def test_advantages_are_clipped(self) -> None:
        made = case()
        wild = loss_of(made["mean"], made, advantage=torch.tensor([80.0, -80.0, 5.0, -5.0]))
        mild = loss_of(made["mean"], made, advantage=torch.tensor([5.0, -5.0, 5.0, -5.0]))
        assert torch.equal(wild.loss, mild.loss)


class TestMasksAndWeights:
    def test_given_tokens_leave_the_ratio(self) -> None:
        made = case()
        mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.6
        mean = made["mean"].clone()
        mean[~mask] = 1e4
        mean.requires_grad_()
        found = loss_of(mean, made, token_mask=mask)
        for i in range(B):
            rows = [made[k][i][mask[i]] for k in ("mean", "rollout", "after")]
            now, then = (Normal(m, 0.3).log_prob(rows[2]).mean() for m in rows[:2])
            assert float(found.parts["ratio"][i]) == pytest.approx(float(torch.exp(now - then)), rel=1e-5)
        found.loss.backward()
        assert mean.grad is not None
        assert bool(mean.grad.isfinite().all())
        assert not mean.grad[~mask].any()

    def test_a_clip_that_is_given_whole_teaches_nothing(self) -> None:
        made = case()
        mean = made["mean"].clone().requires_grad_()
        found = loss_of(mean, made, token_mask=torch.zeros(B, T, dtype=torch.bool))
        found.loss.backward()
        assert mean.grad is not None
        assert not mean.grad.any()
        assert torch.equal(found.parts["ratio"], torch.ones(B))

    def test_weights_shift_the_ratio_to_their_tokens(self) -> None:
        made = case()
        weights = torch.ones(B, T)
        torch.testing.assert_close(
            loss_of(made["mean"], made, token_weights=3 * weights).loss, loss_of(made["mean"], made).loss
        )
        weights[:, 1:] = 0
        found = loss_of(made["mean"], made, token_weights=weights)
        now, then = (Normal(made[k][:, 0], 0.3).log_prob(made["after"][:, 0]).mean(dim=1) for k in ("mean", "rollout"))
        torch.testing.assert_close(found.parts["ratio"], torch.exp(now - then))

    def test_the_mean_by_hand(self) -> None:
        values = torch.tensor([[1.0, 2.0, 6.0], [1.0, 2.0, 3.0]])
        assert token_mean(values).tolist() == [3.0, 2.0]
        assert token_mean(values, torch.tensor([[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]])).tolist() == [3.75, 0.0]
        assert token_mean(values, None, torch.tensor([[True, False, True], [False, False, False]])).tolist() == [3.5, 0]

    def test_clips_that_are_not_valid_leave_loss_and_gradient(self) -> None:
        made = case()
        valid = torch.tensor([True, False, True, True])
        mean = made["mean"].clone().requires_grad_()
        advantage = ADVANTAGE.clone()
        advantage[1] = torch.nan
        found = loss_of(mean, made, advantage=advantage, valid=valid, num_valid=3.0)
        expected = -(found.parts["ratio"] * ADVANTAGE)[valid].sum() / 3
        torch.testing.assert_close(found.loss.detach(), expected)
        found.loss.backward()
        assert mean.grad is not None
        assert not mean.grad[1].any()
        assert bool(mean.grad[0].any())
        nobody = loss_of(mean, made, valid=torch.zeros(B, dtype=torch.bool), num_valid=0.0)
        assert float(nobody.loss.detach()) == 0.0
        assert nobody.loss.requires_grad
        with pytest.raises(ValueError, match="num_valid is 0"):
            loss_of(mean, made, num_valid=0.0)

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        made = case()
        with pytest.raises(ValueError, match="expected mean and after"):
            loss_of(made["mean"], made, rollout_log_prob=torch.zeros(B))


def test_the_reference_term_is_the_divergence_of_the_steps() -> None:
    made = case()
    options = FlowGRPOOptions(clip_range=0.9, reference_weight=0.5)
    reference = made["rollout"] + 0.1
    found = loss_of(made["mean"], made, reference_mean=reference, options=options)
    expected = kl_divergence(Normal(made["mean"], 0.3), Normal(reference, 0.3)).mean(dim=(1, 2))
    torch.testing.assert_close(found.parts["reference"], expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.loss, loss_of(made["mean"], made).loss + 0.5 * expected.mean())
    with pytest.raises(ValueError, match="reference_mean is missing"):
        loss_of(made["mean"], made, options=options)


def test_which_steps_are_trained() -> None:
    assert training_steps(StepsOptions(), 10) == list(range(9))
    assert training_steps(StepsOptions(fraction=0.4), 10) == [0, 1, 2, 3]
    assert training_steps(StepsOptions(choice="spread", fraction=0.4), 10) == [0, 2, 4, 6]
    for steps in range(2, 60):
        for choice in ("first_fraction", "spread"):
            for fraction in (0.01, 0.5, 1.0):
                made = training_steps(StepsOptions(choice=choice, fraction=fraction), steps)  # type: ignore[arg-type]
                assert made == sorted(set(made))
                assert made[0] == 0
                assert made[-1] <= steps - 2
                assert len(made) == min(max(1, int(fraction * steps)), steps - 1)
    with pytest.raises(OmniNFTError, match=r"sampling\.num_steps is 1, expected 2 or more"):
        training_steps(StepsOptions(), 1)


def test_rounds_are_steps_of_the_schedule() -> None:
    policy = make_policy()
    geometry = policy.geometry(SamplingConfig())
    objective = FlowGRPO(FlowGRPOOptions(steps=StepsOptions(fraction=0.5)), ObjectiveContext(geometry, 0))
    schedule = policy.sigmas(4, geometry)
    assert objective.rounds(schedule) == (Round(0, float(schedule[0]), 0), Round(1, float(schedule[1]), 1))


class Setting:
    """A small policy, four clips sampled by steps of the objective, and an update."""

    def __init__(self, micro_batch: int = 4, needs: Needs | None = None, frames: bool = False, **options: Any) -> None:
        self.policy = make_policy()
        sampling = SamplingConfig(num_steps=3)
        geometry = self.policy.geometry(sampling)
        self.objective = FlowGRPO(FlowGRPOOptions(**options), ObjectiveContext(geometry, 0, sampling))
        self.sampler = RolloutSampler(
            self.policy,
            sampling,
            needs or self.objective.needs,
            lambda path, h, w: torch.full((h, w, 3), 200, dtype=torch.uint8),
        )
        first = "first.png" if frames else None
        prompts = [Prompt(str(i), "v", "a", f"a red ball {w}", None, first) for i, w in enumerate(("once", "twice"))]
        self.rollout = self.sampler.sample(tuple(PromptGroup(p, (0, 1)) for p in prompts), 0, 0, "old")
        self.update = PolicyUpdate(
            self.policy,
            geometry,
            self.objective,
            OptimiserConfig(learning_rate=1e-3, clip_norm=1e9, micro_batch=micro_batch, step_per="iteration"),
            self.sampler.sigmas,
            Processes(),
        )

    def run(self, video: list[float], audio: list[float], tokens: TokenWeights | None = None) -> dict[str, float]:
        ok = torch.ones(4, dtype=torch.bool)
        advantages = BranchAdvantages(torch.tensor(video), torch.tensor(audio), ok, ok)
        return self.update.run(TrainingBatch(self.rollout, advantages, tokens or TokenWeights(), (4, 4)), 0)

    def log_probs(self) -> dict[str, torch.Tensor]:
        """[B, S - 1] mean log-densities of the kept steps under the current policy, by way of torch's densities."""
        way, s = self.rollout.trajectory, self.sampler
        assert way is not None
        found: dict[str, list[torch.Tensor]] = {"video": [], "audio": []}
        for step in range(2):
            x = Latents(way.video[:, step], way.audio[:, step])
            sigma, after = s.sigmas[step].double(), s.sigmas[step + 1].double()
            v = self.policy.velocity(x, s.sigmas[step].expand(4), self.rollout.context, s.geometry, "current")
            level = after if step == 0 else sigma
            scale = self.objective.options.noise_level * (level / (1 - level)).sqrt()
            dt = after - sigma
            for name, now, velocity, then in (
                ("video", x.video, v.video, way.video[:, step + 1]),
                ("audio", x.audio, v.audio, way.audio[:, step + 1]),
            ):
                mean = now.double() * (1 + scale**2 / (2 * sigma) * dt)
                mean = mean + velocity.double() * (1 + scale**2 * (1 - sigma) / (2 * sigma)) * dt
                density = Normal(mean, scale * (-dt).sqrt()).log_prob(then.double())
                found[name].append(density.mean(dim=(1, 2)))
        return {name: torch.stack(values, dim=1) for name, values in found.items()}


UP, DOWN = [2.0, -2.0, 1.0, -1.0], [-2.0, 2.0, -1.0, 1.0]


def test_the_update_follows_the_policy_gradient() -> None:
    setting = Setting()
    gradients: dict[str, torch.Tensor] = {}
    parameters = dict(setting.update.named)
    hook = setting.update._step
    setting.update._step = lambda i: (  # type: ignore[method-assign]
        gradients.update({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}) or hook(i)
    )
    with setting.policy.trainables.using("current"):
        log_probs = setting.log_probs()
        # The mean of the branches, as the update weighs them.
        wanted = log_probs["video"] * torch.tensor(UP)[:, None] + log_probs["audio"] * torch.tensor(DOWN)[:, None]
        expected = torch.autograd.grad(-wanted.mean() / 2, list(parameters.values()), allow_unused=True)
    metrics = setting.run(UP, DOWN)
    assert metrics["ratio/video"] == pytest.approx(1, abs=1e-5)
    assert metrics["ratio/audio"] == pytest.approx(1, abs=1e-5)
    assert metrics["clipped/video"] == 0.0
    size = max(float(g.abs().max()) for g in expected if g is not None)
    assert size > 1e-4
    for (name, made), exact in zip(gradients.items(), expected, strict=True):
        assert exact is not None
        torch.testing.assert_close(made, exact.float(), atol=2e-3 * size, rtol=1e-2, msg=name)
    assert metrics["old_deviation_sample/video"] > 0


def test_steps_of_good_clips_become_likelier_and_those_of_bad_ones_less() -> None:
    setting = Setting()
    before = {k: v.detach() for k, v in setting.log_probs().items()}
    setting.run(UP, DOWN)
    after = {k: v.detach() for k, v in setting.log_probs().items()}
    change = {k: (after[k] - before[k]).mean(dim=1) for k in before}
    for name, advantages in (("video", UP), ("audio", DOWN)):
        assert float((change[name] * torch.tensor(advantages)).sum()) > 0


def test_micro_batches_and_the_reference_add_up() -> None:
    whole = Setting(reference_weight=0.1).run(UP, DOWN)
    parts = Setting(micro_batch=2, reference_weight=0.1).run(UP, DOWN)
    for key in ("gradient_norm/video", "gradient_norm/audio"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-3)
    # B of a fresh adapter is 0: current is the reference.
    assert whole["reference/video"] == pytest.approx(0, abs=1e-9)


def test_given_frames_leave_the_ratio_at_1() -> None:
    metrics = Setting(frames=True).run(UP, DOWN)
    assert metrics["ratio/video"] == pytest.approx(1, abs=1e-5)
    assert metrics["gradient_norm/video"] > 0


def test_token_weights_reach_the_loss() -> None:
    plain, weighed = Setting(), Setting()
    tokens = TokenWeights(video=torch.ones(4, plain.sampler.geometry.video_tokens))
    assert tokens.video is not None
    tokens.video[:, 0] = 50
    a, b = plain.run(UP, DOWN), weighed.run(UP, DOWN, tokens)
    assert a["gradient_norm/video"] != pytest.approx(b["gradient_norm/video"], rel=1e-2)


def test_a_rollout_without_its_way_is_refused() -> None:
    with pytest.raises(OmniNFTError, match="this rollout kept none"):
        Setting(needs=Needs()).run(UP, UP)
    with pytest.raises(OmniNFTError, match="step 0 of this rollout has no finite likelihood"):
        Setting(needs=Needs(trajectory=True)).run(UP, UP)


def test_the_objective_reads_the_step_of_the_round() -> None:
    setting = Setting()
    way = setting.rollout.trajectory
    assert way is not None

    def nothing(*arguments: Any) -> Latents:
        raise AssertionError("no prediction is needed")

    prepared = setting.objective.prepare(setting.rollout, Round(0, 0.7, step=1), 0, nothing)
    assert torch.equal(prepared.noisy.video, way.video[:, 1])
    assert torch.equal(prepared.after.audio, way.audio[:, 2])
    assert torch.equal(prepared.sigma, way.sigmas[:, 1])
    weights = LossWeights(BranchAdvantages(torch.ones(4), torch.ones(4), VALID, VALID), TokenWeights(), (4.0, 4.0))
    with torch.no_grad():
        v = setting.policy.velocity(
            prepared.noisy, prepared.sigma, setting.rollout.context, setting.sampler.geometry, "current"
        )
        for branch in setting.objective.loss(v, prepared, weights):
            torch.testing.assert_close(branch.parts["ratio"], torch.ones(4), atol=1e-5, rtol=0)


def test_each_branch_is_given_what_is_its_own() -> None:
    setting = Setting(frames=True, reference_weight=0.3)
    torch.manual_seed(3)
    for key, tensor in setting.policy.adapters.state("current").items():
        if key.endswith("lora_B"):
            tensor.normal_(0, 0.05)
    way, given = setting.rollout.trajectory, setting.rollout.conditioning
    assert way is not None
    assert given is not None
    context, geometry = setting.rollout.context, setting.sampler.geometry

    def predict(name: Any, noisy: Latents, sigma: torch.Tensor) -> Latents:
        with torch.no_grad():
            return setting.policy.velocity(noisy, sigma, context, geometry, name, given)

    prepared = setting.objective.prepare(setting.rollout, Round(0, 0.7, step=1), 0, predict)
    advantages = BranchAdvantages(
        torch.tensor([3.0, -1.0, 2.0, 4.0]),
        torch.tensor([-2.0, 5.0, 1.0, 0.5]),
        torch.tensor([True, False, True, True]),
        torch.tensor([True, True, False, False]),
    )
    tokens = TokenWeights(torch.rand(4, geometry.video_tokens), torch.rand(4, geometry.audio_tokens))
    current = predict("current", prepared.noisy, prepared.sigma)
    made = setting.objective.loss(current, prepared, LossWeights(advantages, tokens, (7, 9)))
    sigma, after = (way.sigmas[:, n, None, None] for n in (1, 2))
    before = Latents(way.video[:, 1], way.audio[:, 1])
    reference = predict("reference", before, way.sigmas[:, 1])
    for branch, num_valid, mask, loss in (("video", 7, ~given.mask, made[0]), ("audio", 9, None, made[1])):
        x = getattr(before, branch)
        (mean, std), (pulled, _) = (
            sde_step(x, x - sigma * getattr(v, branch), sigma, after, setting.objective.options.noise_level)
            for v in (current, reference)
        )
        expected = branch_loss(
            mean=mean,
            std=std,
            after=getattr(way, branch)[:, 2],
            rollout_log_prob=getattr(way, f"{branch}_log_prob")[:, 1],
            reference_mean=pulled,
            advantage=getattr(advantages, branch),
            valid=getattr(advantages, f"{branch}_valid"),
            num_valid=num_valid,
            token_weights=getattr(tokens, branch),
            token_mask=mask,
            options=setting.objective.options,
        )
        assert float(loss.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        for key, value in expected.parts.items():
            torch.testing.assert_close(loss.parts[key], value, msg=f"{branch} {key}")
        assert float(loss.parts["reference"].min()) > 1e-7
        assert float((loss.parts["ratio"] - 1).abs().min()) > 1e-6


OBJECTIVE = {"kind": "flow_grpo", "steps": {"fraction": 1.0}}
CREDIT = {"kind": "global", "surgery": {"enabled": False}, "regions": {"enabled": False}}


def flow_config(model: Path | str, runs: Path, **changes: Any) -> Config:
    tree = json.loads(small_config(Path(model), runs, run__iterations=3).model_dump_json())
    plain = {"text": 1.0}
    tree |= {"objective": OBJECTIVE, "credit": CREDIT}
    tree["sampling"] |= {"video_guidance": plain, "audio_guidance": plain}
    tree["model"]["path"] = str(model)
    tree["run"]["old_schedule"] = 0
    for key, value in changes.items():
        part, _, name = key.partition("__")
        tree[part] = tree[part] | {name: value} if name else value
    return build_config(tree)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(folder) if r["kind"] == "iteration"]


def moved(folder: Path) -> float:
    """Largest entry of any B of the current adapter, all of which start at 0."""
    state = load_file(sorted((folder / "checkpoints").glob("step-*"))[-1] / "current.safetensors")
    return max(float(v.abs().max()) for k, v in state.items() if k.endswith("lora_B"))


def require_sound(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert all(math.isfinite(row[f"{key}/{b}"]) for key in ("loss", "ratio", "clipped") for b in ("video", "audio"))
        # One optimiser step an iteration, and old follows at once: every iteration's ratios are those of its start.
        assert row["ratio/video"] == pytest.approx(1, abs=1e-4)
        assert row["ratio/audio"] == pytest.approx(1, abs=1e-4)


class TestRuns:
    def test_three_iterations_of_a_random_model(self, model: Path, tmp_path: Path) -> None:
        result = train(flow_config(model, tmp_path, optimiser__step_per="iteration"))
        rows = rows_of(result.folder)
        assert len(rows) == 3
        require_sound(rows)
        assert moved(result.folder) > 0

    def test_three_iterations_of_the_bundled_model(self, tmp_path: Path) -> None:
        changes = {"sampling__num_steps": 3, "prompts__group_size": 2, "optimiser__step_per": "iteration"}
        config = flow_config("tiny", tmp_path, **changes)
        result = train(config)
        rows = rows_of(result.folder)
        assert len(rows) == 3
        require_sound(rows)
        assert moved(result.folder) > 0

    def test_several_steps_an_iteration_leave_the_start(self, model: Path, tmp_path: Path) -> None:
        # Beside the techniques of OmniNFT, which know nothing of it: surgery, and token weights in the ratio.
        credit = {"kind": "omninft", "regions": {"warmup": 0}}
        result = train(flow_config(model, tmp_path, credit=credit))
        assert max(abs(row["ratio/video"] - 1) for row in rows_of(result.folder)) > 1e-5

    def test_guided_rollouts_are_refused_by_their_keys(self, model: Path, tmp_path: Path) -> None:
        guided = {"text": 1.5, "modality": 2.0}
        with pytest.raises(OmniNFTError) as caught:
            build(flow_config(model, tmp_path, sampling__audio_guidance=guided), Processes())
        assert "sampling.audio_guidance.text is 1.5, expected 1" in str(caught.value)
        assert "sampling.audio_guidance.modality is 2, expected 1" in str(caught.value)
        assert "video_guidance" not in str(caught.value)

    def test_rollouts_are_made_as_the_objective_needs(self, model: Path, tmp_path: Path) -> None:
        parts = build(flow_config(model, tmp_path), Processes())
        assert parts.rollouts.needs == Needs(solver="sde", noise_level=0.7, trajectory=True)

    def test_the_recipe_is_unguided_and_follows_at_once(self) -> None:
        config = load_config("flow_grpo")
        assert isinstance(config.objective, FlowGRPOOptions)
        assert config.run.old_schedule == 0
        FlowGRPO(config.objective, ObjectiveContext(make_policy().geometry(SamplingConfig()), 0, config.sampling))
