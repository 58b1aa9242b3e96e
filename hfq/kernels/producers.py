"""What makes quantized activations: plain functions that do one thing before, and quantize.

Each has its definition (the float operation followed by :func:`hfq.formats.activation.quantize`, in ``reference_...``
form by ``fused=False``) and, on a CPU, a form that goes over the tokens in blocks that stay in cache, so that the float
result never reaches memory. Codes are equal to the definition's except where a sum was taken in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hfq.errors import KernelError
from hfq.formats import ActivationCodes, ActivationSpec, activation
from hfq.kernels.workspace import scratch

__all__ = ["act_quant", "cross_quant", "hadamard_quant", "norm_quant", "quantize_rows"]

# Elements of x that are worked on at once: with their float32 form they stay in the second-level cache.
CHUNK = 1 << 16

Apply = Callable[[torch.Tensor], torch.Tensor]
Parameters = activation.Parameters

# Kernels of a device type: ``(kind, x, spec, params, factor, **what comes before) -> codes``; None where they cannot.
DEVICES: dict[str, Callable[..., ActivationCodes | None]] = {}


def _on_device(
    kind: str, fused: bool | None, x: torch.Tensor, spec: ActivationSpec, params: Parameters | None = None,
    factor: torch.Tensor | None = None, **before: Any,
) -> ActivationCodes | None:
    kernel = DEVICES.get(x.device.type)
    if kernel is None or fused is False or torch.compiler.is_compiling():
        return None
    return kernel(kind, x, spec, params, factor, **before)


def quantize_rows(
    x: torch.Tensor, spec: ActivationSpec, params: Parameters | None = None, factor: torch.Tensor | None = None, *,
    multiply: torch.Tensor | None = None, add: torch.Tensor | None = None, fused: bool | None = None,
) -> ActivationCodes:
    """Codes of ``x * multiply + add``: ``x`` ``[M, K]`` of any float dtype, vectors ``[K]``.

    Args:
        params: of a static format.
        factor: of a format with a factor.
        fused: go over blocks of tokens; default where that is faster.
    """
    made = _on_device("rows", fused, x, spec, params, factor, multiply=multiply, add=add)
    if made is not None:
        return made
    if multiply is None and add is None:
        return _rows(x, None, spec, params, factor, fused)

    def apply(block: torch.Tensor) -> torch.Tensor:
        block = block.to(torch.float32) if block.dtype != torch.float64 else block
        block = block if multiply is None else block * multiply.to(block.dtype)
        return block if add is None else block + add.to(block.dtype)

    return _rows(x, apply, spec, params, factor, fused)


def hadamard_quant(
    x: torch.Tensor, transform: Apply, spec: ActivationSpec, params: Parameters | None = None,
    factor: torch.Tensor | None = None, *, fused: bool | None = None,
) -> ActivationCodes:
    """Codes of ``transform(x)``: any function of single tokens ``[M, K]``, such as an online Hadamard transform."""
    made = _on_device("hadamard", fused, x, spec, params, factor, transform=transform)
    if made is not None:
        return made
    return _rows(x, transform, spec, params, factor, fused)


def norm_quant(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, spec: ActivationSpec,
    params: Parameters | None = None, *, mean: bool, scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None, fused: bool | None = None,
) -> ActivationCodes:
    """Codes of the normalised ``x`` ``[M, K]``: LayerNorm (``mean=True``) or RMSNorm, then ``(1 + scale) * y + shift``.

    Args:
        weight, bias: gain and bias of the norm, ``[K]``.
        scale, shift: modulation of an adaptive norm, ``[K]``; or ``[images, K]``, where the rows of ``x`` are those of
            so many images, one after the other and equally many each.
    """
    if any(t is not None and t.dim() == 2 for t in (scale, shift)):
        return _by_images(lambda part, one, other: norm_quant(part, weight, bias, eps, spec, params, mean=mean,
                                                              scale=one, shift=other, fused=fused), x, scale, shift)
    made = _on_device("norm", fused, x, spec, params, weight=weight, bias=bias, eps=eps, mean=mean, scale=scale,
                      shift=shift)
    if made is not None:
        return made

    def apply(block: torch.Tensor) -> torch.Tensor:
        y = block.to(torch.float32) if block.dtype != torch.float64 else block
        gain = None if weight is None else weight.to(y.dtype)
        if mean:
            y = torch.nn.functional.layer_norm(y, y.shape[-1:], gain, None if bias is None else bias.to(y.dtype), eps)
        else:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
            y = y if gain is None else y * gain
            y = y if bias is None else y + bias.to(y.dtype)
        y = y if scale is None else y * (1 + scale.to(y.dtype))
        return y if shift is None else y + shift.to(y.dtype)

    return _rows(x, apply, spec, params, None, fused)


def _by_images(
    make: Callable[..., ActivationCodes], x: torch.Tensor, *vectors: torch.Tensor | None
) -> ActivationCodes:
    """Codes of ``x`` ``[images * tokens, K]``, each image with vectors of its own (``[images, K]``)."""
    images = next(t.shape[0] for t in vectors if t is not None)
    if x.shape[0] % images:
        raise KernelError(f"{x.shape[0]} rows are no whole number for each of {images} images")
    parts = zip(x.chunk(images), *([None] * images if t is None else t for t in vectors), strict=True)
    made = [make(*part) for part in parts]
    codes, first = torch.cat([one.codes for one in made]), made[0]
    if first.spec.granularity == "tensor":
        return ActivationCodes(codes, first.scale, first.zero_point, first.spec)
    zero = None if first.zero_point is None else torch.cat([one.zero_point for one in made])
    return ActivationCodes(codes, torch.cat([one.scale for one in made]), zero, first.spec)


def act_quant(
    x: torch.Tensor, function: Apply, spec: ActivationSpec, params: Parameters | None = None, *,
    gate: torch.Tensor | None = None, fused: bool | None = None,
) -> ActivationCodes:
    """Codes of ``function(x)``, or of ``function(gate) * x`` (SwiGLU and its kin): both ``[M, K]``."""
    made = _on_device("act", fused, x, spec, params, function=function, gate=gate)
    if made is not None:
        return made
    if gate is None:
        return _rows(x, function, spec, params, None, fused)
    width = x.shape[-1]
    both = torch.cat([gate, x], -1) if not _stacked(gate, x) else gate.as_strided(
        (x.shape[0], 2 * width), (gate.stride(0), 1), gate.storage_offset())

    def apply(block: torch.Tensor) -> torch.Tensor:
        return function(block[:, :width]) * block[:, width:]

    return _rows(both, apply, spec, params, None, fused, width)


def _stacked(gate: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether both are the halves of one tensor, as a merged projection gives them."""
    same = gate.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and gate.stride() == x.stride()
    return same and x.stride(-1) == 1 and x.storage_offset() == gate.storage_offset() + gate.shape[-1]


