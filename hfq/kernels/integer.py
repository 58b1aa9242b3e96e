"""The integer product: quantized activations times packed weights, ``hfq::wnan``.

    runtime = kernels.prepare(PackedWeight(...), dtype=torch.float32, activation=ActivationSpec(8))
    y = linear_int(x, runtime, bias, ActivationSpec(8))

Plain inference calls the backend directly. Tracing without gradients sees the quantization as plain tensor operations
(so that a compiler fuses it) and ``hfq::wnan_codes`` on codes; with gradients it sees ``hfq::wnan`` on floats, whose
backward is that of straight-through rounding: ``dy W``, zero where a code was clamped. Scales count as constants.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from hfq.errors import KernelError
from hfq.formats import ActivationCodes, ActivationSpec, activation
from hfq.kernels import dispatch, ops, producers, reference
from hfq.kernels.packed import LAYOUTS, PackedWeight, Runtime

__all__ = ["linear_int", "product"]

Parameters = activation.Parameters
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_int(
    x: torch.Tensor | ActivationCodes, weight: PackedWeight | Runtime, bias: torch.Tensor | None = None,
    spec: ActivationSpec | None = None, params: Parameters | None = None, factor: torch.Tensor | None = None, *,
    before: Callable[[torch.Tensor], torch.Tensor] | None = None, dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``Q(x) @ W.T + bias`` with exact sums of integers.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16 (others take the reference), or codes of a producer.
        weight: prepared with the same ``activation`` (fast) or canonical.
        bias: ``[out_features]`` or ``None``.
        spec: how ``x`` is quantized; given by ``x`` itself if it is codes.
        params: ``(scale, zero_point)`` of a static format.
        factor: of a format with a factor.
        before: a function of single tokens that is applied to ``x`` first (online transforms).
        dtype: of the result for codes; default float32.

    Returns:
        ``[..., out_features]``, contiguous, dtype of ``x``. Differentiable in ``x`` and ``bias``.
    """
    runtime = weight if isinstance(weight, Runtime) else LAYOUTS["canonical"].make(weight, torch.float32)
    if isinstance(x, ActivationCodes):
        return product(x, runtime, bias, dtype or torch.float32)
    if spec is None:
        raise KernelError("an integer product needs the activation format, or codes")
    compiling = torch.compiler.is_compiling()
    grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    traced = grad or compiling or x.is_meta or type(x) is not torch.Tensor
    if traced and before is not None:
        x, before = before(x), None
    shape = x.shape
    if shape[-1] != runtime.in_features:
        where = f" of {runtime.name}" if runtime.name else ""
        raise KernelError(f"x has {shape[-1]} features, the weight{where} has {runtime.in_features}")
    if traced:
        y = _traced(x, runtime, spec, params, factor, codes=compiling and not grad and x.device.type == "cpu")
        return y if bias is None else y + bias.to(y.dtype)
    x2 = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    if not x2.shape[0]:
        return x.new_empty(*shape[:-1], runtime.out_features)
    mark = b"" if before is None else getattr(before, "signature", lambda: None)()
    if mark is not None and spec.dynamic and not spec.factor and not x.is_inference():
        y = _run_shared(x, x2, runtime, bias, spec, before, mark)
    else:
        y = _run(x2, runtime, bias, spec, params, factor, before)
    return y if len(shape) == 2 else y.view(*shape[:-1], runtime.out_features)


