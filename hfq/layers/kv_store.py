"""The tokens of one run in a quantized cache: appended, read by attention, cut and reordered.

Codes grow in blocks that are allocated once; nothing of the history is copied when a token comes, and reading never
makes floats of more than a tile of tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch

from hfq.errors import QuantizationError
from hfq.formats import kv as codec
from hfq.formats.kv import KVFormat
from hfq.kernels import Choice
from hfq.kernels import kv as kernels
from hfq.layers.kv_cache import CacheQuant, first_tokens, is_sink, unpadded, with_faults
from hfq.layers.rotary import Pair, Positions

__all__ = ["KVStore"]

MOST_SCORES = 1 << 24  # attention weights computed at once


class KVStore:
    """The tokens that one attention module has seen.

    Args:
        quant: the format; the store reads its parameters and does not copy them.
        max_tokens: allocate for so many tokens at once and refuse more; ``None`` grows block by block.
        positions: the cache's list of positions, shared by its layers.
    """

    def __init__(self, quant: CacheQuant, max_tokens: int | None = None, positions: list[Positions] | None = None):
        self.quant, self.max_tokens = quant, max_tokens
        self.shared = [] if positions is None else positions
        self.turns = 0
        self.reset(False)

    def reset(self, said: bool = True) -> None:
        """Forget every token, keep the store."""
        form = KVFormat(codec.SideSpec(16), codec.SideSpec(16)) if self.quant.exact else self.quant.form
        self.form = form
        self.sides = {side: kernels.Side(getattr(form, side), self.quant.tables(side)) for side in ("key", "value")}
        self.stored = 0  # tokens in blocks; the others are in `recent`
        self.length = 0
        self.capacity = 0
        self.start: torch.Tensor | None = None  # first token of each sequence
        self.recent: tuple[torch.Tensor, torch.Tensor] | None = None
        self.sink: tuple[torch.Tensor, torch.Tensor] | None = None
        self.positions: Positions | None = None
        if said:
            self.shared.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> KVStore:
        """The tokens are copied; the format, which belongs to the model, is shared."""
        clone = object.__new__(type(self))
        memo |= {id(self): clone, id(self.quant): self.quant}
        vars(clone).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return clone

    # Filling

    def append(
        self, key: torch.Tensor, value: torch.Tensor, pair: Pair | None = None, mask: torch.Tensor | None = None
    ) -> None:
        """Store keys and values ``[batch, heads, tokens, width]`` (keys with their positions).

        Raises:
            QuantizationError: more tokens than there is room for, or another batch than before.
        """
        batch, _, tokens, _ = key.shape
        if self.length and batch != self.batch:
            raise QuantizationError(f"{self.quant.label}: the cache holds {self.batch} sequences, {batch} came")
        if self.max_tokens is not None and self.length + tokens > self.max_tokens:
            raise QuantizationError(f"{self.quant.label}: the cache is allocated for {self.max_tokens} tokens, "
                                    f"{self.length + tokens} are needed: make it with a larger length")
        self.quant.heads = self.quant.heads or key.shape[1]
        self._begin(key, value, mask)
        angles = None if self.quant.exact else self.quant.angles(pair)
        if angles is not None:
            self._place(pair, angles, tokens)  # type: ignore[arg-type]
        self._keep_sink(key, value)
        self.length += tokens
        if self.form.residual:
            self._through_recent(key, value)
        else:
            self._store(key, value)

    @property
    def batch(self) -> int:
        return 0 if self.start is None else self.start.shape[0]

    def _begin(self, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> None:
        found = first_tokens(mask, key.shape[0], self.length + key.shape[2], key.device)
        if self.start is None:
            self.start = found
            if self.form.sink:
                with torch.inference_mode(False):
                    self.sink = tuple(t.new_zeros(*t.shape[:2], self.form.sink, t.shape[3])  # type: ignore[assignment]
                                      for t in (key, value))
        else:  # rows that were nothing but padding until now
            self.start = torch.where(self.start >= self.length, found.clamp(min=self.length), self.start)

    def _place(self, pair: Pair, angles: Pair, tokens: int) -> None:
        if self.positions is None:
            fitting = (p for p in self.shared if p.length == tokens and p.last is pair[0])
            self.positions = next(fitting, None)
            if self.positions is None:
                self.positions = Positions()
                self.positions.done = self.turns
                self.shared.append(self.positions)
        self.positions.append(pair, angles, self.length + tokens)

    def _keep_sink(self, key: torch.Tensor, value: torch.Tensor) -> None:
        if self.sink is None or self.start is None:
            return
        at = torch.arange(self.length, self.length + key.shape[2], device=key.device)[None] - self.start[:, None]
        rows, columns = ((at >= 0) & (at < self.form.sink)).nonzero(as_tuple=True)
        for kept, new in zip(self.sink, (key, value), strict=True):
            kept[rows, :, at[rows, columns]] = new[rows, :, columns].to(kept.dtype)

    def _through_recent(self, key: torch.Tensor, value: torch.Tensor) -> None:
        if self.recent is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(self.recent, (key, value), strict=True))
        full = key.shape[2] // self.form.residual * self.form.residual
        if full:
            self._store(key[:, :, :full], value[:, :, :full])
        self.recent = (key[:, :, full:].clone(), value[:, :, full:].clone()) if full < key.shape[2] else None

    def _store(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Encode tokens that follow those in the blocks."""
        tokens, first = key.shape[2], self.stored
        value = with_faults(key, value, self.form)
        if self.positions is not None:
            angles = self.positions.range(first, first + tokens)
            key = self.quant.rotary.undo(key, angles)  # type: ignore[union-attr]
        for name, x in (("key", key), ("value", value)):
            side = self.sides[name]
            x = unpadded(x, self.start, first, side.spec)
            if not kernels.append(side, first, x):
                self._write(side, codec.encode(x, side.spec, side.tables), first, tokens)
        self.stored = first + tokens
        self.capacity = sum(block.capacity for block in self.sides["key"].blocks)

    def _write(self, side: kernels.Side, run: codec.Encoded, first: int, tokens: int) -> None:
        done = 0
        while done < tokens:
            held = sum(block.capacity for block in side.blocks)
            if held == first + done:
                side.blocks.append(kernels.empty_block(run, side.spec, self._size(held, tokens - done)))
                continue
            block = side.blocks[-1]
            count = min(held - first - done, tokens - done)
            kernels.write(block, block.capacity - (held - first - done), run.part(done, done + count, side.spec),
                          side.spec)
            done += count

    def _size(self, held: int, tokens: int) -> int:
        """Tokens of a new block: the first one fits the prompt, later ones a small share of what there is."""
        step = math.lcm(64, self.form.window)
        if self.max_tokens is not None:
            return -(-self.max_tokens // step) * step
        if not held:
            return -(-tokens // step) * step
        return -(-max(tokens, 256, held // 32) // step) * step

    # Reading

    def attend(
        self, query: torch.Tensor, mask: torch.Tensor | None, *, scaling: float, softcap: float | None = None,
        causal: bool = True,
    ) -> torch.Tensor:
        """Attention of ``query`` ``[batch, query_heads, q, head_dim]`` over everything stored.

        Args:
            mask: ``[batch or 1, 1 or query_heads, q, length or more]``, added or bool; ``None``: the queries are the
                last tokens, each attends to those before it and to itself (``causal``).

        Returns:
            ``[batch, q, query_heads, value_dim]`` of the dtype of ``query``.
        """
        batch, heads, count, width = query.shape
        groups = heads // self.quant.heads
        if mask is None and count > 1 and causal:
            reach = torch.arange(self.length - count, self.length, device=query.device)
            mask = (torch.arange(self.length, device=query.device) <= reach[:, None])[None, None]
        if mask is not None and mask.shape[-1] < self.length:
            raise QuantizationError(f"{self.quant.label}: a mask over {mask.shape[-1]} tokens, the cache holds "
                                    f"{self.length}")
        step = max(1, MOST_SCORES // (batch * heads * self.length))
        parts = []
        for first in range(0, count, step):
            part = query[:, :, first:first + step]
            rows = part.shape[2]
            found = kernels.attend(
                part.reshape(batch, self.quant.heads, groups * rows, width), self.sides["key"], self.sides["value"],
                self.stored, scaling=scaling, softcap=softcap, rotary=None if self.positions is None else self,
                mask=self._mask(mask, first, rows, groups), recent=self.recent, sink=self._sinks(),
            )
            parts.append(found.view(batch, heads, rows, -1))
        return torch.cat(parts, 2).transpose(1, 2).contiguous().to(query.dtype)

    def rotate(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Stored keys of tokens ``start`` to ``stop`` with their positions."""
        return self.quant.rotary.turn(x, self.positions.range(start, stop), 1)  # type: ignore[union-attr]

    def halves(self) -> bool:
        """Whether the rotary embedding turns the two halves of a whole head together."""
        spec = self.quant.rotary
        return spec is not None and spec.pairing == "half" and spec.start == 0 and spec.size == self.quant.head_dim

    def angles(self, start: int, stop: int) -> Pair:
        """Cosines and sines of stored tokens, ``[batch or 1, stop - start, size / 2]``."""
        return self.positions.range(start, stop)  # type: ignore[union-attr]

    def _mask(self, mask: torch.Tensor | None, first: int, rows: int, groups: int) -> torch.Tensor | None:
        if mask is None:
            return None
        mask = mask[:, :, first:first + rows, : self.length]
        if mask.shape[1] > 1:
            return mask.reshape(mask.shape[0], self.quant.heads, groups * rows, -1)
        return mask[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)

    def _sinks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        if self.sink is None or self.start is None or not self.stored:
            return None
        at = self.start[:, None] + torch.arange(self.form.sink, device=self.start.device)
        return (*self.sink, at)

    def explain(self, M: int = 1, tokens: int = 8192, device: str | None = None) -> dict[str, list[Choice]]:
        """For "key" and "value" every backend of :func:`hfq.kernels.kv.attend` for ``M`` queries of a key head."""
        query = torch.empty(1, self.quant.heads or 1, M, self.quant.head_dim, device="meta")
        rotary = None if self.quant.rotary is None else self
        return kernels.explain(query, self.sides["key"], self.sides["value"], tokens, rotary=rotary, device=device)

    # Cutting and reordering

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        if length >= self.length or length < 0:
            return
        self.turns += 1
        if length == 0:
            turns = self.turns
            self.reset(False)
            self.turns = turns
            self.shared.clear()
            return
        if length >= self.stored:
            count = length - self.stored
            self.recent = None if not count else tuple(t[:, :, :count] for t in self.recent)  # type: ignore
        else:
            self._cut_blocks(length)
        self.length = length
        self._changed(None, length)

    def _cut_blocks(self, length: int) -> None:
        """Cut stored tokens; those of a window that is cut become recent ones, as they are read."""
        keep = length // self.form.residual * self.form.residual if self.form.residual else length
        recent = []
        for side, name in ((side, name) for name, side in self.sides.items()):
            if keep < length:
                runs = [codec.decode(kernels.read(side, block, a, b), side.spec, side.tables)
                        for block, a, b, at in side.tiles(self.stored, self.form.window)
                        if keep <= at < length]
                x = torch.cat(runs, 2)[:, :, : length - keep]
                x = self.rotate(x, keep, length) if name == "key" and self.positions is not None else x
                x = self._with_sink(x, keep, 0 if name == "key" else 1)
                recent.append(x.to(torch.float32 if self.recent is None else self.recent[0].dtype))
            held, kept = 0, []
            for block in side.blocks:
                if held < keep:
                    kept.append(block)
                held += block.capacity
            side.blocks = kept
        self.recent = (recent[0], recent[1]) if recent else None
        self.stored = keep

    def _with_sink(self, x: torch.Tensor, first: int, side: int) -> torch.Tensor:
        """Tokens from ``first`` on, those at the beginning of a sequence as they were."""
        if self.sink is None or self.start is None:
            return x
        kept = is_sink(self.start, first, x.shape[2], self.form.sink)
        at = torch.arange(first, first + x.shape[2], device=x.device)[None] - self.start[:, None]
        at = at.clamp(0, self.form.sink - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return torch.where(kept[:, None, :, None], self.sink[side].to(x.dtype).gather(2, at), x)

    def change_rows(self, what: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the sequences: ``what`` selects or repeats along the first axis."""
        if not self.length:
            return
        self.turns += 1
        with torch.inference_mode(False), torch.no_grad():  # later tokens may come outside of inference mode
            for side in self.sides.values():
                for block in side.blocks:
                    block.packed = what(block.packed)
                    block.extra = {name: what(tensor) for name, tensor in block.extra.items()}
            self.recent = None if self.recent is None else tuple(map(what, self.recent))  # type: ignore[assignment]
            self.sink = None if self.sink is None else tuple(map(what, self.sink))  # type: ignore[assignment]
            self.start = what(self.start)  # type: ignore[arg-type]
            self._changed(what, None)

    def _changed(self, what: Callable[[torch.Tensor], torch.Tensor] | None, length: int | None) -> None:
        if self.positions is not None:
            self.positions.change(self.turns, what, length)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that holds tokens, without the positions."""
        found = [t for side in self.sides.values() for block in side.blocks for t in block.tensors().values()]
        return [*found, *(self.recent or ()), *(self.sink or ())]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, the positions (shared with other layers) included."""
        return sum(t.nbytes for t in self.tensors()) + (0 if self.positions is None else self.positions.nbytes)
