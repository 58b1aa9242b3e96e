"""APHQ-ViT: what its specification says must hold, on toys and on tiny vision transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vision_toys import untrained

import hfq
from hfq import graph, kernels
from hfq.calibration import ranges
from hfq.calibration.perturbation import Probe
from hfq.calibration.search import FLOOR, Search
from hfq.errors import ConfigError, QuantizationError
from hfq.formats import ActivationSpec, QuantSpec, activation, affine
from hfq.graph import pairs
from hfq.layers import attention, swap
from hfq.layers.attached import Rectifier
from hfq.reconstruction import drop, folded, losses, perceptron, units
from hfq.reconstruction.drop import Course
from hfq.reconstruction.units import Unit

IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(5))
OPTIONS: dict[str, Any] = {
    "progress": False, "calibration_batch_size": 8, "candidates": 16, "attention_candidates": 5, "rounds": 1,
    "steps": 30, "mlp_steps": 60, "mlp_lr": 1e-3, "lr": 3e-2, "batch_size": 16,
}
GRID = ActivationSpec(3, False, "tensor", dynamic=False)


def make(kind: str = "vit", seed: int = 0) -> Any:
    model = untrained(kind, seed=seed, initializer_range=0.1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.mul_(torch.exp(0.7 * torch.randn(module.weight.shape)))
    return model


def logits(model: Any, images: torch.Tensor = IMAGES[:4]) -> torch.Tensor:
    with torch.no_grad():
        return model(images).logits


def quantized(model: Any, bits: int = 3, **options: Any) -> Any:
    config = hfq.APHQViTConfig(**{"bits": bits, "activation_bits": bits, **OPTIONS, **options})
    return hfq.quantize(model, config, IMAGES)


@pytest.fixture(scope="module")
def three() -> Iterator[tuple[Any, Any, list[Any]]]:
    """A model at 3 bits, its report, and what every unit was before and after it learned."""
    seen: list[Any] = []
    own = drop.fit

    def watched(step: Any, unit: Unit, *args: Any, **kwargs: Any) -> Any:
        zeros = {name: float(one.zero_point) for name, one in unit.inputs.items()}
        scales = {name: float(one.scale.detach()) for name, one in unit.inputs.items()}
        found = own(step, unit, *args, **kwargs)
        seen.append(SimpleNamespace(unit=unit, zeros=zeros, scales=scales, found=found))
        return found

    patch = pytest.MonkeyPatch()
    patch.setattr(drop, "fit", watched)
    model = make()
    report = quantized(model)
    patch.undo()
    yield model, report, seen


@pytest.mark.must_hold("aphq_vit", 1)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_without_rounding_nothing_changes(kind: str) -> None:
    model = make(kind)
    wanted = logits(model)
    quantized(model, 16)
    assert (logits(model) - wanted).abs().max() < 1e-4 and not swap.packed_modules(model)
    found = pairs.discover(graph.read(model), lambda: model(IMAGES[:2])).proven("norm")
    assert len(found) == 4
    for pair in found:
        folded.fold_by_mean(torch.randn(200, pair.classes) * torch.exp(torch.randn(pair.classes)) + 1, pair, 4, True)
    assert (logits(model) - wanted).abs().max() < 1e-4


class Product(nn.Module):
    """A model whose output is what one part gives."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)


@pytest.mark.must_hold("aphq_vit", 2)
def test_the_probe_finds_sums_of_rows() -> None:
    torch.manual_seed(0)
    model, x = Product().double(), torch.randn(6, 5, dtype=torch.float64)
    whole = torch.randn(5, 5, dtype=torch.float64)
    for matrix in (whole + whole.t(), torch.diag(whole.diagonal())):
        def quadratic(found: torch.Tensor, _: torch.Tensor, matrix: torch.Tensor = matrix) -> torch.Tensor:
            return 0.5 * (found @ matrix * found).sum()

        probe = Probe(model, [{"x": x[:4]}, {"x": x[4:]}], objective=quadratic, delta=1e-3)
        found = probe.average(model.part)[0].double() / 2e-3
        torch.testing.assert_close(found, matrix.sum(1).abs(), rtol=1e-4, atol=1e-4)
        is_diagonal = torch.equal(matrix, torch.diag(matrix.diagonal()))
        assert torch.allclose(found, matrix.diagonal().abs(), rtol=1e-3) == is_diagonal


