"""Which backend serves an operation: one table of plain rows, the first one that holds wins.

Every row passed over keeps its reason (:func:`explain`). A backend asked for by name (:func:`use`, ``HFQ_BACKEND``)
either runs or raises; it is never replaced. Taking a slow row because a constraint failed warns once per reason, and
raises with ``HFQ_STRICT=1``.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from hfq.errors import KernelError
from hfq.formats import ActivationSpec, QuantSpec
from hfq.kernels.isa import THRESHOLDS, isa
from hfq.kernels.packed import Runtime

__all__ = [
    "BACKENDS", "Case", "Choice", "Row", "add_rows", "backend", "case_of", "choose", "explain", "forced", "sums_of",
    "table", "use",
]

ANY_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call, as the table sees it. ``layout`` is ``None`` while the layout itself is being chosen.

    ``activation`` is the format of the inputs of an integer product, ``sums`` the number of ranges of K whose sums have
    a scale of their own, ``whole_zeros`` says that the weight's zero points need no term of their own; ``geometry`` is
    that of a convolution.
    """

    op: str
    device: str
    dtype: torch.dtype
    bits: int
    M: int
    N: int
    K: int
    group: int
    layout: str | None = None
    cached: bool = False
    isa: str = "default"
    shift_fits: bool = False
    activation: ActivationSpec | None = None
    sums: int = 1
    whole_zeros: bool = True
    geometry: Any = None

    @property
    def per_row(self) -> bool:
        """One scale a row (or a tensor): nothing to scale inside the product."""
        return self.group >= self.K


@dataclass(frozen=True)
class Row:
    """One way to serve a case.

    Attributes:
        op: operation.
        device: ``"cpu"``, ``"cuda"`` or ``"*"``.
        dtypes: activation dtypes; empty for any.
        bits: widths of the codes.
        layout: the runtime layout it reads; ``"*"`` for any.
        predicate: what else must hold.
        backend: key of :data:`BACKENDS`, with ``op``.
        reason: why the predicate fails and what to do about it; formatted with the fields of the case.
        constraint: failing the predicate is worth telling the user about.
        slow: taking this row after a constraint failed warns.
        at_most, above: names of measured thresholds on M; a backend asked for by name runs outside of them too.
    """

    op: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    bits: tuple[int, ...]
    layout: str
    predicate: Callable[[Case], bool]
    backend: str
    reason: str
    constraint: bool = False
    slow: bool = False
    at_most: str = ""
    above: str = ""

    def concerns(self, case: Case) -> bool:
        """Whether the row is about this device, dtype and width at all."""
        dtype = not self.dtypes or case.dtype in self.dtypes
        return dtype and self.device in ("*", case.device) and case.bits in self.bits

    def why_not(self, case: Case, *, forced: bool = False) -> str:
        """Empty if the row can serve ``case``, else the reason; ``forced`` leaves the thresholds on M out."""
        if self.device not in ("*", case.device):
            return f"runs on {self.device}, the weight is on {case.device}"
        if self.dtypes and case.dtype not in self.dtypes:
            return f"takes {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, not {case.dtype}"
        if case.bits not in self.bits:
            return f"takes {self.bits[0]} to {self.bits[-1]} bits, not {case.bits}"
        if not self.predicate(case):
            return self.reason.format(**vars(case))
        limits = THRESHOLDS[case.isa]
        if self.at_most and not forced and getattr(limits, self.at_most) < case.M:
            return f"M={case.M} is above {getattr(limits, self.at_most)}, up to where it is faster ({case.isa})"
        if self.above and not forced and getattr(limits, self.above) >= case.M:
            return f"M={case.M} is not above {getattr(limits, self.above)}, from where it is faster ({case.isa})"
        if case.layout is not None and self.layout not in ("*", case.layout):
            return f"reads layout {self.layout!r}, the weight is held as {case.layout!r}"
        return ""


@dataclass(frozen=True)
class Choice:
    """A line of :func:`explain`."""

    backend: str
    chosen: bool
    reason: str


Backend = Callable[..., torch.Tensor]
TABLE: list[Row] = []
BACKENDS: dict[tuple[str, str], Backend] = {}
_warned: set[tuple[str, str]] = set()


def backend(op: str, name: str) -> Callable[[Backend], Backend]:
    """Register a function of an operation; ``y`` is contiguous.

    ``wna16``: ``(x [M, K], runtime, bias) -> y [M, N]`` of the dtype of ``x``. A backend of the integer product has one
    of two forms: ``wnan`` ``(x, runtime, bias, spec, params, factor)`` quantizes by itself, and ``wnan_codes``
    ``(x: ActivationCodes of [M, K], runtime, bias, dtype)`` takes codes that a producer made.
    """

    def add(function: Backend) -> Backend:
        BACKENDS[op, name] = function
        return function

    return add


def add_rows(rows: Sequence[Row], *, before: str | None = None) -> None:
    """Append rows, or put them in front of the first row of their operation with backend ``before``."""
    op = rows[0].op if rows else ""
    found = (i for i, row in enumerate(TABLE) if row.backend == before and row.op == op)
    at = next(found, len(TABLE)) if before else len(TABLE)
    TABLE[at:at] = rows
    _choose.cache_clear()


