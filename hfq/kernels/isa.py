"""Which instruction set the CPU operators of this process use, and what follows from it."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

from hfq.errors import KernelError

__all__ = ["ISAS", "THRESHOLDS", "Thresholds", "float_compute", "isa"]

# From best to worst. "default" is everything without vectorised int4 operators in torch (also Arm).
ISAS = ("amx", "avx512", "avx2", "default")


def _detect() -> str:
    """The set that torch *uses*: its own capability can be capped by ATEN_CPU_CAPABILITY, oneDNN's by its variable."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX512", "AVX2"):
        return "default"
    if capability == "AVX2":
        return "avx2"
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if torch.cpu._is_amx_tile_supported() and (not cap or "AMX" in cap or cap in ("ALL", "DEFAULT")):
        return "amx"
    return "avx512"


@functools.cache
def isa() -> str:
    """One of :data:`ISAS`; ``HFQ_CPU_ISA`` overrides the detection (for tests and benchmarks of the table)."""
    forced = os.environ.get("HFQ_CPU_ISA")
    if forced is None:
        return _detect()
    if forced not in ISAS:
        raise KernelError(f"HFQ_CPU_ISA={forced!r}: one of {', '.join(ISAS)}")
    return forced


def float_compute(name: str) -> torch.dtype:
    """The dtype in which large products of dequantized weights run fastest on this instruction set.

    Measured with ``hfq bench kernels``: bfloat16 ``F.linear`` is 3.5 to 5.7 times faster than float32 with AMX, 0.7
    times as fast with AVX512-BF16 alone, and four times *slower* without native bfloat16.
    """
    return torch.bfloat16 if name == "amx" else torch.float32


@dataclass(frozen=True)
class Thresholds:
    """Largest number of rows of x for which a fused operator wins, for one instruction set.

    Above it, dequantizing once and multiplying in floating point is faster: the fused operators' time grows with M.
    Measured with ``bench_kernels.run(every_backend=True)`` on one machine with AMX; the other sets on the same machine
    with torch's operators capped to that set (``ONEDNN_MAX_CPU_ISA``, ``ATEN_CPU_CAPABILITY``).
    """

    int4: int  # one plane of nibbles against dequantizing
    nibbles: int  # two planes
    int8: int  # int8 rows
    copy4: int  # one plane against a float copy, where one is kept
    copy8: int  # int8 rows or two planes against a float copy
    partials: int = 0  # one sum of integers a group against a float copy


THRESHOLDS = {
    "amx": Thresholds(int4=56, nibbles=40, int8=20, copy4=10, copy8=6),
    "avx512": Thresholds(int4=110, nibbles=44, int8=56, copy4=44, copy8=20),
    "avx2": Thresholds(int4=48, nibbles=24, int8=32, copy4=16, copy8=8),
    "default": Thresholds(int4=0, nibbles=0, int8=0, copy4=0, copy8=0),
}
