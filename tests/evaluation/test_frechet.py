"""Set distances against closed forms and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from omninft.evaluation.frechet import frechet_audio_distance, frechet_distance, kernel_distance
from omninft.types import OmniNFTError


def exact_gaussian(rng: np.random.Generator, count: int, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Rows whose sample mean and covariance (1 / (n - 1)) are exactly these."""
    rows = rng.normal(size=(count, len(mean)))
    rows -= rows.mean(axis=0)
    rows = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T))).T
    return rows @ np.linalg.cholesky(covariance).T + mean


def test_frechet_of_gaussians_with_diagonal_covariances_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    means = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    deviations = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.5, 0.5])
    a, b = (exact_gaussian(rng, 40, m, np.diag(s**2)) for m, s in zip(means, deviations, strict=True))
    # |m - n|^2 + sum (s - t)^2 = 10 + (4 + 2.25)
    assert frechet_distance(a, b) == pytest.approx(16.25, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(16.25, rel=1e-10)


def test_frechet_equals_the_definition_with_a_matrix_root() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(size=(31, 6)) @ rng.normal(size=(6, 6)) + 1
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_with_fewer_clips_than_features_is_exact_and_never_negative() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(size=(5, 400))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a[::-1]) >= 0
    assert frechet_distance(a, a + 0.5) == pytest.approx(400 * 0.25, rel=1e-9)
    assert frechet_distance(a, 3 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(4 * a.var(0, ddof=1).sum(), rel=1e-9)


def test_kernel_distance_is_the_mean_over_pairs_of_different_rows() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(7, 4)), rng.normal(0.3, 1, size=(5, 4))

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 4 + 1) ** 3)

    within_a = np.mean([k(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    within_b = np.mean([k(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-12)


def test_kernel_distance_is_unbiased() -> None:
    rng = np.random.default_rng(4)
    same = [kernel_distance(rng.normal(size=(20, 3)), rng.normal(size=(20, 3))) for _ in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    assert min(same) < 0 < max(same)
    assert kernel_distance(rng.normal(size=(50, 3)), rng.normal(2, 1, size=(50, 3))) > 1


def test_audio_distance_sees_directions_only() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(30, 8)), rng.normal(0.5, 1, size=(30, 8))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    assert frechet_audio_distance(a, b) == pytest.approx(10_000 * frechet_distance(*unit), rel=1e-12)
    louder = a * rng.uniform(0.1, 10, size=(30, 1))
    assert frechet_audio_distance(louder, b) == pytest.approx(frechet_audio_distance(a, b), rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "at least 2 clips on each side, found 1 and 5"),
        (np.zeros((4, 3)), np.zeros((5, 2)), r"shapes \[4, 3\] and \[5, 2\]"),
        (np.full((4, 3), np.nan), np.zeros((5, 3)), "not finite"),
    ],
)
def test_what_cannot_be_compared(a: np.ndarray, b: np.ndarray, message: str) -> None:
    for distance in (frechet_distance, kernel_distance, frechet_audio_distance):
        with pytest.raises(OmniNFTError, match=message):
            distance(a, b)
    with pytest.raises(OmniNFTError, match="all zeros"):
        frechet_audio_distance(np.zeros((4, 3)), np.ones((4, 3)))
