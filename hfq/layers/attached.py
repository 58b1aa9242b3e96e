"""Small float parts beside the packed layers: an affine map at a norm's output, an activation with a scale, and an
activation that takes the place of another.

They are halves of a change whose other half lies in the weights, and are listed in the manifest ("attached"), so that a
checkpoint is rebuilt with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.layers.hooks import unhook
from hfq.layers.manifest import present

__all__ = [
    "CHILD", "AttachedPart", "OutputAffine", "Rectifier", "ScaledSiLU", "attach_affine", "attached", "detach_affine",
    "empty_attached", "install_rectifier", "install_scaled", "put",
]  # fmt: skip

CHILD = "hfq_matrix"
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class AttachedPart(nn.Module):
    """Parameters without gradients that keep their dtype when the model is cast."""

    _is_hf_initialized = True

    def _apply(self, fn: Any, recurse: bool = True) -> AttachedPart:
        for name, parameter in self._parameters.items():
            if parameter is not None:
                data = parameter.detach()
                moved = fn(data.view(_SAME_WIDTH[data.element_size()])).view(data.dtype)
                self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        return self

    def _put(self, name: str, tensor: torch.Tensor | None) -> None:
        self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parameters())

    def check(self, where: str) -> None:
        """Raise :class:`CheckpointError` if what was loaded is not finite."""
        for name, parameter in self.named_parameters():
            if not parameter.is_meta and not torch.isfinite(parameter).all():
                raise CheckpointError(f"{where}.{name} has elements that are not finite")


class OutputAffine(AttachedPart):
    """``y = (x + shift) @ matrix`` on the last axis; either part may be missing.

    Args:
        size: of the last axis.
        matrix: ``[size, size]``, or ``True`` for an empty one that is filled later.
        shift: ``[size]``, or ``True``; kept in float32.
        dtype: of an empty matrix.
        device: of the empty ones.
    """

    def __init__(
        self, size: int, *, matrix: torch.Tensor | bool = False, shift: torch.Tensor | bool = False,
        dtype: torch.dtype = torch.float32, device: Any = None,
    ) -> None:
        super().__init__()
        self.size = size
        for name, given, shape in (("matrix", matrix, (size, size)), ("shift", shift, (size,))):
            kept = dtype if name == "matrix" else torch.float32
            if isinstance(given, bool):
                self._put(name, torch.empty(shape, dtype=kept, device=device) if given else None)
            elif tuple(given.shape) != shape:
                raise QuantizationError(f"{name} of {tuple(given.shape)} at an output of {size}: {shape} is needed")
            else:
                self._put(name, given.detach().to(given.dtype if name == "matrix" else kept).contiguous())
        if self.matrix is None and self.shift is None:
            raise QuantizationError("an affine map without matrix and shift is none")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., size]`` to the same shape and dtype."""
        if self.shift is not None:
            x = x + self.shift.to(x.dtype)
        return x if self.matrix is None else x @ self.matrix.to(x.dtype)

    def describe(self) -> dict[str, Any]:
        dtype = torch.float32 if self.matrix is None else self.matrix.dtype
        return {"kind": "affine", "size": self.size, "matrix": self.matrix is not None, "shift": self.shift is not None,
                "dtype": str(dtype).removeprefix("torch.")}

    def extra_repr(self) -> str:
        parts = [name for name in ("shift", "matrix") if getattr(self, name) is not None]
        return f"{self.size}, {' and '.join(parts)}"


class ScaledSiLU(AttachedPart):
    """``x * sigmoid(x / scale)``, one positive scale a channel."""

    def __init__(self, size: int, scale: torch.Tensor | None = None, *, device: Any = None) -> None:
        super().__init__()
        self.size = size
        if scale is not None and tuple(scale.shape) != (size,):
            raise QuantizationError(f"a scale of {tuple(scale.shape)} for an activation of {size} channels")
        empty = torch.empty(size, dtype=torch.float32, device=device)
        self._put("scale", empty if scale is None else scale.detach().float().contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., size]`` to the same shape and dtype, computed in float32 at least."""
        work = torch.promote_types(x.dtype, torch.float32)
        return (x.to(work) * torch.sigmoid(x.to(work) / self.scale.to(work))).to(x.dtype)

    def describe(self) -> dict[str, Any]:
        return {"kind": "silu", "size": self.size}

    def extra_repr(self) -> str:
        return str(self.size)


class Rectifier(AttachedPart):
    """``max(x, 0)`` in the place of the activation that the model was built with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)

    def describe(self) -> dict[str, Any]:
        return {"kind": "relu"}


