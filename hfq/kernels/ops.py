"""The operations as ``torch.library`` operators in the namespace ``hfq``, for compilation and for gradients.

Plain inference does not come through here (:func:`hfq.kernels.linear` calls the backend directly, without the
dispatcher's microseconds). Arguments are tensors, strings and integers only; gradients reach ``x`` and never the codes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from hfq.formats import QuantSpec
from hfq.kernels import dispatch
from hfq.kernels.packed import LAYOUTS, Runtime

__all__ = ["WEIGHT", "call", "format_of", "run", "runtime_of"]

_LIBRARY = torch.library.Library("hfq", "DEF")
WEIGHT = "Tensor[] weight, str[] names, str layout, int[] format"
_LIBRARY.define(f"wna16(Tensor x, {WEIGHT}) -> Tensor")
_LIBRARY.define(f"wna16_dx(Tensor dy, {WEIGHT}) -> Tensor")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def format_of(runtime: Runtime) -> list[int]:
    """What the operators are told of a weight besides its tensors."""
    dtype = _DTYPES.index(runtime.dtype) if runtime.dtype in _DTYPES else 0
    return [runtime.spec.bits, runtime.spec.group_size, runtime.in_features, runtime.out_features, dtype]


@functools.lru_cache(maxsize=256)
def _spec(bits: int, group_size: int, scale: torch.dtype, zero: torch.dtype | None) -> QuantSpec:
    return QuantSpec(
        bits, group_size, symmetric=zero is None, zero_point="int" if zero in (None, torch.uint8) else "float",
        scale_dtype=str(scale).removeprefix("torch."),
    )


def runtime_of(weight: list[torch.Tensor], names: list[str], layout: str, fmt: list[int]) -> Runtime:
    """The weight again, from the arguments of an operator."""
    tensors = dict(zip(names, weight, strict=True))
    zero = tensors.get("zero_point")
    spec = _spec(fmt[0], fmt[1], tensors["scale"].dtype, None if zero is None else zero.dtype)
    return Runtime(layout, tensors, spec, fmt[2], fmt[3], _DTYPES[fmt[4]], cached="copy" in tensors)


def run(x: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None) -> torch.Tensor:
    """Choose the backend for ``x`` ``[..., in_features]`` and call it."""
    shape = x.shape
    x2 = x if x.dim() == 2 else x.reshape(-1, shape[-1])
    if not x2.shape[0]:
        return x.new_empty(*shape[:-1], runtime.out_features)
    row = dispatch.choose(dispatch.case_of(runtime, x2.shape[0], x.dtype, x.device.type), runtime.name)
    y = dispatch.BACKENDS["wna16", row.backend](x2, runtime, bias)
    return y if x.dim() == 2 else y.view(*shape[:-1], runtime.out_features)


def call(x: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ W.T + bias`` through the operator: traceable, and differentiable in ``x`` and ``bias``."""
    own = LAYOUTS[runtime.layout].operator
    if own is not None:
        return own(x, runtime, bias)
    names = list(runtime.tensors)
    y = torch.ops.hfq.wna16(x, [runtime.tensors[name] for name in names], names, runtime.layout, format_of(runtime))
    return y if bias is None else y + bias.to(y.dtype)


def _wna16(
    x: torch.Tensor, weight: list[torch.Tensor], names: list[str], layout: str, format: list[int]
) -> torch.Tensor:
    return run(x, runtime_of(weight, names, layout, format), None)


def _wna16_dx(
    dy: torch.Tensor, weight: list[torch.Tensor], names: list[str], layout: str, format: list[int]
) -> torch.Tensor:
    runtime = runtime_of(weight, names, layout, format)
    return torch.matmul(dy, LAYOUTS[layout].dequantize(runtime, dy.dtype))


def _wna16_fake(
    x: torch.Tensor, weight: list[torch.Tensor], names: list[str], layout: str, format: list[int]
) -> torch.Tensor:
    torch._check(x.shape[-1] == format[2], lambda: f"x has {x.shape[-1]} features, the weight {format[2]}")
    return x.new_empty(*x.shape[:-1], format[3])


def _wna16_dx_fake(
    dy: torch.Tensor, weight: list[torch.Tensor], names: list[str], layout: str, format: list[int]
) -> torch.Tensor:
    return dy.new_empty(*dy.shape[:-1], format[2])


def _setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _, weight, names, layout, fmt = inputs
    ctx.save_for_backward(*weight)
    ctx.names, ctx.layout, ctx.format = names, layout, fmt


def _backward(ctx: Any, dy: torch.Tensor) -> tuple:
    weight = list(ctx.saved_tensors)
    dx = torch.ops.hfq.wna16_dx(dy, weight, ctx.names, ctx.layout, ctx.format)
    return dx, [None] * len(weight), None, None, None


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("wna16", _wna16, _key)
    _LIBRARY.impl("wna16_dx", _wna16_dx, _key)
torch.library.register_fake("hfq::wna16", _wna16_fake, lib=_LIBRARY)
torch.library.register_fake("hfq::wna16_dx", _wna16_dx_fake, lib=_LIBRARY)
torch.library.register_autograd("hfq::wna16", _backward, setup_context=_setup, lib=_LIBRARY)
