"""A first token that is the same in every call, with its exact output stored: the rest of the input alone is quantized.

The token that begins a sentence leaves a causal text encoder as the same vector for every prompt, and a far larger one
than the others: on one grid with it, the others would lose most of their codes. What it becomes is computed once, from
the float weight. The vector itself is stored too: where another one arrives (another encoder, another of its layers),
the stored output would be wrong, and the layer says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hfq.errors import CheckpointError, QuantizationError
from hfq.layers.attached import AttachedPart

__all__ = ["LeadingToken", "empty_leading", "lead"]

# How far, in lengths of the vector, what arrives may be from what is stored: rounding, not another encoder.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
TOLERANCE_NARROW = 3e-2
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# The tensor that each part has checked last: pipelines hand the same one to every layer in every step.
_CHECKED: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, int]] = weakref.WeakKeyDictionary()


class LeadingToken(AttachedPart):
    """``y[:, 0]`` is stored; ``y[:, 1:]`` is the product of ``x[:, 1:]``.

    Args:
        token: ``[in_features]``, what the first token has to be.
        output: ``[out_features]``, what the float layer makes of it, bias included.
        dtype: of empty ones.
        device: of empty ones.
    """

    def __init__(
        self, token: torch.Tensor | int, output: torch.Tensor | int, *, dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> None:
        super().__init__()
        for name, given in (("token", token), ("output", output)):
            empty = isinstance(given, int)
            self._put(name, torch.empty(given, dtype=dtype, device=device) if empty else given.detach().clone())

    def forward(self, x: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``[B, T, in_features]`` to ``[B, T, out_features]``.

        Raises:
            QuantizationError: the first token is another one.
        """
        self._compare(x)
        rest = product(x[:, 1:])
        first = self.output.to(rest.device, rest.dtype).expand(x.shape[0], 1, -1)
        return torch.cat([first, rest], 1)

    def _compare(self, x: torch.Tensor) -> None:
        if torch.compiler.is_compiling() or x.is_meta or not x.numel():
            return
        known, plain = _CHECKED.get(self), not x.is_inference()
        if plain and known is not None and known[0]() is x and known[1] == x._version:
            return
        token = self.token.to(x.device, torch.float32)
        with torch.no_grad():
            far = float((x[:, 0].float() - token).norm(dim=-1).max() / token.norm().clamp(min=1e-30))
        if not far <= TOLERANCE.get(x.dtype, TOLERANCE_NARROW):
            raise QuantizationError(
                f"the first token of the text is another one (off by {far:.2g} of its length) than the one whose keys "
                "and values are stored in this model: use the text encoder, its adapters and clip_skip as they were "
                "when the model was quantized, or quantize it again")
        if plain:
            _CHECKED[self] = (weakref.ref(x), x._version)

    def describe(self) -> dict[str, Any]:
        return {"dtype": str(self.token.dtype).removeprefix("torch.")}

    def extra_repr(self) -> str:
        return f"{len(self.token)} to {len(self.output)}"


def lead(layer: Any, part: LeadingToken, row: Any = None) -> None:
    """Give a packed linear its first token, and count its bits in the report's row of the layer."""
    if len(part.token) != layer.in_features or len(part.output) != layer.out_features:
        raise QuantizationError(f"{layer.label}: a first token of {len(part.token)} features that becomes "
                                f"{len(part.output)} at a layer of {layer.in_features} and {layer.out_features}")
    layer.leading = part.to(layer.device)
    if row is not None:
        row.bits += 8 * part.nbytes / row.numel


def empty_leading(name: str, entry: Any, columns: int, rows: int, device: Any) -> LeadingToken | None:
    """The empty part that the manifest entry of a layer describes.

    Raises:
        CheckpointError: it is damaged.
    """
    if entry is None:
        return None
    dtype = _DTYPES.get(str(entry.get("dtype"))) if isinstance(entry, Mapping) and set(entry) == {"dtype"} else None
    if dtype is None:
        raise CheckpointError(f"{name}: leading={entry!r} in the manifest")
    return LeadingToken(columns, rows, dtype=dtype, device=device)