def _run(
    x: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None, spec: ActivationSpec, params: Parameters | None,
    factor: torch.Tensor | None, before: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Quantize and multiply ``x`` ``[M, in_features]`` with the backend that the table chooses."""
    name = _backend(runtime, x.shape[0], x.dtype, x.device.type, spec)
    floats = dispatch.BACKENDS.get(("wnan", name))
    if floats is not None:
        return floats(x if before is None else before(x), runtime, bias, spec, params, factor)
    if before is None:
        codes = producers.quantize_rows(x, spec, params, factor)
    else:
        codes = producers.hadamard_quant(x, before, spec, params, factor)
    return dispatch.BACKENDS["wnan_codes", name](codes, runtime, bias, x.dtype)


_local = threading.local()


def _run_shared(
    x: torch.Tensor, x2: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None, spec: ActivationSpec,
    before: Callable[[torch.Tensor], torch.Tensor] | None, mark: bytes,
) -> torch.Tensor:
    """:func:`_run`; codes of the tensor that was multiplied last are taken again (query, key and value read one).

    ``mark`` says what ``before`` computes: functions of one mark are the same.
    """
    name = _backend(runtime, x2.shape[0], x.dtype, x.device.type, spec)
    if ("wnan_codes", name) not in dispatch.BACKENDS:
        return _run(x2, runtime, bias, spec, None, None, before)
    kept = getattr(_local, "kept", None)
    if kept is not None and kept[0]() is x and kept[1:4] == (x._version, spec, mark):
        codes = kept[4]
    else:
        codes = (producers.quantize_rows(x2, spec) if before is None
                 else producers.hadamard_quant(x2, before, spec))  # fmt: skip
        # They live as long as their tensor. Writing to it, by any view, changes its version.
        _local.kept = (weakref.ref(x, _forget), x._version, spec, mark, codes)
    return dispatch.BACKENDS["wnan_codes", name](codes, runtime, bias, x.dtype)


def _forget(reference: Any) -> None:
    kept = getattr(_local, "kept", None)
    if kept is not None and kept[0] is reference:
        _local.kept = None


def _backend(runtime: Runtime, M: int, dtype: torch.dtype, device: str, spec: ActivationSpec) -> str:
    forced = dispatch.forced()
    key = (M, dtype, spec)
    name = runtime.plan.get(key) if forced is None else None
    if name is None:
        name = dispatch.choose(dispatch.case_of(runtime, M, dtype, device, spec), runtime.name).backend
        if forced is None:
            if len(runtime.plan) > 64:
                runtime.plan.clear()
            runtime.plan[key] = name
    return name


def product(
    x: ActivationCodes, runtime: Runtime, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The product of codes ``[..., in_features]`` that a producer made: ``[..., out_features]`` of ``dtype``.

    Raises:
        KernelError: the backend that serves the weight makes its codes itself.
    """
    shape = x.codes.shape
    if len(shape) != 2:
        tokens = x.scale.dim() == len(shape)
        scale, zero = (t if t is None or not tokens else t.reshape(-1, t.shape[-1]) for t in (x.scale, x.zero_point))
        flat = ActivationCodes(x.codes.reshape(-1, shape[-1]), scale, zero, x.spec)  # type: ignore[arg-type]
        return product(flat, runtime, bias, dtype).view(*shape[:-1], runtime.out_features)
    if not shape[0]:
        return x.scale.new_empty(0, runtime.out_features, dtype=dtype)
    name = _backend(runtime, shape[0], dtype, x.codes.device.type, x.spec)
    if ("wnan_codes", name) not in dispatch.BACKENDS:
        raise KernelError(f"{runtime.name or 'the weight'} is served by {name!r}, which makes its codes itself")
    return dispatch.BACKENDS["wnan_codes", name](x, runtime, bias, dtype)


@dispatch.backend("wnan_codes", "reference")
def _reference(x: ActivationCodes, runtime: Runtime, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return reference.linear_int(x, runtime.packed(), bias, dtype)


@dispatch.backend("wnan_codes", "dequant")
def _dequant(x: ActivationCodes, runtime: Runtime, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The dequantized numbers in a float32 product: any layout, device and grouping."""
    weight = LAYOUTS[runtime.layout].dequantize(runtime, torch.float32)
    y = torch.nn.functional.linear(activation.dequantize(x), weight)
    return (y if bias is None else y.add_(bias)).to(dtype)


# The operators


def _weight(runtime: Runtime) -> tuple[list[torch.Tensor], list[str], str, list[int]]:
    names = list(runtime.tensors)
    return [runtime.tensors[name] for name in names], names, runtime.layout, ops.format_of(runtime)


def _activation(spec: ActivationSpec) -> list[int]:
    return [spec.bits, spec.symmetric, spec.granularity == "tensor", spec.group_size, spec.dynamic, spec.factor]


def _spec(numbers: list[int]) -> ActivationSpec:
    bits, symmetric, tensor, group, dynamic, factor = numbers
    kind = "tensor" if tensor else "token"
    factors = 2 if factor == 2 else bool(factor)
    return ActivationSpec(bits, bool(symmetric), kind, group, bool(dynamic), factors)  # type: ignore[arg-type]


def _given(spec: ActivationSpec, tensors: list[torch.Tensor]) -> tuple[Parameters | None, torch.Tensor | None]:
    if spec.factor:
        return None, tensors[0]
    if spec.dynamic:
        return None, None
    return (tensors[0], tensors[1] if len(tensors) > 1 else None), None


def _traced(
    x: torch.Tensor, runtime: Runtime, spec: ActivationSpec, params: Parameters | None, factor: torch.Tensor | None, *,
    codes: bool,
) -> torch.Tensor:
    weight = _weight(runtime)
    if codes:
        q = activation.quantize(x, spec, params, factor)
        dtype = _DTYPES.index(x.dtype)
        return torch.ops.hfq.wnan_codes(q.codes, q.scale, q.zero_point, *weight, _activation(spec), dtype)
    given = [factor] if factor is not None else [t for t in params or () if t is not None]
    return torch.ops.hfq.wnan(x, *weight, _activation(spec), given)


def _wnan(
    x: torch.Tensor, weight: list[torch.Tensor], names: list[str], layout: str, format: list[int],
    activation: list[int], params: list[torch.Tensor],
) -> torch.Tensor:
    spec, runtime = _spec(activation), ops.runtime_of(weight, names, layout, format)
    flat = x.reshape(-1, x.shape[-1])
    if not flat.shape[0]:
        return x.new_empty(*x.shape[:-1], format[3])
    return _run(flat, runtime, None, spec, *_given(spec, params)).view(*x.shape[:-1], format[3])


def _wnan_codes(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, weight: list[torch.Tensor],
    names: list[str], layout: str, format: list[int], activation: list[int], dtype: int,
) -> torch.Tensor:
    x = ActivationCodes(codes, scale, zero_point, _spec(activation))
    return product(x, ops.runtime_of(weight, names, layout, format), None, _DTYPES[dtype])


def _wnan_dx(
    dy: torch.Tensor, x: torch.Tensor, weight: list[torch.Tensor], names: list[str], layout: str, format: list[int],
    activation: list[int], params: list[torch.Tensor],
) -> torch.Tensor:
    spec = _spec(activation)
    dx = torch.matmul(dy, LAYOUTS[layout].dequantize(ops.runtime_of(weight, names, layout, format), dy.dtype))
    if spec.dynamic and not spec.factor:
        return dx  # a range that is found in x clamps nothing
    return dx * _inside(x, spec, *_given(spec, params)).to(dx.dtype)


def _inside(
    x: torch.Tensor, spec: ActivationSpec, params: Parameters | None, factor: torch.Tensor | None
) -> torch.Tensor:
    """Where the code of ``x`` is not clamped. Only formats without groups clamp, or those with a factor."""
    scale, zero = params if params is not None else activation.row_parameters(x, spec, factor)
    scale, zero = (t if t is None or spec.group_size == -1 else t.repeat_interleave(spec.group_size, -1)[
        ..., : x.shape[-1]] for t in (scale, zero))  # fmt: skip
    codes = (x.to(scale.dtype) * (1 / scale)).round_()
    codes = codes if zero is None else codes + zero.to(codes.dtype)
    return (codes >= spec.min_code) & (codes <= spec.max_code)


def _fake(x: torch.Tensor, weight: Any, names: Any, layout: Any, format: list[int], *_: Any) -> torch.Tensor:
    torch._check(x.shape[-1] == format[2], lambda: f"x has {x.shape[-1]} features, the weight {format[2]}")
    return x.new_empty(*x.shape[:-1], format[3])


def _fake_codes(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: Any, weight: Any, names: Any, layout: Any,
    format: list[int], activation: Any, dtype: int,
) -> torch.Tensor:
    torch._check(codes.shape[-1] == format[2], lambda: f"x has {codes.shape[-1]} features, the weight {format[2]}")
    return codes.new_empty(*codes.shape[:-1], format[3], dtype=_DTYPES[dtype])


def _fake_dx(
    dy: torch.Tensor, x: torch.Tensor, weight: Any, names: Any, layout: Any, format: list[int], *_: Any
) -> torch.Tensor:
    return dy.new_empty(*dy.shape[:-1], format[2])


def _setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, weight, names, layout, fmt, spec, params = inputs
    ctx.save_for_backward(x, *weight, *params)
    ctx.count, ctx.rest = len(weight), (names, layout, fmt, spec)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple:
    x, *tensors = ctx.saved_tensors
    weight, params = tensors[: ctx.count], tensors[ctx.count :]
    dx = torch.ops.hfq.wnan_dx(dy, x, weight, *ctx.rest, params)
    return dx, [None] * len(weight), None, None, None, None, [None] * len(params)


_LIBRARY = torch.library.Library("hfq", "FRAGMENT")
_SPEC = f"{ops.WEIGHT}, int[] activation"
_LIBRARY.define(f"wnan(Tensor x, {_SPEC}, Tensor[] params) -> Tensor")
_LIBRARY.define(f"wnan_dx(Tensor dy, Tensor x, {_SPEC}, Tensor[] params) -> Tensor")
_LIBRARY.define(f"wnan_codes(Tensor codes, Tensor scale, Tensor? zero_point, {_SPEC}, int dtype) -> Tensor")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("wnan", _wnan, _key)
    _LIBRARY.impl("wnan_dx", _wnan_dx, _key)
    _LIBRARY.impl("wnan_codes", _wnan_codes, _key)
torch.library.register_fake("hfq::wnan", _fake, lib=_LIBRARY)
torch.library.register_fake("hfq::wnan_dx", _fake_dx, lib=_LIBRARY)
torch.library.register_fake("hfq::wnan_codes", _fake_codes, lib=_LIBRARY)
torch.library.register_autograd("hfq::wnan", _backward, setup_context=_setup, lib=_LIBRARY)
