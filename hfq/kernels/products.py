"""Products of attention on codes: queries with keys, probabilities with values, ``hfq::attention_int``.

Both products are exact sums of integers. ``Q K^T`` is that of the centred codes under ``s_q s_k``; relative positions
and masks are added to it in floats, the softmax is one of float32, and its result is coded again. Probabilities on a
uniform grid take one sum with the values, those on two grids or on a logarithmic one a sum for each grid or plane (see
:func:`hfq.formats.log.planes`), each multiplied once.

A CPU multiplies whole numbers exactly as float32 while the sums stay below ``2**24``; longer sums are cut. Byte
products, head by head, take longer on every shape of ``hfq bench kernels --only attention --every-backend``, and run
where they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hfq.errors import KernelError
from hfq.formats import ActivationSpec, activation, grids, log, twin
from hfq.formats.activation import Parameters
from hfq.formats.grids import Grid
from hfq.formats.log import LogSpec
from hfq.formats.twin import TwinSpec
from hfq.kernels import dispatch
from hfq.kernels.byte_mm import integer_mm
from hfq.kernels.dispatch import Case, Row
from hfq.kernels.isa import isa

__all__ = ["SIDES", "attention_float", "attention_int", "case_of", "repeated", "scores_of"]

SIDES = ("query", "key", "value", "probabilities")
Specs = Mapping[str, Grid]
_LARGEST = 1 << 24  # below it, float32 holds every whole number


def scores_of(raw: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax of ``raw`` ``[B, H, Q, K]`` in float32 under a mask: added, or bool and true where attention is allowed.

    A row in which nothing is allowed attends to everything alike.
    """
    raw = raw if raw.dtype == torch.float64 else raw.float()
    if mask is not None:
        mask = mask[..., : raw.shape[-1]]
        raw = raw.masked_fill(~mask, torch.finfo(raw.dtype).min) if mask.dtype == torch.bool else raw + mask.to(raw)
    return raw.softmax(-1)


def repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values ``[B, shared, K, D]`` as ``[B, heads, K, D]``: one of their heads serves several of queries."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def attention_float(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float,
    specs: Mapping[str, Grid | None], params: Mapping[str, Parameters | None],
    rounded: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The attention with every side on its grid, in floats: for gradients, and where a side has no grid.

    ``rounded(side, x)`` takes the place of the grids while these are being learned.
    """
    def coded(name: str, x: torch.Tensor) -> torch.Tensor:
        spec = specs[name]
        return x if spec is None else grids.fake(x, spec, params[name])

    rounded = rounded or coded
    q, k, v = rounded("query", query), rounded("key", key), rounded("value", value)
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    p = rounded("probabilities", scores_of(_coded(q @ k.transpose(-1, -2) * scaling, specs, params), mask))
    return p.to(v.dtype) @ v


def _coded(raw: torch.Tensor, specs: Mapping[str, Any], params: Mapping[str, Any]) -> torch.Tensor:
    """What the softmax reads, on its grid if it has one ("scores"); masks and positions are added afterwards."""
    spec = specs.get("scores")
    return raw if spec is None else grids.fake(raw, spec, params["scores"])


def attention_int(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float,
    specs: Specs, params: Mapping[str, Parameters],
) -> torch.Tensor:
    """Attention ``[B, heads, queries, head_dim]`` on codes, dtype of ``query``; without gradients.

    Args:
        query, key, value: floats ``[B, heads, tokens, head_dim]``; fewer heads of keys and values are shared.
        mask: see :func:`scores_of`.
        specs: the formats by name (``SIDES``): static uniform grids; the probabilities may also be on a logarithmic
            grid or on two grids of magnitudes. "scores", if there, is one for what the softmax reads.
        params: ``(scale [1], zero point [1] or None)`` of each.

    Raises:
        KernelError: a format that has no codes here, or a forced backend that cannot run.
    """
    if torch.compiler.is_compiling() or query.is_meta:
        tensors = [t for name in _sides(specs) for t in params[name] if t is not None]
        numbers = [n for name in _sides(specs) for n in _numbers(specs[name])]
        return torch.ops.hfq.attention_int(query, key, value, mask, scaling, tensors, numbers)
    _check(specs)
    name = dispatch.choose(case_of(query, key, specs), "attention").backend
    return dispatch.BACKENDS["attention", name](query, key, value, mask, scaling, specs, params)


def case_of(query: torch.Tensor, key: torch.Tensor, specs: Specs) -> Case:
    """What the dispatch decides by: ``M`` queries and ``N`` keys of a head of width ``K``."""
    m, k = query.shape[2:]
    bits = max(specs[name].bits for name in SIDES)
    return Case("attention", query.device.type, query.dtype, bits, m, key.shape[2], k, k, isa=isa())


def _sides(specs: Specs) -> list[str]:
    return [*SIDES, *(["scores"] if specs.get("scores") is not None else [])]


def _check(specs: Specs) -> None:
    for name in _sides(specs):
        spec = specs[name]
        uniform = isinstance(spec, ActivationSpec) and not spec.dynamic and spec.granularity == "tensor"
        logarithm = name == "probabilities" and isinstance(spec, LogSpec)
        grids = name == "probabilities" and isinstance(spec, TwinSpec) and spec.regions == "magnitude"
        if not (uniform or logarithm or grids):
            raise KernelError(f"{name}={spec}: products of attention take static uniform grids, and for the "
                              "probabilities logarithmic ones or two grids of magnitudes")


# Backends


@dispatch.backend("attention", "reference")
def _reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float,
    specs: Specs, params: Mapping[str, Parameters],
) -> torch.Tensor:
    """Codes as the definition has them, products in float64; only the softmax is one of float32."""
    q, k, v = (activation.dequantize(activation.quantize(x, specs[n], params[n]), torch.float64)  # type: ignore[arg-type]
               for n, x in (("query", query), ("key", key), ("value", value)))  # fmt: skip
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    p = scores_of(_coded((q @ k.transpose(-1, -2) * scaling).float(), specs, params), mask)
    spec, (scale, zero) = specs["probabilities"], params["probabilities"]
    if isinstance(spec, LogSpec):
        p = log.decode(log.encode(p, scale, spec), scale, spec, torch.float64)
    elif isinstance(spec, TwinSpec):
        p = twin.decode(twin.encode(p, scale, spec), scale, spec, torch.float64)
    else:
        p = activation.dequantize(activation.quantize(p, spec, (scale, zero)), torch.float64)
    return (p @ v).to(query.dtype)


def _whole(x: torch.Tensor, spec: ActivationSpec, params: Parameters) -> torch.Tensor:
    """Centred codes as whole float32 numbers (what :func:`hfq.formats.activation.quantize` codes, less the zero)."""
    scale, zero = params
    q = (x.float() * (1 / scale.float())).round_()
    if zero is None:
        return q.clamp_(spec.min_code, spec.max_code)
    z = zero.float()
    return q.add_(z).clamp_(0, spec.max_code).sub_(z)


def _grids(
    p: torch.Tensor, spec: Grid, params: Parameters
) -> list[tuple[torch.Tensor, torch.Tensor | float, int]]:
    """The probabilities as ``sum(factor * whole numbers)``: ``(numbers, factor, largest number)`` each."""
    scale, zero = params
    if isinstance(spec, LogSpec):
        codes = log.encode(p, scale, spec, check=False)
        return [(plane.of(codes).float(), scale.float() * plane.factor, max(plane.integers))
                for plane in log.planes(spec)]  # fmt: skip
    if isinstance(spec, TwinSpec):
        fine, coarse = twin.parts(twin.encode(p, scale, spec), spec)
        return [(fine.float(), scale.float(), spec.top), (coarse.float(), scale.float() * 2.0**spec.shift, spec.top)]
    return [(_whole(p, spec, (scale, zero)), scale.float(), spec.max_code)]


def _exact(a: torch.Tensor, b: torch.Tensor, largest: int) -> torch.Tensor:
    """``a @ b`` of whole numbers whose products are at most ``largest``: exact, in float32 (int32 for long sums)."""
    step = max(1, (_LARGEST - 1) // max(largest, 1))
    if a.shape[-1] <= step:
        return a @ b
    total = None
    for start in range(0, a.shape[-1], step):
        part = (a[..., start : start + step] @ b[..., start : start + step, :]).to(torch.int32)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.float()


def _bytes(a: torch.Tensor, b: torch.Tensor, _: int) -> torch.Tensor:
    """The same by products of signed bytes, head by head; numbers beyond seven bits are split in two."""
    b_n, h, m, k = a.shape
    out = torch.empty(b_n, h, m, b.shape[-1], dtype=torch.float32)
    halves_a, halves_b = _signed(a), _signed(b)
    for i in range(b_n):
        for j in range(h):
            total = None
            for fa, xa in halves_a:
                for fb, xb in halves_b:
                    part = integer_mm(xa[i, j], xb[i, j])
                    part = part if fa * fb == 1 else part * (fa * fb)
                    total = part if total is None else total.add_(part)
            out[i, j] = total  # type: ignore[assignment]
    return out


def _signed(x: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Whole numbers up to 255 in magnitude as ``sum(factor * int8)``."""
    if not x.numel() or float(x.abs().max()) <= 127:
        return [(1, x.to(torch.int8))]
    half = (x * 0.5).floor_()
    return [(2, half.to(torch.int8)), (1, (x - 2 * half).to(torch.int8))]


