"""One step of the sampler: along the flow, or drawn around it, with the likelihood of the draw.

The flow d x / d sigma = v, v = eps - x0 = (x - x0) / sigma, has a family of stochastic processes with its marginals
(Flow-GRPO, arXiv:2505.05470, section 4.2). With s = a sqrt(sigma / (1 - sigma)) and dt = sigma' - sigma < 0 its
Euler-Maruyama step from sigma to sigma' is

    mean = x (1 + s^2 / (2 sigma) dt) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt,    std = s sqrt(-dt).

At sigma = 1 the expression for s diverges; sigma' stands for sigma in it. At a = 0 the step is that of the flow. The
step to sigma' = 0 is never drawn: it would leave its noise in the clip, so samplers take the flow's, which has no
density, and nothing trains on it.

The process has the flow's marginals in continuous time. Near sigma = 1 its noise grows as fast as steps get small (the
first step's std is a sqrt(sigma')), so a grid from 1 keeps an excess of variance, about a^4 / 4 after the first step,
which the following steps wear off; see docs/methods/flow_grpo.md for how much is left.

Predictions come as x0, not v, because guidance acts there; whoever computes a step again gets the sampler's numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Schedules begin at 1 up to rounding.
ONE = 1 - 1e-6


def ode_step(latents: Tensor, clean: Tensor, sigma: Tensor, after: Tensor) -> Tensor:
    """Euler's step of the flow from `sigma` to `after`.

    Args:
        latents: [B, T, C] at `sigma`.
        clean: [B, T, C] predicted x0.
        sigma, after: noise levels in [0, 1], sigma > 0; scalars or [B, 1, 1].

    Returns:
        [B, T, C].
    """
    # d x / d sigma = v = (x - x0) / sigma
    return latents + (after - sigma) * (latents - clean) / sigma


def sde_step(latents: Tensor, clean: Tensor, sigma: Tensor, after: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the normal distribution that a stochastic step from `sigma` to `after` draws from.

    Args:
        latents: [B, T, C] at `sigma`.
        clean: [B, T, C] predicted x0.
        sigma, after: noise levels, 1 >= sigma > after > 0; float32 scalars or [B, 1, 1].
        noise_level: a of the formula at the head of this file, > 0.

    Returns:
        Mean [B, T, C] float32, and std of the shape of `sigma`.

    Raises:
        ValueError: levels or a noise level outside these ranges.
    """
    if noise_level <= 0 or not bool(((after > 0) & (after < sigma) & (sigma <= 1)).all()):
        raise ValueError(
            f"expected 1 >= sigma > after > 0 and noise_level > 0, found {sigma.flatten().tolist()}, "
            f"{after.flatten().tolist()} and {noise_level}"
        )
    level = torch.where(sigma > ONE, after, sigma)
    variance = noise_level**2 * level / (1 - level)  # s^2, per unit of sigma
    dt = after - sigma
    velocity = (latents.float() - clean.float()) / sigma
    mean = latents.float() * (1 + variance / (2 * sigma) * dt) + velocity * (
        (1 + variance * (1 - sigma) / (2 * sigma)) * dt
    )
    return mean, (variance * -dt).sqrt()


def step_log_prob(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of a drawn step, per token: log N(value; mean, std^2), mean over channels.

    A mean rather than a sum, so that its size depends on neither resolution nor length.

    Args:
        value, mean: [B, T, C].
        std: scalar or [B, 1, 1], > 0.

    Returns:
        [B, T] float32.
    """
    distance = ((value.float() - mean.float()) / std).square()
    constant = std.log() + 0.5 * math.log(2 * math.pi)
    return (-0.5 * distance - constant).mean(dim=2)