def cross_quant(
    x: torch.Tensor, column: torch.Tensor, spec: ActivationSpec, *, alpha: float | None = None,
    fused: bool | None = None,
) -> ActivationCodes:
    """Codes of ``x / column`` with a step for each token, ``[M, K]``: rows and columns both have a say in the step.

    Args:
        column: positive ``[K]``; its counterpart is in the weight.
        alpha: with it, the token's step is ``max|x| ** alpha / max_code`` of the tokens before the division, and codes
            beyond the grid are clamped; without, ``max|x / column| / max_code``, which never clamps. Symmetric only.
    """
    inverse = 1 / column.to(torch.float32)
    if alpha is None:
        return quantize_rows(x, spec, multiply=inverse, fused=fused)
    made = _on_device("cross", fused, x, spec, multiply=inverse, alpha=alpha)
    if made is not None:
        return made
    top = x.detach().abs().amax(-1, keepdim=True).to(torch.float32).clamp(min=1e-5)
    scale = top.pow(alpha) / spec.max_code
    codes = (x.to(torch.float32) * inverse * (1 / scale)).round_().clamp_(spec.min_code, spec.max_code)
    return ActivationCodes(codes.to(spec.code_dtype), scale, None, spec)


def _rows(
    x: torch.Tensor, apply: Apply | None, spec: ActivationSpec, params: Parameters | None,
    factor: torch.Tensor | None, fused: bool | None, width: int | None = None,
) -> ActivationCodes:
    whole = spec.dynamic and spec.granularity == "tensor"  # its range is known after the last token only
    if fused is None:
        fused = x.device.type == "cpu" and x.dim() == 2 and x.numel() > CHUNK
    if not fused or whole or not x.numel():
        x = x if apply is None else apply(x)
        plain = spec.dynamic and not spec.factor and spec.granularity == "token" and spec.group_size == -1
        if plain and x.dtype == torch.float32 and x.numel() and not torch.compiler.is_compiling():
            return _tokens(x.detach(), spec)
        return activation.quantize(x, spec, params, factor)
    with torch.no_grad():
        return _by_blocks(x, apply, spec, params, factor, x.shape[-1] if width is None else width)


