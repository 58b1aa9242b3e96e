"""Integer products on NVIDIA GPUs: weights of 1 to 8 bits, activations of 2 to 8 bits, int8 tensor cores.

Entry points: :func:`constraint`, :func:`prepare`, :func:`canonical`, :func:`dequantize`, :func:`multiply` (codes in).

Weights of up to four bits lie in half bytes: they cost half the memory traffic of eight bits and the same arithmetic,
since no Hopper GPU multiplies four-bit numbers. Activations of four bits are held in bytes and gain nothing in speed.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from typing import Any

import torch

from hfq.errors import KernelError
from hfq.formats import bitpack
from hfq.formats.activation import ActivationCodes, ActivationSpec
from hfq.kernels import reference
from hfq.kernels.packed import PackedWeight, Runtime
from hfq.kernels.triton import config as configs
from hfq.kernels.triton import integer_layout as layouts
from hfq.kernels.triton import producers
from hfq.kernels.triton.config import Config, Key
from hfq.kernels.triton.integer_layout import IntegerLayout
from hfq.kernels.triton.producers import ShiftedCodes
from hfq.kernels.triton.wna16 import _device, _group, _same_strides, _strides, available

__all__ = [
    "available", "canonical", "config_of", "constraint", "dequantize", "multiply", "prepare", "run", "unit_of",
]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LONGEST = 133_000  # codes of a row whose products certainly sum to an int32
EXACT = 33_000  # up to here also when both are taken less their zero points; above, the last step is in int64


def _layout(packed: PackedWeight | Runtime) -> IntegerLayout:
    integer_zero = packed.zero_point is not None and packed.zero_point.dtype == torch.uint8
    return layouts.choose(packed.spec.bits, packed.in_features, packed.spec.group_size, integer_zero)


def constraint(packed: PackedWeight | Runtime, activation: ActivationSpec) -> str:
    """Why the kernels cannot serve this weight with these activations; empty if they can."""
    reason = producers.constraint(activation)
    if not reason and not _layout(packed).fold:
        reason = f"group_size {packed.spec.group_size} is no multiple of 32: use one that is, or one scale per channel"
    if not reason and packed.in_features > LONGEST:
        reason = f"the int32 sums of {packed.in_features} products may overflow"
    return reason


def prepare(packed: PackedWeight, dtype: torch.dtype) -> Runtime:
    """The runtime form: int8 codes or half bytes, scales with the rows contiguous, sums of the codes."""
    spec, layout = packed.spec, _layout(packed)
    codes = bitpack.unpack(packed.qweight, spec.bits, packed.in_features)
    tensors = {"codes": layouts.pack(codes, spec.middle, layout), "scale": packed.scale.t().contiguous().t()}
    if packed.zero_point is not None:
        tensors["zero_point"] = packed.zero_point.t().contiguous().t()
    if _group(spec.group_size, packed.in_features):
        tensors["sums"] = reference.dequantize(packed, torch.float64).sum(-1).float()
    else:
        offset = spec.middle if layout.signed or packed.zero_point is None else packed.zero_point[:, 0].to(torch.int32)
        tensors["sums"] = (codes.sum(-1, dtype=torch.int32) - packed.in_features * offset).to(torch.int32)
    note = (
        f"{layout.bits}-bit signed codes, rows padded to {layout.padded}: {tensors['codes'].nbytes} bytes for "
        f"{packed.qweight.nbytes} packed; sums of the codes; scales and zero points in an order of their own"
    )
    return Runtime("triton_int", tensors, spec, packed.in_features, packed.out_features, dtype, note, packed.name)


def canonical(runtime: Runtime) -> torch.Tensor:
    """The canonical ``qweight`` uint8 ``[out_features, bytes]``, bit for bit what :func:`prepare` was given."""
    spec = runtime.spec
    codes = layouts.unpack(runtime.tensors["codes"], spec.middle, _layout(runtime), runtime.in_features)
    return bitpack.pack(codes, spec.bits)


def dequantize(runtime: Runtime, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``[out_features, in_features]``, computed in float32 and rounded once."""
    return reference.dequantize(runtime.packed(), dtype)


