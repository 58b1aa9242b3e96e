"""Attention products on codes: exact sums, formats of probabilities, the operator, forced backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfq import kernels
from hfq.errors import KernelError
from hfq.formats import ActivationSpec, activation, log, twin
from hfq.formats.log import LogSpec
from hfq.formats.twin import TwinSpec
from hfq.kernels import byte_mm, products

SIDE = {"asymmetric": ActivationSpec(8, False, "tensor", dynamic=False),
        "symmetric": ActivationSpec(6, True, "tensor", dynamic=False)}
PROBABILITIES = {"uniform": ActivationSpec(8, False, "tensor", dynamic=False), "sqrt2": LogSpec(4, "sqrt2"),
                 "log2": LogSpec(3, "2", "none"), "twin": TwinSpec(6, 4, "magnitude")}
BACKENDS = ("reference", "float_codes", "aten_int8")


def case(side: str = "asymmetric", kind: str = "uniform", tokens: int = 9, keys: int = 13, shared: int = 1) -> Any:
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(2, 4, tokens, 16, generator=generator)
    k, v = (torch.randn(2, 4 // shared, keys, 16, generator=generator) + 0.3 for _ in range(2))
    spec = SIDE[side]
    specs: dict[str, Any] = {"query": spec, "key": spec, "value": spec, "probabilities": PROBABILITIES[kind]}
    params = {n: activation.range_parameters(x.min().reshape(1), x.max().reshape(1), spec)
              for n, x in (("query", q), ("key", k), ("value", v))}
    scale = {"uniform": 1 / 255, "twin": 1 / (31 << 4)}.get(kind, 0.8)
    params["probabilities"] = (torch.tensor([scale]), torch.zeros(1) if kind == "uniform" else None)
    mask = torch.zeros(2, 1, tokens, keys)
    mask[0, :, :, -3:] = -100.0
    return (q, k, v, mask, 0.25, specs, params)


def by_definition(q: Any, k: Any, v: Any, mask: Any, scaling: float, specs: Any, params: Any) -> torch.Tensor:
    """One head at a time, from the integers."""
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    groups = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            whole = {}
            for name, x in (("query", q[b, h]), ("key", k[b, h // groups]), ("value", v[b, h // groups])):
                codes = activation.quantize(x, specs[name], params[name])
                zero = 0 if codes.zero_point is None else int(codes.zero_point)
                whole[name] = codes.codes.to(torch.int64) - zero
            s = {name: float(params[name][0]) for name in params}
            raw = (whole["query"] @ whole["key"].t()).double() * s["query"] * s["key"] * scaling
            p = (raw.float() + mask[b, 0]).softmax(-1)
            spec, scale = specs["probabilities"], params["probabilities"][0]
            if isinstance(spec, LogSpec):
                a = log.decode(log.encode(p, scale, spec), scale, spec, torch.float64)
            elif isinstance(spec, TwinSpec):
                fine, coarse = twin.parts(twin.encode(p, scale, spec), spec)
                a = (fine.double() + coarse.double() * 2**spec.shift) * float(scale)
            else:
                a = (p.double() * 255).round().clamp(0, 255) / 255
            out[b, h] = a @ whole["value"].double() * s["value"]
    return out


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Up to float32, but for single probabilities on the edge between two codes."""
    wrong = (found.double() - wanted).abs() > 2e-6 * wanted.abs().max()
    return float(wrong.double().mean()) <= 0.02 and float((found - wanted).norm() / wanted.norm()) < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PROBABILITIES)
@pytest.mark.parametrize("side", SIDE)
def test_backends_compute_the_definition(side: str, kind: str, backend: str) -> None:
    given = case(side, kind)
    with kernels.use(attention=backend):
        assert close(products.attention_int(*given), by_definition(*given))
    floats = products.attention_float(*given)
    assert close(floats, by_definition(*given))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_heads_and_single_tokens(backend: str) -> None:
    for given in (case(shared=2), case(tokens=1, keys=5), case(tokens=5, keys=1)):
        with kernels.use(attention=backend):
            assert close(products.attention_int(*given), by_definition(*given))


