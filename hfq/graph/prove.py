"""The numerical check of every pair: change a float64 copy of the block at random and compare its output.

All pairs of a block are tried in one run, with independent random values; only if that fails one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hfq.errors import QuantizationError
from hfq.graph.absorb import check_fold
from hfq.graph.links import Pair, apply_fold, apply_heads, apply_rotation, apply_scale
from hfq.graph.proof import TOLERANCE, BlockCopy, floats, random_rotation, relative_error

__all__ = ["RERUN_ERRORS", "prove_pairs", "prove_rotation"]

# What a block can raise when it is run again on its own: an argument that cannot be recorded, an operation without
# float64, a cache that it insists on.
RERUN_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError, KeyError)

Change = Callable[[Pair], None]


def prove_pairs(pairs: Sequence[Pair], copy: BlockCopy, generator: torch.Generator) -> None:
    """Set ``proven``, ``error``, ``reason`` and ``rotates`` of the pairs of one block; refused pairs stay refused."""
    pairs = [pair for pair in pairs if not pair.reason]
    for pair in pairs:
        try:
            for link in (*pair.sources, *pair.readers, *pair.partners):
                link.check()
        except QuantizationError as problem:
            pair.refuse(str(problem))
    pairs = [pair for pair in pairs if not pair.reason]

    def scale(pair: Pair) -> None:
        values = torch.empty(pair.classes, dtype=torch.float64).uniform_(-0.7, 0.7, generator=generator).exp()
        if not pair.positive:
            values *= torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
        apply_scale(pair, values, copy.own)

    def scale_and_turn(pair: Pair) -> None:
        scale(pair)
        if pair.heads is not None:
            apply_heads(pair, random_rotation(pair.heads.shape[1], generator), copy.own)

    again = []
    for pair, error in _errors(pairs, scale_and_turn, copy):
        pair.error, pair.proven = error, error <= TOLERANCE
        pair.rotates = pair.proven and pair.heads is not None
        if not pair.proven:
            again.append(pair)
    for pair, error in _errors(again, scale, copy):  # without the rotation of the heads
        pair.error, pair.proven = error, error <= TOLERANCE
        if not pair.proven:
            pair.refuse(f"a random scale changes the block's output by {error:.1e}", error)
    _prove_folds([pair for pair in pairs if pair.kind == "norm" and pair.proven], copy)


def _errors(pairs: Sequence[Pair], change: Change, copy: BlockCopy) -> list[tuple[Pair, float]]:
    """How much the block's output moves: for all pairs together, or one by one if that is too much."""
    if not pairs:
        return []
    with copy.undone(name for pair in pairs for name in pair.modules):
        for pair in pairs:
            change(pair)
        error = relative_error(copy.run(), copy.reference)
    if error <= TOLERANCE or len(pairs) == 1:
        return [(pair, error) for pair in pairs]
    return [found for pair in pairs for found in _errors([pair], change, copy)]


def _prove_folds(pairs: Sequence[Pair], copy: BlockCopy) -> None:
    """The folds themselves, with the bias where it may move; else with the bias left in the norm."""
    def fold(pair: Pair) -> None:
        apply_fold(pair, copy.own)

    for pair, error in _errors([pair for pair in pairs if pair.bias_moves], fold, copy):
        pair.error = max(pair.error or 0.0, error)
        if error > TOLERANCE:
            pair.bias_moves = False
    for pair in pairs:
        if not pair.bias_moves:
            try:
                check_fold(pair.sources[0].part, False)  # type: ignore[arg-type]
            except QuantizationError as problem:
                pair.refuse(str(problem))
    staying = [pair for pair in pairs if not pair.bias_moves and not pair.reason]
    for pair, error in _errors(staying, fold, copy):
        pair.error = error
        if error > TOLERANCE:
            pair.refuse(f"folding the gain changes the block's output by {error:.1e}", error)


def prove_rotation(pair: Pair, pairs: Sequence[Pair], copy: BlockCopy, generator: torch.Generator) -> None:
    """Whether ``block(x Q)`` equals ``block(x) Q`` once the stream's norms are folded and its matrices rotated."""
    if pair.reason:
        return
    folds = []
    for norm in pair.norms:
        fold = next((p for p in pairs if p.kind == "norm" and p.sources[0].name == norm.name), None)
        gain = norm.get_gain()
        if fold is not None and fold.proven:
            folds.append(fold)
        elif not bool((gain == gain[0]).all()):
            why = fold.reason if fold else "no reader was found"
            pair.refuse(f"the gain of {norm.name} cannot be folded: {why}")
            return
    rotation = random_rotation(pair.width, generator, pair.fix_ones)
    with copy.undone(name for changed in (pair, *folds) for name in changed.modules):
        for fold in folds:
            apply_fold(fold, copy.own)
        apply_rotation(pair, rotation, copy.name, copy.own)
        found = floats(copy.run(rotation))
    expected = floats(copy.reference)
    error = relative_error(found, [expected[0] @ rotation, *expected[1:]])
    if error > TOLERANCE:
        pair.refuse(f"a random rotation changes the output of {pair.place} by {error:.1e}", error)
    else:
        pair.proven, pair.error = True, error
