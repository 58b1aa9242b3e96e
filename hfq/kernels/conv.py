"""The convolution of packed weights, ``hfq::qconv2d``: weights of codes, inputs of floats or quantized to codes.

    geometry = Geometry(64, 128, (3, 3), stride=(2, 2), pads=(1, 1, 1, 1))
    operand = prepare(PackedWeight(...), geometry, dtype=torch.float32, activation=ActivationSpec(8, ...))
    y = conv2d(x, [operand], bias, ActivationSpec(8, ...), params)               # x [B, C, H, W]

A weight is a matrix ``[out_channels, in_channels / groups * kh * kw]``, columns ordered channel, row, column as in the
float weight. One scale serves all inputs (``granularity="tensor"``): a scale for each position could not be taken out
of a sum over several positions. Positions outside the image have the code of zero, so that the formula
``s_x s_w (sum qx qw - z_x sum qw) + b`` holds at every position. Several operands over one input are convolved with
sums of their own, and scaled before they are added (coarse and fine parts of one weight).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.nn import functional as F

from hfq.errors import KernelError
from hfq.formats import ActivationCodes, ActivationSpec, activation
from hfq.kernels import dispatch, integer, ops, reference
from hfq.kernels.dispatch import ANY_BITS, FLOATS, Case, Row
from hfq.kernels.geometry import Geometry
from hfq.kernels.isa import float_compute, isa
from hfq.kernels.packed import LAYOUTS, PackedWeight, Runtime

__all__ = ["Geometry", "Operand", "case_of", "conv2d", "explain", "prepare", "quantize_input"]

Parameters = activation.Parameters
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class Operand:
    """A weight in the form of a backend, and where it lies over the input."""

    runtime: Runtime
    geometry: Geometry


def case_of(
    weight: PackedWeight | Runtime, geometry: Geometry, M: int, dtype: torch.dtype, device: str, cached: bool,
    spec: ActivationSpec | None,
) -> Case:
    """What the dispatch decides by, for ``M`` output positions; a weight without a runtime form has no layout yet."""
    zero = weight.zero_point
    whole = zero is None or (zero.dtype == torch.uint8 and (weight.spec.bits < 8 or _all(zero, 128)))
    return Case(
        "qconv2d", device, dtype, weight.spec.bits, M, weight.out_features, weight.in_features,
        weight.spec.group_length(weight.in_features), weight.layout if isinstance(weight, Runtime) else None, cached,
        isa(), activation=spec, whole_zeros=whole, geometry=geometry,
    )


def _all(zero: torch.Tensor, value: int) -> bool:
    return not zero.is_meta and bool((zero == value).all())


def check_activation(spec: ActivationSpec | None) -> None:
    """Raise :class:`KernelError` for a grid that a convolution cannot have."""
    if spec is not None and spec.granularity != "tensor":
        raise KernelError("the inputs of a convolution share one scale: ActivationSpec(..., granularity='tensor')")


def prepare(
    packed: PackedWeight, geometry: Geometry, *, dtype: torch.dtype, memory: Literal["compact", "cached"] = "compact",
    activation: ActivationSpec | None = None,
) -> Runtime:
    """Make the runtime form of ``packed`` for the device where it lies.

    Args:
        packed: the canonical form, ``[out_channels, in_channels / groups * kh * kw]``.
        dtype: dtype of the inputs that will come.
        memory: as in :func:`hfq.kernels.prepare`; the float copy is for weights whose inputs are floats.
        activation: the inputs will be quantized so.

    Raises:
        CheckpointError: the tensors do not have the shapes that the spec asks for.
        KernelError: a forced backend cannot serve this weight, or the activation format is none for a convolution.
    """
    check_activation(activation)
    packed.check()
    if packed.in_features != geometry.columns or packed.out_features != geometry.out_channels:
        found, want = (packed.out_features, packed.in_features), (geometry.out_channels, geometry.columns)
        raise KernelError(f"{packed.name or 'the weight'} is {found}; the convolution needs {want}")
    if packed.qweight.is_meta or not packed.qweight.numel():
        return LAYOUTS["canonical"].make(packed, dtype)
    cached = memory == "cached"
    case = case_of(packed, geometry, 1, dtype, packed.qweight.device.type, cached, activation)
    row = dispatch.choose(case, packed.name)
    make = MAKERS.get(row.layout)
    runtime = LAYOUTS["canonical"].make(packed, dtype) if make is None else make(packed, geometry, dtype, activation)
    if cached and activation is None:
        runtime.tensors["copy"] = reference.dequantize(packed, dtype if dtype in FLOATS else torch.float32)
        runtime.cached, runtime.bytes_note = True, "float copy kept besides"
    return runtime


# Layouts that depend on the geometry: ``(packed, geometry, dtype, activation) -> Runtime``, by name.
MAKERS: dict[str, Any] = {}


def conv2d(
    x: torch.Tensor, operands: Sequence[Operand], bias: torch.Tensor | None = None,
    spec: ActivationSpec | None = None, params: Parameters | None = None,
) -> torch.Tensor:
    """The sum of the convolutions of ``x`` ``[B, C, H, W]`` with every operand, and ``bias`` ``[out_channels]``.

    Args:
        x: float32, bfloat16 or float16 (others take the reference), any strides.
        spec: how ``x`` is quantized; default not at all.
        params: ``(scale, zero_point)`` of a static format.

    Returns:
        ``[B, out_channels, H', W']`` of the dtype of ``x``; channels last where the backend computes so.
        Differentiable in ``x`` and ``bias``.

    Raises:
        KernelError: ``x`` does not have the channels of the weight, or is smaller than the kernel.
    """
    check_activation(spec)
    geometry, name = operands[0].geometry, operands[0].runtime.name
    shape = geometry.output(x.shape, name)
    grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if grad or torch.compiler.is_compiling() or x.is_meta or type(x) is not torch.Tensor:
        y = torch.ops.hfq.qconv2d(x, *_flatten(operands), _activation(spec), [t for t in params or () if t is not None])
        return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)
    if not x.numel() or 0 in shape:
        return x.new_empty(shape)
    return run(x, operands, bias, spec, params)


def run(
    x: torch.Tensor, operands: Sequence[Operand], bias: torch.Tensor | None, spec: ActivationSpec | None,
    params: Parameters | None,
) -> torch.Tensor:
    """:func:`conv2d` by the backends that the table chooses."""
    codes = None if spec is None else quantize_input(x, spec, params)
    names = [_backend(one, x, spec) for one in operands]
    fused = FUSED.get(names[0])
    if codes is not None and len(operands) == 2 and fused is not None and names[0] == names[1]:
        return fused(codes, operands, bias, x.dtype)
    y = None
    for one, backend in zip(operands, names, strict=True):
        own = bias if y is None else None  # once, however many parts there are
        if codes is None:
            part = dispatch.BACKENDS["qconv2d", backend](x, one, own)
        else:
            part = dispatch.BACKENDS["qconv2d_codes", backend](codes, one, own, x.dtype)
        y = part if y is None else y.add_(part)
    assert y is not None
    return y


# Backends that convolve two operands over one input in one pass: ``(codes, operands, bias, dtype) -> y``.
FUSED: dict[str, Any] = {}


def _backend(one: Operand, x: torch.Tensor, spec: ActivationSpec | None) -> str:
    runtime, forced = one.runtime, dispatch.forced()
    key = (tuple(x.shape), x.dtype, spec)
    name = runtime.plan.get(key) if forced is None else None
    if name is None:
        height, width = one.geometry.output(x.shape)[2:]
        case = case_of(runtime, one.geometry, x.shape[0] * height * width, x.dtype, x.device.type, runtime.cached, spec)
        name = dispatch.choose(case, runtime.name).backend
        if forced is None:
            if len(runtime.plan) > 64:
                runtime.plan.clear()
            runtime.plan[key] = name
    return name


def quantize_input(x: torch.Tensor, spec: ActivationSpec, params: Parameters | None = None) -> ActivationCodes:
    """Codes of ``x`` ``[B, C, H, W]``, channels last in memory; one scale and zero point ``[1]``."""
    with torch.no_grad():
        if params is None:
            params = activation.row_parameters(x, spec)
        if x.device.type != "cpu" or x.dtype == torch.float64:
            return activation.quantize(x.contiguous(memory_format=torch.channels_last), spec, params)
        scale, zero = params[0].float(), None if params[1] is None else params[1].float()
        x = x.contiguous(memory_format=torch.channels_last)
        codes = torch.empty_like(x, dtype=spec.code_dtype, memory_format=torch.channels_last)
        source, target = x.permute(0, 2, 3, 1).reshape(-1), codes.permute(0, 2, 3, 1).reshape(-1)
        inverse, shift = 1 / scale, zero
        for start in range(0, source.numel(), _CHUNK):  # in parts that stay in cache
            part = source[start : start + _CHUNK] * inverse
            part.round_()
            if shift is not None:
                part.add_(shift)
            target[start : start + _CHUNK] = part.clamp_(spec.min_code, spec.max_code)
        return ActivationCodes(codes, scale, zero, spec)


_CHUNK = 1 << 17


def explain(one: Operand, M: int, dtype: torch.dtype, spec: ActivationSpec | None) -> list[dispatch.Choice]:
    """Which backend serves ``M`` output positions, and why no other does."""
    runtime = one.runtime
    return dispatch.explain(case_of(runtime, one.geometry, M, dtype, runtime.scale.device.type, runtime.cached, spec))


# Backends of every device


@dispatch.backend("qconv2d", "reference")
def _reference(x: torch.Tensor, one: Operand, bias: torch.Tensor | None) -> torch.Tensor:
    return reference.conv2d(x, one.runtime.packed(), one.geometry, bias)


@dispatch.backend("qconv2d_codes", "reference")
def _reference_codes(x: ActivationCodes, one: Operand, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return reference.conv2d_int(x, one.runtime.packed(), one.geometry, bias, dtype)


@dispatch.backend("qconv2d", "copy")
def _copy(x: torch.Tensor, one: Operand, bias: torch.Tensor | None) -> torch.Tensor:
    weight = one.runtime.tensors["copy"].view(one.geometry.weight_shape)
    return _float(x.to(weight.dtype), weight, one.geometry, bias, x.dtype)


@dispatch.backend("qconv2d", "dequant")
def _dequant(x: torch.Tensor, one: Operand, bias: torch.Tensor | None) -> torch.Tensor:
    """Dequantize and convolve: any layout and device."""
    dtype = x.dtype if x.device.type != "cpu" else float_compute(isa())
    weight = LAYOUTS[one.runtime.layout].dequantize(one.runtime, dtype).view(one.geometry.weight_shape)
    return _float(x.to(dtype), weight, one.geometry, bias, x.dtype)


def _float(
    x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    x, padding = geometry.padded(x, 0)
    y = F.conv2d(x, weight, None, geometry.stride, padding, geometry.dilation, geometry.groups).to(dtype)
    return y if bias is None else y.add_(bias.to(dtype).view(-1, 1, 1))


@dispatch.backend("qconv2d_codes", "float_sums")
def _float_sums(x: ActivationCodes, one: Operand, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Codes, exact as floats, convolved with the dequantized weight: any layout, device and grouping of scales."""
    geometry = one.geometry
    weight = LAYOUTS[one.runtime.layout].dequantize(one.runtime, torch.float32).view(geometry.weight_shape)
    values = x.codes.float() if x.zero_point is None else x.codes.float() - x.zero_point
    y = _float(values, weight, geometry, None, torch.float32) * x.scale
    return (y if bias is None else y.add_(bias.float().view(-1, 1, 1))).to(dtype)


