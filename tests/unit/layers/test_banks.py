"""Banks of input groups in packed layers and attention: storing, checking, casting, copying."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from hfq import kernels
from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import ActivationSpec, QuantSpec
from hfq.kernels import grouped
from hfq.layers import swap, times
from hfq.layers.banks import InputBanks, empty_banks
from hfq.layers.times import NoiseLevels
from hfq.rounding import nearest


class Net(nn.Module):
    """A convolution and a linear, called as a denoiser is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")
        self.linear = nn.Linear(6, 5)

    def forward(self, sample: torch.Tensor, timestep: float) -> torch.Tensor:
        return self.linear(self.conv(sample).flatten(2).transpose(1, 2))


LEVELS = NoiseLevels([10.0, 5.0, 1.0])


def banks(rows: int = 16, columns: int = 36, count: int = 3, levels: NoiseLevels = LEVELS) -> InputBanks:
    """A bank of columns, one of rows, and one without groups."""
    scale, zero = torch.rand(3, count) * 0.02 + 0.02, torch.randint(100, 150, (3, count))
    labels = (torch.arange(columns) % count, torch.arange(rows) // 7, torch.zeros(0, dtype=torch.int64))
    given = zip(("columns", "rows", "tensor"), labels, scale, zero, strict=True)
    return InputBanks.of(list(given), 8, levels)  # type: ignore[arg-type]


def packed(bits: int = 4) -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    for name in ("conv", "linear"):
        weight = net.get_submodule(name).weight.detach().flatten(1)
        swap.swap(net, name, nearest.solve(weight, QuantSpec(bits, -1)))
    times.install(net, LEVELS)
    net.conv.group_inputs(banks())
    net.linear.group_inputs(banks(16, 6))
    return net


X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def outputs(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([net(X, t) for t in (12, 5, 0)])


def test_every_bank_serves_its_level() -> None:
    net = packed()
    found = outputs(net)
    for index, t in enumerate((12, 5, 0)):
        x = nn.functional.pad(X, (1, 1, 1, 1), mode="circular")
        x = nn.functional.unfold(x, 3).transpose(1, 2)
        for layer in (net.conv, net.linear):
            bank = layer.banks.at(index)
            x = grouped.decoded(x, bank) @ layer.dequantize(dtype=torch.float32).flatten(1).t() + layer.bias
        assert torch.allclose(found[index], x, atol=1e-5) and t is not None
    assert not torch.equal(found[0], found[1])
    swap.prepare(net)
    assert torch.allclose(outputs(net), found, atol=1e-5) and net.conv.prepared
    names = {choice.backend for choice in net.conv.explain(16) if choice.chosen}
    assert names == {"partial_sums"} and swap.kernel_of(net.conv) == "partial_sums"


def test_labels_are_stored_in_as_few_bits_as_they_need() -> None:
    part = banks()
    assert part.labels.numel() == 13 and part.zero_point.dtype == torch.int16
    every = part.every_label()
    assert torch.equal(every, torch.cat([torch.arange(36) % 3, torch.arange(16) // 7]))
    assert "1 along columns, 1 along rows, 1 along tensor" in repr(part)


def test_casts_and_copies_keep_every_bit() -> None:
    net = packed()
    want = {name: tensor.clone() for name, tensor in net.state_dict().items() if "banks" in name}
    other = copy.deepcopy(net)
    assert torch.equal(outputs(other), outputs(net)) and other.conv.banks.levels is other.linear.banks.levels
    for name, tensor in other.to(torch.bfloat16).state_dict().items():
        assert name not in want or (torch.equal(tensor, want[name]) and tensor.dtype == want[name].dtype)
    with torch.no_grad():
        assert other(X.bfloat16(), 5).dtype == torch.bfloat16


def test_manifest_and_reload() -> None:
    net = packed()
    manifest = json.loads(json.dumps(swap.describe(net)))
    with torch.device("meta"):
        empty = Net().eval()
    swap.build_empty(empty, manifest)
    assert empty.conv.banks.scale.is_meta
    empty.load_state_dict(net.state_dict(), assign=True)
    swap.check(empty)
    assert torch.equal(outputs(empty), outputs(net)) and swap.describe(empty) == manifest
    assert swap.build_empty(empty, manifest) == []
    plain = swap.dequantize_modules(net)
    assert plain == ["conv", "linear"] and times.of(net) is None and torch.isfinite(outputs(net)).all()


@pytest.mark.parametrize("wrong", [
    lambda m: m.pop("noise_levels"), lambda m: m.update(noise_levels=[1.0]), lambda m: m.update(noise_levels=["a"]),
    lambda m: m["layers"]["conv"]["groups"].update(axes="cr"), lambda m: m["layers"]["conv"].update(groups=3),
    lambda m: m["layers"]["conv"]["groups"].update(columns=35), lambda m: m["layers"]["conv"]["groups"].update(bits=77),
])  # fmt: skip
def test_damaged_manifests(wrong) -> None:
    manifest = json.loads(json.dumps(swap.describe(packed())))
    wrong(manifest)
    net = Net()
    with pytest.raises(CheckpointError):
        swap.build_empty(net, manifest)
    assert isinstance(net.conv, nn.Conv2d) and times.of(net) is None


@pytest.mark.parametrize(("leaf", "value"), [
    ("scale", float("nan")), ("scale", 0.0), ("zero_point", -32768), ("labels", 255),
])  # fmt: skip
def test_damaged_tensors(leaf: str, value: float) -> None:
    net = packed()
    net.conv.banks._parameters[leaf].data.fill_(value)
    with pytest.raises(CheckpointError, match=f"conv.banks.{leaf}"):
        swap.check(net)


def test_what_cannot_be_put_together() -> None:
    net = packed()
    with pytest.raises(QuantizationError, match="already"):
        net.linear.group_inputs(banks(16, 6))
    other = Net()
    swap.swap(other, "linear", nearest.solve(other.linear.weight.detach(), QuantSpec(4, 3)))
    with pytest.raises(QuantizationError, match="one scale a row"):
        other.linear.group_inputs(banks(16, 6))
    swap.swap(other, "conv", nearest.solve(other.conv.weight.detach().flatten(1), QuantSpec(4, -1)))
    with pytest.raises(QuantizationError, match="36"):
        other.conv.group_inputs(banks(16, 37))
    with pytest.raises(QuantizationError, match="noise levels"):
        banks(levels=NoiseLevels([1.0]))
    with pytest.raises(CheckpointError, match="no noise levels"):
        empty_banks(banks().describe(), None, "x", "cpu")
    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    swap.swap(depthwise, "0", nearest.solve(depthwise[0].weight.detach().flatten(1), QuantSpec(8, -1)))
    with pytest.raises(QuantizationError, match="4 groups"):
        depthwise[0].group_inputs(banks(16, 9))
    static = nn.Sequential(nn.Linear(6, 5))
    swap.swap(static, "0", nearest.solve(static[0].weight.detach(), QuantSpec(4, -1)), activation=ActivationSpec(8))
    with pytest.raises(QuantizationError, match="already"):
        static[0].group_inputs(banks(16, 6))


def test_another_number_of_rows_is_said_once() -> None:
    net = packed()
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match="16 rows, and there are 25"):
            net(x, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert net(x, 5).shape == (1, 25, 5)


def test_gradients_reach_the_input() -> None:
    net, x = packed(), X.clone().requires_grad_(True)
    net(x, 5).square().sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    with torch.no_grad():
        assert torch.allclose(net(X, 5), net(x, 5), atol=1e-5)
    with kernels.use(grouped="reference"), torch.no_grad():
        assert torch.allclose(net(X, 12), outputs(net)[0], atol=1e-5)
