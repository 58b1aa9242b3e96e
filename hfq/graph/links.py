"""What folds into what: pairs, their report, and the change that a pair allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hfq.graph.absorb import (
    Matrix,
    Norm,
    Rotation,
    fold_norm,
    rotate_inputs,
    rotate_outputs,
    scale_inputs,
    scale_outputs,
)

__all__ = ["Link", "Pair", "PairReport", "apply_fold", "apply_heads", "apply_rotation", "apply_scale"]


@dataclass(eq=False)
class Link:
    """One side of a pair: a matrix or a norm, and the class (or channel) of each of its channels, -1 for none."""

    part: Matrix | Norm
    index: torch.Tensor

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def tensor(self) -> str:
        return self.part.tensor if isinstance(self.part, Matrix) else self.part.gain

    @property
    def rows(self) -> tuple[int, int] | None:
        """``(start, stop)`` of the channels concerned if they are contiguous and not all; else ``None``."""
        used = torch.nonzero(self.index >= 0).flatten()
        if len(used) in (0, len(self.index)) or int(used[-1] - used[0]) + 1 != len(used):
            return None
        return int(used[0]), int(used[-1]) + 1

    def check(self) -> None:
        """Raise a QuantizationError if the weight is no plain parameter in memory."""
        _ = self.part.weight if isinstance(self.part, Matrix) else self.part.get_gain()

    def __str__(self) -> str:
        name = self.name + ("" if self.tensor == "weight" else f".{self.tensor}")
        rows, count = self.rows, int((self.index >= 0).sum())
        if rows:
            return f"{name}[{rows[0]}:{rows[1]}]"
        return name if count == len(self.index) else f"{name}[{count} of {len(self.index)}]"

    def on(self, own: Callable[[str], nn.Module] | None) -> Link:
        """The same link on a copy of the model."""
        return self if own is None else Link(replace(self.part, module=own(self.name)), self.index)


@dataclass(eq=False)
class Pair:
    """A change of two or more weights that leaves the function of the model as it is.

    For every kind but "rotation" the change is a scale ``s`` of ``classes`` free values: outputs of ``sources`` times
    ``s``, inputs of ``readers`` and outputs of ``partners`` divided by it.

    Attributes:
        kind: "norm" (norm → readers), "vo" (value → output projection through attention), "updown" (up → down
            through an elementwise product or a ReLU), "direct" (matrix → matrix), "qk" (query ↔ key), "rotation" (of a
            residual stream: ``sources`` write it, ``readers`` read it), "gate" (up ↔ gate of a gated unit).
        place: the block, or for a rotation the container of the stack.
        through: what lies between ("attention", "product", "relu", "").
        activation: "gate": the module between gate and the product, which has to take the scale.
        positive: only positive scales.
        heads: "vo": output channels of the source that one rotation may mix, ``[n, d]``; ``reader_heads`` the inputs
            of every reader that receive them.
        rotates: the rotation per head was proven too.
        bias_moves: "norm": the bias of the norm may move into the biases of the readers.
        norms: "rotation": norms in the stream, with ``fix_ones`` if one of them removes the mean.
        width, blocks: "rotation": size of the stream and names of its blocks, in order.
        proven, error, reason: outcome of the numerical check; the reason says why a pair is refused.
    """

    kind: str
    place: str
    sources: list[Link] = field(default_factory=list)
    readers: list[Link] = field(default_factory=list)
    partners: list[Link] = field(default_factory=list)
    classes: int = 0
    through: str = ""
    activation: str = ""
    positive: bool = False
    heads: torch.Tensor | None = None
    reader_heads: list[torch.Tensor] = field(default_factory=list)
    rotates: bool = False
    bias_moves: bool = False
    norms: list[Norm] = field(default_factory=list)
    fix_ones: bool = False
    width: int = 0
    blocks: list[str] = field(default_factory=list)
    proven: bool = False
    error: float | None = None
    reason: str = ""

    @property
    def modules(self) -> list[str]:
        """Names of all modules that take part."""
        links = (*self.sources, *self.readers, *self.partners)
        return list(dict.fromkeys([link.name for link in links] + [norm.name for norm in self.norms]))

    @property
    def members(self) -> list[str]:
        """Names with their rows: sources, then readers, then partners."""
        return [str(link) for link in (*self.sources, *self.readers, *self.partners)]

    def refuse(self, reason: str, error: float | None = None) -> Pair:
        self.proven, self.reason, self.error = False, reason, error
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        row: dict[str, Any] = {
            "kind": self.kind, "place": self.place, "sources": [str(link) for link in self.sources],
            "readers": [str(link) for link in (*self.readers, *self.partners)], "proven": self.proven,
            "error": self.error if self.error is not None and math.isfinite(self.error) else None,
            "reason": self.reason,
        }
        optional = {"through": self.through, "scales": self.classes, "rotates": self.rotates, "blocks": self.blocks}
        return {**row, **{key: value for key, value in optional.items() if value}}

    def __str__(self) -> str:
        arrow = " <-> " if self.kind == "qk" else " -> "
        sides = ", ".join(map(str, self.sources)) + arrow + ", ".join(map(str, (*self.readers, *self.partners)))
        outcome = f"proven, {self.error:.1e}" if self.proven else f"refused: {self.reason}"
        return f"{self.kind:<8} {self.place if self.kind == 'rotation' else sides} ({outcome})"


@dataclass(eq=False)
class PairReport:
    """All pairs of a model, proven or refused, in execution order."""

    pairs: list[Pair] = field(default_factory=list)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def proven(self, kind: str | None = None, place: str | None = None) -> list[Pair]:
        """Proven pairs, of one kind and of one block where asked."""
        return [p for p in self.pairs if p.proven and kind in (None, p.kind) and place in (None, p.place)]

    def refused(self, kind: str | None = None, place: str | None = None) -> list[Pair]:
        return [p for p in self.pairs if not p.proven and kind in (None, p.kind) and place in (None, p.place)]

    def find(self, kind: str, member: str) -> Pair | None:
        """The first pair of a kind in which the module ``member`` takes part."""
        return next((p for p in self.pairs if p.kind == kind
                     and any(member == link.name for link in (*p.sources, *p.readers, *p.partners))), None)

    def rows(self) -> list[dict[str, Any]]:
        """Rows for ``Report.pairs``."""
        return [pair.to_dict() for pair in self.pairs]

    def counts(self) -> dict[str, tuple[int, int]]:
        """Kind → (proven, refused)."""
        kinds = list(dict.fromkeys(pair.kind for pair in self.pairs))
        return {kind: (len(self.proven(kind)), len(self.refused(kind))) for kind in kinds}

    def __str__(self) -> str:
        return "\n".join(map(str, self.pairs))


def apply_scale(pair: Pair, scale: torch.Tensor, own: Callable[[str], nn.Module] | None = None) -> None:
    """Scale the sources of a pair by ``scale`` ``[classes]`` and everything that must follow, in place.

    ``own`` maps module names to the modules of a copy.
    """
    for link in pair.sources:
        part, factor = link.on(own).part, _factor(link, scale)
        if isinstance(part, Matrix):
            scale_outputs(part, factor)
        else:
            bias, factor = part.get_bias(), factor.to(part.get_gain().device)
            part.set_gain(part.get_gain() * factor)
            if bias is not None:
                part.set_bias(bias * factor)
    for link in pair.readers:
        scale_inputs(link.on(own).part, 1 / _factor(link, scale))  # type: ignore[arg-type]
    for link in pair.partners:
        scale_outputs(link.on(own).part, 1 / _factor(link, scale))  # type: ignore[arg-type]


def apply_fold(pair: Pair, own: Callable[[str], nn.Module] | None = None) -> None:
    """Fold the gain of a "norm" pair into its readers, in place."""
    norm = pair.sources[0].on(own).part
    assert isinstance(norm, Norm)
    readers = [(link.on(own).part, link.index) for link in pair.readers]
    fold_norm(norm, readers, pair.bias_moves)  # type: ignore[arg-type]


def apply_heads(pair: Pair, rotation: torch.Tensor, own: Callable[[str], nn.Module] | None = None) -> None:
    """Rotate every head of a "vo" pair by ``rotation`` ``[d, d]``, in place."""
    assert pair.heads is not None
    for link in pair.sources:
        rotate_outputs(link.on(own).part, rotation, pair.heads)  # type: ignore[arg-type]
    for link, heads in zip(pair.readers, pair.reader_heads, strict=True):
        rotate_inputs(link.on(own).part, rotation, heads)  # type: ignore[arg-type]


def apply_rotation(
    pair: Pair, rotation: Rotation, block: str, own: Callable[[str], nn.Module] | None = None
) -> None:
    """Rotate the stream inside one block, in place; its norms are folded.

    ``rotation`` is a matrix ``[width, width]`` or a function that multiplies the last axis by it.
    """
    below = block + "."
    for link in pair.sources:
        if link.name.startswith(below):
            rotate_outputs(link.on(own).part, rotation)  # type: ignore[arg-type]
    for link in pair.readers:
        if link.name.startswith(below):
            rotate_inputs(link.on(own).part, rotation)  # type: ignore[arg-type]
    for norm in pair.norms:
        if norm.name.startswith(below) and norm.bias is not None:
            mine = norm if own is None else replace(norm, module=own(norm.name))
            bias = mine.get_bias()
            assert bias is not None
            mine.set_bias(bias @ rotation.to(bias) if isinstance(rotation, torch.Tensor) else rotation(bias))


def _factor(link: Link, scale: torch.Tensor) -> torch.Tensor:
    scale = scale.double().cpu()
    return torch.where(link.index >= 0, scale[link.index.clamp_min(0)], 1.0)