def _weights(case: Case) -> bool:
    return case.activation is None


def _inputs(case: Case) -> bool:
    return case.activation is not None


dispatch.add_rows([
    Row("qconv2d", "*", FLOATS, ANY_BITS, "*", lambda case: _weights(case) and case.cached, "copy",
        "no float copy is kept (memory='cached'), or the inputs are quantized"),
    Row("qconv2d", "*", FLOATS, ANY_BITS, "*", _weights, "dequant", "the inputs are quantized"),
    Row("qconv2d", "*", FLOATS, ANY_BITS, "*", _inputs, "float_sums", "the inputs are floats", slow=True),
    Row("qconv2d", "*", (), ANY_BITS, "*", lambda case: True, "reference", "serves every format", slow=True),
])


# The operator


def _activation(spec: ActivationSpec | None) -> list[int]:
    # Never empty: a list without elements would pass for one of tensors.
    return [0, 0, 0] if spec is None else [spec.bits, spec.symmetric, spec.dynamic]


def _spec(numbers: Sequence[int]) -> ActivationSpec | None:
    bits, symmetric, dynamic = numbers
    if not bits:
        return None
    return ActivationSpec(bits, bool(symmetric), "tensor", dynamic=bool(dynamic))


def _flatten(operands: Sequence[Operand]) -> tuple[list[torch.Tensor], list[str], list[str], list[int], list[int]]:
    """Tensors, their names, and per operand its layout, format and geometry; hidden forms as canonical ones."""
    tensors, names, layouts, formats, places = [], [], [], [], []
    for number, one in enumerate(operands):
        runtime = one.runtime
        if runtime.hidden:
            runtime = LAYOUTS["canonical"].make(runtime.packed(), runtime.dtype)
        for name, tensor in runtime.tensors.items():
            tensors.append(tensor)
            names.append(f"{number}.{name}")
        layouts.append(runtime.layout)
        formats += ops.format_of(runtime)
        places += one.geometry.to_list()
    return tensors, names, layouts, formats, places


