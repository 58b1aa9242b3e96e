"""Attention over packed keys and values: blocks of tokens, and the products that read them a tile at a time.

A block holds ``capacity`` tokens. The bit planes of its codes (widest first, as in ``formats.bitpack``) follow each
other along the token axis, and a byte of a plane holds the same channel of tokens that are a fraction of the block
apart: unpacking is one shift and mask a slice, gives whole rows, and works for heads of any width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from hfq.errors import KernelError
from hfq.formats import bitpack, kv
from hfq.formats.kv import Encoded, SideSpec, Tables
from hfq.kernels import dispatch
from hfq.kernels.byte_mm import exact_unsigned
from hfq.kernels.isa import isa
from hfq.kernels.workspace import scratch

__all__ = ["Block", "Rotary", "Side", "attend", "explain", "read", "write"]

TILE_BYTES = 1 << 21  # of one unpacked tile: what a core keeps near itself
LONGEST_TILE = 1 << 16  # tokens: sums of 255 * 128 stay in 32 bits


class Rotary(Protocol):
    """The rotary embedding of stored keys."""

    def rotate(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Keys ``[batch, heads, stop - start, head_dim]`` of those tokens, with their embedding."""


@dataclass
class Block:
    """Some tokens of one side, allocated at once.

    Attributes:
        capacity: tokens that fit, a multiple of 8 unless 16 bits.
        packed: uint8 ``[batch, heads, capacity * bits / 8, head_dim]``; floats ``[.., capacity, ..]`` for 16 bits.
        extra: "scale", "offset", "values", "index" as in :class:`hfq.formats.kv.Encoded`, over all of the capacity.
    """

    capacity: int
    packed: torch.Tensor
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"packed": self.packed, **self.extra}


