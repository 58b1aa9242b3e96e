"""Inputs on two grids and shifted inputs: exact sums, casts, saving, damage, floats again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hfq import kernels
from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import ActivationSpec, QuantSpec, affine, twin
from hfq.formats.twin import TwinSpec
from hfq.layers import swap
from hfq.layers.shift import ChannelShift
from hfq.rounding import nearest

WIDTH, OUT = 48, 20
SPEC = QuantSpec(4)
TWIN = TwinSpec(6, 3, "signed")
STEP = torch.tensor([0.011])


def model(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, OUT, bias=bias))


def gelu_like(rows: int = 33) -> torch.Tensor:
    return nn.functional.gelu(2 * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(2)))


def packed(float_model: nn.Sequential, **options: Any) -> Any:
    codes = nearest.solve(float_model[0].weight.detach(), SPEC)
    swap.swap(float_model, "0", codes, **options)
    swap.prepare(float_model)
    return float_model, codes


@pytest.mark.parametrize("spec", [TWIN, TwinSpec(8, 5, "signed"), TwinSpec(4, 0, "magnitude")], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_two_sums_under_one_scale(spec: TwinSpec, rows: int) -> None:
    made, codes = packed(model(), activation=spec, activation_params=(STEP, None))
    x = gelu_like(rows)
    x = x.abs() if spec.regions == "magnitude" else x
    fine, coarse = (part.double() for part in twin.parts(twin.encode(x, STEP, spec), spec))
    whole = codes.codes.double() - codes.zero_point.double()
    sums = fine @ whole.t() + (coarse @ whole.t()) * 2**spec.shift
    wanted = STEP.double() * sums * codes.scale.double().t() + made[0].bias.double()
    with torch.no_grad():
        found = made(x)
        assert (found - wanted).norm() <= 2e-6 * wanted.norm()
        with kernels.use(wnan="reference"):
            assert (made(x) - wanted).norm() <= 2e-6 * wanted.norm()
    taken = nn.functional.linear(twin.fake(x, STEP, spec), affine.dequantize(codes), made[0].bias)
    assert torch.allclose(found, taken, rtol=1e-4, atol=1e-5)


def test_gradients_pass_the_rounding_of_two_grids() -> None:
    made, codes = packed(model(), activation=TWIN, activation_params=(STEP, None))
    x = gelu_like(4).requires_grad_()
    made(x).sum().backward()
    inside = (x > -31 * STEP) & (x < 31 * STEP * 8)
    assert x.grad is not None
    assert torch.allclose(x.grad, affine.dequantize(codes).sum(0) * inside, atol=1e-5)


def test_a_traced_layer_computes_the_same() -> None:
    made, _ = packed(model(), activation=TWIN, activation_params=(STEP, None))
    x = gelu_like(5)
    with torch.no_grad():
        traced = torch.compile(made, fullgraph=True, backend="eager")(x)
        assert torch.allclose(traced, made(x), rtol=1e-6, atol=1e-6)


def test_a_shift_is_taken_out_by_the_bias_and_comes_back_with_the_floats() -> None:
    start = model()
    shift = 0.3 * torch.randn(WIDTH)
    codes = nearest.solve(start[0].weight.detach(), SPEC)
    part = ChannelShift(shift)
    before = start[0].bias.detach().clone()
    with torch.no_grad():
        start[0].bias -= affine.dequantize(codes) @ part.shift.float()
    grid = ActivationSpec(8, granularity="tensor", dynamic=False)
    swap.swap(start, "0", codes, online=part, activation=grid,
              activation_params=(torch.tensor([0.05]), torch.tensor([60.0])))
    x = gelu_like()
    with torch.no_grad():
        wanted = nn.functional.linear(x, affine.dequantize(codes), before)
        assert (start(x) - wanted).norm() <= 0.03 * wanted.norm()
        swap.dequantize_modules(start)
    assert type(start[0]) is nn.Linear and torch.allclose(start[0].bias, before, atol=1e-5)
    assert torch.allclose(start[0].weight, affine.dequantize(codes), atol=1e-6)


def test_both_are_rebuilt_from_the_manifest_and_survive_casts() -> None:
    made, _ = packed(model(), online=ChannelShift(torch.linspace(-1, 1, WIDTH)), activation=TWIN,
                     activation_params=(STEP, None))
    manifest = swap.describe(made)
    entry = manifest["layers"]["0"]
    assert entry["activation"] == TWIN.to_dict() and entry["activation"]["form"] == "twin"
    assert entry["online"] == {"kind": "channel_shift", "size": WIDTH}
    fresh = model()
    swap.build_empty(fresh, manifest)
    fresh.load_state_dict(made.state_dict())
    swap.prepare(fresh)
    x = gelu_like()
    with torch.no_grad():
        assert torch.equal(fresh(x), made(x))
    cast = copy.deepcopy(made).to(torch.bfloat16)
    assert cast[0].online.shift.dtype == torch.float16 and cast[0].input_scale.dtype == torch.float32
    assert torch.equal(cast[0].online.shift, made[0].online.shift)
    swap.check(made)
    with torch.no_grad():
        made[0].online.shift[3] = float("nan")
    with pytest.raises(CheckpointError, match="shift"):
        swap.check(made)


def test_manifests_that_say_nonsense() -> None:
    made, _ = packed(model(), activation=TWIN, activation_params=(STEP, None))
    good = swap.describe(made)["layers"]["0"]
    for wrong in ({"form": "cubic", "bits": 4}, {"form": "twin", "bits": 40}, {"form": "twin", "bits": 4, "x": 1}):
        with pytest.raises(CheckpointError):
            swap.build_empty(model(), {"layers": {"0": {**good, "activation": wrong}}})
    old = {**good, "activation": {"bits": 8, "symmetric": False, "granularity": "tensor", "dynamic": False}}
    named = {**good, "activation": {**old["activation"], "form": "uniform"}}
    for entry in (old, named):
        fresh = model()
        swap.build_empty(fresh, {"layers": {"0": entry}})
        assert isinstance(fresh[0].activation, ActivationSpec)
    with pytest.raises(QuantizationError, match="float16"):
        ChannelShift(torch.full((4,), 1e6))
