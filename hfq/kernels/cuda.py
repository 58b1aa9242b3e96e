"""The rows of the dispatch table for NVIDIA GPUs. Triton itself is imported by the first kernel that runs."""

from __future__ import annotations

from typing import Any

import torch

from hfq.formats import ActivationCodes
from hfq.kernels import dispatch, kv
from hfq.kernels import producers as any_producers
from hfq.kernels.dispatch import ANY_BITS, FLOATS, Case, Row
from hfq.kernels.packed import Layout, register
from hfq.kernels.triton import cache, integer, producers, wna16

__all__: list[str] = []

_HALVES = (torch.float16, torch.bfloat16)
_NEEDS = "needs Triton (pip install 'hfq[triton]') and an NVIDIA GPU of compute capability 8.0 or newer"
_GROUPS = _NEEDS + ", and groups that are multiples of 16 (group {group}, K={K}): choose such a group size, or -1"
_MANY = "M={M} is above the number of tokens where dequantizing and a plain product is faster, or it " + _GROUPS


def _runs(case: Case) -> bool:
    return not wna16.available("cuda")


def _grouped(case: Case) -> bool:
    return _runs(case) and (case.per_row or case.group % 16 == 0)


def _few(case: Case) -> bool:
    return _grouped(case) and wna16.fused(case.bits, case.group, case.M, case.N, case.K, case.dtype)


def _integers(case: Case) -> bool:
    whole = case.activation is not None and not producers.constraint(case.activation)
    return _runs(case) and whole and (case.per_row or case.group % 32 == 0) and case.K <= integer.LONGEST


# Gradients and tracing go through hfq::wna16, which chooses among these rows when it runs.
register("triton", Layout(wna16.prepare, wna16.canonical, wna16.dequantize))
dispatch.backend("wna16", "triton")(wna16.multiply)
dispatch.backend("wna16", "triton_dequant")(wna16.multiply_dequantized)
dispatch.add_rows([
    Row("wna16", "cuda", _HALVES, ANY_BITS, "triton", _few, "triton", _MANY),
    Row("wna16", "cuda", FLOATS, ANY_BITS, "triton", _grouped, "triton_dequant", _GROUPS, constraint=True),
    Row("wna16", "cuda", FLOATS, ANY_BITS, "triton", _runs, "triton_dequant", _NEEDS, slow=True),
], before="dequant")

_INTEGERS = (
    _NEEDS + ", groups of the weight that are multiples of 32 (group {group}, K={K}), activations in one group, and "
    f"rows of at most {integer.LONGEST}"
)
register("triton_int", Layout(integer.prepare, integer.canonical, integer.dequantize))
dispatch.backend("wnan_codes", "triton")(integer.multiply)
dispatch.add_rows([
    Row("wnan", "cuda", FLOATS, ANY_BITS, "triton_int", _integers, "triton", _INTEGERS, constraint=True),
], before="dequant")


def _attend(query: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor | None:
    return None if wna16.available(query.device) else cache.attend(query, *args, **more)


def _why_not(*what: Any) -> str:
    old = torch.cuda.is_available() and wna16.available("cuda")
    return cache.constraint(*what) or (_NEEDS if old else "")


def _append(block: kv.Block, at: int, x: torch.Tensor, *args: Any) -> bool:
    return not wna16.available(x.device) and cache.append(block, at, x, *args)


def _quantize(kind: str, x: torch.Tensor, *args: Any, **before: Any) -> ActivationCodes | None:
    return None if wna16.available(x.device) else producers.serve(kind, x, *args, **before)


any_producers.DEVICES["cuda"] = _quantize
kv.FUSED["cuda"], kv.APPEND["cuda"] = _attend, _append
kv.WHY_NOT["cuda"] = "triton", _why_not
