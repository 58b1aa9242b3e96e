"""Inputs of norms and blocks on stored grids: rounding, saving, taking out, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import ActivationSpec
from hfq.layers import rounded, swap
from hfq.layers.rounded import RoundedInput

GRID = ActivationSpec(4, True, "tensor", dynamic=False)
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def make() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    rounded.attach_rounding(model[0], RoundedInput(GRID, (torch.tensor([0.25]), None)))
    return model


def test_the_input_is_on_the_grid() -> None:
    model = make()
    wanted = (X / 0.25).round().clamp(-7, 7) * 0.25
    assert torch.equal(model(X), model[1](nn.functional.layer_norm(wanted, (8,))))
    assert torch.equal(model[0](input=X), model[0](X))
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and float(x.grad.norm()) > 0 and model[0].hfq_rounded.scale.grad is None


def test_copies_and_casts_keep_the_scale() -> None:
    model = make()
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert other[0].hfq_rounded.scale.dtype == torch.float32 and other(X.bfloat16()).dtype == torch.bfloat16
    with torch.no_grad():
        other[0].hfq_rounded.scale.fill_(1.0)
    assert float(model[0].hfq_rounded.scale) == 0.25


def test_it_is_rebuilt_from_the_manifest_and_taken_out() -> None:
    model = make()
    manifest = swap.describe(model)
    fresh = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    swap.build_empty(fresh, manifest)
    fresh.load_state_dict(model.state_dict())
    swap.check(fresh)
    assert torch.equal(fresh(X), model(X)) and swap.describe(fresh) == manifest
    swap.build_empty(fresh, manifest)  # what is there stays
    swap.dequantize_modules(fresh)
    assert torch.equal(fresh(X), fresh[1](nn.functional.layer_norm(X, (8,)))) and not swap.describe(fresh)["layers"]
    assert "attached" not in swap.describe(fresh) and rounded.remove(fresh) == []


def test_damage_and_wrong_use_are_told() -> None:
    model = make()
    manifest = swap.describe(model)
    for wrong in ({"activation": {"bits": 99}}, {"activation": None}, {"extra": 1},
                  {"activation": ActivationSpec(8).to_dict()}):
        with pytest.raises(CheckpointError, match="rounded input"):
            swap.build_empty(nn.Sequential(nn.LayerNorm(8)), {**manifest, "attached": [
                {**manifest["attached"][0], **wrong}]})  # fmt: skip
    with torch.no_grad():
        model[0].hfq_rounded.scale.zero_()
    with pytest.raises(CheckpointError, match="scale"):
        swap.check(model)
    with pytest.raises(QuantizationError, match="already"):
        rounded.attach_rounding(model[0], RoundedInput(GRID))
    with pytest.raises(QuantizationError, match="symmetric"):
        RoundedInput(ActivationSpec(8))
    with pytest.raises(QuantizationError, match="above zero"):
        RoundedInput(GRID, (torch.zeros(1), None))
