"""Transforms that run inside the model: Hadamard and scales before a product, and a rotated residual stream.

A transform in front of a packed layer is undone by the weight, which holds ``W H`` for ``x H``. A rotated stream is
rotated by hooks at the entry of the first block and rotated back at the exit of the last one, so that embeddings, the
final norm and a tied head stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.layers.hooks import unhook
from hfq.layers.manifest import present
from hfq.layers.parts import ChannelScale, Hadamard, OnlinePart, mix, order, sign_vector, unmix

__all__ = [
    "ChannelScale", "Hadamard", "OnlinePart", "StreamRotation", "attach", "detach", "empty_rotation",
    "install_rotation", "rotations", "turn_input", "turn_output",
]  # fmt: skip

Side = Literal["in", "out"]
_CHILD = {"in": "hfq_rotation_in", "out": "hfq_rotation_out"}


class StreamRotation(nn.Module):
    """Multiply the hidden state by an orthogonal matrix ``Q`` (side "in") or by its transpose (side "out").

    Args:
        size: width of the hidden state.
        kind: "hadamard" (``Q = diag(signs) H / sqrt(n)``) or "dense" (any orthogonal matrix, as needed where the
            vector of ones must stay in place, in front of a LayerNorm).
        side: which way.
        tensors: ``{"signs": int8 [size]}`` or ``{"matrix": float32 [size, size]}``; default empty parameters.
        block: block of a Hadamard rotation.
    """

    def __init__(
        self, size: int, kind: str, side: Side, tensors: Mapping[str, torch.Tensor] | None = None, *,
        block: int | None = None, device: Any = None,
    ) -> None:
        super().__init__()
        name = {"hadamard": "signs", "dense": "matrix"}.get(kind)
        if name is None:
            raise QuantizationError(f"a stream rotation of kind {kind!r}: 'hadamard' or 'dense'")
        if tensors is not None and set(tensors) != {name}:
            raise QuantizationError(f"a {kind} rotation takes {name!r}; found {sorted(tensors)}")
        self.size, self.kind, self.side, self.block = size, kind, side, block
        given = None if tensors is None else tensors[name]
        # The tensors are this module's own: hooks of an offloaded model materialise what a called module holds itself.
        if kind == "hadamard":
            self.order = order(size, block)
            self.signs = sign_vector(size, True if given is None else given, device)
        else:
            if block is not None:
                raise QuantizationError("a dense rotation has no block")
            self.matrix = nn.Parameter(_orthogonal(size, given, device), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., size]`` to the same shape and dtype; 16-bit inputs are rotated in float32."""
        return self._rotate(x, self.side == "out")

    def _rotate(self, x: torch.Tensor, back: bool) -> torch.Tensor:
        if self.kind == "hadamard":
            return unmix(x, self.signs, self.order) if back else mix(x, self.signs, self.order)
        work = torch.promote_types(x.dtype, torch.float32)
        matrix = self.matrix.to(work)
        return (x.to(work) @ (matrix.t() if back else matrix)).to(x.dtype)

    def matrix_of(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """``Q`` itself, ``[size, size]``, with which the rotated stream is ``x Q`` (whatever the side)."""
        device = next(self.parameters()).device
        return self._rotate(torch.eye(self.size, dtype=torch.float64, device=device), False).to(dtype)

    def describe(self) -> dict[str, Any]:
        return {"side": self.side, "kind": self.kind, "size": self.size, "block": self.block}

    def _apply(self, fn: Any, recurse: bool = True) -> StreamRotation:
        """A dense matrix stays float32 under casts of the model: rounded, it would not be orthogonal."""
        if self.kind == "hadamard":
            return super()._apply(fn, recurse)  # type: ignore[return-value]
        data = self.matrix.detach()
        self.matrix = nn.Parameter(fn(data.view(torch.int32)).view(torch.float32), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        return f"{self.size}, {self.kind}, {self.side}"


def _orthogonal(size: int, matrix: torch.Tensor | None, device: Any) -> torch.Tensor:
    if matrix is None:
        return torch.empty(size, size, dtype=torch.float32, device=device)
    if tuple(matrix.shape) != (size, size):
        raise QuantizationError(f"a rotation matrix of {tuple(matrix.shape)}: {size} x {size} is needed")
    q = matrix.detach().double()
    error = float((q @ q.t() - torch.eye(size, dtype=q.dtype, device=q.device)).abs().max())
    if not error < 1e-4:
        raise QuantizationError(f"the rotation matrix is not orthogonal: Q Q^T is off the identity by {error:.2g}")
    return q.float().contiguous()


def _rotate_in(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return turn_input(module.hfq_rotation_in, module, args, kwargs)


def _rotate_out(module: nn.Module, args: tuple, output: Any) -> Any:
    return turn_output(module.hfq_rotation_out, module, output)


def turn_input(turn: Any, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a block with ``turn`` applied to the hidden state.

    Raises:
        QuantizationError: there is no hidden state among them.
    """
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": turn(kwargs["hidden_states"])}
    if not args or not isinstance(args[0], torch.Tensor):
        raise QuantizationError(f"{type(block).__name__} was called without a hidden state: its rotation cannot run")
    return (turn(args[0]), *args[1:]), kwargs


def turn_output(turn: Any, block: nn.Module, output: Any) -> Any:
    """What a block returned with ``turn`` applied to the hidden state.

    Raises:
        QuantizationError: the output has none.
    """
    if isinstance(output, torch.Tensor):
        return turn(output)
    if isinstance(output, dict):  # a ModelOutput: its first entry is the hidden state
        key = next(iter(output))
        output[key] = turn(output[key])
        return output
    if isinstance(output, tuple) and hasattr(output, "_replace"):
        return output._replace(**{output._fields[0]: turn(output[0])})  # type: ignore[attr-defined]
    if isinstance(output, (tuple, list)):
        return type(output)([turn(output[0]), *output[1:]])
    raise QuantizationError(f"{type(block).__name__} returned {type(output).__name__}: its rotation cannot be undone")


def attach(block: nn.Module, rotation: StreamRotation) -> None:
    """Make ``block`` rotate its hidden state (side "in") or rotate its output back (side "out")."""
    name = _CHILD[rotation.side]
    if hasattr(block, name):
        raise QuantizationError(f"{type(block).__name__} already rotates its stream ({name})")
    block.add_module(name, rotation)
    # Next to the block's own forward: hooks that record a block's call and replay it see the stream as the caller does.
    if rotation.side == "in":
        block.register_forward_pre_hook(_rotate_in, with_kwargs=True)
    else:
        block.register_forward_hook(_rotate_out, prepend=True)


def detach(block: nn.Module) -> None:
    """Undo :func:`attach`, on both sides."""
    unhook(block, _rotate_in, _rotate_out)
    for child in _CHILD.values():
        block._modules.pop(child, None)


def install_rotation(
    model: nn.Module, first_block_name: str, last_block_name: str, kind: str, tensors: Mapping[str, torch.Tensor], *,
    block: int | None = None,
) -> tuple[StreamRotation, StreamRotation]:
    """Rotate the residual stream between two blocks (which may be the same one).

    The caller has folded the rotation into everything in between; by itself this changes the model's function.

    Args:
        kind: "hadamard" with ``tensors={"signs": int8 [d]}``, or "dense" with ``{"matrix": [d, d]}``.
        block: block of a Hadamard rotation.

    Raises:
        QuantizationError: a name is unknown, a block rotates already, or the tensors do not fit the kind.
    """
    size = next(iter(tensors.values())).shape[0]
    pairs: list[tuple[nn.Module, Side]] = []
    for name, side in ((first_block_name, "in"), (last_block_name, "out")):
        try:
            pairs.append((model.get_submodule(name), side))  # type: ignore[arg-type]
        except AttributeError as error:
            raise QuantizationError(f"{type(model).__name__} has no block {name!r}") from error
    made = []
    for module, side in pairs:  # each side has its own copy: tensors shared between modules cannot be saved
        device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
        made.append(StreamRotation(size, kind, side, {k: t.to(device) for k, t in tensors.items()}, block=block))
    for (module, _), rotation in zip(pairs, made, strict=True):
        attach(module, rotation)
    return made[0], made[1]


def rotations(model: nn.Module) -> list[dict[str, Any]]:
    """Manifest entries of all stream rotations: block name, side, kind, size, Hadamard block."""
    found = []
    for name, module in model.named_modules():
        for child in _CHILD.values():
            rotation = module._modules.get(child)
            if isinstance(rotation, StreamRotation):
                found.append({"module": name, **rotation.describe()})
    return found


def empty_rotation(block: nn.Module, entry: Mapping[str, Any], name: str, widths: set[int]) -> StreamRotation | None:
    """The empty rotation that a manifest entry describes; ``None`` if ``block`` has it already.

    Args:
        block: the block that will rotate, called ``name`` in messages.
        widths: sizes of the dimensions that occur in the block; the rotation must have one of them.

    Raises:
        CheckpointError: the entry makes no sense.
    """
    inner, side, kind, size = entry.get("block"), entry.get("side"), entry.get("kind"), entry.get("size")
    known = set(entry) == {"module", "block", "side", "kind", "size"} and side in ("in", "out")
    if not known or side is None or not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise CheckpointError(f"the rotation of {name!r} in the manifest is damaged: {dict(entry)}")
    if size not in widths:
        raise CheckpointError(f"the rotation of {name!r} in the manifest has size {size}, which fits nothing there")
    if present(block._modules.get(_CHILD[side]), entry, f"the rotation of {name!r}"):
        return None
    device = next((p.device for p in block.parameters()), torch.device("cpu"))
    try:
        return StreamRotation(size, str(kind), side, block=inner, device=device)  # type: ignore[arg-type]
    except (QuantizationError, TypeError) as error:
        raise CheckpointError(f"the rotation of {name!r} in the manifest cannot be built: {error}") from error
