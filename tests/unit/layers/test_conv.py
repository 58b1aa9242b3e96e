"""Packed convolutions as modules: what they compute, hold, save, and how they are rebuilt; folded normalisations."""

import copy

import pytest
import torch
from torch import nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import ActivationSpec, QuantSpec, activation, affine
from hfq.graph import read
from hfq.layers import folded, swap
from hfq.layers.conv import QConv2d
from hfq.report import Report
from hfq.rounding.split import split
from hfq.transforms.fold import fold_batch_norms

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:.*slow backend")

STATIC = ActivationSpec(8, False, "tensor", dynamic=False)
KINDS = {
    "plain": dict(kernel_size=3, padding=1),
    "stride, groups": dict(kernel_size=3, stride=2, padding=(1, 0), groups=4),
    "dilation": dict(kernel_size=(3, 5), dilation=(2, 1), padding=(2, 2)),
    "same": dict(kernel_size=3, padding="same"),
    "same, even": dict(kernel_size=(2, 4), padding="same"),
    "valid": dict(kernel_size=3, padding="valid", bias=False),
    "reflect": dict(kernel_size=3, padding=1, padding_mode="reflect"),
    "replicate": dict(kernel_size=5, padding=(2, 1), padding_mode="replicate", stride=2),
    "circular": dict(kernel_size=3, padding="same", padding_mode="circular"),
}


def packed(kind="plain", bits=8, act=STATIC, x=None, report=None, **more):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, **KINDS[kind]))
    codes = affine.quantize(model[0].weight.detach().flatten(1), QuantSpec(bits, symmetric=bits == 8))
    params = None
    if act is not None and not act.dynamic:
        params = activation.range_parameters(x.amin().view(1), x.amax().view(1), act)
    exact = copy.deepcopy(model).double()
    exact[0].weight.data = affine.dequantize(codes, torch.float64).view(model[0].weight.shape)
    swap.swap(model, "0", codes, report, activation=act, activation_params=params, **more)
    return model, exact, params


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", [None, STATIC])
def test_it_computes_the_convolution_of_what_it_holds(kind, act):
    x = torch.randn(2, 8, 9, 8) + 0.5
    model, exact, params = packed(kind, act=act, x=x)
    with torch.no_grad():
        want = exact((x if act is None else activation.fake(x, act, params)).double())
        for _ in range(2):
            y = model(x)
            assert y.shape == want.shape and y.dtype == x.dtype
            assert (y - want).norm() <= (1e-6 if act else 4e-3) * want.norm()
            torch.testing.assert_close(model[0](x[0]), y[0], rtol=1e-5 if act else 2e-2, atol=1e-5 if act else 2e-2)
            model[0].prepare()
    torch.testing.assert_close(model[0].weight.to(torch.float64), exact[0].weight, rtol=1e-6, atol=1e-6)


def test_it_saves_canonical_tensors_whatever_it_runs_on():
    x = torch.randn(2, 8, 6, 6)
    model, _, _ = packed(x=x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set(before) == {"0.qweight", "0.scale", "0.bias", "0.input_scale", "0.input_zero_point"}
    assert before["0.qweight"].shape == (1, 16, 72)
    model[0].prepare()
    y = model(x)
    for other in (model, copy.deepcopy(model), model.to(torch.float64).to(torch.float32)):
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
        assert torch.equal(other(x), y)
    assert model[0].nbytes < 2.5 * 16 * 72


@pytest.mark.parametrize("coarse", [False, True])
def test_it_is_rebuilt_from_the_manifest(coarse):
    x = torch.randn(2, 8, 6, 6)
    report = Report()
    if coarse:
        model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1))
        parts = split(model[0].weight)
        params = activation.range_parameters(x.amin().view(1), x.amax().view(1), STATIC)
        swap.swap(model, "0", parts.fine, report, coarse=((1, 1), parts.coarse), activation=STATIC,
                  activation_params=params)
    else:
        model, _, _ = packed(x=x, report=report)
    row, stored = report.rows["0"], sum(t.nbytes for n, t in model.state_dict().items() if n != "0.bias")
    assert row.kind == "conv2d" and row.bits == pytest.approx(8 * stored / row.numel) and row.error < 0.02
    manifest = swap.describe(model)
    with torch.device("meta"):
        other = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1))
    assert swap.build_empty(other, manifest) == ["0"] and other[0].qweight.is_meta
    assert swap.build_empty(other, manifest) == []
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    swap.check(other)
    assert torch.equal(other(x), model(x)) and swap.describe(other) == manifest
    for wrong in ({"coarse": {"taps": [2, 2], "spec": row.asked}}, {"in_features": 71}, {"coarse": 3},
                  {"activation": ActivationSpec(8).to_dict()}, {"kind": "conv3d"}):
        damaged = {**manifest, "layers": {"0": {**manifest["layers"]["0"], **wrong}}}
        with pytest.raises(CheckpointError, match="0"):
            swap.build_empty(nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)), damaged)


