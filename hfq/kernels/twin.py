"""Products of inputs on two grids: two exact sums of integers, one for each grid, under one scale.

The codes split into signed bytes that are zero where the other grid holds; each half is an ordinary integer product
with whatever backend serves the weight, ``scale * s_w * (fine + 2**shift * coarse)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hfq.errors import KernelError
from hfq.formats import ActivationCodes, ActivationSpec, twin
from hfq.formats.activation import Parameters
from hfq.formats.twin import TwinSpec
from hfq.kernels import integer, ops
from hfq.kernels.packed import LAYOUTS, PackedWeight, Runtime

__all__ = ["BYTES", "halves", "linear_twin"]

# What the halves of the codes are to the integer product.
BYTES = ActivationSpec(8, symmetric=True, granularity="tensor", dynamic=False)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def halves(x: torch.Tensor, scale: torch.Tensor, spec: TwinSpec) -> tuple[ActivationCodes, ActivationCodes]:
    """Codes of ``x`` ``[..., features]`` as two tensors of signed bytes, the fine and the coarse one."""
    with torch.no_grad():
        fine, coarse = twin.parts(twin.encode(x, scale, spec), spec)
        step = scale.reshape(1).to(x.device, torch.promote_types(x.dtype, torch.float32))
    return ActivationCodes(fine, step, None, BYTES), ActivationCodes(coarse, step * 2.0**spec.shift, None, BYTES)


def linear_twin(
    x: torch.Tensor, weight: PackedWeight | Runtime, bias: torch.Tensor | None, spec: TwinSpec, params: Parameters, *,
    before: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """``Q(x) @ W.T + bias`` with exact sums of integers.

    Args:
        x: ``[..., in_features]``.
        weight: prepared with ``activation=spec`` (fast) or canonical.
        params: ``(scale [1], None)``.
        before: a function of single tokens that is applied to ``x`` first.

    Returns:
        ``[..., out_features]``, dtype of ``x``. With gradients the product is one of floats, straight through the
        rounding.
    """
    runtime = weight if isinstance(weight, Runtime) else LAYOUTS["canonical"].make(weight, torch.float32)
    x = x if before is None else before(x)
    if x.shape[-1] != runtime.in_features:
        raise KernelError(f"x has {x.shape[-1]} features, the weight of {runtime.name or 'a layer'} has "
                          f"{runtime.in_features}")
    scale = params[0]
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        matrix = LAYOUTS[runtime.layout].dequantize(runtime, x.dtype)
        return torch.nn.functional.linear(twin.fake(x, scale, spec), matrix, None if bias is None else bias.to(x.dtype))
    if x.is_meta:
        return x.new_empty(*x.shape[:-1], runtime.out_features)
    fine, coarse = halves(x, scale, spec)
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = _product(fine, runtime, dtype) + _product(coarse, runtime, dtype)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def _product(codes: ActivationCodes, runtime: Runtime, dtype: torch.dtype) -> torch.Tensor:
    if not torch.compiler.is_compiling():
        return integer.product(codes, runtime, None, dtype)
    names = list(runtime.tensors)
    tensors = [runtime.tensors[name] for name in names]
    form = [BYTES.bits, True, True, -1, False, False]
    return torch.ops.hfq.wnan_codes(codes.codes, codes.scale, None, tensors, names, runtime.layout,
                                    ops.format_of(runtime), form, _DTYPES.index(dtype))
