"""How packed weights multiply: one entry point an operation, the fastest backend that can serve it behind it.

    runtime = prepare(PackedWeight(...), dtype=torch.float32)     # once, at load
    y = linear(x, runtime, bias)                                  # x [..., in], y [..., out]
    for line in explain(runtime, M=1): ...                        # which backend, and why no other
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from hfq.errors import KernelError
from hfq.formats import ActivationSpec, affine, bitpack, twolevel
from hfq.kernels import cpu, cpu_int8, dispatch, ops
from hfq.kernels import cpu_conv as _cpu_conv  # noqa: F401  its rows and layouts
from hfq.kernels import cpu_integer as _cpu_integer  # noqa: F401  its rows and layouts
from hfq.kernels import cuda as _cuda  # noqa: F401  its rows and layout
from hfq.kernels import cuda_conv as _cuda_conv  # noqa: F401  its rows and layout
from hfq.kernels.dispatch import Choice, table, use
from hfq.kernels.integer import linear_int
from hfq.kernels.isa import isa
from hfq.kernels.packed import LAYOUTS, PackedWeight, Runtime

__all__ = [
    "Choice", "PackedWeight", "Runtime", "dequantize", "embedding", "explain", "linear", "linear_int", "prepare",
    "table", "use",
]

Memory = Literal["compact", "cached"]


def _prepare_case(
    packed: PackedWeight, M: int, dtype: torch.dtype, device: str, memory: Memory, activation: ActivationSpec | None
) -> dispatch.Case:
    fits = device == "cpu" and packed.spec.bits > 4 and activation is None and cpu_int8.offset_fits(packed)
    sums = 1
    if activation is not None:
        folded = packed.zero_point is None or packed.zero_point.dtype == torch.uint8
        folded = folded and not packed.scale.is_meta and twolevel.split(packed.scale, packed.spec) is not None
        sums = dispatch.sums_of(packed.spec, folded, packed.in_features, activation)
    return dispatch.Case(
        "wna16" if activation is None else "wnan", device, dtype, packed.spec.bits, M, packed.out_features,
        packed.in_features, packed.spec.group_length(packed.in_features), None, memory == "cached", isa(), fits,
        activation, sums,
    )


def prepare(
    packed: PackedWeight, *, dtype: torch.dtype, memory: Memory = "compact", activation: ActivationSpec | None = None
) -> Runtime:
    """Make the runtime form of ``packed`` for the device where it lies.

    Args:
        packed: the canonical form; its tensors may be dropped afterwards, scales and zero points are shared.
        dtype: dtype of the activations that will come.
        memory: ``"compact"`` keeps packed codes only; ``"cached"`` also keeps a float copy for larger batches, whose
            bytes are in ``Runtime.nbytes``. For integer products it keeps codes of up to 4 bits as bytes, and a float
            copy only where scales in groups do not fold.
        activation: the activations will be quantized so: a form for :func:`linear_int`.

    Raises:
        CheckpointError: the tensors do not have the shapes that the spec asks for.
        KernelError: a forced backend cannot serve this weight, or ``HFQ_STRICT=1`` and only a slow one can.
    """
    if memory not in ("compact", "cached"):
        raise KernelError(f"memory={memory!r}: 'compact' or 'cached'")
    packed.check()
    if packed.qweight.is_meta or not packed.qweight.numel():
        return LAYOUTS["canonical"].make(packed, dtype)
    device = packed.qweight.device.type
    row = dispatch.choose(_prepare_case(packed, 1, dtype, device, memory, activation), packed.name)
    runtime = LAYOUTS["canonical" if row.layout == "*" else row.layout].make(packed, dtype)
    if memory == "cached" and device == "cpu" and (activation is None or "group_scale" in runtime.tensors):
        runtime.tensors["copy"] = cpu.float_copy(runtime)
        runtime.cached = True
        note = f"float copy ({str(runtime.tensors['copy'].dtype).removeprefix('torch.')}) kept besides"
        runtime.bytes_note = "; ".join(filter(None, (runtime.bytes_note, note)))
    return runtime


def _runtime(weight: PackedWeight | Runtime, dtype: torch.dtype) -> Runtime:
    return weight if isinstance(weight, Runtime) else LAYOUTS["canonical"].make(weight, dtype)


def linear(x: torch.Tensor, weight: PackedWeight | Runtime, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ W.T + bias`` on packed codes.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16 (others take the reference), any strides.
        weight: prepared (fast) or canonical.
        bias: ``[out_features]`` of any float dtype, or ``None``.

    Returns:
        ``[..., out_features]``, contiguous, dtype of ``x``. Differentiable in ``x`` and ``bias``.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) is not torch.Tensor
        or x.is_meta
        or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
    ):
        return ops.call(x, _runtime(weight, x.dtype), bias)
    runtime = weight if weight.__class__ is Runtime else _runtime(weight, x.dtype)
    shape = x.shape
    if shape[-1] != runtime.in_features:
        where = f" of {runtime.name}" if runtime.name else ""
        raise KernelError(f"x has {shape[-1]} features, the weight{where} has {runtime.in_features}")
    x2 = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    key = (x2.shape[0], x.dtype)
    forced = dispatch.forced()
    backend = runtime.plan.get(key) if forced is None else None
    if backend is None:
        if not key[0]:
            return x.new_empty(*shape[:-1], runtime.out_features)
        row = dispatch.choose(dispatch.case_of(runtime, key[0], x.dtype, x.device.type), runtime.name)
        backend = dispatch.BACKENDS["wna16", row.backend]
        if forced is None:
            if len(runtime.plan) > 64:
                runtime.plan.clear()
            runtime.plan[key] = backend
    y = backend(x2, runtime, bias)
    return y if len(shape) == 2 else y.view(*shape[:-1], runtime.out_features)


def dequantize(weight: PackedWeight | Runtime, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix ``[out_features, in_features]`` of the codes, computed in float32 from the stored scales."""
    runtime = _runtime(weight, dtype)
    return LAYOUTS[runtime.layout].dequantize(runtime, dtype)