@dataclass
class Side:
    """Keys or values of all tokens: blocks in the order of the tokens, all but the last one full."""

    spec: SideSpec
    tables: Tables
    blocks: list[Block] = field(default_factory=list)

    def tiles(self, tokens: int, limit: int) -> list[tuple[Block, int, int, int]]:
        """``(block, first, last, position)`` of runs of at most ``limit`` tokens, whole windows."""
        size = self.spec.group_size if self.spec.axis == "window" else 1
        limit = max(limit // size * size, size)
        found, position = [], 0
        for block in self.blocks:
            used = min(block.capacity, tokens - position)
            found += [(block, a, min(a + limit, used), position + a) for a in range(0, used, limit)]
            position += max(used, 0)
        return found


def empty_block(like: Encoded, spec: SideSpec, capacity: int) -> Block:
    """A block for tokens that are encoded like ``like``."""
    batch, heads, _, width = like.codes.shape
    with torch.inference_mode(False):  # later tokens may come outside of inference mode
        if spec.exact:
            return Block(capacity, like.codes.new_empty(batch, heads, capacity, width))
        packed = like.codes.new_zeros(batch, heads, capacity * spec.bits // 8, width)
        extra = {}
        for name, tensor in like.tensors().items():
            shape = list(tensor.shape)
            at = 1 if name in ("values", "index") else 2
            shape[at] = capacity // spec.group_size if spec.axis == "window" else capacity
            extra[name] = tensor.new_zeros(shape)
        return Block(capacity, packed, extra)


def write(block: Block, at: int, run: Encoded, spec: SideSpec) -> None:
    """Store ``run`` from token ``at`` of the block on; what was there is replaced."""
    tokens = run.codes.shape[2]
    if spec.exact:
        block.packed[:, :, at:at + tokens] = run.codes
    else:
        _write_codes(block, at, run.codes, spec.bits)
    size = spec.group_size if spec.axis == "window" else 1
    first, count = at // size, -(-tokens // size)
    for name, tensor in run.tensors().items():
        target = block.extra[name]
        if name in ("values", "index"):
            target[:, first:first + count] = tensor
        else:
            target[:, :, first:first + count] = tensor


def _slices(capacity: int, width: int, start: int, stop: int) -> list[tuple[int, int, int, int]]:
    """``(shift, first row, last row, first token - start)`` of a plane for tokens ``start`` to ``stop``."""
    size, found = capacity * width // 8, []
    for i in range(8 // width):
        low, high = max(start, i * size), min(stop, (i + 1) * size)
        if low < high:
            found.append((i * width, low - i * size, high - i * size, low - start))
    return found


def _write_codes(block: Block, at: int, codes: torch.Tensor, bits: int) -> None:
    shift = base = 0
    for width in bitpack.planes(bits):
        mask = (1 << width) - 1
        for up, low, high, first in _slices(block.capacity, width, at, at + codes.shape[2]):
            part = (codes[:, :, first:first + high - low] >> shift) & mask if bits < 8 else codes[:, :, first:]
            rows = block.packed[:, :, base + low:base + high]
            if width == 8:
                rows.copy_(part[:, :, : high - low])
            else:
                rows.bitwise_and_(0xFF ^ (mask << up)).bitwise_or_(part << up)
        base += block.capacity * width // 8
        shift += width


def read_codes(block: Block, start: int, stop: int, bits: int, out: torch.Tensor) -> torch.Tensor:
    """Codes (uint8) of tokens ``start`` to ``stop`` into ``out`` ``[batch, heads, stop - start, head_dim]``."""
    planes = bitpack.planes(bits)
    shift = base = 0
    for i, width in enumerate(planes):
        mask = (1 << width) - 1
        for down, low, high, first in _slices(block.capacity, width, start, stop):
            rows, to = block.packed[:, :, base + low:base + high], out[:, :, first:first + high - low]
            if width == 8:
                to.copy_(rows)
                continue
            if i == 0:
                part = torch.bitwise_right_shift(rows, down, out=to) if down else rows
                if down + width < 8:
                    torch.bitwise_and(part, mask, out=to)
            else:
                part = torch.bitwise_right_shift(rows, down) if down else rows
                to.bitwise_or_((part & mask) << shift)
        base += block.capacity * width // 8
        shift += width
    return out


def read(side: Side, block: Block, start: int, stop: int) -> Encoded:
    """A run of tokens as it was encoded (``start`` on a window's border)."""
    spec = side.spec
    if spec.exact:
        return Encoded(block.packed[:, :, start:stop])
    batch, heads, _, width = block.packed.shape
    codes = block.packed.new_empty(batch, heads, stop - start, width)
    size = spec.group_size if spec.axis == "window" else 1
    first, last = start // size, -(-stop // size)
    extra = {name: tensor[:, first:last] if name in ("values", "index") else tensor[:, :, first:last]
             for name, tensor in block.extra.items()}
    return Encoded(read_codes(block, start, stop, spec.bits, codes), **extra)


class _Float:
    """Any format: a tile of numbers at a time."""

    @staticmethod
    def scores(query: torch.Tensor, side: Side, tokens: int, out: torch.Tensor, rotary: Rotary | None) -> None:
        for block, start, stop, at in side.tiles(tokens, _tile(query)):
            keys = kv.decode(read(side, block, start, stop), side.spec, side.tables).to(query.dtype)
            keys = keys if rotary is None else rotary.rotate(keys, at, at + stop - start)
            torch.matmul(query, keys.transpose(-1, -2), out=out[..., at:at + stop - start])

    @staticmethod
    def mix(weights: torch.Tensor, side: Side, tokens: int, out: torch.Tensor) -> None:
        for block, start, stop, at in side.tiles(tokens, _tile(out)):
            values = kv.decode(read(side, block, start, stop), side.spec, side.tables).to(weights.dtype)
            out += weights[..., at:at + stop - start] @ values


class _Reference:
    """All tokens at once, in float64: what the others are compared with."""

    @staticmethod
    def whole(side: Side, tokens: int) -> torch.Tensor:
        runs = [read(side, block, start, stop) for block, start, stop, _ in side.tiles(tokens, 1 << 30)]
        return torch.cat([kv.decode(run, side.spec, side.tables).double() for run in runs], dim=2)

    @staticmethod
    def scores(query: torch.Tensor, side: Side, tokens: int, out: torch.Tensor, rotary: Rotary | None) -> None:
        keys = _Reference.whole(side, tokens)
        keys = keys if rotary is None else rotary.rotate(keys, 0, tokens)
        out[..., :tokens] = (query.double() @ keys.transpose(-1, -2)).to(out.dtype)

    @staticmethod
    def mix(weights: torch.Tensor, side: Side, tokens: int, out: torch.Tensor) -> None:
        out += (weights[..., :tokens].double() @ _Reference.whole(side, tokens)).to(out.dtype)


class _Int8:
    """Uniform codes with one scale a token or a channel: integer products, the other operand in two int8 planes."""

    @staticmethod
    def scores(query: torch.Tensor, side: Side, tokens: int, out: torch.Tensor, rotary: Rotary | None) -> None:
        batch, heads, columns, width = query.shape
        spec, shift = side.spec, None
        if not spec.dynamic:  # q . (s c + o) = (q s) . c + q . o
            scale, offset = (t.view(1, heads, 1, width) for t in kv.stored_grid(spec, side.tables))
            shift, query = (query * offset).sum(-1, keepdim=True), query * scale
        total = query.sum(-1, keepdim=True)
        step = (query.abs().amax(-1, keepdim=True) / 127).clamp_(min=1e-30)
        whole = query / step
        high = whole.round()
        planes = torch.cat([high, ((whole - high) * 254).round_()], 2).to(torch.int8).transpose(-1, -2).contiguous()
        # One small product puts the two planes together, and turns tokens into columns.
        joined = torch.cat([torch.diag_embed(step[..., 0]), torch.diag_embed(step[..., 0] / 254)], -1)
        for block, start, stop, at in side.tiles(tokens, _tile(query, 1)):
            codes = scratch("kv", (batch, heads, stop - start, width), torch.uint8)
            read_codes(block, start, stop, spec.bits, codes)
            found = scratch("kv_found", (batch, heads, stop - start, 2 * columns), torch.int32)
            for left, right, to in zip(*(t.flatten(0, 1) for t in (codes, planes, found)), strict=True):
                torch._int_mm(left, right, out=to)
            target = joined @ found.float().transpose(-1, -2)
            if not spec.dynamic:
                torch.add(target, shift, out=out[..., at:at + stop - start])  # type: ignore[arg-type]
                continue
            scale, offset = _token_grid(block, start, stop)
            if spec.zero_point == "int":
                target.addcmul_(total, offset, value=-1)
                torch.mul(target, scale, out=out[..., at:at + stop - start])
            else:
                torch.addcmul(target.mul_(scale), total, offset, out=out[..., at:at + stop - start])

    @staticmethod
    def mix(weights: torch.Tensor, side: Side, tokens: int, out: torch.Tensor) -> None:
        batch, heads, columns, width = out.shape
        spec = side.spec
        half = torch.full((), 0.5)
        for block, start, stop, at in side.tiles(tokens, _tile(out, 1)):
            codes = scratch("kv", (batch, heads, stop - start, width), torch.uint8)
            read_codes(block, start, stop, spec.bits, codes)
            scale, offset = _token_grid(block, start, stop)
            part = weights[..., at:at + stop - start]
            folded = part * scale
            if spec.zero_point == "int":
                constant = -(folded @ offset.transpose(-1, -2))
            else:
                constant = part @ offset.transpose(-1, -2)
            if spec.bits == 8:  # the second operand is signed
                codes.bitwise_xor_(128)
                constant += 128 * folded.sum(-1, keepdim=True)
            step = (folded.amax(-1, keepdim=True) / 65535).clamp_(min=1e-38)
            whole = torch.addcmul(half, folded, 1 / step).to(torch.int32)
            planes = scratch("kv_planes", (batch, heads, 2, columns, stop - start), torch.uint8)
            planes[:, :, 1].copy_(whole)  # keeps the low byte
            planes[:, :, 0].copy_(whole.bitwise_right_shift_(8))
            found = scratch("kv_found", (batch, heads, 2, columns, width), torch.int32)
            left = planes.view(batch * heads, 2 * columns, -1)
            for a, b, to in zip(left, codes.view(torch.int8).flatten(0, 1), found.view(-1, 2 * columns, width),
                                strict=True):
                torch._int_mm(a, b, out=to)
            total = torch.add(found[:, :, 1].float(), found[:, :, 0], alpha=256)
            out += torch.addcmul(constant, total, step)


def _token_grid(block: Block, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset of tokens, float32 ``[batch, rows, 1, tokens]``."""
    scale, offset = (block.extra[name][:, :, start:stop, 0].float()[:, :, None] for name in ("scale", "offset"))
    return scale, offset


def _tile(like: torch.Tensor, itemsize: int = 4) -> int:
    """Tokens of one tile for heads as those of ``like``."""
    batch, heads, _, width = like.shape
    size = (TILE_BYTES if itemsize == 1 else TILE_BYTES // 2) // (batch * heads * width * itemsize)
    return min(max(size // 64 * 64, 64), LONGEST_TILE)


def _plain(case: dispatch.Case) -> bool:
    return case.layout == "uniform" and case.isa in ("avx512", "amx") and case.M <= 64 and exact_unsigned()


dispatch.add_rows([
    dispatch.Row("kv", "cpu", (), dispatch.ANY_BITS, "*", _plain, "int8",
                 "takes uniform codes with one scale a token or stored channel, read as they are, for up to 64 queries "
                 "a head, on AVX512 or AMX with exact products of bytes"),
    dispatch.Row("kv", "*", (), (*dispatch.ANY_BITS, 16), "*", lambda case: True, "float", "serves every format"),
    dispatch.Row("kv", "*", (), (*dispatch.ANY_BITS, 16), "*", lambda case: True, "reference", "serves every format"),
])
_BACKENDS: dict[str, Any] = {"int8": _Int8, "float": _Float, "reference": _Reference}
# Kernels of a device type that do all of `attend` (or return None where they cannot), or encode and write a few tokens
# (or return False).
FUSED: dict[str, Callable[..., torch.Tensor | None]] = {}
APPEND: dict[str, Callable[..., bool]] = {}
# Name of a device type's fused kernel, and ``(query, key, value, rotary)`` to why it cannot serve them (or empty).
WHY_NOT: dict[str, tuple[str, Callable[..., str]]] = {}


def append(side: Side, at: int, x: torch.Tensor) -> bool:
    """Encode and write ``x`` ``[batch, heads, tokens, head_dim]`` from token ``at`` on in one kernel, where there is
    one and the last block has room; else nothing is done."""
    kernel = APPEND.get(x.device.type)
    if kernel is None or not side.blocks:
        return False
    block = side.blocks[-1]
    inside = at - sum(other.capacity for other in side.blocks[:-1])
    if not 0 <= inside <= block.capacity - x.shape[2]:
        return False
    return kernel(block, inside, x, side.spec, side.tables)


def backend_of(side: Side, query: torch.Tensor, tokens: int, plain: bool = True) -> str:
    """Name of the backend that reads ``side`` for ``query`` ``[batch, heads, queries, head_dim]``."""
    return dispatch.choose(_case(side, query.device.type, query, tokens, plain), "attention over the cache").backend


def explain(
    query: torch.Tensor, key: Side, value: Side, tokens: int, *, rotary: Rotary | None = None,
    device: str | None = None,
) -> dict[str, list[dispatch.Choice]]:
    """For "key" and "value" every backend: the one that :func:`attend` takes, and why it takes no other.

    Args:
        query, key, value, tokens, rotary: as for :func:`attend`; blocks may be missing, ``query`` may be on "meta".
        device: device type; default that of ``query``.
    """
    device = device or query.device.type
    first: list[dispatch.Choice] = []
    if device in WHY_NOT:
        name, why_not = WHY_NOT[device]
        why = f"{dispatch.forced()['kv']!r} is forced" if "kv" in (dispatch.forced() or {}) else ""  # type: ignore[index]
        why = why or why_not(query, key, value, rotary)
        first = [dispatch.Choice(name, not why, why or "attends to codes, floats and first tokens in one pass")]
    found = {}
    for name, side, plain in (("key", key, rotary is None), ("value", value, True)):
        rows = dispatch.explain(_case(side, device, query, tokens, plain))
        if first and first[0].chosen:
            rows = [dispatch.Choice(row.backend, False, "could serve it; an earlier row wins") if row.chosen else row
                    for row in rows]
        found[name] = first + rows
    return found


def _case(side: Side, device: str, query: torch.Tensor, tokens: int, plain: bool) -> dispatch.Case:
    spec = side.spec
    whole = spec.axis == "channel" or (spec.axis == "token" and spec.group_size <= 0)
    layout = "uniform" if plain and whole and not spec.table and not spec.outliers and not spec.exact else "table"
    return dispatch.Case(
        "kv", device, query.dtype, spec.bits, query.shape[2], tokens, query.shape[3], spec.group_size, layout,
        isa=isa(),
    )


def attend(
    query: torch.Tensor, key: Side, value: Side, tokens: int, *, scaling: float,
    rotary: Rotary | None = None, mask: torch.Tensor | None = None, softcap: float | None = None,
    recent: tuple[torch.Tensor, torch.Tensor] | None = None,
    sink: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention of ``query`` over stored tokens, then recent ones; softmax and sums in float32.

    Args:
        query: ``[batch, kv_heads, queries, head_dim]``, the query heads of one key head side by side.
        key, value: stored tokens.
        tokens: how many there are.
        rotary: applied to stored keys.
        mask: added to the scores, broadcastable to ``[batch, kv_heads, queries, tokens + recent]``; or bool, true
            where a query attends.
        softcap: bound of the scores.
        recent: exact keys and values after the stored ones, ``[batch, kv_heads, n, head_dim]``.
        sink: exact keys and values of some stored tokens, and their positions ``[batch, n]``; a position of
            ``tokens`` or more is ignored.

    Returns:
        ``[batch, kv_heads, queries, head_dim]``, float32.
    """
    length = tokens + (0 if recent is None else recent[0].shape[2])
    if not length:
        raise KernelError("attention over an empty cache")
    fused = FUSED.get(query.device.type)
    if fused is not None and "kv" not in (dispatch.forced() or {}):
        made = fused(query, key, value, tokens, scaling=scaling, rotary=rotary, mask=mask, softcap=softcap,
                     recent=recent, sink=sink)
        if made is not None:
            return made
    query = query.float() * scaling
    batch, heads, columns, width = query.shape
    scores = query.new_empty(batch, heads, columns, length)
    if tokens:
        _BACKENDS[backend_of(key, query, tokens, rotary is None)].scores(query, key, tokens, scores, rotary)
    if recent is not None:
        torch.matmul(query, recent[0].float().transpose(-1, -2), out=scores[..., tokens:])
    at = None
    if sink is not None:
        at = sink[2].clamp(max=length - 1)[:, None, None].expand(batch, heads, columns, -1)
        known = (sink[2] < tokens)[:, None, None]
        exact = query @ sink[0].float().transpose(-1, -2)
        scores.scatter_add_(-1, at, torch.where(known, exact - scores.gather(-1, at), 0.0))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1)
    if mask is not None:
        weights.nan_to_num_(0.0)  # a query that attends to nothing gets zeros
    out = query.new_zeros(batch, heads, columns, value_width(value, recent, width))
    if at is not None:
        share = torch.where(known, weights.gather(-1, at), 0.0)
        out += share @ sink[1].float()  # type: ignore[index]
        weights.scatter_add_(-1, at, -share)
    if recent is not None:
        out += weights[..., tokens:] @ recent[1].float()
    if tokens:
        _BACKENDS[backend_of(value, out, tokens)].mix(weights, value, tokens, out)
    return out


def value_width(value: Side, recent: Sequence[torch.Tensor] | None, width: int) -> int:
    """Width of the values' heads, which may differ from that of the keys'."""
    if value.blocks:
        return value.blocks[0].packed.shape[-1]
    return width if recent is None else recent[1].shape[-1]
