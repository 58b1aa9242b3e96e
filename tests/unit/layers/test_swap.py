from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import Codes, QuantSpec, affine
from hfq.layers import Hadamard, QConv1D, QEmbedding, QLinear, install_rotation, swap
from hfq.report import Report

pytestmark = pytest.mark.filterwarnings("ignore:.*slow backend:RuntimeWarning")
SPEC = QuantSpec(4, 32)


class Conv1D(nn.Module):
    """As transformers defines it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.turned = nn.Linear(64, 96), Conv1D(64, 96)

    def forward(self, hidden_states):
        return hidden_states + self.turned(self.fc(hidden_states))


class Model(nn.Module):
    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"embed": nn.Embedding(20, 64, padding_idx=0), "block": Block()})
        self.lm_head = nn.Linear(64, 20, bias=False)

    def forward(self, ids):
        return self.lm_head(self.model.block(self.model.embed(ids)))


def codes(module, spec=SPEC):
    weight = module.weight.detach()
    return affine.quantize(weight.t() if type(module).__name__ == "Conv1D" else weight, spec)


def packed_model(report=None):
    model = Model()
    for name in ("model.embed", "model.block.fc", "model.block.turned", "lm_head"):
        swap.swap(model, name, codes(model.get_submodule(name)), report)
    return model


IDS = torch.arange(20)[None]


class TestSwap:
    def test_kinds(self):
        model = packed_model()
        kinds = {name: type(module) for name, module in swap.packed_modules(model).items()}
        assert kinds == {
            "model.embed": QEmbedding, "model.block.fc": QLinear, "model.block.turned": QConv1D, "lm_head": QLinear,
        }  # fmt: skip
        assert model.model.embed.padding_idx == 0

    def test_computes_what_the_dequantized_weights_compute(self):
        model = Model()
        twin = copy.deepcopy(model)
        for name in ("model.embed", "model.block.fc", "model.block.turned", "lm_head"):
            c = codes(model.get_submodule(name))
            weight = twin.get_submodule(name).weight
            with torch.no_grad():
                weight.copy_(affine.dequantize(c).t() if name.endswith("turned") else affine.dequantize(c))
            swap.swap(model, name, c)
        wanted = twin(IDS)
        assert ((model(IDS) - wanted).norm() / wanted.norm()) < 8e-3

    def test_report_row(self):
        model, report = Model(), Report()
        weight = model.model.block.fc.weight.detach().clone()
        c = codes(model.model.block.fc)
        asked = {"bits": 3}
        options = {"asked": asked, "tokens": 77, "reason": "3 bits do not fit", "extra": {"clip": 0.9}}
        swap.swap(model, "model.block.fc", c, report, **options)
        row = report.rows["model.block.fc"]
        assert (row.kind, row.status) == ("linear", "packed")
        assert (row.reason, row.asked, row.tokens) == ("3 bits do not fit", asked, 77)
        assert row.error == pytest.approx(((weight - affine.dequantize(c)).norm() / weight.norm()).item(), rel=1e-4)
        assert row.bits == pytest.approx(4 + 24 / 32) and row.numel == 64 * 96 and row.extra == {"clip": 0.9}
        assert row.kernel in {choice.backend for choice in model.model.block.fc.explain()}
        json.dumps(report.to_dict(), allow_nan=False)

    def test_error_with_an_online_transform_is_that_of_the_product(self):
        model, report = Model(), Report()
        weight = model.model.block.fc.weight.detach().clone()
        online = Hadamard(64, signs=torch.ones(64, dtype=torch.int8))
        c = affine.quantize(online.fold(weight), SPEC)
        new = swap.swap(model, "model.block.fc", c, report, online=online)
        row = report.rows["model.block.fc"]
        assert row.error == pytest.approx(((weight - new.dequantize()).norm() / weight.norm()).item(), rel=1e-3)
        assert row.bits == pytest.approx(4.75 + 8 * 64 / (64 * 96))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtype_training_mode_and_bias(self, dtype):
        model = Model().to(dtype).eval()
        bias = model.model.block.fc.bias
        new = swap.swap(model, "model.block.fc", codes(model.model.block.fc))
        assert new.compute_dtype == dtype and not new.training and torch.equal(new.bias, bias)
        assert not any(p.requires_grad for p in new.parameters()) and new.scale.dtype == torch.float16

    def test_does_not_keep_a_larger_tensor_alive(self):
        model = Model()
        whole = affine.quantize(torch.randn(4 * 96, 64), SPEC)
        part = Codes(whole.codes[:96], whole.scale[:96], whole.zero_point[:96], SPEC)
        new = swap.swap(model, "model.block.fc", part)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in new.parameters())
        assert new.scale.data_ptr() != whole.scale.data_ptr()

    def test_weights_on_meta(self):
        model, report = Model(), Report()
        c = codes(model.model.block.fc)
        model.model.block.fc.to("meta")
        new = swap.swap(model, "model.block.fc", c, report)
        assert new.qweight.device.type == "cpu" and report.rows["model.block.fc"].error is None

    def test_refusals(self):
        class Scaled(nn.Embedding):
            def forward(self, ids):
                return super().forward(ids) * 8

        class Own(nn.Linear):
            def forward(self, x):
                return super().forward(x).relu()

        model = nn.ModuleDict({
            "norm": nn.LayerNorm(8), "scaled": Scaled(4, 8), "own": Own(8, 8), "lin": nn.Linear(8, 8),
            "attention": nn.MultiheadAttention(8, 2), "limited": nn.Embedding(4, 8, max_norm=1.0),
        })  # fmt: skip
        c = affine.quantize(torch.randn(8, 8), QuantSpec(4))
        for name, words in (
            ("norm", "no packed layer replaces LayerNorm"), ("scaled", "more than a look-up"),
            ("own", "more than nn.Linear"), ("attention.out_proj", "MultiheadAttention"),
            ("limited", "more than a look-up"), ("nothing", "no module 'nothing'"), ("", "itself"),
        ):  # fmt: skip
            with pytest.raises(QuantizationError, match=words) as caught:
                swap.swap(model, name, c)
            assert name in str(caught.value)
        with pytest.raises(QuantizationError, match="lin: codes of"):
            swap.swap(model, "lin", affine.quantize(torch.randn(8, 4), QuantSpec(4)))
        with pytest.raises(QuantizationError, match="16 features"):
            swap.swap(model, "lin", c, online=Hadamard(16))
        bad = Codes(c.codes, c.scale * float("inf"), c.zero_point, c.spec)
        with pytest.raises(QuantizationError, match="lin.scale"):
            swap.swap(model, "lin", bad)
        nan = model.lin.weight.detach().clone()
        with torch.no_grad():
            model.lin.weight[0, 0] = float("nan")
        with pytest.raises(QuantizationError, match="not finite"):
            swap.swap(model, "lin", affine.quantize(nan, QuantSpec(4)))
        assert type(model.lin) is nn.Linear
        with torch.no_grad():
            model.lin.weight.copy_(nan)
        swap.swap(model, "lin", c)
        with pytest.raises(QuantizationError, match="packed already"):
            swap.swap(model, "lin", c)


class TestWholeModel:
    def test_freeze(self):
        model = packed_model()
        install_rotation(model, "model.block", "model.block", "hadamard", {"signs": torch.ones(64, dtype=torch.int8)})
        model.extra = nn.Linear(2, 2)
        for p in model.parameters():
            if p.is_floating_point():
                p.requires_grad_(True)
        swap.prepare(model)
        swap.freeze(model)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {"extra.weight", "extra.bias"}

    def test_prepare(self):
        model = packed_model()
        y = model(IDS)
        assert set(swap.prepare(model)) == {"model.block.fc", "model.block.turned", "lm_head"}
        assert ((model(IDS) - y).norm() / y.norm()) < 8e-3
        assert swap.prepare(Model()) == []

    def test_cached_memory_is_asked_for(self):
        model = packed_model()
        swap.prepare(model)
        compact = model.model.block.fc.nbytes
        swap.prepare(model, "cached")
        assert model.model.block.fc.nbytes >= compact + 64 * 96
        y = model(IDS)
        swap.prepare(model)
        assert model.model.block.fc.nbytes == compact
        assert ((model(IDS) - y).norm() / y.norm()) < 8e-3

    @pytest.mark.parametrize("prepared", [False, True])
    def test_dequantize(self, prepared):
        model = Model()
        online = Hadamard(96)
        report = Report()
        swap.swap(model, "model.embed", codes(model.model.embed))
        swap.swap(model, "model.block.fc", codes(model.model.block.fc, QuantSpec(8)))
        turned = model.model.block.turned
        c = affine.quantize(online.fold(turned.weight.detach().t()), QuantSpec(8, scale_dtype="float32"))
        swap.swap(model, "model.block.turned", c, report, online=online)
        y = model(IDS)
        if prepared:
            swap.prepare(model)
        names = swap.dequantize_modules(model)
        assert names == ["model.embed", "model.block.fc", "model.block.turned"]
        assert (type(model.model.embed), type(model.model.block.fc)) == (nn.Embedding, nn.Linear)
        assert type(model.model.block.turned) is Conv1D and model.model.block.turned.nf == 64
        assert model.model.embed.padding_idx == 0
        assert ((model(IDS) - y).norm() / y.norm()) < 8e-3
        assert not [n for n in model.state_dict() if "scale" in n or "online" in n]

    def test_dequantize_to_another_dtype(self):
        model = packed_model()
        swap.dequantize_modules(model, torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def put(module, **tensors):
    module._parameters.update({name: nn.Parameter(t, requires_grad=False) for name, t in tensors.items()})


class TestCheck:
    @pytest.mark.parametrize(
        ("name", "change", "words"),
        [
            ("model.block.fc", lambda m: m.zero_point.fill_(16), "model.block.fc.zero_point.*16; 4 bits allow 15"),
            ("lm_head", lambda m: m.scale[3].fill_(float("nan")), "lm_head.scale"),
            ("lm_head", lambda m: m.scale[0].fill_(0), "lm_head.scale"),
            ("model.embed", lambda m: m.scale[0].neg_(), "model.embed.scale"),
            ("model.block.turned", lambda m: m.bias[0].fill_(float("inf")), "model.block.turned.bias"),
            ("lm_head", lambda m: m._parameters.update(scale=None), "lm_head.scale is None"),
            ("lm_head", lambda m: put(m, qweight=m.qweight[..., 1:]), "lm_head.qweight"),
            ("lm_head", lambda m: put(m, zero_point=m.zero_point.float()), "lm_head.zero_point is torch.float32"),
        ],
    )  # fmt: skip
    def test_names_the_tensor(self, name, change, words):
        model = packed_model()
        swap.check(model)
        with torch.no_grad():
            change(model.get_submodule(name))
        with pytest.raises(CheckpointError, match=words):
            swap.check(model)
        with pytest.raises(CheckpointError, match=words):
            swap.check_codes(model.get_submodule(name))

    def test_float_zero_points_signs_and_rotations(self):
        model = nn.ModuleDict({"lin": nn.Linear(64, 8), "block": nn.Linear(64, 64)})
        online = Hadamard(64, signs=torch.ones(64, dtype=torch.int8))
        c = affine.quantize(torch.randn(8, 64), QuantSpec(4, zero_point="float"))
        new = swap.swap(model, "lin", c, online=online)
        install_rotation(model, "block", "block", "dense", {"matrix": torch.eye(64)})
        swap.check(model)
        for tensor, value, words in (
            (new.zero_point, float("nan"), "lin.zero_point"), (new.online.signs, 3, "lin.online.signs"),
            (model.block.hfq_rotation_out.matrix, 0.5, "block.hfq_rotation_out.matrix is not orthogonal"),
        ):  # fmt: skip
            kept = tensor.detach().clone()
            with torch.no_grad():
                tensor.flatten()[0] = value
            with pytest.raises(CheckpointError, match=words):
                swap.check(model)
            with torch.no_grad():
                tensor.copy_(kept)
        swap.check(model)