def _tokens(x: torch.Tensor, spec: ActivationSpec) -> ActivationCodes:
    """:func:`hfq.formats.activation.quantize` of tokens, with the least number of operations: for small ``x``."""
    with torch.no_grad():
        if spec.symmetric:
            scale = x.abs().amax(-1, keepdim=True).clamp_(min=activation.SMALLEST_RANGE).div_(spec.max_code)
            return ActivationCodes((x * scale.reciprocal()).round_().to(torch.int8), scale, None, spec)
        low = x.amin(-1, keepdim=True).clamp_(max=0)
        scale = x.amax(-1, keepdim=True).clamp_(min=activation.SMALLEST_RANGE).sub_(low).div_(spec.max_code)
        inverse = scale.reciprocal()
        zero = low.neg_().mul_(inverse).round_().clamp_(max=spec.max_code)
        codes = (x * inverse).round_().add_(zero).clamp_(max=spec.max_code)
        return ActivationCodes(codes.to(torch.uint8), scale, zero, spec)


def _by_blocks(
    x: torch.Tensor, apply: Apply | None, spec: ActivationSpec, params: Parameters | None,
    factor: torch.Tensor | None, width: int,
) -> ActivationCodes:
    rows, groups = x.shape[0], spec.groups(width)
    dtype = torch.promote_types(x.dtype, torch.float32)
    codes = torch.empty(rows, width, dtype=spec.code_dtype, device=x.device)
    stored = params is not None
    scale = torch.empty(rows, groups, dtype=dtype, device=x.device)
    zero = None if spec.symmetric else torch.empty_like(scale)
    step = max(CHUNK // x.shape[-1], 1)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        block = x[part] if apply is None else apply(x[part])
        block = block if block.dtype == dtype else block.to(dtype)
        if stored or spec.group_size != -1 or spec.factor:
            done = activation.quantize(block, spec, params, factor)
            codes[part] = done.codes
            if not stored:
                scale[part] = done.scale
                if zero is not None:
                    zero[part] = done.zero_point
            continue
        work = scratch("quantize", tuple(block.shape), dtype)
        s = scale[part]
        if zero is None:
            # No clamp: the largest element, times the reciprocal of its scale, rounds to the last code.
            torch.amax(torch.abs(block, out=work), -1, keepdim=True, out=s)
            s.clamp_(min=activation.SMALLEST_RANGE).div_(spec.max_code)
            codes[part] = torch.mul(block, s.reciprocal(), out=work).round_()
            continue
        low = block.amin(-1, keepdim=True).clamp_(max=0)
        torch.amax(block, -1, keepdim=True, out=s)
        s.clamp_(min=activation.SMALLEST_RANGE).sub_(low).div_(spec.max_code)
        inverse = s.reciprocal()
        zero[part] = low.neg_().mul_(inverse).round_().clamp_(max=spec.max_code)
        codes[part] = torch.mul(block, inverse, out=work).round_().add_(zero[part]).clamp_(max=spec.max_code)
    if stored:
        one, other = params  # type: ignore[misc]
        return ActivationCodes(codes, one.to(dtype), None if other is None else other.to(dtype), spec)
    return ActivationCodes(codes, scale, zero, spec)
