"""Codebooks: nearest levels, weighted k-means against a plain one, fixed tables, corrected moments."""

from __future__ import annotations

import pytest
import torch
from codebooks import weighted_error

from hfq.errors import QuantizationError
from hfq.formats import codebook


def values(n: int = 4000, seed: int = 0) -> torch.Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return (x / x.abs().max()).clamp(-1, 1)


def brute(x: torch.Tensor, w: torch.Tensor, table: torch.Tensor, steps: int = 200) -> torch.Tensor:
    """Lloyd's algorithm as it is written in books."""
    x, w, table = x.double(), w.double(), table.double()
    for _ in range(steps):
        nearest = (x[:, None] - table).abs().argmin(1)
        table = torch.stack([(x * w)[nearest == k].sum() / w[nearest == k].sum() if (nearest == k).any() else table[k]
                             for k in range(len(table))])
    return table.sort().values


@pytest.mark.parametrize("bits", range(1, 9))
def test_fixed_tables(bits: int) -> None:
    for table in (codebook.normal(bits), codebook.even(bits)):
        assert table.shape == (2**bits,) and (table.diff() > 0).all() and table.abs().max() == 1
    assert (codebook.normal(bits) == 0).sum() == 1


def test_normal_levels_of_four_bits_are_the_known_ones() -> None:
    known = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302,
             0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    assert torch.allclose(codebook.normal(4), torch.tensor(known), atol=1e-5)


def test_codes_are_the_nearest_levels() -> None:
    table, x = codebook.normal(3), torch.linspace(-1.5, 1.5, 997).view(1, -1)
    codes = codebook.encode(x, table)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape
    assert torch.equal(codes.long(), (x[..., None] - table).abs().argmin(-1))
    assert torch.equal(codebook.decode(codes, table), table[codes.long()])


@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_ends_where_a_plain_one_does(weighted: bool) -> None:
    x = values()
    w = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) ** 3 if weighted else torch.ones_like(x)
    table = codebook.kmeans(x, 8, w if weighted else None, iterations=500)
    assert torch.allclose(brute(x, w, table, 1).float(), table, atol=1e-4)  # a fixed point of Lloyd's step
    if weighted:
        assert not torch.allclose(table, codebook.kmeans(x, 8, iterations=500), atol=1e-3)
    else:
        assert torch.equal(table, codebook.kmeans(x, 8, torch.full_like(x, 2.0), iterations=500))
    assert weighted_error(x, table, w) < weighted_error(x, codebook.even(3), w)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fitted_tables_are_no_worse_than_the_fixed_ones(bits: int) -> None:
    for seed in range(4):
        x = values(600, seed).pow(3)  # heavy in the middle
        w = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
        table = codebook.fit(x, bits, w, seed=seed)
        assert table.shape == (2**bits,) and (table.diff() >= 0).all() and table.abs().max() <= 1
        error = weighted_error(x, table, w)
        assert error < min(weighted_error(x, codebook.normal(bits), w),
                           weighted_error(x, codebook.even(bits), w))
        assert torch.equal(table, codebook.fit(x, bits, w, seed=seed))


def test_few_different_values_are_met_exactly() -> None:
    x = torch.tensor([-0.5, 0.25, 0.25, 1.0])
    for table in (codebook.fit(x, 3), codebook.kmeans(x, 8)):
        assert torch.equal(codebook.decode(codebook.encode(x, table), table), x)
    assert torch.isfinite(codebook.fit(torch.zeros(5), 2)).all()
    assert torch.isfinite(codebook.fit(torch.zeros(5), 2, torch.zeros(5))).all()


def test_corrected_tables_keep_mean_and_spread() -> None:
    x = values(8000, 3).abs().sqrt()
    table = codebook.fit(x, 2)
    decoded = codebook.corrected(x, table)[codebook.encode(x, table).long()]
    assert decoded.mean() == pytest.approx(float(x.mean()), abs=1e-5)
    assert decoded.std(correction=0) == pytest.approx(float(x.std(correction=0)), rel=1e-5)
    plain = table[codebook.encode(x, table).long()]
    assert plain.std(correction=0) < 0.99 * x.std(correction=0)  # what is corrected


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(QuantizationError, match="values"):
        codebook.fit(torch.empty(0), 4)
    with pytest.raises(QuantizationError, match="finite"):
        codebook.kmeans(torch.tensor([1.0, float("nan")]), 2)
