"""LRP-QViT: what its specification says must hold, on tiny vision transformers."""

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
from hfq.allocation import cost, program, relevance, rules
from hfq.errors import ConfigError
from hfq.graph import pairs
from hfq.layers import attention, swap
from hfq.reconstruction.channels import clip_channels
from hfq.transforms import reparameterize

OPTIONS: dict[str, Any] = {"progress": False, "calibration_batch_size": 8}
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES[:4]).logits


@pytest.mark.must_hold("lrp_qvit", 1)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_relevance_is_conserved(kind: str) -> None:
    model = uneven(kind)
    blocks = [n for n, _ in model.named_modules() if n.endswith(("vit.layers.0", "vit.layers.1", "blocks.0"))]
    for dtype, at_end, inside in ((torch.float32, 1e-3, 0.05), (torch.float64, 1e-9, 1e-9)):
        found = relevance.propagate(model, {"pixel_values": IMAGES[:2]}, dtype=dtype, watch=blocks)
        assert len(found.sums) == 4
        assert (found.sums[blocks[-1], "output"] - 1).abs().max() < at_end
        for name in blocks:
            assert (found.sums[name, "input"] - 1).abs().max() < inside


@pytest.mark.must_hold("lrp_qvit", 2)
def test_the_linear_rule_of_positive_numbers() -> None:
    x, w, r = (torch.rand(*s, dtype=torch.float64) for s in ((6, 7), (5, 7), (6, 5)))
    found = rules.positive(r, x, w, nn.functional.linear)
    assert torch.allclose(found, x * ((r / (x @ w.t())) @ w), rtol=1e-12)
    assert float(found.sum()) == pytest.approx(float(r.sum()), rel=1e-12)


@pytest.mark.must_hold("lrp_qvit", 3)
@pytest.mark.parametrize("score", relevance.SCORES)
def test_shares(score: str) -> None:
    model = uneven()
    whole = relevance.shares(model, [{"pixel_values": IMAGES[:4]}], score=score, dtype=torch.float64)
    parts = [{"pixel_values": IMAGES[i : i + 1]} for i in (3, 1, 0, 2)]
    apart = relevance.shares(model, parts, score=score, dtype=torch.float64)
    assert min(whole.shares.values()) >= 0 and sum(whole.shares.values()) == pytest.approx(1)
    assert all(apart.shares[n] == pytest.approx(v, rel=1e-6, abs=1e-12) for n, v in whole.shares.items())
    again = relevance.shares(model, [{"pixel_values": IMAGES[:4]}], score=score, dtype=torch.float64)
    assert again.shares == whole.shares and whole.images == apart.images == 4


@pytest.mark.must_hold("lrp_qvit", 4)
def test_a_branch_that_is_switched_off_has_no_share() -> None:
    model = uneven()
    projection = model.vit.layers[0].attention.o_proj
    with torch.no_grad():
        projection.weight.zero_()
        projection.bias.zero_()
    found = relevance.shares(model, [{"pixel_values": IMAGES[:2]}]).shares
    inside = [value for name, value in found.items() if name.startswith("vit.layers.0.attention.")]
    assert len(inside) == 6 and max(inside) == 0 and found["vit.layers.0.mlp.fc2"] > 0


def tables(omega: list[float]) -> tuple[dict, dict, dict]:
    names = [f"l{i}" for i in range(len(omega))]
    scores = {n: {b: -o * b for b in (3, 4, 5)} for n, o in zip(names, omega, strict=True)}
    costs = {"size": {n: {b: 10.0 * b for b in (3, 4, 5)} for n in names},
             "macs": {n: {b: 2.0 * b * b for b in (3, 4, 5)} for n in names}}
    return scores, costs, {"size": 40.0 * len(names), "macs": 32.0 * len(names)}


@pytest.mark.must_hold("lrp_qvit", 5)
def test_the_program_keeps_both_budgets() -> None:
    omega = torch.rand(9, generator=torch.Generator().manual_seed(0)).tolist()
    chosen = program.allocate(*tables(omega))
    _, costs, budgets = tables(omega)
    assert all(cost.total(costs[what], chosen) <= budgets[what] for what in budgets) and len(set(chosen.values())) > 1
    assert set(program.allocate(*tables([1 / 9] * 9)).values()) == {4}
    for i in range(9):
        doubled = program.allocate(*tables([o * (2 if i == j else 1) for j, o in enumerate(omega)]))
        assert doubled[f"l{i}"] >= chosen[f"l{i}"]
    scores, costs, budgets = tables(omega)
    wide = {"size": 50.0 * 9, "macs": 50.0 * 9}
    assert set(program.allocate(scores, costs, wide).values()) == {5}


