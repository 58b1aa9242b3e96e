"""Banks of experts of several architectures, through their own forward."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.formats import QuantSpec, affine
from hfq.layers import QExperts, swap
from hfq.layers.experts import ExpertWeight
from hfq.report import Report

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*slow backend:RuntimeWarning")

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0,
}  # fmt: skip
# Class names, the extra configuration, and whether the float weights are [E, in, out].
MODELS = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {}, False),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", {"head_dim": 16}, True),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM",
               {"head_dim": 16, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1}, True),
}  # fmt: skip


def build(name):
    config, model, extra, transposed = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**{**SMALL, **extra})
    return getattr(transformers, model)(config).eval(), transposed


def bank_of(model):
    return next(
        (name, module) for name, module in model.named_modules()
        if type(module).__name__.endswith("Experts") and isinstance(module, nn.Module) and module._parameters
    )  # fmt: skip


EIGHT = QuantSpec(8, 32)


def codes_of(bank, transposed, spec=EIGHT):
    tensors = {n: p.detach() for n, p in bank.named_parameters(recurse=False) if p.dim() == 3}
    return {n: [affine.quantize(w.t() if transposed else w, spec) for w in t] for n, t in tensors.items()}


def call(model):
    ids = torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    return model(ids).logits


def float_twin(model, name, codes, transposed):
    """The float model with the dequantized weights: what the packed one must compute."""
    twin = copy.deepcopy(model)
    bank = twin.get_submodule(name)
    with torch.no_grad():
        for parameter, several in codes.items():
            dense = torch.stack([affine.dequantize(c) for c in several])
            bank._parameters[parameter].copy_(dense.transpose(1, 2) if transposed else dense)
    return twin


@pytest.mark.parametrize("name", MODELS)
def test_packed_experts_compute_the_dequantized_model(name):
    model, transposed = build(name)
    place, bank = bank_of(model)
    codes, report = codes_of(bank, transposed), Report()
    wanted = call(float_twin(model, place, codes, transposed))
    packed = swap.swap_experts(model, place, codes, report, tokens=18)
    assert isinstance(packed, QExperts) and isinstance(packed, type(bank))
    assert not any(p.dim() == 3 and p.is_floating_point() and p.shape[-1] > 16 for p in packed.parameters())
    assert all(slot.transposed == transposed for slot in packed.slots.values())
    row = report.rows[place]
    assert row.kind == "experts" and 0 < row.error < 0.01 and row.tokens == 18 and row.bits == pytest.approx(8.75)
    assert row.numel == sum(p.numel() for n, p in bank.named_parameters() if p.dim() == 3)
    y = call(model)
    assert ((y - wanted).norm() / wanted.norm()) < 5e-3
    swap.prepare(model)
    assert ((call(model) - wanted).norm() / wanted.norm()) < 5e-3
    swap.dequantize_modules(model)
    assert type(model.get_submodule(place)) is type(bank)
    assert torch.allclose(call(model), wanted, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_runs_expert_by_expert_whatever_the_model_says(implementation):
    model, transposed = build("mixtral")
    place, bank = bank_of(model)
    codes = codes_of(bank, transposed)
    wanted = call(float_twin(model, place, codes, transposed))
    model.config._experts_implementation = implementation
    packed = swap.swap_experts(model, place, codes)
    seen = []
    real = packed.dequantize
    packed.dequantize = lambda *a, **k: seen.append(a) or real(*a, **k)
    assert ((call(model) - wanted).norm() / wanted.norm()) < 5e-3
    assert not seen, "a float weight was made"
    assert model.config._experts_implementation == implementation, "the model's own config changed"
    assert packed.config.hidden_size == 64 and packed.config._experts_implementation == "eager"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prepared", [False, True])
def test_round_trip_and_copies(name, prepared):
    model, transposed = build(name)
    place, bank = bank_of(model)
    packed = swap.swap_experts(model, place, codes_of(bank, transposed, QuantSpec(4, 32)))
    if prepared:
        swap.prepare(model)
    y, state = call(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(call(copy.deepcopy(model)), y)
    with torch.device("meta"):
        other = type(model)(model.config).eval()
    swap.build_empty(other, swap.describe(model))
    empty = other.get_submodule(place)
    assert {p.device.type for p in empty.parameters(recurse=False)} == {"meta"}
    assert set(empty.state_dict()) == set(packed.state_dict())
    copied = pickle.loads(pickle.dumps(packed))
    assert type(copied) is type(packed)
    assert all(torch.equal(v, copied.state_dict()[k]) for k, v in packed.state_dict().items())
    fresh, _ = build(name)
    swap.build_empty(fresh, swap.describe(model))
    fresh.load_state_dict(state)
    swap.check(fresh)
    if prepared:
        swap.prepare(fresh)
    assert torch.equal(call(fresh), y)


def test_other_tensors_and_casts():
    model, transposed = build("gpt-oss")
    place, bank = bank_of(model)
    bias = bank.gate_up_proj_bias.detach().clone()
    packed = swap.swap_experts(model, place, codes_of(bank, transposed))
    assert torch.equal(packed.gate_up_proj_bias, bias)
    before = packed.gate_up_proj_scale.clone()
    packed.to(torch.bfloat16)
    assert packed.gate_up_proj_bias.dtype == torch.bfloat16 == packed.compute_dtype
    assert torch.equal(packed.gate_up_proj_scale, before)


class TestView:
    @pytest.fixture
    def bank(self):
        model, transposed = build("mixtral")
        place, bank = bank_of(model)
        return swap.swap_experts(model, place, codes_of(bank, transposed))

    def test_looks_like_the_parameter(self, bank):
        view = bank.gate_up_proj
        assert view.shape == (4, 192, 64) and view.ndim == 3
        assert view.dtype == torch.float32 and view.device.type == "cpu"
        assert view[1].shape == (192, 64) and isinstance(view[torch.tensor(1)], ExpertWeight)
        assert torch.equal(view[1] + 0, bank.dequantize("gate_up_proj", index=1))
        assert torch.equal(view[-1] + 0, view[3] + 0)
        assert torch.equal(view[1:3], bank.dequantize("gate_up_proj")[1:3])
        assert torch.equal(view[torch.tensor([0, 2])], bank.dequantize("gate_up_proj")[[0, 2]])
        with pytest.raises(IndexError, match="expert 4 of 4"):
            view[4]
        with pytest.raises(AttributeError):
            _ = bank.no_such_thing

    def test_products_in_every_spelling_run_on_codes(self, bank, monkeypatch):
        dense = bank.dequantize("down_proj")
        monkeypatch.setattr(QExperts, "dequantize", lambda *a, **k: pytest.fail("dequantized"))
        view, x, xs = bank.down_proj, torch.randn(3, 96), torch.randn(4, 3, 96)
        for y in (nn.functional.linear(x, view[2]), x @ view[2].t(), x @ view[2].T, torch.matmul(x, view[2].mT),
                  torch.mm(x, view[2].transpose(0, 1))):
            assert torch.allclose(y, x @ dense[2].t(), atol=2e-2)
        assert torch.allclose(torch.bmm(xs, view.transpose(1, 2)), torch.bmm(xs, dense.transpose(1, 2)), atol=2e-2)
        bias = torch.randn(64)
        assert torch.allclose(nn.functional.linear(x, view[0], bias), x @ dense[0].t() + bias, atol=2e-2)

    def test_everything_else_dequantizes(self, bank):
        x, dense = torch.randn(3, 64), bank.dequantize("down_proj")
        assert torch.allclose(x @ bank.down_proj[2], x @ dense[2])
        ones = torch.ones(4, 3, 64)
        assert torch.allclose(torch.bmm(ones, bank.down_proj), dense.sum(1, keepdim=True).expand(4, 3, 96), atol=1e-4)
        assert torch.equal(bank.down_proj[0].float().sum(), dense[0].sum())

    def test_initialisers_pass_it_by(self, bank):
        """transformers' initialisation of missing weights calls the class' initialiser on it."""
        from transformers import initialization

        before = {k: v.clone() for k, v in bank.state_dict().items()}
        initialization.normal_(bank.gate_up_proj, mean=0.0, std=0.02)
        assert all(torch.equal(v, bank.state_dict()[k]) for k, v in before.items())

    def test_gradients_to_the_input(self, bank):
        dense = bank.dequantize("down_proj")[1]
        x = torch.randn(3, 96, requires_grad=True)
        nn.functional.linear(x, bank.down_proj[1]).square().sum().backward()
        y = x.detach().requires_grad_()
        (y @ dense.t()).square().sum().backward()
        assert ((x.grad - y.grad).norm() / y.grad.norm()) < 1e-2


class Square(nn.Module):
    """A bank whose weights are square: the shapes do not tell which axis is which."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        return x @ self.w[0]


