"""Learned rounding up or down: where it starts, its gradients, its penalty and what it exports."""

from __future__ import annotations

import math

import pytest
import torch

from hfq.errors import ConfigError
from hfq.formats import QuantSpec, affine
from hfq.rounding import nearest
from hfq.rounding.lowrank import HIGH, LOW, Bank, GatedRounding, gate, gate_start, sharpness

SPECS = [QuantSpec(3), QuantSpec(2, 16), QuantSpec(4, 0), QuantSpec(4, 24, symmetric=True), QuantSpec(2, 7)]


def randomised(q: GatedRounding, amount: float = 0.5) -> GatedRounding:
    with torch.no_grad():
        for p in q.parameters():
            p.add_(amount * torch.randn(p.shape))
        q.step.copy_(1 + 0.1 * torch.randn(q.step.shape))
    return q


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("rank", [0, 3, None])
def test_the_start(spec: QuantSpec, rank: int | None) -> None:
    """Soft, it is the weight up to clamping; hardened, round to nearest."""
    w = torch.randn(12, 40)
    q = GatedRounding(w, spec, rank=rank)
    plain = affine.quantize(w, spec)
    assert torch.equal(q.codes().codes, plain.codes) and torch.equal(q.codes().scale, plain.scale)
    if rank != 0:
        low = affine.expand(q.low, 40, spec)
        scale = affine.expand(plain.scale.float(), 40, spec)
        reach = torch.maximum(torch.minimum(w / scale, low + spec.max_code), low) * scale
        torch.testing.assert_close(q(), reach, rtol=0, atol=1e-5 * float(scale.max()) * spec.max_code)
    q.harden()
    assert torch.equal(q(), affine.dequantize(plain))


def test_without_an_anchor_every_gate_is_one_half() -> None:
    w = torch.randn(6, 10)
    for rank in (2, None):
        q = GatedRounding(w, QuantSpec(8, scale_dtype="float32"), rank=rank, anchored=False)
        quotient = w / q.scale()
        inside = ((quotient.floor() + 0.5) - q.low).clamp(0, 255) == (quotient.floor() + 0.5) - q.low
        torch.testing.assert_close(q()[inside], ((quotient.floor() + 0.5) * q.scale())[inside])
    fraction = torch.linspace(0, 1, 33)
    torch.testing.assert_close(gate(gate_start(fraction)), fraction, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 3, None])
@pytest.mark.parametrize("spec", [QuantSpec(3, scale_dtype="float32"), QuantSpec(2, 16, scale_dtype="float32")])
def test_gradients_are_those_of_the_formula(spec: QuantSpec, rank: int | None) -> None:
    """Against plain recorded operations with a straight-through floor."""
    w = torch.randn(8, 40)
    q = randomised(GatedRounding(w, spec, rank=rank, grid=nearest.grid_of(w / 2, spec)))
    weights = torch.randn(8, 40)
    (q() * weights).sum().backward()
    mine = {name: p.grad.clone() for name, p in q.named_parameters()}
    q.zero_grad()
    scale = affine.expand(q.start * q.step, 40, spec)
    quotient = w / scale
    if rank == 0:
        soft = quotient + (quotient.round() - quotient).detach()
    else:
        logits = q.logits()
        soft = quotient + (quotient.floor() - quotient).detach()
        soft = soft + (torch.sigmoid(logits) * (HIGH - LOW) + LOW).clamp(0, 1)
    low = affine.expand(q.low, 40, spec)
    high = low + spec.max_code  # (torch.maximum would split the gradient of ties)
    value = torch.where(soft > high, high, torch.where(soft < low, low, soft))
    assert 0.02 < float((value != soft).float().mean()) < 0.9
    out = value * scale
    torch.testing.assert_close(q(), out)
    (out * weights).sum().backward()
    for name, p in q.named_parameters():
        torch.testing.assert_close(mine[name], p.grad, rtol=1e-4, atol=1e-5)


def test_straight_gates_are_hard_in_value_and_soft_in_gradient() -> None:
    w, weights = torch.randn(8, 16), torch.randn(8, 16)
    soft, hard = (GatedRounding(w, QuantSpec(8), rank=None, straight=flag) for flag in (False, True))
    assert torch.equal(hard(), affine.dequantize(affine.quantize(w, QuantSpec(8))))
    for q in (soft, hard):
        (q() * weights).sum().backward()
    inside = (hard().detach() == affine.dequantize(hard.codes())) & (soft.full.grad != 0)
    torch.testing.assert_close(hard.full.grad[inside], soft.full.grad[inside])


