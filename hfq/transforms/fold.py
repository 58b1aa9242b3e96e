"""Norm gains folded into what reads them: the model computes the same, its norms only normalise."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from hfq.errors import QuantizationError
from hfq.graph.links import Pair, apply_fold
from hfq.graph.pairs import PairReport
from hfq.graph.read import Plan

__all__ = ["fold_norms"]

Placement = Callable[[nn.Module], AbstractContextManager[Any]]


def fold_norms(
    model: nn.Module, plan: Plan, pairs: PairReport, *, blocks: Collection[str] | None = None,
    placement: Placement | None = None,
) -> list[str]:
    """Fold the gain of every norm with a proven pair into its readers, in float64, in place.

    A bias goes along where every reader has one and nothing but moved elements lies between; else it stays in the norm,
    divided by the gain. Folding twice changes nothing.

    Args:
        model, plan, pairs: the model, its plan, and the pairs that ``graph.pairs.discover`` proved.
        blocks: names of the blocks to treat; default all.
        placement: makes a block's weights available while they change (offloaded models).

    Returns:
        Names of the norms that were folded.

    Raises:
        QuantizationError: the plan belongs to another model.
    """
    check_plan(model, plan)
    folded = []
    for block in plan.blocks:
        own = pairs.proven("norm", block.name)
        if not own or (blocks is not None and block.name not in blocks):
            continue
        with placement(block.module) if placement else nullcontext():
            for pair in own:
                apply_fold(pair)
                folded.append(pair.sources[0].name)
    return folded


def folds_of(pairs: PairReport, rotation: Pair, block: str) -> list[Pair]:
    """The proven folds of the norms that lie in a stream, in one block."""
    names = {norm.name for norm in rotation.norms}
    return [pair for pair in pairs.proven("norm", block) if pair.sources[0].name in names]


def check_plan(model: nn.Module, plan: Plan) -> None:
    if plan.model is not model:
        raise QuantizationError("the plan was read from another model: call graph.read on this one")
