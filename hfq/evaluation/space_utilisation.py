"""How well a cloud of vectors fills the box that a quantizer spans around it: a diagnostic for transforms.

The volume of the ellipsoid that holds most of a Gaussian cloud, over the volume of the smallest cube that holds that
ellipsoid. Rotations even out the sides, diagonal scales the variances; whitening does both and is the best.
"""

from __future__ import annotations

import math

import torch

from hfq.errors import DataError

__all__ = ["chi_square", "space_utilisation"]


def space_utilisation(x: torch.Tensor, alpha: float = 0.99) -> float:
    """The ``d``-th root of the share of the cube that the ellipsoid fills, between 0 and 1.

    With mean ``mu``, covariance ``S`` and ``c`` the ``alpha`` quantile of chi-square with ``d`` degrees of freedom, the
    ellipsoid has the volume ``pi^(d/2) / Gamma(d/2 + 1) * c^(d/2) * sqrt(det S)`` and the cube the side
    ``max_j(mu_j + sqrt(c S_jj)) - min_j(mu_j - sqrt(c S_jj))``.

    Args:
        x: ``[N, d]`` with more rows than columns; computed in float64.
        alpha: confidence, in (0, 1).

    Returns:
        0 if the cloud is flat in some direction.

    Raises:
        DataError: the shape or ``alpha`` is impossible, or an element is not finite.
    """
    if x.dim() != 2 or x.shape[0] <= x.shape[1] or not 0 < alpha < 1:
        raise DataError(f"space utilisation of {tuple(x.shape)} at alpha={alpha}: rows [N, d] with N > d, and alpha "
                        "between 0 and 1 are needed")
    rows = x.detach().double()
    if not torch.isfinite(rows).all():
        raise DataError("space utilisation of vectors with NaN or infinite elements")
    size, mean = rows.shape[1], rows.mean(0)
    cov = torch.cov(rows.t()).reshape(size, size)
    sign, log_det = torch.linalg.slogdet(cov)
    if float(sign) <= 0:
        return 0.0
    c = chi_square(alpha, size)
    log_volume = size / 2 * math.log(math.pi * c) - math.lgamma(size / 2 + 1) + 0.5 * float(log_det)
    reach = (c * torch.diagonal(cov)).sqrt()
    side = float((mean + reach).max() - (mean - reach).min())
    return math.exp(log_volume / size - math.log(side))


def chi_square(alpha: float, degrees: int) -> float:
    """The ``alpha`` quantile of the chi-square distribution, by bisection of the incomplete gamma function."""
    half = torch.tensor(degrees / 2, dtype=torch.float64)
    low, high = 0.0, 2.0 * degrees + 100.0
    while float(torch.special.gammainc(half, torch.tensor(high / 2, dtype=torch.float64))) < alpha:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if float(torch.special.gammainc(half, torch.tensor(middle / 2, dtype=torch.float64))) < alpha:
            low = middle
        else:
            high = middle
    return (low + high) / 2
