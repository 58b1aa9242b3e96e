"""Modules of an integer-only decoder: matrices, norms, the embedding table and the head, all tensors integers.

They lie where the float modules lay and hold their tensors as parameters, like the packed layers. A matrix keeps its
codes packed; what its product reads (bytes, row sums) is made on first use and dropped when the tensors change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import bitpack
from hfq.formats.dyadic import Dyadic, bit_length, fit_shared
from hfq.kernels import dyadic

__all__ = [
    "MANTISSA_BITS", "IntegerEmbedding", "IntegerHead", "IntegerMatrix", "IntegerModule", "IntegerNorm", "pack_rows",
    "unpack_rows",
]  # fmt: skip

MANTISSA_BITS = 15  # of the scales that are stored: int16
_BIAS_BITS = 30
_LOGITS = 1 << 20  # that are worked on at once


class IntegerModule(nn.Module):
    """Base: parameters without gradients, a label for messages, a description for the manifest."""

    _hf_quantized_needs_local_tp = True
    _is_hf_initialized = True
    kind = ""

    def __init__(self) -> None:
        super().__init__()
        self.label = ""
        self._derived: tuple[Any, Any] | None = None

    def put(self, name: str, tensor: Tensor | None) -> None:
        """Set a parameter (``None`` for one that is not there)."""
        with torch.inference_mode(False):
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def derived(self) -> Any:
        """What :meth:`derive` makes of the parameters; made again when one of them was replaced or written."""
        key = tuple((id(p), p.data_ptr(), p._version) for p in self._parameters.values() if p is not None)
        if self._derived is None or self._derived[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._derived = key, self.derive()
        return self._derived[1]

    def derive(self) -> Any:
        """The tensors that the operators read."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": None}

    def describe(self) -> dict[str, Any]:
        """The manifest entry, JSON only."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise :class:`CheckpointError` if the loaded tensors cannot be computed with."""

    def _check_mantissas(self, name: str, positive: bool = True) -> None:
        tensor = self._parameters.get(name)
        if tensor is None or tensor.is_meta:
            return
        if tensor.dtype != torch.int16 or (positive and bool((tensor <= 0).any())):
            raise CheckpointError(f"{self.label}.{name} has scales that are not positive 16-bit integers")

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parameters())


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


