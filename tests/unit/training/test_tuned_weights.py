"""What takes the place of float weights while some of them are tuned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.formats import QuantSpec, affine
from hfq.graph import read
from hfq.rounding import nearest
from hfq.training.substitutes import Substitutes
from hfq.training.tuned_weights import TunedWeights

SPEC = QuantSpec(3, -1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.out(self.conv(sample).mean((2, 3)))


def setting(halves: bool = False, tuned: tuple[str, ...] = ("out",)):
    torch.manual_seed(0)
    net = Net().eval()
    sites = read(net).every_site
    codes = {site.name: (nearest.solve(site.weight.detach().flatten(1), SPEC),) for site in sites}
    if halves:
        weight = net.conv.weight.detach()
        codes["conv"] = tuple(nearest.solve(part.flatten(1), SPEC) for part in weight.split([1, 3], 1))
    return net, sites, codes, TunedWeights(sites, codes, tuned)


@pytest.mark.parametrize("halves", [False, True])
def test_the_model_computes_with_what_the_codes_stand_for(halves: bool) -> None:
    net, _, codes, weights = setting(halves)
    x, before = torch.randn(2, 4, 5, 5), {name: p.clone() for name, p in net.named_parameters()}
    student = Substitutes(net, weights.made())
    with torch.no_grad(), student.running():
        found = student({"sample": x})
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    parts = [affine.dequantize(one).reshape(6, -1, 3, 3) for one in codes["conv"]]
    with torch.no_grad():
        net.conv.weight.copy_(torch.cat(parts, 1))
        net.out.weight.copy_(affine.dequantize(codes["out"][0]))
        assert torch.equal(found, net(x))


def test_tuned_layers_move_and_their_biases_are_stored() -> None:
    net, _, codes, weights = setting()
    student, bias = Substitutes(net, weights.made()), net.out.bias.detach().clone()
    parameters = weights.parameters(["out"])
    assert [tuple(p.shape) for p in parameters] == [(5, 6), (5,)] and not weights.parameters(["conv"])
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    with student.running():
        student({"sample": torch.randn(2, 4, 5, 5)}).square().sum().backward()
    optimizer.step()
    assert not torch.equal(weights.codes("out")[0].codes, codes["out"][0].codes)
    assert weights.codes("conv") == codes["conv"] and torch.equal(net.out.bias, bias)
    weights.store_biases()
    assert torch.equal(net.out.bias, parameters[1]) and not torch.equal(net.out.bias, bias)


def test_halves_are_not_tuned() -> None:
    with pytest.raises(QuantizationError, match="two halves"):
        setting(True, ("conv",))