@pytest.mark.must_hold("aphq_vit", 3)
@pytest.mark.parametrize("signs", [False, True])
def test_weights_of_a_loss(signs: bool) -> None:
    model = make()
    block = model.vit.layers[0]

    def weight(images: torch.Tensor) -> torch.Tensor:
        return Probe(model, [{"pixel_values": part} for part in images.split(4)], signs=signs).average(block)

    found = weight(IMAGES)
    assert found.shape == (1, 17, 32) and bool((found >= 0).all()) and float(found.max()) > 0
    assert float(losses.unit_rms(found).double().square().mean().sqrt()) == pytest.approx(1, abs=1e-5)
    batches = IMAGES.split(4)
    torch.testing.assert_close(weight(torch.cat(batches[::-1])), found, rtol=1e-5, atol=0)
    each = Probe(model, [{"pixel_values": IMAGES}], signs=signs).samples(block)
    assert each[0].shape == (16, 17, 32)


def test_moves_that_a_norm_takes_out_leave_rounding_errors() -> None:
    """What the published probe sees of a block whose readers are all norms is no second derivative."""
    model = make().double()
    batches = [{"pixel_values": IMAGES.double()}]
    alike = Probe(model, batches, delta=1e-4).average(model.vit.layers[0])
    signs = Probe(model, batches, delta=1e-4, signs=True).average(model.vit.layers[0])
    assert float(alike.mean()) < 1e-6 * float(signs.mean())


def test_weights_need_the_whole_model_in_float32() -> None:
    with pytest.raises(QuantizationError, match="float32"):
        Probe(make().bfloat16(), [{"pixel_values": IMAGES}])


@pytest.mark.must_hold("aphq_vit", 4)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_perceptrons_learn_what_they_gave_before(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, own = [], perceptron.rebuild
    monkeypatch.setattr(perceptron, "rebuild", lambda *a, **k: seen.append(own(*a, **k)) or seen[-1])
    model = make(kind)
    with torch.no_grad():  # tails as large models have them
        for name, module in model.named_modules():
            if name.endswith("fc1"):
                module.weight.mul_(1 + 4 * (torch.rand(module.weight.shape[0], 1) < 0.1))
    quantized(model, 8, steps=0, mlp_steps=150, mlp_lr=3e-3)
    assert len(seen) == 2 and all(one.after < one.before and one.top > 0 for one in seen)
    assert sum(one.largest < one.largest_before for one in seen) > len(seen) / 2


@pytest.mark.must_hold("aphq_vit", 5)
def test_learned_units_are_no_worse_than_nearest_rounding(three: Any) -> None:
    _, report, seen = three
    assert len(seen) == 2
    for one in seen:
        assert one.found.after <= one.found.nearest and one.found.curve[0] == pytest.approx(2)
        moved = 0
        for rounding in one.unit.roundings.values():
            codes = rounding.codes()
            at = rounding.matrix / affine.expand(codes.scale.float(), rounding.columns, codes.spec)
            zero = affine.expand(codes.zero_point.float(), rounding.columns, codes.spec)
            top = codes.spec.max_code
            ends = [(at.floor() + up + zero).clamp(0, top) for up in (0, 1)]
            code = codes.codes.float()
            assert bool(((code == ends[0]) | (code == ends[1])).all())
            moved += int((code != (at.round() + zero).clamp(0, top)).sum())
        assert moved > 0 or not one.found.learned
    assert any(one.found.learned and one.found.after < one.found.nearest for one in seen)
    assert all(row.extra["unit_error"] <= row.extra["unit_error_nearest"] for row in report.packed)


@pytest.mark.must_hold("aphq_vit", 6)
def test_soft_gates_start_at_the_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 20)
    site = SimpleNamespace(weight=weight, kind="linear")
    scale = torch.full((12, 1), 0.9)  # no weight is clamped
    rounding = units.rounding_of(site, QuantSpec(4, scale_dtype="float32"), (scale, torch.full((12, 1), 8).byte()))
    torch.testing.assert_close(rounding(), weight, rtol=0, atol=1e-5)
    rounding.harden()
    assert (rounding() - weight).abs().max() > 0.3