@pytest.mark.must_hold("lrp_qvit", 6)
def test_without_clipping_it_is_the_plain_reparameterization() -> None:
    states = []
    for config in (
        hfq.LRPQViTConfig(mixed=False, clip_shares=[1.0], **OPTIONS),
        hfq.RepQuantConfig(clip=False, reconstruction="nearest", weight_clip="percentiles", **OPTIONS),
    ):
        model = uneven()
        hfq.quantize(model, config, IMAGES)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.must_hold("lrp_qvit", 7)
def test_the_fold_of_clipped_grids_changes_nothing_and_keeps_the_codes() -> None:
    norm, linear, pair, x = toy()
    with torch.no_grad():
        before, y = linear(norm(x)), norm(x)
        scale, zero, share = clip_channels(y, [linear.weight], 4, (0.99, 0.999, 1.0))
        grid = reparameterize.common_grid(scale, zero, 4)
        codes = ((y / grid.channels).round() + grid.zeros).clamp(0, 15)
        reparameterize.fold(pair, grid.ratio, grid.shift)
        after = ((norm(x) / grid.scale).round() + grid.zero_point).clamp(0, 15)
        assert (linear(norm(x)) - before).abs().max() < 1e-9 and share in (0.99, 0.999, 1.0)
    assert float((codes != after).double().mean()) < 1e-5


@pytest.mark.must_hold("lrp_qvit", 7)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_the_fold_changes_no_logits(kind: str) -> None:
    model = uneven(kind)
    wanted = logits(model)
    found = pairs.discover(graph.read(model), lambda: model(IMAGES[:2])).proven("norm")
    for pair in found:
        rows = 3 * torch.randn(200, pair.classes) + torch.randn(pair.classes)
        scale, zero, _ = clip_channels(rows, [link.part.weight for link in pair.readers], 4, (0.99, 1.0))
        grid = reparameterize.common_grid(scale, zero, 4)
        reparameterize.fold(pair, grid.ratio, grid.shift)
    assert len(found) == 4 and (logits(model) - wanted).abs().max() < 1e-4


@pytest.mark.must_hold("lrp_qvit", 8)
def test_constant_channels_and_outliers() -> None:
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 2.5
    x[7, 5] = 100 * x[:, 5].abs().max()
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    ratio = {}
    for name, shares in (("clipped", (0.99,)), ("plain", (1.0,))):
        scale, zero, _ = clip_channels(x, [weight], 4, shares)
        grid = reparameterize.common_grid(scale, zero, 4)
        assert float(scale[3]) == pytest.approx(1e-5 / 15) and bool(torch.isfinite(grid.ratio).all())
        ratio[name] = float(grid.ratio.max() / grid.ratio.median())
    assert ratio["clipped"] < 0.1 * ratio["plain"]
    capped = clip_channels(x, [weight], 4, (1.0,), cap=1.5)[0]
    assert float(capped.max()) <= 1.5 * float(clip_channels(x, [weight], 4, (1.0,))[0].median()) * (1 + 1e-9)


def run(vision: Any, kind: str, **options: Any) -> tuple[Any, Any, dict[str, int], float, dict[str, float]]:
    """Config, report, widths, divergence from the float model and relative squared errors of the layers' outputs."""
    model, start = vision.make(kind), vision.make(kind)
    config = hfq.LRPQViTConfig(calibration_samples=64, progress=False, calibration_batch_size=32, **options)
    report = hfq.quantize(model, config, vision.images(64, 5)[0])
    packed, found, images = swap.packed_modules(model), [], vision.images(256, 2)[0]
    for one in (start, model):
        outputs: dict[str, torch.Tensor] = {}
        for name in packed:
            one.get_submodule(name).register_forward_hook(
                lambda _, __, out, name=name, outputs=outputs: outputs.update({name: out}))
        with torch.no_grad():
            found.append((outputs, one(images).logits.log_softmax(-1)))
    (wanted, first), (given, last) = found
    errors = {name: float((given[name] - y).square().sum() / y.square().sum()) for name, y in wanted.items()}
    divergence = nn.functional.kl_div(last, first, log_target=True, reduction="batchmean")
    return config, report, {name: layer.spec.bits for name, layer in packed.items()}, float(divergence), errors


