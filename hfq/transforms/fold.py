"""Norms folded into their neighbours, the model computes the same: gains of norms into what reads them, whole batch
normalisations into the convolution before them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.graph import batchnorm, trace
from hfq.graph.links import Pair, apply_fold
from hfq.graph.pairs import PairReport
from hfq.graph.read import Plan
from hfq.layers import folded

__all__ = ["fold_batch_norms", "fold_norms"]

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


def fold_batch_norms(
    plan: Plan, call: Callable[[], Any], *, placement: Placement | None = None, tolerance: float = 1e-4
) -> dict[str, str]:
    """Multiply every batch normalisation that alone reads a convolution into that, and take it out, in place.

    Each one is proven on the numbers of the model: on random input the new convolution, in float64, gives what both
    gave before. Folding twice changes nothing.

    Args:
        plan: of the model; its sites stay valid.
        call: runs one forward pass of the whole model.
        placement: makes a module's weights available while they change (offloaded models).
        tolerance: largest relative difference of the outputs, for the dtype of the weights.

    Returns:
        Name of the convolution → name of the normalisation that it took in.

    Raises:
        QuantizationError: a normalisation is in training mode, has no statistics, or the proof failed.
    """
    training = [name for name, m in plan.model.named_modules()
                if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]  # fmt: skip
    if training:
        raise QuantizationError(f"{training[0]} (and {len(training) - 1} more) is in training mode, it normalises with "
                                "each batch: call model.eval() first")
    done = {}
    for norm, conv in batchnorm.after_convolutions(plan, trace.record(plan, call)).items():
        module = plan.model.get_submodule(conv)
        with placement(module) if placement else nullcontext():
            before = _outputs(module, plan.model.get_submodule(norm))
            folded.fold(plan.model, norm, conv)
            after = _outputs(module)
        error = float((before - after).norm() / before.norm().clamp(min=1e-30))
        if not error <= max(tolerance, 4 * torch.finfo(module.weight.dtype).eps):  # type: ignore[union-attr, arg-type]
            raise QuantizationError(f"{norm} folded into {conv} changes its output by {error:.2g}: the model is now "
                                    "damaged, load it again and leave this module out")
        done[conv] = norm
    return done


def _outputs(conv: nn.Module, norm: nn.Module | None = None) -> torch.Tensor:
    """What a convolution, and the normalisation after it, give for random input, in float64."""
    module: Any = copy.deepcopy(conv).double().cpu()
    size = [1 + d * (k - 1) + 2 * s for d, k, s in zip(module.dilation, module.kernel_size, module.stride, strict=True)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, module.in_channels, *size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        y = module(x)
        return y if norm is None else copy.deepcopy(norm).double().cpu()(y)


def folds_of(pairs: PairReport, rotation: Pair, block: str) -> list[Pair]:
    """The proven folds of the norms that lie in a stream, in one block."""
    names = {norm.name for norm in rotation.norms}
    return [pair for pair in pairs.proven("norm", block) if pair.sources[0].name in names]


def check_plan(model: nn.Module, plan: Plan) -> None:
    if plan.model is not model:
        raise QuantizationError("the plan was read from another model: call graph.read on this one")