def _unflatten(
    tensors: list[torch.Tensor], names: list[str], layouts: list[str], formats: list[int], places: list[int]
) -> list[Operand]:
    found = []
    size, width = len(formats) // len(layouts), len(places) // len(layouts)
    for number, layout in enumerate(layouts):
        own = [i for i, name in enumerate(names) if name.startswith(f"{number}.")]
        runtime = ops.runtime_of([tensors[i] for i in own], [names[i].partition(".")[2] for i in own], layout,
                                 formats[number * size : (number + 1) * size])
        geometry = Geometry.from_list(places[number * width : (number + 1) * width])
        found.append(Operand(replace(runtime, extra=revive(runtime, geometry)), geometry))
    return found


def revive(runtime: Runtime, geometry: Geometry) -> Any:
    """What a layout derives from the tensors of a runtime."""
    make = REVIVE.get(runtime.layout)
    return None if make is None else make(runtime, geometry)


REVIVE: dict[str, Any] = {}


def _params(tensors: list[torch.Tensor]) -> Parameters | None:
    return None if not tensors else (tensors[0], tensors[1] if len(tensors) > 1 else None)


def _qconv2d(
    x: torch.Tensor, weight: list[torch.Tensor], names: list[str], layouts: list[str], formats: list[int],
    geometry: list[int], activation: list[int], params: list[torch.Tensor],
) -> torch.Tensor:
    operands = _unflatten(weight, names, layouts, formats, geometry)
    shape = operands[0].geometry.output(x.shape)
    if not x.numel() or 0 in shape:
        return x.new_empty(shape)
    return run(x, operands, None, _spec(activation), _params(params)).contiguous()


