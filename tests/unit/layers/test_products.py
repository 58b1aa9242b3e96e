"""Attention on stored grids in ViT and Swin: positions and masks, saving, casts, gradients, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from hfq.calibration.static import probabilities
from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import ActivationSpec, activation
from hfq.formats.log import LogSpec
from hfq.formats.twin import TwinSpec
from hfq.layers import attention, products, swap
from hfq.layers.products import AttentionProducts
from hfq.report import Report

GRID = ActivationSpec(8, granularity="tensor", dynamic=False)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def make(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=5,
                                        intermediate_size=64, image_size=32, patch_size=8, **more)
        model = transformers.ViTForImageClassification(config)
    else:
        config = transformers.SwinConfig(embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=2, image_size=32,
                                         patch_size=4, mlp_ratio=2.0, num_labels=5, **more)
        model = transformers.SwinForImageClassification(config)
    with torch.no_grad():  # scores and relative positions that matter
        for name, p in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name or "position_bias" in name:
                p.normal_(std=0.5)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES).logits


def install(model: Any, spec: Any = None, report: Report | None = None, bits: int = 8) -> list[str]:
    """Ranges of this very input, for every attention of the model."""
    seen: dict[str, Any] = {}
    names = {module: name for name, module in model.named_modules()}

    def watch(module: Any, q: Any, k: Any, v: Any, mask: Any) -> None:
        seen[names[module]] = (q, k, v, probabilities(module, q, k, mask))

    with attention.observing(model, watch):
        logits(model)
    grid = ActivationSpec(bits, granularity="tensor", dynamic=False)
    for name, sides in seen.items():
        part = AttentionProducts(sides[0].shape[-1], query=grid, key=grid, value=grid, probabilities=spec or grid)
        for side, x in zip(products.SIDES, sides, strict=True):
            if side == "probabilities" and spec is not None:
                top = x.max().reshape(1)
                part.set_range(side, (top / (spec.top << spec.shift) if isinstance(spec, TwinSpec) else top, None))
            else:
                part.set_range(side, activation.range_parameters(x.min().reshape(1), x.max().reshape(1), grid))
        products.install(model, name, part, report)
    return list(seen)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_eight_bits_are_near_the_float_model_and_four_are_not(kind: str) -> None:
    wanted = logits(make(kind))
    errors = []
    for bits in (8, 4):
        model, report = make(kind), Report()
        names = install(model, report=report, bits=bits)
        assert len(names) == (2 if kind == "vit" else 4) == len(report.attached)
        errors.append(float((logits(model) - wanted).norm() / wanted.norm()))
        assert attention.uninstall(model) == names and torch.equal(logits(model), wanted)
    assert 0 < errors[0] < 0.03 and errors[1] > 3 * errors[0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_relative_positions_and_window_masks_reach_the_scores(implementation: str) -> None:
    model = make("swin", attn_implementation=implementation)
    install(model)
    before = logits(model)
    with torch.no_grad():
        model.swin.encoder.layers[0].blocks[1].attention.relative_position_bias.relative_position_bias_table.mul_(3)
    assert (logits(model) - before).norm() > 1e-4 * before.norm()


@pytest.mark.parametrize("spec", [LogSpec(4), LogSpec(6, "2", "none"), TwinSpec(8, 4, "magnitude")], ids=str)
def test_every_form_is_rebuilt_from_the_manifest(spec: Any) -> None:
    model = make("swin")
    names = install(model, spec)
    manifest = swap.describe(model)
    assert [entry["module"] for entry in manifest["attention"]] == names
    assert manifest["attention"][0]["probabilities"] == spec.to_dict()
    fresh = make("swin")
    swap.build_empty(fresh, manifest)
    fresh.load_state_dict(model.state_dict())
    swap.check(fresh)
    assert torch.equal(logits(fresh), logits(model)) and swap.describe(fresh) == manifest
    swap.build_empty(fresh, manifest)  # what is there stays


def test_casts_keep_the_ranges() -> None:
    model = make("vit")
    names = install(model)
    part = attention.parts(model)[names[0]]
    cast = attention.parts(copy.deepcopy(model).to(torch.bfloat16))[names[0]]
    for name, tensor in part.named_parameters():
        found = dict(cast.named_parameters())[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    assert torch.isfinite(copy.deepcopy(model).to(torch.bfloat16)(IMAGES.bfloat16()).logits).all()


def test_gradients_reach_what_comes_before() -> None:
    model = make("vit")
    install(model)
    model(IMAGES).logits.square().sum().backward()
    gradient = model.vit.layers[0].attention.q_proj.weight.grad
    assert gradient is not None and float(gradient.norm()) > 0


def test_sides_may_stay_floats() -> None:
    model = make("vit")
    wanted = logits(model)
    for name in attention.find(model, lambda: logits(model)):
        products.install(model, name, AttentionProducts(8))
    assert (logits(model) - wanted).norm() <= 1e-5 * wanted.norm()


def test_damage_and_wrong_use_are_told() -> None:
    model = make("vit")
    names = install(model)
    manifest = swap.describe(model)
    for wrong in ({"head_dim": 0}, {"query": {"form": "uniform", "bits": 99}}, {"probabilities": {"form": "cubic"}},
                  {"extra": 1}, {"value": {"form": "log", "bits": 4}}):
        with pytest.raises(CheckpointError, match="attention"):
            swap.build_empty(make("vit"), {**manifest, "attention": [{**manifest["attention"][0], **wrong}]})
    with torch.no_grad():
        attention.parts(model)[names[1]].key_scale.zero_()
    with pytest.raises(CheckpointError, match="key_scale"):
        swap.check(model)
    with pytest.raises(QuantizationError, match="simulation"):
        AttentionProducts(8, probabilities=LogSpec(4, zero="repo"))
    with pytest.raises(QuantizationError, match="stored range"):
        AttentionProducts(8, key=ActivationSpec(8))
    with pytest.raises(QuantizationError, match="query stores"):
        AttentionProducts(8).set_range("query", (torch.ones(1), None))
    causal = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=16))
    with pytest.raises(QuantizationError, match="causal"):
        products.install(causal, "model.layers.0.self_attn", AttentionProducts(16))
