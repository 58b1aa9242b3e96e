"""Rows of the convolution for ``hfq bench kernels``: against float32 ``F.conv2d``, quantization of the input included.

``M`` counts output positions, ``N`` output channels, ``K`` products of a sum; the configuration names taps and stride.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from hfq.evaluation import bench_kernels as bench
from hfq.evaluation.kernel_rows import Row
from hfq.formats import ActivationSpec, QuantSpec, activation
from hfq.kernels import conv, reference
from hfq.kernels.conv import Operand
from hfq.kernels.geometry import Geometry

__all__ = ["cpu"]

# Images, side, input channels, output channels, taps, stride, groups; the first two are what --quick measures.
CASES: tuple[tuple[int, int, int, int, int, int, int], ...] = (
    (4, 32, 64, 64, 3, 1, 1),
    (4, 16, 128, 128, 1, 1, 1),
    (1, 32, 320, 320, 3, 1, 1),
    (16, 8, 384, 384, 3, 1, 1),
    (16, 8, 384, 384, 3, 2, 1),
    (16, 8, 384, 768, 1, 1, 1),
    (1, 112, 3, 64, 7, 2, 1),
    (4, 32, 128, 128, 3, 1, 128),
)
STATIC = ActivationSpec(8, True, "tensor", dynamic=False)
# Width of the codes, inputs, coarse part: whole 8 bits, 4 bits, two parts, floats.
FORMATS: tuple[tuple[int, str, ActivationSpec | None], ...] = (
    (8, "a8s", STATIC), (4, "a8s", STATIC), (8, "a8s-two-parts", STATIC), (8, "", None),
)
TARGETS = {"conv3": 2.5}


def _operand(geometry: Geometry, bits: int, spec: ActivationSpec | None) -> tuple[Operand, Any]:
    packed = bench.operands(bits, -1, geometry.out_channels, geometry.columns)
    grid = QuantSpec(bits, symmetric=True)
    packed.spec, packed.zero_point = grid, None
    return Operand(conv.prepare(packed, geometry, dtype=torch.float32, activation=spec), geometry), packed


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
        pairs = [_operand(place, bits, spec) for place in ([geometry, geometry.centre((1, 1))] if two else [geometry])]
        params = None if spec is None else activation.range_parameters(x.amin().view(1), x.amax().view(1), spec)
        operands = [operand for operand, _ in pairs]
        lines = conv.explain(operands[0], head.M, torch.float32, spec)
        held = sum(8 * one.runtime.nbytes for one in operands) / (outputs * geometry.columns)
        row = Row(**(asdict(head) | {
            "backend": next(line.backend for line in lines if line.chosen), "bits_held": round(held, 2),
            "target": TARGETS["conv3"] if (bits, name, taps, stride, groups) == (8, "a8s", 3, 1, 1) else None,
        }))  # fmt: skip
        if not options.wants(row):
            continue

        def call(operands: Any = operands, spec: Any = spec, params: Any = params) -> torch.Tensor:
            return conv.conv2d(x, operands, None, spec, params)

        row.error = _error(call(), x, pairs, spec, params)
        limit = bench.LIMIT if spec is None else 1e-6
        if not row.error <= limit:
            row.ok = f"wrong: error {row.error:.1e} is above {limit:.0e}"
        yield row, call


def _error(y: torch.Tensor, x: torch.Tensor, pairs: Any, spec: ActivationSpec | None, params: Any) -> float:
    """Relative distance to the definition, on the first image."""
    want = torch.zeros(())
    for operand, packed in pairs:
        if spec is None:
            want = want + reference.conv2d(x[:1].double(), packed, operand.geometry)
        else:
            codes = activation.quantize(x[:1], spec, params)
            want = want + reference.conv2d_int(codes, packed, operand.geometry, None, torch.float64)
    return float((y[:1].double() - want).norm() / want.norm()) if torch.isfinite(y).all() else float("inf")


def cpu(options: bench.Options) -> Iterator[Row]:
    """All shapes, each beside ``F.conv2d`` on the same input in the same turns."""
    for case in CASES[:2] if options.quick else CASES:
        images, side, inputs, outputs, taps, stride, groups = case
        x, weight = torch.randn(images, inputs, side, side), torch.randn(outputs, inputs // groups, taps, taps)
        base = partial(F.conv2d, x, weight, None, stride, taps // 2, 1, groups)
        yield from bench.timed(base, partial(_rows, case, options), options)