@pytest.mark.must_hold("aphq_vit", 7)
def test_zero_points_stay_and_steps_move(three: Any) -> None:
    model, _, seen = three
    for one in seen:
        for name, zero in one.zeros.items():
            layer = model.get_submodule(name)
            assert float(layer.input_zero_point) == zero
        assert any(float(model.get_submodule(name).input_scale) != scale for name, scale in one.scales.items())
    for index in range(2):
        assert int(model.vit.layers[index].mlp.fc2.input_zero_point) == 0
        assert isinstance(model.vit.layers[index].mlp.activation_fn, Rectifier)


@pytest.mark.must_hold("aphq_vit", 8)
def test_integers_give_what_was_simulated(three: Any) -> None:
    model, _, seen = three
    layer, unit = model.vit.layers[0].mlp.fc2, seen[0].unit
    name = "vit.layers.0.mlp.fc2"
    x = torch.randn(3, 17, 64).relu()
    with torch.no_grad(), kernels.use(wnan="reference"):
        found = layer(x)
        step = unit.inputs[name]
        wanted = nn.functional.linear(activation.fake(x, step.spec, step.params()), unit.roundings[name](), layer.bias)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    part = attention.installed(model.vit.layers[0].attention)
    q, k, v = torch.randn(3, 2, 4, 17, 8)
    with torch.no_grad(), kernels.use(attention="reference"):
        whole = part(q, k, v, None, None, {})[0]
    params = {side: part.range_of(side) for side in part.formats}
    with torch.no_grad():
        simulated = kernels.products.attention_float(q, k, v, None, 8**-0.5, part.formats, params)
    share = ((whole - simulated.transpose(1, 2)).abs() > 1e-4).float().mean()
    assert float(share) < 0.05  # probabilities on an edge between two codes


@pytest.mark.must_hold("aphq_vit", 9)
def test_channels_and_activations_without_range() -> None:
    rows = torch.randn(300, 8)
    rows[:, 3] = 0.7
    scale, zero = ranges.fit_channels(rows, 3)
    assert torch.isfinite(scale).all() and bool((scale > 0).all())
    constant = Search(torch.full((50, 8), 0.25), [torch.randn(4, 8)], [QuantSpec(3)], GRID)
    constant.run(1)
    assert float(constant.params[0]) >= FLOOR * (1 - 1e-6)
    assert torch.isfinite(activation.fake(rows, GRID, constant.params)).all()
    empty = Search(torch.zeros(50, 8), [torch.zeros(4, 8)], [QuantSpec(3)], GRID)
    empty.run(1)
    assert float(empty.params[0]) == pytest.approx(FLOOR)
    scale, zero = empty.grids[0]
    assert float(affine.fake(torch.zeros(4, 8), scale, zero.float(), QuantSpec(3)).abs().max()) == 0
    assert perceptron.upper_share(-torch.rand(10), 0.99) == 0
    assert perceptron.upper_share(torch.arange(-5.0, 101.0), 0.98) == 98
    model = make()
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.bias.fill_(-1e3)  # nothing passes the activation
        model.vit.layers[1].layernorm_before.weight[3] = 0
    report = quantized(model, steps=2, mlp_steps=2)
    assert torch.isfinite(logits(model)).all() and len(report.packed) == 12


