"""A set of rotations and scales with the weights they change, merged differentiably or for good.

Every change of a weight is an :class:`Edit`; a weight's edits are made in a fixed order. Merging computes in the dtype
that is asked for and leaves the model alone; :meth:`TransformSet.apply_` writes the result, computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hfq.kernels import hadamard
from hfq.transforms.init import ones_basis
from hfq.transforms.manifold import Orthogonal, reorthogonalise

__all__ = ["SMALLEST_SCALE", "STAGES", "Edit", "Rotation", "Scale", "Stream", "TransformSet"]

Placement = Callable[[nn.Module], AbstractContextManager[Any]]

# A scale that training pushes towards zero stops here: it is divided by.
SMALLEST_SCALE = 1e-2

# The order of the edits of one weight. Scales of channels come before the rotations that mix them, the scales of a
# norm after the rotation of the stream that it stands in, and an online Hadamard transform last.
STAGES = ("hidden", "gates", "queries", "values", "stream", "heads", "norm", "online")


class Rotation(Orthogonal):
    """Rotations ``[n, d, d]``, one a head (or a single one for a stream).

    Args:
        start: orthogonal ``[n, d, d]``.
        fix_ones: keep the vector of ones where it is (in front of norms that remove the mean); ``start`` does.
    """

    def __init__(self, start: torch.Tensor, *, fix_ones: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.size, self.fix_ones = start.shape[-1], fix_ones
        inner = start.double()
        if fix_ones:
            basis = ones_basis(self.size)
            inner = (basis @ inner @ basis)[:, 1:, 1:]
        self.matrices = nn.Parameter(inner.to(dtype))

    def forward(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``[n, d, d]``; without gradients and in float64, exactly orthogonal."""
        inner = self.matrices if dtype is None else self.matrices.to(dtype)
        if dtype == torch.float64 and not torch.is_grad_enabled():
            inner = reorthogonalise(inner)
        if not self.fix_ones:
            return inner
        basis = ones_basis(self.size).to(inner)
        whole = torch.zeros(inner.shape[0], self.size, self.size, dtype=inner.dtype, device=inner.device)
        whole[:, 0, 0] = 1
        whole[:, 1:, 1:] = inner
        return basis @ whole @ basis