def multiply(x: ActivationCodes, runtime: Runtime, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Codes ``[M, in_features]`` (fastest from :mod:`hfq.kernels.triton.producers`) to ``[M, out_features]``."""
    where = f" of {runtime.name}" if runtime.name else ""
    if x.codes.shape[-1] != runtime.in_features:
        raise KernelError(f"x has {x.codes.shape[-1]} features, the weight{where} has {runtime.in_features}")
    if x.codes.device != runtime.tensors["codes"].device:
        raise KernelError(f"x is on {x.codes.device}, the weight{where} on {runtime.tensors['codes'].device}: move one")
    if not x.codes.shape[0]:
        return torch.empty(0, runtime.out_features, dtype=dtype, device=x.codes.device)
    with torch.cuda.device_of(x.codes):
        return run(producers.shift(x), runtime, bias, dtype, config_of(runtime, x.codes.shape[0]))


def unit_of(runtime: Runtime) -> int | None:
    """Columns over which the codes of the activations are summed for this weight: 0 the row, ``None`` not at all."""
    if runtime.zero_point is None or not _layout(runtime).signed:
        return None
    return _layout(runtime).fold if _group(runtime.spec.group_size, runtime.in_features) else 0


def config_of(runtime: Runtime, m: int) -> Config:
    """The configuration that ``m`` tokens run with: the first measured or the rule's."""
    group = _group(runtime.spec.group_size, runtime.in_features)
    device, n, layout = runtime.tensors["codes"].device, runtime.out_features, _layout(runtime)
    return _config(device, configs.bucket(m), n, layout, group, group > 0 and unit_of(runtime) is not None)


@functools.lru_cache(maxsize=8192)
def _config(device: torch.device, m: int, n: int, layout: IntegerLayout, group: int, sums: bool) -> Config:
    name, processors, limit = _device(device)
    key = Key("wnan", layout.bits, group, n, layout.padded, m, "int8")
    step = fixed_step(layout, group)
    found = configs.pick_config("wnan", key, name, layout.padded // (step or 256), processors)
    if sums and found.bm > 64:  # sums of the activations take the registers of a larger tile
        found = replace(found, bm=64)
    return configs.fits_integer(found, layout.bits, step, layout.padded, limit)


def fixed_step(layout: IntegerLayout, group: int) -> int:
    """Codes that one step of the kernel takes, if the layout says: a pack block, or a fold; 0: free."""
    return layout.block if layout.bits == 4 else layout.fold if group else 0


def run(
    x: ShiftedCodes, runtime: Runtime, bias: torch.Tensor | None, dtype: torch.dtype, config: Config,
    asm: bool | None = None,
) -> torch.Tensor:
    """One product with the configuration given."""
    from hfq.kernels.triton import integer_jit as jit

    t, layout = runtime.tensors, _layout(runtime)
    (m, k), n, codes, unit = x.codes.shape, runtime.out_features, runtime.tensors["codes"], unit_of(runtime)
    group, device = _group(runtime.spec.group_size, runtime.in_features), x.codes.device
    scale, zero = t["scale"], _same_strides(t["scale"], t.get("zero_point"))
    stride_sn, stride_sg = _strides(scale, n)
    blocks = layout.padded // config.bk
    per_split = -(-blocks // config.split)
    split = -(-blocks // per_split)  # no empty split
    y = torch.empty(m, n, dtype=dtype, device=device)
    target = y
    if split > 1:
        target = torch.empty(split, m, n, dtype=torch.float32 if group else torch.int32, device=device)
    stride_sx = 0 if x.scale.numel() == 1 else 1
    sums = None if unit is None else producers.unit_sums(x, unit)
    vectors = (x.scale, x.scale if x.zero_point is None else x.zero_point, x.scale if sums is None else sums, t["sums"],
               x.scale if bias is None else bias)
    constants: dict[str, Any] = {
        "NIBBLES": layout.bits == 4, "MIDDLE": runtime.spec.middle, "X_ZERO": x.zero_point is not None,
        "W_ZERO": 0 if zero is None else 1 if layout.signed else 2, "HAS_BIAS": bias is not None,
        "WIDE": k > EXACT and (zero is not None or x.zero_point is not None),
    }
    jit.wnan_kernel[(-(-n // config.bn) * -(-m // config.bm), split)](
        x.codes, codes, scale, scale if zero is None else zero, *vectors, target,
        m, n, x.codes.stride(0), codes.shape[1], scale.shape[1], k, stride_sn, stride_sg, stride_sx, blocks, per_split,
        1 if sums is None else sums.shape[1],
        BK=config.bk, FOLD=layout.fold, GROUP_SIZE=group, BN=config.bn, BM=config.bm, PARTIAL=split > 1,
        ASM=(not _INTERPRETED) if asm is None else asm, **constants,
        num_warps=config.warps, num_stages=config.stages,
    )
    if split > 1:
        block = 256 if m * n < 2**17 else 1024
        jit.finish_kernel[(-(-m * n // block),)](
            target, scale, scale if zero is None else zero, *vectors, y, n, m * n, k, stride_sn, stride_sx,
            SPLIT=split, GROUPED=group > 0, BLOCK=block, **constants, num_warps=block // 128,
        )
    return y
