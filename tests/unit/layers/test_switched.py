"""Layers whose width follows the timestep: intervals, packing, copies, the manifest."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import QuantSpec, affine
from hfq.layers import swap, switched


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.free = nn.Linear(16, 16)

    def forward(self, sample, timestep, extra=None):
        return self.free(self.inner(sample))


def packed(schedule=(8, 4, 8), edges=(30.0, 10.0)):
    model = Denoiser()
    weight = model.inner.weight.detach().clone()
    part = switched.install(model, "inner", schedule, edges)
    for bits in set(schedule):
        swap.swap(part, switched.child_name(bits), affine.quantize(weight, QuantSpec(bits)))
    return model


def test_intervals():
    edges = [30.0, 10.0]
    assert [switched.interval(t, edges) for t in (99, 30.5, 30, 20, 10, 0)] == [0, 0, 1, 1, 2, 2]
    assert switched.interval(5, []) == 0


def test_the_timestep_chooses():
    model, x = packed(), torch.randn(3, 16)
    early, middle = model(x, 40), model(x, timestep=torch.tensor([20, 20]))
    assert model.inner.active.spec.bits == 4 and not torch.equal(early, middle)
    assert torch.equal(model(x, torch.tensor(2.5)), early)  # eight bits again
    other = copy.deepcopy(model)
    other(x, 20)
    assert other.inner.active.spec.bits == 4 and model.inner.active.spec.bits == 8
    assert torch.equal(model.inner.weight, model.inner.bits8.weight) and model.inner.in_features == 16


def test_calls_without_one_timestep():
    model, x = packed(), torch.randn(3, 16)
    with pytest.raises(QuantizationError, match="none was seen"):
        model.inner(x)
    with pytest.raises(QuantizationError, match="without a timestep"):
        model(x, None)
    with pytest.raises(QuantizationError, match="different timesteps"):
        model(x, torch.tensor([1, 2, 3]))


def test_rebuilt_from_the_manifest():
    model, x = packed(), torch.randn(3, 16)
    manifest = swap.describe(model)
    assert set(manifest["layers"]) == {"inner.bits4", "inner.bits8"}
    again = Denoiser()
    assert swap.build_empty(again, manifest) == ["inner.bits4", "inner.bits8"]
    again.load_state_dict(model.state_dict())
    for time in (40, 20, 3):
        assert torch.equal(again(x, time), model(x, time))
    assert swap.build_empty(again, manifest) == [] and len(again._forward_pre_hooks) == 1


@pytest.mark.parametrize("change", [
    {"schedule": [8, 16, 8]}, {"schedule": [8, 4]}, {"edges": [10.0, 30.0]}, {"edges": "x"}, {"more": 1},
    {"module": "nothing"}, {"schedule": []},
])  # fmt: skip
def test_damaged_manifests(change):
    manifest = swap.describe(packed())
    manifest["switched"][0] |= change
    with pytest.raises(CheckpointError):
        swap.build_empty(Denoiser(), manifest)


def test_a_layer_that_is_there_otherwise():
    manifest = swap.describe(packed())
    manifest["switched"][0]["schedule"] = [4, 8, 8]
    with pytest.raises(CheckpointError, match="otherwise"):
        swap.build_empty(packed(), manifest)


def test_dequantized_to_the_widest():
    model, x = packed(), torch.randn(3, 16)
    wide = model(x, 40)
    swap.dequantize_modules(model)
    assert type(model.inner) is nn.Linear and not model._forward_pre_hooks
    # The fastest product of eight bits rounds inputs on its own.
    torch.testing.assert_close(model(x, None), wide, rtol=0, atol=1e-2)


def test_no_packed_layer_for_it():
    model = Denoiser()
    model.inner = nn.Bilinear(4, 4, 4)
    with pytest.raises(QuantizationError, match="no packed layer"):
        switched.install(model, "inner", [4, 8], [1.0])
    with pytest.raises(QuantizationError, match="falling"):
        packed(edges=(10.0, 30.0))
