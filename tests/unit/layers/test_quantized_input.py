"""Packed layers with quantized inputs and parts in front: forward, manifest, rebuild, casts, refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from hfq import kernels
from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import ActivationSpec, QuantSpec, activation, affine
from hfq.layers import ChannelScale, Hadamard, swap
from hfq.layers.inputs import Chain, join
from hfq.report import Report

K, N = 48, 24
STATIC = ActivationSpec(8, False, "tensor", dynamic=False)
FORMATS = {
    "token": ActivationSpec(8), "symmetric": ActivationSpec(8, True), "four": ActivationSpec(4, group_size=16),
    "tensor": ActivationSpec(8, True, "tensor"), "static": STATIC,
    "static symmetric": ActivationSpec(8, True, "tensor", dynamic=False), "factor": ActivationSpec(8, factor=True),
}  # fmt: skip


class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.1), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Net(nn.Module):
    def __init__(self, kind="linear"):
        super().__init__()
        self.proj = nn.Linear(K, N) if kind == "linear" else Conv1D(N, K)
        self.head = nn.Linear(N, 4)

    def forward(self, x):
        return self.head(self.proj(x))


def inputs(rows=7):
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows))
    x[:, 5] *= 20
    return x


def stored(spec):
    x = inputs(64)
    params = None if spec.dynamic else activation.range_parameters(x.amin().view(1), x.amax().view(1), spec)
    return {"activation_params": params, "activation_factor": torch.tensor([0.9]) if spec.factor else None}


def packed(spec=FORMATS["token"], kind="linear", online=None, seed=0, **options):
    torch.manual_seed(seed)
    model, report = Net(kind), Report()
    weight = model.proj.weight.detach() if kind == "linear" else model.proj.weight.detach().t()
    whole = join(online)
    weight = weight if whole is None else whole.fold(weight)
    codes = affine.quantize(weight, QuantSpec(8))
    given = {**stored(spec), **options} if spec is not None else options
    swap.swap(model, "proj", codes, report, online=online, activation=spec, **given)
    return model, report


def wanted(layer, x, spec, options):
    x = x if layer.online is None else layer.online(x)
    q = activation.fake(x, spec, options["activation_params"], options["activation_factor"])
    weight = kernels.dequantize(layer.packed()[0])
    return nn.functional.linear(q, weight, layer.bias)


PARTS = {
    "none": lambda: None, "scale": lambda: ChannelScale(torch.rand(K) + 0.5),
    "hadamard": lambda: Hadamard(K, 16, signs=torch.ones(K)),
    "both": lambda: [ChannelScale(torch.rand(K) + 0.5), Hadamard(K)],
}  # fmt: skip


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("name", FORMATS)
def test_forward_manifest_and_rebuild(name, kind, parts):
    spec = FORMATS[name]
    model, report = packed(spec, kind, PARTS[parts]())
    layer, x = model.proj, inputs()
    want = wanted(layer, x, spec, stored(spec))
    y = layer(x)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert layer.prepare() and layer(x.view(1, 7, K)).shape == (1, 7, N)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    chosen = [line.backend for line in layer.explain(4) if line.chosen]
    assert chosen == ["aten_int8"] and report.rows["proj"].asked["activation_bits"] == spec.bits
    assert report.rows["proj"].extra["activation"] == spec.to_dict()

    manifest = swap.describe(model)
    assert manifest["layers"]["proj"]["activation"] == spec.to_dict()
    state = model.state_dict()
    torch.manual_seed(9)
    other = Net(kind)
    with torch.device("meta"):
        empty = Net(kind)
    for fresh in (other, empty):
        assert swap.build_empty(fresh, manifest) == ["proj"]
        fresh.load_state_dict(state, assign=True)
        swap.check(fresh)
        assert swap.describe(fresh) == manifest
        assert fresh.proj.prepare() and torch.equal(fresh.proj(x), layer(x))
    assert not swap.build_empty(model, manifest)
    stored_bytes = sum(t.nbytes for n, t in state.items() if n.startswith("proj.") and n != "proj.bias")
    assert report.rows["proj"].bits == pytest.approx(8 * stored_bytes / (K * N))


@pytest.mark.parametrize("name", ["token", "static", "factor"])
def test_copies_casts_and_the_float_layer(name):
    spec = FORMATS[name]
    model, _ = packed(spec, online=PARTS["both"]())
    x, y = inputs(), packed(spec, online=None)[0].proj
    layer = model.proj
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    before = layer(x)
    half = copy.deepcopy(model).to(torch.bfloat16)
    kept = [p.dtype for n, p in half.named_parameters() if "input" in n or "vector" in n]
    assert torch.bfloat16 not in kept and half.proj(x.bfloat16()).dtype == torch.bfloat16
    assert (half.proj(x.bfloat16()).float() - before).norm() < 3e-2 * before.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    exact = nn.functional.linear(x, layer.weight, layer.bias)  # the float weight undoes the parts
    assert (exact - before).norm() < (2e-2 if name == "token" else 1e-1) * before.norm()
    swap.dequantize_modules(model)
    torch.testing.assert_close(model.proj(x), exact, rtol=1e-4, atol=1e-4)
    assert y.input_of("weight") is not None


def test_gradients_reach_the_input():
    model, _ = packed(online=PARTS["scale"]())
    x = inputs().requires_grad_()
    model.proj(x).sum().backward()
    want = kernels.dequantize(model.proj.packed()[0]).sum(0) * model.proj.online.vector
    torch.testing.assert_close(x.grad, want.expand(7, K), rtol=1e-4, atol=1e-4)


def test_compiles_to_one_graph():
    model, _ = packed(online=PARTS["scale"]())
    swap.prepare(model)
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="eager")(inputs())
        torch.testing.assert_close(got, model(inputs()), rtol=1e-4, atol=1e-4)


def test_a_merged_weight_keeps_the_parts():
    model, _ = packed(online=PARTS["both"]())
    old = model.proj.weight + 0
    with pytest.warns(UserWarning, match="rounded to 8 bits"):
        model.proj.weight = old + 0.01
    assert ((model.proj.weight + 0) - old - 0.01).abs().max() < 0.02


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 32, 16) * 0.1), nn.Parameter(torch.randn(3, 16, 32) * 0.1)

    def forward(self, x, expert):
        return nn.functional.linear(nn.functional.linear(x, self.up[expert]).relu(), self.down[expert])


@pytest.mark.parametrize("spec", [ActivationSpec(8), STATIC], ids=str)
def test_experts(spec):
    torch.manual_seed(0)
    model = nn.Module()
    model.bank = Experts()
    banks = {"up": model.bank.up.detach(), "down": model.bank.down.detach()}
    codes = {name: [affine.quantize(w, QuantSpec(8)) for w in bank] for name, bank in banks.items()}
    x = torch.randn(5, 16)
    params = None
    if not spec.dynamic:
        numbers = {"up": (0.03, 128.0), "down": (0.02, 0.0)}
        params = {name: (torch.tensor([a]), torch.tensor([b])) for name, (a, b) in numbers.items()}
    report = Report()
    bank = swap.swap_experts(model, "bank", codes, report, activation=spec, activation_params=params, transposed=False)

    def run(i):
        given = params or {"up": None, "down": None}
        weights = {name: affine.dequantize(codes[name][i]) for name in codes}
        hidden = nn.functional.linear(activation.fake(x, spec, given["up"]), weights["up"]).relu()
        return nn.functional.linear(activation.fake(hidden, spec, given["down"]), weights["down"])

    torch.testing.assert_close(bank(x, 1), run(1), rtol=1e-5, atol=1e-5)
    bank.prepare()
    torch.testing.assert_close(bank(x, 2), run(2), rtol=1e-5, atol=1e-5)
    manifest, state = swap.describe(model), model.state_dict()
    fresh = nn.Module()
    fresh.bank = Experts()
    swap.build_empty(fresh, manifest)
    fresh.load_state_dict(state)
    swap.check(fresh)
    assert fresh.bank.prepare() and torch.equal(fresh.bank(x, 0), bank(x, 0))
    assert report.rows["bank"].asked["activation_bits"] == 8
    swap.dequantize_modules(fresh)
    assert set(dict(fresh.named_parameters())) == {"bank.up", "bank.down"}


@pytest.mark.parametrize("options, words", [
    ({"activation_params": None}, "missing"),
    ({"activation_params": (torch.tensor([0.0]), torch.tensor([3.0]))}, "above zero"),
    ({"activation_params": (torch.tensor([float("inf")]), torch.tensor([3.0]))}, "above zero"),
    ({"activation_params": (torch.tensor([0.1]), torch.tensor([3.5]))}, None),
    ({"activation_factor": torch.ones(1)}, "not part of"),
])  # fmt: skip
def test_ranges_that_make_no_sense_are_refused(options, words):
    if words is None:
        packed(STATIC, **options)  # stored as a whole number
        return
    with pytest.raises(QuantizationError, match=words):
        packed(STATIC, **options)


@pytest.mark.parametrize("leaf, value, words", [
    ("input_scale", float("nan"), "above zero"), ("input_scale", -1.0, "above zero"), ("vector", 0.0, "above zero"),
    ("vector", float("inf"), "above zero"),
])  # fmt: skip
def test_damaged_parameters_are_found_after_loading(leaf, value, words):
    model, _ = packed(STATIC, online=PARTS["both"]())
    owner = model.proj if leaf.startswith("input") else model.proj.online.parts[0]
    getattr(owner, leaf).data.fill_(value)
    with pytest.raises(CheckpointError, match=words):
        swap.check(model)


def part(**entry):
    return lambda e: e["online"].__setitem__(0, entry)


@pytest.mark.parametrize("change, words", [
    (lambda e: e["activation"].__setitem__("bits", 12), "activation format"),
    (lambda e: e["activation"].__setitem__("wide", True), "activation format"),
    (lambda e: e.__setitem__("activation", "int8"), "activation format"),
    (part(kind="channel_scale", size=47), "size is 47"),
    (part(kind="channel_scale", size=K, x=1), "manifest entry"),
    (part(kind="givens", size=K, block=None, signs=False), "unknown online"),
    (lambda e: e.__setitem__("online", []), "list of 0"),
])  # fmt: skip
def test_damaged_manifests(change, words):
    manifest = swap.describe(packed(STATIC, online=PARTS["both"]())[0])
    change(manifest["layers"]["proj"])
    with pytest.raises(CheckpointError, match=words):
        swap.build_empty(Net(), manifest)


def test_manifests_from_before_there_were_activation_formats():
    model, _ = packed(None)
    manifest = swap.describe(model)
    assert manifest["layers"]["proj"].pop("activation") is None
    fresh = Net()
    assert swap.build_empty(fresh, manifest) == ["proj"] and not swap.build_empty(model, manifest)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(inputs()), model(inputs()))


def test_parts_refuse_what_does_not_fit():
    with pytest.raises(QuantizationError, match="above zero"):
        ChannelScale(torch.tensor([1.0, 0.0]))
    with pytest.raises(QuantizationError, match="one width"):
        Chain([ChannelScale(torch.ones(4)), ChannelScale(torch.ones(5))])
    with pytest.raises(QuantizationError, match="does not fit"):
        packed(online=None, seed=0) and swap.swap(Net(), "proj", affine.quantize(torch.randn(N, K), QuantSpec(8)),
                                                  online=ChannelScale(torch.ones(K + 1)))
    model = nn.Module()
    model.table = nn.Embedding(6, 8)
    with pytest.raises(QuantizationError, match="no inputs"):
        swap.swap(model, "table", affine.quantize(torch.randn(6, 8), QuantSpec(8)), activation=ActivationSpec(8))
