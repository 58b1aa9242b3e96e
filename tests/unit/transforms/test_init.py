"""Where rotations start: covariances, eigenvectors, even diagonals, and the ones vector."""

from __future__ import annotations

import pytest
import torch

from hfq.errors import ConfigError
from hfq.transforms import init
from hfq.transforms.manifold import orthogonality_error


def anisotropic(size: int, rows: int = 400) -> torch.Tensor:
    scales = torch.logspace(0, 1.5, size, dtype=torch.float64)
    return torch.randn(rows, size, dtype=torch.float64) * scales @ init.random_orthogonal(size) + 3


def test_covariance_of_parts_is_that_of_all_rows() -> None:
    x = anisotropic(12)
    found = init.covariance(x.split([100, 1, 299]))
    torch.testing.assert_close(found, torch.cov(x.t(), correction=0))
    with pytest.raises(ConfigError, match="row"):
        init.covariance([])


@pytest.mark.parametrize("size", [12, 64, 192])
def test_the_even_basis_has_a_constant_diagonal(size: int) -> None:
    cov = init.covariance([anisotropic(size)])
    q = init.even_basis(cov, torch.Generator().manual_seed(0))
    diagonal = torch.diagonal(q.T @ cov @ q)
    assert orthogonality_error(q) < 1e-12
    torch.testing.assert_close(diagonal, torch.full_like(diagonal, float(torch.trace(cov)) / size), rtol=1e-9, atol=0)
    # Neither of its two factors does that alone.
    for other in (init.eigenbasis(cov), init.random_hadamard(size)):
        uneven = torch.diagonal(other.T @ cov @ other)
        assert float(uneven.max() / uneven.min()) > 1.2


@pytest.mark.parametrize("kind", ["womi", "hadamard"])
def test_inputs_that_agree_in_sign_are_no_outlier(kind: str) -> None:
    """Signs behind the Hadamard matrix would leave the whole length of such an input in one channel."""
    size = 64
    cov = init.covariance([anisotropic(size)])
    basis = init.eigenbasis(cov) if kind == "womi" else torch.eye(size, dtype=torch.float64)
    for seed in range(8):
        turned = (basis @ torch.ones(size, dtype=torch.float64)) @ init.start(
            kind, size, cov, torch.Generator().manual_seed(seed))
        assert float(turned.abs().max()) < 0.6 * float(turned.norm())


def test_the_eigenbasis_sorts_the_variance() -> None:
    cov = init.covariance([anisotropic(10)])
    q = init.eigenbasis(cov)
    turned = q.T @ cov @ q
    assert (turned - torch.diag(torch.diagonal(turned))).abs().max() < 1e-9 * turned.abs().max()
    assert (torch.diagonal(turned).diff() <= 0).all()


@pytest.mark.parametrize("kind", ["womi", "klt", "hadamard", "random", "identity"])
@pytest.mark.parametrize("size", [36, 22])  # an order with and one without a Hadamard matrix
def test_every_start_is_orthogonal_and_follows_the_seed(kind: str, size: int) -> None:
    cov = init.covariance([anisotropic(size)])
    first, second, other = (init.start(kind, size, cov, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert orthogonality_error(first) < 1e-12 and torch.equal(first, second)
    assert torch.equal(first, other) == (kind in ("klt", "identity"))


def test_starts_are_checked() -> None:
    with pytest.raises(ConfigError, match="covariance"):
        init.start("womi", 8, None)
    with pytest.raises(ConfigError, match="womi, klt"):
        init.start("hadamrd", 8, None)


def test_the_ones_vector_stays() -> None:
    ones = torch.ones(12, dtype=torch.float64)
    q = init.keep_ones(init.random_orthogonal(12))
    torch.testing.assert_close(ones @ q, ones)
    assert orthogonality_error(q) < 1e-12
    basis = init.ones_basis(12)
    torch.testing.assert_close(basis[:, 0], ones / 12**0.5)
    torch.testing.assert_close(basis, basis.T)
    assert orthogonality_error(basis) < 1e-12
