"""Distances between two sets of features: Frechet (FVD, FAD) and the kernel distance (KVD).

Heusel et al. 2017 (Frechet inception distance), Binkowski et al. 2018 (kernel inception distance). Rows are clips,
columns features: [n, D] and [m, D].
"""

from __future__ import annotations

import numpy as np

from omninft.types import OmniNFTError

AUDIO_SCALE = 10_000.0  # JavisBench's unit of FAD


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), covariances with 1 / (n - 1); at least 0.

    The eigenvalues of S_a S_b are the squared singular values of R_a R_b^T, where R are the triangular factors of the
    centred features: no product of covariances is formed, whose root would lose half of the digits.

    Raises:
        OmniNFTError: fewer than two rows, different widths, or values that are not finite.
    """
    a, b = _checked(a, b)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    root_a = np.linalg.qr(a - mean_a, mode="r") / np.sqrt(len(a) - 1)
    root_b = np.linalg.qr(b - mean_b, mode="r") / np.sqrt(len(b) - 1)
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = np.square(mean_a - mean_b).sum() + np.square(root_a).sum() + np.square(root_b).sum() - 2 * cross
    return max(float(distance), 0.0)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased MMD^2 with the kernel (x y / D + 1)^3; around 0 (also below) for sets of one distribution.

    Raises:
        OmniNFTError: as `frechet_distance`.
    """
    a, b = _checked(a, b)
    width = a.shape[1]

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray((x @ y.T / width + 1) ** 3)

    def within(x: np.ndarray) -> float:
        matrix = kernel(x, x)
        return float((matrix.sum() - np.trace(matrix)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def frechet_audio_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of features brought to length 1, times AUDIO_SCALE.

    Raises:
        OmniNFTError: as `frechet_distance`, or a row of zeros.
    """
    a, b = _checked(a, b)
    lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    if min(length.min() for length in lengths) == 0:
        raise OmniNFTError("a row of sound features is all zeros and has no direction")
    return AUDIO_SCALE * frechet_distance(a / lengths[0], b / lengths[1])


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise OmniNFTError(f"features have shapes {list(a.shape)} and {list(b.shape)}, expected [n, D] and [m, D]")
    if min(len(a), len(b)) < 2:
        raise OmniNFTError(f"needs features of at least 2 clips on each side, found {len(a)} and {len(b)}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise OmniNFTError("features hold values that are not finite")
    return a, b
