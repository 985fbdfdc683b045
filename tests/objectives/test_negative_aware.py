from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omninft.config import build_config
from omninft.credit.advantages import advantage_to_weight
from omninft.noise import Purpose, keyed_normal
from omninft.objectives.negative_aware import (
    NegativeAwareOptions,
    SigmasOptions,
    add_noise,
    branch_loss,
    policy_loss,
    predict_x0,
    reference_loss,
    training_sigmas,
)
from omninft.objectives.protocol import LossWeights, ObjectiveContext, Round
from omninft.types import (
    BranchAdvantages,
    Conditioning,
    Geometry,
    Latents,
    OmniNFTError,
    Prompt,
    PromptGroup,
    Rollout,
    TextContext,
    TokenWeights,
)

B, T, C = 5, 6, 3
ADVANTAGES = [-5.0, -1.0, 0.0, 1.0, 5.0]


def latents(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, old, step, reference = (torch.randn(B, T, C, generator=generator) for _ in range(4))
    return {"clean": clean, "old": clean + 0.5 * old, "current": clean + 0.5 * old + 0.3 * step, "reference": reference}


def masks(seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 1 + torch.rand(B, T, generator=generator), torch.rand(B, T, generator=generator) < 0.7


def error_weight(x, x0, keep):
    """max(mean |x - x0|, 1e-5) over the kept tokens, one number at a time."""
    errors = [abs(x[i][c] - x0[i][c]) for i in range(T) if keep[i] for c in range(C)]
    return max(sum(errors) / len(errors), 1e-5)


def expected_policy(cur, old, x0, advantage, omega, keep, beta=1.0, a=5.0, weights=None):
    """The loss of one clip in float64, token by token; `weights` freezes (w+, w-)."""
    plus = beta * cur + (1 - beta) * old
    minus = (1 + beta) * old - beta * cur
    w_plus, w_minus = weights or (error_weight(plus, x0, keep), error_weight(minus, x0, keep))
    r = min(max(min(max(advantage, -a), a) / a / 2 + 0.5, 0), 1)
    loss = norm = 0.0
    for i in range(T):
        if keep[i]:
            up = sum((plus[i][c] - x0[i][c]) ** 2 for c in range(C)) / C
            down = sum((minus[i][c] - x0[i][c]) ** 2 for c in range(C)) / C
            loss += omega[i] * (r * up / w_plus + (1 - r) * down / w_minus)
            norm += omega[i]
    return a / beta * loss / norm


@pytest.mark.parametrize(("beta", "clip"), [(1.0, 5.0), (0.3, 2.0)])
@pytest.mark.parametrize("with_masks", [False, True])
def test_policy_loss_and_its_gradient_match_the_definition(beta, clip, with_masks):
    data = latents()
    omega, keep = masks() if with_masks else (None, None)
    advantage = torch.tensor(ADVANTAGES)
    arrays = {k: v.double().numpy() for k, v in data.items()}
    omegas = np.ones((B, T)) if omega is None else omega.double().numpy()
    keeps = np.ones((B, T), bool) if keep is None else keep.numpy()
    for detach in (True, False):
        current = data["current"].clone().requires_grad_()
        options = NegativeAwareOptions(beta=beta, advantage_clip=clip, detach_weight=detach)
        loss = policy_loss(current, data["old"], data["clean"], advantage, omega, keep, options)
        assert loss.dtype == torch.float32
        loss.sum().backward()
        for b in range(B):
            cur, old, x0 = arrays["current"][b], arrays["old"][b], arrays["clean"][b]
            settings_ = (old, x0, ADVANTAGES[b], omegas[b], keeps[b], beta, clip)
            assert loss[b].item() == pytest.approx(expected_policy(cur, *settings_), rel=1e-5)
            frozen = (
                error_weight(beta * cur + (1 - beta) * old, x0, keeps[b]),
                error_weight((1 + beta) * old - beta * cur, x0, keeps[b]),
            )
            for i, c in [(0, 0), (2, 1), (5, 2)]:
                ends = []
                for step in (1e-6, -1e-6):
                    moved = cur.copy()
                    moved[i, c] += step
                    ends.append(expected_policy(moved, *settings_, weights=frozen if detach else None))
                numeric = (ends[0] - ends[1]) / 2e-6
                assert current.grad[b, i, c].item() == pytest.approx(numeric, rel=1e-3, abs=1e-5)


def test_detached_weights_leave_the_value_and_change_the_gradient():
    # For Gaussian errors e the gradient without detach is 2e/w - E[e^2]/w^2 sign(e), with w = E|e| = s sqrt(2/pi):
    # against 2e/w its norm is sqrt(pi/8) = 0.63 and its cosine sqrt(2/pi) = 0.80.
    current = torch.randn(1, 500, 100, generator=torch.Generator().manual_seed(0)).requires_grad_()
    clean, advantage = torch.zeros(1, 500, 100), torch.tensor([5.0])
    values, grads = [], []
    for detach in (True, False):
        loss = policy_loss(current, current, clean, advantage, options=NegativeAwareOptions(detach_weight=detach))
        values.append(loss.detach())
        grads.append(torch.autograd.grad(loss.sum(), current)[0].flatten())
    assert torch.equal(values[0], values[1])
    assert NegativeAwareOptions().detach_weight is True
    assert (grads[1].norm() / grads[0].norm()).item() == pytest.approx(math.sqrt(math.pi / 8), rel=0.02)
    assert torch.cosine_similarity(grads[0], grads[1], dim=0).item() == pytest.approx(math.sqrt(2 / math.pi), rel=0.02)


def test_on_policy_the_value_ignores_the_advantage_and_the_gradient_is_signed_by_it():
    data = latents()
    clean, old = data["clean"][:1].expand(B, -1, -1), data["old"][:1].expand(B, -1, -1)
    current = old.clone().requires_grad_()
    loss = policy_loss(current, old, clean, torch.tensor(ADVANTAGES))
    torch.testing.assert_close(loss, loss[:1].expand(B), rtol=1e-6, atol=0)
    assert loss[0] > 0
    loss.sum().backward()
    # a * d/dx [mean (x - x0)^2 / w] = 5 * 2 (x - x0) / (T C w), times 2r - 1 = A / 5
    error = (old[0] - clean[0]).double()
    positive = 5 * 2 * error / (T * C * error.abs().mean())
    for b, advantage in enumerate(ADVANTAGES):
        torch.testing.assert_close(current.grad[b].double(), advantage / 5 * positive, rtol=1e-5, atol=1e-7)
    norms = current.grad.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms / norms[-1], torch.tensor([1.0, 0.2, 0.0, 0.2, 1.0]), rtol=1e-5, atol=1e-6)


def test_descent_pulls_to_good_samples_and_away_from_bad_ones():
    data = latents()
    advantage = torch.tensor([5.0, 2.0, 0.5, -0.5, -5.0])
    current = data["old"].clone().requires_grad_()
    policy_loss(current, data["old"], data["clean"], advantage).sum().backward()
    moved = current.detach() - 0.05 * current.grad
    closer = ((data["old"] - data["clean"]).abs() - (moved - data["clean"]).abs()).mean(dim=(1, 2))
    assert closer.sign().tolist() == [1, 1, 1, -1, -1]
    assert closer[0] > closer[1] > closer[2]


def test_zero_advantage_pulls_a_moved_policy_back_to_the_old_one():
    data = latents()
    current = data["current"].clone().requires_grad_()
    policy_loss(current, data["old"], data["clean"], torch.zeros(B)).sum().backward()
    towards_old = ((data["old"] - data["current"]) * -current.grad).flatten(1).sum(1)
    assert (towards_old > 0).all()


def test_only_the_current_prediction_gets_gradient():
    data = {k: v.clone().requires_grad_() for k, v in latents().items()}
    got = branch_loss(
        current_x0=data["current"],
        old_x0=data["old"],
        clean_x0=data["clean"],
        reference_x0=data["reference"],
        sigma=torch.full((B,), 0.5),
        advantage=torch.tensor(ADVANTAGES),
        valid=torch.ones(B, dtype=torch.bool),
        num_valid=B,
    )
    got.loss.backward()
    assert data["current"].grad.abs().sum() > 0
    assert all(data[k].grad is None for k in ("old", "clean", "reference"))


def test_the_share_of_the_positive_term_is_the_credit_stages():
    data = latents()
    advantage = torch.tensor([-7.0, -2.5, 0.3, 4.0, 9.0])
    options = NegativeAwareOptions(advantage_clip=3.0)
    ends = [
        policy_loss(data["current"], data["old"], data["clean"], torch.full((B,), end), options=options)
        for end in (3.0, -3.0)
    ]
    r = advantage_to_weight(advantage, clip=3.0)
    got = policy_loss(data["current"], data["old"], data["clean"], advantage, options=options)
    torch.testing.assert_close(got, r * ends[0] + (1 - r) * ends[1])
    assert not torch.allclose(ends[0], ends[1], rtol=0.05)


def test_a_perfect_prediction_is_weighted_by_the_floor():
    clean = torch.zeros(1, T, C)
    tiny = torch.full((1, T, C), 2e-6)
    loss = policy_loss(tiny, tiny, clean, torch.tensor([5.0]))
    assert loss.item() == pytest.approx(5 * 4e-12 / 1e-5, rel=1e-5)
    assert policy_loss(clean, clean, clean, torch.tensor([5.0])).item() == 0.0


def test_weights_are_reduced_in_float64():
    current = torch.randn(32, 1, 3001, generator=torch.Generator().manual_seed(0)).exp()
    clean = torch.zeros_like(current)
    error = np.abs(current.numpy().astype(np.float64)).mean((1, 2)).astype(np.float32)
    got = policy_loss(current, current, clean, torch.full((32,), 5.0))
    assert torch.equal(got, 5 * (current.square().mean(2)[:, 0] / torch.from_numpy(error)))
    assert not torch.equal(current.abs().mean((1, 2)), torch.from_numpy(error))  # float32 would show


def test_masked_tokens_change_nothing():
    data = latents()
    omega, keep = masks()
    advantage = torch.tensor(ADVANTAGES)
    sigma = torch.full((B, T), 0.5)
    sigma[~keep] = 0.0
    first = policy_loss(data["current"], data["old"], data["clean"], advantage, omega, keep)
    regular = {s: reference_loss(data["current"], data["reference"], sigma, s, keep) for s in ("x0", "velocity")}
    current = torch.where(keep[..., None], data["current"], 100.0).requires_grad_()
    second = policy_loss(current, data["old"], data["clean"], advantage, torch.where(keep, omega, 7.0), keep)
    assert torch.equal(first, second)
    total = second.sum()
    for space, expected in regular.items():
        got = reference_loss(current, data["reference"], sigma, space, keep)
        assert torch.equal(got, expected)
        total = total + got.sum()
    total.backward()
    assert (current.grad[~keep] == 0).all()
    assert (current.grad[keep] != 0).any()
    gone = torch.zeros(B, T, dtype=torch.bool)
    assert policy_loss(data["current"], data["old"], data["clean"], advantage, omega, gone).tolist() == [0.0] * B


def test_omega_is_normalised_and_shifts_the_weight():
    data = latents()
    advantage = torch.tensor(ADVANTAGES)
    plain = policy_loss(data["current"], data["old"], data["clean"], advantage)
    even = policy_loss(data["current"], data["old"], data["clean"], advantage, torch.full((B, T), 3.0))
    torch.testing.assert_close(plain, even)
    one_token = torch.zeros(B, T)
    one_token[:, 4] = 2.0
    parts = []
    for token in range(T):
        one = torch.zeros(B, T)
        one[:, token] = 1.0
        parts.append(policy_loss(data["current"], data["old"], data["clean"], advantage, one))
    torch.testing.assert_close(policy_loss(data["current"], data["old"], data["clean"], advantage, one_token), parts[4])
    torch.testing.assert_close(torch.stack(parts).mean(0), plain)
    assert not torch.allclose(parts[4], plain, rtol=0.05)


@pytest.mark.parametrize("per_token", [False, True])
def test_noise_and_prediction_invert_each_other(per_token):
    data = latents()
    sigma = torch.linspace(0, 1, B)
    if per_token:
        sigma = torch.linspace(0, 1, B * T).reshape(B, T)
    level = sigma.numpy().reshape(B, -1, 1)
    clean, noise = data["clean"], data["reference"]
    noisy = add_noise(clean, noise, sigma)
    np.testing.assert_allclose(noisy.numpy(), clean.numpy() + level * (noise - clean).numpy(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(predict_x0(noisy, noise - clean, sigma), clean, rtol=1e-5, atol=1e-6)
    wrong = data["old"]
    np.testing.assert_allclose(
        predict_x0(noisy, wrong, sigma).numpy(), noisy.numpy() - level * wrong.numpy(), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="does not fit"):
        predict_x0(noisy, wrong, sigma[:2])


def test_everything_is_float32_under_bf16_inputs():
    data = {k: v.bfloat16() for k, v in latents().items()}
    sigma = torch.full((B,), 0.3)
    assert add_noise(data["clean"], data["old"], sigma).dtype == torch.float32
    x0 = predict_x0(data["clean"], data["old"], sigma)
    torch.testing.assert_close(x0, data["clean"].float() - sigma[0] * data["old"].float(), rtol=0, atol=0)
    wide = {k: v.float() for k, v in data.items()}
    for inputs in (data, wide):
        inputs["loss"] = policy_loss(inputs["current"], inputs["old"], inputs["clean"], torch.tensor(ADVANTAGES))
        inputs["pull"] = reference_loss(inputs["current"], inputs["reference"], sigma)
    assert data["loss"].dtype == data["pull"].dtype == torch.float32
    assert torch.equal(data["loss"], wide["loss"])
    assert torch.equal(data["pull"], wide["pull"])


@pytest.mark.parametrize("per_token", [False, True])
def test_reference_loss_in_both_spaces(per_token):
    data = latents()
    generator = torch.Generator().manual_seed(9)
    sigma = 0.1 + 0.9 * torch.rand((B, T) if per_token else (B,), generator=generator)
    noisy = add_noise(data["clean"], data["old"], sigma)
    velocities = [torch.randn(B, T, C, generator=generator) for _ in range(2)]
    current, reference = (predict_x0(noisy, v, sigma) for v in velocities)
    got = reference_loss(current, reference, sigma, "velocity")
    np.testing.assert_allclose(
        got.numpy(), ((velocities[0] - velocities[1]).double().numpy() ** 2).mean((1, 2)), rtol=1e-4
    )
    got = reference_loss(current, reference, sigma, "x0")
    np.testing.assert_allclose(got.numpy(), ((current - reference).double().numpy() ** 2).mean((1, 2)), rtol=1e-5)


def test_reference_loss_at_sigma_zero_has_no_velocity():
    data = latents()
    current = data["current"].clone().requires_grad_()
    sigma = torch.full((B, T), 0.5)
    sigma[:, 0] = 0.0
    got = reference_loss(current, data["reference"], sigma, "velocity")
    difference = (data["current"] - data["reference"]).double().numpy()[:, 1:] / 0.5
    np.testing.assert_allclose(got.detach().numpy(), (difference**2).sum((1, 2)) / (T * C), rtol=1e-5)
    got.sum().backward()
    assert (current.grad[:, 0] == 0).all()
    assert torch.isfinite(current.grad).all()


def branch_of(data, rows, num_valid, valid, options, omega, keep):
    return branch_loss(
        current_x0=data["current"][rows],
        old_x0=data["old"][rows],
        clean_x0=data["clean"][rows],
        reference_x0=data["reference"][rows],
        sigma=torch.linspace(0.2, 1, B)[rows],
        advantage=torch.tensor(ADVANTAGES)[rows],
        valid=valid[rows],
        num_valid=num_valid,
        omega=omega[rows],
        token_mask=keep[rows],
        options=options,
    )


def test_branch_loss_adds_policy_and_reference_over_valid_clips():
    data, (omega, keep) = latents(), masks()
    valid = torch.tensor([True, False, True, True, False])
    options = NegativeAwareOptions(reference_weight=0.25, reference_space="velocity")
    everything = slice(None)
    got = branch_of(data, everything, 3, valid, options, omega, keep)
    policy = policy_loss(data["current"], data["old"], data["clean"], torch.tensor(ADVANTAGES), omega, keep, options)
    pull = reference_loss(data["current"], data["reference"], torch.linspace(0.2, 1, B), "velocity", keep)
    assert got.loss.item() == pytest.approx(sum(policy[b] + 0.25 * pull[b] for b in (0, 2, 3)).item() / 3, rel=1e-6)
    assert torch.equal(got.parts["loss"], policy)
    assert torch.equal(got.parts["reference"], pull)
    assert torch.equal(got.valid, valid)
    assert NegativeAwareOptions().reference_weight == 1e-4


def test_clips_that_are_not_valid_get_no_gradient():
    data, (omega, keep) = latents(), masks()
    data["current"].requires_grad_()
    valid = torch.tensor([True, False, True, True, False])
    got = branch_of(data, slice(None), 3, valid, NegativeAwareOptions(), omega, keep)
    got.loss.backward()
    touched = data["current"].grad.flatten(1).abs().sum(1) > 0
    assert torch.equal(touched, valid)
    assert not (got.parts["loss"].requires_grad)
    assert not (got.parts["reference"].requires_grad)
    data["current"].grad = None
    none = branch_of(data, slice(None), 0, torch.zeros(B, dtype=torch.bool), NegativeAwareOptions(), omega, keep)
    none.loss.backward()
    assert none.loss.item() == 0
    assert (data["current"].grad == 0).all()
    with pytest.raises(ValueError, match="num_valid is 0 although"):
        branch_of(data, slice(None), 0, valid, NegativeAwareOptions(), omega, keep)


@settings(max_examples=30, deadline=None)
@given(
    valid=st.lists(st.booleans(), min_size=B, max_size=B).filter(any),
    cut=st.integers(1, B - 1),
    num_sigmas=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_micro_batches_add_up_to_the_full_batch(valid, cut, num_sigmas, seed):
    data, (omega, keep) = latents(seed), masks(seed)
    keep[:, 0] = True
    data["current"].requires_grad_()
    mask = torch.tensor(valid)
    denominator = sum(valid) * num_sigmas
    options = NegativeAwareOptions(reference_weight=0.1)
    full = branch_of(data, slice(None), denominator, mask, options, omega, keep)
    (whole,) = torch.autograd.grad(full.loss, data["current"])
    parts = [branch_of(data, rows, denominator, mask, options, omega, keep) for rows in (slice(0, cut), slice(cut, B))]
    (summed,) = torch.autograd.grad(parts[0].loss + parts[1].loss, data["current"])
    # Not to the bit: the order in which a clip's errors are summed may follow the number of clips.
    torch.testing.assert_close(summed, whole, rtol=1e-5, atol=1e-7)
    assert math.isclose((parts[0].loss + parts[1].loss).item(), full.loss.item(), rel_tol=1e-6)
    parted = torch.cat([p.parts["loss"] for p in parts])
    torch.testing.assert_close(parted, full.parts["loss"], rtol=1e-6, atol=0)
    mean = full.parts["loss"][mask].double().mean() + 0.1 * full.parts["reference"][mask].double().mean()
    assert math.isclose(full.loss.item() * num_sigmas, mean.item(), rel_tol=1e-5)


def test_without_a_reference():
    data = latents()
    arguments = {
        "current_x0": data["current"],
        "old_x0": data["old"],
        "clean_x0": data["clean"],
        "reference_x0": None,
        "sigma": torch.full((B,), 0.5),
        "advantage": torch.tensor(ADVANTAGES),
        "valid": torch.ones(B, dtype=torch.bool),
        "num_valid": B,
    }
    got = branch_loss(**arguments, options=NegativeAwareOptions(reference_weight=0.0))
    assert got.loss.item() == pytest.approx(got.parts["loss"].mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match="reference_x0 is missing"):
        branch_loss(**arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta", 0.0),
        ("beta", float("nan")),
        ("advantage_clip", -1.0),
        ("reference_weight", -1e-4),
        ("reference_space", "eps"),
    ],
)
def test_options_name_the_field_they_refuse(field, value):
    with pytest.raises(OmniNFTError, match=rf"objective\.{field}: .*found"):
        build_config({"objective": {field: value}})


def test_shapes_that_would_broadcast_are_refused():
    data = latents()
    advantage = torch.tensor(ADVANTAGES)
    with pytest.raises(ValueError, match="expected three"):
        policy_loss(data["current"], data["old"][:1], data["clean"], advantage)
    with pytest.raises(ValueError, match="expected three"):
        policy_loss(data["current"], data["old"], data["clean"], advantage[:1])
    with pytest.raises(ValueError, match="omega"):
        policy_loss(data["current"], data["old"], data["clean"], advantage, torch.ones(B, 1))
    with pytest.raises(ValueError, match="token_mask"):
        policy_loss(data["current"], data["old"], data["clean"], advantage, None, torch.ones(T, dtype=torch.bool))
    with pytest.raises(ValueError, match="differ"):
        reference_loss(data["current"], data["reference"][:1], torch.ones(B))
    with pytest.raises(ValueError, match="space is 'eps'"):
        reference_loss(data["current"], data["reference"], torch.ones(B), "eps")
    with pytest.raises(ValueError, match="valid"):
        branch_of(data, slice(None), 1, torch.ones(1, dtype=torch.bool), NegativeAwareOptions(), *masks())


SCHEDULE = torch.linspace(1, 0, 21)


def test_the_reference_trains_on_the_noisiest_40_percent() -> None:
    assert training_sigmas(SigmasOptions(), SCHEDULE) == pytest.approx([1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65])


def test_spread_sigmas_start_at_the_noisiest_and_cover_the_schedule() -> None:
    assert training_sigmas(SigmasOptions(choice="spread", count=4), SCHEDULE) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert training_sigmas(SigmasOptions(choice="list", values=(0.3, 0.9)), SCHEDULE) == [0.3, 0.9]


def test_each_branch_is_given_what_is_its_own() -> None:
    g = Geometry(9, 32, 32, 12.0, 2, 1, 3, 4, 5, 2, 16000)
    generator = torch.Generator().manual_seed(0)

    def random() -> Latents:
        return Latents(*(torch.randn(4, *size, generator=generator) for size in ((6, 4), (5, 2))))

    clean, velocities = random(), {name: random() for name in ("current", "old", "reference")}
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:3, :3] = True
    prompts = tuple(PromptGroup(Prompt(name, "v", "a", "av"), (0, 1)) for name in ("rain", "bell"))
    nothing = TextContext(torch.zeros(4, 1, 1), torch.zeros(4, 1, 1), torch.ones(4, 1))
    rollout = Rollout(prompts, clean, nothing, Conditioning(clean.video, mask), {})
    options = NegativeAwareOptions(reference_weight=0.3, reference_space="velocity")
    objective = options.build(ObjectiveContext(g, 11))
    prepared = objective.prepare(rollout, Round(2, 0.5), 7, lambda name, noisy, sigma: velocities[name])
    advantages = BranchAdvantages(
        torch.tensor([3.0, -1.0, 2.0, 4.0]),
        torch.tensor([-2.0, 5.0, 1.0, 0.5]),
        torch.tensor([True, False, True, True]),
        torch.tensor([True, True, True, False]),
    )
    omega = torch.rand(4, 6, generator=generator) * ~mask
    sound = torch.rand(4, 5, generator=generator)
    made = objective.loss(velocities["current"], prepared, LossWeights(advantages, TokenWeights(omega, sound), (7, 9)))
    sigma = torch.full((4,), 0.5)
    levels, keep = {"video": 0.5 * ~mask, "audio": sigma[:, None].expand(4, 5)}, {"video": ~mask, "audio": None}
    for branch, purpose, num_valid, weights, loss in (
        ("video", Purpose.TRAIN_VIDEO, 7, omega, made[0]),
        ("audio", Purpose.TRAIN_AUDIO, 9, sound, made[1]),
    ):
        x0, level = getattr(clean, branch), levels[branch][..., None]
        noise = keyed_normal(rollout.clip_keys, tuple(x0.shape[1:]), 11, 7, purpose, 2)  # of seed, iteration and round
        noisy = (1 - level) * x0 + level * noise
        predicted = {name: noisy - level * getattr(v, branch) for name, v in velocities.items()}
        expected = branch_loss(
            current_x0=predicted["current"],
            old_x0=predicted["old"],
            clean_x0=x0,
            reference_x0=predicted["reference"],
            sigma=levels[branch],
            advantage=getattr(advantages, branch),
            valid=getattr(advantages, f"{branch}_valid"),
            num_valid=num_valid,
            omega=weights,
            token_mask=keep[branch],
            options=options,
        )
        assert float(loss.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        for key, value in expected.parts.items():
            torch.testing.assert_close(loss.parts[key], value, msg=f"{branch} {key}")


def test_the_reference_term_on_some_rounds_is_unbiased() -> None:
    g = Geometry(9, 32, 32, 12.0, 2, 1, 3, 4, 5, 2, 16000)
    sigmas = SigmasOptions(choice="spread", count=4)
    objective = NegativeAwareOptions(reference_share=0.25, sigmas=sigmas).build(ObjectiveContext(g, 3))
    rounds = objective.rounds(SCHEDULE)
    scales = torch.tensor([[objective.reference_scale(r, i) for r in rounds] for i in range(2000)])
    assert ((scales == 4).sum(dim=1) == 1).all()  # one round of four, with the weight of four
    torch.testing.assert_close(scales.mean(dim=0), torch.ones(4), atol=4 * (3 / 2000) ** 0.5, rtol=0)  # 4 deviations
    assert torch.equal(scales[7], torch.tensor([objective.reference_scale(r, 7) for r in rounds]))
    other = NegativeAwareOptions(reference_share=0.25, sigmas=sigmas).build(ObjectiveContext(g, 4))
    other.rounds(SCHEDULE)
    assert [other.reference_scale(r, i) for i in range(20) for r in rounds] != scales[:20].flatten().tolist()
    half = NegativeAwareOptions(reference_share=0.5, sigmas=sigmas).build(ObjectiveContext(g, 3))
    half.rounds(SCHEDULE)
    assert sorted(half.reference_scale(r, 0) for r in rounds) == [0, 0, 2, 2]
    whole = NegativeAwareOptions(sigmas=sigmas).build(ObjectiveContext(g, 3))
    assert [whole.reference_scale(r, 0) for r in rounds] == [1, 1, 1, 1]


def test_a_scaled_reference_term_counts_so_much_more_and_none_is_not_asked_for() -> None:
    current, old, clean, reference = (
        torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)
    )
    given = dict(
        current_x0=current, old_x0=old, clean_x0=clean, sigma=torch.full((2,), 0.5), advantage=torch.ones(2),
        valid=torch.ones(2, dtype=torch.bool), num_valid=2, options=NegativeAwareOptions(reference_weight=0.3),
    )  # fmt: skip
    none, one, four = (
        branch_loss(reference_x0=reference if scale else None, reference_scale=scale, **given)  # type: ignore[arg-type]
        for scale in (0.0, 1.0, 4.0)
    )
    assert float(four.loss - none.loss) == pytest.approx(4 * float(one.loss - none.loss), rel=1e-5)
    torch.testing.assert_close(four.parts["reference"], 4 * one.parts["reference"])
    assert not none.parts["reference"].any()
