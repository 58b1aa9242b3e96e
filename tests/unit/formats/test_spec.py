from __future__ import annotations

import pytest
import torch

from hfq.errors import ConfigError
from hfq.formats import PER_CHANNEL, PER_TENSOR, Codes, QuantSpec, affine


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 0}, "bits=0"), ({"bits": 9}, "bits=9"), ({"bits": "4"}, "bits='4'"), ({"bits": True}, "bits=True"),
        ({"bits": 4.0}, "bits=4.0"), ({"bits": 4, "group_size": -2}, "group_size=-2"),
        ({"bits": 4, "group_size": 64.0}, "group_size"), ({"bits": 4, "group_size": True}, "group_size"),
        ({"bits": 4, "zero_point": "fractional"}, "zero_point"),
        ({"bits": 4, "symmetric": True, "zero_point": "float"}, "symmetric"),
        ({"bits": 4, "scale_dtype": "float8"}, "scale_dtype"),
    ],
)  # fmt: skip
def test_refuses(fields, words):
    with pytest.raises(ConfigError, match=words):
        QuantSpec(**fields)


@pytest.mark.parametrize(
    ("group_size", "length", "groups", "shape"),
    [(PER_CHANNEL, 100, 1, (7, 1)), (PER_TENSOR, 100, 1, (1, 1)), (64, 64, 2, (7, 2)), (25, 25, 4, (7, 4)),
     (100, 100, 1, (7, 1)), (128, 100, 1, (7, 1)), (1, 1, 100, (7, 100))],
)  # fmt: skip
def test_groups(group_size, length, groups, shape):
    spec = QuantSpec(4, group_size)
    assert (spec.group_length(100), spec.groups(100), spec.parameter_shape(7, 100)) == (length, groups, shape)


def test_json_round_trip_and_unknown_fields():
    spec = QuantSpec(3, 32, symmetric=True, scale_dtype="float32")
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(ConfigError, match="levels"):
        QuantSpec.from_dict({"bits": 4, "levels": 3})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [(QuantSpec(4, 64), 4 + 24 / 64), (QuantSpec(4, 64, symmetric=True), 4 + 16 / 64),
     (QuantSpec(3, -1, scale_dtype="float32"), 3 + 40 / 128), (QuantSpec(2, 64, zero_point="float"), 2 + 32 / 64),
     (QuantSpec(8, 0), 8 + 24 / (16 * 128))],
)  # fmt: skip
def test_bits_per_weight_counts_everything(spec, expected):
    codes = affine.quantize(torch.randn(16, 128), spec)
    assert isinstance(codes, Codes) and codes.bits_per_weight() == pytest.approx(expected)
