"""Packing against the words of FORMAT.md: a loop over bits in plain integers, and the document's own examples."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import hfq.formats
from hfq.errors import CheckpointError
from hfq.formats import QuantSpec, affine, bitpack

FORMAT = Path(hfq.formats.__file__).with_name("FORMAT.md").read_text()
WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def slow_pack(codes: list[int], bits: int) -> bytes:
    """The definition, bit by bit."""
    out, shift = b"", 0
    for width in WIDTHS[bits]:
        plane = 0
        for k, code in enumerate(codes):
            plane |= (code >> shift & (1 << width) - 1) << width * k
        out += plane.to_bytes(-(-len(codes) * width // 8), "little")
        shift += width
    return out


def test_examples_of_the_document():
    rows = re.findall(r"^\| (\d) \| ([\d ]+) \| `([0-9a-f ]+)` \| (\d) \|$", FORMAT, re.M)
    assert len(rows) == 8
    for bits, codes, packed, size in rows:
        values = [int(code) for code in codes.split()]
        wanted = bytes.fromhex(packed)
        got = bitpack.pack(torch.tensor([values], dtype=torch.uint8), int(bits))
        assert bytes(got[0].tolist()) == wanted == slow_pack(values, int(bits))
        assert len(wanted) == int(size) == bitpack.packed_bytes(len(values), int(bits))


def test_whole_example_of_the_document():
    codes = affine.quantize(torch.tensor([[-1.0, 2.0, 0.5]]), QuantSpec(4, 2))
    assert codes.scale.view(torch.int16).tolist() == [[0x3266, 0x2844]]
    assert codes.zero_point.tolist() == [[5, 0]]
    assert bytes(bitpack.pack(codes.codes, 4)[0].tolist()) == bytes.fromhex("f00f")
    for text in ("0x3266", "0x2844", "[[[f0, 0f]]]", "[[05, 00]]", "0.199951171875"):
        assert text in FORMAT


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_sum_to_the_width(bits):
    assert bitpack.planes(bits) == WIDTHS[bits] and sum(bitpack.planes(bits)) == bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_leading_axes_are_independent(bits):
    codes = torch.randint(0, 1 << bits, (2, 3, 13)).to(torch.uint8)
    packed = bitpack.pack(codes, bits)
    assert packed.shape == (2, 3, bitpack.packed_bytes(13, bits))
    assert torch.equal(packed[1, 2], bitpack.pack(codes[1, 2], bits))
    assert torch.equal(bitpack.unpack(packed, bits, 13), codes)


def test_non_contiguous_codes():
    codes = torch.randint(0, 16, (9, 5)).to(torch.uint8).t()
    assert torch.equal(bitpack.pack(codes, 4), bitpack.pack(codes.contiguous(), 4))


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(CheckpointError, match="code 4 does not fit 2 bits"):
        bitpack.pack(torch.tensor([[0, 4]], dtype=torch.uint8), 2)
    with pytest.raises(TypeError, match="torch.uint8"):
        bitpack.pack(torch.tensor([[0, 1]]), 2)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(2, 5, dtype=torch.int8)])
def test_unpack_refuses_another_length_or_dtype(wrong):
    with pytest.raises(CheckpointError, match="take 5 bytes"):
        bitpack.unpack(wrong, 4, 10)
