"""Properties of the formats over random widths, shapes and contents."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfq.formats import QuantSpec, affine, bitpack

WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
bits_ = st.integers(1, 8)
few = settings(max_examples=80, deadline=None)


@st.composite
def code_rows(draw):
    bits = draw(bits_)
    columns = draw(st.integers(1, 41))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns)
    return bits, draw(st.lists(row, min_size=1, max_size=4))


@few
@given(code_rows())
def test_packing_is_the_definition_and_unpacking_its_inverse(case):
    bits, rows = case
    codes = torch.tensor(rows, dtype=torch.uint8)
    packed = bitpack.pack(codes, bits)
    for row, given_bytes in zip(rows, packed.tolist(), strict=True):
        wanted, shift = b"", 0
        for width in WIDTHS[bits]:
            plane = sum((code >> shift & (1 << width) - 1) << width * k for k, code in enumerate(row))
            wanted += plane.to_bytes(-(-len(row) * width // 8), "little")
            shift += width
        assert bytes(given_bytes) == wanted
    assert torch.equal(bitpack.unpack(packed, bits, codes.shape[1]), codes)


@st.composite
def matrices(draw):
    columns = draw(st.integers(1, 40))
    symmetric = draw(st.booleans())
    bits, group_size = draw(st.integers(2 if symmetric else 1, 8)), draw(st.sampled_from([-1, 0, 1, 3, 8, 16, 64]))
    spec = QuantSpec(
        bits, group_size, symmetric=symmetric,
        zero_point="int" if symmetric else draw(st.sampled_from(["int", "float"])),
        scale_dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
    )
    rows = draw(st.integers(1, 5))
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    w = w * 2.0 ** draw(st.integers(-3, 3)) + draw(st.sampled_from([0.0, 0.0, 5.0, -5.0]))
    for row in range(rows):
        kind = draw(st.sampled_from(["random", "random", "zero", "constant", "positive", "negative", "outlier"]))
        if kind == "zero":
            w[row] = 0
        elif kind == "constant":
            w[row] = w[row, 0].clone()
        elif kind in ("positive", "negative"):
            w[row] = w[row].abs() * (1 if kind == "positive" else -1)
        elif kind == "outlier":
            w[row, 0] *= 100
    return w, spec


@few
@given(matrices())
def test_error_is_at_most_half_a_step_in_what_the_codes_can_represent(case):
    w, spec = case
    codes = affine.quantize(w, spec)
    assert codes.codes.dtype == torch.uint8 and int(codes.codes.max()) <= spec.max_code
    assert codes.scale.shape == spec.parameter_shape(*w.shape) and codes.scale.dtype == spec.torch_scale_dtype
    assert (codes.zero_point is None) == spec.symmetric
    scale = affine.expand(codes.scale.double(), w.shape[1], spec)
    zero = spec.middle if codes.zero_point is None else affine.expand(codes.zero_point.double(), w.shape[1], spec)
    low, high = -zero * scale, (spec.max_code - zero) * scale
    back = affine.dequantize(codes, torch.float64)
    nearest = w.double().clamp(low.expand_as(w), high.expand_as(w))
    # The last term: w / s is a float32 quotient, so that a tie may be seen on its other side.
    assert ((back - nearest).abs() <= scale * (0.5 + 1e-5 * spec.max_code)).all()
    # A min-max grid leaves out at most what rounding the scale and the zero point costs.
    slack = 0.5 + spec.max_code * torch.finfo(spec.torch_scale_dtype).eps + 1e-5
    if spec.zero_point == "float":
        slack += spec.max_code * torch.finfo(spec.torch_scale_dtype).eps
    assert ((w.double() - nearest).abs() <= scale * slack).all()


@few
@given(matrices())
def test_fake_is_decode_of_encode(case):
    w, spec = case
    codes = affine.quantize(w, spec)
    assert torch.equal(affine.fake(w, codes.scale, codes.zero_point, spec), affine.dequantize(codes))


@few
@given(matrices())
def test_groups_do_not_see_each_other(case):
    """Every group of a row quantizes as if it were a tensor by itself."""
    w, spec = case
    if spec.group_size == 0:
        return
    whole = affine.quantize(w, spec)
    length = spec.group_length(w.shape[1])
    for g in range(spec.groups(w.shape[1])):
        part = affine.quantize(w[:, g * length : (g + 1) * length], spec)
        assert torch.equal(part.codes, whole.codes[:, g * length : (g + 1) * length])
        assert torch.equal(part.scale, whole.scale[:, g : g + 1])


@few
@given(matrices())
def test_zero_decodes_to_zero_with_an_integer_zero_point(case):
    w, spec = case
    if spec.zero_point == "float":
        return
    scale, zero = affine.fit(w, spec)
    nothing = torch.zeros_like(w)
    assert torch.equal(affine.decode(affine.encode(nothing, scale, zero, spec), scale, zero, spec), nothing)


@few
@given(matrices())
def test_quantizing_twice_changes_nothing(case):
    w, spec = case
    codes = affine.quantize(w, spec)
    again = affine.encode(affine.dequantize(codes), codes.scale, codes.zero_point, spec)
    assert torch.equal(again, codes.codes)
