"""AffineQuant: the numbered properties of the specification."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from killing import killed
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)  # fmt: skip

import hfq
from hfq import graph
from hfq.calibration.walk import walk
from hfq.errors import ConfigError, QuantizationError
from hfq.formats import QuantSpec, affine
from hfq.graph.pairs import discover
from hfq.graph.proof import double_precision
from hfq.layers.attached import CHILD, OutputAffine
from hfq.layers.packed import PackedModule
from hfq.methods.affinequant import AffineQuantConfig
from hfq.reconstruction.build import _randomise
from hfq.reconstruction.maps import BlockMap, MatrixMap
from hfq.reconstruction.transformed import BlockTransform, Options, fit_transformed
from hfq.transforms.affine import RotaryBlocks

SLUG = "affinequant"
COMMON: dict[str, Any] = {
    "group_size": 32, "calibration_samples": 6, "calibration_seqlen": 16, "calibration_batch_size": 3, "epochs": 3,
    "progress": False,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


def tiny(kind: str = "llama", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2, initializer_range=0.1))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64))
    elif kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4))
    else:
        text = {key: value for key, value in TEXT.items() if key != "intermediate_size"}
        model = OPTForCausalLM(OPTConfig(**text, ffn_dim=96, word_embed_proj_dim=64, init_std=0.1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def ids(samples: int = 6, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 128, (samples, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(2)).logits


def config_of(**more: Any) -> AffineQuantConfig:
    return AffineQuantConfig(**{**COMMON, **more})


def quantized(model: Any, **more: Any) -> Any:
    return hfq.quantize(model, config_of(**more), ids())


def transforms(model: Any, options: Options, spec: QuantSpec | None = None) -> Any:
    """Every step of a walk with the transform of its block; what the caller leaves in the block goes on."""
    plan, data = graph.read(model), [{"input_ids": ids()}]

    def call() -> None:
        with torch.no_grad():
            model(ids(2), use_cache=False)

    pairs = list(discover(plan, call))
    for step in walk(plan, data, streams=("quantized", "float")):
        yield step, BlockTransform(step, pairs, lambda name: spec or QuantSpec(8), options)


def randomise(transform: BlockTransform, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in transform.maps:
            _randomise(one, generator)


def moved(kind: str, options: Options, dtype: torch.dtype = torch.float32) -> float:
    """Relative change of the logits by random transforms of every block, nothing rounded."""
    model = tiny(kind).to(dtype)
    exact = double_precision if dtype == torch.float64 else nullcontext  # norms and angles go through float32 elsewhere
    with exact():
        before = logits(model)
    for _, transform in transforms(model, options):
        assert transform.maps
        randomise(transform)
        transform.freeze()
    with exact():
        return float((logits(model) - before).norm() / before.norm())


WEIGHTS, BOTH = AffineQuantConfig(), AffineQuantConfig(activation_bits=4)


@pytest.mark.must_hold("affinequant", 1)
@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("config", [WEIGHTS, BOTH, AffineQuantConfig(ln_matrix=True, qk_matrix=True)])
def test_random_transforms_leave_the_model_as_it_is(kind: str, config: AffineQuantConfig) -> None:
    assert moved(kind, config.options) < 1e-4


@pytest.mark.must_hold("affinequant", 1)
@pytest.mark.parametrize("kind, config", [("llama", WEIGHTS), ("opt", WEIGHTS), ("gpt2", WEIGHTS), ("opt", BOTH),
                                          ("gpt2", BOTH)])  # fmt: skip
def test_in_float64_up_to_its_rounding(kind: str, config: AffineQuantConfig) -> None:
    # (scales behind a norm without bias divide its shift, which is then stored in float32: not here)
    assert moved(kind, config.options, torch.float64) < 1e-9


@pytest.mark.must_hold("affinequant", 2)
def test_free_queries_fail_under_rotary_embeddings_only() -> None:
    free = AffineQuantConfig(activation_bits=4, qk_mode="free").options
    assert moved("llama", free) > 1e-2
    assert moved("opt", free) < 1e-4
    report = quantized(tiny(), qk_mode="free", qk_matrix=True)
    assert any("not equivalent" in note for note in report.notes)


@pytest.mark.must_hold("affinequant", 3)
def test_masks_open_epoch_by_epoch() -> None:
    _, transform = next(transforms(tiny(), BOTH.options))
    epochs = 5
    for epoch in range(epochs):
        transform.open(epoch, epochs)
        for one in transform.maps:
            if not hasattr(one.map, "mask"):
                continue
            size, mask = one.map.size, one.map.mask()
            width = (size - 1) * epoch // (epochs - 1) + 1
            away = (torch.arange(size)[:, None] - torch.arange(size)).abs()
            assert torch.equal(mask, mask.t()) and torch.equal(mask != 0, away < width)
            if epoch == 0:
                assert torch.equal(mask, torch.eye(size))
            if epoch == epochs - 1:
                assert (mask[away > 0] == one.map.factor).all()


@pytest.mark.must_hold("affinequant", 4)
def test_closed_entries_get_no_gradient_and_open_ones_the_damped_one() -> None:
    grads = {}
    for factor in (0.1, 0.2):
        options = AffineQuantConfig(sf=factor).options
        _, transform = next(transforms(tiny(), options))
        transform.open(2, 5)
        values = transform()
        sum((v * torch.linspace(-1, 1, v.numel()).reshape(v.shape)).sum() for v in values.values()).backward()
        grads[factor] = [one.map.raw.grad for one in transform.maps if hasattr(one.map, "raw")]
        for one in transform.maps:
            if hasattr(one.map, "raw"):
                closed = one.map.mask() == 0
                assert closed.any() and (one.map.raw.grad[:, closed] == 0).all()
    for one, other in zip(grads[0.1], grads[0.2], strict=True):  # at the start both masked matrices are the same
        eye = torch.eye(one.shape[-1], dtype=torch.bool)
        assert torch.allclose(2 * one[:, ~eye], other[:, ~eye], rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.must_hold("affinequant", 5)
def test_without_what_lies_off_the_diagonal_it_is_scales_and_ranges() -> None:
    errors = []
    for options in ({"maps": "diagonal"}, {"sf": 0.0, "qk_matrix": False, "ln_matrix": False}):
        report = quantized(tiny(), bits=3, **options)
        errors.append([row.extra["loss_after"] for row in report.packed])
    assert errors[0] == pytest.approx(errors[1], rel=2e-2)
    first = [row.extra["loss_before"] for row in quantized(tiny(), bits=3, epochs=1).packed]
    assert all(after < before for after, before in zip(errors[0], first, strict=True))


@pytest.mark.must_hold("affinequant", 6)
def test_matrices_stay_invertible_and_a_bad_run_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    step, transform = next(transforms(tiny(), BOTH.options, QuantSpec(3)))
    fit_transformed(step, transform, epochs=4, watch=lambda t: seen.append(t.condition()))
    assert len(seen) == 24 and all(value < 1e6 for value in seen)
    model = tiny()
    report = quantized(model, sf=1.0, ln_matrix=True, let_lr=0.5, max_condition=50.0, epochs=4)
    rows = [row.extra for row in report.packed]
    assert any(row["retries"] for row in rows) and all(row["condition"] <= 50 for row in rows)
    assert all("condition number" in text for row in rows for text in row["retries"])
    assert all(row["damping"] < 1.0 for row in rows if row["retries"])
    assert torch.isfinite(logits(model)).all()


@pytest.mark.must_hold("affinequant", 6)
def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    step, transform = next(transforms(tiny(), WEIGHTS.options, QuantSpec(3)))
    calls: list[int] = []

    def poison(current: BlockTransform) -> None:
        calls.append(1)
        if len(calls) == 3:
            with torch.no_grad():
                next(iter(current.maps.parameters())).fill_(float("nan"))

    fit = fit_transformed(step, transform, epochs=3, watch=poison)
    assert len(fit.retries) == 1 and fit.factor == pytest.approx(0.001)
    with pytest.raises(QuantizationError, match="cannot be learned"):
        fit_transformed(step, transform, epochs=3, watch=lambda t: next(iter(t.maps.parameters())).data.fill_(1e30))


@pytest.mark.must_hold("affinequant", 7)
@pytest.mark.parametrize("bits", [3, 2])
def test_a_block_comes_closer_than_by_rounding_to_nearest(bits: int, small_lm: Any) -> None:
    data = [{"input_ids": torch.tensor(small_lm.windows(4, 96, part="train", seed=0))}]
    model = small_lm.make()
    plan = graph.read(model)
    pairs = list(discover(plan, lambda: model(data[0]["input_ids"][:1], use_cache=False)))
    step = next(iter(walk(plan, data, streams=("quantized", "float"))))
    found = {}
    for name, options, epochs in (
        ("nearest", Options(norm="off", value="off", clip=False), 0),
        ("affine", AffineQuantConfig(ln_matrix=False).options, 6),
    ):
        transform = BlockTransform(step, pairs, lambda _: QuantSpec(bits, 64), options)
        found[name] = fit_transformed(step, transform, epochs=epochs, batch_size=2)
    assert found["affine"].final <= found["affine"].initial
    assert found["affine"].final < 0.9 * found["nearest"].final, found


@pytest.mark.must_hold("affinequant", 8)
@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 2, "sf": 0.1, "dtype": torch.bfloat16}])
def test_saved_models_hold_the_masked_matrix_and_load_bit_exactly(options: dict[str, Any], tmp_path: Any) -> None:
    options = dict(options)
    tiny().save_pretrained(tmp_path / "float")
    dtype = options.pop("dtype", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=dtype)
    masked: dict[str, torch.Tensor] = {}
    freeze = BlockTransform.freeze

    def spy(self: BlockTransform) -> Any:
        randomise(self)  # far from the diagonal, however short the training
        for one in self.maps:
            if isinstance(one, MatrixMap):
                masked[one.pair.sources[0].name] = one.map.effective(torch.float64)[0]
                raw[one.pair.sources[0].name] = one.map.raw.detach().double()[0]
        return freeze(self)

    raw: dict[str, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockTransform, "freeze", spy)
        quantized(model, **options)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits(again), logits(model)) and len(masked) == 4
    for name, matrix in masked.items():
        part = again.get_submodule(name)._modules[CHILD]
        assert isinstance(part, OutputAffine) and part.matrix.dtype == torch.float16
        inverse = torch.linalg.inv(matrix).detach()
        assert (part.matrix.double() - inverse).norm() < 1e-3 * inverse.norm()
        assert (part.matrix.double() - torch.linalg.inv(raw[name])).norm() > 1e-2 * inverse.norm()


@pytest.mark.must_hold("affinequant", 8)
def test_quantized_activations_and_attention_are_saved(tmp_path: Any) -> None:
    model = tiny()
    report = quantized(model, activation_bits=4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    parts = {name: module.hfq_attention for name, module in again.named_modules() if hasattr(module, "hfq_attention")}
    assert len(parts) == 2 and all(p.query.bits == p.key.bits == p.value.bits == 4 for p in parts.values())
    layers = [module for module in again.modules() if isinstance(module, PackedModule)]
    assert len(layers) == 14 and all(layer.activation.bits == 4 for layer in layers)
    assert len(report.packed) == 14 and not any(row.module.endswith("hfq_matrix") and row.numel > 64
                                                for row in report.attached)


def test_a_stopped_run_continues_to_the_same_bytes(tmp_path: Any) -> None:
    options = {"activation_bits": 4, "ln_matrix": True, "epochs": 2}
    whole = tiny()
    quantized(whole, **options)
    with killed(after=9):  # in the second block
        quantized(tiny(), work_dir=tmp_path, **options)
    model = tiny()
    report = quantized(model, work_dir=tmp_path, **options)
    ours, wanted = model.state_dict(), whole.state_dict()
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in ours)
    assert torch.equal(logits(model), logits(whole)) and len(report.packed) == 14
    assert len([row for row in report.attached if row.module.endswith(CHILD)]) == 4


@pytest.mark.parametrize("cache", [{"kv_bits": 3}, {"kv_cache": {"method": "kvquant"}}])
def test_keys_and_values_have_the_width_or_the_method_that_is_asked_for(cache: dict[str, Any]) -> None:
    model = tiny()
    quantized(model, activation_bits=4, epochs=1, **cache)
    part = model.model.layers[0].self_attn.hfq_attention
    assert part.query.bits == 4 and part.cache is not None
    assert part.key.bits == 3 if "kv_bits" in cache else part.kv is not None
    with torch.no_grad():
        assert model.generate(ids(1), max_new_tokens=3, do_sample=False).shape == (1, 19)


@pytest.mark.must_hold("affinequant", 9)
def test_a_dead_channel_and_a_constant_row_give_finite_numbers() -> None:
    model = tiny()
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight[3] = 0
            block.self_attn.q_proj.weight[5] = 0.3
            block.self_attn.q_proj.weight[:, 7] = 0
            block.mlp.up_proj.weight[2] = 0
    report = quantized(model, bits=2)
    assert torch.isfinite(logits(model)).all() and len(report.packed) == 14
    for module in model.modules():
        if isinstance(module, PackedModule):
            assert torch.isfinite(module.scale).all() and (module.scale > 0).all()


@pytest.mark.must_hold("affinequant", 10)
def test_shared_heads_have_one_matrix_each() -> None:
    assert moved("llama", BOTH.options) < 1e-4
    _, transform = next(transforms(tiny(), BOTH.options))
    maps = {one.pair.kind: one for one in transform.maps}
    assert isinstance(maps["vo"], BlockMap) and maps["vo"].map.raw.shape == (2, 16, 16)
    assert isinstance(maps["qk"].map, RotaryBlocks) and len(maps["qk"].map.a) == 2 * 8


def test_defaults_are_those_of_the_paper() -> None:
    assert (WEIGHTS.passes, AffineQuantConfig(bits=2).passes, WEIGHTS.calibration_samples) == (20, 40, 128)
    assert (WEIGHTS.let_lr, WEIGHTS.lwc_lr, WEIGHTS.alpha, WEIGHTS.seed) == (5e-3, 1e-2, 0.5, 2)
    weights, both = WEIGHTS.options, BOTH.options
    assert (weights.norm, weights.query, weights.value, weights.factor) == ("matrix", "vector", "matrix", 0.01)
    assert (both.norm, both.query, both.value, both.factor) == ("vector", "matrix", "matrix", 0.1)
    assert (weights.rotary, weights.product, weights.gate) == ("safe", "off", "off") and BOTH.attention == 4
    plain = AffineQuantConfig(maps="diagonal", activation_bits=4).options
    assert (plain.norm, plain.value, plain.query) == ("vector", "vector", "vector")


def test_without_maps_ranges_and_epochs_it_rounds_to_nearest() -> None:
    model, plain = tiny(), tiny()
    quantized(model, maps="none", clipping=False, epochs=0, bits=3)
    hfq.quantize(plain, hfq.RTNConfig(bits=3, group_size=32, progress=False))
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_report_counts_what_was_added() -> None:
    model = tiny()
    report = quantized(model, bits=3)
    parts = {row.module: row for row in report.attached}
    assert len([name for name in parts if name.endswith(CHILD)]) == 4
    packed = sum(row.bits * row.numel for row in report.packed)
    stored = packed + 8 * sum(model.state_dict()[name].nbytes for name in model.state_dict()
                              if CHILD in name or name.endswith("_proj.bias"))
    numel = sum(row.numel for row in report.packed)
    assert report.bits_per_weight() == pytest.approx(stored / numel) and stored > 1.5 * packed
    plain = quantized(tiny(), bits=3, shift=False, ln_matrix=False)
    assert not plain.attached
    assert plain.curves["model.layers.0"] and len(plain.curves["model.layers.0"]) == 4


def test_experts_are_rounded_and_everything_else_is_learned() -> None:
    model = tiny("mixtral")
    report = quantized(model, bits=4, allow_partial=True)
    experts = [row for row in report.packed if row.kind == "experts"]
    assert len(experts) == 2 and all("rounded to nearest" in row.reason for row in experts)
    assert torch.isfinite(logits(model)).all()


def test_skipped_blocks_stay_float() -> None:
    model = tiny()
    before = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    report = quantized(model, modules_to_not_convert=["model.layers.1.*"])
    assert len(report.packed) == 7 and torch.equal(model.model.layers[1].mlp.up_proj.weight, before)
    assert not any(name.startswith("model.layers.1.") for name in (row.module for row in report.attached))


def test_models_whose_attention_is_unknown_refuse_quantized_attention() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(self.norm(x)).relu())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                inputs_embeds = block(inputs_embeds)
            return inputs_embeds

    data = [{"inputs_embeds": torch.randn(4, 5, 32)} for _ in range(2)]
    model = Net().eval()
    with pytest.raises(QuantizationError, match="attention_bits=16"):
        hfq.quantize(Net().eval(), config_of(activation_bits=8, group_size=-1), data)
    before = model(data[0]["inputs_embeds"])
    report = hfq.quantize(model, config_of(bits=8, group_size=-1), data)
    assert len(report.packed) == 4
    assert (model(data[0]["inputs_embeds"]) - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("wrong", [
    {"sf": 2.0}, {"sf": -0.1}, {"epochs": -1}, {"alpha": 1.5}, {"qk_mode": "maybe"}, {"ln_matrix": "yes"},
    {"attention_bits": 1}, {"batch_size": 0}, {"max_condition": 0.5}, {"kv_bits": 9},
])
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        config_of(**wrong)


def test_decoded_codes_are_what_was_learned() -> None:
    step, transform = next(transforms(tiny(), AffineQuantConfig(ln_matrix=False).options, QuantSpec(3)))
    fit_transformed(step, transform, epochs=2)
    with torch.no_grad():
        values = transform()
    for name, codes in transform.codes().items():
        weight = values[f"{name.removeprefix('model.layers.0.')}.weight"]
        assert (affine.dequantize(codes) - weight).abs().max() <= 1.01 * codes.scale.float().max()
        assert (affine.dequantize(codes) == weight).float().mean() > 0.99
