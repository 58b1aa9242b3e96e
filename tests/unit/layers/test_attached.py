"""Parts beside the packed layers: exact halves of a transform, rebuilt from the manifest, refused when damaged."""

import copy

import pytest
import torch
from torch import nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.layers import swap
from hfq.layers.attached import CHILD, OutputAffine, ScaledSiLU, attach_affine, attached, detach_affine, install_scaled


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(8), nn.Linear(8, 12)
        self.act, self.down = nn.SiLU(), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(self.act(self.linear(self.norm(x))))


def with_parts(matrix=True, shift=True, dtype=torch.float16):
    model = nn.Sequential(Block())
    part = OutputAffine(8, matrix=(torch.randn(8, 8) + 3 * torch.eye(8)).to(dtype) if matrix else False,
                        shift=torch.randn(8).to(dtype) if shift else False)
    attach_affine(model[0].norm, part)
    install_scaled(model, "0.act", ScaledSiLU(12, torch.rand(12) + 0.5))
    return model


def test_the_map_is_applied_to_the_output():
    model = with_parts()
    x, part = torch.randn(3, 8), model[0].norm._modules[CHILD]
    plain = nn.functional.rms_norm(x, (8,), model[0].norm.weight)
    assert torch.allclose(model[0].norm(x), (plain + part.shift.float()) @ part.matrix.float(), atol=1e-5)
    detach_affine(model[0].norm)
    assert torch.allclose(model[0].norm(x), plain, atol=1e-6)


def test_the_other_half_undoes_it():
    torch.manual_seed(1)
    model, x = nn.Sequential(Block()), torch.randn(4, 8)
    before = model(x)
    a, d = torch.randn(8, 8) * 0.2 + torch.eye(8), torch.randn(8)
    with torch.no_grad():
        model[0].linear.bias += model[0].linear.weight @ d
        model[0].linear.weight.copy_(model[0].linear.weight @ a.t())
    attach_affine(model[0].norm, OutputAffine(8, matrix=torch.linalg.inv(a), shift=-d))
    assert torch.allclose(model(x), before, atol=1e-5)


def test_scaled_silu():
    x, s = torch.randn(5, 12), torch.rand(12) + 0.5
    assert torch.allclose(ScaledSiLU(12, s)(x), x * torch.sigmoid(x / s), atol=1e-6)
    assert torch.allclose(ScaledSiLU(12, torch.ones(12))(x), nn.functional.silu(x), atol=1e-6)


@pytest.mark.parametrize(("matrix", "shift"), [(True, True), (True, False), (False, True)])
def test_the_manifest_rebuilds_the_parts(matrix, shift):
    model = with_parts(matrix, shift)
    manifest = swap.describe(model)
    assert [entry["kind"] for entry in manifest["attached"]] == ["affine", "silu"]
    with torch.device("meta"):
        empty = nn.Sequential(Block())
    swap.build_empty(empty, manifest)
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in model.state_dict().items()}
    empty.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(2, 8)
    assert torch.equal(empty(x), model(x)) and attached(empty) == manifest["attached"]
    swap.build_empty(empty, manifest)  # what is there stays
    assert torch.equal(empty(x), model(x))


def test_casts_leave_the_parts_alone_and_copies_have_their_own():
    model = with_parts(dtype=torch.float32)
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert other[0].norm._modules[CHILD].matrix.dtype == torch.float32
    assert other[0].linear.weight.dtype == torch.bfloat16
    assert other(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.no_grad():
        other[0].norm._modules[CHILD].matrix.zero_()
    assert model[0].norm._modules[CHILD].matrix.abs().max() > 0


@pytest.mark.parametrize("change", [
    {"size": 7}, {"size": -1}, {"size": 1 << 40}, {"kind": "other"}, {"matrix": 1}, {"dtype": "int8"},
    {"matrix": False, "shift": False}, {"more": 1}, {"module": "0.nothing"},
])
def test_damaged_entries_are_refused(change):
    manifest = swap.describe(with_parts())
    manifest["attached"][0] = {**manifest["attached"][0], **change}
    with pytest.raises(CheckpointError):
        swap.build_empty(nn.Sequential(Block()), manifest)


def test_what_does_not_fit_is_refused():
    model = with_parts()
    with pytest.raises(QuantizationError, match="already"):
        attach_affine(model[0].norm, OutputAffine(8, shift=torch.zeros(8)))
    with pytest.raises(QuantizationError, match="is needed"):
        OutputAffine(8, matrix=torch.zeros(8, 7))
    with pytest.raises(QuantizationError, match="none"):
        OutputAffine(8)
    with torch.no_grad():
        model[0].norm._modules[CHILD].matrix[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        swap.check(model)
