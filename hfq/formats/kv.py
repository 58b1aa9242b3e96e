"""Keys and values of attention as codes: what a run of tokens ``[batch, heads, tokens, head_dim]`` becomes.

A number is ``scale * level + offset``; the level is the code itself (uniform grids) or an entry of a table. A scale is
shared by a token (dynamic), by a channel over all tokens (stored, calibrated) or by a channel inside a window of tokens
(dynamic). A fixed number of outliers of each token can be kept besides: their exact value less the dense one in
float16, and their channel.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from hfq.errors import ConfigError
from hfq.formats import codebook, outliers
from hfq.formats.affine import SMALLEST_SCALE

__all__ = ["Encoded", "KVFormat", "SideSpec", "Tables", "decode", "encode", "fake"]

_LARGEST = 65504.0  # of float16, in which scales, offsets and outliers are kept


@dataclass(frozen=True)
class SideSpec:
    """How keys, or values, are stored.

    Args:
        bits: width of a code, 1 to 8; 16 keeps the floats.
        axis: "token" one scale a token (see ``group_size``), "channel" one stored scale a channel, "window" one scale a
            channel in each ``group_size`` consecutive tokens.
        group_size: on axis "token" the elements of a head that share a scale, -1 the head, 0 all heads of the token.
        table: levels from a table instead of a uniform grid.
        zero_point: "float" keeps the exact lower end of the range; "int" is the grid of activations, whose range
            contains zero and whose zero point is an integer.
        outliers: share of a token's elements that are kept exactly, half of them on each side.
    """

    bits: int = 4
    axis: Literal["token", "channel", "window"] = "token"
    group_size: int = -1
    table: bool = False
    zero_point: Literal["float", "int"] = "float"
    outliers: float = 0.0

    def __post_init__(self) -> None:
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in (self.bits, self.group_size))
        if not whole or not (1 <= self.bits <= 8 or self.bits == 16):
            raise ConfigError(f"cache bits={self.bits!r}: an integer from 1 to 8, or 16 for floats, is needed")
        if self.axis not in ("token", "channel", "window") or self.zero_point not in ("float", "int"):
            raise ConfigError(f"cache axis={self.axis!r}, zero_point={self.zero_point!r} is not known")
        least = 1 if self.axis == "window" else -1
        if not least <= self.group_size < 1 << 16:
            raise ConfigError(f"cache group_size={self.group_size!r}: at least {least} on axis {self.axis!r}")
        if not isinstance(self.table, bool) or not isinstance(self.outliers, (int, float)) or not (
                0 <= self.outliers < 0.5):
            raise ConfigError(f"cache outliers={self.outliers!r}: a share from 0 to 0.5 is needed (table: true, false)")
        if self.outliers and (self.axis == "window" or (self.axis == "token" and self.group_size)):
            raise ConfigError("outliers are chosen among all heads of a token: axis 'channel', or 'token' with group 0")
        if self.zero_point == "int" and (self.table or self.axis != "token"):
            raise ConfigError("an integer zero point belongs to a uniform grid of a token")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def exact(self) -> bool:
        return self.bits == 16

    @property
    def dynamic(self) -> bool:
        """Scales are found and stored with the tokens."""
        return not self.exact and self.axis != "channel"

    def side_slots(self, channels: int) -> int:
        """Outliers of one token and side; ``channels`` counts all heads."""
        return 0 if not self.outliers or self.exact else int(self.outliers / 2 * channels) + 1

    def slots(self, channels: int) -> int:
        """Outliers of one token."""
        return 2 * self.side_slots(channels)

    def groups(self, heads: int, width: int) -> tuple[int, int]:
        """``(rows, groups)`` of the scales of one token."""
        if self.group_size == 0:
            return 1, 1
        return heads, 1 if self.group_size == -1 else -(-width // self.group_size)

    def bits_per_element(self, heads: int, width: int, itemsize: int = 4) -> float:
        """Stored bits of one element of a token, with scales, offsets and outliers (whole windows, packed codes)."""
        if self.exact:
            return 8.0 * itemsize
        channels = heads * width
        total = float(self.bits * channels)
        if self.axis == "token":
            rows, groups = self.groups(heads, width)
            total += 32 * rows * groups
        elif self.axis == "window":
            total += 32 * channels / self.group_size
        total += self.slots(channels) * (16 + (16 if channels < 1 << 15 else 32))
        return total / channels

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> SideSpec:
        return _read(cls, data)


@dataclass(frozen=True)
class KVFormat:
    """How a cache stores the keys and values of one attention module.

    Args:
        key, value: the two sides.
        pre_rope: keys are stored without their rotary embedding, which is applied when they are read.
        sink: first tokens of each sequence, kept as they are.
        residual: newest tokens, kept as they are until there are so many (axis "window" needs whole windows).
        prefill: "exact": the attention of a prompt computes with exact keys and values; "quantized": with stored ones.
        hadamard: queries and keys are multiplied by a Hadamard matrix before they are stored.
    """

    key: SideSpec = field(default_factory=SideSpec)
    value: SideSpec = field(default_factory=SideSpec)
    pre_rope: bool = False
    sink: int = 0
    residual: int = 0
    prefill: Literal["exact", "quantized"] = "exact"

    def __post_init__(self) -> None:
        for name in ("sink", "residual"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 16:
                raise ConfigError(f"cache {name}={number!r}: a number of tokens is needed")
        if self.prefill not in ("exact", "quantized") or not isinstance(self.pre_rope, bool):
            raise ConfigError(f"cache prefill={self.prefill!r}, pre_rope={self.pre_rope!r}")
        if self.value.axis == "channel":
            raise ConfigError("values have no stored scales: their axis is 'token' or 'window'")
        window = self.window
        if window > 1 and (self.residual % window or not self.residual):
            raise ConfigError(f"cache residual={self.residual!r}: a multiple of the window of {window} tokens")

    @property
    def window(self) -> int:
        """Tokens that have to be stored together."""
        sizes = {side.group_size for side in (self.key, self.value) if side.axis == "window" and not side.exact}
        if len(sizes) > 1:
            raise ConfigError(f"keys and values in windows of different sizes: {sorted(sizes)}")
        return sizes.pop() if sizes else 1

    def bits_per_element(self, heads: int, width: int, itemsize: int = 4) -> float:
        """Mean over keys and values, without sink and residual tokens and the positions of pre-rotary keys."""
        return sum(side.bits_per_element(heads, width, itemsize) for side in (self.key, self.value)) / 2

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> KVFormat:
        if isinstance(data, dict):
            data = {**data, **{name: SideSpec.from_dict(data[name]) for name in ("key", "value") if name in data}}
        return _read(cls, data)


def _read(cls: Any, data: Any) -> Any:
    known = set(cls.__dataclass_fields__)
    if not isinstance(data, dict) or set(data) - known:
        found = sorted(set(data) - known) if isinstance(data, dict) else data
        raise ConfigError(f"unknown fields {found} of a cache format; known: {sorted(known)}")
    return cls(**data)


@dataclass
class Tables:
    """What a side needs besides its spec; all optional, float16 or float32.

    Attributes:
        low, high: ends of the stored range of each channel, ``[heads * head_dim]``.
        encode: sorted levels that codes are chosen with, ``[2**bits]``.
        decode: levels that codes stand for.
    """

    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    encode: torch.Tensor | None = None
    decode: torch.Tensor | None = None


@dataclass
class Encoded:
    """A run of tokens.

    Attributes:
        codes: uint8 ``[batch, heads, tokens, head_dim]``; the floats themselves for 16 bits.
        scale, offset: float16 ``[batch, rows, tokens, groups]`` (axis "token") or ``[batch, heads, windows, head_dim]``
            (axis "window"); ``offset`` holds the zero point of an integer grid. ``None`` for stored scales.
        values, index: outliers ``[batch, tokens, slots]``: float16 differences, channels over all heads.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    values: torch.Tensor | None = None
    index: torch.Tensor | None = None

    def part(self, start: int, stop: int, spec: SideSpec) -> Encoded:
        """Tokens ``start`` to ``stop``, whole windows."""
        size = spec.group_size if spec.axis == "window" else 1
        first, last = start // size, -(-stop // size)
        some = {name: t[:, first:last] if name in ("values", "index") else t[:, :, first:last]
                for name, t in self.tensors().items()}
        return Encoded(self.codes[:, :, start:stop], **some)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What there is besides the codes."""
        found = {"scale": self.scale, "offset": self.offset, "values": self.values, "index": self.index}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def encode(x: torch.Tensor, spec: SideSpec, tables: Tables) -> Encoded:
    """Quantize ``x`` ``[batch, heads, tokens, head_dim]``; a ragged last window is a window of its own."""
    if spec.exact:
        return Encoded(x)
    x = x.float()
    low, high, chosen = _range(x, spec, tables)
    scale, offset = _grid(low, high, spec)
    stored = Encoded(x, *((scale, offset) if spec.dynamic else (None, None)))
    if spec.dynamic:
        s, o = _expand(scale.float(), x, spec), _expand(offset.float(), x, spec)
    else:
        s, o = _stored_grid(spec, tables, x)
    if spec.table:
        stored.codes = codebook.encode((x - o) / s, tables.encode.float())  # type: ignore[union-attr]
    elif spec.zero_point == "int":
        stored.codes = ((x / s).round_() + o).clamp_(0, spec.max_code).to(torch.uint8)
    else:
        stored.codes = ((x - o) / s).round_().clamp_(0, spec.max_code).to(torch.uint8)
    if spec.outliers:
        _keep_outliers(x, (x - o) / s, chosen, stored, spec, tables)
    return stored


def decode(stored: Encoded, spec: SideSpec, tables: Tables) -> torch.Tensor:
    """The numbers (float32) that ``stored`` stands for; floats are returned as they are."""
    if spec.exact:
        return stored.codes
    x = _dense(stored, spec, tables)
    return x if stored.values is None else outliers.add(x, stored.values, stored.index)  # type: ignore[arg-type]


def fake(x: torch.Tensor, spec: SideSpec, tables: Tables) -> torch.Tensor:
    """``decode(encode(x))`` in the dtype of ``x``."""
    return x if spec.exact else decode(encode(x, spec, tables), spec, tables).to(x.dtype)


def stored_grid(spec: SideSpec, tables: Tables) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset (float32, ``[heads * head_dim]``) of the channels of a calibrated side."""
    low, high = tables.low.float(), tables.high.float()  # type: ignore[union-attr]
    if spec.table:
        return ((high - low) / 2).clamp(min=1e-8), (high + low) / 2
    return ((high - low) / spec.max_code).clamp(min=1e-8), low


