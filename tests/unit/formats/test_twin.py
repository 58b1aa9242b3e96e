"""Two grids side by side: regions, exact integer parts, nearest codes, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfq.errors import ConfigError
from hfq.formats import twin
from hfq.formats.twin import TwinSpec

SPECS = [TwinSpec(b, m, r) for b in (2, 4, 6, 8) for m in (0, 2, 5) for r in ("signed", "magnitude")]
NAMES = [f"{s.bits}-{s.shift}-{s.regions}" for s in SPECS]


def levels(spec: TwinSpec) -> torch.Tensor:
    return twin.decode(torch.arange(spec.max_code + 1, dtype=torch.uint8), torch.ones(1), spec, torch.float64)


def test_regions_of_the_published_grids() -> None:
    signed = levels(TwinSpec(3, 2, "signed"))
    assert signed.tolist() == [0, -1, -2, -3, 0, 4, 8, 12]
    assert levels(TwinSpec(3, 2, "magnitude")).tolist() == [0, 1, 2, 3, 0, 4, 8, 12]


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_parts_are_the_number(spec: TwinSpec) -> None:
    codes = torch.arange(spec.max_code + 1, dtype=torch.uint8)
    fine, coarse = twin.parts(codes, spec)
    assert fine.dtype == coarse.dtype == torch.int8 and not bool((fine * coarse).any())
    assert torch.equal(fine.double() + coarse.double() * 2**spec.shift, levels(spec))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(-40, 400, width=32), min_size=1, max_size=40), st.sampled_from(SPECS), st.floats(0.01, 8))
def test_nearest_of_all_levels_in_the_region(values: list[float], spec: TwinSpec, scale: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    x = x.abs() if spec.regions == "magnitude" else x
    step = torch.tensor([scale], dtype=torch.float64)
    found = twin.decode(twin.encode(x, step, spec), step, spec, torch.float64)
    known = levels(spec) * scale
    for v, f in zip(x.tolist(), found.tolist(), strict=True):
        allowed = known[known >= 0] if v > 0 and spec.regions == "signed" else known
        coarse = known[spec.top + 1 :]
        if spec.regions == "signed" and v > 0:
            allowed = coarse
        assert abs(f - v) <= float((allowed - v).abs().min()) + 1e-9 * (abs(v) + scale)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_fake_is_encode_and_decode(spec: TwinSpec) -> None:
    x = torch.randn(9, 17) * 3
    x = x.abs() if spec.regions == "magnitude" else x
    step = torch.tensor([0.07])
    assert torch.equal(twin.fake(x, step, spec), twin.decode(twin.encode(x, step, spec), step, spec))


def test_gradients() -> None:
    spec = TwinSpec(4, 2, "signed")
    x = torch.tensor([-50.0, -2.2, 0.3, 9.0, 500.0], requires_grad=True)
    twin.fake(x, torch.ones(1), spec).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]
    step = torch.ones(1, requires_grad=True)
    twin.fake(torch.tensor([500.0]), step, spec).sum().backward()
    assert step.grad is not None and float(step.grad) == 7 * 4


def test_scale_and_what_cannot_be() -> None:
    spec = TwinSpec(5, 3)
    assert float(levels(spec).max() * twin.scale_of(torch.tensor(6.0), spec)) == pytest.approx(6.0)
    assert TwinSpec.from_dict(spec.to_dict()) == spec
    for wrong in ({"bits": 1}, {"shift": -1}, {"shift": 16}, {"regions": "both"}):
        with pytest.raises(ConfigError):
            TwinSpec(**wrong)
    with pytest.raises(ConfigError, match="two grids"):
        TwinSpec.from_dict({"form": "log"})
