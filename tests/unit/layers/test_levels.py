"""Stored ranges of inputs that follow the noise level: which one computes, storing, checking, thinning."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import ActivationSpec, QuantSpec, activation
from hfq.layers import levels, swap, times
from hfq.layers.conv import SecondHalf
from hfq.layers.products import AttentionProducts, empty_products
from hfq.layers.times import NoiseLevels
from hfq.report import Report
from hfq.rounding import nearest


class Net(nn.Module):
    """A convolution and a linear, called as a denoiser is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.linear = nn.Linear(6, 5)

    def forward(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        return self.linear(self.conv(sample).flatten(2).transpose(1, 2))


STEPS = [900.0, 500.0, 100.0]
SPEC = ActivationSpec(4, granularity="tensor", dynamic=False)
TABLE = torch.tensor([0.5, 0.3, 0.1]), torch.tensor([8.0, 7.0, 3.0])
X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def packed(cut: bool = False, report: Report | None = None) -> Net:
    torch.manual_seed(0)
    net, here = Net().eval(), NoiseLevels(STEPS)
    for name in ("conv", "linear"):
        weight = net.get_submodule(name).weight.detach()
        halves = [weight[:, :1].flatten(1), weight[:, 1:].flatten(1)] if cut and name == "conv" else [weight.flatten(1)]
        codes = [nearest.solve(half, QuantSpec(4, -1)) for half in halves]
        first = TABLE[0][:1], TABLE[1][:1]
        second = SecondHalf(1, codes[1], first) if len(codes) > 1 else None
        layer = swap.swap(net, name, codes[0], report, activation=SPEC, activation_params=first, second=second)
        tables = {"weight": TABLE} if second is None else {"weight": TABLE, "second": (TABLE[0] * 2, TABLE[1])}
        levels.follow(layer, here, tables, None if report is None else report.rows[name])
    times.install(net, here)
    return net


def outputs(net: nn.Module, steps: list[float] = STEPS) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([net(X, torch.tensor(t)) for t in steps])


@pytest.mark.parametrize("cut", [False, True])
def test_a_call_uses_the_ranges_of_its_timestep(cut: bool) -> None:
    net = packed(cut)
    found = outputs(net)
    for index in range(3):
        params = tuple(t[index : index + 1] for t in TABLE)
        wide = (params[0] * 2, params[1])
        x = activation.fake(X, SPEC, params)
        x = torch.cat([x[:, :1], activation.fake(X[:, 1:], SPEC, wide)], 1) if cut else x
        x = nn.functional.conv2d(x, net.conv.dequantize(dtype=torch.float32), net.conv.bias, padding=1)
        x = activation.fake(x.flatten(2).transpose(1, 2), SPEC, params)
        y = nn.functional.linear(x, net.linear.dequantize(dtype=torch.float32), net.linear.bias)
        assert torch.allclose(found[index], y, atol=1e-4)
    swap.prepare(net)
    assert torch.allclose(outputs(net), found, atol=1e-4) and not torch.equal(found[0], found[1])
    # The timestep says which, not the number of calls: warm-up calls, and both halves of guidance called one by one.
    assert torch.equal(outputs(net, [500, 500, 500, 900, 120]), outputs(net)[[1, 1, 1, 0, 2]])
    with pytest.raises(QuantizationError, match="outside of its model"):
        net.linear(torch.ones(1, 6))


def test_the_manifest_rebuilds_the_layers() -> None:
    report = Report()
    net = packed(cut=True, report=report)
    manifest = json.loads(json.dumps(swap.describe(net)))
    assert manifest["noise_levels"] == STEPS and manifest["layers"]["linear"]["levels"] == 3
    other = Net().eval()
    swap.build_empty(other, manifest)
    other.load_state_dict(net.state_dict())
    swap.check(other)
    assert torch.equal(outputs(other), outputs(net)) and swap.describe(other) == manifest
    assert not swap.build_empty(other, manifest)
    # 40 bits a level beside codes, scale and zero point of a row.
    assert report.rows["linear"].bits == pytest.approx(4 + (16 + 8) / 6 + 3 * 40 / 30)
    half = copy.deepcopy(net).bfloat16().linear.input_scale
    assert half.dtype == torch.float32 and torch.equal(half, net.linear.input_scale)


def test_damage_is_an_error_that_names_the_layer() -> None:
    net = packed()
    good = swap.describe(net)
    for change, what in [({"noise_levels": [1.0]}, "conv"), ({"noise_levels": None}, "conv")]:
        bad = {key: value for key, value in {**good, **change}.items() if value is not None}
        with pytest.raises(CheckpointError, match=what):
            swap.build_empty(Net(), bad)
    for leaf, at, value in (("input_scale", 1, -1.0), ("input_scale", 2, float("nan")), ("input_zero_point", 1, 16)):
        broken = packed()
        broken.linear._parameters[leaf].data[at] = value
        with pytest.raises(CheckpointError, match="linear"):
            swap.check(broken)
    plain = swap.swap(Net(), "linear", nearest.solve(Net().linear.weight, QuantSpec(4, -1)))
    with pytest.raises(QuantizationError, match="no stored range"):
        levels.follow(plain, NoiseLevels(STEPS), {})


@pytest.mark.must_hold("efficientdm", 11)
def test_fewer_levels_are_the_ones_at_the_matching_timesteps() -> None:
    net = packed()
    before = outputs(net)
    levels.thin(net, STEPS)
    assert torch.equal(outputs(net), before) and torch.equal(net.conv.input_scale, TABLE[0])
    levels.thin(net, [890.0, 90.0])
    assert torch.equal(net.linear.input_scale, TABLE[0][[0, 2]]) and len(times.of(net)) == 2
    assert torch.equal(outputs(net, [900, 100]), before[[0, 2]])
    assert swap.describe(net)["layers"]["conv"]["levels"] == 2
    with pytest.raises(QuantizationError, match="no ranges"):
        levels.thin(Net(), STEPS)


@pytest.mark.must_hold("efficientdm", 11)
def test_a_fifth_of_the_levels() -> None:
    steps = [float(t) for t in range(990, -10, -10)]
    net, here = Net(), NoiseLevels(steps)
    layer = swap.swap(net, "linear", nearest.solve(net.linear.weight, QuantSpec(4, -1)), activation=SPEC,
                      activation_params=(torch.ones(1), torch.zeros(1)))  # fmt: skip
    levels.follow(layer, here, {"weight": (torch.arange(1.0, 101.0), torch.zeros(100))})
    times.install(net, here)
    levels.thin(net, steps[::5])
    assert net.linear.input_scale.tolist() == list(range(1, 101, 5))


def test_attention_follows_levels_too() -> None:
    sides = dict.fromkeys(("query", "key", "value", "probabilities"), SPEC)
    part = AttentionProducts(8, **sides, levels=NoiseLevels(STEPS))
    for name in sides:
        part.set_range(name, TABLE if name != "probabilities" else (torch.full((3,), 1 / 15), torch.zeros(3)))
    plain = AttentionProducts(8, **sides)
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(2))
    for index, t in enumerate(STEPS):
        for name in sides:
            plain.set_range(name, tuple(one[index : index + 1] for one in part.stored(name)))
        with times.at(t):
            assert torch.equal(part(q, k, v, None, None)[0], plain(q, k, v, None, None)[0])
    entry = {"module": "attn", **json.loads(json.dumps(part.describe()))}
    again = empty_products(nn.Linear(2, 2), entry, "attn", NoiseLevels(STEPS))
    again.load_state_dict(part.state_dict())
    again.check("attn")
    with pytest.raises(CheckpointError, match="attn"):
        empty_products(nn.Linear(2, 2), entry, "attn")
