"""Attention over packed keys and values on NVIDIA GPUs, and appending to them: the host side of ``cache_jit``.

Entry points: :func:`attend` (what :func:`hfq.kernels.kv.attend` computes, for a few queries a head), :func:`append`
(encode some tokens and write them). Each block of a cache is one launch, so a cache that was allocated at once decodes
fastest. Nothing waits for the GPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch

from hfq.formats import kv
from hfq.formats.affine import SMALLEST_SCALE
from hfq.formats.kv import SideSpec, Tables
from hfq.kernels.kv import Block, Side
from hfq.kernels.triton.wna16 import _device

__all__ = ["append", "appendable", "attend", "constraint"]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDTHS = (1, 2, 3, 4, 8)
MOST_QUERIES = 64  # of one key head; more are a prompt, for which decoding once and a plain product is faster
MOST_TOKENS = 128  # appended at once; more are a prompt
ROWS = 32  # rows of bytes in a tile, at most

Floats = Sequence[torch.Tensor]


def _power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def constraint(query: torch.Tensor, key: Side, value: Side, rotary: Any = None) -> str:
    """Why :func:`attend` cannot serve this; empty if it can."""
    width = query.shape[3]
    if query.shape[2] > MOST_QUERIES:
        return f"{query.shape[2]} queries a key head: at most {MOST_QUERIES}"
    if width % 2 or not 32 <= width <= 256:
        return f"head_dim {width}: an even number from 32 to 256 is needed"
    for side in (key, value):
        if not side.spec.exact and side.spec.bits not in WIDTHS:
            return f"{side.spec.bits} bits: one of {WIDTHS} is needed"
    if key.spec.exact != value.spec.exact:
        return "keys or values as floats, the others as codes"
    if rotary is not None and getattr(rotary, "halves", lambda: False)() is not True:
        return "a rotary embedding that does not pair the halves of a whole head"
    return ""


def axis_of(spec: SideSpec) -> tuple[str, int, int]:
    """``(axis, groups, group)`` as the kernels take them."""
    if spec.axis == "token" and spec.group_size > 0:
        return "part", -1, spec.group_size
    return spec.axis, 1, max(spec.group_size, 1)


def attend(
    query: torch.Tensor, key: Side, value: Side, tokens: int, *, scaling: float, rotary: Any = None,
    mask: torch.Tensor | None = None, softcap: float | None = None,
    recent: tuple[torch.Tensor, torch.Tensor] | None = None,
    sink: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None, splits: int | None = None,
) -> torch.Tensor | None:
    """As :func:`hfq.kernels.kv.attend`; ``None`` where :func:`constraint` names a reason.

    Args:
        rotary: besides ``rotate`` it has ``halves()``, true if the halves of a whole head are turned together, and
            ``angles(start, stop)``: cosines and sines ``[batch or 1, stop - start, head_dim / 2]``.
        sink: its positions follow each other in every sequence.
        splits: programs that share the tokens of a block; default enough for two on each multiprocessor.
    """
    if constraint(query, key, value, rotary):
        return None
    from hfq.kernels.triton import cache_jit as jit

    batch, heads, count, width = query.shape
    value_width = value.blocks[0].packed.shape[-1] if value.blocks else recent[1].shape[-1]  # type: ignore[index]
    work = _Work(query.contiguous(), value_width, scaling, softcap, mask, sink)
    pieces = [(block, value.blocks[i], at) for i, (block, _, _, at) in enumerate(key.tiles(tokens, 1 << 30))]
    angles = None if rotary is None or not pieces else rotary.angles(0, tokens)
    plans = [work.plan(block, key.spec, value.spec, splits) for block, _, _ in pieces]
    work.allocate(sum(parts for _, parts in plans) + (recent is not None) + (sink is not None))
    with torch.cuda.device_of(query):
        for (kb, vb, at), (rows, parts) in zip(pieces, plans, strict=True):
            if key.spec.exact:
                work.floats(kb.packed, vb.packed, min(kb.capacity, tokens - at), at, None, tokens)
            else:
                work.packed(kb, key, vb, value, min(kb.capacity, tokens - at), at, rows, parts, angles)
        if sink is not None:
            work.floats(sink[0], sink[1], sink[0].shape[2], 0, sink[2], tokens)
        if recent is not None:
            work.floats(recent[0], recent[1], recent[0].shape[2], tokens, None, 1 << 30)
        y = torch.empty(batch, heads, count, value_width, dtype=torch.float32, device=query.device)
        jit.combine_kernel[(batch * heads, count)](
            *work.partial, y, count, value_width, work.parts, DVP=_power_of_2(value_width), num_warps=1,
        )
    return y


class _Work:
    """One call of :func:`attend`: what all launches share, and the buffers of partial results."""

    def __init__(
        self, query: torch.Tensor, value_width: int, scaling: float, softcap: float | None,
        mask: torch.Tensor | None, sink: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    ) -> None:
        self.query, self.value_width, self.scaling, self.softcap = query, value_width, scaling, softcap
        self.batch, self.heads, self.count, self.width = query.shape
        self.first = None if sink is None else sink[2][:, 0].to(torch.int32)
        self.sinks = 0 if sink is None else sink[2].shape[1]
        self.mask = mask
        if mask is not None:
            mask = mask.expand(self.batch, self.heads, self.count, -1)
            mask = mask if mask.stride(3) == 1 else mask.contiguous()
            self.mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        self.used = self.parts = 0
        self.partial: tuple[torch.Tensor, ...] = ()

    def plan(self, block: Block, key: SideSpec, value: SideSpec, splits: int | None) -> tuple[int, int]:
        """Rows that one program walks over, and programs of one head."""
        if key.exact:
            return 0, 1
        run = block.capacity // steps(key.bits, value.bits)
        if splits is None:
            splits = -(-2 * _device(self.query.device)[1] // (self.batch * self.heads))
        tiles = -(-run // ROWS)
        rows = -(-tiles // max(splits, 1)) * ROWS
        return rows, -(-run // rows)

    def allocate(self, parts: int) -> None:
        shape = (self.batch * self.heads, parts, self.count)
        like = {"dtype": torch.float32, "device": self.query.device}
        acc = torch.empty(*shape, self.value_width, **like)  # type: ignore[call-overload]
        self.partial = (acc, torch.empty(shape, **like), torch.empty(shape, **like))  # type: ignore[call-overload]
        self.parts = parts

    def _common(self) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """Constants, and the arguments of the mask and of what follows it."""
        kind = 0 if self.mask is None else 1 if self.mask.dtype == torch.uint8 else 2
        strides = (0, 0, 0) if self.mask is None else self.mask.stride()[:3]
        from triton import language as tl

        constants = {
            "MASK": kind, "SOFTCAP": self.softcap is not None, "DTYPE": tl.float16,
            "QP": max(16, _power_of_2(self.count)), "HALF": max(16, _power_of_2(self.width // 2)),
            "DVP": max(16, _power_of_2(self.value_width)),
        }
        return constants, (*strides, self.scaling, self.softcap or 1.0)

    def packed(
        self, kb: Block, key: Side, vb: Block, value: Side, tokens: int, at: int, rows: int, parts: int,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """Launch over one block."""
        from hfq.kernels.triton import cache_jit as jit

        none = self.query
        k, v = _SideArguments(kb, key, none), _SideArguments(vb, value, none)
        cos, sin = (none, none) if angles is None else (t if t.stride(2) == 1 else t.contiguous() for t in angles)
        shared = cos.shape[0] == 1
        constants, tail = self._common()
        jit.decode_kernel[(self.batch * self.heads, parts)](
            self.query, *k.tensors, *v.tensors, cos, sin, none if self.mask is None else self.mask,
            none if self.first is None else self.first, *self.partial,
            self.heads, self.count, self.width, self.value_width, kb.capacity, tokens, at, rows, self.used, self.parts,
            self.sinks, *k.strides, *v.strides, k.groups, k.group, v.groups, v.group,
            0 if angles is None or shared else cos.stride(0), 0 if angles is None else cos.stride(1), *tail,
            KB=key.spec.bits, VB=value.spec.bits, K_AXIS=jit.AXES[k.axis], V_AXIS=jit.AXES[v.axis],
            K_INT=key.spec.zero_point == "int", V_INT=value.spec.zero_point == "int",
            K_TABLE=key.spec.table, V_TABLE=value.spec.table, K_SLOTS=k.slots, V_SLOTS=v.slots,
            ROTARY=angles is not None, SKIP=self.first is not None, **constants,
            **tile_of(key.spec, value.spec, angles is not None),
        )
        self.used += parts

    def floats(
        self, key: torch.Tensor, value: torch.Tensor, tokens: int, at: int, first: torch.Tensor | None, limit: int,
    ) -> None:
        """Launch over exact keys and values; ``first``: position of the first of them in each sequence."""
        from hfq.kernels.triton import cache_jit as jit

        key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (key, value))
        constants, tail = self._common()
        skip = self.first is not None and first is None and limit < 1 << 30
        start = None if first is None else first[:, 0].to(torch.int32)
        jit.floats_kernel[(self.batch * self.heads,)](
            self.query, key, value, self.query if start is None else start,
            self.query if self.mask is None else self.mask, self.first if skip else self.query, *self.partial,
            self.heads, self.count, self.width, self.value_width, tokens, at, limit, self.used, self.parts,
            self.sinks if skip else 0, *key.stride()[:3], *value.stride()[:3], *tail,
            FIRST=start is not None, SKIP=skip, BT=ROWS, **constants, num_warps=4, num_stages=3,
        )
        self.used += 1


class _SideArguments:
    """Tensors and numbers of one side of a block, in the order of the kernel's arguments."""

    def __init__(self, block: Block, side: Side, none: torch.Tensor) -> None:
        spec, extra = side.spec, block.extra
        self.axis, self.groups, self.group = axis_of(spec)
        values = extra.get("values")
        self.slots = 0 if values is None else values.shape[2]
        if spec.dynamic:
            scale, offset = extra["scale"], extra["offset"]
            self.groups = scale.shape[3] if self.groups < 0 else self.groups
            strides = (scale.stride(0), 0 if scale.shape[1] == 1 else scale.stride(1))
        else:
            scale, offset = (t.contiguous() for t in kv.stored_grid(spec, side.tables))
            strides = (0, 0)
        table = none if not spec.table else side.tables.decode.half()  # type: ignore[union-attr]
        index, values = extra.get("index", none), none if values is None else values
        self.tensors = (block.packed, scale, offset, index, values, table)
        self.strides = (*strides, values.stride(0) if self.slots else 0)