def levels(codes: torch.Tensor, spec: SideSpec, tables: Tables) -> torch.Tensor:
    """What codes stand for before scale and offset, float32."""
    return codebook.decode(codes, tables.decode.float()) if spec.table else codes.float()  # type: ignore[union-attr]


def _dense(stored: Encoded, spec: SideSpec, tables: Tables) -> torch.Tensor:
    x = levels(stored.codes, spec, tables)
    if not spec.dynamic:
        s, o = _stored_grid(spec, tables, x)
    else:
        s, o = (_expand(t.float(), x, spec) for t in (stored.scale, stored.offset))  # type: ignore[union-attr]
    if spec.zero_point == "int":
        return (x - o).mul_(s)
    return torch.addcmul(o.expand_as(x), x, s)


def _stored_grid(spec: SideSpec, tables: Tables, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale, offset = stored_grid(spec, tables)
    shape = (1, x.shape[1], 1, x.shape[3])
    return scale.view(shape), offset.view(shape)


def _range(
    x: torch.Tensor, spec: SideSpec, tables: Tables
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Ends of the range in the shape of the scales, and ``(values, channels)`` of the outliers of a token."""
    if spec.axis == "channel":
        return tables.low, tables.high, None  # type: ignore[return-value]
    if spec.axis == "window":
        missing = -x.shape[2] % spec.group_size
        if missing:  # repeats of the last token change no range
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)
        windows = x.unflatten(2, (-1, spec.group_size))
        return windows.amin(3), windows.amax(3), None
    if spec.group_size == 0:
        token = x.transpose(1, 2).flatten(2)  # [batch, tokens, heads * head_dim]
        n = spec.side_slots(token.shape[-1])
        high, above = token.topk(n + 1, dim=-1)
        low, below = token.topk(n + 1, dim=-1, largest=False)
        ends = (end[:, None, :, n:] for end in (low, high))
        chosen = (torch.cat([high[..., :n], low[..., :n]], -1), torch.cat([above[..., :n], below[..., :n]], -1))
        return (*ends, chosen if n else None)  # type: ignore[return-value]
    groups = x[..., None, :]
    if spec.group_size > 0:
        missing = -x.shape[-1] % spec.group_size
        if missing:
            x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], dim=-1)
        groups = x.unflatten(-1, (-1, spec.group_size))
    return groups.amin(-1), groups.amax(-1), None


def _grid(low: torch.Tensor, high: torch.Tensor, spec: SideSpec) -> tuple[torch.Tensor, torch.Tensor]:
    if not spec.dynamic:
        return low, high
    if spec.zero_point == "int":
        low, high = low.clamp(max=0), high.clamp(min=0)
    reach = high - low  # times nothing added: a token with a NaN or an infinity gets a scale of NaN
    scale = (reach / (2 if spec.table else spec.max_code)).clamp(SMALLEST_SCALE, _LARGEST).add(reach, alpha=0).half()
    if spec.zero_point == "int":
        return scale, (-low / scale.float()).round().clamp(0, spec.max_code).half()
    return scale, ((high + low) / 2 if spec.table else low).clamp(-_LARGEST, _LARGEST).half()


def _expand(parameter: torch.Tensor, x: torch.Tensor, spec: SideSpec) -> torch.Tensor:
    """Parameters in a shape that broadcasts with ``x``."""
    if spec.axis == "window":
        return parameter.repeat_interleave(spec.group_size, dim=2)[:, :, : x.shape[2]]
    if parameter.shape[-1] == 1:
        return parameter
    return parameter.repeat_interleave(spec.group_size, dim=-1)[..., : x.shape[-1]]


def _keep_outliers(
    x: torch.Tensor, scaled: torch.Tensor, chosen: Any, stored: Encoded, spec: SideSpec, tables: Tables
) -> None:
    """Put outliers into their slots. The dense code of a dynamic side's outlier is the middle one, else the end one."""
    n = spec.side_slots(x.shape[1] * x.shape[3])
    if chosen is None:
        scaled = scaled if spec.table else scaled / (spec.max_code / 2) - 1
        index, outside = outliers.beyond(scaled, n)
    else:
        index, outside = chosen[1], None
        stored.codes = outliers.fill(stored.codes, index, (1 << (spec.bits - 1)) - 1)
    stored.values, stored.index = outliers.differences(x, _dense(stored, spec, tables), index, outside)