class IntegerMatrix(IntegerModule):
    """``y = x W^T + b`` on integers: ``W = codes * mantissa / 2**shift`` with one mantissa a row.

    Args:
        in_features, out_features: as of the float layer.
        bits: 2 to 8; codes are symmetric.
        shift: of the mantissas.
        bias_shift: of the bias; ``None`` without one.
    """

    kind = "matrix"
    qweight: nn.Parameter
    mantissa: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bits: int, shift: int = 0, bias_shift: int | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.shift, self.bias_shift = shift, bias_shift
        width = bitpack.packed_bytes(in_features, bits)
        self.put("qweight", _empty((1, out_features, width), torch.uint8, device))
        self.put("mantissa", _empty((out_features,), torch.int16, device))
        self.put("bias", None if bias_shift is None else _empty((out_features,), torch.int32, device))

    @classmethod
    def from_float(
        cls, weight: Tensor, steps: Tensor, bits: int, bias: Tensor | None = None, units: Tensor | None = None
    ) -> IntegerMatrix:
        """Quantize ``[N, K]``.

        Args:
            weight: float weight.
            steps: float ``[N]``: the wanted size of a code; the nearest one above that the format has is used.
            bits: of the codes.
            bias: float ``[N]``.
            units: float ``[N]``: what one unit of each output stands for, if not 1 (the step of a cache).
        """
        top = (1 << (bits - 1)) - 1
        steps, weight = steps.detach().double().cpu(), weight.detach()
        steps = torch.where(steps > 0, steps, steps.max().clamp_min(1e-12) * 2.0**-10)
        mantissa, shift = fit_shared(steps if units is None else steps / units.double().cpu(), MANTISSA_BITS, up=True)
        used = mantissa.double() * 2.0**-shift * (1.0 if units is None else units.double().cpu())
        codes = torch.empty(weight.shape, dtype=torch.int16)
        for start in range(0, weight.shape[0], 4096):
            part = slice(start, start + 4096)
            codes[part] = (weight[part].double().cpu() / used[part, None]).round().clamp(-top, top).to(torch.int16)
        bias_shift, fixed = None, None
        if bias is not None:
            value = bias.detach().double().cpu() / (1.0 if units is None else units.double().cpu())
            fixed, bias_shift = fit_shared(value, _BIAS_BITS) if bool(value.any()) else (value.to(torch.int64), 0)
        made = cls(weight.shape[1], weight.shape[0], bits, shift, bias_shift)
        packed = bitpack.pack((codes & ((1 << bits) - 1)).to(torch.uint8), bits)
        made.put("qweight", packed.unsqueeze(0).contiguous())
        made.put("mantissa", mantissa.to(torch.int16))
        if fixed is not None:
            made.put("bias", fixed.to(torch.int32))
        return made

    def codes(self) -> Tensor:
        """int8 ``[out_features, in_features]``; at 8 bits the stored bytes themselves."""
        packed = self.qweight.detach()[0]
        if self.bits == 8:
            return packed.view(torch.int8)
        middle = 1 << (self.bits - 1)
        fields = bitpack.unpack(packed, self.bits, self.in_features)
        return ((fields ^ middle).to(torch.int16) - middle).to(torch.int8)

    def derive(self) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, int] | None]:
        """Codes, their row sums (int32), mantissas (int64 and int32) and bias."""
        codes, mantissa, bias = self.codes(), self.mantissa.detach(), None
        if self.bias is not None:
            assert self.bias_shift is not None
            bias = (self.bias.detach().to(torch.int64), self.bias_shift)
        return codes, codes.sum(-1, dtype=torch.int32), mantissa.to(torch.int64), mantissa.to(torch.int32), bias

    def forward(self, x: Dyadic) -> Dyadic:
        """Codes ``[M, in_features]`` to int64 ``[M, out_features]`` with one scale a row."""
        codes, total, mantissa, _, bias = self.derived()
        return dyadic.project(x, codes, total, mantissa, self.shift, bias)

    def codes_for(self, x: Dyadic) -> Dyadic:
        """As :meth:`forward`, in 32 bits where the result is requantized to bytes."""
        codes, total, _, mantissa, bias = self.derived()
        return self(x) if bias is not None else dyadic.project_narrow(x, codes, total, mantissa, self.shift)

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for (in units of the output), float64 ``[out_features, in_features]``."""
        return self.codes().double() * (self.mantissa.double() * 2.0**-self.shift)[:, None]

    @property
    def weight(self) -> Tensor:
        """The codes: for code that asks for the device or shape of a layer's weight."""
        return self.codes()

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "in_features": self.in_features, "out_features": self.out_features,
                "bits": self.bits, "shift": self.shift, "bias_shift": self.bias_shift}

    def check(self) -> None:
        self._check_mantissas("mantissa")
        if self.qweight.dtype != torch.uint8:
            raise CheckpointError(f"{self.label}.qweight is {self.qweight.dtype}; torch.uint8 is needed")

    def extra_repr(self) -> str:
        return f"{self.out_features}x{self.in_features}, {self.bits} bits, integer"


class IntegerNorm(IntegerModule):
    """RMS or layer norm; its gain and bias share one shift."""

    kind = "norm"
    gain: nn.Parameter
    offset: nn.Parameter | None

    def __init__(self, size: int, shift: int = 0, *, centred: bool = False, bias: bool = False, device: Any = None):
        super().__init__()
        self.size, self.shift, self.centred, self.has_bias = size, shift, centred, bias
        self.put("gain", _empty((size,), torch.int16, device))
        self.put("offset", _empty((size,), torch.int16, device) if bias else None)

    @classmethod
    def from_float(cls, gain: Tensor, bias: Tensor | None, centred: bool) -> IntegerNorm:
        both = gain if bias is None else torch.cat((gain, bias))
        mantissa, shift = fit_shared(both, MANTISSA_BITS)
        made = cls(gain.numel(), shift, centred=centred, bias=bias is not None)
        made.put("gain", mantissa[: gain.numel()].to(torch.int16))
        if bias is not None:
            made.put("offset", mantissa[gain.numel() :].to(torch.int16))
        return made

    def forward(self, x: Tensor) -> tuple[Dyadic, Tensor]:
        """Integer rows to the norm before its division by the root, and the root (:func:`dyadic.normalise`)."""
        gain, offset = self.derived()
        return dyadic.normalise(x, gain, self.shift, offset, centred=self.centred)

    def derive(self) -> tuple[Tensor, Tensor | None]:
        offset = None if self.offset is None else self.offset.detach().to(torch.int64)
        return self.gain.detach().to(torch.int64), offset

    @property
    def weight(self) -> Tensor:
        return self.gain

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "size": self.size, "shift": self.shift, "centred": self.centred,
                "bias": self.has_bias}

    def check(self) -> None:
        self._check_mantissas("gain", positive=False)


