"""MARBLE: min-norm weights against grids and conditions, affine gradients, probes, memory between probes, runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omninft.credit.advantages import advantages_of_one
from omninft.credit.marble import (
    MarbleCredit,
    MarbleOptions,
    balance,
    min_norm_weights,
    reward_weights,
    smoothed,
    teaches,
)
from omninft.credit.protocol import CreditContext
from omninft.distributed import Processes
from omninft.learning.update import TrainingBatch
from omninft.types import (
    BranchAdvantages,
    Component,
    Prompt,
    PromptGroup,
    RewardGradients,
    ScoreTable,
    TokenWeights,
)
from tests.credit.method_runs import (
    advantages_of,
    branch_gradients,
    check_three_are_two_and_one,
    grid,
    moved_setting,
    rows_of,
    small_tree,
    tiny_tree,
)
from tests.test_train import model  # noqa: F401

COMPONENTS = (Component("picture", "video", 1.0), Component("noise", "audio", -0.5), Component("sync", "joint", 2.0))


def random_vectors(size: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.exp(3 * torch.randn(size, 1, generator=generator, dtype=torch.float64))
    # A common part, so that the origin lies outside their hull now and then.
    common = 0.7 * torch.randn(width, generator=generator, dtype=torch.float64)
    return lengths * (torch.randn(size, width, generator=generator, dtype=torch.float64) + common)


def cosines(gram: torch.Tensor) -> torch.Tensor:
    norms = gram.diagonal().sqrt()
    return gram / norms[:, None] / norms[None]


class TestMinNormWeights:
    @pytest.mark.parametrize("size", [2, 3, 4])
    @pytest.mark.parametrize("seed", range(8))
    def test_no_point_of_a_fine_grid_is_shorter(self, size: int, seed: int) -> None:
        steps = {2: 4000, 3: 300, 4: 60}[size]
        gram = (v := random_vectors(size, 6, seed)) @ v.T
        points, products = grid(size, steps), cosines(gram)
        gamma = min_norm_weights(gram)
        value = float(gamma @ products @ gamma)
        values = (points @ products * points).sum(dim=1)
        assert value <= float(values.min()) + 1e-12
        # The nearest grid point is at most 1 / steps away in each weight.
        assert float(values.min()) - value < 4 * size / steps
        assert float((points[values.argmin()] - gamma).abs().max()) < 0.25

    @pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 12])
    @pytest.mark.parametrize("width", [2, 5, 40])
    def test_conditions_of_the_optimum(self, size: int, width: int) -> None:
        for seed in range(5):
            gram = (v := random_vectors(size, width, seed)) @ v.T
            gamma, products = min_norm_weights(gram), cosines(gram)
            assert float(gamma.min()) >= 0
            assert float(gamma.sum()) == pytest.approx(1, abs=1e-12)
            slopes = products @ gamma
            value = float(gamma @ slopes)
            assert float(slopes.min()) >= value - 1e-8
            torch.testing.assert_close(slopes[gamma > 0], torch.full_like(slopes[gamma > 0], value), atol=1e-8, rtol=0)

    def test_two_gradients_have_the_closed_form_of_the_segment(self) -> None:
        # Of unit vectors with cosine c: gamma = clip((1 - c) / (2 - 2 c), 0, 1) = 1/2 whatever their lengths.
        for seed in range(10):
            gram = (v := random_vectors(2, 3, seed)) @ v.T
            torch.testing.assert_close(
                min_norm_weights(gram), torch.full((2,), 0.5, dtype=torch.float64), atol=1e-8, rtol=0
            )

    def test_three_gradients_against_hand_computation(self) -> None:
        # Two at a right angle and their bisector: the bisector's end lies beyond the segment, so it gets nothing.
        vectors = torch.tensor([[1.0, 0.0], [0.0, 3.0], [5.0, 5.0]], dtype=torch.float64)
        expected = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
        torch.testing.assert_close(min_norm_weights(vectors @ vectors.T), expected, atol=1e-8, rtol=0)

    def test_lengths_do_not_matter(self) -> None:
        v = random_vectors(4, 6, 3)
        w = v * torch.tensor([[1e-3], [1.0], [50.0], [7.0]], dtype=torch.float64)
        torch.testing.assert_close(min_norm_weights(v @ v.T), min_norm_weights(w @ w.T), atol=1e-8, rtol=0)

    def test_zero_gradients_get_nothing_and_only_zeros_are_even(self) -> None:
        v = random_vectors(3, 5, 0)
        v[1] = 0
        gamma = min_norm_weights(v @ v.T)
        assert gamma[1] == 0
        kept = v[[0, 2]]
        torch.testing.assert_close(gamma[[0, 2]], min_norm_weights(kept @ kept.T), atol=1e-10, rtol=0)
        assert min_norm_weights(torch.zeros(4, 4)).tolist() == [0.25] * 4
        # What rounding leaves of no gradient has no direction, and no share.
        v[1] = 1e-8 * torch.randn(5, dtype=torch.float64)
        assert min_norm_weights(v @ v.T)[1] == 0

    def test_ties_are_even_and_opposites_cancel(self) -> None:
        torch.testing.assert_close(min_norm_weights(torch.ones(3, 3)), torch.full((3,), 1 / 3, dtype=torch.float64))
        torch.testing.assert_close(
            min_norm_weights(torch.tensor([[4.0, -2.0], [-2.0, 1.0]])), torch.full((2,), 0.5, dtype=torch.float64)
        )

    @pytest.mark.parametrize("gram", [torch.zeros(2, 3), torch.zeros(0, 0), torch.tensor([[float("nan")]])])
    def test_refuses_what_is_no_gram(self, gram: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="gram must be finite"):
            min_norm_weights(gram)


class TestWeights:
    def test_the_combined_gradient_points_the_way_of_the_min_norm_point(self) -> None:
        v = random_vectors(3, 8, 2)
        found = balance(v @ v.T, torch.ones(3, dtype=torch.bool))
        assert found is not None
        unit = v / v.norm(dim=1, keepdim=True)
        shortest = found.gamma @ unit
        combined = found.shares @ v
        assert float(torch.nn.functional.cosine_similarity(shortest, combined, dim=0)) == pytest.approx(1, abs=1e-12)
        assert found.min_norm == pytest.approx(float(shortest.norm()), rel=1e-9)
        # No reward that takes part is hurt, and all gain alike in units of their own gradient.
        gains = unit @ shortest
        assert float(gains.min()) >= found.min_norm**2 - 1e-8

    def test_sums_of_absolute_weights_and_signs_are_the_priors(self) -> None:
        weights = reward_weights(torch.tensor([0.2, 0.5, 0.3]), [1.0, -0.5, 2.0])
        np.testing.assert_allclose(weights, [0.7, -1.75, 1.05], rtol=1e-6)
        assert sum(map(abs, weights)) == pytest.approx(3.5)

    def test_unheard_rewards_and_empty_probes(self) -> None:
        v = random_vectors(3, 8, 2)
        found = balance(v @ v.T, torch.tensor([True, False, True]))
        assert found is not None
        assert found.shares[1] == 0
        assert balance(v @ v.T, torch.zeros(3, dtype=torch.bool)) is None
        assert balance(torch.zeros(3, 3), torch.ones(3, dtype=torch.bool)) is None

    def test_a_reward_that_tells_nothing_apart_or_has_no_weight_does_not_take_part(self) -> None:
        advantages = advantages_of((*COMPONENTS, Component("watched", "video", 0.0)))
        advantages.values[:, 2] = 0
        assert teaches(advantages).tolist() == [True, True, False, False]

    def test_smoothing(self) -> None:
        a, b = torch.tensor([0.2, 0.8]), torch.tensor([0.6, 0.4])
        assert smoothed(None, a, 0.9) is a
        torch.testing.assert_close(smoothed(a, b, 0.75), torch.tensor([0.3, 0.7]))


def credit_with(**options: Any) -> MarbleCredit:
    context = CreditContext(num_blocks=2, latent_frames=2, iterations=10, seed=0, processes=Processes())
    plain = {"surgery": {"enabled": False}, "regions": {"enabled": False}}
    return MarbleCredit(MarbleOptions.model_validate(plain | options), context)


def gradients_of_gram(gram: torch.Tensor) -> RewardGradients:
    return RewardGradients(torch.zeros_like(gram), torch.zeros_like(gram), gram)


class TestCredit:
    def test_weights_of_the_sum(self) -> None:
        advantages = advantages_of(COMPONENTS)
        v = random_vectors(3, 8, 4)
        credit = credit_with()
        made = credit.combine(advantages, gradients_of_gram(v @ v.T), 0)
        gamma = min_norm_weights(v @ v.T)
        shares = gamma / v.norm(dim=1)
        weights = 3.5 * shares / shares.sum() * torch.tensor([1.0, -1.0, 1.0])
        torch.testing.assert_close(made.video, (advantages.values @ weights).float())
        assert torch.equal(made.video, made.audio)
        metrics = credit.metrics()
        for component, weight in zip(COMPONENTS, weights.tolist(), strict=True):
            assert metrics[f"marble/weight/{component.name}"] == pytest.approx(weight)
        assert 0 <= metrics["marble/min_norm"] <= 1

    def test_routed_branches_hear_their_own(self) -> None:
        advantages = advantages_of(COMPONENTS)
        v = random_vectors(3, 8, 4)
        credit = credit_with(routed=True)
        made = credit.combine(advantages, gradients_of_gram(v @ v.T), 0)
        weights = torch.tensor([credit.metrics()[f"marble/weight/{c.name}"] for c in COMPONENTS], dtype=torch.float64)
        torch.testing.assert_close(made.video, (advantages.values[:, [0, 2]] @ weights[[0, 2]]).float())
        torch.testing.assert_close(made.audio, (advantages.values[:, [1, 2]] @ weights[[1, 2]]).float())

    def test_between_probes_the_smoothed_shares_are_used_and_a_checkpoint_keeps_them(self) -> None:
        advantages = advantages_of(COMPONENTS)
        grams = [(v := random_vectors(3, 8, seed)) @ v.T for seed in (1, 2)]
        credit = credit_with(probe_every=3, smoothing=0.6)
        assert [credit.probes(i) for i in range(7)] == [True, False, False, True, False, False, True]
        prior = credit.combine(advantages, None, 0)  # before any probe
        torch.testing.assert_close(
            prior.video, (advantages.values @ torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)).float()
        )
        first = credit.combine(advantages, gradients_of_gram(grams[0]), 0)
        assert torch.equal(credit.combine(advantages, None, 1).video, first.video)
        tensors, values = credit.state()
        again = credit_with(probe_every=3, smoothing=0.6)
        again.load_state({k: t.clone() for k, t in tensors.items()}, values)
        made = [c.combine(advantages, gradients_of_gram(grams[1]), 3).video for c in (credit, again)]
        assert torch.equal(*made)
        shares = [balance(gram, torch.ones(3, dtype=torch.bool)).shares for gram in grams]  # type: ignore[union-attr]
        torch.testing.assert_close(credit.shares, 0.6 * shares[0] + 0.4 * shares[1])
        # A probe that finds no gradient at all leaves them as they are.
        credit.combine(advantages, gradients_of_gram(torch.zeros(3, 3)), 6)
        assert torch.equal(credit.shares, again.shares)  # type: ignore[arg-type]

    def test_assign_changes_no_share(self) -> None:
        credit = credit_with()
        table = ScoreTable(COMPONENTS, np.random.default_rng(0).random((4, 3)))
        credit.assign(table, [PromptGroup(Prompt("a", "", "", ""), (0, 1, 2, 3))], 0)
        assert credit.shares is None


class TestGradients:
    """On a small random model whose current policy has left the old one."""

    def test_probes_equal_gradients_taken_one_by_one_and_leave_nothing_behind(self) -> None:
        setting = moved_setting(micro_batch=2)
        update = setting.update
        advantages = advantages_of(COMPONENTS)
        alone = [advantages_of_one(advantages, k) for k in range(3)]
        tokens = TokenWeights(video=torch.rand(4, setting.rollout.latents.video.shape[1]) + 0.5)
        before = setting.weights()
        found = update.reward_gradients(setting.rollout, tokens, alone, 0)
        assert torch.equal(setting.weights(), before)
        assert all(p.grad is None for p in update.parameters)
        assert not update.optimiser.state
        assert update.optimiser_step == 0
        one_by_one = [branch_gradients(setting, a, tokens) for a in alone]
        video, audio = (torch.stack([g[branch] for g in one_by_one]) for branch in (0, 1))
        scale = float(video.norm() * audio.norm())
        # A reward that a branch does not hear has exact zeros there.
        assert not found.video[1].any()
        assert not found.audio[0].any()
        for made, vectors in ((found.video, video), (found.audio, audio), (found.both, (video + audio) / 2)):
            torch.testing.assert_close(made, vectors @ vectors.T, atol=1e-5 * scale, rtol=1e-4)

    def test_the_loss_is_affine_in_the_advantages(self) -> None:
        setting = moved_setting()
        advantages = advantages_of(COMPONENTS)
        valid = torch.ones(4, dtype=torch.bool)
        nothing = branch_gradients(setting, BranchAdvantages(torch.zeros(4), torch.zeros(4), valid, valid))
        alone = [branch_gradients(setting, advantages_of_one(advantages, k, routed=False)) for k in range(3)]
        for prior in (1.0, 2.5):  # what the absolute weights add up to
            coefficients = [0.3 * prior, 0.5 * prior, 0.2 * prior]
            # `alone` is in the direction of each weight's sign; so is the sum.
            signed = [c if component.weight > 0 else -c for c, component in zip(coefficients, COMPONENTS, strict=True)]
            total = (advantages.values @ torch.tensor(signed, dtype=torch.float64)).float()
            combined = branch_gradients(setting, BranchAdvantages(total, total, valid, valid))
            for branch in (0, 1):
                expected = sum(c * g[branch] for c, g in zip(coefficients, alone, strict=True))
                expected = expected + (1 - prior) * nothing[branch]
                assert float((combined[branch] - expected).norm() / expected.norm()) < 1e-5

    def test_the_update_follows_the_weighted_sum_of_the_rewards_gradients(self) -> None:
        setting = moved_setting()
        # Absolute weights that add up to 1, where no gradient of zero advantages is left over.
        components = tuple(replace(c, weight=w) for c, w in zip(COMPONENTS, (0.4, -0.3, 0.3), strict=True))
        advantages = advantages_of(components)
        credit = credit_with()
        update = setting.update
        alone = [credit.alone(advantages, k) for k in range(3)]
        gradients = update.reward_gradients(setting.rollout, TokenWeights(), alone, 0)
        branches = credit.combine(advantages, gradients, 0)
        one_by_one = [sum(branch_gradients(setting, a)) / 2 for a in alone]  # the loss is the mean of the branches
        weights = [abs(credit.metrics()[f"marble/weight/{c.name}"]) for c in components]
        expected = sum(w * g for w, g in zip(weights, one_by_one, strict=True))
        # Plain gradient descent of rate 1 shows the gradient that was applied.
        update.optimiser = torch.optim.SGD(update.parameters, lr=1.0)  # type: ignore[assignment]
        update.settings = update.settings.model_copy(update={"learning_rate": 1.0})
        before = torch.cat([p.detach().flatten() for p in update.parameters])
        update.run(TrainingBatch(setting.rollout, branches, TokenWeights(), (4, 4)), 0)
        applied = (before - torch.cat([p.detach().flatten() for p in update.parameters])).double()
        assert float((applied - expected).norm() / expected.norm()) < 1e-5
        # The update goes along every reward's own gradient: none that takes part loses.
        gains = torch.stack([g @ applied / g.norm() / applied.norm() for g in one_by_one])
        assert float(gains.min()) > -1e-6


EXACT = {"kind": "marble", "surgery": {"enabled": False}, "regions": {"enabled": False}}


class TestRuns:
    def test_on_a_small_random_model(self, model: Path, tmp_path: Path) -> None:  # noqa: F811
        rows = check_three_are_two_and_one(small_tree(model, EXACT), tmp_path)
        for row in rows:
            assert row["marble/weight/brightness"] + row["marble/weight/loudness"] == pytest.approx(2)
            assert 0 <= row["marble/min_norm"] <= 1
            assert row["time/reward gradients"] > 0

    def test_on_the_bundled_model_between_probes(self, tmp_path: Path) -> None:
        # Iteration 2 has no probe: it needs the shares that the checkpoint kept.
        credit = EXACT | {"probe_every": 3, "smoothing": 0.5, "routed": True}
        rows = check_three_are_two_and_one(tiny_tree(credit), tmp_path)
        assert ["time/reward gradients" in row for row in rows] == [True, False, False]
        weights = [[row[f"marble/weight/{n}"] for n in ("redness", "loudness", "together")] for row in rows]
        assert weights[0] == weights[1] == weights[2]
        assert sum(weights[0]) == pytest.approx(3.0)
        assert weights[0] != [1.5, 0.5, 1.0]
        assert len(rows_of(tmp_path / "whole" / "small")) == 3