def steps(key_bits: int, value_bits: int) -> int:
    """Runs of tokens into which a block falls: fields of the narrowest plane of both sides."""
    return max(8 // (1 if bits in (1, 3) else bits) for bits in (key_bits, value_bits))


def tile_of(key: SideSpec, value: SideSpec, rotary: bool) -> dict[str, int]:
    """Rows of a tile, warps and stages: less where scales and outliers of single elements take registers."""
    heavy = rotary or any(s.outliers or s.axis == "window" or s.group_size > 0 for s in (key, value))
    return {"BT": 16 if heavy else ROWS, "num_warps": 4, "num_stages": 3}


def appendable(spec: SideSpec, tokens: int, width: int) -> bool:
    """Whether :func:`append` serves this: a few tokens, scales of a token and head, a channel or one whole window."""
    whole = spec.axis != "window" or (tokens == spec.group_size)
    own = spec.axis != "token" or spec.group_size == -1
    fits = tokens <= MOST_TOKENS and tokens * width <= 16384
    return whole and own and fits and not spec.outliers and not spec.exact and spec.bits in WIDTHS


def append(block: Block, at: int, x: torch.Tensor, spec: SideSpec, tables: Tables) -> bool:
    """Encode ``x`` ``[batch, heads, tokens, head_dim]`` and write it from token ``at`` of the block on.

    The same bytes as :func:`hfq.kernels.kv.write` of :func:`hfq.formats.kv.encode`; false, and nothing done, where
    that does not serve (:func:`appendable`).
    """
    if not appendable(spec, x.shape[2], x.shape[3]):
        return False
    from hfq.kernels.triton import cache_jit as jit

    batch, heads, tokens, width = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    grid, edges, scale, offset = x, x, block.packed, block.packed
    strides = (0, 0)
    if spec.dynamic:
        scale, offset = block.extra["scale"], block.extra["offset"]
        strides = (scale.stride(0), scale.stride(1))
    else:
        grid = torch.stack(kv.stored_grid(spec, tables)).contiguous()
    if spec.table:
        levels = tables.encode.float()  # type: ignore[union-attr]
        edges = (levels[1:] + levels[:-1]) / 2
    with torch.cuda.device_of(x):
        jit.append_kernel[(batch * heads,)](
            x, grid, edges, block.packed, scale, offset, heads, width, block.capacity, tokens, at, *x.stride()[:3],
            *strides, max(spec.group_size, 1),
            BITS=spec.bits, AXIS=jit.AXES[spec.axis], TABLE=spec.table, INT_ZERO=spec.zero_point == "int",
            SMALLEST=SMALLEST_SCALE, T=_power_of_2(tokens), DP=max(16, _power_of_2(width)),
            num_warps=1 if tokens * width <= 256 else 4,
        )
    return True


def bytes_read(key: SideSpec, value: SideSpec, heads: int, width: int, tokens: int) -> float:
    """Bytes of ``tokens`` tokens of one sequence that attention has to read."""
    return math.fsum(side.bits_per_element(heads, width) * heads * width * tokens / 8 for side in (key, value))