class IntegerEmbedding(IntegerMatrix):
    """A table of 8-bit rows, each with its scale; rows enter the residual stream."""

    kind = "embedding"

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def forward(self, ids: Tensor) -> Dyadic:  # type: ignore[override]
        """Integer ids ``[...]`` to int64 rows ``[..., C]`` on the table's power of two."""
        codes, _, mantissa, _, _ = self.derived()
        rows = torch.nn.functional.embedding(ids, codes).to(torch.int64)
        data = rows * mantissa[ids][..., None]
        one = torch.ones(*ids.shape, 1, dtype=torch.int64, device=ids.device)
        return Dyadic(data, one, one * self.shift)


class IntegerHead(IntegerMatrix):
    """The output head: int32 logits with one scale a row; floats only in the very last step.

    ``output`` has no elements: its dtype is the one in which the logits leave (``model.to`` changes it).
    """

    kind = "head"
    output: nn.Parameter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.put("output", _empty((0,), torch.float32, self.qweight.device))

    def logits(self, hidden: Tensor) -> Dyadic:
        """``[..., C + 3]`` (:func:`pack_rows`) to int32 logits ``[..., V]``: comparable within a row as they are."""
        rows, lead = hidden.reshape(-1, hidden.shape[-1]), hidden.shape[:-1]
        data = torch.empty(rows.shape[0], self.out_features, dtype=torch.int32, device=hidden.device)
        mantissa, shift = (torch.empty(rows.shape[0], 1, dtype=torch.int64, device=hidden.device) for _ in range(2))
        step = max(1, _LOGITS // self.out_features)
        for start in range(0, rows.shape[0], step):
            part = slice(start, start + step)
            y = self.codes_for(unpack_rows(rows[part]))
            y = y if self.bias is None else dyadic.narrow(y, 30)
            data[part], mantissa[part], shift[part] = y.data, y.mantissa, y.shift
        return Dyadic(data.view(*lead, -1), mantissa.view(*lead, 1), shift.view(*lead, 1))

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        """Hidden rows to float logits for the caller's output object."""
        return self.to_float(self.logits(hidden))

    def to_float(self, logits: Dyadic) -> Tensor:
        """The one place where integers become floats."""
        scale = torch.ldexp(logits.mantissa.to(torch.float32), -logits.shift)
        return (logits.data * scale).to(self.output.dtype)


def pack_rows(x: Dyadic, lead: tuple[int, ...]) -> Tensor:
    """Codes with a scale and a zero point a row as one int32 tensor ``[*lead, C + 3]``."""
    assert x.zero_point is not None
    parts = (x.data.to(torch.int32), x.zero_point, x.mantissa.to(torch.int32), x.shift.to(torch.int32))
    return torch.cat(parts, -1).view(*lead, x.data.shape[-1] + 3)


def unpack_rows(hidden: Tensor) -> Dyadic:
    """The inverse of :func:`pack_rows`, rows flattened."""
    if hidden.dtype != torch.int32:
        raise QuantizationError(f"the integer head needs int32 rows of an integer decoder, not {hidden.dtype}")
    rows = hidden.reshape(-1, hidden.shape[-1])
    data = rows[:, :-3].to(torch.uint8)
    return Dyadic(data, rows[:, -2:-1].to(torch.int64), rows[:, -1:].to(torch.int64), rows[:, -3:-2])


def start_stream(rows: Dyadic) -> tuple[Dyadic, Tensor]:
    """Rows on a power of two as the residual stream: int32 in the most bits that leave room for additions."""
    empty = Dyadic(torch.zeros_like(rows.data, dtype=torch.int32), rows.mantissa, rows.shift)
    return dyadic.add_residual(empty, bit_length(torch.zeros_like(rows.shift)), rows)