def _attention(
    product: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    scaling: float, specs: Any, params: Mapping[str, Parameters],
) -> torch.Tensor:
    q, k, v = (_whole(x, specs[n], params[n]) for n, x in (("query", query), ("key", key), ("value", value)))
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    raw = product(q, k.transpose(-1, -2), specs["query"].max_code * specs["key"].max_code)
    raw = raw.mul_(params["query"][0].float() * params["key"][0].float() * scaling)
    total = None
    p = scores_of(_coded(raw, specs, params), mask)
    for numbers, factor, largest in _grids(p, specs["probabilities"], params["probabilities"]):
        part = product(numbers, v, largest * specs["value"].max_code).mul_(factor * params["value"][0].float())
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.to(query.dtype)


@dispatch.backend("attention", "float_codes")
def _float_codes(*given: Any) -> torch.Tensor:
    """Whole numbers in batched float32 products."""
    with torch.no_grad(), _WholeProducts():
        return _attention(_exact, *given)


@dispatch.backend("attention", "aten_int8")
def _aten_int8(*given: Any) -> torch.Tensor:
    """Byte products, head by head."""
    with torch.no_grad():
        return _attention(_bytes, *given)


class _WholeProducts:
    """Products of float32 in float32: shortened formats of some GPUs do not hold these whole numbers."""

    def __enter__(self) -> None:
        self.old = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_: Any) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self.old


dispatch.add_rows([
    Row("attention", "*", (torch.float32, torch.bfloat16, torch.float16), dispatch.ANY_BITS, "*", lambda case: True,
        "float_codes", "serves every shape"),
    Row("attention", "cpu", (torch.float32, torch.bfloat16, torch.float16), dispatch.ANY_BITS, "*",
        lambda case: True, "aten_int8", "serves every shape"),
    Row("attention", "*", (), dispatch.ANY_BITS, "*", lambda case: True, "reference", "serves everything"),
])  # fmt: skip


# The operator

_ZERO = ("reserve", "none", "repo")


def _numbers(spec: Grid) -> list[int]:
    if isinstance(spec, LogSpec):
        return [1, spec.bits, spec.base == "sqrt2", _ZERO.index(spec.zero)]
    if isinstance(spec, TwinSpec):
        return [2, spec.bits, spec.shift, spec.regions == "signed"]
    return [0, spec.bits, spec.symmetric, 0]


def _spec(numbers: list[int]) -> Grid:
    kind, bits, first, second = numbers
    if kind == 1:
        return LogSpec(bits, "sqrt2" if first else "2", _ZERO[second])  # type: ignore[arg-type]
    if kind == 2:
        return TwinSpec(bits, first, "signed" if second else "magnitude")
    return ActivationSpec(bits, bool(first), "tensor", dynamic=False)


def _operator(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float,
    params: list[torch.Tensor], formats: list[int],
) -> torch.Tensor:
    specs = {name: _spec(formats[4 * i : 4 * i + 4]) for i, name in enumerate((*SIDES, "scores")) if formats[4 * i :]}
    left, given = list(params), {}
    for name, spec in specs.items():
        zero = isinstance(spec, ActivationSpec) and not spec.symmetric
        given[name] = (left.pop(0), left.pop(0) if zero else None)
    return attention_int(query, key, value, mask, scaling, specs, given).contiguous()


def _fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float,
    params: Any, formats: Any,
) -> torch.Tensor:
    torch._check(query.shape[-1] == key.shape[-1], lambda: "queries and keys differ in width")
    return query.new_empty(*query.shape[:-1], value.shape[-1])


_LIBRARY = torch.library.Library("hfq", "FRAGMENT")
_LIBRARY.define("attention_int(Tensor query, Tensor key, Tensor value, Tensor? mask, float scaling, Tensor[] params, "
                "int[] formats) -> Tensor")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("attention_int", _operator, _key)
torch.library.register_fake("hfq::attention_int", _fake, lib=_LIBRARY)
