"""Layers outside the blocks as blocks of their own, so that a walk gives them inputs and targets like any other."""

from __future__ import annotations

from hfq.graph.read import Block, Plan

__all__ = ["promote"]

_PLAIN = ("linear", "transposed", "conv")


def promote(plan: Plan, *, always: bool = False) -> None:
    """Make every linear and convolution of ``plan.outside`` a block of one site, in a stack of its own.

    Between the blocks of convolutional networks a good part of the weights lies outside (resampling, projections of
    the stream); in other models that are embeddings and heads alone.

    Args:
        plan: not traced yet; changed in place.
        always: also where no site is a convolution.
    """
    if not always and not any(site.kind == "conv" for site in plan.sites):
        return
    stack = max((block.stack for block in plan.blocks), default=-1) + 1
    chosen = [site for site in plan.outside if site.kind in _PLAIN]
    plan.blocks += [Block(site.name, site.module, 0, stack + number, [site], groups=[[site]])
                    for number, site in enumerate(chosen)]  # fmt: skip
    plan.outside = [site for site in plan.outside if site.kind not in _PLAIN]