@pytest.mark.must_hold("aphq_vit", 10)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_saved_models_have_no_gelu_in_a_new_process(kind: str, child: Any, tmp_path: Path) -> None:
    model = make(kind)
    skip = {} if kind == "swin" else {"modules_to_not_convert": ["vit.layers.0.mlp.*"]}
    quantized(model, 4, steps=2, mlp_steps=2, **skip)
    model.save_pretrained(tmp_path)
    torch.save(IMAGES[:4], tmp_path / "images.pt")
    found = child("""
import torch
from transformers import AutoModelForImageClassification as Auto
torch.set_num_threads(int(sys.argv[2]))
model = Auto.from_pretrained(sys.argv[1])
with torch.no_grad():
    out["logits"] = model(torch.load(sys.argv[1] + "/images.pt")).logits.tolist()
out["gelu"] = sum("GELU" in type(m).__name__ for m in model.modules())
""", tmp_path, torch.get_num_threads())
    assert torch.equal(torch.tensor(found["logits"]), logits(model))
    # A perceptron that was to stay float keeps its own activation.
    assert found["gelu"] == (1 if skip else 0)


def test_the_perturbation_weighs_and_rounding_follows() -> None:
    """Two units that differ in the weights of their loss alone learn different codes."""
    site = SimpleNamespace(name="here", kind="linear", module=nn.Linear(16, 8), in_features=16)
    site.weight = site.module.weight
    torch.manual_seed(0)
    inputs, weight = [torch.randn(64, 16)], torch.ones(1, 8)
    with torch.no_grad():
        targets = [site.module(x) for x in inputs]
    grids = units.Grids(lambda _: QuantSpec(2), lambda _: 16)
    codes = []
    for factor in (1.0, 1e4):
        unit = Unit()
        units.calibrate_rows(unit, [site], inputs[0], grids)
        weight[:, 0] = factor
        course = Course(steps=200, lr=1e-2, drop=0.0)
        found = drop.fit_site(site.module, site, unit, inputs, targets, inputs, losses.weighted(weight), course)
        assert found.after <= found.nearest
        codes.append(unit.roundings["here"].codes().codes)
    assert not torch.equal(*codes)


@pytest.mark.parametrize("options", [
    {"hessian": "sample"}, {"hessian": "squared"}, {"hessian": "none"}, {"loss_norm": "unit_mean"},
    {"perturbation_signs": True, "perturbation_relative": True, "perturbation": 1e-2}, {"mlp": False},
    {"activation_bits": 16}, {"attention": False}, {"overrides": {"classifier": {"bits": 4, "activation_bits": 4}}},
])  # fmt: skip
def test_options(options: dict[str, Any]) -> None:
    model = make()
    report = quantized(model, **{"activation_bits": 3, "steps": 2, "mlp_steps": 2, **options})
    assert torch.isfinite(logits(model)).all()
    assert len(report.packed) == 12 + ("overrides" in options)
    gelus = sum("GELU" in type(module).__name__ for module in model.modules())
    assert gelus == (2 if options.get("mlp") is False or options.get("activation_bits") == 16 else 0)
    floats = options.get("attention") is False or "activation_bits" in options
    assert len(attention.parts(model)) == (0 if floats else 2)


def test_a_float_model_with_other_activations_says_so() -> None:
    model = make()
    quantized(model, 8, steps=0, mlp_steps=0)
    wanted = logits(model)
    with pytest.warns(UserWarning, match="ReLU"):
        hfq.dequantize(model)
    assert (logits(model) - wanted).norm() < 0.1 * wanted.norm()
    assert not any("GELU" in type(module).__name__ for module in model.modules())


def test_wrong_options_are_named() -> None:
    for wrong in ({"group_size": 8}, {"symmetric": True}, {"hessian": "full"}, {"drop": 1.5}):
        with pytest.raises(ConfigError):
            hfq.APHQViTConfig(**wrong)
