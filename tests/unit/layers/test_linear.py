from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn

from hfq.errors import KernelError, QuantizationError
from hfq.formats import Codes, QuantSpec, affine
from hfq.layers import Hadamard, QConv1D, QLinear
from hfq.layers.deferred import Deferred

pytestmark = pytest.mark.filterwarnings("ignore:.*slow backend:RuntimeWarning")

SPECS = [
    QuantSpec(4, 64), QuantSpec(4, 64, symmetric=True), QuantSpec(3, 32), QuantSpec(2, 128), QuantSpec(8),
    QuantSpec(8, 0), QuantSpec(4, 64, zero_point="float"), QuantSpec(5, 96, scale_dtype="float32"), QuantSpec(1, 64),
]  # fmt: skip
N, K = 48, 192


def layer(spec=SPECS[0], n=N, k=K, *, bias=True, cls=QLinear, online=None, dtype=torch.float32):
    weight = torch.randn(n, k)
    codes = affine.quantize(weight if online is None else online.fold(weight), spec)
    made = cls(k, n, spec, bias=torch.randn(n).to(dtype) if bias else None, compute_dtype=dtype, online=online)
    made.set_codes("weight", codes)
    return made, codes


def exact(module, codes, x):
    """The definition in float64."""
    w = affine.decode(codes.codes, codes.scale, codes.zero_point, codes.spec, torch.float64)
    y = x.double() @ w.t()
    return y if module.bias is None else y + module.bias.double()


def close(y, wanted, tolerance=8e-3):
    return ((y.double() - wanted).norm() / wanted.norm()).item() < tolerance


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("rows", [1, 37])
def test_forward_is_the_definition(spec, prepared, rows):
    module, codes = layer(spec)
    assert module.prepare() if prepared else not module.prepared
    x = torch.randn(2, rows, K)
    y = module(x)
    assert y.shape == (2, rows, N) and y.dtype == x.dtype
    assert close(y, exact(module, codes, x))