def table() -> list[Row]:
    """A copy of the table, in order."""
    return list(TABLE)


def _parse(text: str) -> dict[str, str]:
    forced = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, _, name = item.partition(":")
        if not name:
            raise KernelError(f"HFQ_BACKEND={text!r}: a list of op:backend is needed, such as wna16:dequant")
        forced[op.strip()] = name.strip()
    return forced


# ``None`` means that nothing is forced: the hot path tests for identity only. A context variable starts empty in every
# thread, so what the environment asks for is kept beside it.
FORCED: ContextVar[dict[str, str] | None] = ContextVar("hfq_backend", default=None)
_environment: dict[str, str] | None = None


def read_environment() -> None:
    """Take ``HFQ_BACKEND`` from the environment (done once on import)."""
    global _environment
    _environment = _parse(os.environ.get("HFQ_BACKEND", "")) or None


def forced() -> dict[str, str] | None:
    """Backends asked for by name, by operation; ``None`` if there are none."""
    inner = FORCED.get()
    return _environment if inner is None else inner


@contextmanager
def use(**ops: str) -> Iterator[None]:
    """Force a backend inside the block: ``use(wna16="reference")``. A backend that cannot run raises KernelError."""
    for op, name in ops.items():
        known = sorted({row.backend for row in TABLE if row.op == op})
        if name not in known:
            raise KernelError(f"no backend {name!r} for {op!r}; known: {', '.join(known) or 'no such operation'}")
    token = FORCED.set({**(forced() or {}), **ops})
    try:
        yield
    finally:
        FORCED.reset(token)


@functools.lru_cache(maxsize=4096)
def _choose(case: Case, wanted: str | None) -> tuple[Row, tuple[tuple[str, str, bool], ...]]:
    """The row for a case, and ``(backend, reason, constraint)`` of every row passed over on the way."""
    passed: list[tuple[str, str, bool]] = []
    for row in TABLE:
        if row.op != case.op or (wanted is not None and row.backend != wanted):
            continue
        why = row.why_not(case, forced=wanted is not None)
        if not why:
            return row, tuple(passed)
        counts = row.constraint and row.concerns(case) and not row.predicate(case)
        passed.append((row.backend, why, counts))
    what = f"backend {wanted!r} of {case.op}" if wanted else f"any backend of {case.op}"
    reasons = "; ".join(f"{name}: {why}" for name, why, _ in passed) or "it does not exist"
    where = f"M={case.M} N={case.N} K={case.K} ({case.bits} bits, {case.device})"
    raise KernelError(f"{what} cannot serve {where}: {reasons}")


def choose(case: Case, name: str = "") -> Row:
    """The row that serves ``case``; warns (or raises, ``HFQ_STRICT=1``) when it is a slow one for a reason.

    Args:
        case: the call.
        name: the layer's name, for the message.
    """
    wanted = (forced() or {}).get(case.op)
    row, passed = _choose(case, wanted)
    if row.slow and wanted is None:
        for _, why, counts in passed:
            if counts:
                _slow(case.op, row.backend, why, name)
                break
    return row


def _slow(op: str, backend: str, why: str, name: str) -> None:
    if os.environ.get("HFQ_STRICT") == "1":
        raise KernelError(f"{name or op}: the fast kernel cannot serve this weight, {backend!r} would: {why}")
    if (op, why) in _warned:
        return
    _warned.add((op, why))
    warnings.warn(f"{name or op}: slow backend {backend!r}: {why}", RuntimeWarning, stacklevel=4)


def case_of(
    runtime: Runtime, M: int, dtype: torch.dtype, device: str, activation: ActivationSpec | None = None
) -> Case:
    """The case of a product of ``M`` rows with ``runtime``; an integer product if there is an activation format."""
    return Case(
        "wna16" if activation is None else "wnan", device, dtype, runtime.spec.bits, M, runtime.out_features,
        runtime.in_features, runtime.spec.group_length(runtime.in_features), runtime.layout, runtime.cached, isa(),
        runtime.layout == "int8", activation,
        1 if activation is None else
        sums_of(runtime.spec, "row_scale" in runtime.tensors, runtime.in_features, activation),
        "rest" not in runtime.tensors,
    )


def sums_of(spec: QuantSpec, folded: bool, columns: int, activation: ActivationSpec) -> int:
    """Ranges of K over which the scales of weight and inputs are constant; ``folded``: the weight's are, over rows."""
    lengths = [columns if folded else spec.group_length(columns),
               columns if activation.group_size == -1 else activation.group_size]  # fmt: skip
    return len({start for length in lengths for start in range(0, columns, length)})


def explain(case: Case) -> list[Choice]:
    """One line per row of the table: the one chosen, and why each other one was not."""
    wanted = (forced() or {}).get(case.op)
    lines, found = [], False
    for row in TABLE:
        if row.op != case.op:
            continue
        why = row.why_not(case, forced=wanted == row.backend)
        if not why and wanted not in (None, row.backend):
            why = f"{wanted!r} is forced"
        if not why and found:
            why = "could serve it; an earlier row wins"
        lines.append(Choice(row.backend, not why, why or "first row that holds"))
        found = found or not why
    return lines


read_environment()
