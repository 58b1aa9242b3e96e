"""Rows of attention on codes for ``hfq bench kernels``: against float32 scaled dot product attention.

Quantization of queries, keys, values and probabilities is included. In a row M counts queries of all heads, N the keys,
K the width of a head; the configuration names the shape and the grid of the probabilities.
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
from hfq.formats import ActivationSpec, activation
from hfq.formats.grids import Grid
from hfq.formats.log import LogSpec
from hfq.formats.twin import TwinSpec
from hfq.kernels import dispatch, products

__all__ = ["cpu"]

# Images times windows, heads, tokens, width of a head; the first is what --quick measures.
SHAPES = ((1, 3, 197, 64), (8, 12, 197, 64), (64, 3, 49, 32), (1, 8, 1024, 64))
STATIC = ActivationSpec(8, False, "tensor", dynamic=False)
PROBABILITIES: dict[str, tuple[Grid, float]] = {  # format, scale
    "uniform": (STATIC, 1 / 255), "log-sqrt2": (LogSpec(4, "sqrt2"), 1.0),
    "twin": (TwinSpec(8, 4, "magnitude"), 1 / 2032),
}


def _inputs(shape: tuple[int, int, int, int]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(shape[2])
    return [torch.randn(shape, generator=draw) for _ in range(3)]


def _rows(shape: tuple[int, int, int, int], options: bench.Options) -> Iterator[bench.Candidate]:
    images, heads, tokens, width = shape
    sides = _inputs(shape)
    params: dict[str, Any] = {name: activation.range_parameters(x.amin().view(1), x.amax().view(1), STATIC)
                              for name, x in zip(products.SIDES, sides, strict=False)}
    for name, (grid, scale) in list(PROBABILITIES.items())[: 1 if options.quick else None]:
        specs = {**dict.fromkeys(products.SIDES, STATIC), "probabilities": grid}
        zero = torch.zeros(1) if isinstance(grid, ActivationSpec) else None
        given = (*sides, None, width**-0.5, specs, {**params, "probabilities": (torch.tensor([scale]), zero)})
        config = f"{images}x{heads}x{tokens} {name}"
        head = Row("attention", 8, -1, images * heads * tokens, tokens, width, "float32", "", config)
        if not options.wants(head, any_backend=True):
            continue
        with kernels.use(attention="reference"):
            wanted = products.attention_int(*given)
        for backend in _backends(given, options):
            row = replace(head, backend=backend)
            if options.wants(row):
                call = partial(_forced, backend, given)
                row.error = float((call() - wanted).norm() / wanted.norm())
                if not row.error <= bench.LIMIT:
                    row.ok = f"wrong: error {row.error:.1e} is above {bench.LIMIT:.0e}"
                yield row, call


def _forced(backend: str, given: Any) -> torch.Tensor:
    with kernels.use(attention=backend):
        return products.attention_int(*given)


def _backends(given: Any, options: bench.Options) -> list[str]:
    """The one that is chosen, or all but the reference."""
    case = products.case_of(given[0], given[1], given[5])
    if not options.every_backend:
        return [dispatch.choose(case, "attention").backend]
    rows = [row for row in kernels.table() if row.op == "attention" and not row.why_not(case, forced=True)]
    return [row.backend for row in rows if row.backend != "reference"]


def cpu(options: bench.Options) -> Iterator[Row]:
    """All shapes, each beside float attention on the same tensors in the same turns."""
    for shape in SHAPES[:1] if options.quick else SHAPES:
        base = partial(F.scaled_dot_product_attention, *_inputs(shape))
        yield from bench.timed(base, partial(_rows, shape, options), options)
