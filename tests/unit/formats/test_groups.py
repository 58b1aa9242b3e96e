"""Grids of groups, whose ranges need not contain zero."""

from __future__ import annotations

import json

import pytest
import torch

from hfq.errors import ConfigError
from hfq.formats import groups
from hfq.formats.groups import GroupSpec


def value(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    return (groups.encode(x, scale, zero, bits).float() - zero) * scale


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("ends", [(-1.0, 1.0), (3.0, 7.5), (-9.0, -8.0), (0.0, 4.0), (-0.3, 1e-4)])
def test_half_a_step_inside_the_range(bits: int, ends: tuple[float, float]) -> None:
    low, high = (torch.tensor([end]) for end in ends)
    scale, zero = groups.grid(low, high, bits)
    x = torch.linspace(*ends, 1001)
    assert (value(x, scale, zero, bits) - x).abs().max() <= scale * 0.5 * (1 + 1e-4)
    assert torch.allclose(scale, (high - low) / ((1 << bits) - 1)) and zero == zero.round()


def test_zero_is_not_forced_into_the_range() -> None:
    scale, zero = groups.grid(torch.tensor([5.0]), torch.tensor([6.0]), 4)
    assert zero == -75 and value(torch.zeros(1), scale, zero, 4) == pytest.approx(5.0)


@pytest.mark.parametrize("number", [0.0, 3.25, -7.5, 1e-9, -1e4])
def test_one_number_alone_is_exact(number: float) -> None:
    x = torch.tensor([number])
    scale, zero = groups.grid(x, x, 8)
    assert torch.equal(value(x, scale, zero, 8), x) and 0 <= zero <= 1


def test_zero_points_are_bounded() -> None:
    low, high = torch.tensor([1000.0, -1000.001]), torch.tensor([1000.001, -1000.0])
    for largest in (groups.LARGEST_ZERO, 900):
        scale, zero = groups.grid(low, high, 8, largest)
        assert zero.abs().max() <= largest
        x = torch.stack([low, high])
        assert ((value(x, scale, zero, 8) - x).abs() <= scale * 0.5 * (1 + 1e-3)).all()
    columns = 11520
    bound = groups.largest_zero(columns, 8)
    assert bound > 100 and (bound + 255) * 128 * columns < 2**31
    assert groups.largest_zero(32, 8) == groups.LARGEST_ZERO


def test_the_form_is_json_and_comes_back() -> None:
    spec = GroupSpec(6, 8, ("rows", "columns", "tensor", "rows"), 16, 40)
    again = GroupSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec and spec.start(1) == 16 and spec.start(3) == 56
    assert spec.label_bits == 3 and spec.label_bytes == 18 + 9
    assert GroupSpec(8, 1).label_bits == 1 and GroupSpec(8, 256).label_bits == 8


@pytest.mark.parametrize("wrong", [
    {"bits": 9}, {"bits": True}, {"groups": 0}, {"groups": 257}, {"axes": ()}, {"axes": ("rows",)}, {"rows": -1},
    {"axes": ("planes",)}, {"columns": 1 << 40},
])  # fmt: skip
def test_wrong_forms(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)) if "axes" not in wrong else "axes|groups along"):
        GroupSpec(**wrong)


@pytest.mark.parametrize("wrong", [
    {"axes": "rx"}, {"axes": ["rows"]}, {"extra": 1}, {"groups": "8"}, {"axes": ""},
])  # fmt: skip
def test_wrong_records(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        GroupSpec.from_dict({**GroupSpec(8, 8, ("rows",), 4, 4).to_dict(), **wrong})
