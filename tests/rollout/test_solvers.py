"""Steps of the sampler: marginals on a Gaussian, densities, keyed noise, and the way that a rollout keeps."""

from __future__ import annotations

import math

import pytest
import torch

from omninft.config import SamplingConfig
from omninft.rollout.sampler import RolloutSampler
from omninft.rollout.solvers import ode_step, sde_step, step_log_prob
from omninft.types import Needs, OmniNFTError, Prompt, PromptGroup, Rollout
from tests.random_models import make_policy

# x0 ~ N(M, C^2), so x_sigma ~ N((1 - sigma) M, (1 - sigma)^2 C^2 + sigma^2).
M, C = 1.5, 0.4
LEVELS = (0.3, 0.7, 1.0)


def variance(sigma: float) -> float:
    return (1 - sigma) ** 2 * C**2 + sigma**2


def expected_clean(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[x0 | x_sigma = x], with which v = (x - x0) / sigma = E[eps - x0 | x]."""
    gain = (1 - sigma) * C**2 / ((1 - sigma) ** 2 * C**2 + sigma**2)
    return M + gain * (x - (1 - sigma) * M)


def grid(start: float, stop: float, steps: int) -> torch.Tensor:
    return torch.linspace(start, stop, steps + 1)


def worst_errors(noise_level: float, steps: int) -> tuple[float, float]:
    """Largest error of mean and of variance over a grid from .95 to .05, exactly: a step is affine in x."""
    sigmas = grid(0.95, 0.05, steps)
    mean, var = (1 - 0.95) * M, variance(0.95)
    worst_mean = worst_var = 0.0
    points = torch.tensor([0.0, 1.0]).reshape(1, 2, 1)
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        made, std = sde_step(points, expected_clean(points, sigma), sigma, after, noise_level)
        offset = float(made[0, 0, 0])
        slope = float(made[0, 1, 0]) - offset
        mean, var = offset + slope * mean, slope**2 * var + float(std) ** 2
        worst_mean = max(worst_mean, abs(mean - (1 - float(after)) * M))
        worst_var = max(worst_var, abs(var / variance(float(after)) - 1))
    return worst_mean, worst_var


class TestMarginals:
    @pytest.mark.parametrize("noise_level", LEVELS)
    def test_they_are_those_of_the_flow_to_first_order(self, noise_level: float) -> None:
        coarse, fine = worst_errors(noise_level, 200), worst_errors(noise_level, 400)
        assert fine[0] < 2e-3
        assert fine[1] < 2e-2
        # Twice the steps, half the error: what is left is Euler's, not a wrong term.
        assert coarse[1] / fine[1] == pytest.approx(2, abs=0.25)
        assert fine[0] < 0.6 * coarse[0] + 1e-5

    @pytest.mark.parametrize("noise_level", LEVELS)
    def test_samples_from_pure_noise_have_them_at_every_sigma(self, noise_level: float) -> None:
        generator = torch.Generator().manual_seed(0)
        x = flow = torch.randn(1, 60_000, 1, generator=generator)
        sigmas = grid(1, 0, 100)
        for sigma, after in zip(sigmas[:-2], sigmas[1:-1], strict=True):
            mean, std = sde_step(x, expected_clean(x, sigma), sigma, after, noise_level)
            x = mean + std * torch.randn(x.shape, generator=generator)
            flow = ode_step(flow, expected_clean(flow, sigma), sigma, after)
            if after < 0.9:
                # Euler's error at 100 steps, and what is left of the first step's excess of a^4 / 4.
                assert float(x.var()) == pytest.approx(variance(float(after)), rel=0.04 + 0.15 * noise_level**4)
                assert float(flow.var()) == pytest.approx(variance(float(after)), rel=0.04)
            assert float(x.mean()) == pytest.approx((1 - float(after)) * M, abs=0.03)
            assert float(flow.mean()) == pytest.approx((1 - float(after)) * M, abs=0.02)
        # The last step is the flow's and leaves no noise.
        clean = ode_step(x, expected_clean(x, sigmas[-2]), sigmas[-2], sigmas[-1])
        assert float(clean.var()) == pytest.approx(C**2, rel=0.05)

    def test_the_noise_does_something(self) -> None:
        # Samples of the flow keep their order, those of the process lose it.
        generator = torch.Generator().manual_seed(0)
        start = x = torch.randn(1, 20_000, 1, generator=generator)
        sigmas = grid(1, 0.01, 50)
        for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            mean, std = sde_step(x, expected_clean(x, sigma), sigma, after, 0.7)
            x = mean + std * torch.randn(x.shape, generator=generator)
        assert abs(float(torch.corrcoef(torch.stack([start.flatten(), x.flatten()]))[0, 1])) < 0.6


class TestSteps:
    def test_the_formula_number_by_number(self) -> None:
        torch.manual_seed(0)
        x, clean = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
        for sigma, after, replaced in ((0.6, 0.5, 0.6), (1.0, 0.9, 0.9), (1 - 1e-7, 0.9, 0.9)):
            s = 0.7 * math.sqrt(replaced / (1 - replaced))
            dt = after - sigma
            v = (x.double() - clean.double()) / sigma
            expected = x.double() * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
            mean, std = sde_step(x, clean, torch.tensor(sigma), torch.tensor(after), 0.7)
            torch.testing.assert_close(mean.double(), expected, atol=2e-6, rtol=2e-6)
            assert float(std) == pytest.approx(s * math.sqrt(-dt), rel=1e-5)

    def test_without_noise_it_is_the_step_of_the_flow(self) -> None:
        torch.manual_seed(0)
        x, clean = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
        sigma, after = torch.tensor(0.6), torch.tensor(0.5)
        mean, std = sde_step(x, clean, sigma, after, 1e-5)
        torch.testing.assert_close(mean, ode_step(x, clean, sigma, after))
        assert float(std) < 1e-5

    def test_clips_at_levels_of_their_own(self) -> None:
        torch.manual_seed(0)
        x, clean = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
        sigma, after = torch.tensor([1.0, 0.4]), torch.tensor([0.9, 0.2])
        mean, std = sde_step(x, clean, sigma[:, None, None], after[:, None, None], 0.7)
        for i in range(2):
            alone, alone_std = sde_step(x[i : i + 1], clean[i : i + 1], sigma[i], after[i], 0.7)
            torch.testing.assert_close(mean[i : i + 1], alone)
            torch.testing.assert_close(std[i].squeeze(), alone_std)

    @pytest.mark.parametrize(
        ("sigma", "after", "a"), [(0.5, 0.0, 0.7), (0.5, 0.5, 0.7), (0.5, 0.6, 0.7), (0.5, 0.4, 0)]
    )
    def test_what_is_no_stochastic_step_is_refused(self, sigma: float, after: float, a: float) -> None:
        x = torch.zeros(1, 1, 1)
        with pytest.raises(ValueError, match="expected 1 >= sigma > after > 0"):
            sde_step(x, x, torch.tensor(0.5), torch.tensor(after), a)

    def test_the_density_is_that_of_torch(self) -> None:
        torch.manual_seed(0)
        value, mean = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
        std = torch.tensor([0.3, 1.7])[:, None, None]
        expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(value).mean(dim=2)
        torch.testing.assert_close(step_log_prob(value, mean, std), expected)


PROMPTS = [Prompt(str(i), "v", "a", f"a red ball bounces {w}") for i, w in enumerate(("once", "twice"))]
SDE = Needs(solver="sde", noise_level=0.7, trajectory=True)
STEPS = 4


def sampler(needs: Needs) -> RolloutSampler:
    return RolloutSampler(make_policy(), SamplingConfig(num_steps=STEPS), needs)


def sampled(needs: Needs, samples: tuple[int, ...] = (0, 1), prompts: list[Prompt] = PROMPTS) -> Rollout:
    return sampler(needs).sample(tuple(PromptGroup(p, samples) for p in prompts), 3, 5, "old")


class TestRollouts:
    def test_no_needs_no_noise_and_no_trajectory(self) -> None:
        plain, kept = sampled(Needs()), sampled(Needs(trajectory=True))
        assert plain.trajectory is None
        assert kept.trajectory is not None
        assert torch.equal(plain.latents.video, kept.latents.video)
        assert torch.equal(plain.latents.audio, kept.latents.audio)
        assert bool(kept.trajectory.video_log_prob.isnan().all())
        assert not torch.equal(plain.latents.video, sampled(SDE).latents.video)

    def test_the_states_lead_from_the_noise_to_the_latents(self) -> None:
        s, made = sampler(SDE), sampled(SDE)
        way = made.trajectory
        assert way is not None
        start = s.initial_noise(made.clip_keys, 3, 5)
        for states, first, last in (
            (way.video, start.video, made.latents.video),
            (way.audio, start.audio, made.latents.audio),
        ):
            assert states.shape == (4, STEPS + 1, *first.shape[1:])
            assert torch.equal(states[:, 0], first)
            assert torch.equal(states[:, -1], last)
        assert torch.equal(way.sigmas, s.sigmas.expand(4, -1))
        assert way.video_log_prob.shape == (4, STEPS, way.video.shape[2])
        assert bool(way.video_log_prob[:, :-1].isfinite().all())
        assert bool(way.audio_log_prob[:, -1].isnan().all())

    def test_every_step_follows_from_the_state_before_and_its_own_noise(self) -> None:
        s, made = sampler(SDE), sampled(SDE)
        way = made.trajectory
        assert way is not None
        for step in range(STEPS - 1):
            before = type(made.latents)(way.video[:, step], way.audio[:, step])
            sigma, after = s.sigmas[step], s.sigmas[step + 1]
            with torch.no_grad():
                v = s.policy.velocity(before, sigma.expand(4), made.context, s.geometry, "old")
            noise = s.step_noise(made.clip_keys, 3, 5, step)
            for x, velocity, drawn, then, log_prob in (
                (before.video, v.video, noise.video, way.video, way.video_log_prob),
                (before.audio, v.audio, noise.audio, way.audio, way.audio_log_prob),
            ):
                mean, std = sde_step(x, x - sigma * velocity, sigma, after, 0.7)
                torch.testing.assert_close(then[:, step + 1], mean + std * drawn)
                # What was drawn is standard normal noise, so its log-density is known without the mean.
                expected = (-0.5 * drawn.square() - std.log() - 0.5 * math.log(2 * math.pi)).mean(dim=2)
                torch.testing.assert_close(log_prob[:, step], expected, atol=1e-4, rtol=1e-4)

    def test_noise_belongs_to_the_clip_and_the_step(self) -> None:
        together, alone = sampled(SDE), sampled(SDE, (1,), PROMPTS[1:])
        assert together.trajectory is not None
        assert alone.trajectory is not None
        torch.testing.assert_close(together.trajectory.video[3:], alone.trajectory.video, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.trajectory.audio[3:], alone.trajectory.audio, atol=1e-4, rtol=1e-4)
        s = sampler(SDE)
        keys = together.clip_keys
        first = s.step_noise(keys, 3, 5, 0)
        assert torch.equal(first.video[3:], s.step_noise(keys[3:], 3, 5, 0).video)
        for other in (s.step_noise(keys, 3, 5, 1), s.step_noise(keys, 3, 6, 0), s.initial_noise(keys, 3, 5)):
            assert not torch.equal(first.video, other.video)
            assert not torch.equal(first.audio, other.audio)

    def test_rows_and_batches_keep_the_way_with_its_clips(self) -> None:
        made = sampled(SDE)
        assert made.trajectory is not None
        again = Rollout.cat([made[:1], made[1:]]).trajectory
        assert again is not None
        assert torch.equal(again.video_log_prob[:, :-1], made.trajectory.video_log_prob[:, :-1])
        assert torch.equal(again.audio, made.trajectory.audio)
        assert torch.equal(again.sigmas, made.trajectory.sigmas)

    def test_given_tokens_are_clean_in_every_state(self) -> None:
        prompt = Prompt("f", "v", "a", "a red ball", first_frame_path="first.png")
        s = RolloutSampler(
            make_policy(),
            SamplingConfig(num_steps=STEPS),
            SDE,
            lambda path, h, w: torch.full((h, w, 3), 200, dtype=torch.uint8),
        )
        made = s.sample((PromptGroup(prompt, (0,)), PromptGroup(PROMPTS[0], (0,))), 0, 0, "old")
        given, way = made.conditioning, made.trajectory
        assert given is not None
        assert way is not None
        mask = given.mask[0]
        assert 0 < int(mask.sum()) < len(mask)
        for state in way.video[0]:
            assert torch.equal(state[mask], given.video[0][mask])
        assert torch.equal(way.video[:, -1], made.latents.video)
        # The other clip has none given: its tokens start as noise.
        assert torch.equal(way.video[1, 0], s.initial_noise(made.clip_keys, 0, 0).video[1])

    def test_a_stochastic_solver_without_noise_is_refused(self) -> None:
        with pytest.raises(OmniNFTError, match="noise_level above 0, found 0"):
            sampler(Needs(solver="sde"))
