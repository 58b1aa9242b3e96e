"""What is known of a quantized key-value cache before the first token: the format, calibrated ranges, tables.

A child of the attention module's :class:`hfq.layers.attention.AttentionQuant`; ``kv_store`` holds the tokens of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hfq.errors import CheckpointError, ConfigError, QuantizationError
from hfq.formats import kv as codec
from hfq.formats.kv import KVFormat, Tables
from hfq.layers.rotary import Pair, RotarySpec

__all__ = ["CacheQuant", "empty_cache", "first_tokens", "is_sink", "unpadded", "with_faults"]

_SAME_WIDTH = {2: torch.int16, 4: torch.int32}
_LEAVES = ("key_low", "key_high", "key_encode", "key_decode", "value_encode", "value_decode")


class CacheQuant(nn.Module):
    """How the keys and values of one attention module are stored.

    Args:
        form: the format.
        heads: key-value heads; 0 if they are to be counted when the first token comes.
        head_dim, value_dim: width of a head of keys, of values.
        rotary: how the module rotates its keys; needed to store keys without their positions.
        tables: ``key_low``, ``key_high`` ``[heads * head_dim]`` and the tables ``key_encode``, ``key_decode``,
            ``value_encode``, ``value_decode`` ``[2**bits]``, as far as the format has them; default empty parameters.

    Raises:
        QuantizationError: the tensors do not belong to the format.
    """

    _is_hf_initialized = True

    def __init__(
        self, form: KVFormat, heads: int, head_dim: int, value_dim: int | None = None, *,
        rotary: RotarySpec | None = None, tables: dict[str, torch.Tensor] | None = None, device: Any = None,
    ) -> None:
        super().__init__()
        self.form, self.heads, self.head_dim, self.value_dim = form, heads, head_dim, value_dim or head_dim
        self.rotary, self.label, self.exact = rotary if form.pre_rope else None, "", False
        wanted = self._shapes()
        if tables is not None and set(tables) != set(wanted):
            raise QuantizationError(f"a cache of this format takes {sorted(wanted)}; found {sorted(tables)}")
        for name in _LEAVES:
            self.register_parameter(name, None)
        for name, (shape, dtype) in wanted.items():
            tensor = torch.empty(shape, dtype=dtype, device=device) if tables is None else tables[name].detach()
            if tuple(tensor.shape) != shape:
                raise QuantizationError(f"{name} of {tuple(tensor.shape)}; {shape} is needed")
            setattr(self, name, nn.Parameter(tensor.to(dtype).clone(), requires_grad=False))
        if tables is not None:
            self.check(QuantizationError)

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for side, spec in (("key", self.form.key), ("value", self.form.value)):
            if spec.axis == "channel" and not spec.exact:
                ends = ((self.heads * self.head_dim,), torch.float16)
                found |= {f"{side}_low": ends, f"{side}_high": ends}
            if spec.table and not spec.exact:
                table = ((1 << spec.bits,), torch.float32)
                found |= {f"{side}_encode": table, f"{side}_decode": table}
        return found

    def tables(self, side: str) -> Tables:
        """What a side's codes are made and read with."""
        parts = {leaf: self._parameters.get(f"{side}_{leaf}") for leaf in ("low", "high", "encode", "decode")}
        return Tables(**{leaf: None if p is None else p.detach() for leaf, p in parts.items()})

    def check(self, error: type[Exception] = CheckpointError) -> None:
        """Raise ``error`` unless the parameters can be computed with."""
        for name in self._shapes():
            tensor = self._parameters[name]
            if tensor is None or tensor.is_meta:
                continue
            if not torch.isfinite(tensor).all():
                raise error(f"{self.label}.{name} has elements that are not finite")
            if name.endswith("encode") and not (tensor.diff() >= 0).all():
                raise error(f"{self.label}.{name} is not sorted")
        low, high = self._parameters.get("key_low"), self._parameters.get("key_high")
        if low is not None and high is not None and not low.is_meta and not (low <= high).all():
            raise error(f"{self.label}.key_low is above key_high")

    def fake(
        self, key: torch.Tensor, value: torch.Tensor, pair: Pair | None = None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[batch, heads, tokens, width]`` as they are read from a cache that holds all of them."""
        form = self.form
        if self.exact:
            return key, value
        start = first_tokens(mask, key.shape[0], key.shape[2], key.device)
        angles = self.angles(pair)
        keys = key if angles is None else self.rotary.undo(key, angles)  # type: ignore[union-attr]
        new = []
        values = with_faults(key, value, form)
        for x, spec, side in ((keys, form.key, "key"), (values, form.value, "value")):
            new.append(codec.fake(unpadded(x, start, 0, spec), spec, self.tables(side)))
        if angles is not None:
            new[0] = self.rotary.turn(new[0], angles, 1)  # type: ignore[union-attr]
        if form.sink:
            kept = is_sink(start, 0, key.shape[2], form.sink)
            new = [torch.where(kept[:, None, :, None], old, x) for old, x in zip((key, value), new, strict=True)]
        rounded = [x.to(old.dtype) for x, old in zip(new, (key, value), strict=True)]
        # Straight through: rounding has no gradient of its own.
        passed = [old + (x - old).detach() if old.requires_grad else x
                  for x, old in zip(rounded, (key, value), strict=True)]
        return passed[0], passed[1]

    def angles(self, pair: Pair | None) -> Pair | None:
        """Angles of the tokens of a call, once each; ``None`` where keys are stored with their positions."""
        if self.rotary is None:
            return None
        if pair is None:
            raise QuantizationError(f"{self.label}: called without the positions that its keys are rotated by")
        return self.rotary.angles_of(pair)

    def bits_per_element(self, itemsize: int = 4) -> float:
        """Stored bits of one cached number, mean over keys and values, all metadata included."""
        return self.form.bits_per_element(self.heads, self.head_dim, itemsize)

    def nbytes_of(self, batch: int, tokens: int, itemsize: int = 4, rows: int = 1) -> float:
        """Bytes of a cache of so many tokens by the formula: codes, scales, outliers, sink, recent and positions.

        Args:
            rows: different rows of position ids (1, or ``batch`` with left padding); their angles count for each layer
                here although layers share them.
        """
        form, width = self.form, self.head_dim + self.value_dim
        recent = tokens % form.residual if form.residual else 0
        total = 0.0
        for spec, wide in ((form.key, self.head_dim), (form.value, self.value_dim)):
            bits = spec.bits_per_element(self.heads, wide, itemsize)
            total += batch * (tokens - recent) * self.heads * wide * bits / 8
        total += batch * (recent + min(form.sink, tokens)) * self.heads * width * itemsize
        return total + (0 if self.rotary is None else rows * tokens * self.rotary.size * itemsize)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CacheQuant:
        """Ranges and tables move, and keep their dtype under casts of the model."""
        for name in self._shapes():
            data = self._parameters[name].detach()  # type: ignore[union-attr]
            moved = fn(data.view(_SAME_WIDTH[data.element_size()])).view(data.dtype)
            self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        return self

    def same_as(self, other: CacheQuant) -> bool:
        """Whether tokens that one of the two stored can be read by the other."""
        if self is other:
            return True
        mine, theirs = self.describe(), other.describe()
        if not (self.heads and other.heads):  # not counted yet by one of them
            mine["heads"] = theirs["heads"] = 0
        if mine != theirs or self.exact != other.exact:
            return False
        pairs = [(self._parameters[name], other._parameters[name]) for name in self._shapes()]
        return all(torch.equal(a, b.to(a.device)) for a, b in pairs)  # type: ignore[union-attr]

    def describe(self) -> dict[str, Any]:
        """The manifest entry, JSON only."""
        return {
            "format": self.form.to_dict(), "heads": self.heads, "head_dim": self.head_dim,
            "value_dim": self.value_dim, "rotary": None if self.rotary is None else self.rotary.to_dict(),
        }

    def extra_repr(self) -> str:
        return f"{self.heads} heads of {self.head_dim}, {self.bits_per_element():.2f} bits"


def empty_cache(entry: Any, name: str, device: Any = None) -> CacheQuant:
    """The empty part that a manifest entry describes.

    Raises:
        CheckpointError: the entry makes no sense.
    """
    known = {"format", "heads", "head_dim", "value_dim", "rotary"}
    sizes = [entry[field] for field in ("heads", "head_dim", "value_dim")] if isinstance(entry, dict) and set(
        entry) == known else []
    if not sizes or not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 16 for n in sizes):
        raise CheckpointError(f"the cache of {name!r} in the manifest is damaged: {entry!r}")
    try:
        rotary = None if entry["rotary"] is None else RotarySpec.from_dict(entry["rotary"])
        return CacheQuant(KVFormat.from_dict(entry["format"]), *sizes, rotary=rotary, device=device)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"the cache of {name!r} in the manifest cannot be built: {error}") from error


def first_tokens(mask: torch.Tensor | None, batch: int, tokens: int, device: Any) -> torch.Tensor:
    """Position of the first token of each sequence ``[batch]``: padding on the left is attended to by nobody."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    mask = mask[..., :tokens]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = seen.flatten(1, 2).any(1)
    first = torch.where(seen.any(-1), seen.int().argmax(-1), tokens)
    return first.expand(batch).to(device)


def is_sink(start: torch.Tensor, first: int, tokens: int, sink: int) -> torch.Tensor:
    """Which tokens from ``first`` on are among the first ``sink`` of their sequence, ``[batch, tokens]``."""
    at = torch.arange(first, first + tokens, device=start.device)[None] - start[:, None]
    return (at >= 0) & (at < sink)


def with_faults(key: torch.Tensor, value: torch.Tensor, form: KVFormat) -> torch.Tensor:
    """Values that are NaN where a key of the token and head is not finite: codes of stored ranges cannot say so."""
    if form.key.exact or form.key.dynamic:
        return value
    return value + (key * 0).sum(-1, keepdim=True).to(value.dtype)


def unpadded(x: torch.Tensor, start: torch.Tensor | None, first: int, spec: codec.SideSpec) -> torch.Tensor:
    """Padding replaced by the first token after it: it must not widen the range of a window of tokens."""
    if spec.axis != "window" or spec.exact or start is None or not bool((start > first).any()):
        return x
    at = torch.arange(first, first + x.shape[2], device=x.device)[None].expand(x.shape[0], -1)
    at = torch.maximum(at, start[:, None]).clamp(max=first + x.shape[2] - 1) - first
    return x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