def _apply_affine(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return module.hfq_matrix(output)


def attach_affine(module: nn.Module, part: OutputAffine) -> None:
    """Make ``module`` (a norm: it returns one tensor) send its output through ``part``.

    Raises:
        QuantizationError: it has such a part already.
    """
    if CHILD in module._modules:
        raise QuantizationError(f"{type(module).__name__} has an affine map at its output already")
    module.add_module(CHILD, part)
    # Next to the module's own forward: hooks that record its output see what the linears read.
    module.register_forward_hook(_apply_affine, prepend=True)


def detach_affine(module: nn.Module) -> None:
    """Undo :func:`attach_affine`."""
    if module._modules.pop(CHILD, None) is not None:
        unhook(module, _apply_affine)


def install_scaled(model: nn.Module, name: str, part: ScaledSiLU) -> None:
    """Put ``part`` in the place of the activation ``name``.

    Raises:
        QuantizationError: there is a scaled activation already, of another size.
    """
    old = model.get_submodule(name)
    if isinstance(old, ScaledSiLU) and old.size != part.size:
        raise QuantizationError(f"{name} is scaled already, over {old.size} channels, not {part.size}")
    part.train(old.training)
    model.set_submodule(name, part)


def install_rectifier(model: nn.Module, name: str) -> None:
    """Put a :class:`Rectifier` in the place of the activation ``name``."""
    model.set_submodule(name, Rectifier().train(model.get_submodule(name).training))


def attached(model: nn.Module) -> list[dict[str, Any]]:
    """Manifest entries of all parts: name of the norm or of the activation, kind, sizes."""
    found = []
    for name, module in model.named_modules():
        part = module._modules.get(CHILD)
        if isinstance(part, OutputAffine):
            found.append({"module": name, **part.describe()})
        elif isinstance(module, (ScaledSiLU, Rectifier)):
            found.append({"module": name, **module.describe()})
    return found


_FIELDS = {"affine": {"module", "kind", "size", "matrix", "shift", "dtype"}, "silu": {"module", "kind", "size"},
           "relu": {"module", "kind"}}  # fmt: skip


def empty_attached(model: nn.Module, entry: Mapping[str, Any], place: str, widths: set[int]) -> nn.Module | None:
    """The empty part that a manifest entry describes for the module at ``place``; ``None`` if it is there already.

    Args:
        widths: sizes of the dimensions that occur around it; the part must have one of them.

    Raises:
        CheckpointError: the entry makes no sense.
    """
    kind, size, module = entry.get("kind"), entry.get("size"), model.get_submodule(place)
    where = f"the part attached to {entry.get('module')!r}"
    if kind not in _FIELDS or set(entry) != _FIELDS[kind]:
        raise CheckpointError(f"{where} in the manifest is damaged, or needs a newer hfq: {dict(entry)}")
    if kind == "relu":
        _check_activation(module, where)
        return None if isinstance(module, Rectifier) else Rectifier()
    if isinstance(size, bool) or not isinstance(size, int) or size not in widths:
        raise CheckpointError(f"{where} in the manifest has size {size!r}, which fits nothing there")
    device = next((p.device for p in module.parameters()), next(model.parameters()).device)
    found = module._modules.get(CHILD) if kind == "affine" else module if isinstance(module, ScaledSiLU) else None
    if present(found, entry, where):
        return None
    if kind == "silu":
        _check_activation(module, where)
        return ScaledSiLU(size, device=device)
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    matrix, shift, dtype = entry["matrix"], entry["shift"], dtypes.get(str(entry["dtype"]))
    if not isinstance(matrix, bool) or not isinstance(shift, bool) or not (matrix or shift) or dtype is None:
        raise CheckpointError(f"{where} in the manifest is damaged: {dict(entry)}")
    return OutputAffine(size, matrix=matrix, shift=shift, dtype=dtype, device=device)


def _check_activation(module: nn.Module, where: str) -> None:
    if next(module.parameters(), None) is not None or next(module.children(), None) is not None:
        raise CheckpointError(f"{where}: {type(module).__name__} is no activation")


def put(model: nn.Module, place: str, part: nn.Module) -> None:
    """Install a part made by :func:`empty_attached`."""
    if isinstance(part, ScaledSiLU):
        install_scaled(model, place, part)
    elif isinstance(part, Rectifier):
        install_rectifier(model, place)
    else:
        assert isinstance(part, OutputAffine)
        attach_affine(model.get_submodule(place), part)