def embedding(ids: torch.Tensor, packed: PackedWeight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows ``ids`` of the matrix, unpacking only those: ``[...]`` to ``[..., in_features]`` (default: scale dtype)."""
    flat = ids.reshape(-1)
    codes = bitpack.unpack(packed.qweight[flat], packed.spec.bits, packed.in_features)
    per_tensor = packed.spec.group_size == 0
    scale = packed.scale if per_tensor else packed.scale[flat]
    zero = packed.zero_point if packed.zero_point is None or per_tensor else packed.zero_point[flat]
    rows = affine.decode(codes, scale, zero, packed.spec, torch.float32)
    return rows.to(dtype or packed.scale.dtype).reshape(*ids.shape, packed.in_features)


def explain(
    weight: Any, M: int = 1, dtype: torch.dtype | None = None, device: str | None = None,
    memory: Memory = "compact", activation: ActivationSpec | None = None,
) -> list[Choice]:
    """Every backend of the table for ``M`` rows: the one chosen, and for each other one why not.

    Args:
        weight: a :class:`Runtime` (its layout is given), a :class:`PackedWeight` (as :func:`prepare` sees it), or a
            packed layer, which knows the kind of its product.
        M: rows of ``x``.
        dtype: of the activations; default the one it was prepared for, float32 for a canonical weight.
        device: device type; default where the weight lies.
        memory: for a canonical weight, as in :func:`prepare`.
        activation: format of the activations: the rows of the integer product. A layer knows its own.
    """
    if hasattr(weight, "explain"):
        return weight.explain(M, dtype)
    device = device or weight.scale.device.type
    if isinstance(weight, Runtime):
        return dispatch.explain(dispatch.case_of(weight, M, dtype or weight.dtype, device, activation))
    return dispatch.explain(_prepare_case(weight, M, dtype or torch.float32, device, memory, activation))
