"""Gradients and sensitivities of models that are called, or that compute, in other ways than transformers do."""

from __future__ import annotations

import torch
from torch import nn

from hfq.allocation import relevance
from hfq.calibration import gradients, perturbation
from hfq.graph import read

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Its argument has a name of its own, and everything is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 4, 3), nn.Linear(144, 16), nn.Linear(16, 5)
        self.act = nn.ReLU(inplace=True)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        x = self.fc1(self.act(self.conv(picture)).flatten(1))
        return self.fc2(self.act(x))


def net(inplace: bool = True) -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    model.act.inplace = inplace
    return model


def batches(name: str) -> list[dict[str, torch.Tensor]]:
    return [{name: IMAGES[:3]}, {name: IMAGES[3:]}]


def test_a_single_input_is_given_by_position_where_forward_knows_another_name() -> None:
    model = net()
    for found, wanted in zip(gradients.predictions(model, batches("pixel_values")),
                             gradients.predictions(model, batches("picture")), strict=True):
        assert torch.equal(found, wanted)
    assert gradients.divergence(model, batches("pixel_values"), gradients.predictions(model, batches("picture"))) == 0
    shares = [relevance.shares(model, batches(name)).shares for name in ("pixel_values", "picture")]
    assert shares[0] == shares[1]


def test_operations_in_place_change_no_gradient() -> None:
    """The gradient at a layer is that of its own output, before what follows writes over it."""
    found = []
    for inplace in (True, False):
        model = net(inplace)
        sites = [site for site in read(model).every_site if site.kind == "linear"]
        found.append(gradients.collect(model, batches("picture"), sites))
    for name, rows in found[0].items():
        assert torch.equal(rows.gradients, found[1][name].gradients) and bool(rows.gradients.any())
        assert torch.equal(rows.inputs, found[1][name].inputs)


def test_operations_in_place_change_no_sensitivity() -> None:
    plain, inplace = (perturbation.Probe(net(how), batches("picture"), delta=1e-2) for how in (False, True))
    for name in ("conv", "fc1"):
        found = inplace.average(inplace.model.get_submodule(name))
        assert torch.equal(found, plain.average(plain.model.get_submodule(name))) and bool(found.any())


def test_operations_in_place_change_no_relevance() -> None:
    for score in ("abs", "grad"):
        found = [relevance.shares(net(how), batches("picture"), score=score).shares for how in (True, False)]
        assert found[0] == found[1]


def test_no_layer_to_watch_is_no_pass() -> None:
    assert gradients.collect(net(), batches("picture"), []) == {}
