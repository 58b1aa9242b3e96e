"""Rotations that spread outliers: of the residual stream, of the heads, and in front of single products.

Every rotation is folded into the weights in float64. What cannot be folded runs online: at the two ends of a stack, and
as a Hadamard transform in front of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.graph.absorb import matrix_of, rotate_inputs
from hfq.graph.links import Pair, apply_fold, apply_heads, apply_rotation
from hfq.graph.pairs import PairReport
from hfq.graph.proof import floats, relative_error
from hfq.graph.read import Plan, Site
from hfq.graph.trace import evaluating
from hfq.kernels import hadamard
from hfq.layers import online
from hfq.transforms import init
from hfq.transforms.fold import check_plan, folds_of

__all__ = [
    "TOLERANCE", "make_rotation", "online_input", "online_of", "outputs_of", "rotate_heads", "rotate_stream",
]  # fmt: skip

Placement = Callable[[nn.Module], AbstractContextManager[Any]]

# How far the whole model's output may move: rounding of the folded weights in the model's own precision.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


# -- the residual stream ---------------------------------------------------------------------------------------------
def rotate_stream(
    model: nn.Module,
    plan: Plan,
    pairs: PairReport,
    *,
    kind: str = "hadamard",
    matrix: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    call: Callable[[], Any] | None = None,
    placement: Placement | None = None,
    stacks: Collection[str] | None = None,
) -> list[Pair]:
    """Rotate the residual stream of every stack for which that was proven.

    Folds the norms of the stream, rotates all its readers and writers, and installs the rotation at the entry of the
    first block and back at the exit of the last, so that embeddings, final norm and head stay as they are. Hidden
    states between the blocks are rotated afterwards.

    Args:
        kind: "hadamard" (random signs, then a Hadamard matrix; blocks of the largest order that fits if there is none
            of the width) or "random" (uniformly random orthogonal). In front of LayerNorms either is made to fix the
            vector of ones, and is dense.
        matrix: an orthogonal matrix ``[width, width]`` to use instead (one width for all stacks).
        generator: of the random choices.
        call: runs one forward pass of the whole model. The output is compared before and after; a stack that changes
            it is rolled back bit by bit and refused (an error if its weights are offloaded). Without it only the
            proofs of the pairs are relied on.
        placement: makes a block's weights available while they change.
        stacks: places of the stacks to rotate (``pair.place``); default all.

    Returns:
        The pairs that were applied. A pair that had to be rolled back is refused in ``pairs`` with the reason.
    """
    check_plan(model, plan)
    if kind not in ("hadamard", "random"):
        raise QuantizationError(f"a rotation of kind {kind!r}: 'hadamard' or 'random'")
    done = []
    before = outputs_of(model, call) if call is not None else None
    for pair in pairs.proven("rotation"):
        if stacks is not None and pair.place not in stacks:
            continue
        name, tensors, block = make_rotation(pair.width, kind, matrix, fix_ones=pair.fix_ones, generator=generator)
        saved = _saved(pair, pairs) if before is not None else {}
        _fold_into(plan, pairs, pair, online.StreamRotation(pair.width, name, "in", tensors, block=block), placement)
        online.install_rotation(model, pair.blocks[0], pair.blocks[-1], name, tensors, block=block)
        if before is not None and call is not None:
            after = outputs_of(model, call)
            error = relative_error(after, before)
            if not error <= max(TOLERANCE.get(t.dtype, 1e-4) for t in before):
                if any(parameter.is_meta for parameter in saved):
                    raise QuantizationError(f"rotating {pair.place} changes the output by {error:.1e}, and offloaded "
                                            "weights cannot be rolled back: load the model again without rotation")
                _roll_back(model, pair, saved)
                pair.refuse(f"rotating the stream changes the model's output by {error:.1e}", error)
                continue
        done.append(pair)
    return done


def _fold_into(
    plan: Plan, pairs: PairReport, pair: Pair, rotation: online.StreamRotation, placement: Placement | None
) -> None:
    turn = rotation.forward if rotation.kind == "hadamard" else rotation.matrix_of()
    for name in pair.blocks:
        with placement(plan.block(name).module) if placement else nullcontext():
            for fold in folds_of(pairs, pair, name):
                apply_fold(fold)
            apply_rotation(pair, turn, name)


def make_rotation(
    width: int, kind: str = "hadamard", matrix: torch.Tensor | None = None, *, fix_ones: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[str, dict[str, torch.Tensor], int | None]:
    """Kind, tensors and block of a ``StreamRotation`` of ``width`` channels.

    Returns:
        ``("hadamard", {"signs": int8 [width]}, block or None)`` or ``("dense", {"matrix": [width, width]}, None)``.

    Raises:
        QuantizationError: ``matrix`` is not orthogonal, or moves the vector of ones where it must not.
    """
    if matrix is not None:
        if tuple(matrix.shape) != (width, width):
            raise QuantizationError(f"a rotation of {tuple(matrix.shape)} for a stream of {width} channels")
        if fix_ones and float((matrix.double().sum(0) - 1).abs().max()) > 1e-4:
            raise QuantizationError("in front of a LayerNorm a rotation must keep the vector of ones: 1 Q = 1")
        return "dense", {"matrix": matrix}, None
    if kind == "random":
        return "dense", {"matrix": _random_orthogonal(width, fix_ones, generator).float()}, None
    block = None if hadamard.is_order(width) else hadamard.best_block(width)
    if block is None and not hadamard.is_order(width):
        return "dense", {"matrix": _random_orthogonal(width, fix_ones, generator).float()}, None
    signs = hadamard.random_signs(width, generator)
    if not fix_ones:
        return "hadamard", {"signs": signs}, block
    rotation = hadamard.transform(torch.diag(signs.double()), block or width)
    return "dense", {"matrix": init.keep_ones(rotation).float()}, None


def _random_orthogonal(width: int, fix_ones: bool, generator: torch.Generator | None) -> torch.Tensor:
    """Uniformly distributed over the orthogonal matrices (that fix the ones vector), float64."""
    q = init.random_orthogonal(width - 1 if fix_ones else width, generator)
    if not fix_ones:
        return q
    inner = torch.eye(width, dtype=torch.float64)
    inner[1:, 1:] = q
    basis = init.ones_basis(width)
    return basis @ inner @ basis


def outputs_of(model: nn.Module, call: Callable[[], Any]) -> list[torch.Tensor]:
    """The floating tensors that the model itself returned during ``call``."""
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        with evaluating(model):
            call()
    finally:
        handle.remove()
    if not seen:
        raise QuantizationError("the call that was to check the rotation did not run the model")
    return [tensor.detach().clone() for tensor in floats(seen[-1])]


def _saved(pair: Pair, pairs: PairReport) -> dict[torch.Tensor, torch.Tensor]:
    modules = [link.part.module for link in (*pair.sources, *pair.readers)] + [norm.module for norm in pair.norms]
    for block in pair.blocks:
        modules += [link.part.module for fold in folds_of(pairs, pair, block) for link in fold.readers]
    parameters = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    return {p: p.detach().clone() for p in parameters.values()}


@torch.no_grad()
def _roll_back(model: nn.Module, pair: Pair, saved: dict[torch.Tensor, torch.Tensor]) -> None:
    for parameter, before in saved.items():
        parameter.copy_(before)
    for name in {pair.blocks[0], pair.blocks[-1]}:
        online.detach(model.get_submodule(name))


# -- heads -----------------------------------------------------------------------------------------------------------
def rotate_heads(
    model: nn.Module, plan: Plan, pairs: PairReport, *, generator: torch.Generator | None = None,
    placement: Placement | None = None,
) -> list[Pair]:
    """Rotate the values of every head by a Hadamard matrix, folded into the value and the output projection.

    Heads whose size has no Hadamard matrix get a random orthogonal one. Returns the pairs that were applied.
    """
    check_plan(model, plan)
    done = []
    for pair in pairs.proven("vo"):
        if not pair.rotates or pair.heads is None:
            continue
        size = pair.heads.shape[1]
        if hadamard.is_order(size):
            rotation = hadamard.transform(torch.eye(size, dtype=torch.float64), size)
        else:
            rotation = _random_orthogonal(size, False, generator)
        with placement(plan.block(pair.place).module) if placement else nullcontext():
            apply_heads(pair, rotation)
        done.append(pair)
    return done


# -- online transforms in front of a product -------------------------------------------------------------------------
class _OnlineInput:
    """Transforms the input of the float module until a packed layer, which does it itself, takes its place."""

    def __init__(self, transform: online.Hadamard) -> None:
        self.transform = transform

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        signs = self.transform.signs
        if signs is not None and signs.device != args[0].device:
            self.transform.to(args[0].device)
        return (self.transform(args[0]), *args[1:])


def online_input(
    site: Site, *, signs: bool = True, block: int | None = None, generator: torch.Generator | None = None
) -> online.Hadamard:
    """Put a Hadamard transform in front of a site and its inverse into the weight, in place.

    The float module computes the same as before: a hook transforms its input. The hook hangs on the float module, so it
    goes when ``layers.swap`` puts a packed layer there; hand the returned module to it as ``online=``. Hooks that are
    registered later (statistics) see the transformed input.

    Args:
        site: a linear or transposed site.
        signs: draw random signs first.
        block: size of the transform; default the whole input, or the largest order that divides it.

    Returns:
        The transform, for the packed layer.

    Raises:
        QuantizationError: the site has another kind or a transform already, or no order fits.
    """
    if site.kind not in ("linear", "transposed"):
        raise QuantizationError(f"{site.name}: an online transform needs a linear layer, not {site.kind}")
    if site.bypassed:
        raise QuantizationError(f"{site.name}: its weight is read without calling it: no input to transform")
    if online_of(site.module) is not None:
        raise QuantizationError(f"{site.name} has an online transform already")
    size = site.in_features
    if block is None and not hadamard.is_order(size):
        block = hadamard.best_block(size)
        if block is None:
            raise QuantizationError(f"{site.name}: no Hadamard matrix has an order that divides its {size} inputs")
    drawn = hadamard.random_signs(size, generator) if signs else None
    transform = online.Hadamard(size, block, signs=drawn)
    rotate_inputs(matrix_of(site), transform.to(site.weight.device))
    site.module.register_forward_pre_hook(_OnlineInput(transform))
    return transform


def online_of(module: nn.Module) -> online.Hadamard | None:
    """The transform that ``online_input`` put in front of a float module."""
    return next((hook.transform for hook in module._forward_pre_hooks.values() if isinstance(hook, _OnlineInput)), None)
