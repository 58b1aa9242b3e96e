"""How good drawn pictures are: distance to real ones as sets, to the float model's one by one, and what they show.

Sets are compared in the features of a network that knows the pictures (Heusel et al. 2017, arXiv 1706.08500; Binkowski
et al. 2018, arXiv 1801.01401). Numbers of different networks, or of sets of different sizes, cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfq.errors import DataError

__all__ = ["Drawn", "Generation", "feature_distance", "frechet", "generation", "kernel_distance", "psnr"]

PSNR_LIMIT = 100.0  # equal pictures, in dB


@dataclass(frozen=True)
class Drawn:
    """Pictures and what a network sees in them.

    Attributes:
        pictures: float ``[N, C, H, W]`` in [0, 1].
        logits: classes ``[N, K]``.
        maps: feature maps ``[N, C, H, W]`` of some depths.
        features: of the whole picture, ``[N, D]``.
    """

    pictures: Tensor
    logits: Tensor
    maps: Sequence[Tensor]
    features: Tensor


@dataclass(frozen=True)
class Generation:
    """Numbers of one set of pictures.

    Attributes:
        pictures: how many there were.
        fid: Frechet distance to the real pictures' features.
        kid: squared kernel distance to them (unbiased: it can be slightly negative).
        accuracy: share whose class is the one asked for, or any class that is allowed where nothing was asked.
        psnr: mean over pictures to the float model's of the same seed, in dB; ``None`` without a reference, as the
            next.
        feature_distance: mean over pictures; see :func:`feature_distance`.
    """

    pictures: int
    fid: float
    kid: float
    accuracy: float
    psnr: float | None = None
    feature_distance: float | None = None


def generation(drawn: Drawn, real: Tensor, targets: Tensor | int, reference: Drawn | None = None) -> Generation:
    """All numbers of a set of pictures.

    Args:
        real: features of real pictures ``[M, D]``.
        targets: the class asked for of each picture, int64 ``[N]``; or one number that is no right answer, where
            nothing was asked.
        reference: what the float model drew from the same seeds.

    Raises:
        DataError: sizes that do not fit, too few pictures, or numbers that are not finite.
    """
    _check(drawn)
    answers = drawn.logits.argmax(-1)
    if isinstance(targets, Tensor) and targets.shape != answers.shape:
        raise DataError(f"{len(targets)} targets for {len(answers)} pictures: one a picture is needed")
    right = answers == targets if isinstance(targets, Tensor) else answers != targets
    pair: dict[str, float] = {}
    if reference is not None:
        pair["psnr"] = float(psnr(drawn.pictures, reference.pictures).mean())
        pair["feature_distance"] = float(feature_distance(drawn.maps, reference.maps).mean())
    return Generation(len(answers), frechet(drawn.features, real), kernel_distance(drawn.features, real),
                      float(right.double().mean()), **pair)


def frechet(one: Tensor, other: Tensor) -> float:
    """Frechet distance of the normal distributions with the moments of two sets of features (FID).

    Args:
        one, other: ``[N, D]`` and ``[M, D]``. With fewer than ``D`` rows the covariance is singular, and the distance
            is biased upwards; it is defined all the same.

    Raises:
        DataError: sizes that do not fit, or fewer than two rows.
    """
    one, other = _pair(one, other)
    root = _root(torch.cov(one.T).reshape(one.shape[1], -1))
    covariance = torch.cov(other.T).reshape(one.shape[1], -1)
    # The trace of the root of S1 S2 is that of (S1^1/2 S2 S1^1/2)^1/2, which is symmetric.
    cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp_min(0).sqrt().sum()
    spread = root.square().sum() + covariance.trace() - 2 * cross
    return max(0.0, float((one.mean(0) - other.mean(0)).square().sum() + spread))


def kernel_distance(one: Tensor, other: Tensor, *, subsets: int = 50, size: int = 250, seed: int = 0) -> float:
    """Squared maximum mean discrepancy with the kernel ``(x.y / D + 1)^3``, unbiased, mean over subsets (KID).

    Args:
        one, other: ``[N, D]`` and ``[M, D]``.
        subsets: how many are drawn.
        size: of each; fewer where a set is smaller.

    Raises:
        DataError: sizes that do not fit, or fewer than two rows.
    """
    one, other = _pair(one, other)
    size = min(size, len(one), len(other))
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(subsets):
        x = one[torch.randperm(len(one), generator=generator)[:size]]
        y = other[torch.randperm(len(other), generator=generator)[:size]]
        inside = sum((_kernel(z, z).sum() - _kernel(z, z).trace()) / (size * (size - 1)) for z in (x, y))
        total += float(inside - 2 * _kernel(x, y).mean())
    return total / subsets


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio ``[N]`` in dB of pictures in [0, 1]; equal pictures have 100.

    Raises:
        DataError: shapes that differ.
    """
    if pictures.shape != reference.shape:
        raise DataError(f"pictures of shapes {tuple(pictures.shape)} and {tuple(reference.shape)} cannot be compared")
    error = (pictures.double() - reference.double()).square().flatten(1).mean(1)
    return (-10 * error.clamp_min(10 ** (-PSNR_LIMIT / 10)).log10()).float()


def feature_distance(maps: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """Distance ``[N]`` of pictures in a network's maps, without learned weights (after Zhang et al., arXiv 1801.03924).

    Channels have length one at every position; squared differences are summed over channels, averaged over positions,
    and summed over depths.

    Raises:
        DataError: maps that do not fit.
    """
    if [m.shape for m in maps] != [m.shape for m in reference] or not maps:
        raise DataError("the two sets of feature maps have other depths or shapes: the same network must see both")
    total = torch.zeros(len(maps[0]))
    for found, wanted in zip(maps, reference, strict=True):
        difference = torch.nn.functional.normalize(found, dim=1) - torch.nn.functional.normalize(wanted, dim=1)
        total += difference.square().sum(1).flatten(1).mean(1)
    return total


def _check(drawn: Drawn) -> None:
    counts = {len(part) for part in (drawn.pictures, drawn.logits, drawn.features)}
    if len(counts) != 1:
        raise DataError(f"pictures, classes and features of {sorted(counts)} pictures: the counts must agree")
    if not torch.isfinite(drawn.pictures).all():
        raise DataError("pictures have NaN or infinite elements: a layer overflowed, or its weights are damaged")


def _pair(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise DataError(f"features of shapes {tuple(one.shape)} and {tuple(other.shape)}: [N, D] and [M, D] are needed")
    if min(len(one), len(other)) < 2:
        raise DataError("a set of one picture has no spread: give at least two")
    return one.double(), other.double()


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
