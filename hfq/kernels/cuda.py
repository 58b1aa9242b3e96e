"""The rows of the dispatch table for NVIDIA GPUs. Triton is imported when the first weight is prepared there."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from hfq.kernels import dispatch
from hfq.kernels.dispatch import ANY_BITS, FLOATS, Case, Row
from hfq.kernels.packed import Layout, PackedWeight, Runtime, register

__all__ = ["unavailable"]


def _kernels() -> ModuleType:
    from hfq.kernels.triton import wna16

    return wna16


@functools.cache
def unavailable() -> str:
    """Why the Triton kernels cannot run on this machine's GPU; empty if they can."""
    return _kernels().available("cuda")


def _make(packed: PackedWeight, dtype: torch.dtype) -> Runtime:
    return _kernels().prepare(packed, dtype)


def _linear(x: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None) -> torch.Tensor:
    return _kernels().linear(x, runtime, bias)


register("triton", Layout(
    make=_make,
    canonical=lambda runtime: _kernels().canonical(runtime),
    dequantize=lambda runtime, dtype: _kernels().dequantize(runtime, dtype),
    operator=_linear,
))
dispatch.BACKENDS["wna16", "triton"] = _linear


def _runs(case: Case) -> bool:
    return not unavailable()


dispatch.add_rows([
    Row("wna16", "cuda", FLOATS, ANY_BITS, "triton", _runs, "triton",
        "needs Triton (pip install 'hfq[triton]') and an NVIDIA GPU of compute capability 8.0 or newer",
        constraint=True),
], before="dequant")
