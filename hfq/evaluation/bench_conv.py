"""Rows of the convolution for ``hfq bench kernels``: against float32 ``F.conv2d``, quantization of the input included.

``M`` counts output positions, ``N`` output channels, ``K`` products of a sum; the configuration names taps and stride.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from hfq import kernels
from hfq.evaluation import bench_kernels as bench
from hfq.evaluation.kernel_rows import Row
from hfq.formats import ActivationSpec, QuantSpec, activation
from hfq.kernels import PackedWeight, conv, dispatch, reference
from hfq.kernels.conv import Operand
from hfq.kernels.geometry import Geometry

__all__ = ["cpu"]

# Images, side, input channels, output channels, taps, stride, groups; the first two are what --quick measures. The last
# three are on both sides of the size from which weights are convolved as a product of rows.
CASES: tuple[tuple[int, int, int, int, int, int, int], ...] = (
    (4, 32, 64, 64, 3, 1, 1),
    (4, 16, 128, 128, 1, 1, 1),
    (1, 32, 320, 320, 3, 1, 1),
    (16, 8, 384, 384, 3, 1, 1),
    (16, 8, 384, 384, 3, 2, 1),
    (16, 8, 384, 768, 1, 1, 1),
    (1, 112, 3, 64, 7, 2, 1),
    (4, 32, 128, 128, 3, 1, 128),
    (8, 16, 256, 256, 3, 1, 1),
    (8, 8, 512, 512, 3, 2, 1),
    (8, 4, 512, 512, 3, 2, 1),
)
STATIC = ActivationSpec(8, True, "tensor", dynamic=False)
# Width of the codes, inputs, coarse part: whole 8 bits, 4 bits, two parts, floats.
FORMATS: tuple[tuple[int, str, ActivationSpec | None], ...] = (
    (8, "a8s", STATIC), (4, "a8s", STATIC), (8, "a8s-two-parts", STATIC), (8, "", None),
)
TARGETS = {"conv3": 2.5}


def _weight(geometry: Geometry, bits: int) -> PackedWeight:
    packed = bench.operands(bits, -1, geometry.out_channels, geometry.columns)
    packed.spec, packed.zero_point = QuantSpec(bits, symmetric=True), None
    return packed


def _backends(packed: PackedWeight, geometry: Geometry, spec: ActivationSpec | None, every: bool) -> list[str]:
    """The one that is chosen, or all but the reference that can serve the weight."""
    case = conv.case_of(packed, geometry, 1, torch.float32, "cpu", False, spec)
    if not every:
        return [dispatch.choose(case, packed.name).backend]
    rows = [row for row in kernels.table() if row.op == "qconv2d" and not row.why_not(case, forced=True)]
    return list(dict.fromkeys(row.backend for row in rows if row.backend != "reference"))


def _rows(case: tuple[int, ...], options: bench.Options) -> Iterator[bench.Candidate]:
    images, side, inputs, outputs, taps, stride, groups = case
    pad = taps // 2
    geometry = Geometry(inputs, outputs, (taps, taps), (stride, stride), (pad, pad, pad, pad), (1, 1), groups)
    x = torch.randn(images, inputs, side, side, generator=torch.Generator().manual_seed(side))
    x = x.contiguous(memory_format=torch.channels_last)
    shape = geometry.output(x.shape)
    for bits, name, spec in FORMATS[:1] if options.quick else FORMATS:
        two = name.endswith("parts")
        if two and taps != 3:
            continue
        config = f"{taps}x{taps}s{stride}" + (f"g{groups}" if groups > 1 else "") + (f" {name}" if name else "")
        head = Row("conv", bits, -1, shape[0] * shape[2] * shape[3], outputs, geometry.columns, "float32", "", config)
        if not options.wants(head, any_backend=True):
            continue
        params = None if spec is None else activation.range_parameters(x.amin().view(1), x.amax().view(1), spec)
        parts = [geometry, geometry.centre((1, 1))] if two else [geometry]
        places = [(place, _weight(place, bits)) for place in parts]
        for backend in _backends(places[0][1], geometry, spec, options.every_backend):
            row = replace(head, backend=backend)
            row.target = TARGETS["conv3"] if (bits, name, taps, stride, groups) == (8, "a8s", 3, 1, 1) else None
            if options.wants(row):
                yield _candidate(row, x, places, spec, params)


def _candidate(row: Row, x: torch.Tensor, places: Any, spec: ActivationSpec | None, params: Any) -> bench.Candidate:
    """One backend's form of the weights, checked."""
    with kernels.use(qconv2d=row.backend):
        operands = [Operand(conv.prepare(packed, place, dtype=torch.float32, activation=spec), place)
                    for place, packed in places]  # fmt: skip

    def call() -> torch.Tensor:
        with kernels.use(qconv2d=row.backend):
            return conv.conv2d(x, operands, None, spec, params)

    row.bits_held = round(sum(8 * one.runtime.nbytes for one in operands) / (row.N * row.K), 2)
    row.error = _error(call(), x, places, spec, params)
    limit = bench.LIMIT if spec is None or row.backend == "float_sums" else 1e-6  # the others sum whole numbers
    if not row.error <= limit:
        row.ok = f"wrong: error {row.error:.1e} is above {limit:.0e}"
    return row, call


def _error(y: torch.Tensor, x: torch.Tensor, places: Any, spec: ActivationSpec | None, params: Any) -> float:
    """Relative distance to the definition, on the first image."""
    want = torch.zeros(())
    for place, packed in places:
        if spec is None:
            want = want + reference.conv2d(x[:1].double(), packed, place)
        else:
            codes = activation.quantize(x[:1], spec, params)
            want = want + reference.conv2d_int(codes, packed, place, None, torch.float64)
    return float((y[:1].double() - want).norm() / want.norm()) if torch.isfinite(y).all() else float("inf")


def cpu(options: bench.Options) -> Iterator[Row]:
    """All shapes, each beside ``F.conv2d`` on the same input in the same turns."""
    for case in CASES[:2] if options.quick else CASES:
        images, side, inputs, outputs, taps, stride, groups = case
        x, weight = torch.randn(images, inputs, side, side), torch.randn(outputs, inputs // groups, taps, taps)
        base = partial(F.conv2d, x, weight, None, stride, taps // 2, 1, groups)
        yield from bench.timed(base, partial(_rows, case, options), options)
