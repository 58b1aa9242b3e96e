import pytest
import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.graph import absorb
from hfq.graph.absorb import Matrix, Norm
from hfq.graph.proof import random_rotation
from hfq.graph.read import site_of


class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def layers():
    torch.manual_seed(0)
    return [nn.Linear(6, 4).double(), nn.Linear(6, 4, bias=False).double(), Conv1D(4, 6).double()]


def rotation(size, seed=0):
    return random_rotation(size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("index", range(3))
def test_conventions(index):
    layer = layers()[index]
    site = site_of("layer", layer)
    x = torch.randn(5, 6, dtype=torch.float64)
    y = layer(x)
    scale = torch.rand(6, dtype=torch.float64) + 0.5
    absorb.scale_inputs(site, scale)
    assert torch.allclose(layer(x / scale), y)
    absorb.scale_inputs(site, 1 / scale)
    q = rotation(6)
    assert not torch.allclose(q, q.t(), atol=1e-3)
    absorb.rotate_inputs(site, q)
    assert torch.allclose(layer(x @ q), y)
    absorb.rotate_inputs(site, q.t())
    scale = torch.rand(4, dtype=torch.float64) + 0.5
    absorb.scale_outputs(site, scale)
    assert torch.allclose(layer(x), y * scale)
    absorb.scale_outputs(site, 1 / scale)
    q = rotation(4)
    absorb.rotate_outputs(site, q)
    assert torch.allclose(layer(x), y @ q)


@pytest.mark.parametrize("index", range(3))
def test_channels(index):
    layer = layers()[index]
    site = site_of("layer", layer)
    x = torch.randn(5, 6, dtype=torch.float64)
    y = layer(x)
    heads, q = torch.tensor([[0, 3], [5, 1]]), rotation(2)
    absorb.rotate_inputs(site, q, heads)
    turned = x.clone()
    for head in heads:
        turned[:, head] = x[:, head] @ q
    assert torch.allclose(layer(turned), y)
    absorb.scale_outputs(site, torch.tensor([2.0, 4.0]), torch.tensor([3, 1]))
    assert torch.allclose(layer(turned), y * torch.tensor([1.0, 4.0, 1.0, 2.0], dtype=torch.float64))


def test_function_instead_of_matrix():
    a, b = layers()[0], layers()[0]
    q = rotation(6)
    absorb.rotate_inputs(site_of("a", a), q)
    absorb.rotate_inputs(site_of("b", b), lambda x: x @ q)
    assert torch.allclose(a.weight, b.weight)


def test_experts_and_bias():
    bank = nn.Module()
    bank.w, bank.b = nn.Parameter(torch.randn(3, 4, 6).double()), nn.Parameter(torch.randn(3, 4).double())
    matrix = Matrix("bank", bank, "w", input_axis=2, output_axis=1, bias="b")
    x = torch.randn(5, 6, dtype=torch.float64)

    def run(v):
        return torch.einsum("tk,enk->ten", v, bank.w) + bank.b

    y, q, shift = run(x), rotation(6), torch.randn(6, dtype=torch.float64)
    absorb.rotate_inputs(matrix, q)
    assert torch.allclose(run(x @ q), y)
    absorb.rotate_outputs(matrix, rotation(4))
    assert torch.allclose(run(x @ q), y @ rotation(4))
    expected = run(x + shift)
    absorb.add_bias(matrix, shift)
    assert torch.allclose(run(x), expected)


def test_results_are_rounded_once():
    layer = nn.Linear(64, 64).to(torch.bfloat16)
    exact = layer.weight.detach().double()
    q = rotation(64)
    absorb.rotate_inputs(site_of("layer", layer), q)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, (exact @ q).to(torch.bfloat16))


@pytest.mark.parametrize("moves", [True, False])
def test_fold_norm(moves):
    torch.manual_seed(1)
    norm, readers = nn.LayerNorm(6).double(), layers()[:1]
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    x = torch.randn(5, 6, dtype=torch.float64)
    y = readers[0](norm(x))
    part = Norm("norm", norm, bias="bias", centred=True)
    absorb.fold_norm(part, [(absorb.matrix_of(site_of("r", readers[0])), torch.arange(6))], moves)
    assert torch.allclose(readers[0](norm(x)), y)
    assert norm.weight.eq(1).all() and bool(norm.bias.eq(0).all()) is moves and part.is_plain is moves


def test_fold_refuses_a_bias_without_gain():
    norm = nn.LayerNorm(6)
    with torch.no_grad():
        norm.weight[2], norm.bias[2] = 0, 1
    part = Norm("norm", norm, bias="bias")
    with pytest.raises(QuantizationError, match="channel 2"):
        absorb.fold_norm(part, [], False)


def test_errors():
    layer = layers()[0]
    with pytest.raises(QuantizationError, match="scale of 5 for 6"):
        absorb.scale_inputs(site_of("layer", layer), torch.ones(5))
    with pytest.raises(QuantizationError, match="rotation"):
        absorb.rotate_inputs(site_of("layer", layer), torch.eye(5))
    with pytest.raises(QuantizationError, match="meta"):
        absorb.scale_inputs(site_of("layer", nn.Linear(6, 4, device="meta")), torch.ones(6))
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    with pytest.raises(QuantizationError, match="parametriz"):
        absorb.scale_inputs(site_of("layer", parametrized), torch.ones(6))
    with pytest.raises(QuantizationError, match="members of a pair"):
        bank = nn.Module()
        bank.a, bank.b = nn.Parameter(torch.ones(2, 3, 4)), nn.Parameter(torch.ones(2, 4, 3))
        absorb.scale_inputs(site_of("bank", bank), torch.ones(4))
