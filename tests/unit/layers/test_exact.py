from __future__ import annotations

import pytest
import torch
from torch import nn

from hfq.formats import ActivationSpec, QuantSpec, affine
from hfq.layers import swap
from hfq.layers.exact import exact_inputs
from hfq.layers.kinds import to_float


def model() -> nn.Module:
    torch.manual_seed(0)
    built = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 8))
    for name, activation in (("0", ActivationSpec(2)), ("2", None)):
        weight = built.get_submodule(name).weight.detach()
        swap.swap(built, name, affine.quantize(weight, QuantSpec(4, 16)), activation=activation)
    swap.prepare(built)
    return built


def test_inputs_are_not_rounded_inside_and_are_again_afterwards() -> None:
    built, x = model(), torch.randn(5, 32)
    rounded = built(x)
    floats = nn.Sequential(to_float(built[0], None), built[1], to_float(built[2], None))
    with exact_inputs(built):
        inside = built(x)
    torch.testing.assert_close(inside, floats(x), rtol=1e-2, atol=1e-3)  # products of packed weights may be in bfloat16
    assert (rounded - inside).norm() > 0.1 * inside.norm()
    assert torch.equal(built(x), rounded) and not any("forward" in vars(m) for m in built.modules())


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    built, x = model(), torch.randn(5, 32)
    rounded = built(x)
    with pytest.raises(RuntimeError), exact_inputs(built):
        built(torch.randn(5, 31))
    assert torch.equal(built(x), rounded)


def test_a_forward_that_a_hook_keeps_is_put_back() -> None:
    accelerate = pytest.importorskip("accelerate.hooks")
    built, x = model(), torch.randn(5, 32)
    accelerate.add_hook_to_module(built[0], accelerate.ModelHook())
    rounded, kept = built(x), built[0]._old_forward
    with exact_inputs(built):
        inside = built(x)
    assert (rounded - inside).norm() > 0.1 * inside.norm()
    assert built[0]._old_forward is kept and torch.equal(built(x), rounded)
