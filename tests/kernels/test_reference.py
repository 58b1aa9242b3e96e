"""The reference against plain Python integers and the definition."""

import pytest
import torch

from hfq import kernels
from hfq.errors import CheckpointError
from hfq.formats import QuantSpec, affine, bitpack
from hfq.kernels import PackedWeight, reference


def packed(n, k, spec, w=None):
    codes = affine.quantize(torch.randn(n, k) if w is None else w, spec)
    return PackedWeight(bitpack.pack(codes.codes, spec.bits), codes.scale, codes.zero_point, spec, k, n, "layer"), codes


def element(weight, row, column):
    """One element from the bytes, with Python integers: planes of 4, 2 and 1 bits (or 8), lowest bits first."""
    code, shift, start = 0, 0, 0
    line = weight.qweight[row].tolist()
    for width in {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}[weight.spec.bits]:
        byte = line[start + column * width // 8]
        code |= (byte >> (column * width % 8) & ((1 << width) - 1)) << shift
        shift += width
        start += -(-weight.in_features * width // 8)
    size = weight.spec.group_size
    i, j = (0, 0) if size == 0 else (row, 0 if size == -1 else column // size)
    zero = 1 << (weight.spec.bits - 1) if weight.zero_point is None else float(weight.zero_point[i, j])
    return float(weight.scale[i, j]) * (code - zero)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group,symmetric,zero", [
    (-1, True, "int"), (0, False, "int"), (12, False, "float"), (16, False, "int"),
])
def test_reference_equals_the_definition(bits, group, symmetric, zero):
    spec = QuantSpec(bits, group, symmetric=symmetric, zero_point=zero)
    weight, _ = packed(5, 37, spec)
    dense = reference.dequantize(weight, torch.float64)
    want = torch.tensor([[element(weight, i, j) for j in range(37)] for i in range(5)], dtype=torch.float64)
    torch.testing.assert_close(dense, want, rtol=1e-12, atol=0)
    x, bias = torch.randn(3, 37, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    y = reference.linear(x, weight, bias, accumulate=torch.float64)
    torch.testing.assert_close(y, x @ want.t() + bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", [-1, 0, 32])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_embedding_unpacks_the_rows_asked_for(bits, group):
    weight, codes = packed(20, 50, QuantSpec(bits, group))
    ids = torch.tensor([[0, 19, 7], [7, 3, 0]])
    rows = kernels.embedding(ids, weight, torch.float32)
    assert torch.equal(rows, affine.dequantize(codes)[ids])
    assert torch.equal(rows, reference.embedding(ids, weight))
    assert kernels.embedding(ids, weight).dtype == weight.scale.dtype
    assert kernels.embedding(ids[:0], weight).shape == (0, 3, 50)


def test_dequantize_takes_both_forms():
    weight, codes = packed(64, 64, QuantSpec(4, 32))
    want = affine.dequantize(codes)
    assert torch.equal(kernels.dequantize(weight), want)
    assert torch.equal(kernels.dequantize(kernels.prepare(weight, dtype=torch.float32)), want)


@pytest.mark.parametrize("change,word", [
    (dict(in_features=65), "qweight"), (dict(scale=torch.ones(64, 3, dtype=torch.float16)), "scale"),
    (dict(zero_point=None), "missing"),
])
def test_wrong_shapes_are_named(change, word):
    weight, _ = packed(64, 64, QuantSpec(4, 32))
    for name, value in change.items():
        setattr(weight, name, value)
    with pytest.raises(CheckpointError, match=word) as caught:
        kernels.prepare(weight, dtype=torch.float32)
    assert "layer" in str(caught.value)