def test_penalty() -> None:
    q = randomised(GatedRounding(torch.randn(8, 12), QuantSpec(3), rank=None), 2.0)
    for beta in (20.0, 5.0, 2.0):
        q.zero_grad()
        value = q.penalty(beta)
        value.backward()
        mine, logits = q.full.grad.clone(), q.logits().detach().requires_grad_()
        expected = (1 - ((torch.sigmoid(logits) * 1.2 - 0.1).clamp(0, 1) * 2 - 1).abs() ** beta).sum()
        expected.backward()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(mine, logits.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        q.full.copy_(torch.where(q.full >= 0, 100.0, -100.0))
    assert float(q.penalty(2.0).detach()) == 0
    assert q.statistics()["soft_share"] == 0


def test_penalty_alone_closes_the_gates() -> None:
    q = GatedRounding(torch.randn(16, 32), QuantSpec(4), rank=None)
    before = q.codes().codes
    adam = torch.optim.Adam([q.full], 0.05)
    for step in range(300):
        beta = sharpness(step, 300)
        adam.zero_grad()
        if beta is not None:
            q.penalty(beta).backward()
            adam.step()
    assert q.statistics()["soft_share"] < 0.02
    assert torch.equal(q.codes().codes, before)  # each gate falls to its own side


def test_sharpness_schedule() -> None:
    values = [sharpness(step, 100) for step in range(100)]
    assert values[:20] == [None] * 20 and values[20] == 20.0
    rest = [v for v in values if v is not None]
    assert all(a > b for a, b in zip(rest, rest[1:], strict=False)) and math.isclose(rest[-1], 2, abs_tol=0.05)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("rank", [0, 3, None])
def test_what_is_exported_is_what_the_hardened_weight_is(spec: QuantSpec, rank: int | None) -> None:
    q = randomised(GatedRounding(torch.randn(12, 40), spec, rank=rank), 1.0)
    codes = q.codes()
    q.harden()
    assert torch.equal(affine.dequantize(codes), q().detach()) and int(codes.codes.max()) <= spec.max_code


def test_parameters_and_frozen_weights() -> None:
    q = GatedRounding(torch.randn(10, 14), QuantSpec(3), rank=4)
    rounding = {name: p for name, p in q.named_parameters() if name != "step"}
    assert sum(p.numel() for p in rounding.values()) == 4 * (10 + 14) and set(rounding) == {"left", "right"}
    q().sum().backward()
    assert q.matrix.grad is None and not q.matrix.requires_grad and not q.anchor.requires_grad
    assert set(q.state_dict()) == {"left", "right", "step"}
    fixed = GatedRounding(torch.randn(4, 4), QuantSpec(3), learn_scale=False)
    fixed().sum().backward()
    assert fixed.step.grad is None


def test_a_start_from_codes() -> None:
    w, spec = torch.randn(8, 32), QuantSpec(3, 16)
    shifted = affine.quantize(w, spec)
    quotient = w / affine.expand(shifted.scale.float(), 32, spec)
    draw = (torch.rand(8, 32) < 0.5).float()
    low = -affine.expand(shifted.zero_point.float(), 32, spec)
    shifted.codes = (quotient.floor() + draw - low).clamp(0, 7).to(torch.uint8)
    for rank in (3, None):
        assert torch.equal(GatedRounding(w, spec, rank=rank, codes=shifted).codes().codes, shifted.codes)


def test_experts_and_convolutions() -> None:
    members = [randomised(GatedRounding(torch.randn(6, 10), QuantSpec(3), rank=2)) for _ in range(3)]
    bank = Bank(members)
    assert bank().shape == (3, 6, 10) and bank.weights == 180 and len(bank.codes()) == 3
    torch.testing.assert_close(bank.penalty(4.0), sum(m.penalty(4.0) for m in members))
    bank.harden()
    assert all(torch.equal(bank()[i], affine.dequantize(codes)) for i, codes in enumerate(bank.codes()))
    conv = GatedRounding(torch.randn(6, 4, 3, 3), QuantSpec(4), rank=2)
    assert conv().shape == (6, 4, 3, 3) and conv.right.shape == (2, 36)


def test_impossible_settings() -> None:
    w = torch.randn(4, 8)
    for options, match in (
        ({"spec": QuantSpec(4, zero_point="float")}, "zero_point"),
        ({"spec": QuantSpec(4), "rank": -1}, "rank"),
        ({"spec": QuantSpec(4), "grid": affine.fit(w, QuantSpec(4, 4))}, "grid"),
        ({"spec": QuantSpec(4), "anchored": False, "codes": affine.quantize(w, QuantSpec(4))}, "anchored"),
    ):
        with pytest.raises(ConfigError, match=match):
            GatedRounding(w, **options)
