"""The rows of the dispatch table for convolutions on NVIDIA GPUs."""

from __future__ import annotations

from hfq.kernels import conv as convolutions
from hfq.kernels import dispatch, reference
from hfq.kernels.dispatch import ANY_BITS, FLOATS, Case, Row
from hfq.kernels.packed import Layout, register
from hfq.kernels.triton import conv, wna16

__all__: list[str] = []


def _serves(case: Case) -> bool:
    if case.activation is None or wna16.available("cuda"):
        return False
    return not conv.constraint(case.geometry, case.bits, case.per_row, case.whole_zeros)


_NEEDS = (
    "needs quantized inputs, Triton (pip install 'hfq[triton]'), an NVIDIA GPU of compute capability 8.0 or newer, one "
    "group of channels, and one scale a row with zero points that fit signed bytes"
)
register("triton_conv", Layout(
    make=None, canonical=conv.canonical,  # type: ignore[arg-type]
    dequantize=lambda runtime, dtype: reference.dequantize(runtime.packed(), dtype),
))
convolutions.MAKERS["triton_conv"] = conv.prepare
convolutions.FUSED["triton"] = conv.multiply_two
dispatch.backend("qconv2d_codes", "triton")(conv.multiply)
dispatch.add_rows([
    Row("qconv2d", "cuda", FLOATS, ANY_BITS, "triton_conv", _serves, "triton", _NEEDS, constraint=True),
], before="float_sums")