@pytest.mark.must_hold("lrp_qvit", 9)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_mixed_precision_is_no_larger_and_better_where_it_matters(kind: str, small_vision: Any) -> None:
    config, report, bits, divergence, errors = run(small_vision, kind)
    _, plain, _, plain_divergence, plain_errors = run(small_vision, kind, mixed=False)
    assert len(set(bits.values())) == 3 and config.average_bits["nominal"] <= 4
    assert all(bits[n] == entry["bits"] for n, entry in config.bit_map.items() if n in bits)
    stored = [sum(row.bits * row.numel for row in one.packed) for one in (report, plain)]
    assert stored[0] <= stored[1]
    weighted = [sum(config.scores[name] * one[name] for name in bits) for one in (errors, plain_errors)]
    assert weighted[0] < 0.95 * weighted[1] and divergence < 0.9 * plain_divergence


def test_bits_alone_are_spent_at_the_ends(small_vision: Any) -> None:
    """Why errors are the objective: counting bits leaves nothing in the middle, and relevant layers are no better."""
    config, _, bits, _, errors = run(small_vision, "swin", objective="bits")
    _, _, _, _, plain = run(small_vision, "swin", mixed=False)
    assert sum(width == 4 for width in bits.values()) <= 1
    assert sum(config.scores[n] * errors[n] for n in bits) > sum(config.scores[n] * plain[n] for n in bits)


@pytest.mark.must_hold("lrp_qvit", 10)
def test_sixteen_bits() -> None:
    model = uneven()
    wanted = logits(model)
    report = hfq.quantize(model, hfq.LRPQViTConfig(bits=16, activation_bits=16, **OPTIONS), IMAGES)
    assert (logits(model) - wanted).abs().max() < 1e-3 and not report.packed and not attention.parts(model)


def test_products_share_the_budget_and_maps_can_be_given(tmp_path: Any) -> None:
    model = uneven("swin")
    config = hfq.LRPQViTConfig(overrides={"re:.*reduction": {"bits": 8, "activation_bits": 8}}, **OPTIONS)
    hfq.quantize(model, config, IMAGES)
    assert model.swin.encoder.layers[0].downsample.reduction.spec.bits == 8
    part = attention.installed(model.swin.encoder.layers[0].blocks[0].attention)
    given = {side: spec.bits for side, spec in part.formats.items()}
    name = "swin.encoder.layers.0.blocks.0.attention"
    assert given["query"] == given["key"] == config.bit_map[f"{name}.scores"]["activation_bits"]
    assert given["value"] == given["probabilities"] == config.bit_map[f"{name}.values"]["activation_bits"]
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    again = uneven("swin")
    hfq.quantize(again, hfq.LRPQViTConfig(bit_map=config.bit_map, overrides=config.overrides, **OPTIONS), IMAGES)
    assert torch.equal(logits(again), logits(model))


def test_a_killed_run_chooses_the_same_widths_again(tmp_path: Any) -> None:
    options = {**OPTIONS, "objective": "bits"}
    whole = uneven()
    config = hfq.LRPQViTConfig(**options)
    hfq.quantize(whole, config, IMAGES)
    with killed(after=8):  # in the second block
        hfq.quantize(uneven(), hfq.LRPQViTConfig(work_dir=tmp_path, **options), IMAGES)
    model, again = uneven(), hfq.LRPQViTConfig(work_dir=tmp_path, **options)
    hfq.quantize(model, again, IMAGES)
    assert again.bit_map == config.bit_map and torch.equal(logits(model), logits(whole))


def test_budgets_and_maps_that_cannot_be_met() -> None:
    with pytest.raises(ConfigError, match="widths from 1 to 8"):
        hfq.LRPQViTConfig(widths=[9])
    with pytest.raises(ConfigError, match="no mean below 5; raise bits to it"):
        hfq.LRPQViTConfig(bits=4, widths=[5, 6])
    name = "vit.layers.0.mlp.fc1"
    for entry, wrong in (({"bits": 9}, "'bits'"), ({"bitz": 4}, "bitz"), ({}, "is needed"), (4, "is needed")):
        with pytest.raises(ConfigError, match=wrong):
            hfq.LRPQViTConfig(bit_map={name: entry})
    for unknown in ("vit.layers.7.mlp.fc1", "vit.layers.0.mlp.scores"):
        with pytest.raises(ConfigError, match=f"{unknown}.*nothing of that name"):
            hfq.quantize(uneven(), hfq.LRPQViTConfig(bit_map={unknown: {"bits": 4}}, **OPTIONS), IMAGES)
    with pytest.raises(ConfigError, match="smallest feasible ones in this proportion"):
        scores, costs, budgets = tables([0.5, 0.5])
        costs["macs"]["l0"][3] = costs["macs"]["l1"][3] = 100.0  # the fewest bits are slow
        program.allocate(scores, costs, {"size": 60.0, "macs": 64.0})
