"""MPTQ-ViT: what its specification says must hold, on toys and on tiny vision transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from killing import killed
from torch import nn
from vision_toys import toy, uneven

import hfq
from hfq import graph
from hfq.allocation import lowering
from hfq.errors import ConfigError
from hfq.formats import ActivationSpec, QuantSpec, activation, twin
from hfq.formats.twin import TwinSpec
from hfq.graph import pairs
from hfq.layers import attention, swap
from hfq.layers.packed import PackedModule
from hfq.layers.rounded import RoundedInput
from hfq.reconstruction import stepsize
from hfq.reconstruction.stepsize import Reader, Search
from hfq.transforms import centre, reparameterize

OPTIONS: dict[str, Any] = {"progress": False, "calibration_batch_size": 8, "candidates": 10, "low": 0.4, "rounds": 1,
                           "search_rows": 48}  # fmt: skip
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES[:4]).logits


@pytest.mark.must_hold("mptq_vit", 1)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_the_rewrite_changes_nothing(kind: str) -> None:
    for alpha in (0.0, 0.5, 1.0):
        model = uneven(kind)
        wanted = logits(model)
        found = pairs.discover(graph.read(model), lambda model=model: model(IMAGES[:2])).proven("norm")
        for pair in found:
            rows = torch.randn(50, pair.classes) * 3 + torch.randn(pair.classes)
            weights = [link.part.weight for link in pair.readers]
            middle = centre.centre(rows)
            scale = centre.smooth(rows, weights, middle, alpha)
            reparameterize.fold(pair, scale, -middle / scale)
        assert len(found) == 4 and (logits(model) - wanted).abs().max() < 1e-4


@pytest.mark.must_hold("mptq_vit", 2)
def test_channels_are_symmetric_afterwards() -> None:
    norm, linear, pair, x = toy(spread=1.0)
    with torch.no_grad():
        y, before = norm(x), linear(norm(x))
        middle = centre.centre(y)
        scale = centre.smooth(y, [linear.weight], middle, 0.5)
        reparameterize.fold(pair, scale, -middle / scale)
        z = norm(x)
        assert (linear(z) - before).abs().max() < 1e-9
        low, high = z.amin(0), z.amax(0)
        assert bool(((low + high).abs() < 1e-5 * (high - low)).all())


@pytest.mark.must_hold("mptq_vit", 3)
def test_shifted_channels() -> None:
    torch.manual_seed(0)
    x, weight = 10 + torch.randn(2000, 16), torch.randn(8, 16)
    errors, spec = [], ActivationSpec(4, True, "tensor", dynamic=False)
    for middle in (torch.zeros(16, dtype=torch.float64), centre.centre(x)):
        scale = centre.smooth(x, [weight], middle, 0.5)
        z, w = ((x - middle) / scale).float(), (weight * scale).float()
        params = activation.range_parameters(z.min().reshape(1), z.max().reshape(1), spec)
        errors.append(float(((activation.fake(z, spec, params) - z) @ w.t()).square().mean()))
    assert errors[1] < errors[0] / 10, errors


@pytest.mark.must_hold("mptq_vit", 4)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_two_grids(bits: int) -> None:
    x = nn.functional.gelu(3 * torch.randn(5000, generator=torch.Generator().manual_seed(0)))
    spec = TwinSpec(bits, 3)
    scale = twin.scale_of(x.max().reshape(1), spec)
    codes = twin.encode(x, scale, spec)
    value = twin.decode(codes, scale, spec)
    zero = twin.decode(twin.encode(torch.zeros(1), scale, spec), scale, spec)
    assert int(codes.max()) < 1 << bits and float(zero) == 0
    assert bool((value * x >= 0).all()) and torch.equal(twin.fake(value, scale, spec), value)


def problem(seed: int = 0) -> tuple[torch.Tensor, list[Reader]]:
    random = torch.Generator().manual_seed(seed)
    x = nn.functional.gelu(2.5 * torch.randn(200, 16, generator=random))
    g = torch.randn(200, 6, generator=random).exp()
    return x, [Reader(torch.randn(6, 16, generator=random), QuantSpec(4, symmetric=True), g)]


@pytest.mark.must_hold("mptq_vit", 5)
def test_the_shift_is_the_best_of_its_grid() -> None:
    x, readers = problem()
    search = Search(40, 0.01, 1.2, 1)
    spec = TwinSpec(4, 0)
    chosen, _, best = stepsize.joint(x, readers, spec, search)
    first = stepsize.first_shift(x, spec)[0]
    errors = {m: stepsize.joint(x, readers, spec, search, shifts=lambda _, m=m: [m])[2]
              for m in stepsize.shift_grid(first)}
    assert 0 in errors and best == min(errors.values()) == errors[chosen[0].shift] and chosen[0].shift > 0
    doubled = torch.where(x > 0, 2 * x, x)
    assert stepsize.first_shift(doubled, spec)[0] == first + 1


@pytest.mark.must_hold("mptq_vit", 6)
def test_the_kernel_is_exact_in_integers() -> None:
    x, readers = problem(1)
    (spec, params), [codes], _ = stepsize.joint(x, readers, TwinSpec(4, 0), Search(10, 0.4, 1.2, 1))
    fine, coarse = twin.parts(twin.encode(x, params[0], spec), spec)
    weight = codes.codes.to(torch.int64) - 8
    total = fine.long() @ weight.t() + ((coarse.long() @ weight.t()) << spec.shift)
    wanted = twin.fake(x.double(), params[0].double(), spec) @ (weight.double() * codes.scale.double()).t()
    assert torch.allclose(total.double() * params[0].double() * codes.scale.double().t(), wanted, rtol=1e-12)
    model = nn.ModuleDict({"fc": nn.Linear(16, 6, bias=False)})
    swap.swap(model, "fc", codes, activation=spec, activation_params=params)
    swap.prepare(model)
    assert torch.allclose(model["fc"](x), wanted.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.must_hold("mptq_vit", 7)
def test_widths_fall_one_by_one_to_the_target() -> None:
    model = uneven()
    config = hfq.MPTQViTConfig(target_bits=7.0, min_bits=6, greedy_images=2, **OPTIONS)
    hfq.quantize(model, config, IMAGES)
    bits: dict[str, int] = {}
    for unit, width, metric in config.moves:
        assert width == bits.get(unit, 8) - 1 >= 6 and metric >= 0
        bits[unit] = width
    packed = swap.packed_modules(model)
    sizes = {name: layer.in_features * layer.out_features for name, layer in packed.items()}
    mean = sum(sizes[n] * packed[n].spec.bits for n in packed) / sum(sizes.values())
    assert 7 - max(sizes.values()) / sum(sizes.values()) < mean <= 7
    costs = {n: {b: s * b for b in range(3, 9)} for n, s in (("small", 1.0), ("large", 9.0))}
    flat = lowering.lower(dict.fromkeys(costs, 8), dict.fromkeys(costs, range(3, 9)), lambda _: 0.5, costs, 70.0)
    assert flat.moves[0].name == "large"


@pytest.mark.must_hold("mptq_vit", 8)
def test_nothing_to_lower_and_sixteen_bits() -> None:
    model = uneven()
    config = hfq.MPTQViTConfig(target_bits=8.0, greedy_images=2, **OPTIONS)
    hfq.quantize(model, config, IMAGES)
    assert config.moves == [] and {layer.spec.bits for layer in swap.packed_modules(model).values()} == {8}
    model = uneven()
    wanted = logits(model)
    report = hfq.quantize(model, hfq.MPTQViTConfig(bits=16, activation_bits=16, **OPTIONS), IMAGES)
    assert (logits(model) - wanted).abs().max() < 1e-3 and not report.packed and not attention.parts(model)


@pytest.mark.must_hold("mptq_vit", 9)
def test_a_constant_channel() -> None:
    norm, linear, pair, x = toy(spread=1.0)
    with torch.no_grad():
        norm.weight[3], norm.bias[3] = 0.0, 7.5
        before, y = linear(norm(x)), norm(x)
        middle = centre.centre(y)
        scale = centre.smooth(y, [linear.weight], middle, 0.5)
        assert float(middle[3]) == 7.5 and float(scale[3]) == 1e-5
        reparameterize.fold(pair, scale, -middle / scale)
        assert norm(x)[:, 3].abs().max() < 1e-9 and (linear(norm(x)) - before).abs().max() < 1e-9


@pytest.mark.must_hold("mptq_vit", 10)
def test_regions_without_numbers() -> None:
    spec, (x, readers) = TwinSpec(4, 0), problem(2)
    for rows in (x.abs(), -x.abs() * 0.05, torch.zeros_like(x)):
        (found, params), _, error = stepsize.joint(rows, readers, spec, Search(10, 0.4, 1.2, 1))
        value = twin.fake(rows, params[0], found)
        assert float(params[0]) > 0 and torch.isfinite(value).all() and error < float("inf")
        assert bool((value * rows >= 0).all())
    assert stepsize.first_shift(torch.tensor([1.0]), spec)[0] == stepsize.first_shift(
        torch.tensor([-stepsize.GELU_LOW, 1.0]), spec)[0]


def test_the_parts_of_the_paper_help() -> None:
    errors = []
    for options in ({"smooth": False, "twin": False}, {}):
        model = uneven("swin")
        wanted = logits(model)
        hfq.quantize(model, hfq.MPTQViTConfig(**{**OPTIONS, **options}), IMAGES)
        errors.append(float((logits(model) - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.7 * errors[0], errors


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_mixed_widths_beat_one_width_of_the_same_mean(kind: str, small_vision: Any) -> None:
    found, images = {}, small_vision.images(256, 2)[0]
    for name, more in (("mixed", {"target_bits": 4.0}), ("uniform", {})):
        model = small_vision.make(kind)
        with torch.no_grad():
            wanted = model(images).logits.log_softmax(-1)
            config = hfq.MPTQViTConfig(**{**OPTIONS, "search_rows": 192, "calibration_batch_size": 32,
                                          "calibration_samples": 64, **more})
            hfq.quantize(model, config, small_vision.images(64, 5)[0])
            given = model(images).logits.log_softmax(-1)
        assert config.average_bits["nominal"] <= 4
        found[name] = float(nn.functional.kl_div(given, wanted, log_target=True, reduction="batchmean"))
    assert found["mixed"] < 0.85 * found["uniform"], found


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_fully_quantized(kind: str, tmp_path: Any) -> None:
    model, errors = uneven(kind), []
    wanted = logits(model)
    for stream in (8, 3):
        model = uneven(kind)
        config = hfq.MPTQViTConfig(bits=8, activation_bits=8, fully_quantized=True, stream_bits=stream, **OPTIONS)
        report = hfq.quantize(model, config, IMAGES)
        errors.append(float((logits(model) - wanted).norm() / wanted.norm()))
        parts = {n.rpartition(".")[0]: m for n, m in model.named_modules() if isinstance(m, RoundedInput)}
        assert all(part.spec.bits == stream for part in parts.values())
        assert all(part.formats["scores"].bits == stream for part in attention.parts(model).values())
    assert errors[0] < 0.1 and errors[1] > 3 * errors[0], errors
    blocks = [block.name for block in graph.read(uneven(kind)).blocks if block.sites]
    norms = [n for n, m in uneven(kind).named_modules() if isinstance(m, nn.LayerNorm) and not n.endswith("_before")]
    assert set(parts) == {*blocks, *norms} and {row.module for row in report.attached} >= {
        f"{name}.hfq_rounded" for name in parts}
    seen: dict[str, torch.Tensor] = {}
    for name in norms:  # what a norm computes with is on its grid
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, n=name: seen.update({n: args[0]}))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    for name in norms:
        codes = seen[name] / parts[name].scale
        assert (codes - codes.round()).abs().max() < 1e-3 and codes.abs().max() <= 3 + 1e-3
    with pytest.raises(ConfigError, match="fully_quantized needs"):
        hfq.MPTQViTConfig(fully_quantized=True, activation_bits=16)
    with pytest.raises(ConfigError, match="min_bits=4"):
        hfq.MPTQViTConfig(fully_quantized=True, target_bits=3.5)


def test_a_map_is_saved_and_can_be_given(tmp_path: Any) -> None:
    model = uneven("swin")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "block" in name]
    given = {name: {"bits": 3 + i % 4, "activation_bits": 5} for i, name in enumerate(names)}
    hfq.quantize(model, hfq.MPTQViTConfig(bit_map=given, alphas=[0.3, 0.5], **OPTIONS), IMAGES)
    packed = swap.packed_modules(model)
    assert all(packed[n].spec.bits == entry["bits"] and packed[n].activation.bits == 5 for n, entry in given.items())
    forms = {name.rpartition(".")[2] for name, layer in packed.items() if isinstance(layer.activation, TwinSpec)}
    assert forms == {"fc2"}
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert isinstance(loaded.swin.encoder.layers[0].downsample.reduction, PackedModule)
    with pytest.raises(ConfigError, match="target_bits"):
        hfq.MPTQViTConfig(target_bits=2.0)
    with pytest.raises(ConfigError, match="above max_bits"):
        hfq.MPTQViTConfig(min_bits=6, max_bits=5)
    with pytest.raises(ConfigError, match="nothing of that name.*did you mean"):
        hfq.quantize(uneven(), hfq.MPTQViTConfig(bit_map={"vit.layers.0.mlp.fc3": {"bits": 4}}, **OPTIONS), IMAGES)


def test_a_killed_run_goes_on_with_the_same_widths(tmp_path: Any) -> None:
    options = {**OPTIONS, "target_bits": 7.5, "activation_bits": 8, "greedy_images": 2, "fully_quantized": True}
    whole = uneven()
    config = hfq.MPTQViTConfig(**options)
    hfq.quantize(whole, config, IMAGES)
    with killed(after=8):  # in the second block
        hfq.quantize(uneven(), hfq.MPTQViTConfig(work_dir=tmp_path, **options), IMAGES)
    model, again = uneven(), hfq.MPTQViTConfig(work_dir=tmp_path, **options)
    hfq.quantize(model, again, IMAGES)
    assert again.bit_map == config.bit_map and torch.equal(logits(model), logits(whole))
