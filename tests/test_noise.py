import numpy as np
import pytest
import torch

from omninft.noise import Occasion, Purpose, keyed_normal, noise_seed

KEYS = [("rain", 0), ("rain", 1), ("wind", 0), ("w\u00efnd", 3)]


def test_pinned_seed() -> None:
    # int(sha256('[0, 7, "rain", 3, "sample_video"]')[:16], 16) >> 1
    assert noise_seed(0, 7, "rain", 3, Purpose.SAMPLE_VIDEO) == 1808254319671574261
    assert noise_seed(np.int64(0), 7, "rain", np.int32(3), Purpose.SAMPLE_VIDEO) == 1808254319671574261


def test_pinned_values() -> None:
    # Not exact: vector units of different CPUs differ in the last bit.
    row = keyed_normal([("rain", 3)], (2, 16), 0, 7, Purpose.SAMPLE_VIDEO)[0]
    torch.testing.assert_close(
        row.flatten()[:4], torch.tensor([-1.68552935, -0.52260131, 0.29136074, -0.25557649]), rtol=0, atol=1e-6
    )


def test_any_part_of_the_key_changes_the_seed() -> None:
    seeds = {
        noise_seed(seed, iteration, prompt_id, sample, purpose)
        for seed in (0, 1, 12)
        for iteration in (0, 1, 2)
        for prompt_id in ("", "a", "1", '"', "a\\", '", 0, "')
        for sample in (0, 1, 3)
        for purpose in ("", "a", "1", '"')
    }
    assert len(seeds) == 3 * 3 * 6 * 3 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


def test_any_part_of_the_key_changes_the_noise() -> None:
    base = keyed_normal([("rain", 0)], (64,), 0, 0, Purpose.SAMPLE_VIDEO)
    others = [
        keyed_normal([("rain", 0)], (64,), 1, 0, Purpose.SAMPLE_VIDEO),
        keyed_normal([("rain", 0)], (64,), 0, 1, Purpose.SAMPLE_VIDEO),
        keyed_normal([("rains", 0)], (64,), 0, 0, Purpose.SAMPLE_VIDEO),
        keyed_normal([("rain", 1)], (64,), 0, 0, Purpose.SAMPLE_VIDEO),
        keyed_normal([("rain", 0)], (64,), 0, 0, Purpose.SAMPLE_AUDIO),
    ]
    for other in others:
        # Unrelated, not only unequal: a correlation of 64 independent pairs has a standard deviation of 1/8.
        assert abs(torch.corrcoef(torch.cat([base, other]))[0, 1]) < 0.5


@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (128, 6)])
def test_rows_depend_on_nothing_but_their_key(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    together = keyed_normal(KEYS, shape, 11, 5, Purpose.SAMPLE_VIDEO)
    assert together.shape == (4, *shape)
    assert together.dtype == torch.float32
    torch.manual_seed(1)
    global_state = torch.get_rng_state()
    alone = torch.cat([keyed_normal([key], shape, 11, 5, Purpose.SAMPLE_VIDEO) for key in KEYS])
    assert torch.equal(together, alone)
    assert torch.equal(together.flip(0), keyed_normal(KEYS[::-1], shape, 11, 5, Purpose.SAMPLE_VIDEO))
    assert torch.equal(together[1:3], keyed_normal(KEYS[1:3], shape, 11, 5, Purpose.SAMPLE_VIDEO))
    assert torch.equal(torch.get_rng_state(), global_state)


def test_no_keys_give_no_rows() -> None:
    assert keyed_normal([], (3, 2), 0, 0, Purpose.SAMPLE_VIDEO).shape == (0, 3, 2)


def test_noise_is_standard_normal() -> None:
    noise = keyed_normal([("rain", n) for n in range(200)], (1000,), 0, 0, Purpose.SAMPLE_VIDEO).double()
    # Standard errors for 200 000 draws: mean 0.0022, variance 0.0032, fourth moment 0.022.
    assert abs(noise.mean()) < 0.009
    assert abs(noise.var() - 1) < 0.013
    assert abs((noise**4).mean() - 3) < 0.09
    # Rows are independent: the mean of 200 rows has variance 1/200.
    assert abs(noise.mean(dim=0).var() * 200 - 1) < 0.18


def test_no_two_purposes_numbers_or_occasions_share_noise() -> None:
    draws = [
        keyed_normal([("rain", 0)], (8,), 0, occasion, purpose, number)
        for occasion in (0, 1, *Occasion)
        for purpose in Purpose
        for number in (None, 0, 1, 11)
    ]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == len(draws) == 7 * 7 * 4
    assert [int(o) for o in Occasion] == [-1, -2, -3, -4, -5]  # below every iteration
