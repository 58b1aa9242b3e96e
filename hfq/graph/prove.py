"""The numerical check of every pair: change a float64 copy of the block at random and compare its output."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hfq.errors import QuantizationError
from hfq.graph.links import Pair, apply_fold, apply_heads, apply_rotation, apply_scale
from hfq.graph.proof import TOLERANCE, BlockCopy, floats, random_rotation, relative_error

__all__ = ["prove", "rotation_error"]

# What a block can raise when it is run again on its own: an argument that cannot be recorded, an operation without
# float64, a cache that it insists on.
RERUN_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError, KeyError)


def prove(pair: Pair, copy: BlockCopy, generator: torch.Generator) -> Pair:
    """Set ``proven``, ``error`` and ``reason`` of a pair that lies in one block; refused pairs stay refused."""
    if pair.reason:
        return pair
    try:
        pair.error = _scale_error(pair, copy, generator)
        if pair.error > TOLERANCE:
            return pair.refuse(f"a random scale changes the block's output by {pair.error:.1e}", pair.error)
        if pair.kind == "norm":
            _prove_fold(pair, copy)
        if pair.heads is not None:
            pair.rotates = _heads_error(pair, copy, generator) <= TOLERANCE
    except QuantizationError as error:
        return pair.refuse(str(error))
    pair.proven = not pair.reason
    return pair


def _scale_error(pair: Pair, copy: BlockCopy, generator: torch.Generator) -> float:
    scale = torch.empty(pair.classes, dtype=torch.float64).uniform_(-0.7, 0.7, generator=generator).exp()
    if not pair.positive:
        scale *= torch.randint(0, 2, scale.shape, generator=generator) * 2 - 1
    with copy.undone():
        apply_scale(pair, scale, copy.own)
        return relative_error(copy.run(), copy.reference)


def _prove_fold(pair: Pair, copy: BlockCopy) -> None:
    """The fold itself, with the bias where it may move; else with the bias left in the norm."""
    for moves in ([True, False] if pair.bias_moves else [False]):
        pair.bias_moves = moves
        with copy.undone():
            apply_fold(pair, copy.own)
            error = relative_error(copy.run(), copy.reference)
        if error <= TOLERANCE:
            pair.error = max(pair.error or 0.0, error)
            return
    pair.refuse(f"folding the gain changes the block's output by {error:.1e}", error)


def _heads_error(pair: Pair, copy: BlockCopy, generator: torch.Generator) -> float:
    assert pair.heads is not None
    with copy.undone():
        apply_heads(pair, random_rotation(pair.heads.shape[1], generator), copy.own)
        return relative_error(copy.run(), copy.reference)


def rotation_error(pair: Pair, folds: Sequence[Pair], copy: BlockCopy, generator: torch.Generator) -> float:
    """How far ``block(x Q)`` is from ``block(x) Q`` once the stream's norms are folded and its matrices rotated."""
    rotation = random_rotation(pair.width, generator, pair.fix_ones)
    with copy.undone():
        for fold in folds:
            apply_fold(fold, copy.own)
        apply_rotation(pair, rotation, copy.name, copy.own)
        found = floats(copy.run(rotation))
    expected = floats(copy.reference)
    expected[0] = expected[0] @ rotation
    return relative_error(found, expected)
