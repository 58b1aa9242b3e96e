from __future__ import annotations

import pytest
import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.formats import ActivationSpec, activation
from hfq.layers.fake import Drop, fake_inputs


def test_only_inside_the_block_and_only_the_modules_that_are_named():
    torch.manual_seed(0)
    first, second = nn.Linear(8, 8), nn.Linear(8, 4)
    model, x, spec = nn.Sequential(first, second), torch.randn(5, 8), ActivationSpec(3)
    plain = model(x)
    with fake_inputs({first: spec, second: None}):
        want = nn.functional.linear(activation.fake(x, spec), first.weight, first.bias)
        assert torch.equal(model(x), second(want)) and not torch.equal(model(x), plain)
        assert torch.equal(first(input=x), nn.functional.linear(activation.fake(x, spec), first.weight, first.bias))
    assert torch.equal(model(x), plain)
    with pytest.raises(ZeroDivisionError), fake_inputs({first: spec}):
        raise ZeroDivisionError
    assert not first._forward_pre_hooks


def test_factors_and_static_parameters_get_gradients():
    layer, x = nn.Linear(8, 8), torch.randn(5, 8)
    factor = torch.tensor([0.8], requires_grad=True)
    with fake_inputs({layer: ActivationSpec(4, factor=True)}, factors={layer: factor}):
        layer(x).square().sum().backward()
    assert factor.grad is not None and factor.grad.abs() > 0
    scale = torch.tensor([0.1], requires_grad=True)
    with fake_inputs({layer: ActivationSpec(4, True, "tensor", dynamic=False)}, params={layer: (scale, None)}):
        layer(x).square().sum().backward()
    assert scale.grad is not None and scale.grad.abs() > 0


@pytest.mark.parametrize("spec", [ActivationSpec(factor=True), ActivationSpec(8, True, "tensor", dynamic=False)])
def test_what_is_missing_is_said(spec):
    with pytest.raises(QuantizationError, match="do not agree"), fake_inputs({nn.Linear(4, 4): spec}):
        pass


def test_layers_that_read_one_tensor_share_its_grid_and_passes_do_not():
    x = torch.randn(5, 8, requires_grad=True)
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    calls = []
    plain = activation.fake
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation, "fake", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs))
        with fake_inputs({first: ActivationSpec(4), second: ActivationSpec(4)}):
            (first(x) + second(x)).sum().backward()
            assert len(calls) == 1
            (first(x) + second(x)).sum().backward()  # a graph of its own
            assert len(calls) == 2
            with torch.no_grad():
                x.mul_(3)
            assert torch.equal(first(x), nn.functional.linear(plain(x, ActivationSpec(4)), first.weight, first.bias))
        with fake_inputs({first: ActivationSpec(4), second: ActivationSpec(3)}):
            first(x), second(x)
    assert len(calls) == 5


def test_dropped_elements_keep_their_value_in_passes_with_gradients():
    layer, x, spec = nn.Identity(), torch.randn(64, 64), ActivationSpec(3, True, "tensor", dynamic=False)
    rounded = activation.fake(x, spec, (torch.tensor([0.5]), None))
    runs = []
    for _ in range(2):
        with fake_inputs({layer: spec}, params={layer: lambda: (torch.tensor([0.5]), None)}, drop=Drop(0.3, seed=1)):
            runs.append(layer(x))
            with torch.no_grad():
                assert torch.equal(layer(x), rounded)
    assert torch.equal(*runs)
    kept = (runs[0] == x) & (rounded != x)
    assert bool((kept | (runs[0] == rounded)).all()) and 0.27 < float(kept.float().mean()) < 0.33