def test_square_weights_need_an_answer():
    codes = {"w": [affine.quantize(torch.randn(8, 8), QuantSpec(4)) for _ in range(2)]}
    model = nn.ModuleDict({"bank": Square()})
    with pytest.raises(QuantizationError, match="bank: .*square"):
        swap.swap_experts(model, "bank", codes)
    assert swap.swap_experts(model, "bank", codes, transposed=True).slots["w"].transposed
    model = nn.ModuleDict({"bank": Square()})
    model.bank.is_transposed = False
    assert not swap.swap_experts(model, "bank", codes).slots["w"].transposed


def test_codes_that_do_not_fit():
    model = nn.ModuleDict({"bank": Square()})
    good = affine.quantize(torch.randn(8, 8), QuantSpec(4))
    for codes, words in (
        ({"w": [good]}, "1 codes of 8 x 8"), ({"v": [good, good]}, "no 3-D parameter 'v'"), ({}, "no codes"),
        ({"w": [affine.quantize(torch.randn(4, 8), QuantSpec(4))] * 2}, "do not fit w"),
        ({"w": [good, affine.quantize(torch.randn(8, 8), QuantSpec(3))]}, "is needed"),
    ):  # fmt: skip
        model.bank.is_transposed = False
        with pytest.raises(QuantizationError, match=words):
            swap.swap_experts(model, "bank", codes)
    assert isinstance(model.bank, Square) and not isinstance(model.bank, QExperts)