def test_sums_stay_exact_beyond_what_float32_counts() -> None:
    tokens = 1200  # 255 * 255 * 1200 is over 2**24
    a = torch.full((1, 1, 3, tokens), 255.0)
    b = torch.full((1, 1, tokens, 2), 255.0)
    b[..., 0, 0] = 254.0
    wanted = torch.tensor([255 * 255 * tokens - 255, 255 * 255 * tokens], dtype=torch.float64).float()
    assert torch.equal(products._exact(a, b, 255 * 255)[0, 0, 0], wanted)
    assert torch.equal(products._bytes(a, b, 255 * 255)[0, 0, 0], wanted)


def test_byte_products_are_exact_on_processors_that_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(tokens=4, keys=1)
    with kernels.use(attention="aten_int8"):
        wanted = products.attention_int(*given)
        for probe in ("exact_signed", "exact_unsigned"):
            monkeypatch.setattr(byte_mm, probe, lambda: False)
        assert torch.equal(products.attention_int(*given), wanted)


def test_masks_of_both_forms_agree() -> None:
    q, k, v, mask, *rest = case()
    allowed = mask == 0
    assert torch.allclose(products.attention_int(q, k, v, mask, *rest), products.attention_int(q, k, v, allowed, *rest))
    blocked = torch.zeros_like(allowed)
    assert bool(torch.isfinite(products.attention_int(q, k, v, blocked, *rest)).all())


@pytest.mark.parametrize("kind", PROBABILITIES)
def test_operator(kind: str) -> None:
    q, k, v, mask, scaling, specs, params = case(kind=kind, tokens=5)
    tensors = [t for name in products.SIDES for t in params[name] if t is not None]
    numbers = [int(n) for name in products.SIDES for n in products._numbers(specs[name])]
    for given in (mask, None):
        torch.library.opcheck(torch.ops.hfq.attention_int, (q, k, v, given, scaling, tensors, numbers))
    found = torch.ops.hfq.attention_int(q, k, v, mask, scaling, tensors, numbers)
    assert torch.equal(found, products.attention_int(q, k, v, mask, scaling, specs, params))
    meta = products.attention_int(q.to("meta"), k.to("meta"), v.to("meta"), None, scaling, specs, params)
    assert meta.shape == found.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_may_have_a_grid(backend: str) -> None:
    q, k, v, mask, scaling, specs, params = case(tokens=5)
    raw = products.attention_float(q, k, v, mask, scaling, specs, params)
    specs = {**specs, "scores": ActivationSpec(4, True, "tensor", dynamic=False)}
    params = {**params, "scores": (torch.full((1,), 0.1), None)}
    wanted = products.attention_float(q, k, v, mask, scaling, specs, params)
    assert (wanted - raw).norm() > 1e-2 * raw.norm()
    with kernels.use(attention=backend):
        assert close(products.attention_int(q, k, v, mask, scaling, specs, params), wanted.double())
        names = (*products.SIDES, "scores")
        tensors = [t for name in names for t in params[name] if t is not None]
        numbers = [int(n) for name in names for n in products._numbers(specs[name])]
        found = torch.ops.hfq.attention_int(q, k, v, mask, scaling, tensors, numbers)
        assert torch.equal(found, products.attention_int(q, k, v, mask, scaling, specs, params))


def test_tracing_sees_one_operator() -> None:
    q, k, v, mask, scaling, specs, params = case(kind="sqrt2")

    def call(query: torch.Tensor) -> torch.Tensor:
        return products.attention_int(query, k, v, mask, scaling, specs, params)

    with torch.no_grad():
        assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(q), call(q))


def test_what_has_no_codes_is_refused() -> None:
    q, k, v, mask, scaling, specs, params = case()
    for name, wrong in (("key", ActivationSpec(8)), ("value", LogSpec(4)), ("probabilities", TwinSpec(6, 2, "signed"))):
        with pytest.raises(KernelError, match=name):
            products.attention_int(q, k, v, mask, scaling, {**specs, name: wrong}, params)
    with kernels.use(attention="aten_int8"), pytest.raises(KernelError, match="takes"):
        products.attention_int(q.double(), k.double(), v.double(), mask, scaling, specs, params)
