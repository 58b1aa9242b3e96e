"""Exact products of bytes, at the largest codes and on processors whose own product saturates."""

from __future__ import annotations

import pytest
import torch

from hfq.kernels import byte_mm


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8])
def test_products_are_exact_at_the_extremes(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = (0, 255) if kind == torch.uint8 else (-128, 127)
    a = torch.randint(low, high + 1, (5, 70)).to(kind)
    a[0], a[1] = high, low
    b = torch.randint(-128, 128, (70, 9)).to(torch.int8)
    b[:, 0], b[:, 1] = 127, -128
    exact = (a.long() @ b.long()).to(torch.int32)
    assert torch.equal(byte_mm.integer_mm(a, b), exact)
    assert torch.equal(byte_mm.integer_mm(a, b.t().contiguous().t()), exact)
    one, row = a[:, :1].contiguous(), b[:1].t().contiguous().t()  # one column: strides that tell nothing
    assert torch.equal(byte_mm.integer_mm(one, row), (one.long() @ row.long()).to(torch.int32))
    for probe in ("exact_signed", "exact_unsigned"):  # what older processors do
        monkeypatch.setattr(byte_mm, probe, lambda: False)
    assert torch.equal(byte_mm.integer_mm(a, b), exact)
    assert byte_mm.integer_mm(a[:0], b).shape == (0, 9)


def test_the_product_is_an_operator() -> None:
    a, b = torch.randint(0, 256, (4, 16)).to(torch.uint8), torch.randint(-127, 128, (16, 8)).to(torch.int8)
    torch.library.opcheck(torch.ops.hfq.integer_mm.default, (a, b))