def test_form_of_the_tensors():
    module, codes = layer(QuantSpec(4, 64))
    shapes = {name: (tuple(p.shape), p.dtype) for name, p in module.named_parameters()}
    assert shapes == {
        "qweight": ((1, N, K // 2), torch.uint8), "scale": ((N, 3), torch.float16),
        "zero_point": ((N, 3), torch.uint8), "bias": ((N,), torch.float32),
    }  # fmt: skip
    assert not any(p.requires_grad for p in module.parameters()) and not list(module.buffers())
    assert not isinstance(module, nn.Linear) and module._hf_quantized_needs_local_tp
    assert (module.in_features, module.out_features) == (K, N)
    assert "48x192, 4 bits, group 64" in repr(module)
    assert layer(QuantSpec(4, 64, symmetric=True))[0].zero_point is None


class TestRuntimeForm:
    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_state_dict_and_parameters_stay_canonical(self, spec):
        module, _ = layer(spec)
        before = {name: t.clone() for name, t in module.state_dict().items()}
        module.prepare()
        module(torch.randn(3, K))
        after = module.state_dict()
        assert list(after) == list(before)
        for name, tensor in after.items():
            assert type(tensor) is torch.Tensor and tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
            assert torch.equal(dict(module.named_parameters())[name], before[name])
        kept = module.state_dict(keep_vars=True)["qweight"]
        assert not isinstance(kept, Deferred) and torch.equal(kept, before["qweight"])

    def test_replaces_the_codes_in_memory(self):
        module, _ = layer(QuantSpec(4, 64))
        module.prepare()
        if module.operand("weight").layout == "canonical":
            pytest.skip("no other layout on this machine")
        assert isinstance(module._parameters["qweight"], Deferred)

    @pytest.mark.parametrize(
        ("spec", "limit"),
        [(QuantSpec(4, 128), 1.10), (QuantSpec(4, 64), 1.12), (QuantSpec(4, 128, symmetric=True), 1.10),
         (QuantSpec(2, 128), 2.1), (QuantSpec(3, 128), 1.45), (QuantSpec(8), 1.10)],
        ids=str,
    )  # fmt: skip
    def test_live_tensors_after_the_first_forward(self, spec, limit):
        """Everything that came to life stays near the packed size: no float copy of the weight anywhere.

        (torch's 4-bit operator needs scales of its own beside the stored ones, 4 bytes a group, and takes narrower
        codes as 4-bit ones.)
        """
        n, k = 2048, 1024
        x = torch.randn(4, k)
        gc.collect()
        known = {id(o) for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}
        module, codes = layer(spec, n, k, bias=False)
        packed = codes.bits_per_weight() * n * k / 8
        del codes
        module.prepare()
        with torch.no_grad():
            module(x)
        gc.collect()
        live = {}
        for tensor in [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and id(o) not in known]:
            if not isinstance(tensor, Deferred):
                live[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        assert module.nbytes <= packed * limit
        # A workspace that all layers share may be there too; a whole weight in any float dtype may not.
        assert max(live.values()) < n * k * 2

    def test_prepares_again_after_a_move_or_load(self):
        module, codes = layer()
        module.prepare()
        x = torch.randn(3, K)
        y = module(x)
        module.to("cpu", torch.float32)
        assert not module.prepared
        assert torch.equal(module(x), y) and module.prepared
        other, _ = layer()
        module.load_state_dict(other.state_dict())
        assert not module.prepared
        assert torch.equal(module(x), other.prepare() and other(x))

    def test_a_tensor_put_in_its_place_wins(self):
        """As accelerate and the loaders do it."""
        module, _ = layer()
        other, codes = layer()
        module.prepare()
        module(torch.randn(1, K))
        for name, tensor in other.state_dict().items():
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        x = torch.randn(3, K)
        assert close(module(x), exact(other, codes, x))
        module.restore()
        assert torch.equal(module.qweight, other.qweight)

    def test_not_under_a_hook_nor_on_meta(self):
        module, _ = layer()
        module._hf_hook = object()
        assert not module.prepare() and not module.prepared
        assert not QLinear(K, N, QuantSpec(4), device="meta").prepare()

    def test_made_in_inference_mode_serves_training(self):
        module, codes = layer()
        with torch.inference_mode():
            module.prepare()
            module(torch.randn(1, K))
        x = torch.randn(2, K, requires_grad=True)
        module(x).sum().backward()
        w = affine.decode(codes.codes, codes.scale, codes.zero_point, codes.spec)
        assert close(x.grad, w.double().sum(0).expand(2, K), 1e-2)
        module.restore()
        assert not module.qweight.is_inference()


class TestCopiesAndCasts:
    @pytest.mark.parametrize("prepared", [False, True])
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_are_independent(self, prepared, duplicate):
        module, _ = layer()
        if prepared:
            module.prepare()
        x = torch.randn(3, K)
        y = module(x)
        other = duplicate(module)
        assert torch.equal(other(x), y)
        assert isinstance(other.qweight, nn.Parameter)
        with torch.no_grad():
            other.restore()
            other.scale.mul_(2)
        assert torch.equal(module(x), y) and not torch.equal(other(x), y)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("prepared", [False, True])
    def test_casts_leave_codes_and_scales_alone(self, dtype, prepared):
        module, codes = layer(QuantSpec(4, 64, scale_dtype="float32", zero_point="float"))
        before = {name: t.clone() for name, t in module.state_dict().items()}
        if prepared:
            module.prepare()
        assert module.to(dtype) is module
        for name in ("qweight", "scale", "zero_point"):
            assert torch.equal(module.state_dict()[name], before[name])
        assert module.scale.dtype == torch.float32
        assert module.bias.dtype == module.compute_dtype == module.weight.dtype == dtype
        x = torch.randn(3, K).to(dtype)
        y = module(x)
        assert y.dtype == dtype and close(y, exact(module, codes, x), 2e-2)

    def test_half_and_meta_and_to_empty(self):
        module, _ = layer()
        assert module.half().scale.dtype == torch.float16 and module.compute_dtype == torch.float16
        assert module.bfloat16().compute_dtype == torch.bfloat16
        meta = copy.deepcopy(module).to("meta")
        assert {p.device.type for p in meta.parameters()} == {"meta"} and meta.qweight.shape == module.qweight.shape
        assert meta.to_empty(device="cpu").scale.dtype == torch.float16

    def test_autocast(self):
        module, codes = layer()
        x = torch.randn(3, K)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16 and close(y, exact(module, codes, x), 2e-2)


class TestWeight:
    def test_reading_the_form_does_not_dequantize(self, monkeypatch):
        module, codes = layer()
        calls = []
        real = QLinear.dequantize
        monkeypatch.setattr(QLinear, "dequantize", lambda *a, **k: calls.append(1) or real(*a, **k))
        weight = module.weight
        assert weight.dtype == torch.float32 and weight.shape == (N, K) and weight.device.type == "cpu" and not calls
        assert torch.equal(weight + 0, affine.dequantize(codes)) and calls

    def test_is_the_weight_of_the_whole_layer(self):
        """With an online transform too: whoever computes with it gets the layer's function."""
        signs = torch.ones(K, dtype=torch.int8).index_fill(0, torch.tensor([3, 5]), -1)
        module, _ = layer(QuantSpec(8), online=Hadamard(K, signs=signs))
        x = torch.randn(5, K)
        y = torch.nn.functional.linear(x, module.weight, module.bias)
        assert close(module(x), y.double())

    def test_assigning_the_same_weight_changes_nothing(self):
        module, _ = layer()
        module.prepare()
        before = module.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module.weight = module.weight
            module.weight = nn.Parameter(module.weight + 0)
        assert "weight" not in module._parameters
        assert torch.equal(module.state_dict()["qweight"], before["qweight"])

    @pytest.mark.parametrize("cls", [QLinear, QConv1D])
    def test_assigning_another_weight_rounds_it_and_says_so(self, cls):
        module, codes = layer(QuantSpec(8), cls=cls, online=Hadamard(K))
        module.label = "mlp.up"
        new = module.weight * 0.5
        with pytest.warns(UserWarning, match="mlp.up.*8 bits"):
            module.weight = nn.Parameter(new)
        assert ((module.weight - new).norm() / new.norm()) < 0.02
        with pytest.raises(QuantizationError, match="mlp.up"):
            module.weight = torch.zeros(3, 3)

    def test_conv1d_is_turned(self):
        module, codes = layer(cls=QConv1D)
        assert (module.nx, module.nf) == (K, N) and module.weight.shape == (K, N)
        assert torch.equal(module.weight + 0, affine.dequantize(codes).t())
        x = torch.randn(2, 3, K)
        assert close(module(x), exact(module, codes, x))


@pytest.mark.parametrize("block", [None, 48])
def test_online_transform_and_folded_weight_cancel(block):
    signs = torch.where(torch.rand(K) < 0.5, -1, 1).to(torch.int8)
    online = Hadamard(K, block, signs=signs)
    weight = torch.randn(N, K)
    module = QLinear(K, N, QuantSpec(8, 32, scale_dtype="float32"), online=online)
    module.set_codes("weight", affine.quantize(online.fold(weight), module.spec))
    x = torch.randn(4, K)
    assert close(module(x), (x @ weight.t()).double(), 2e-2)
    assert close(module.dequantize(), weight.double(), 2e-2)
    assert "online.signs" in module.state_dict()


def test_gradients_reach_the_input():
    module, codes = layer(online=Hadamard(K))
    module.prepare()
    x = torch.randn(4, K, requires_grad=True)
    module(x).square().sum().backward()
    w = module.dequantize(dtype=torch.float64)
    y = x.detach().double().requires_grad_()
    (y @ w.t() + module.bias.double()).square().sum().backward()
    assert close(x.grad, y.grad, 2e-2)


@pytest.mark.parametrize("prepared", [False, True])
def test_full_graph(prepared):
    module, _ = layer(online=Hadamard(K))
    if prepared:
        module.prepare()

    def use(x):
        return module(x.to(module.weight.dtype)) * 2

    x = torch.randn(5, K)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(use, fullgraph=True, backend="aot_eager")(x), use(x), atol=1e-4, rtol=1e-2)


class TestRefusals:
    def test_codes_that_do_not_fit(self):
        module, codes = layer()
        for shape, spec in (((N, K), QuantSpec(3, 64)), ((K, N), module.spec)):
            wrong = affine.quantize(torch.randn(shape), spec)
            with pytest.raises(QuantizationError, match="is needed"):
                module.set_codes("weight", wrong)
        bad = Codes(codes.codes, codes.scale.clone().fill_(float("nan")), codes.zero_point, codes.spec)
        with pytest.raises(QuantizationError, match="scale"):
            module.set_codes("weight", bad)

    def test_a_row_of_planes_cannot_be_cut(self):
        """Tensor parallelism by columns."""
        module, codes = layer(QuantSpec(3, 32))
        module._parameters["qweight"] = nn.Parameter(module.qweight[..., : module.qweight.shape[-1] // 2], False)
        module._parameters["scale"] = nn.Parameter(module.scale[:, :3], False)
        with pytest.raises(KernelError, match="rows only"):
            module(torch.randn(1, K // 2))

    def test_shards_by_columns_sum_to_the_whole(self):
        spec = QuantSpec(4, 32)
        module, codes = layer(spec, bias=False)
        x = torch.randn(3, K)
        parts = []
        for i in range(2):
            shard = copy.deepcopy(module)
            shard._parameters["qweight"] = nn.Parameter(module.qweight.chunk(2, -1)[i].contiguous(), False)
            for name in ("scale", "zero_point"):
                shard._parameters[name] = nn.Parameter(getattr(module, name).chunk(2, -1)[i].contiguous(), False)
            parts.append(shard(x.chunk(2, -1)[i]))
        assert close(parts[0] + parts[1], exact(module, codes, x))
