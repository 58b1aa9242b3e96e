"""Quantized activations for the integer products, in one kernel with what comes before: norm, activation, Hadamard.

Entry points: :func:`quantize_rows` (with :class:`Front` for what is fused), :func:`mix` (Hadamard, then codes or
floats). Nothing waits for the GPU; all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hfq.errors import KernelError
from hfq.formats.activation import ActivationCodes, ActivationSpec, Parameters, row_parameters
from hfq.kernels import hadamard

__all__ = ["Front", "ShiftedCodes", "constraint", "mix", "quantize_rows", "serve", "shift", "unit_sums"]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ACTS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
LONG, CHUNK = 8192, 4096  # rows above the first are read in parts of the second
ALIGN = 128  # rows of codes take a multiple of it: enough for every weight layout


@dataclass
class ShiftedCodes(ActivationCodes):
    """Activations as the integer products read them: still ``scale * (code - zero_point)``.

    Attributes:
        codes: int8 ``[M, K]``, unsigned ones less ``2**(bits - 1)``; columns of a buffer whose rows go on with zeros.
        scale: float32 ``[M, 1]``, or ``[1]`` for the whole tensor.
        zero_point: int32, like ``scale``, shifted as the codes are; ``None`` when symmetric.
        sums: int32 ``[M, units]`` of these codes, or ``None`` if they were not asked for.
    """

    sums: torch.Tensor | None = None


@dataclass
class Front:
    """What is computed before the codes, in this order. All vectors may be of any float dtype.

    Attributes:
        act, times: ``act(x)``, or ``act(x) * times`` with a second matrix of the shape of x.
        norm: "rms" or "layer", with ``gain`` (plus ``gain_offset``), ``centre`` (a bias) and ``eps``.
        mul, add: ``[K]``: ``v * mul + add``. With ``tokens`` rows to a batch index ``[B, K]``: ``v * (1 + mul) + add``.
        exponent: the symmetric scale of a row is ``max|v| ** exponent / steps`` with v before ``mul``; 1: after it.
    """

    act: Literal["none", "silu", "gelu", "gelu_tanh", "relu"] = "none"
    times: torch.Tensor | None = None
    norm: Literal["none", "rms", "layer"] = "none"
    gain: torch.Tensor | None = None
    gain_offset: float = 0.0
    centre: torch.Tensor | None = None
    eps: float = 1e-6
    mul: torch.Tensor | None = None
    add: torch.Tensor | None = None
    tokens: int = 0
    exponent: float = 1.0

    def __post_init__(self) -> None:
        if self.act not in _ACTS or self.norm not in ("none", "rms", "layer"):
            raise KernelError(f"act={self.act!r}, norm={self.norm!r}: {', '.join(_ACTS)}; none, rms, layer")
        if self.add is not None and self.mul is None:
            raise KernelError("add without mul: pass a vector of ones")
        if self.tokens and (self.mul is None or self.add is None):
            raise KernelError("modulation by batch needs mul and add")
        if self.exponent != 1.0 and (self.norm != "none" or self.tokens):
            raise KernelError("an exponent goes with no norm and one vector for all rows")

    @property
    def modulate(self) -> int:
        return 0 if self.mul is None else 2 if self.tokens else 3 if self.add is None else 1


def constraint(spec: ActivationSpec) -> str:
    """Why the kernels cannot make these codes; empty if they can."""
    if spec.group_size != -1:
        return f"activation group_size {spec.group_size}: one scale a token (-1) or for the tensor is needed"
    return ""


def _power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def _stored(x: torch.Tensor, spec: ActivationSpec, params: Parameters | None, factor: torch.Tensor | None,
            front: Front) -> Parameters | None:
    """Scale and zero point that do not depend on the row, as tensors on the device of x."""
    if spec.granularity == "token":
        return None
    if spec.dynamic:
        if front != Front():
            raise KernelError("one dynamic range for the tensor cannot be fused: compute the front first")
        params = row_parameters(x, spec, factor)
    if params is None:
        raise KernelError("a static activation format needs its stored scale and zero point")
    scale, zero = params
    return scale.float().reshape(1), None if zero is None else zero.float().reshape(1)


def _format_arguments(spec: ActivationSpec, static: bool, unit: int | None) -> dict[str, int | bool]:
    shift = 0 if spec.symmetric else 1 << (spec.bits - 1)
    return {
        "STATIC": static, "SYMMETRIC": spec.symmetric, "STEPS": spec.max_code, "SHIFT": shift, "UNIT": unit or 0,
        "SUMS": unit is not None, "FACTOR": spec.factor,
    }


def _outputs(x: torch.Tensor, spec: ActivationSpec, stored: Parameters | None, unit: int | None) -> ShiftedCodes:
    """Buffers of the result for x ``[M, K]``. A stored grid is the result's own, shifted."""
    (m, k), device = x.shape, x.device
    padded = padded_of(k)
    if unit and (unit & (unit - 1) or padded % unit):
        raise KernelError(f"sums over {unit} columns: a power of two that divides {padded} is needed")
    codes = torch.empty(m, padded, dtype=torch.int8, device=device)[:, :k]
    sums = None if unit is None else torch.empty(m, padded // unit if unit else 1, dtype=torch.int32, device=device)
    if stored is not None:
        zero = None if stored[1] is None else stored[1].to(torch.int32) - (1 << (spec.bits - 1))
        return ShiftedCodes(codes, stored[0], zero, spec, sums)
    scale = torch.empty(m, 1, dtype=torch.float32, device=device)
    zero = None if spec.symmetric else torch.empty(m, 1, dtype=torch.int32, device=device)
    return ShiftedCodes(codes, scale, zero, spec, sums)


def padded_of(features: int) -> int:
    """Bytes of a row of codes."""
    return -(-features // ALIGN) * ALIGN


def shift(x: ActivationCodes) -> ShiftedCodes:
    """Codes that something else made ``[M, K]``, as the kernels read them; without sums."""
    if isinstance(x, ShiftedCodes):
        return x
    amount = 0 if x.codes.dtype == torch.int8 else 1 << (x.spec.bits - 1)
    codes = torch.empty(x.codes.shape[0], padded_of(x.codes.shape[1]), dtype=torch.int8, device=x.codes.device)
    codes[:, x.codes.shape[1] :] = 0
    codes = codes[:, : x.codes.shape[1]]
    codes.copy_(x.codes if not amount else x.codes.to(torch.int16) - amount)
    zero = None if x.zero_point is None else x.zero_point.to(torch.int32) - amount
    return ShiftedCodes(codes, x.scale.float(), zero, x.spec)


def unit_sums(x: ShiftedCodes, unit: int) -> torch.Tensor:
    """Sums of the codes over ``unit`` columns (0: over the row): int32 ``[M, units]``; the producer's if they fit."""
    m, padded = x.codes.shape[0], x.codes.stride(0)
    units = padded // unit if unit else 1
    if x.sums is not None and x.sums.shape[1] == units:
        return x.sums
    if not unit:
        return x.codes.sum(1, dtype=torch.int32)[:, None]
    from hfq.kernels.triton import producers_jit as jit

    sums = torch.empty(m, units, dtype=torch.int32, device=x.codes.device)
    rows = max(1, 2048 // unit)
    jit.sums_kernel[(m, -(-units // rows))](x.codes, sums, padded, units, UNIT=unit, ROWS=rows, num_warps=4)
    return sums


def quantize_rows(
    x: torch.Tensor, spec: ActivationSpec, params: Parameters | None = None, factor: torch.Tensor | None = None, *,
    unit: int | None = 0, front: Front | None = None,
) -> ShiftedCodes:
    """Codes of ``x`` ``[M, K]`` (any float dtype, rows contiguous), after what ``front`` says.

    Args:
        spec: the grid; one scale a row or one for the tensor.
        params: stored scale and zero point of a static grid.
        factor: number of one element that the range is multiplied with, if and only if ``spec.factor``.
        unit: also sum the codes over this many columns (32, 64 or 128; 0: over the row; ``None``: no sums).

    Raises:
        KernelError: a grid or a front that no kernel serves.
    """
    from hfq.kernels.triton import producers_jit as jit

    front = front or Front()
    reason = constraint(spec)
    if reason or (front.exponent != 1.0 and not spec.symmetric):
        raise KernelError(reason or "an exponent goes with symmetric codes")
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    stored = _stored(x, spec, params, factor, front)
    out = _outputs(x, spec, stored, unit)
    if not m:
        return out
    columns = _power_of_2(out.codes.stride(0))
    times = front.times
    if times is not None and times.stride(1) != 1:
        times = times.contiguous()
    scale, zero = stored or (x, None)
    vectors = (x if t is None else t for t in (front.gain, front.centre, front.mul, front.add))
    tensors = (
        x, x if times is None else times, *vectors,
        scale, x if zero is None else zero, x if factor is None else factor, out.codes, out.scale,
        out.scale if out.zero_point is None else out.zero_point, out.codes if out.sums is None else out.sums,
    )
    sizes = (
        k, x.stride(0), 0 if times is None else times.stride(0), out.codes.stride(0),
        1 if out.sums is None else out.sums.shape[1], front.tokens or 1, front.eps, front.gain_offset, front.exponent,
    )
    constants = {
        "FRONT": jit.FRONTS[front.norm], "ACT": _ACTS[front.act], "TIMES": times is not None,
        "GAIN": front.gain is not None, "CENTRE": front.centre is not None, "MODULATE": front.modulate,
        "POWER": front.exponent != 1.0, **_format_arguments(spec, stored is not None, unit),
    }
    with torch.cuda.device_of(x):
        if columns > LONG:
            jit.rows_long_kernel[(m,)](*tensors, *sizes, COLUMNS=CHUNK, **constants, num_warps=8)
        else:
            rows, warps = tile_of(columns, m)
            jit.rows_kernel[(-(-m // rows),)](*tensors, m, *sizes, ROWS=rows, COLUMNS=columns, **constants,
                                              num_warps=warps)
    return out


_FUNCTIONS = {
    torch.nn.functional.silu: "silu", torch.nn.functional.gelu: "gelu", torch.nn.functional.relu: "relu",
    torch.relu: "relu",
}


def serve(
    kind: str, x: torch.Tensor, spec: ActivationSpec, params: Parameters | None, factor: torch.Tensor | None,
    **before: Any,
) -> ShiftedCodes | None:
    """What the functions of :mod:`hfq.kernels.producers` ask for; ``None`` where no kernel does it."""
    whole = spec.dynamic and spec.granularity == "tensor"
    if constraint(spec) or x.dim() != 2 or x.dtype not in _FLOATS or torch.is_grad_enabled() and x.requires_grad:
        return None
    if spec.factor == 2:
        return None  # both ends scaled and then subtracted: a kernel would contract that, and round otherwise
    if kind == "hadamard":
        transform = before["transform"]
        order, signs = getattr(transform, "order", None), getattr(transform, "signs", None)
        core, power = (1, 1) if not isinstance(order, int) else hadamard.decompose(order)
        if whole or not isinstance(order, int) or tile_of_mix(x.shape[1] // order, core, power) is None:
            return quantize_rows(transform(x), spec, params, factor)
        return mix(x, order, spec, params, factor, signs=signs)  # type: ignore[return-value]
    front = _front(kind, x, before)
    if front is None or (whole and front != Front()) or (front.exponent != 1.0 and not spec.symmetric):
        return None
    source = x if kind != "act" or before["gate"] is None else before["gate"]
    return quantize_rows(source, spec, params, factor, front=front)


def _front(kind: str, x: torch.Tensor, before: dict[str, Any]) -> Front | None:
    """The description of what comes before the codes."""
    if kind == "act":
        act = _FUNCTIONS.get(before["function"])
        times = None if before["gate"] is None else x
        return None if act is None else Front(act=act, times=times)  # type: ignore[arg-type]
    mul, add = before.get("multiply"), before.get("add")
    if kind == "norm":
        scale, add = before["scale"], before["shift"]
        mul = None if scale is None else 1 + scale.float()
    if add is not None and mul is None:
        mul = torch.ones_like(add)
    if kind == "norm":
        return Front(
            norm="layer" if before["mean"] else "rms", gain=before["weight"], centre=before["bias"], eps=before["eps"],
            mul=mul, add=add,
        )
    return Front(mul=mul, add=add, exponent=before.get("alpha", 1.0))


def tile_of(columns: int, m: int) -> tuple[int, int]:
    """Rows of a program and its warps: about 2048 numbers, a row of 4096 and above alone with 8 warps."""
    rows = 1 if columns > 1024 else max(1, min(2048 // columns, _power_of_2(m) // 264 or 1, 8))
    return rows, 8 if columns >= 4096 else 4


def mix(
    x: torch.Tensor, order: int, spec: ActivationSpec | None = None, params: Parameters | None = None,
    factor: torch.Tensor | None = None, *, signs: torch.Tensor | None = None, times: torch.Tensor | None = None,
    act: str = "none",
) -> ShiftedCodes | torch.Tensor:
    """``(act(x) * times * signs) H / sqrt(order)`` in runs of ``order`` columns, then codes (``spec``) or floats.

    Args:
        x: ``[M, K]``, K a multiple of ``order``, whose tile (see :func:`tile_of_mix`) fits a program.
        spec: grid of the codes; ``None``: return floats of the dtype of x.
        params, factor: as in :func:`quantize_rows`; the codes come with their sums over the row.
        signs: ``[K]`` of +1 and -1, any dtype.
    """
    from hfq.kernels.triton import hadamard_jit as jit

    (m, k), (core, power) = x.shape, hadamard.decompose(order)
    tile = tile_of_mix(k // order, core, power)
    reason = "" if spec is None else constraint(spec)
    if k % order or reason or tile is None:
        raise KernelError(reason or f"a Hadamard transform of order {order} on {k} columns is beyond these kernels")
    if spec is not None and spec.dynamic and spec.granularity == "tensor":
        raise KernelError("one dynamic range for the tensor cannot be fused: transform first, then quantize")
    stored = None if spec is None else _stored(x, spec, params, factor, Front())
    x = x if x.stride(1) == 1 else x.contiguous()
    times = None if times is None else times if times.stride(1) == 1 else times.contiguous()
    made = ActivationSpec(8, symmetric=True) if spec is None else spec
    constants = _format_arguments(made, stored is not None, 0)
    del constants["UNIT"]
    out = _outputs(x if spec is not None else x[:0], made, stored, 0)
    target = out.codes if spec is not None else torch.empty(m, k, dtype=x.dtype, device=x.device)
    blocks, core_pad, warps = tile
    scale, zero = stored or (x, None)
    if m:
        with torch.cuda.device_of(x):
            jit.mix_kernel[(m,)](
                x, x if times is None else times, x if signs is None else signs, core_matrix(core, core_pad, x.device),
                scale, x if zero is None else zero, x if factor is None else factor, target, out.scale,
                out.scale if out.zero_point is None else out.zero_point, out.sums,
                k, x.stride(0), 0 if times is None else times.stride(0), target.stride(0), order**-0.5,
                BLOCKS=blocks, POWER_OF_2=power, LOG=power.bit_length() - 1, CORE=core, CORE_PAD=core_pad,
                ACT=_ACTS[act], TIMES=times is not None, SIGNS=signs is not None, CODES=spec is not None,
                **constants, num_warps=warps,
            )
    return out if spec is not None else target


_cores: dict[tuple[int, int, torch.device], torch.Tensor] = {}


def core_matrix(core: int, pad: int, device: torch.device) -> torch.Tensor:
    """The Hadamard matrix of order ``core`` in float16, padded with zeros to ``[pad, pad]``."""
    key = (core, pad, device)
    if key not in _cores:
        matrix = torch.zeros(pad, pad, dtype=torch.float16)
        matrix[:core, :core] = hadamard.hadamard(core)
        _cores[key] = matrix.to(device)
    return _cores[key]


def tile_of_mix(blocks: int, core: int, power: int) -> tuple[int, int, int] | None:
    """Blocks in the tile of a row, padded size of the core, warps; ``None`` if a row is too long."""
    core_pad = 1 if core == 1 else max(16, _power_of_2(core))
    blocks = _power_of_2(blocks)
    while core > 1 and blocks * power < 16:  # the tensor cores take no fewer rows
        blocks *= 2
    size = blocks * power * core_pad
    if size > (16384 if core_pad == 256 else 32768) or core_pad > 256:  # such a core fills the shared memory
        return None
    return blocks, core_pad, 4 if size <= 2048 else 8 if size <= 16384 else 16