def _qconv2d_dx(
    dy: torch.Tensor, x: torch.Tensor, weight: list[torch.Tensor], names: list[str], layouts: list[str],
    formats: list[int], geometry: list[int], activation: list[int], params: list[torch.Tensor],
) -> torch.Tensor:
    dx = torch.zeros(x.shape, dtype=dy.dtype, device=dy.device)
    for one in _unflatten(weight, names, layouts, formats, geometry):
        at = one.geometry
        matrix = LAYOUTS[one.runtime.layout].dequantize(one.runtime, dy.dtype).view(at.weight_shape)
        top, bottom, left, right = at.pads
        padded = [x.shape[0], x.shape[1], x.shape[2] + top + bottom, x.shape[3] + left + right]
        whole = torch.nn.grad.conv2d_input(padded, matrix, dy, at.stride, 0, at.dilation, at.groups)
        dx += F.pad(whole, (-left, -right, -top, -bottom))
    spec = _spec(activation)
    if spec is not None and not spec.dynamic:  # straight through the rounding, nothing where a code was clamped
        dx *= integer._inside(x, spec, _params(params), None).to(dx.dtype)
    return dx


def _fake(x: torch.Tensor, weight: Any, names: Any, layouts: Any, formats: Any, geometry: list[int],
          *_: Any) -> torch.Tensor:  # fmt: skip
    first = Geometry.from_list(geometry[: Geometry.LENGTH])
    return x.new_empty(first.output(x.shape))


def _fake_dx(dy: torch.Tensor, x: torch.Tensor, *_: Any) -> torch.Tensor:
    return dy.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, weight, *rest, params = inputs
    ctx.save_for_backward(x, *weight, *params)
    ctx.count, ctx.rest = len(weight), rest


def _backward(ctx: Any, dy: torch.Tensor) -> tuple:
    x, *tensors = ctx.saved_tensors
    weight, params = tensors[: ctx.count], tensors[ctx.count :]
    dx = torch.ops.hfq.qconv2d_dx(dy, x, weight, *ctx.rest, params)
    return dx, [None] * len(weight), None, None, None, None, None, [None] * len(params)


_LIBRARY = torch.library.Library("hfq", "FRAGMENT")
_WEIGHT = "Tensor[] weight, str[] names, str[] layouts, int[] formats, int[] geometry, int[] activation"
_LIBRARY.define(f"qconv2d(Tensor x, {_WEIGHT}, Tensor[] params) -> Tensor")
_LIBRARY.define(f"qconv2d_dx(Tensor dy, Tensor x, {_WEIGHT}, Tensor[] params) -> Tensor")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("qconv2d", _qconv2d, _key)
    _LIBRARY.impl("qconv2d_dx", _qconv2d_dx, _key)
torch.library.register_fake("hfq::qconv2d", _fake, lib=_LIBRARY)
torch.library.register_fake("hfq::qconv2d_dx", _fake_dx, lib=_LIBRARY)
torch.library.register_autograd("hfq::qconv2d", _backward, setup_context=_setup, lib=_LIBRARY)
