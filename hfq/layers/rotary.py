"""Rotary embeddings of any model: found in what an attention module is called with, proven, applied and undone.

An attention module that rotates its keys gets the cosines and sines of its tokens' positions as a pair of tensors.
Which elements of a head belong together is not written anywhere; the candidates are tried on the module itself, called
once with the pair it gets and once with an angle of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hfq.errors import CheckpointError, QuantizationError

__all__ = ["Positions", "RotarySpec", "pair_of", "prove"]

Pair = tuple[torch.Tensor, torch.Tensor]
TOLERANCE = 1e-4


@dataclass(frozen=True)
class RotarySpec:
    """How a head of keys is rotated.

    Args:
        start, size: the elements that are rotated.
        pairing: "half" element i with element i + size / 2, "next" element 2 i with 2 i + 1.
        angles: where the ``size / 2`` angles stand in the tensors of a module: "half" in their first half (the second
            repeats it), "next" at even places (odd ones repeat them), "all".
    """

    start: int
    size: int
    pairing: str
    angles: str

    def angles_of(self, pair: Pair) -> Pair:
        """Cosines and sines ``[batch or 1, tokens, size / 2]``, once each."""
        return tuple(self._once(t) for t in pair)  # type: ignore[return-value]

    def _once(self, x: torch.Tensor) -> torch.Tensor:
        if self.angles == "half":
            return x[..., : self.size // 2]
        return x[..., 0: self.size: 2] if self.angles == "next" else x[..., : self.size // 2]

    def turn(self, x: torch.Tensor, angles: Pair, sign: int) -> torch.Tensor:
        """``x`` ``[batch, heads, tokens, head_dim]`` turned by the angles (1), or by their opposites (-1)."""
        stop = self.start + self.size
        part = x[..., self.start:stop]
        a, b = part.chunk(2, dim=-1) if self.pairing == "half" else (part[..., 0::2], part[..., 1::2])
        cos, sin = (t[:, None].to(x.dtype) for t in angles)
        sin = sin * sign
        first, second = a * cos - b * sin, b * cos + a * sin
        half = self.pairing == "half"
        turned = torch.cat([first, second], -1) if half else torch.stack([first, second], -1).flatten(-2)
        if self.size == x.shape[-1]:
            return turned
        return torch.cat([x[..., : self.start], turned, x[..., stop:]], dim=-1)

    def undo(self, x: torch.Tensor, angles: Pair) -> torch.Tensor:
        """The keys that :meth:`turn` makes ``x`` of; float32 unless float64."""
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        cos, sin = (t.to(work.dtype) for t in angles)
        length = cos.square() + sin.square()  # not 1 where a model scales its embedding
        return self.turn(work, (cos / length, sin / length), -1)

    def adjoint(self, x: torch.Tensor, angles: Pair) -> torch.Tensor:
        """The gradient of the keys before rotation, from that of the rotated ones."""
        return self.turn(x, angles, -1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> RotarySpec:
        if not isinstance(data, dict) or set(data) != set(cls.__dataclass_fields__):
            raise CheckpointError(f"the rotary embedding {data!r} in the manifest is damaged")
        spec = cls(**data)
        whole = all(type(n) is int and 0 <= n < 1 << 16 for n in (spec.start, spec.size))
        if not whole or spec.size % 2 or spec.pairing not in ("half", "next") or spec.angles not in _ANGLES:
            raise CheckpointError(f"the rotary embedding {data!r} in the manifest is damaged")
        return spec


_ANGLES = ("half", "next", "all")


def pair_of(args: tuple, kwargs: dict[str, Any]) -> Pair | None:
    """The cosines and sines ``[batch or 1, tokens, n]`` among the arguments of an attention module."""
    for value in (*kwargs.values(), *args):
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(t, torch.Tensor) for t in value):
            cos, sin = value
            if cos.shape == sin.shape and cos.dim() == 3 and cos.is_floating_point() and sin.is_floating_point():
                return cos, sin
    return None


def _candidates(size: int, width: int) -> Iterator[RotarySpec]:
    for angles, rotated in (("half", size), ("next", size), ("all", 2 * size)):
        for pairing in ("half", "next"):
            if rotated <= width and rotated % 2 == 0:
                for start in dict.fromkeys((0, width - rotated)):
                    yield RotarySpec(start, rotated, pairing, angles)


class Positions:
    """Cosines and sines of all cached tokens, shared by the layers that get the same ones.

    Every layer announces the same operations in the same order; the first one to come performs each.
    """

    def __init__(self) -> None:
        self.blocks: list[list[torch.Tensor]] = []
        self.length = 0
        self.last: Any = None
        self.done = 0

    def append(self, pair: Pair, angles: Pair, length: int) -> None:
        """Make the positions ``length`` tokens long with ``angles``; nothing to do if another layer did."""
        if self.length == length and self.last is pair[0]:
            return
        if self.length + angles[0].shape[1] != length:
            raise QuantizationError("the layers of a cache got different positions: their lengths do not agree")
        self.last = pair[0]
        rows = 1 if all(bool((t == t[:1]).all()) for t in angles) else angles[0].shape[0]
        new = [t.detach()[:rows] for t in angles]
        at, start = 0, self.length
        while at < new[0].shape[1]:
            room = self._room(start, new, rows)
            count = min(room, new[0].shape[1] - at)
            block = self.blocks[-1]
            if block[0].shape[0] < rows:
                with torch.inference_mode(False):
                    block[:] = [t.expand(rows, -1, -1).clone() for t in block]
            offset = start - sum(b[0].shape[1] for b in self.blocks[:-1])
            for target, source in zip(block, new, strict=True):
                target[:, offset:offset + count] = source[:, at:at + count]
            at, start = at + count, start + count
        self.length = length

    def _room(self, start: int, new: list[torch.Tensor], rows: int) -> int:
        held = sum(block[0].shape[1] for block in self.blocks)
        if held == start:
            size = max(-(-new[0].shape[1] // 64) * 64 if not self.blocks else 256, 64)
            with torch.inference_mode(False):
                self.blocks.append([t.new_empty(rows, size, t.shape[2]) for t in new])
            return size
        return held - start

    def range(self, start: int, stop: int) -> Pair:
        """Angles of tokens ``start`` to ``stop``."""
        parts: list[list[torch.Tensor]] = [[], []]
        first = 0
        for block in self.blocks:
            last = first + block[0].shape[1]
            low, high = max(start, first), min(stop, last)
            if low < high:
                for part, tensor in zip(parts, block, strict=True):
                    part.append(tensor[:, low - first:high - first])
            first = last
        rows = max(t.shape[0] for t in parts[0])
        joined = [part[0] if len(part) == 1 else torch.cat([t.expand(rows, -1, -1) for t in part], 1) for part in parts]
        return joined[0], joined[1]

    def change(self, turn: int, what: Callable[[torch.Tensor], torch.Tensor] | None, length: int | None) -> None:
        """The ``turn``-th operation of a layer: change the rows by ``what``, cut to ``length`` tokens."""
        if turn <= self.done:
            return
        self.done = turn
        if what is not None:
            for block in self.blocks:
                if block[0].shape[0] > 1:
                    block[:] = [what(t) for t in block]
        if length is not None:
            self.length, self.last, held, kept = length, None, 0, []
            for block in self.blocks:
                if held < length:
                    kept.append(block)
                held += block[0].shape[1]
            self.blocks = kept

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for block in self.blocks for t in block)


def prove(model: nn.Module, names: list[str], call: Callable[[], Any]) -> dict[str, RotarySpec | None]:
    """How each of the attention modules ``names`` rotates its keys; ``None`` where positions do not enter them.

    Args:
        call: runs one forward pass of the whole model, with several tokens.

    Raises:
        QuantizationError: positions enter the keys in a way that is not understood.
    """
    from hfq.layers import attention

    found: dict[str, RotarySpec | None] = {}
    modules = {model.get_submodule(name): name for name in names}
    keys: list[torch.Tensor] = []
    busy: list[bool] = []

    def observer(module: nn.Module, query: Any, key: torch.Tensor, *rest: Any) -> None:
        if module in modules:
            keys.append(key.detach().float())

    def keys_of(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        keys.clear()
        module.forward(*args, **kwargs)
        return keys[-1]

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if busy or modules[module] in found:
            return
        busy.append(True)
        try:
            args, kwargs = _without_cache(args, kwargs)
            found[modules[module]] = _prove_one(modules[module], lambda a, k: keys_of(module, a, k), args, kwargs)
        finally:
            busy.clear()

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    try:
        with attention.observing(model, observer), torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in names if name not in found]
    if missing:
        raise QuantizationError(f"{missing[0]} was not called: its rotary embedding cannot be proven")
    return found


def _without_cache(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    def plain(value: Any) -> Any:
        return None if hasattr(value, "layers") and hasattr(value, "update") else value

    return tuple(plain(a) for a in args), {name: plain(value) for name, value in kwargs.items()}


def _prove_one(
    name: str, keys_of: Callable[[tuple, dict[str, Any]], torch.Tensor], args: tuple, kwargs: dict[str, Any]
) -> RotarySpec | None:
    pair, exact = pair_of(args, kwargs), keys_of(args, kwargs)
    if pair is None:
        same = [_same_everywhere(value) for value in (args, tuple(kwargs.values()))]
        keys = keys_of(same[0], dict(zip(kwargs, same[1], strict=True)))
        if (keys - keys[:, :, :1]).abs().max() <= TOLERANCE * keys.abs().max():
            return None
        raise QuantizationError(f"{name}: positions enter its keys in a way that is not understood: keys can only be "
                                "stored with their positions (pre_rope=False)")
    none = (torch.ones_like(pair[0]), torch.zeros_like(pair[1]))

    def swapped(value: Any) -> Any:
        return none if isinstance(value, (tuple, list)) and len(value) == 2 and value[0] is pair[0] else value

    plain = keys_of(tuple(map(swapped, args)), {key: swapped(value) for key, value in kwargs.items()})
    for spec in _candidates(pair[0].shape[-1], plain.shape[-1]):
        angles = spec.angles_of((pair[0].float(), pair[1].float()))
        turned, back = spec.turn(plain, angles, 1), spec.undo(exact, angles)
        limit = TOLERANCE if pair[0].dtype == torch.float32 else 2e-2
        if (turned - exact).norm() <= limit * exact.norm() and (back - plain).norm() <= limit * plain.norm():
            return spec
    raise QuantizationError(f"{name}: how it rotates its keys is not understood: keys can only be stored with their "
                            "positions (pre_rope=False)")


def _same_everywhere(values: tuple) -> tuple:
    """Hidden states ``[batch, tokens, features]`` replaced by their first token."""
    return tuple(v[:, :1].expand_as(v).contiguous()
                 if isinstance(v, torch.Tensor) and v.dim() == 3 and v.is_floating_point() else v for v in values)
