"""One block of an integer-only decoder: norm, attention, norm, gated or plain MLP, on an int32 residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfq.errors import CheckpointError
from hfq.formats.dyadic import Dyadic, round_div
from hfq.kernels import dyadic
from hfq.layers.integer import IntegerMatrix, IntegerModule, IntegerNorm

__all__ = ["ROLES", "BlockShape", "Grids", "IntegerBlock", "Numbers", "Stream", "place"]

ROLES = ("norm1", "query", "key", "value", "query_norm", "key_norm", "out", "norm2", "gate", "up", "down")
_ROWS = 64  # tokens of the wide parts that are worked on at once: what fits the cache
_ROTARY_BITS = 15

Stream = tuple[Dyadic, Tensor]


@dataclass(frozen=True)
class Numbers:
    """Widths of an integer model.

    Attributes:
        activation_bits: inputs of the linear layers, and queries.
        kv_bits: keys and values.
        mantissa_bits: of the scale of a row, 8 or 16.
        nonlinear_bits: inputs of the gated unit and of the softmax, 8 to 16; 16 takes the softmax's accumulators as
            they are.
        sigmoid_bits, probability_bits: outputs of the sigmoid and of the softmax.
        clip: dyadic width ``(mantissa, shift)`` of the softmax's window.
    """

    activation_bits: int = 8
    kv_bits: int = 8
    mantissa_bits: int = 8
    nonlinear_bits: int = 8
    sigmoid_bits: int = 8
    probability_bits: int = 16
    clip: tuple[int, int] = (240, 4)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "clip": list(self.clip)}

    @classmethod
    def from_dict(cls, values: Any) -> Numbers:
        limits = {"activation_bits": (2, 8), "kv_bits": (2, 8), "mantissa_bits": (8, 16), "nonlinear_bits": (6, 16),
                  "sigmoid_bits": (8, 16), "probability_bits": (8, 16)}
        if not isinstance(values, Mapping) or set(values) != {*limits, "clip"}:
            raise CheckpointError("the manifest's numbers of the integer model have missing or unknown fields")
        clip = values["clip"]
        pair = isinstance(clip, (list, tuple)) and len(clip) == 2 and all(type(v) is int for v in clip)
        good = pair and 0 < clip[0] < 1 << 16 and -8 <= clip[1] <= 16
        if not good or any(type(values[k]) is not int or not a <= values[k] <= b for k, (a, b) in limits.items()):
            raise CheckpointError(f"the manifest's numbers of the integer model are out of range: {dict(values)}")
        return cls(**{**values, "clip": (clip[0], clip[1])})


@dataclass(frozen=True)
class BlockShape:
    """Heads of a block, and which function its MLP has ("silu" or "relu")."""

    heads: int
    groups: int
    size: int
    activation: str
    interleaved: bool = False


class Grids(IntegerModule):
    """Static scales of a block's attention and gated unit.

    Args:
        channels: key channels (groups times head size).
        groups: key-value heads.
        gated: channels of the gated unit whose gate is divided by a smoothing scale; 0 for none.
        shifts: of ``key_step`` (what a query channel is multiplied with), ``key_inverse`` (codes per unit of a key
            channel), ``value_step`` and ``gate_inverse``.
    """

    kind = "grids"
    key_step: nn.Parameter
    key_inverse: nn.Parameter
    value_step: nn.Parameter
    gate_inverse: nn.Parameter | None
    names = ("key_step", "key_inverse", "value_step", "gate_inverse")

    def __init__(self, channels: int, groups: int, gated: int, shifts: tuple[int, ...] = (0,) * 4, device: Any = None):
        super().__init__()
        self.channels, self.groups, self.gated, self.shifts = channels, groups, gated, tuple(shifts)
        for name, size in zip(self.names, (channels, channels, groups, gated), strict=True):
            self.put(name, torch.empty(size, dtype=torch.int16, device=device) if size else None)

    def derive(self) -> tuple[Tensor | None, ...]:
        """The scales as int64, in the order of ``names``."""
        found = (self._parameters[name] for name in self.names)
        return tuple(None if p is None else p.detach().to(torch.int64) for p in found)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "channels": self.channels, "groups": self.groups, "gated": self.gated,
                "shifts": list(self.shifts)}

    def check(self) -> None:
        for name in self.names:
            self._check_mantissas(name)


class IntegerBlock(nn.Module):
    """A pre-norm decoder block; its modules keep the names that they had in the float block.

    Args:
        roles: role to path within the block; ``query_norm``, ``key_norm`` and ``gate`` may be missing.
        shape: heads and activation.
        numbers: widths.
        index: position in the stack, for the cache.
    """

    hfq_grids: Grids

    def __init__(self, roles: Mapping[str, str], shape: BlockShape, numbers: Numbers, index: int) -> None:
        super().__init__()
        self.roles, self.shape, self.numbers, self.index = dict(roles), shape, numbers, index
        self._parts: dict[str, Any] = {}

    def part(self, role: str) -> Any:
        """The module of a role, ``None`` if the block has none."""
        if role not in self._parts:
            self._parts[role] = self.get_submodule(self.roles[role]) if role in self.roles else None
        return self._parts[role]

    def forward(
        self, stream: Stream, rotary: tuple[Tensor, Tensor] | None, cache: Any, past: int, padding: Tensor | None,
        batch: int,
    ) -> Stream:
        """The residual stream of ``batch`` sequences after the block.

        Args:
            stream: int32 rows ``[batch * T, C]`` with their scale, and their ``bit_length``.
            rotary: int32 cosines and sines ``[batch * T, 1, R]``.
            cache: with ``update(keys, values, index)``, or ``None``.
            past: tokens in the cache before.
            padding: bool ``[batch, past + T]``, or ``None``.
        """
        stream = dyadic.add_residual(*stream, self._attention(stream, rotary, cache, past, padding, batch))
        rows = stream[0].data.shape[0]
        if rows <= _ROWS:
            return self._feed(stream)
        parts = [self._feed(_rows(stream, slice(i, i + _ROWS))) for i in range(0, rows, _ROWS)]
        data, mantissa, shift, bits = (
            torch.cat(found) for found in zip(*((p.data, p.mantissa, p.shift, b) for p, b in parts), strict=True)
        )
        return Dyadic(data, mantissa, shift), bits

    # -- attention ---------------------------------------------------------------------------------------------------
    def _quantized(self, x: Dyadic, divisor: Tensor | None = None, bits: int | None = None) -> Dyadic:
        return dyadic.requantize(x, bits or self.numbers.activation_bits, self.numbers.mantissa_bits, divisor)

    def _attention(
        self, stream: Stream, rotary: tuple[Tensor, Tensor] | None, cache: Any, past: int, padding: Tensor | None,
        batch: int,
    ) -> Dyadic:
        shape, numbers, rows = self.shape, self.numbers, stream[0].data.shape[0]
        tokens = rows // batch
        x = self._quantized(*self.part("norm1")(stream[0].data))
        query = self._query(self._turned(self.part("query")(x), "query_norm", shape.heads, rotary))
        key = self._key(self._turned(self.part("key")(x), "key_norm", shape.groups, rotary))
        value = self.part("value")(x)
        one = torch.ones_like(value.data[:1])
        value = dyadic.store(value, one, 0, numbers.kv_bits)
        key, value = (
            part.view(batch, tokens, shape.groups, shape.size).transpose(1, 2) for part in (key, value)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        lead = (batch, tokens, shape.heads)
        query = Dyadic(query.data.view(*lead, -1), query.mantissa.view(*lead, 1), query.shift.view(*lead, 1))
        mixed = dyadic.attend(
            query, key, value, past, padding, clip=numbers.clip, bits=numbers.nonlinear_bits,
            out_bits=numbers.probability_bits,
        ).view(rows, shape.groups, -1)
        grids = self.hfq_grids
        mixed = (mixed * grids.derived()[2][:, None]).view(rows, -1)
        unit = torch.ones(rows, 1, dtype=torch.int64, device=mixed.device)
        return self.part("out")(
            self._quantized(Dyadic(mixed, unit, unit * (grids.shifts[2] + numbers.probability_bits - 1)))
        )

    def _turned(self, x: Dyadic, norm: str, heads: int, rotary: tuple[Tensor, Tensor] | None) -> Dyadic:
        """Heads ``[M, heads, D]`` after their norm and the rotary embedding: int32 below ``2**16``."""
        data = x.data.view(x.data.shape[0], heads, self.shape.size)
        mantissa, shift = x.mantissa[:, None], x.shift[:, None]
        per_head = self.part(norm)
        if per_head is not None:
            y, root = per_head(data)
            data, mantissa, shift = round_div(y.data, root), y.mantissa, y.shift
        x = dyadic.narrow(Dyadic(data, mantissa, shift), _ROTARY_BITS)
        turned = x.data.to(torch.int32)
        if rotary is not None:
            turned = dyadic.rotate(turned, *rotary, interleaved=self.shape.interleaved)
        return Dyadic(turned, x.mantissa.expand_as(x.shift), x.shift)

    def _query(self, x: Dyadic) -> Dyadic:
        """Times the steps of the keys: then a product with key codes needs no scale per channel."""
        shape, grids = self.shape, self.hfq_grids
        step = grids.derived()[0].view(shape.groups, 1, shape.size)
        data = x.data.view(-1, shape.groups, shape.heads // shape.groups, shape.size) * step
        data = data.view(-1, shape.heads, shape.size)
        scaled = Dyadic(data, x.mantissa, x.shift + grids.shifts[0])
        return dyadic.quantize_symmetric(scaled, self.numbers.activation_bits, self.numbers.mantissa_bits)

    def _key(self, x: Dyadic) -> Tensor:
        grids = self.hfq_grids
        inverse = grids.derived()[1].view(self.shape.groups, self.shape.size)
        return dyadic.store(x, inverse, grids.shifts[1], self.numbers.kv_bits)

    # -- MLP ---------------------------------------------------------------------------------------------------------
    def _feed(self, stream: Stream) -> Stream:
        x = self._quantized(*self.part("norm2")(stream[0].data))
        narrow = self.numbers.nonlinear_bits <= 8
        up, gate = self.part("up"), self.part("gate")
        if gate is None:
            y = up.codes_for(x)
            hidden = Dyadic(y.data.clamp_min(0), y.mantissa, y.shift)
        else:
            hidden = self._gated(*(part.codes_for(x) if narrow else part(x) for part in (gate, up)))
        return dyadic.add_residual(*stream, self.part("down")(self._quantized(hidden)))

    def _gated(self, gate: Dyadic, up: Dyadic) -> Dyadic:
        bits, grids = self.numbers.nonlinear_bits, self.hfq_grids
        a, b = self._quantized(gate, bits=bits), self._quantized(up, bits=bits)
        if self.shape.activation == "relu":
            return dyadic.gated_relu(a, b)
        scale = grids.derived()[3]
        inverse = None if scale is None else (scale, grids.shifts[3])
        return dyadic.gated_sigmoid(a, b, inverse, bits=self.numbers.sigmoid_bits)

    def describe(self) -> dict[str, Any]:
        """The manifest entry of the block."""
        modules = {role: self.part(role).describe() for role in self.roles}
        return {"roles": dict(self.roles), "shape": asdict(self.shape), "modules": modules,
                "grids": self.hfq_grids.describe()}

    def check_sizes(self, where: str) -> None:
        """Raise unless no accumulator of the block can overflow."""
        numbers = self.numbers
        left = (1 << numbers.activation_bits) - 1
        for role in self.roles:
            module = self.part(role)
            if isinstance(module, IntegerMatrix):
                right = (1 << (module.bits - 1)) - 1
                label = f"{where}.{self.roles[role]}"
                dyadic.check_accumulators(module.in_features, left, right, 15, numbers.mantissa_bits, label)
            elif isinstance(module, IntegerNorm):
                dyadic.check_accumulators(module.size, 1, 1, where=f"{where}.{self.roles[role]}")
        dyadic.check_accumulators(self.shape.size * 8, left, 127, 15, 8, f"{where}: attention scores")


def _rows(stream: Stream, part: slice) -> Stream:
    x, bits = stream
    return Dyadic(x.data[part], x.mantissa[part], x.shift[part]), bits[part]


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at a dotted path below ``root``, with empty modules on the way."""
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]
    root.add_module(leaf, module)
