"""Which instruction set the CPU operators of this process use, and what follows from it."""

from __future__ import annotations

import functools
import os

import torch

from hfq.errors import KernelError

__all__ = ["ISAS", "float_compute", "has_vnni", "isa"]

# From best to worst. "default" is everything without vectorised int4 operators in torch (also Arm).
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "default")


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
    if torch.cpu._is_avx512_bf16_supported() and (not cap or "BF16" in cap or "FP16" in cap or "AMX" in cap):
        return "avx512_bf16"
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


def has_vnni() -> bool:
    return bool(torch.cpu._is_vnni_supported())


def float_compute(name: str) -> torch.dtype:
    """The dtype in which large products of dequantized weights run fastest on this instruction set.

    Measured with ``hfq bench kernels``: bfloat16 ``F.linear`` is 3.5 to 5.7 times faster than float32 with AMX and four
    times *slower* without native bfloat16.
    """
    return torch.bfloat16 if name in ("amx", "avx512_bf16") else torch.float32
