"""Where learned rotations start: eigenvectors of a covariance (KLT), alone or times a Hadamard matrix.

Eigenvectors times a Hadamard matrix with random signs spread the variance evenly: the rotated covariance has the same
number all along its diagonal. Every function takes rows ``[N, d]`` or a covariance ``[d, d]`` and works in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from hfq.errors import ConfigError
from hfq.kernels import hadamard

__all__ = [
    "covariance", "eigenbasis", "even_basis", "keep_ones", "ones_basis", "random_hadamard", "random_orthogonal",
    "start",
]  # fmt: skip


def covariance(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Covariance ``[d, d]`` (float64, on the CPU) of all rows of several matrices ``[N_i, d]``, column means removed.

    Raises:
        ConfigError: there are no rows.
    """
    total: torch.Tensor | None = None
    products, count = torch.zeros(()), 0
    for part in parts:
        rows = part.detach().to("cpu", torch.float64)
        if total is None:
            width = rows.shape[1]
            total = torch.zeros(width, dtype=torch.float64)
            products = torch.zeros(width, width, dtype=torch.float64)
        total, products, count = total + rows.sum(0), products + rows.t() @ rows, count + rows.shape[0]
    if total is None or not count:
        raise ConfigError("a covariance needs at least one row")
    mean = total / count
    return products / count - torch.outer(mean, mean)


def eigenbasis(cov: torch.Tensor) -> torch.Tensor:
    """Orthonormal eigenvectors of ``cov`` in columns, largest variance first (Karhunen-Loeve transform)."""
    vectors = torch.linalg.eigh(cov.double()).eigenvectors.flip(-1)
    # The sign of an eigenvector is the library's choice: make its largest element positive.
    largest = vectors.abs().argmax(-2, keepdim=True)
    return vectors * torch.sign(torch.gather(vectors, -2, largest))


def random_orthogonal(size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Uniformly distributed orthogonal ``[size, size]``, float64."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * torch.sign(torch.diagonal(r))


def random_hadamard(size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Random signs, then a normalised Hadamard matrix, float64; uniformly random where no order exists.

    The signs come first: behind the matrix they would leave the sum of all inputs, its first column, as it is, and with
    it the outlier of inputs that agree in sign.
    """
    if not hadamard.is_order(size):
        return random_orthogonal(size, generator)
    signs = hadamard.random_signs(size, generator).double()
    return signs[:, None] * hadamard.hadamard(size).double() / math.sqrt(size)


def even_basis(cov: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Eigenvectors times a random-sign Hadamard matrix: ``R^T cov R`` has the diagonal ``tr(cov) / d`` everywhere.

    Where no Hadamard matrix of the order exists, eigenvectors times a random orthogonal matrix.
    """
    return eigenbasis(cov) @ random_hadamard(cov.shape[-1], generator)


def start(kind: str, size: int, cov: torch.Tensor | None, generator: torch.Generator | None = None) -> torch.Tensor:
    """The rotation ``[size, size]`` of a kind.

    Args:
        kind: "womi" (:func:`even_basis`), "klt" (:func:`eigenbasis`), "hadamard", "random", or "identity".
        cov: of what will be rotated; needed for the first two.

    Raises:
        ConfigError: the kind is unknown, or needs a covariance.
    """
    if kind in ("womi", "klt"):
        if cov is None:
            raise ConfigError(f"a rotation that starts with {kind!r} needs a covariance")
        return even_basis(cov, generator) if kind == "womi" else eigenbasis(cov)
    made = {"hadamard": random_hadamard, "random": random_orthogonal}.get(kind)
    if made is not None:
        return made(size, generator)
    if kind != "identity":
        raise ConfigError(f"a rotation that starts with {kind!r}: womi, klt, hadamard, random or identity")
    return torch.eye(size, dtype=torch.float64)


def keep_ones(rotation: torch.Tensor) -> torch.Tensor:
    """``rotation`` followed by the reflection that brings the image of the ones vector back to it (``1 Q = 1``)."""
    ones = torch.ones(rotation.shape[0], dtype=rotation.dtype)
    w = ones @ rotation - ones
    if float(w @ w) < 1e-12:
        return rotation
    return rotation - 2 * torch.outer(rotation @ w, w) / (w @ w)


def ones_basis(size: int) -> torch.Tensor:
    """A symmetric orthogonal ``[size, size]`` (float64) whose first column is the normalised ones vector.

    ``B diag(1, Q) B`` with any orthogonal ``Q`` ``[size - 1, size - 1]`` fixes the ones vector.
    """
    w = torch.full((size,), 1 / math.sqrt(size), dtype=torch.float64)
    w[0] -= 1
    basis = torch.eye(size, dtype=torch.float64)
    return basis - 2 * torch.outer(w, w) / (w @ w) if float(w @ w) > 1e-12 else basis