def test_it_becomes_a_float_convolution_again():
    x = torch.randn(2, 8, 9, 8)
    for kind in KINDS:
        model, exact, _ = packed(kind, act=None, x=x)
        assert swap.dequantize_modules(model) == ["0"]
        assert type(model[0]) is nn.Conv2d
        torch.testing.assert_close(model(x).double(), exact(x.double()), rtol=1e-4, atol=1e-5)


def test_what_no_convolution_is_packed_as():
    class Other(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    codes = affine.quantize(torch.randn(16, 72), QuantSpec(8))
    for module, match in ((Other(8, 16, 3), "computes more"), (nn.Conv1d(8, 16, 9), "no packed layer")):
        with pytest.raises(QuantizationError, match=match):
            swap.swap(nn.Sequential(module), "0", codes)
    with pytest.raises(QuantizationError, match="granularity='tensor'"):
        packed(act=ActivationSpec(8))
    with pytest.raises(QuantizationError, match="second part"):
        swap.swap(nn.Sequential(nn.Linear(72, 16)), "0", codes, coarse=((1, 1), codes))


def test_gradients_reach_the_input():
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    model, exact, params = packed(act=STATIC, x=x.detach())
    model(x).sum().backward()
    z = x.detach().double().requires_grad_()
    exact(activation.fake(z, STATIC, params)).sum().backward()
    torch.testing.assert_close(x.grad.double(), z.grad, rtol=1e-4, atol=1e-4)


# Batch normalisations


class Net(nn.Module):
    """Two normalisations that fold; of the others one shares its input, one follows a sum, and one is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.first = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.b, self.plain = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False)
        self.c, self.shared = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.added, self.twice, self.d = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    nn.init.uniform_(module.weight, -1.5, 1.5)
                    nn.init.normal_(module.bias)

    def forward(self, x):
        x = self.first(self.a(x)).relu()
        x = self.plain(self.b(x)).relu()
        y = self.c(x)
        x = self.added(self.shared(y) + y)
        return self.head(self.twice(self.twice(self.d(x))).mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net().eval()


def test_normalisations_that_alone_read_a_convolution_are_folded():
    model, x = net(), torch.randn(2, 3, 6, 6)
    want = model(x)
    names = [name for name, _ in model.named_modules()]
    done = fold_batch_norms(read(model), lambda: model(x))
    assert done == {"a": "first", "b": "plain"}
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert isinstance(model.first, folded.Folded) and model.a.bias is not None
    assert fold_batch_norms(read(model), lambda: model(x)) == {}
    # Names do not matter.
    other = net()
    other._modules = {f"m{i}": m for i, m in enumerate(other._modules.values())}
    places = {name: f"m{i}" for i, name in enumerate(n for n in names if n)}
    other.forward = lambda x: Net.forward(type("View", (), {n: other._modules[p] for n, p in places.items()}), x)
    assert fold_batch_norms(read(other), lambda: other(x)) == {"m0": "m1", "m2": "m3"}


def test_folded_models_are_rebuilt_and_restored():
    model, x = net(), torch.randn(2, 3, 6, 6)
    want = model(x)
    fold_batch_norms(read(model), lambda: model(x))
    manifest = swap.describe(model)
    other = net()
    swap.build_empty(other, manifest)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x)) and swap.describe(other) == manifest
    for wrong in ({"features": 9}, {"conv": "head"}, {"eps": "x"}, {"bias": 1}, {"more": 1}):
        entry = {**manifest["folded"][0], **wrong}
        with pytest.raises(CheckpointError, match="first"):
            swap.build_empty(net(), {**manifest, "folded": [entry]})
        with pytest.raises(CheckpointError, match="first"):
            swap.build_empty(other, {**manifest, "folded": [entry]})
    swap.build_empty(other, manifest)
    swap.dequantize_modules(model)
    assert type(model.first) is nn.BatchNorm2d and model.a.bias is None and type(model.plain) is nn.BatchNorm2d
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def test_training_mode_and_damaged_statistics_are_refused():
    model, x = net(), torch.randn(2, 3, 6, 6)
    model.first.train()
    with pytest.raises(QuantizationError, match=r"first .*model\.eval"):
        fold_batch_norms(read(model), lambda: model(x))
    model.first.eval().running_var.fill_(-1)
    with pytest.raises(QuantizationError, match="not finite"):
        fold_batch_norms(read(model), lambda: model(x))


def test_convolutions_of_a_convolutional_network_are_sites_and_a_patch_embedding_is_none():
    assert [site.name for site in read(net()).sites if site.kind == "conv"] == ["a", "b", "c", "d"]
    patches = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(2), nn.Linear(4, 4), nn.Linear(4, 4))
    assert "0" in read(patches).skipped
    assert isinstance(QConv2d(nn.Conv2d(3, 4, 1), QuantSpec(8)), QConv2d)


def test_narrow_inputs_are_widened_to_what_the_float_layer_computed_in():
    # A library that casts inputs to the dtype of a model's first floating parameter takes that of a scale here.
    x = torch.randn(2, 8, 9, 8)
    model, _, _ = packed("valid", x=x)
    assert model(x.half()).dtype == torch.float32
    assert torch.equal(model(x.half()), model(x.half().float()))
    assert model.half()(x.half()).dtype == torch.float16