class Scale(nn.Module):
    """Positive factors ``[classes]``, one where they start."""

    def __init__(self, classes: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.ones(classes, dtype=dtype))

    def forward(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.values if dtype is None else self.values.to(dtype)


@dataclass(frozen=True, eq=False)
class Edit:
    """One change of one tensor along one axis.

    Attributes:
        tensor: qualified name of the parameter.
        axis: the axis of its channels.
        site: name of the transform (for "mix": empty).
        how: "multiply", "divide" (by the factor of each channel's class), "turn" (vectors of channels times the
            rotation) or "mix" (times a Hadamard matrix).
        stage: one of :data:`STAGES`.
        index: for scales the class of each channel, -1 for none; for rotations of heads the channels ``[m, d]``.
        owner: which rotation each head gets, ``[m]``.
        offset: what the tensor lacks to be the gain that it stands for (1 for ``1 + weight`` gains).
        order: of the Hadamard matrix.
    """

    tensor: str
    axis: int
    site: str
    how: Literal["multiply", "divide", "turn", "mix"]
    stage: str
    index: torch.Tensor | None = None
    owner: torch.Tensor | None = None
    offset: float = 0.0
    order: int = 0

    def __call__(self, tensor: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
        moved = tensor.movedim(self.axis, -1)
        if self.how == "mix":
            return hadamard.transform(moved.contiguous(), self.order).movedim(-1, self.axis)
        assert value is not None
        value = value.to(tensor.device)
        if self.how == "turn":
            return self._turned(moved, value).movedim(-1, self.axis)
        assert self.index is not None
        index = self.index.to(tensor.device)
        one = torch.ones((), dtype=value.dtype, device=value.device)
        factor = torch.where(index >= 0, value[index.clamp_min(0)], one)
        moved = moved + self.offset if self.offset else moved
        moved = moved * factor if self.how == "multiply" else moved / factor
        moved = moved - self.offset if self.offset else moved
        return moved.movedim(-1, self.axis)

    def _turned(self, moved: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        if self.index is None:
            return moved @ rotation[0]
        index = self.index.to(moved.device)
        heads = moved[..., index].unsqueeze(-2)  # [..., m, 1, d]
        turned = (heads @ rotation[self.owner.to(moved.device)]).squeeze(-2)  # type: ignore[union-attr]
        return moved.index_copy(-1, index.flatten(), turned.flatten(-2))


@dataclass(eq=False)
class Stream:
    """A rotated residual stream: its pair, the name of its rotation, and the blocks at whose ends it is turned."""

    pair: Any
    site: str
    first: str
    last: str


@dataclass(eq=False)
class _Member:
    owner: nn.Module
    leaf: str

    def get(self) -> torch.Tensor:
        return self.owner._parameters[self.leaf]  # type: ignore[return-value]


class TransformSet(nn.Module):
    """Named transforms and the edits that they make to a model's parameters.

    Attributes:
        transforms: the :class:`Rotation` and :class:`Scale` modules.
        edits: by qualified parameter name, in the order in which they are made.
        streams: the rotated residual streams; what lies outside their blocks sees them turned back.
        online: by site name, the Hadamard transform in front of it.
        activations: by name of a SiLU module, the scale ``s`` with which it becomes ``x sigmoid(x / s)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.transforms = nn.ModuleDict()
        self.edits: dict[str, list[Edit]] = {}
        self.streams: list[Stream] = []
        self.online: dict[str, Any] = {}
        self.activations: dict[str, str] = {}
        self._members: dict[str, _Member] = {}

    def add(self, name: str, transform: nn.Module) -> str:
        """Keep a transform; its key (module names have no dots)."""
        key = name.replace(".", "/")
        self.transforms[key] = transform
        return key

    def edit(self, owner: nn.Module, edit: Edit) -> None:
        """Note an edit of the parameter ``edit.tensor``, which ``owner`` holds; absent parameters are left out."""
        leaf = edit.tensor.rpartition(".")[2]
        if owner._parameters.get(leaf) is None:
            return
        self._members[edit.tensor] = _Member(owner, leaf)
        chain = self.edits.setdefault(edit.tensor, [])
        chain.append(edit)
        chain.sort(key=lambda one: STAGES.index(one.stage))

    def parameter(self, name: str) -> torch.Tensor:
        """The edited parameter of this name, as the model has it now."""
        return self._members[name].get()

    def names(self, below: str = "") -> list[str]:
        """Edited parameters, all or those of one module."""
        return [name for name in self.edits if not below or name.startswith(below + ".")]

    def forward(
        self, names: Iterable[str] | None = None, dtype: torch.dtype = torch.float32, *, online: bool = True
    ) -> dict[str, torch.Tensor]:
        """The changed tensors by name, computed in ``dtype``; gradients reach the transforms.

        Args:
            names: parameters; default all that are edited.
            online: fold the online transforms in as well (their inputs are then expected transformed).
        """
        found: dict[str, torch.Tensor] = {}
        values: dict[str, torch.Tensor] = {}
        for name in self.names() if names is None else names:
            tensor = self.parameter(name).detach().to(dtype)
            for edit in self.edits[name]:
                if edit.how == "mix" and not online:
                    continue
                if edit.site and edit.site not in values:
                    values[edit.site] = self.transforms[edit.site](dtype)
                tensor = edit(tensor, values.get(edit.site))
            found[name] = tensor
        return found

    @torch.no_grad()
    def apply_(self, below: str = "") -> None:
        """Write the changed tensors of a module (default: all) into the model, computed in float64 and rounded once.

        Online transforms are not folded in. To be called once: the edits are then in the weights.
        """
        for name in self.names(below):
            self.parameter(name).copy_(self([name], torch.float64, online=False)[name])

    def rotation(self, stream: Stream, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``Q`` ``[d, d]`` of a stream, which is ``x Q`` between its blocks."""
        return self.transforms[stream.site](dtype)[0]

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Push scales that fell below :data:`SMALLEST_SCALE` back to it."""
        for module in self.transforms.values():
            if isinstance(module, Scale):
                module.values.clamp_(min=SMALLEST_SCALE)

    def smallest_scale(self) -> float:
        """The least factor of all scales (1 without any)."""
        found = [float(m.values.detach().min()) for m in self.transforms.values() if isinstance(m, Scale)]
        return min(found, default=1.0)
